"""EMR-Merging and TALL-mask compression beside FusionBench's, in one run; values are asserted, times printed.

Run with ``python -m pytest tests/benchmarks/test_masks.py -s`` where fusion_bench is installed. Two threads; eight
towers of ViT-B/16's matrices, of which RMTLLMF_BENCH_BLOCKS (2; the model has 12) blocks are taken and
RMTLLMF_BENCH_REPETITIONS (3) medians made.
"""

import contextlib
import io
import os

import pytest
import torch

from helpers.timing import interleaved
from helpers.vit_b_16_shapes import shapes
from rmtllmf.taskvec import emr, emr_unified, tall_compression

pytestmark = pytest.mark.usefixtures("two_threads")

BLOCKS = int(os.environ.get("RMTLLMF_BENCH_BLOCKS", 2))
REPETITIONS = int(os.environ.get("RMTLLMF_BENCH_REPETITIONS", 3))


def towers():
    source = torch.Generator().manual_seed(0)
    return [
        {key: 0.01 * torch.randn(shape, generator=source) for key, shape in shapes(BLOCKS).items()} for _ in range(8)
    ]


def compare(name, ours, theirs):
    def silent():
        with contextlib.redirect_stdout(io.StringIO()):
            theirs()

    mine, other = interleaved(ours, silent, repetitions=REPETITIONS)
    print(f"\n{name}, {BLOCKS} blocks: {mine:.3f} s, FusionBench {other:.3f} s: {other / mine:.1f} times as long")


def test_emr():
    peer = pytest.importorskip("fusion_bench.method.emr_merging.utils")
    vectors = towers()
    stored = emr(vectors, rescale="tensors")
    unified, masks, rescalers = peer.emr_merge(vectors)
    for key, tensor in unified.items():
        torch.testing.assert_close(stored.unified[key], tensor, rtol=0, atol=0)
        assert all(torch.equal(mask[key], masks[key][task]) for task, mask in enumerate(stored.masks))
    apart = max(abs(a - float(b)) / a for a, b in zip(stored.rescalers, rescalers, strict=True))
    assert apart < 1e-5
    print(f"\nEMR: unified vector and masks are the same, factors apart by {apart:.1e}")
    compare("EMR", lambda: emr(vectors), lambda: peer.emr_merge(vectors))
    compare("EMR, only the vector", lambda: emr_unified(vectors), lambda: peer.emr_merge(vectors))


def test_tall_compression():
    peer = pytest.importorskip("fusion_bench.method.tall_mask.task_arithmetic")
    vectors = towers()
    zeros = {key: torch.zeros_like(tensor) for key, tensor in vectors[0].items()}

    def theirs():
        total = peer.state_dict_sum(vectors)
        masks = [peer.generate_task_masks(total, vector, zeros, 0.4) for vector in vectors]
        return total, masks

    with contextlib.redirect_stdout(io.StringIO()):
        total, masks = theirs()
    stored = tall_compression(vectors, 0.4)
    different = entries = 0
    for task, mask in enumerate(masks):
        for key, chosen in mask.items():
            torch.testing.assert_close(stored.unified[key], total[key], rtol=1e-6, atol=1e-8)
            different += int((stored.masks[task][key] != chosen.bool()).sum())
            entries += chosen.numel()
    assert different < 1e-5 * entries  # the product rounds otherwise
    print(f"\nTALL masks: {different} of {entries} bits differ")
    compare("TALL masks", lambda: tall_compression(vectors, 0.4), theirs)
