"""Resilient fusion of fine-tuned models that arrive over a jammed wireless uplink.

Task vectors go in, a jammed uplink bends them, fusion adds them up, resilience repairs the sum, metrics say how well.
The sub-packages tell that story: `channel`, `taskvec`, `resilience` and `metrics`, with `clip` for open_clip models,
`plot` for figures and `errors` for what can go wrong. They are loaded on first use, so that importing `rmtllmf` costs
nothing.

Example:
    >>> import rmtllmf
    >>> rmtllmf.taskvec.heuristic_scale(8)
    0.3
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    from . import channel, clip, errors, metrics, plot, resilience, taskvec

__version__ = "0.1.0"

__all__ = ["__version__", "channel", "clip", "errors", "metrics", "plot", "resilience", "taskvec"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
