"""Transport problems of every kind that a caller might give, ordinary and extreme, drawn by hypothesis."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.properties.reference import cost_of

COSTS = ("sqeuclidean", "euclidean", "l1", "geodesic")
#: By which the cost grows when the points do.
POWER = {"sqeuclidean": 2, "euclidean": 1, "l1": 1, "geodesic": 0}


@dataclass(frozen=True)
class Case:
    """One call of ``sinkhorn``: its tensors and options, and in words what is special about it."""

    x: Tensor
    y: Tensor
    epsilon: float
    a: Tensor | None
    b: Tensor | None
    cost: str
    backend: str
    words: str
    options: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<{self.words}>"

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def parts(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Points and weights of every problem of the batch, as float64 arrays of what the tensors hold."""
        batch = torch.broadcast_shapes(self.x.shape[:-2], self.y.shape[:-2])
        clouds = [
            t.detach().double().expand(*batch, *t.shape[-2:]).reshape(-1, *t.shape[-2:])
            for t in (self.x, self.y)
        ]
        weights = []
        for cloud, w in zip(clouds, (self.a, self.b), strict=True):
            n = cloud.shape[-2]
            w = torch.full((n,), 1 / n, dtype=torch.float64) if w is None else w.detach().double()
            w = w.expand(*batch, n).reshape(-1, n)
            weights.append(w / w.sum(-1, keepdim=True))
        return [
            tuple(t.numpy() for t in four)
            for four in zip(*clouds, *weights, strict=True)  # type: ignore[misc]
        ]

    def costs(self) -> list[np.ndarray]:
        return [cost_of(self.cost, x, y) for x, y, _, _ in self.parts()]


def layouts(values: np.ndarray, dtype: torch.dtype, layout: str) -> Tensor:
    """The same numbers in memory that is laid out in some other way."""
    t = torch.as_tensor(values).to(dtype)
    if layout == "transposed":
        return t.mT.contiguous().mT
    if layout == "strided":
        room = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), torch.nan, dtype=dtype)
        room[..., 1::2] = t
        return room[..., 1::2]
    if layout == "reversed":
        return t.flip(-2).contiguous().flip(-2)
    if layout == "expanded":
        return t[..., :1, :].expand(t.shape)
    return t


@st.composite
def points(
    draw: Any, n: int, d: int, batch: tuple[int, ...], other: np.ndarray | None
) -> tuple[np.ndarray, str]:
    """``(*batch, n, d)`` of about unit size."""
    kinds = ["normal", "normal", "lattice", "identical", "two places", "doubled", "outlier", "line"]
    if other is not None and other.shape[-2:] == (n, d):
        kinds += ["the other", "the other moved about"]
    kind = draw(st.sampled_from(kinds))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if kind.startswith("the other"):
        assert other is not None
        order = np.arange(n) if kind == "the other" else rng.permutation(n)
        return np.broadcast_to(other, (*batch, n, d))[..., order, :].copy(), kind
    found = rng.normal(size=(*batch, n, d))
    if kind == "lattice":
        found = np.round(found)
    elif kind == "identical":
        found = np.broadcast_to(found[..., :1, :], found.shape).copy()
    elif kind == "two places":
        found = np.where(np.arange(n)[:, None] % 2, found[..., :1, :], -found[..., :1, :])
    elif kind == "doubled":
        found = found[..., np.arange(n) // 2, :]
    elif kind == "outlier":
        found[..., 0, :] *= 10.0 ** draw(st.integers(1, 8))
    elif kind == "line":
        found = found[..., :1] * np.ones(d)
    return found, kind


@st.composite
def weights(draw: Any, n: int, batch: tuple[int, ...]) -> tuple[np.ndarray | None, str]:
    kind = draw(st.sampled_from(["uniform", "uniform", "unequal", "with zeros", "tiny", "one has all"]))
    if kind == "uniform":
        return None, kind
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (*batch, n) if draw(st.booleans()) else (n,)
    w = rng.uniform(0.2, 1, size=shape)
    if kind == "with zeros":
        w[..., rng.random(n) < 0.4] = 0
        w[..., rng.integers(n)] = 1
    elif kind == "tiny":
        w[..., 0] *= 10.0 ** draw(st.integers(-30, -3))
        w[..., -1] = 1
    elif kind == "one has all":
        w[:] = 0
        w[..., rng.integers(n)] = 1
    return w / w.sum(-1, keepdims=True), kind


@st.composite
def cases(draw: Any, extreme: bool = True, **options: Any) -> Case:
    """A problem. Without ``extreme`` its numbers are of unit size and its dtype is float64."""
    sizes = st.sampled_from([1, 2, 2, 3, 5, 8, 12])
    n, m = draw(sizes), draw(sizes)
    d = draw(st.sampled_from([1, 1, 2, 2, 3, 7, 4096] if extreme else [1, 2, 3]))
    batch_x, batch_y = draw(
        st.sampled_from([((), ()), ((), ()), ((1,), (1,)), ((2,), (2,)), ((2, 1), (1, 2)), ((), (3,))])
    )
    batch = tuple(np.broadcast_shapes(batch_x, batch_y))
    cost = draw(st.sampled_from([c for c in COSTS if c != "geodesic" or d > 1]))
    x, kind_x = draw(points(n, d, batch_x, None))
    y, kind_y = draw(points(m, d, batch_y, x if batch_x in ((), batch_y) else None))
    scale, shift, apart = 0, 0.0, 0.0
    if cost == "geodesic":
        x, y = (p / np.maximum(np.linalg.norm(p, axis=-1, keepdims=True), 1e-6) for p in (x, y))
        x, y = (np.where(np.linalg.norm(p, axis=-1, keepdims=True) < 0.5, np.eye(d)[0], p) for p in (x, y))
    elif extreme:
        scale = draw(
            st.one_of(st.just(0), st.integers(-30, 30), st.sampled_from([-30, -25, -20, 20, 25, 30]))
        )
        shift = draw(st.sampled_from([0.0, 0.0, 1.0, 1e3, 1e6]))
        apart = draw(st.sampled_from([0.0, 0.0, 1e-3, 1.0, 1e2, 1e5]))
        x, y = (x + shift) * 10.0**scale, (y + shift + apart) * 10.0**scale
    dtype = draw(st.sampled_from([torch.float64, torch.float32])) if extreme else torch.float64
    layout_x, layout_y = (
        draw(st.sampled_from(["plain"] * 3 + ["transposed", "strided", "reversed", "expanded"])) for _ in "xy"
    )
    with np.errstate(over="ignore"):
        x_t, y_t = layouts(x, dtype, layout_x), layouts(y, dtype, layout_y)
    (a, kind_a), (b, kind_b) = draw(weights(n, batch)), draw(weights(m, batch))
    a_t, b_t = (None if w is None else torch.as_tensor(w).to(dtype) for w in (a, b))
    largest = max(float(c.max()) for c in Case(x_t, y_t, 1.0, a_t, b_t, cost, "log", "").costs())
    relative = draw(st.integers(-8, 6) if extreme else st.integers(-1, 1))
    unit = largest if largest > 0 else 10.0 ** (POWER[cost] * scale)
    epsilon = unit * 10.0**relative
    backends = ["auto", "dense", "log"] + (["streaming"] if cost == "sqeuclidean" else [])
    backend = draw(st.sampled_from(backends))
    words = (
        f"x {kind_x} {tuple(x.shape)} {layout_x}, y {kind_y} {tuple(y.shape)} {layout_y}, scale 1e{scale}, shift {shift:g}, "
        f"apart {apart:g}, {str(dtype)[6:]}, {cost} up to {largest:.3g}, epsilon {epsilon:.3g} (1e{relative}), "
        f"a {kind_a}, b {kind_b}, {backend} {options}"
    )
    return Case(x_t, y_t, epsilon, a_t, b_t, cost, backend, words, options)
