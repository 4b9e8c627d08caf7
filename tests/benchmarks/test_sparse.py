"""Rules that remove or weigh entries beside mergekit's and FusionBench's, interleaved in one run.

Run with ``python -m pytest tests/benchmarks/test_sparse.py -s`` where the peers are installed. Two threads; eight task
vectors with the shapes of ViT-B/16's visual tower, of which RMTLLMF_BENCH_BLOCKS (2; the model has 12) blocks are taken
and medians of RMTLLMF_BENCH_REPETITIONS (3). Ratios are printed; only values are asserted.
"""

import os

import pytest
import torch

from helpers import sparse_definitions as sparse
from helpers.timing import interleaved
from helpers.vit_b_16_shapes import shapes
from rmtllmf.taskvec import breadcrumbs, della, model_stock, pcb_merging, slerp, task_arithmetic

pytestmark = pytest.mark.usefixtures("two_threads")

BLOCKS = int(os.environ.get("RMTLLMF_BENCH_BLOCKS", 2))
REPETITIONS = int(os.environ.get("RMTLLMF_BENCH_REPETITIONS", 3))


def towers(count=8, common=0.0):
    """Gaussian entries, to which all have added `common` times the same ones."""
    draw = torch.Generator().manual_seed(0)
    shared = {key: torch.randn(shape, generator=draw) for key, shape in shapes(BLOCKS).items()}
    return [
        {key: common * shared[key] + torch.randn(shape, generator=draw) for key, shape in shapes(BLOCKS).items()}
        for _ in range(count)
    ]


def compare(name, ours, theirs):
    """Prints times and their ratio; the largest difference relative to the largest entry, tensor by tensor."""
    mine, other = interleaved(ours, theirs, repetitions=REPETITIONS)
    found, expected = ours(), theirs()
    apart = max(float((found[k] - expected[k]).abs().max() / expected[k].abs().max()) for k in expected)
    differ = sum(int((~torch.isclose(found[k], expected[k], rtol=1e-4, atol=1e-6)).sum()) for k in expected)
    print(f"\n{name}: {mine:.3f} s against {other:.3f} s, {other / mine:.1f} times as fast; ", end="")
    print(f"{differ} of {sum(t.numel() for t in expected.values()):,} entries differ, by {apart:.1e} at most")
    return differ, apart


def test_breadcrumbs():
    peer = pytest.importorskip("mergekit.sparsify")
    vectors = towers()

    def theirs():
        return {
            key: 0.3 * sum(peer.magnitude_outliers(vector[key], density=0.143, gamma=0.007) for vector in vectors)
            for key in vectors[0]
        }

    differ, _ = compare("breadcrumbs, mergekit", lambda: breadcrumbs(vectors, 0.85, 0.007, scale=0.3), theirs)
    assert differ <= 2 * len(vectors) * len(vectors[0])  # it rounds the number kept, we the numbers removed


@pytest.mark.parametrize("linear", [True, False])
def test_della(linear):
    """Draws are other ones, so that means are compared; how they are equal given the same draws, the tests say."""
    peer = pytest.importorskip("mergekit.sparsify")
    elect = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic").get_mask
    vectors = [{key: t for key, t in tower.items() if t.ndim < 3} for tower in towers()]
    rule = {"rule": task_arithmetic} if linear else {"undecided": "positive"}

    def theirs():
        merged = {}
        for key in vectors[0]:
            rows = torch.stack([peer.della_magprune(v[key], 0.7, 0.07, peer.RescaleNorm.l1) for v in vectors])
            mask = torch.ones_like(rows) if linear else elect(rows, "sum")
            merged[key] = (rows * mask).sum(0) / (1 if linear else mask.sum(0).clamp(min=1))
        return merged

    for rescale in ("probability", "norm"):
        name = f"DELLA{' linear' if linear else ''} by {rescale}, mergekit"
        compare(name, lambda rescale=rescale: della(vectors, scale=1.0, seed=0, rescale=rescale, **rule), theirs)
    found, expected = della(vectors, scale=1.0, seed=0, rescale="norm", **rule), theirs()
    for key, tensor in expected.items():
        assert abs(float(found[key].abs().mean() / tensor.abs().mean()) - 1) < 0.05


def mergekit(method, vectors, **parameters):
    """A merge of models of base zero, tensor by tensor."""
    merge = pytest.importorskip("mergekit.merge_methods.registry").get(method)
    group = pytest.importorskip("mergekit.merge_methods.base").TensorGroup.from_tensors
    zeros = {key: torch.zeros_like(tensor) for key, tensor in vectors[0].items()}
    groups = {key: group([zero, *(vector[key] for vector in vectors)], base_index=0) for key, zero in zeros.items()}
    return lambda: {key: merge([one], parameters=parameters)[0] for key, one in groups.items()}


def test_model_stock_beside_mergekit():
    vectors = towers(4, common=1.0)
    _, apart = compare("Model Stock, mergekit", lambda: model_stock(vectors), mergekit("model_stock", vectors))
    assert apart < 1e-4


def test_model_stock_beside_fusion_bench():
    peer = pytest.importorskip("fusion_bench.method.model_stock.model_stock")
    vectors = towers(2, common=1.0)
    zeros = {key: torch.zeros_like(tensor) for key, tensor in vectors[0].items()}

    def theirs():
        return peer.merge_weights(*vectors, zeros, peer.compute_ratio(peer.compute_angle(*vectors, zeros), k=2))

    _, apart = compare("Model Stock of two, FusionBench", lambda: model_stock(vectors), theirs)
    assert apart < 1e-4


@pytest.mark.parametrize("peer", ["mergekit", "FusionBench"])
def test_slerp(peer):
    """Of two mappings, whatever they hold."""
    vectors = towers(2, common=0.5)
    if peer == "mergekit":
        merge = pytest.importorskip("mergekit.merge_methods.registry").get("slerp")
        group = pytest.importorskip("mergekit.merge_methods.base").TensorGroup.from_tensors
        groups = {key: group([vector[key] for vector in vectors], base_index=0) for key in vectors[0]}

        def theirs():
            return {key: merge([one], parameters={"t": 0.3})[0] for key, one in groups.items()}
    else:
        module = pytest.importorskip("fusion_bench.method.slerp.slerp")

        def theirs():
            return module.slerp_on_state_dicts(0.3, *vectors)

    _, apart = compare(f"SLERP, {peer}", lambda: slerp(vectors, 0.3), theirs)
    assert apart < 1e-4


def test_pcb_merging_beside_its_definition():
    """No peer can be installed: the authors' code, transcribed, with its full sorts; vectors are as short as in use."""
    vectors = [{key: 1e-3 * tensor for key, tensor in tower.items()} for tower in towers(4)]
    sizes = [tensor.numel() for tensor in vectors[0].values()]

    def theirs():
        rows = torch.stack([torch.cat([tensor.reshape(-1) for tensor in vector.values()]) for vector in vectors])
        parts = sparse.pcb_merging(rows, 0.1).split(sizes)
        return {key: part.view(vectors[0][key].shape) for key, part in zip(vectors[0], parts, strict=True)}

    differ, _ = compare("PCB-Merging, its definition", lambda: pcb_merging(vectors, 0.1), theirs)
    assert differ < 1e-4 * sum(sizes)
