"""What realignment leaves as it found it, whether it goes well or not, and the numbers that stop it."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from helpers.realigned_models import TOKENS, Tied, encoder, snapshot, two_tasks, unchanged
from rmtllmf.errors import InputError, NonFiniteError, ShapeError
from rmtllmf.resilience import realign


def test_running_statistics_follow_the_training_unless_frozen():
    free, frozen = Tied(), Tied()
    realign(free, TOKENS, steps=3)
    realign(frozen, TOKENS, steps=3, frozen=["norm.running_*", "norm.num_batches_tracked"])
    assert free.norm.running_mean.any()
    assert not frozen.norm.running_mean.any()
    assert frozen.norm.num_batches_tracked == 0


class Explodes(Exception):
    pass


@pytest.mark.parametrize("how", ["well", "loss", "optimizer", "not finite", "used up"])
def test_flags_gradients_and_modes_are_left_as_they_were(how):
    model, tasks = Tied(), TOKENS
    model.eval()
    model.drop.train()
    model.norm.weight.requires_grad_(False)
    model.norm.bias.grad = kept = torch.ones(4)
    head = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.9))
    head[1].eval()
    head[0].bias.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in [*model.parameters(), *head.parameters()]]
    modes = [module.training for module in [*model.modules(), *head.modules()]]
    seen = []

    def loss(logits, targets):
        seen.append((model.training, model.drop.training, head.training, head[0].training))
        if how == "loss" and len(seen) == 2:
            raise Explodes
        return cross_entropy(logits, targets) * (math.nan if how == "not finite" and len(seen) == 2 else 1)

    class Optimizer(torch.optim.SGD):
        def step(self, closure=None):
            if how == "optimizer":
                raise Explodes
            super().step(closure)

    def call():
        batches = iter(tasks) if how == "used up" else tasks
        realign(model, {"t": (head, batches)}, steps=3, loss=loss, optimizer=lambda p: Optimizer(p, lr=0.1))

    if how == "well":
        call()
    else:
        with pytest.raises({"not finite": NonFiniteError, "used up": InputError}.get(how, Explodes)):
            call()
    assert seen[0] == (True, True, False, False)
    assert [parameter.requires_grad for parameter in [*model.parameters(), *head.parameters()]] == flags
    assert [module.training for module in [*model.modules(), *head.modules()]] == modes
    assert model.norm.bias.grad is kept
    assert kept.tolist() == [1, 1, 1, 1]
    assert model.embed.weight.grad is None
    assert head[0].running_mean.abs().sum() == 0


def test_a_loss_that_is_not_finite_names_step_and_task_and_changes_nothing():
    model, tasks = encoder(), two_tasks()
    tasks["b"] = (
        tasks["b"][0],
        [*tasks["b"][1][:1], (torch.full((5, 4), math.nan), torch.zeros(5, dtype=torch.int64))],
    )
    once = copy.deepcopy(model)
    realign(once, two_tasks(), steps=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(NonFiniteError, match=r"task 'b' is nan in step 1"):
        realign(model, tasks, steps=5, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert unchanged(snapshot(once), model)


def test_a_loss_of_several_numbers_is_an_error():
    with pytest.raises(ShapeError, match="one number"):
        realign(encoder(), two_tasks(), steps=1, loss=lambda z, y: cross_entropy(z, y, reduction="none"))


def test_a_loss_that_depends_on_nothing_trained_is_an_error():
    tasks = {"a": (lambda features: features.detach() @ torch.ones(4, 2, requires_grad=False), two_tasks()["b"][1])}
    with pytest.raises(InputError, match="does not depend"):
        realign(encoder(), tasks, steps=1)


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    """sqrt at 0: the loss is finite, its gradient is not."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return x + self.w.abs().sqrt()

    model = Root()
    with pytest.raises(NonFiniteError, match="gradient in step 0 of 'w' is not finite"):
        realign(model, [(torch.ones(3, 2), torch.tensor([0, 1, 1]))], steps=1)
    assert torch.equal(model.w, torch.zeros(2))


def test_parameters_that_leave_the_finite_are_found_after_the_last_step():
    class Exploding(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.fill_(float("inf"))

    with pytest.raises(NonFiniteError, match="value after the last step of 'weight'"):
        realign(nn.Linear(2, 2), [(torch.ones(3, 2), torch.tensor([0, 1, 1]))], steps=1, optimizer=Exploding)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_needs_an_optimizer_of_its_own(dtype):
    """With AdamW its steps would round to nothing, or to NaN."""
    model = nn.Linear(2, 2).to(dtype)
    batches = [(torch.ones(3, 2, dtype=dtype), torch.tensor([0, 1, 1]))]
    with pytest.raises(InputError, match="float32"):
        realign(model, batches)
    realign(model, batches, steps=1, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))


def test_frozen_statistics_are_also_used_while_training():
    """What is trained is what is returned: the last loss is that of the returned model in evaluation mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    model[1].running_mean.fill_(2.0)
    model[1].running_var.fill_(0.05)
    x, y = torch.randn(40, 3), torch.arange(40) % 2
    kept = model[1].running_mean.clone()
    done = realign(model, [(x, y)], steps=30, lr=1e-2, frozen=["1.*"], warmup=0.0)
    assert torch.equal(model[1].running_mean, kept)
    with torch.no_grad():
        final = nn.functional.cross_entropy(model.eval()(x), y)
    assert float(final) == pytest.approx(done.losses[-1], rel=0.05)


def test_parts_in_evaluation_mode_stay_in_it():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    model[1].eval()
    before = model[1].running_mean.clone()
    realign(model, [(torch.randn(8, 3), torch.arange(8) % 2)], steps=2)
    assert torch.equal(model[1].running_mean, before)
    assert model.training
    assert not model[1].training


def test_buffers_that_forward_replaces_are_kept_too():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x):
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            return self.layer(x - self.mean)

    model = Average()
    realign(model, [(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))], steps=3, frozen="mean")
    assert torch.equal(model.mean, torch.zeros(2))


def test_an_optimizer_may_not_reach_beyond_what_it_was_handed():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    batches = [(torch.ones(3, 2), torch.tensor([0, 1, 1]))]
    with pytest.raises(InputError, match="not handed"):
        realign(model, batches, frozen="0.*", optimizer=lambda _: torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="LBFGS"):
        realign(model, batches, optimizer=torch.optim.LBFGS)
