"""Speed of the robust rules, side by side with the obvious ways in one run; figures are printed, nothing is asserted.

Run with ``python -m pytest tests/benchmarks/test_robust.py -s``. Two threads; medians of interleaved repetitions, and
the range of the ratios. ``RMTLLMF_BENCH_SHARE`` is the share of eight ViT-B/16 visual towers (0.25).
"""

import os
import statistics
import time

import numpy as np
import pytest
import scipy.stats
import torch

from rmtllmf.taskvec import (
    consensus,
    coordinate_median,
    geometric_median,
    multi_krum,
    norm_clipping,
    task_arithmetic,
    trimmed_mean,
)

pytestmark = pytest.mark.usefixtures("two_threads")

SHARE = float(os.environ.get("RMTLLMF_BENCH_SHARE", "0.25"))


@pytest.fixture(scope="module")
def vectors():
    """Eight ViT-B/16 visual towers, or as many of their blocks as are asked for."""
    shapes = {"conv1": (768, 3, 16, 16), "class": (768,), "pos": (197, 768), "proj": (768, 512)}
    for block in range(round(12 * SHARE)):
        shapes |= {
            f"{block}.{name}": shape
            for name, shape in {
                "ln_1.weight": (768,),
                "ln_1.bias": (768,),
                "in.weight": (2304, 768),
                "in.bias": (2304,),
                "out.weight": (768, 768),
                "out.bias": (768,),
                "ln_2.weight": (768,),
                "ln_2.bias": (768,),
                "fc.weight": (3072, 768),
                "fc.bias": (3072,),
                "proj.weight": (768, 3072),
                "proj.bias": (768,),
            }.items()
        }
    source = torch.Generator().manual_seed(0)
    return [{key: 0.01 * torch.randn(shape, generator=source) for key, shape in shapes.items()} for _ in range(8)]


@pytest.fixture(scope="module")
def out(vectors):
    return {key: torch.empty_like(tensor) for key, tensor in vectors[0].items()}


def stacked(vectors):
    """A generator of (N, ...) tensors, one at a time: the least memory that a stacked way needs."""
    for key in vectors[0]:
        yield torch.stack([vector[key] for vector in vectors])


def flats(vectors):
    return torch.stack([torch.cat([tensor.reshape(-1) for tensor in vector.values()]) for vector in vectors])


def compare(title, vectors, ours, peers, repetitions=3):
    """Prints medians, and of the peers' ratios to ours the median and the range over the interleaved repetitions."""
    functions = [ours, *peers.values()]
    seconds = [[] for _ in functions]
    for _ in range(repetitions):
        for times, function in zip(seconds, functions, strict=True):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    entries = sum(tensor.numel() for tensor in vectors[0].values())
    print(f"\n{title}, {len(vectors)} x {entries:,}: {statistics.median(seconds[0]):.3f} s", end="")
    for name, times in zip(peers, seconds[1:], strict=True):
        ratios = [peer / own for peer, own in zip(times, seconds[0], strict=True)]
        print(
            f"; {name} {statistics.median(times):.3f} s, {statistics.median(ratios):.1f} times as long "
            f"({min(ratios):.1f} to {max(ratios):.1f})",
            end="",
        )
    print()


def test_coordinate_median(vectors, out):
    compare(
        "coordinate median",
        vectors,
        lambda: coordinate_median(vectors, out=out),
        {
            "torch.median of stacks (the lower of the two)": lambda: [x.median(0).values for x in stacked(vectors)],
            "torch.sort of stacks": lambda: [x.sort(0).values[3:5].mean(0) for x in stacked(vectors)],
            "numpy.median of stacks": lambda: [np.median(x.numpy(), axis=0) for x in stacked(vectors)],
            "task arithmetic": lambda: task_arithmetic(vectors, out=out),
        },
    )


@pytest.mark.parametrize("trim", [1, 2])
def test_trimmed_mean(vectors, out, trim):
    compare(
        f"trimmed mean, {trim} on either side",
        vectors,
        lambda: trimmed_mean(vectors, trim, out=out),
        {
            "torch.sort of stacks": lambda: [x.sort(0).values[trim:-trim].mean(0) for x in stacked(vectors)],
            "scipy.stats.trim_mean": lambda: [scipy.stats.trim_mean(x, trim / 8, axis=0) for x in stacked(vectors)],
        },
    )


def weiszfeld(vectors, steps):
    """Robust federated averaging as it is usually written: smoothed, on stacked flats."""
    rows = flats(vectors)
    z = rows.mean(0)
    for _ in range(steps):
        weights = 1 / (rows - z).norm(dim=1).clamp_min(1e-6)
        z = (weights[:, None] * rows).sum(0) / weights.sum()
    return z


def krum_by_loops(vectors, hostile):
    rows = flats(vectors)
    squared = torch.stack([torch.stack([(row - other).square().sum() for other in rows]) for row in rows])
    scores = squared.sort(dim=1).values[:, 1 : len(rows) - hostile - 1].sum(1)
    return rows[scores.argsort()[: len(rows) - hostile]].mean(0)


def krum_by_cdist(vectors, hostile):
    rows = flats(vectors)
    scores = torch.cdist(rows, rows).square().sort(dim=1).values[:, 1 : len(rows) - hostile - 1].sum(1)
    return rows[scores.argsort()[: len(rows) - hostile]].mean(0)


def test_geometric_median(vectors, out):
    compare(
        "geometric median, to 1e-10",
        vectors,
        lambda: geometric_median(vectors, out=out),
        {"4 Weiszfeld steps on stacks (not converged)": lambda: weiszfeld(vectors, 4)},
    )


def test_multi_krum(vectors, out):
    compare(
        "multi-Krum, 2 hostile",
        vectors,
        lambda: multi_krum(vectors, 2, out=out),
        {
            "loops over stacks": lambda: krum_by_loops(vectors, 2),
            "torch.cdist of stacks": lambda: krum_by_cdist(vectors, 2),
        },
    )


def consensus_by_stacks(vectors):
    for x in stacked(vectors):
        total = x.sum(0)
        votes = (x.abs() >= 0.4 * (total - x).abs()).sum(0)
        yield 0.3 * total * (votes >= 2)


def test_consensus_and_norm_clipping(vectors, out):
    compare(
        "consensus",
        vectors,
        lambda: consensus(vectors, out=out),
        {"on stacks": lambda: list(consensus_by_stacks(vectors))},
    )
    compare(
        "norm clipping",
        vectors,
        lambda: norm_clipping(vectors, out=out),
        {"stacked flats": lambda: (x := flats(vectors), (n := x.norm(dim=1)), (n.median() / n).clamp_max(1) @ x)},
    )
