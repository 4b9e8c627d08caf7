"""Wrong input to plot, and what the error must say: (id, call, exception, pattern)."""

from __future__ import annotations

import torch

from helpers.two_by_two import X
from rmtllmf import plot
from rmtllmf.errors import InputError, NonFiniteError, ShapeError

NAN, INF = float("nan"), float("inf")

ROW = {"condition": "ideal", "method": "both", "mean": 0.5, "values": [0.5]}


def charted(**entries):
    return lambda: plot.fusion_chart([{**ROW, **entries}])


CASES = [
    ("similarity_heatmap: a row", lambda: plot.similarity_heatmap([1.0, 0.5]), ShapeError, r"square.*\(2,\)"),
    ("similarity_heatmap: not square", lambda: plot.similarity_heatmap(X), ShapeError, r"square.*\(3, 2\)"),
    (
        "similarity_heatmap: names",
        lambda: plot.similarity_heatmap(torch.eye(2), ["a"]),
        ShapeError,
        "names.*2 rows, got 1",
    ),
    ("similarity_heatmap: NaN", lambda: plot.similarity_heatmap([[NAN]]), NonFiniteError, "similarity"),
    ("similarity_heatmap: no cosines", lambda: plot.similarity_heatmap([[7.0]]), InputError, "between -1 and 1.*7"),
    ("similarity_heatmap: words", lambda: plot.similarity_heatmap([["a"]]), TypeError, "similarity"),
    ("similarity_heatmap: ax", lambda: plot.similarity_heatmap([[1.0]], ax=3), TypeError, "ax.*int"),
    ("fusion_chart: no rows", lambda: plot.fusion_chart([]), InputError, "rows.*none"),
    ("fusion_chart: one row bare", lambda: plot.fusion_chart(ROW), TypeError, "rows.*dict"),
    ("fusion_chart: no mapping", lambda: plot.fusion_chart([3]), TypeError, r"rows\[0\].*int"),
    (
        "fusion_chart: no mean",
        lambda: plot.fusion_chart([{"condition": "ideal", "method": "both"}]),
        InputError,
        "lacks mean",
    ),
    ("fusion_chart: condition", charted(condition="idle"), InputError, "condition is 'idle'.*'ideal'"),
    ("fusion_chart: method", charted(method="all"), InputError, "method is 'all'.*'both'"),
    ("fusion_chart: base under attack", charted(method="base"), InputError, "method is 'base'"),
    ("fusion_chart: twice", lambda: plot.fusion_chart([ROW, ROW]), InputError, r"rows\[1\].*second row"),
    ("fusion_chart: NaN", charted(mean=NAN), InputError, r"rows\[0\]\['mean'\].*nan"),
    ("fusion_chart: values", charted(values=[0.5, INF]), InputError, r"rows\[0\]\['values'\].*inf"),
]
