"""Cluster the iris flowers with a program that has no likelihood: three ellipsoids, uniform inside; half a minute.

    python examples/iris_ellipsoids.py                # prints which ellipsoid found which species
    python examples/iris_ellipsoids.py --smoke-test   # a few steps, to see that everything runs

A flower outside all ellipsoids has density 0, so that no likelihood could pull an ellipsoid towards it. Transport can
(Genevay, Peyré, Cuturi 2017, who clustered iris so). Species are used for the table at the end alone.
"""

from __future__ import annotations

import argparse

import pyro
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_iris
from sklearn.decomposition import PCA

from pyro_sinkhorn import SinkhornProgram, Trace_DataSinkhorn
from pyro_sinkhorn.models.ellipsoids import ellipsoid_radii, ellipsoids, spread_points


def main() -> None:
    """Fit, assign every flower, count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-steps", type=int, default=300)
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    num_steps = 3 if options.smoke_test else options.num_steps

    torch.set_num_threads(1)
    torch.manual_seed(0)
    flowers = load_iris()
    x = torch.tensor(PCA(3).fit_transform(flowers.data), dtype=torch.get_default_dtype())

    centres, radius = spread_points(x, 3)
    program = SinkhornProgram(
        ellipsoids(3, 3, centres, radius), loss=Trace_DataSinkhorn(match_size=75, scale=None)
    )
    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.02}, "T_max": num_steps}
    optim = pyro.optim.CosineAnnealingLR(schedule)
    program.fit(x, num_steps=num_steps, batch_size=150, seed=0, optim=optim)

    with program.active(), torch.no_grad():
        radii = ellipsoid_radii(x, pyro.param("axes"), pyro.param("centres"))
    nearest, species = radii.argmin(-1), torch.tensor(flowers.target)
    table = torch.stack([nearest[species == k].bincount(minlength=3) for k in range(3)])
    table = table[:, linear_sum_assignment(table.numpy(), maximize=True)[1]]
    print(f"{'':<12}{'ellipsoid':>9}")
    for name, row in zip(flowers.target_names, table.tolist(), strict=True):
        print(f"{name:<12}" + "".join(f"{count:5d}" for count in row))
    print(f"{int(table.diagonal().sum())} of {len(x)} flowers on the diagonal")
    print(f"{float((radii.amin(-1) <= 1).double().mean()):.0%} of the flowers are inside their ellipsoid")


if __name__ == "__main__":
    main()
