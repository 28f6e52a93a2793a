"""Which packages are installed: everything under pyro_sinkhorn/, and models/ as pyro_sinkhorn.models.

This cannot be said in pyproject.toml, whose package search knows no renaming.
"""

from setuptools import find_packages, setup

MODELS = "pyro_sinkhorn.models"

setup(
    package_dir={MODELS: "models"},
    packages=[
        *find_packages(include=["pyro_sinkhorn", "pyro_sinkhorn.*"]),
        MODELS,
        *(f"{MODELS}.{name}" for name in find_packages("models")),
    ],
)
