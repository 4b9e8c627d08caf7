"""What objects look like at a prompt and in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np
import torch

__all__ = ["counted", "course", "decibels", "html_table", "spread"]


def counted(number: int, what: str) -> str:
    """A number of things: ``"1,024 entries"``, ``"1 user"``; the plural is by an s or from y to ies."""
    if number == 1:
        return f"1 {what}"
    return f"{number:,} {what[:-1]}ies" if what.endswith("y") else f"{number:,} {what}s"


def spread(values: Any, unit: str = "") -> str:
    """Numbers, arrays or tensors in three digits, as their least and largest: ``"0.013 to 0.21 W"``."""
    numbers = _tensor(values).reshape(-1)
    if not len(numbers):
        return "none"
    least, largest = (f"{float(end):.3g}" for end in (numbers.min(), numbers.max()))
    return " ".join(filter(None, [least if least == largest else f"{least} to {largest}", unit]))


def _tensor(values: Any) -> torch.Tensor:
    if isinstance(values, np.ndarray):  # a copy: torch warns of memory that it must not write to
        values = torch.from_numpy(np.array(values, dtype=np.float64))
    return torch.as_tensor(values, dtype=torch.float64).detach()


def decibels(values: Any, unit: str = "dB") -> str:
    """Linear numbers as their least and largest in dB: ``"-16.2 to 3 dB"``; in W with the unit "dBm"."""
    numbers = _tensor(values)
    return spread(10 * torch.log10(numbers) + (30 if unit == "dBm" else 0), unit)


def course(losses: Sequence[float], what: str = "step") -> str:
    """What became of a loss: ``"60 steps, loss 2.3 to 0.41"``."""
    ends = f", loss {losses[0]:.3g} to {losses[-1]:.3g}" if losses else ""
    return counted(len(losses), what) + ends


def html_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> str:
    """A table for a notebook; the first column is text, the others are numbers."""

    def row(cells: Sequence[object], tag: str) -> str:
        styles = ["left", *["right"] * (len(cells) - 1)]
        parts = [
            f'<{tag} style="text-align:{style}">{escape(str(cell))}</{tag}>'
            for style, cell in zip(styles, cells, strict=True)
        ]
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    after = f"<p>{escape(note)}</p>" if note else ""
    return f"<p>{escape(title)}</p><table><thead>{row(header, 'th')}</thead><tbody>{body}</tbody></table>{after}"
