"""Errors that name their site. Both derive from built-in classes, so existing handlers keep working."""

from __future__ import annotations


class ProgramError(ValueError):
    """A model, a guide or their data do not fit together; the message names the site and what to do."""


class NonFiniteError(ArithmeticError):
    """NaN or infinity appeared; the message names where it came from."""


class NoDensityError(ProgramError, NotImplementedError):
    """A density was asked of something that has none. As a ``ValueError``, Pyro adds the name of the site to it."""
