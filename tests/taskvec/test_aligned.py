"""Vectors that name different tensors, made to name the same: fusions, ties, order, gradients, what is refused."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from helpers.adapted_models import PEFT_IS_THE_ORACLE, QUIET, adapted, base_model, merged_minus_base
from rmtllmf.channel import transmit
from rmtllmf.errors import InputError, StateMismatchError
from rmtllmf.taskvec import TaskVector, adapter_vector, aligned, coordinate_median, dare, lines, task_arithmetic

pytestmark = QUIET


def three(tmp_path, base):
    """Three adapters of different ranks on different layers, and their dense vectors."""
    peft = pytest.importorskip("peft", reason=PEFT_IS_THE_ORACLE)
    paths, dense = [], []
    for seed, targets in enumerate((["first"], ["first", "blocks.1.0"], ["blocks.2.0", "conv"]), 1):
        model = adapted(peft.LoraConfig(r=seed, lora_alpha=4, target_modules=targets), base, seed)
        model.save_pretrained(tmp_path / str(seed))
        paths.append(tmp_path / str(seed))
        dense.append(merged_minus_base(model, base))
    return paths, dense


def test_adapters_of_different_layers_fuse_as_dense_models_do(tmp_path):
    base = base_model()
    paths, dense = three(tmp_path, base)
    with pytest.raises(StateMismatchError):
        task_arithmetic([adapter_vector(path) for path in paths])
    vectors = aligned([adapter_vector(path) for path in paths])
    fused = task_arithmetic(vectors, 0.4)
    assert set(fused) == {"first.weight", "blocks.1.0.weight", "blocks.2.0.weight", "conv.weight"}
    for key in fused:
        exact = 0.4 * sum(vector[key] for vector in dense)
        torch.testing.assert_close(fused[key].double(), exact, rtol=1e-5, atol=2e-6)
    # products of sums are something else
    moved = fused.apply_to(copy.deepcopy(base))
    assert not torch.equal(moved.conv.weight, base.conv.weight)
    heard = transmit(vectors, 0.0, seed=0)
    torch.testing.assert_close(heard[1]["blocks.1.0.weight"], vectors[1]["blocks.1.0.weight"], rtol=1e-4, atol=1e-5)


def test_the_same_bits_for_any_number_of_threads(tmp_path):
    paths, _ = three(tmp_path, base_model())
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(task_arithmetic(aligned([adapter_vector(path) for path in paths])))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][key], other[key]) for other in results for key in results[0])


def test_aligned_keeps_ties_and_order():
    shared, alone = torch.ones(2), torch.full((2,), 3.0)
    a, b, c = aligned([{"x": shared, "y": shared}, {"y": alone}, {"z": torch.ones(1, dtype=torch.float64)}])
    assert list(a) == list(b) == list(c) == ["x", "y", "z"]
    assert torch.equal(b["x"], alone), "the other name of the same tensor"
    assert c["z"].dtype == torch.float64
    assert torch.equal(c["x"], torch.zeros(2))
    fused = task_arithmetic([a, b, c], 1.0)
    assert fused["x"] is fused["y"]
    assert torch.equal(fused["x"], torch.full((2,), 4.0))
    held = TaskVector(c)
    assert held["x"] is held["y"]
    (same,) = aligned([TaskVector({"x": shared})])
    assert same["x"].data_ptr() == shared.data_ptr(), "nothing is copied"


def test_aligned_zeros_are_tied_only_where_other_vectors_tie_them():
    shared = torch.ones(2)
    layers = {"blocks.0.w": torch.ones(2), "blocks.1.w": torch.full((2,), 2.0)}
    _, silent, _ = aligned([{**layers, "x": shared, "y": shared}, {"blocks.2.w": torch.ones(2)}, {"y": shared}])
    held = TaskVector(silent)
    assert held["x"] is held["y"]
    assert held["blocks.0.w"] is not held["blocks.1.w"]
    silent = {key: tensor for key, tensor in silent.items() if "blocks" in key}
    assert lines(silent, beta=0.5, alpha=0.25)["blocks.2.w"].tolist() == [0.75, 0.75]
    chain = {"y": layers["blocks.0.w"], "z": layers["blocks.0.w"]}
    fused = task_arithmetic(aligned([{"x": shared, "y": shared}, chain, {}, layers]), 1.0)
    assert fused["x"] is fused["z"]


def test_aligned_vectors_must_not_be_written_to_either():
    a, b = {"x": torch.ones(2)}, {"y": torch.ones(1)}
    for rule in (task_arithmetic, partial(dare, seed=0)):
        with pytest.raises(InputError, match=r"out\['x'\] shares memory with vectors\[0\]\['x'\]"):
            rule(aligned([a, b]), out={"x": a["x"], "y": torch.ones(1)})
    assert a["x"].tolist() == [1.0, 1.0]


def test_gradients_flow_through_aligned_vectors():
    a, b = {"x": torch.ones(2, requires_grad=True)}, {"y": torch.ones(1)}
    task_arithmetic(aligned([a, b]), 0.25)["x"].sum().backward()
    assert a["x"].grad.tolist() == [0.25, 0.25]
    a["x"].grad = None
    fused = dare(aligned([a, b]), 0.5, scale=1.0, seed=0)["x"]
    fused.sum().backward()
    assert torch.equal(a["x"].grad, fused.detach())
    with pytest.raises(InputError, match="gradients flow through linear rules only"):
        coordinate_median(aligned([a, b]))


def test_aligned_vectors_that_are_spread_over_processes():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        dense = [{"x": torch.arange(4.0), "y": torch.ones(3)}, {"x": -torch.ones(4), "z": torch.ones(2, 2)}]
        spread = [{k: distribute_tensor(t, mesh, [Shard(0)]) for k, t in vector.items()} for vector in dense]
        for rule in (task_arithmetic, coordinate_median, partial(dare, seed=0)):
            expected, found = rule(aligned(dense)), rule(aligned(spread))
            assert all(torch.equal(found[key].full_tensor(), expected[key]) for key in expected)
    finally:
        dist.destroy_process_group()


def test_aligned_refuses():
    with pytest.raises(InputError, match="empty sequence"):
        aligned([])
    for single in ({"a": torch.ones(1)}, TaskVector({"a": torch.ones(1)}), "text", torch.ones(1)):
        with pytest.raises(TypeError, match="expected a sequence"):
            aligned(single)
    with pytest.raises(TypeError, match=r"vectors\[1\]"):
        aligned([{"a": torch.ones(1)}, 3])
    with pytest.raises(StateMismatchError, match=r"vectors\[1\]\['a'\] has shape \(2,\)"):
        aligned([{"a": torch.ones(1)}, {"a": torch.ones(2)}])
