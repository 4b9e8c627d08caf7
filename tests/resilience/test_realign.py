"""What realignment minimises, over which batches, and what it trains."""

import copy
import math
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from helpers.draws import gaussian
from helpers.realigned_models import TOKENS, Tied, encoder, snapshot, two_tasks, unchanged
from helpers.two_inputs import Sum
from rmtllmf.errors import InputError
from rmtllmf.resilience import Realignment, realign


def test_every_step_is_one_of_adamw_on_the_mean_loss_of_the_next_batches():
    """Against the loop that one would write by hand: one backward of the mean, batches cycled, schedule by formula."""
    tasks, model, steps = two_tasks(), encoder(), 10
    peer = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1.0, weight_decay=0.02)
    losses = []
    for step in range(steps):
        # 4 steps of warm-up (40 %), then a cosine from 1 towards 0 over the other 6
        factor = (step + 1) / 4 if step < 4 else (1 + math.cos(math.pi * (step - 4) / 6)) / 2
        optimizer.param_groups[0]["lr"] = 0.01 * factor
        optimizer.zero_grad()
        pairs = [(head, batches[step % len(batches)]) for head, batches in tasks.values()]
        loss = sum(cross_entropy(head(peer(x)), y) for head, (x, y) in pairs) / 2
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    done = realign(model, tasks, steps=steps, lr=0.01, weight_decay=0.02, warmup=0.4)
    assert done.losses == pytest.approx(losses, rel=1e-5)
    for mine, theirs in zip(model.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert done.trained == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert done.seconds > 0


def test_the_defaults():
    model, peer, tasks = encoder(), encoder(), two_tasks()
    realign(model, tasks)
    done = realign(peer, tasks, steps=100, lr=1e-4, weight_decay=0.0, warmup=0.1, loss=cross_entropy)
    assert len(done.losses) == 100
    assert unchanged(snapshot(model), peer)


def test_it_learns_and_leaves_the_heads_alone():
    model, tasks = encoder(), two_tasks()
    heads = [head for head, _ in tasks.values()]
    before = snapshot(*heads)
    done = realign(model, tasks, steps=200, lr=0.01)
    assert done.losses[-1] < 0.5 * done.losses[0]
    assert unchanged(before, *heads)
    assert all(parameter.grad is None and parameter.requires_grad for head in heads for parameter in head.parameters())


def test_a_head_hidden_in_a_closure_gets_no_gradient():
    head = nn.Linear(4, 2)
    realign(encoder(), {"a": (lambda features: head(features), two_tasks()["b"][1])}, steps=2)
    assert head.weight.grad is None


def test_a_complete_model_with_a_loader_and_any_loss():
    data = TensorDataset(gaussian(20, 4), gaussian(20, 4, seed=1))
    loader = DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0))
    done = realign(encoder(), loader, steps=7, loss=mse_loss, lr=0.01)
    assert len(done.losses) == 7
    assert done.losses[-1] < done.losses[0]


def test_a_mapping_of_complete_batches_and_inputs_of_several_arguments():
    pair = ((gaussian(5, 4), gaussian(5, 4, seed=1)), torch.arange(5) % 2)
    named = ({"left": pair[0][0], "right": pair[0][1]}, pair[1])
    first, second = Sum(), Sum()
    second.load_state_dict(first.state_dict())
    losses = [realign(model, {"t": [batch]}, steps=3).losses for model, batch in ((first, pair), (second, named))]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("frozen", "trainable", "trained"),
    [
        ((), None, ("0.weight", "0.bias", "2.weight", "2.bias")),
        ("0.*", None, ("2.weight", "2.bias")),
        (["0.weight", "2.weight"], None, ("0.bias", "2.bias")),
        ((), "*.bias", ("0.bias", "2.bias")),
        (["2.*"], ["*.bias"], ("0.bias",)),
    ],
)
def test_frozen_and_trainable(frozen, trainable, trained):
    model = encoder()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    done = realign(model, two_tasks(), steps=3, lr=0.1, weight_decay=0.1, frozen=frozen, trainable=trainable)
    assert done.trained == trained
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in trained), name


def test_parameters_that_did_not_require_gradients_stay_unless_named():
    model = encoder()
    model[0].requires_grad_(False)
    assert realign(model, two_tasks(), steps=1).trained == ("2.weight", "2.bias")
    assert realign(model, two_tasks(), steps=1, trainable="0.*").trained == ("0.weight", "0.bias")
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, False, True, True]


@pytest.mark.parametrize("name", ["embed.weight", "out.weight"])
def test_a_tied_parameter_is_meant_under_any_of_its_names(name):
    assert realign(Tied(), TOKENS, steps=1, frozen=name).trained == ("norm.weight", "norm.bias")
    assert realign(Tied(), TOKENS, steps=1, trainable=name).trained == ("embed.weight",)


def test_an_optimizer_of_ones_own_has_no_schedule():
    model, peer, tasks = encoder(), encoder(), two_tasks()
    realign(model, tasks, steps=4, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    for step in range(4):
        peer.zero_grad()
        sum(cross_entropy(h(peer(b[step % len(b)][0])), b[step % len(b)][1]) / 2 for h, b in tasks.values()).backward()
        with torch.no_grad():
            for parameter in peer.parameters():
                parameter -= 0.1 * parameter.grad
    for mine, theirs in zip(model.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_no_steps_change_nothing_and_touch_no_batch():
    def never():
        raise AssertionError("a batch was read")
        yield

    model = encoder()
    before = snapshot(model)
    done = realign(model, never(), steps=0)
    assert done == Realignment((), done.trained, done.seconds)
    assert unchanged(before, model)


def test_an_iterator_serves_as_long_as_it_lasts():
    batches = two_tasks()["b"][1]
    head = two_tasks()["b"][0]
    assert len(realign(encoder(), {"b": (head, iter(batches))}, steps=3).losses) == 3
    with pytest.raises(InputError, match=r"'b'.*pass a list or a DataLoader"):
        realign(encoder(), {"b": (head, iter(batches))}, steps=4)


def test_it_works_under_no_grad_and_shows_a_bar_on_request(capsys):
    with torch.no_grad():
        done = realign(encoder(), two_tasks(), steps=2, progress=True)
    assert len(done.losses) == 2
    assert "2/2" in capsys.readouterr().err
    realign(encoder(), two_tasks(), steps=2)
    assert capsys.readouterr() == ("", "")


def test_only_one_graph_lives_at_a_time():
    """The first task's activations are gone when the second's forward begins."""
    import weakref

    alive = []

    def watching(name):
        def loss(logits, targets):
            alive.append([reference() is not None for reference in references])
            references.append(weakref.ref(logits))
            return cross_entropy(logits, targets)

        return loss

    references: list = []
    realign(encoder(), two_tasks(), steps=1, loss=watching("x"))
    assert alive == [[], [False]]


def test_no_steps_need_nothing_to_train_and_no_tasks():
    model = nn.Linear(2, 2).requires_grad_(False)
    assert realign(model, {}, steps=0).losses == ()


def test_one_iterator_for_two_tasks_and_namedtuples():
    Pair = namedtuple("Pair", ["a", "b"])
    stream = iter([(torch.ones(1, 2), torch.tensor([0]))] * 9)
    head = nn.Identity()
    with pytest.raises(InputError, match="share one iterator"):
        realign(nn.Linear(2, 2), {"one": (head, stream), "two": (head, stream)}, steps=2)

    class Sum(nn.Linear):
        def forward(self, a, b):
            return super().forward(a + b)

    x = torch.ones(3, 2)
    assert len(realign(Sum(2, 2), [(Pair(x, x), torch.tensor([0, 1, 1]))], steps=2).losses) == 2


def test_a_loaders_generator_is_drawn_from_as_often_as_it_is_gone_through():
    """No look at the batches beforehand: what a seed gives does not depend on how arguments are checked."""
    data = TensorDataset(torch.randn(6, 2), torch.arange(6) % 2)
    source = torch.Generator().manual_seed(0)
    realign(nn.Linear(2, 2), DataLoader(data, batch_size=2, shuffle=True, generator=source), steps=3)
    expected = torch.Generator().manual_seed(0)
    batches = iter(DataLoader(data, batch_size=2, shuffle=True, generator=expected))
    assert len([next(batches) for _ in range(3)]) == 3
    assert torch.equal(source.get_state(), expected.get_state())
