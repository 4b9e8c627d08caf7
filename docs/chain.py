"""The picture of the chain on the first page.

python docs/chain.py                    into docs/_static, a second
python docs/chain.py --out elsewhere
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
BLUE, ORANGE, RED, GREEN, GREY = "#dbe9f6", "#fde5cc", "#f9d5d5", "#dcefdc", "#eeeeee"


def box(ax: Axes, x: float, y: float, text: str, colour: str, width: float = 2.0, height: float = 0.8) -> None:
    """A rounded box around a text, centred."""
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.12"
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=colour, edgecolor="#666666", lw=0.8))
    ax.text(x, y, text, ha="center", va="center", fontsize=8.5, linespacing=1.35)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "#444444") -> None:
    """From one point to another."""
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, lw=1.1))


def chain() -> Figure:
    """From fine-tuned models to one multi-task model, with the part of the library that each step is in."""
    figure = Figure(figsize=(11.5, 3.6), layout="constrained")
    ax = figure.subplots()
    ax.set(xlim=(-1.2, 14.2), ylim=(-2.1, 2.1), aspect="equal")
    ax.axis("off")
    for y, name in ((1.1, "user 1"), (0.0, "user 2"), (-1.1, "user Q")):
        box(ax, 0.0, y, f"{name}: fine-tuned\n$-$ base = task vector", BLUE)
        arrow(ax, (1.03, y), (2.47, 0.35 * y))
    ax.text(0.0, -0.55, "⋮", ha="center", va="center", fontsize=10)
    box(ax, 3.5, 0.0, "uplink\n$y = H P^{1/2} s + z$", ORANGE)
    box(ax, 3.5, 1.6, "jammer knows $H$\n$z$: trace $C \\leq P_N$", RED)
    arrow(ax, (3.5, 1.17), (3.5, 0.43), "#b03030")
    box(ax, 6.2, 0.0, "receiver\nvectors with errors", ORANGE)
    arrow(ax, (4.53, 0.0), (5.17, 0.0))
    box(ax, 8.9, 0.0, "estimate, fuse\nbase $+\\;\\lambda\\,\\Sigma_q\\,\\hat\\tau_q$", GREEN)
    arrow(ax, (7.23, 0.0), (7.87, 0.0))
    box(ax, 11.6, 0.0, "restore and realign\non a few samples", GREEN)
    arrow(ax, (9.93, 0.0), (10.57, 0.0))
    box(ax, 11.6, -1.5, "one model\nfor all tasks", GREY)
    arrow(ax, (11.6, -0.43), (11.6, -1.07))
    for x, name in ((0.0, "taskvec"), (4.85, "channel"), (9.2, "taskvec, resilience")):
        ax.text(x, -1.95, name, ha="center", va="center", fontsize=9, family="monospace", color="#555555")
    ax.text(13.55, -1.5, "metrics", ha="center", va="center", fontsize=9, family="monospace", color="#555555")
    for x in (1.75, 7.55):
        ax.plot([x, x], [-2.05, 2.05], ls=":", color="#999999", lw=0.8, zorder=0)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "_static", help="folder (default: docs/_static)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    chain().savefig(options.out / "chain.png", dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
