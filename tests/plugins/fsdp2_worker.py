"""Run under torchrun with two processes: fusion of models that are spread by FSDP2 is that of one process."""

from __future__ import annotations

import copy
import os
import sys

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from plugins.fsdp2 import fuse_into, over_the_air, save_whole, shard
from rmtllmf.channel import transmit
from rmtllmf.taskvec import TaskVector, fuse, iso_c, task_arithmetic, ties

MSE = [0.1, 0.5]
RULES = {"task_arithmetic": (task_arithmetic, {"scale": 0.4}), "ties": (ties, {"density": 0.3}), "iso_c": (iso_c, {})}


def new_model():
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.GELU()) for _ in range(2))  # 5 rows on 2 processes
    return nn.Sequential(nn.Linear(4, 5), *blocks, nn.Linear(5, 3))


def train(model, number):
    """Every process trains on its own half; FSDP2 averages their gradients."""
    source = torch.Generator().manual_seed(number)
    x, y = torch.randn(32, 4, generator=source), torch.randint(3, (32,), generator=source)
    half = slice(dist.get_rank(), None, dist.get_world_size())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        cross_entropy(model(x[half]), y[half]).backward()
        optimizer.step()


def whole(state):
    return {name: tensor.full_tensor().clone() for name, tensor in state.items()}


class Tied(nn.Module):
    """A head that shares its matrix with an embedding, as in many language models."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def check_tied(mesh):
    """What the page says: two tensors in the state dict, and one again once a name is taken out of it."""
    torch.manual_seed(0)
    single = Tied()
    model = shard(copy.deepcopy(single), [], mesh)
    assert model.head.weight is model.embed.weight
    base = copy.deepcopy(model.state_dict())
    tuned = {name: tensor + torch.ones_like(tensor) for name, tensor in base.items()}
    vector = TaskVector.between(base, tuned)
    assert len(vector) == 2
    assert abs(vector.norm() - 56**0.5) < 1e-5  # 28 entries, twice
    heard = [whole(vector) for vector in over_the_air([vector], MSE[1], seed=0)]
    assert not torch.equal(heard[0]["embed.weight"], heard[0]["head.weight"])
    # of one process, where it is one tensor
    one = TaskVector.between(single.state_dict(), {name: tensor + 1 for name, tensor in single.state_dict().items()})
    sent = one.select("embed.weight")
    expected = ties([TaskVector(v) for v in transmit([sent], MSE[1], seed=0)], density=0.3).apply_to(
        single.state_dict()
    )
    for state in (base, tuned):
        del state["head.weight"]
    received = over_the_air([TaskVector.between(base, tuned)], MSE[1], seed=0)
    model.load_state_dict(fuse(base, received, ties, density=0.3), strict=False)
    assert model.head.weight is model.embed.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.full_tensor(), expected[name])


def main(folder):
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = new_model()
    model = shard(model, list(model)[1:3], mesh)
    base = copy.deepcopy(model.state_dict())
    assert all(isinstance(tensor, DTensor) for tensor in base.values())
    assert sum(tensor.to_local().numel() for tensor in base.values()) < sum(t.numel() for t in base.values())
    states = []
    for number in range(2):
        model.load_state_dict(base)
        train(model, number)
        states.append(copy.deepcopy(model.state_dict()))
    vectors = [TaskVector.between(base, state) for state in states]
    # the oracle: everything in one piece, in plain dicts
    before, *after = map(whole, (base, *states))
    sent = [{name: state[name] - tensor for name, tensor in before.items()} for state in after]
    assert any(bool(tensor.any()) for tensor in sent[0].values())
    heard = transmit(sent, MSE, seed=0)
    for air in (False, True):
        spread = over_the_air(vectors, MSE, seed=0) if air else vectors
        for name, (rule, options) in RULES.items():
            fuse_into(model, base, spread, rule=rule, **options)
            update = rule(heard if air else sent, **options)
            state = model.state_dict()
            for key, tensor in before.items():
                assert isinstance(state[key], DTensor)
                assert state[key].placements == base[key].placements
                assert torch.equal(state[key].full_tensor(), tensor + update[key]), (name, air, key)
    check_tied(mesh)
    path = os.path.join(folder, "fused.safetensors")
    save_whole(model, path)
    dist.barrier()
    single = new_model()
    single.load_state_dict(load_file(path))
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        torch.testing.assert_close(single(x), model(x))
    dist.barrier()
    print(f"process {dist.get_rank()}: all is well", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stderr.flush()
    os._exit(0)  # torch's own threads sometimes abort a process that is otherwise at its end
