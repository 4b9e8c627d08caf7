"""Iso-C and TSV-Merge beside FusionBench's, interleaved in one run; figures are printed, nothing is asserted.

Run with ``python -m pytest tests/benchmarks/test_spectral.py -s`` where fusion_bench is installed. Two threads; eight
towers of ViT-B/16's matrices, of which RMTLLMF_BENCH_BLOCKS (2; the model has 12) blocks are taken and
RMTLLMF_BENCH_REPETITIONS (3) medians made. The exact values are those of SVDs in float64, for the tall and the square
matrices of one block.
"""

import contextlib
import io
import os
import statistics
import threading
import time
from pathlib import Path

import pytest
import torch

from helpers import spectral_definitions as definitions
from helpers.vit_b_16_shapes import shapes
from rmtllmf.taskvec import iso_c, tsv

pytestmark = pytest.mark.usefixtures("two_threads")

BLOCKS = int(os.environ.get("RMTLLMF_BENCH_BLOCKS", 2))
REPETITIONS = int(os.environ.get("RMTLLMF_BENCH_REPETITIONS", 3))


def towers(orders):
    """Gaussian entries; with `orders` the singular values of every matrix fall by so many orders of magnitude."""
    source = torch.Generator().manual_seed(0)

    def one(shape):
        entries = 0.01 * torch.randn(shape, generator=source)
        if orders and len(shape) == 2:
            size = min(shape)
            Q = torch.linalg.qr(torch.randn(size, size, generator=source)).Q
            falling = torch.logspace(0, -orders, size)
            entries = entries @ (Q * falling) @ Q.mT if size == shape[1] else (Q * falling) @ Q.mT @ entries
        return entries

    return [{key: one(shape) for key, shape in shapes(BLOCKS).items()} for _ in range(8)]


class Peak:
    """The most memory of this process while it runs, above that at its start, in bytes."""

    def __enter__(self):
        self.start = self.bytes = self.now()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()

    def now(self):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def watch(self):
        while not self.stop.wait(0.005):
            self.bytes = max(self.bytes, self.now())


def compare(name, spectrum, ours, theirs, exact):
    vectors = towers(spectrum)
    seconds, memory, results = {ours: [], theirs: []}, {}, {}
    for _ in range(REPETITIONS):
        for function, times in seconds.items():
            with Peak() as peak, contextlib.redirect_stdout(io.StringIO()):
                start = time.perf_counter()
                results[function] = function(vectors)
                times.append(time.perf_counter() - start)
            memory[function] = max(memory.get(function, 0), peak.bytes - peak.start)
    ratios = [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]

    def error(key, actual, expected):
        return float((actual[key] - expected[key]).double().norm() / expected[key].double().norm())

    apart = max((error(key, results[ours], results[theirs]), key) for key in vectors[0])
    some = [key for key in ("0.in", "0.out") if key in vectors[0]]
    true = {key: exact(torch.stack([vector[key].double() for vector in vectors])) for key in some}
    kind = f"{spectrum} orders" if spectrum else "flat"
    print(
        f"\n{name}, {kind}, {BLOCKS} blocks: {statistics.median(seconds[ours]):.2f} s, "
        f"FusionBench {statistics.median(seconds[theirs]):.2f} s: {statistics.median(ratios):.1f} times as long "
        f"({min(ratios):.1f} to {max(ratios):.1f}); at most {memory[ours] / 1e6:.0f} MB beside the vectors, theirs "
        f"{memory[theirs] / 1e6:.0f} MB; apart by {apart[0]:.1e} at most ({apart[1]}); from exact values "
        + ", ".join(
            f"{key} {error(key, results[ours], true):.1e}, theirs {error(key, results[theirs], true):.1e}"
            for key in some
        )
    )


@pytest.mark.parametrize("orders", [0, 1, 3, 8])
def test_iso_c(orders):
    peer = pytest.importorskip("fusion_bench.method.isotropic_merging.iso_utils")
    compare("Iso-C", orders, iso_c, lambda vectors: peer.iso_c(vectors, accelerator="cpu"), definitions.iso_c)


@pytest.mark.parametrize("orders", [0, 1, 3, 8])
def test_tsv(orders):
    peer = pytest.importorskip("fusion_bench.method.task_singular_vector.utils.TSVM_utils")
    merge = peer.compute_and_sum_svd_mem_reduction
    compare("TSV-Merge", orders, tsv, lambda vectors: merge(vectors, accelerator="cpu"), definitions.tsv)
