"""Run under torchrun with two processes: every rule on DTensors gives the bits that one process gives on the whole."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

import rmtllmf.taskvec._engine as engine
from helpers.fusion_rules import ROWS
from rmtllmf.channel import transmit, transmit_sum
from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.taskvec import TaskVector, fuse, iso_c, task_arithmetic
from rmtllmf.taskvec.fuse import is_ours

SHAPES = {"a.w": (6, 4), "b.w": (3, 7), "one": (1,), "conv": (2, 3, 2, 2), "long": (40,), "s": ()}


def vectors(count, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [{k: torch.randn(s, generator=source) for k, s in SHAPES.items()} for _ in range(count)]


def spread(state, mesh, dim=0):
    return {k: distribute_tensor(t, mesh, [Shard(dim)]) if t.ndim > dim else t for k, t in state.items()}


def check_same(found, expected, what):
    assert set(found) == set(expected), what
    for key, tensor in expected.items():
        whole = found[key].full_tensor() if hasattr(found[key], "full_tensor") else found[key]
        assert torch.equal(whole, tensor), (what, key)


def check_rules(mesh):
    engine.PIECE = 8
    for row in ROWS:
        for dim in (0, 1):
            count = max(5, row.fewest)
            whole = vectors(count)
            parts = [spread(vector, mesh, dim) for vector in whole]
            expected = row.rule(whole)
            found = row.rule(parts)
            check_same(found, expected, row.name)
            for key, tensor in parts[0].items():
                assert getattr(found[key], "placements", None) == getattr(tensor, "placements", None), (row.name, key)
            if dim == 0:
                check_same(row.rule(parts, out=spread(vectors(1, 9)[0], mesh)), expected, f"{row.name}, out")
                if not is_ours(row.rule):
                    continue  # `fuse` gathers the vectors for a function of the tests, so that its result is not spread
                base = vectors(1, 5)[0]
                models = [{key: base[key] + vector[key] for key in base} for vector in whole]
                fused = fuse(spread(base, mesh), [spread(model, mesh) for model in models], row.rule)
                check_same(fused, fuse(base, models, row.rule), f"{row.name}, fuse")


def check_vectors(mesh):
    base, tuned = vectors(2, 3)
    whole = TaskVector.between(base, tuned)
    part = TaskVector.between(spread(base, mesh), spread(tuned, mesh))
    check_same(part, whole, "between")
    check_same(part.apply_to(spread(base, mesh), 0.5), whole.apply_to(base, 0.5), "apply_to")
    check_same(0.3 * part + part, 0.3 * whole + whole, "arithmetic")
    assert part.norm() == whole.norm()
    assert part.dot(part) == whole.dot(whole)


def check_errors(mesh):
    whole = vectors(3)
    whole[1]["long"][0] = float("nan")  # on the first process only
    wanted = r"vectors\[1\]\['long'\] holds 1" if dist.get_rank() == 0 else "another process"
    with pytest.raises(NonFiniteError, match=wanted):
        task_arithmetic([spread(vector, mesh) for vector in whole])
    with pytest.raises(NonFiniteError):
        TaskVector(spread(whole[1], mesh))
    a, b = vectors(2)
    replicated = {key: distribute_tensor(tensor, mesh, [Replicate()]) for key, tensor in b.items()}
    for other in (b, replicated):
        with pytest.raises(StateMismatchError, match="not spread"):
            task_arithmetic([spread(a, mesh), other])
    with pytest.raises((StateMismatchError, InputError), match="out"):
        task_arithmetic([spread(a, mesh)], out=spread(b, mesh, dim=1))
    partial = {"w": DTensor.from_local(torch.ones(2), mesh, [Partial()])}
    with pytest.raises(InputError, match="sum not yet taken"):
        task_arithmetic([partial])


def check_the_channel_asks_for_whole_vectors(mesh):
    parts = [spread(vector, mesh) for vector in vectors(2)]
    for send in (transmit, transmit_sum):
        with pytest.raises(InputError, match=r"is a DTensor.*full_tensor"):
            send(parts, 0.1, seed=0)


def check_layouts(mesh):
    """Square matrices: whatever is spread otherwise has parts of as many entries."""

    def square(seed, placements):
        whole = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        return {"w": distribute_tensor(whole, mesh, placements) if placements else whole}

    rows, columns, plain = [Shard(0)], [Shard(1)], None
    for base, tuned in ((rows, columns), (plain, rows), (rows, plain)):
        with pytest.raises(StateMismatchError, match=r"finetuned\[0\]\['w'\] is not spread .* as base"):
            fuse(square(0, base), [square(1, tuned)])
        with pytest.raises(StateMismatchError, match=r"base\['w'\] is not spread"):
            fuse(square(0, base), [TaskVector(square(1, tuned))])
        with pytest.raises(StateMismatchError, match=r"out\['w'\] is not spread"):
            task_arithmetic([square(0, base)], out=square(1, tuned))


def check_failing_together(mesh):
    """What goes wrong on the first process only, in the middle of what all of them do together."""
    first = dist.get_rank() == 0
    elsewhere = "another process"
    base = {"a": torch.zeros(4, 4), "b": torch.ones(4, 4)}
    base["a"][0] = 65000
    half = spread({key: tensor.half() for key, tensor in base.items()}, mesh)
    tuned = TaskVector(spread({key: 500 * torch.eye(4) for key in base}, mesh))
    with pytest.raises(NonFiniteError, match="overflows" if first else elsewhere):
        fuse(half, [tuned, tuned], iso_c)
    out = spread({key: torch.empty(4, 4, dtype=torch.float32) for key in base}, mesh)
    if first:
        out["a"] = DTensor.from_local(out["a"].to_local().double(), mesh, [Shard(0)], run_check=False)
    with pytest.raises((StateMismatchError, NonFiniteError), match="float64" if first else elsewhere):
        iso_c([tuned, tuned], out=out)


def check_gradients_and_ties(mesh):
    a, b = vectors(2)
    parts = [spread(a, mesh), spread(b, mesh)]
    parts[0]["a.w"].requires_grad_()
    task_arithmetic(parts, 0.5, weights={"b.w": 0.0})["a.w"].sum().backward()
    assert torch.equal(parts[0]["a.w"].grad.full_tensor(), torch.full((6, 4), 0.5))
    for part in parts:
        part["a.w"] = part["a.w"].detach()
        part["head"] = part["a.w"]
    for rule in (partial(task_arithmetic, scale=0.3), iso_c):
        fused = rule(parts)
        assert fused["head"] is fused["a.w"]
    fused = fuse(parts[0], parts[1:], skip="head")
    assert fused["head"] is fused["a.w"]


def check_fsdp(mesh, folder):
    """Fine-tuned FSDP2 models, saved and loaded with torch.distributed.checkpoint, fused and loaded into a model."""

    def model(seed):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))

    whole = [model(seed).state_dict() for seed in range(3)]
    sharded = []
    for seed in range(3):
        module = fully_shard(model(seed), mesh=mesh)
        dcp.save(module.state_dict(), checkpoint_id=folder / str(seed))
        loaded = fully_shard(model(99), mesh=mesh).state_dict()
        dcp.load(loaded, checkpoint_id=folder / str(seed))
        sharded.append(loaded)
    fused = fuse(sharded[0], sharded[1:], scale=0.4)
    expected = fuse(whole[0], whole[1:], scale=0.4)
    check_same(fused, expected, "FSDP2")
    dcp.save(fused, checkpoint_id=folder / "fused")
    target = fully_shard(model(7), mesh=mesh)
    state = target.state_dict()
    dcp.load(state, checkpoint_id=folder / "fused")
    target.load_state_dict(state)
    check_same(target.state_dict(), expected, "FSDP2, loaded")


def main():
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    check_rules(mesh)
    check_vectors(mesh)
    check_errors(mesh)
    check_the_channel_asks_for_whole_vectors(mesh)
    check_layouts(mesh)
    check_failing_together(mesh)
    check_gradients_and_ties(mesh)
    check_fsdp(mesh, Path(sys.argv[1]))
    dist.barrier()
    print(f"process {dist.get_rank()}: all is well", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stderr.flush()
    os._exit(0)  # torch's own threads sometimes abort a process that is otherwise at its end
