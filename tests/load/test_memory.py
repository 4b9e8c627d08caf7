"""What is called a thousand times takes no more memory than what is called once, and leaves nothing on the model."""

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.repeated_calls import World, calls
from rmtllmf.resilience import protect, realign
from rmtllmf.taskvec import expert_merging, input_grams, regmean_plus_plus

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
STATM = Path("/proc/self/statm")


def live():
    """Tensors that Python holds, in cycles that nobody has collected too."""
    return sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))


def hooks(model):
    return [getattr(module, kind) for module in model.modules() for kind in HOOKS if getattr(module, kind)]


@pytest.mark.slow
def test_nothing_is_left_behind(tmp_path):
    """No tensor waits in a cycle for the garbage collector, which on a GPU would come too late."""
    world = World(tmp_path)
    left = {}
    for name, call in calls(world).items():
        call()
        gc.collect()
        gc.freeze()  # what is there already is not looked through again
        gc.disable()
        try:
            for _ in range(3):
                call()
            if count := live():
                left[name] = count
        finally:
            gc.enable()
            gc.unfreeze()
        assert not hooks(world.model), name
        assert all(parameter.grad is None and parameter.requires_grad for parameter in world.model.parameters()), name
    assert left == {}


def resident():
    """Bytes of this process that are in memory."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="asks Linux for its memory")
@pytest.mark.parametrize(
    ("name", "times", "bound"),
    [
        ("fuse: task arithmetic", 1000, 3e6),  # a vector is 74 kB: kept each time it would be 74 MB
        ("transmit", 1000, 3e6),
        ("save and load", 1000, 3e6),
        ("fuse_files", 200, 3e6),
        ("protect, nothing to tune with", 100, 3e6),
    ],
)
def test_a_thousand_in_a_row(name, times, bound, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    world = World(tmp_path, width=128)
    assert world.vectors[0].norm() > 0
    call = calls(world)[name]
    for _ in range(times // 10):
        call()
    before = resident()
    for _ in range(times):
        call()
    assert resident() - before < bound


class Moody(nn.Module):
    """Takes part in a few calls, and then refuses."""

    def __init__(self, calls):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
        self.left = calls

    def forward(self, x):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("the model has had enough")
        return self.layers(x)


def vectors():
    state = Moody(0).state_dict()
    return [{key: torch.full_like(tensor, 0.1 * seed) for key, tensor in state.items()} for seed in (1, 2)]


def tasks():
    x = torch.randn(6, 4)
    targets = torch.zeros(6, dtype=torch.long), torch.ones(6, dtype=torch.long)
    return {name: (nn.Identity(), [(x, target) for target in targets]) for name in "ab"}


FAILING = {
    "input_grams": lambda model: input_grams(model, [torch.ones(2, 4)] * 9),
    "expert_merging": lambda model: expert_merging(vectors(), model, tasks(), hidden=["layers.0"], steps=9),
    "regmean_plus_plus": lambda model: regmean_plus_plus(vectors(), model, tasks(), layers=["layers.0", "layers.1"]),
    "realign": lambda model: realign(model, tasks(), steps=9),
    "protect": lambda model: protect(model, model.state_dict(), vectors(), [0.1, 0.1], tasks(), seed=0, steps=9),
}


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("name", FAILING)
def test_a_call_that_fails_leaves_no_hooks(name, calls):
    model = Moody(calls).train()
    frozen = model.layers[0].bias.requires_grad_(False)
    try:
        FAILING[name](model)
    except RuntimeError as error:
        assert "has had enough" in str(error)  # noqa: PT017 (it may also come to its end)
    assert not hooks(model)
    assert all(module.training for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert frozen is model.layers[0].bias
    assert torch.backends.mha.get_fastpath_enabled()
