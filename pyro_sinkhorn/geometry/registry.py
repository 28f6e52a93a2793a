"""Which geometry a distribution gets: by its type first, then by its support."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints

from pyro_sinkhorn.geometry.base import Geometry
from pyro_sinkhorn.geometry.composite import Pieces
from pyro_sinkhorn.geometry.curved import Circle, Simplex, Sphere
from pyro_sinkhorn.geometry.discrete import Boolean, Counts, Integers, OneHot
from pyro_sinkhorn.geometry.elementwise import HalfLine, Interval, Real
from pyro_sinkhorn.geometry.matrices import (
    CorrCholesky,
    CorrMatrix,
    LowerCholesky,
    LowerTriangular,
    PositiveDefinite,
)
from pyro_sinkhorn.geometry.ordered import Ordered, PositiveOrdered

Factory = Callable[[Any], Geometry]

_BY_TYPE: dict[type, Factory] = {}
_BY_SUPPORT: dict[type, Factory] = {}


def register_geometry(key: Any, factory: Factory | None = None) -> Any:
    r"""Teach pyro_sinkhorn a distribution or a support.

    :param key: a distribution class, or a constraint (class or instance) for every distribution with that support.
        Distributions win over supports, subclasses over their parents; a second registration replaces the first
    :param factory: the site's distribution :math:`\to` :class:`~pyro_sinkhorn.geometry.Geometry`. It is called with
        the distribution as the model states it, ``Independent`` and ``expand`` included. Without it,
        ``register_geometry(key)`` is a decorator
    :returns: the factory
    :raises TypeError: where the key is neither

    >>> import pyro.distributions as dist
    >>> @register_geometry(dist.Logistic)
    ... def logistic(fn):
    ...     return Real(fn.event_shape)
    >>> geometry_of(dist.Logistic(0.0, 1.0).expand([3]).to_event(1))
    Real(event_shape=(3,))
    """
    if factory is None:
        return lambda function: register_geometry(key, function)
    if isinstance(key, constraints.Constraint):
        key = type(key)
    if isinstance(key, type) and issubclass(key, constraints.Constraint):
        _BY_SUPPORT[key] = factory
    elif isinstance(key, type) and issubclass(key, torch.distributions.Distribution):
        _BY_TYPE[key] = factory
    else:
        raise TypeError(
            f"register_geometry got {key!r}: expected a distribution class such as pyro.distributions.Gamma, or a "
            "constraint such as pyro.distributions.constraints.positive"
        )
    return factory


def geometry_of(fn: Any, site: str | None = None) -> Geometry:
    """The geometry of a site's distribution.

    :param fn: a Pyro distribution
    :param site: its name, for the error
    :raises ValueError: where neither the type nor the support is known; the message shows what to register
    """
    for cls in type(_core(fn)).__mro__:
        if cls in _BY_TYPE:
            return _BY_TYPE[cls](fn)
    constraint = base_support(fn)
    for cls in type(constraint).__mro__:
        if cls in _BY_SUPPORT:
            return _BY_SUPPORT[cls](fn)
    raise ValueError(_unknown(fn, constraint, site))


def is_angle(fn: Any) -> bool:
    """Whether values are angles, of which numbers a turn apart are one. Not a matter of supports: Pyro calls them real."""
    try:
        return not getattr(fn.support, "is_discrete", False) and isinstance(geometry_of(fn), Circle)
    except (ValueError, NotImplementedError):  # data need no geometry
        return False


def geometry_at(site: dict[str, Any]) -> Geometry:
    """:func:`geometry_of` the distribution of a site of a trace, looked up once: of counts it sums probabilities."""
    fn, found = site["fn"], site.get("_geometry")
    if found is None or found[0] is not fn:
        found = site["_geometry"] = (fn, geometry_of(fn, site["name"]))
    geometry: Geometry = found[1]
    return geometry


def base_support(fn: Any) -> Any:
    """The constraint under ``constraints.independent``."""
    constraint = fn.support
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def _core(fn: Any) -> Any:
    """The distribution under Independent, Masked and Expanded, whose type says what it is."""
    wrappers = (
        torch.distributions.Independent,
        dist.MaskedDistribution,
        dist.torch_distribution.ExpandedDistribution,
    )
    while isinstance(fn, wrappers):
        fn = fn.base_dist
    return fn


def _unknown(fn: Any, constraint: Any, site: str | None) -> str:
    kind = type(_core(fn))
    core = kind.__name__
    said = f"pyro.distributions.{core}" if getattr(dist, core, None) is kind else core
    where = f"latent site {site!r}: " if site is not None else ""
    if getattr(constraint, "is_discrete", False):
        return (
            f"{where}{core} with event shape {tuple(fn.event_shape)} has the discrete support {constraint}: its states "
            "cannot be listed, so no guide could give each a probability. Sum it out of the model (for a mixture: "
            "MixtureSameFamily as likelihood), or take Bernoulli, Categorical, OneHotCategorical, Binomial or Poisson latents"
        )
    return (
        f"{where}{core} with event shape {tuple(fn.event_shape)} has the support {constraint}, for which there is no "
        f"geometry. Teach it one:\n\n"
        f"    class Mine(pyro_sinkhorn.geometry.Geometry):\n"
        f"        def head(self, raw): ...      # (..., num_raw) -> (..., *event_shape), a value in the support\n"
        f"        def embed(self, value): ...   # (..., *event_shape) -> (..., e), compared by squared distance\n\n"
        f"    pyro_sinkhorn.register_geometry({said}, lambda fn: Mine(fn.event_shape))"
    )


#: Distributions on the line without a second moment, hence without an expected squared cost.
_HEAVY_TAILED = (dist.Cauchy, dist.StudentT, dist.MultivariateStudentT, dist.Stable)


def _is_heavy_tailed(fn: Any) -> bool:
    """Such a distribution, or an affine map of one."""
    core = _core(fn)
    if isinstance(core, torch.distributions.TransformedDistribution):
        affine = (torch.distributions.AffineTransform, dist.transforms.AffineAutoregressive)
        return all(isinstance(t, affine) for t in core.transforms) and _is_heavy_tailed(core.base_dist)
    return isinstance(core, _HEAVY_TAILED)


def _of_component(fn: Any) -> Geometry:
    """A mixture lives where its components do; between ends that differ, from the lowest to the highest."""
    core = _core(fn)
    component = core.component_distribution if hasattr(core, "component_distribution") else core.component0
    ends = base_support(component)
    if isinstance(ends, (constraints.interval, constraints.half_open_interval)):
        low, high = torch.as_tensor(ends.lower_bound).min(), torch.as_tensor(ends.upper_bound).max()
        return Interval(fn.event_shape, low, high)
    if _is_heavy_tailed(component):
        return Real(fn.event_shape, heavy_tailed=True)
    found = geometry_of(component)
    # Of the mixture's own event: Independent may have made dimensions of the batch part of it.
    found_shape = torch.Size(found.event_shape)
    return (
        found
        if found_shape == fn.event_shape
        else geometry_of(_Support(base_support(component), fn.event_shape))
    )


@dataclass(frozen=True)
class _Support:
    """All that a factory reads of a distribution that is known by its support alone."""

    support: Any
    event_shape: torch.Size
    base_dist: Any = None


def _pieces(fn: Any) -> Geometry:
    constraint, shape = base_support(fn), torch.Size(fn.event_shape)
    axis = constraint.dim if constraint.dim < 0 else constraint.dim - len(shape)
    stacked = isinstance(constraint, constraints.stack)
    pieces = []
    for i, part in enumerate(constraint.cseq):
        sizes = list(shape)
        if stacked:
            del sizes[axis]
        else:
            sizes[axis] = constraint.lengths[i]
        pieces.append(geometry_of(_Support(part, torch.Size(sizes))))
    return Pieces(shape, pieces, axis, stacked)


register_geometry(dist.MixtureSameFamily, _of_component)
register_geometry(dist.MaskedMixture, _of_component)
for _angles in (dist.VonMises, dist.SineSkewed, dist.SineBivariateVonMises):
    register_geometry(_angles, lambda fn: Circle(fn.event_shape))

register_geometry(constraints.real, lambda fn: Real(fn.event_shape, heavy_tailed=_is_heavy_tailed(fn)))
register_geometry(constraints.positive, lambda fn: HalfLine(fn.event_shape, base_support(fn).lower_bound))
register_geometry(constraints.greater_than, lambda fn: HalfLine(fn.event_shape, base_support(fn).lower_bound))
register_geometry(
    constraints.greater_than_eq, lambda fn: HalfLine(fn.event_shape, base_support(fn).lower_bound)
)
register_geometry(
    constraints.less_than, lambda fn: HalfLine(fn.event_shape, base_support(fn).upper_bound, sign=-1)
)
for _bounded in (constraints.interval, constraints.half_open_interval):
    register_geometry(
        _bounded,
        lambda fn: Interval(fn.event_shape, base_support(fn).lower_bound, base_support(fn).upper_bound),
    )
register_geometry(constraints.ordered_vector, lambda fn: Ordered(fn.event_shape))
register_geometry(constraints.positive_ordered_vector, lambda fn: PositiveOrdered(fn.event_shape))
register_geometry(constraints.lower_triangular, lambda fn: LowerTriangular(fn.event_shape))
register_geometry(constraints.unit_lower_cholesky, lambda fn: LowerTriangular(fn.event_shape, True))
for _cholesky in (constraints.lower_cholesky, constraints.softplus_lower_cholesky):
    register_geometry(_cholesky, lambda fn: LowerCholesky(fn.event_shape))
register_geometry(constraints.corr_cholesky, lambda fn: CorrCholesky(fn.event_shape))
register_geometry(constraints.corr_matrix, lambda fn: CorrMatrix(fn.event_shape))
for _covariance in (constraints.positive_definite, constraints.positive_semidefinite):
    register_geometry(_covariance, lambda fn: PositiveDefinite(fn.event_shape))
for _composite in (constraints.cat, constraints.stack):
    register_geometry(_composite, _pieces)


def _integers(fn: Any) -> Geometry:
    """Between ends that may differ along the batch, from the lowest to the highest."""
    core, ends = _core(fn), base_support(fn)
    low, high = torch.as_tensor(ends.lower_bound).min(), torch.as_tensor(ends.upper_bound).max()
    # Of labels; counts are floating points. A distribution with ends that differ would not list its states.
    dtype = torch.long if isinstance(core, torch.distributions.Categorical) else torch.get_default_dtype()
    return Integers(fn.event_shape, int(low), int(high), dtype)


register_geometry(constraints.boolean, lambda fn: Boolean(fn.event_shape))
register_geometry(constraints.one_hot, lambda fn: OneHot(fn.event_shape))
register_geometry(constraints.integer_interval, _integers)
register_geometry(constraints.nonnegative_integer, lambda fn: Counts(fn.event_shape, fn))
register_geometry(constraints.simplex, lambda fn: Simplex(fn.event_shape))
register_geometry(constraints.sphere, lambda fn: Sphere(fn.event_shape))
