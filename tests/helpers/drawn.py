"""Whether a figure is drawn where it was asked for, and nothing else of matplotlib is touched."""

from __future__ import annotations

import matplotlib as mpl
from matplotlib.figure import Figure


def assert_drawn(draw, folder):
    """On the Axes given, or on a figure of its own that can be saved; settings stay as they were."""
    ax = Figure().add_subplot()
    assert draw(ax) is ax
    settings = dict(mpl.rcParams)
    draw(None).figure.savefig(folder / "figure.png")
    assert (folder / "figure.png").stat().st_size > 5000
    assert dict(mpl.rcParams) == settings
