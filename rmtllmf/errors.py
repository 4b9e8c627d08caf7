"""The exceptions and warnings that the library raises; each message says what to do about it."""

from __future__ import annotations

import sys
import warnings

__all__ = [
    "ConvergenceError",
    "InputError",
    "NonFiniteError",
    "NotPSDError",
    "RmtllmfWarning",
    "ShapeError",
    "StateMismatchError",
    "UnmergeableWarning",
]


class InputError(ValueError):
    """An argument that cannot be used; the message names it, what it was and what was expected.

    Every error about the *value* of an argument derives from this one, and so from ``ValueError``. An argument of
    the wrong *kind* (a real ``H``, a string for a number) raises a plain ``TypeError``.

    Example:
        >>> from rmtllmf.taskvec import heuristic_scale
        >>> heuristic_scale(0)
        Traceback (most recent call last):
        ...
        rmtllmf.errors.InputError: num_tasks: expected a whole number of at least 1, got 0
    """


class ShapeError(InputError):
    """Shapes that do not fit together.

    Example:
        >>> issubclass(ShapeError, ValueError)
        True
    """


class StateMismatchError(InputError):
    """Two mappings of name -> tensor that must agree in keys, shapes or dtypes do not.

    Example:
        >>> issubclass(StateMismatchError, ValueError)
        True
    """


class NonFiniteError(InputError):
    """NaN or infinity where only finite numbers make sense.

    Example:
        >>> issubclass(NonFiniteError, ValueError)
        True
    """


class NotPSDError(InputError):
    """A covariance matrix that is not Hermitian positive semidefinite.

    Example:
        >>> issubclass(NotPSDError, ValueError)
        True
    """


class ConvergenceError(RuntimeError):
    """An iteration ended without reaching its tolerance; nothing half-finished is returned.

    Example:
        >>> issubclass(ConvergenceError, RuntimeError)
        True
    """


class RmtllmfWarning(UserWarning):
    """Base of the library's warnings: the result is right, but probably not what was meant.

    Example:
        >>> issubclass(RmtllmfWarning, UserWarning)
        True
    """


class UnmergeableWarning(RmtllmfWarning):
    """A model that was moved away from its base without changing its function, so that merging destroys it.

    Example:
        >>> issubclass(UnmergeableWarning, UserWarning)
        True
    """


def warn(message: str) -> None:
    """A `RmtllmfWarning` at the line that called the library, however deep inside it is found."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("rmtllmf", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RmtllmfWarning, stacklevel=level)
