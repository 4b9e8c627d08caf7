"""Heads trained on features that are computed once are the heads that one trains on features by hand."""

import copy
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from helpers.draws import gaussian, seeded
from rmtllmf.errors import InputError, NonFiniteError, ShapeError
from rmtllmf.resilience.realign_heads import realign_heads


def encoder():
    return seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5)))


def two_tasks():
    heads = [seeded(lambda: nn.Linear(8, 3), 1), seeded(lambda: nn.Linear(8, 2), 2)]
    return {
        name: (head, [(gaussian(5, 4, seed=10 * place + k), torch.arange(5) % head.out_features) for k in range(size)])
        for place, (name, head, size) in enumerate(zip("ab", heads, (3, 2), strict=True))
    }


def state(*modules):
    return [tensor.clone() for module in modules for tensor in module.state_dict().values()]


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


def test_it_is_training_the_heads_on_features_by_hand_to_the_bit():
    model, tasks, steps = encoder(), two_tasks(), 7
    by_hand = {name: copy.deepcopy(head) for name, (head, _) in tasks.items()}
    with torch.no_grad():
        model.eval()
        features = {name: [(model(x), y) for x, y in batches] for name, (_, batches) in tasks.items()}
    optimizer = torch.optim.SGD([p for head in by_hand.values() for p in head.parameters()], lr=0.3, momentum=0.5)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for name, head in by_hand.items():
            x, y = features[name][step % len(features[name])]
            loss = cross_entropy(head(x), y)
            total += loss.item()
            (loss / 2).backward()
        losses.append(total / 2)
        optimizer.step()
    heads, done = realign_heads(
        model.train(), tasks, steps=steps, optimizer=lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5)
    )
    assert list(heads) == ["a", "b"]
    for name, head in heads.items():
        assert same(state(head), state(by_hand[name]))
    assert done.losses == tuple(losses)
    assert done.trained == ("a.weight", "a.bias", "b.weight", "b.bias")


@pytest.mark.parametrize("how", ["well", "fails"])
def test_the_model_and_the_given_heads_are_left_alone(how):
    model, tasks = encoder(), two_tasks()
    model[0].weight.requires_grad_(False)
    model[2].eval()
    given = [head for head, _ in tasks.values()]
    before, modes = state(model, *given), [part.training for part in model.modules()]

    def loss(logits, targets):
        return cross_entropy(logits, targets) * (float("nan") if how == "fails" else 1)

    if how == "fails":
        with pytest.raises(NonFiniteError, match="task 'a' is nan in step 0"):
            realign_heads(model, tasks, steps=3, loss=loss)
    else:
        heads, _ = realign_heads(model, tasks, steps=3, lr=0.1, loss=loss)
        assert all(heads[name] is not head for name, (head, _) in tasks.items())
        assert not same(state(*given), state(*heads.values()))
        assert all(p.requires_grad and p.grad is None for head in heads.values() for p in head.parameters())
    assert same(before, state(model, *given))
    assert [part.training for part in model.modules()] == modes
    assert not model[0].weight.requires_grad
    assert all(p.grad is None for p in [*model.parameters(), *(p for head in given for p in head.parameters())])


def test_the_encoder_sees_every_batch_once_and_an_iterator_will_do():
    calls = []
    model = encoder()
    model.register_forward_hook(lambda module, inputs, output: calls.append((module.training, output.requires_grad)))
    tasks = {name: (head, iter(batches)) for name, (head, batches) in two_tasks().items()}
    realign_heads(model, tasks, steps=20)
    assert calls == [(False, False)] * 5
    shuffled = DataLoader(TensorDataset(gaussian(6, 4), torch.arange(6) % 3), batch_size=3, shuffle=True)
    realign_heads(model, {"a": (nn.Linear(8, 3), shuffled)}, steps=20)
    assert calls == [(False, False)] * 7
    realign_heads(model, tasks, steps=0)
    assert len(calls) == 7


def test_heads_with_modes_of_their_own_and_features_of_any_kind():
    Features = namedtuple("Features", ["pooled", "tokens"])

    class Model(nn.Module):
        def forward(self, x):
            return Features(x.sum(1), x)

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop, self.out = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)
            self.norm.eval()
            self.seen = []

        def forward(self, features):
            self.seen.append((type(features), self.drop.training, self.norm.training))
            return self.out(self.drop(self.norm(features.pooled)))

    head = Head()
    heads, _ = realign_heads(Model(), {"t": (head, [(gaussian(6, 3, 4), torch.arange(6) % 2)])}, steps=2)
    assert head.seen == []
    assert heads["t"].seen == [(Features, True, False)] * 2
    assert heads["t"].training
    assert not heads["t"].norm.training


@pytest.mark.parametrize("name", ["keys", "a.b", "forward", "a b"])
def test_a_task_may_have_any_name(name):
    tasks = {name: (nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3)), two_tasks()["a"][1])}
    heads, done = realign_heads(encoder(), tasks, steps=2, frozen=f"{name}.0.*")
    assert list(heads) == [name]
    assert done.trained == (f"{name}.1.weight", f"{name}.1.bias")
    assert heads[name][0].num_batches_tracked == 0


def test_heads_that_share_parameters_still_do():
    tasks = two_tasks()
    shared = tasks["a"][0]
    tasks["b"] = (shared, tasks["b"][1])
    heads, done = realign_heads(encoder(), tasks, steps=2)
    assert heads["a"] is heads["b"] is not shared
    assert done.trained == ("a.weight", "a.bias")


def test_frozen_trainable_and_an_anchor_go_by_the_name_of_the_task():
    tasks = two_tasks()
    heads, done = realign_heads(encoder(), tasks, steps=4, lr=0.1, trainable=["a.*", "*.weight"], frozen="a.weight")
    assert done.trained == ("a.bias", "b.weight")
    assert torch.equal(heads["a"].weight, tasks["a"][0].weight)
    heads, done = realign_heads(encoder(), tasks, steps=4, lr=0.1, anchor="start", anchor_weight={"a.*": 1e12})
    assert len(done.penalties) == 4
    torch.testing.assert_close(heads["a"].weight, tasks["a"][0].weight)
    assert not torch.allclose(heads["b"].weight, tasks["b"][0].weight)


def test_validation_is_on_features_too():
    model, tasks = encoder(), two_tasks()
    x, y = gaussian(9, 4, seed=77), torch.arange(9) % 3
    held_out = {"a": (tasks["a"][0], [(x, y)])}
    heads, done = realign_heads(model, tasks, steps=12, lr=0.05, validation=held_out, patience=3)
    with torch.no_grad():
        final = cross_entropy(heads["a"](model.eval()(x)), y)
    assert float(final) == pytest.approx(min(done.validation), rel=1e-6)
    assert done.kept == done.validation.index(min(done.validation))


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(8, 3))

    def forward(self, x):
        return x @ self.weight


def call(model=None, tasks=None, **options):
    return lambda: realign_heads(model or encoder(), tasks or two_tasks(), **options)


BATCHES = two_tasks()["a"][1]
BAD = {
    "no module": (call(model=len), TypeError, "model: expected a torch.nn.Module"),
    "bare batches": (call(tasks=BATCHES), TypeError, "tasks: expected a mapping"),
    "a complete model": (call(tasks={"a": BATCHES}), TypeError, r"tasks\['a'\]: expected a head .* got none"),
    "a function": (call(tasks={"a": (lambda x: x, BATCHES)}), TypeError, r"tasks\['a'\]: .* got function"),
    "fixed weights": (call(tasks={"a": (Fixed(), BATCHES)}), InputError, r"tasks\['a'\]: .* parameters .* Fixed"),
    "no batches": (call(tasks={"a": (nn.Linear(8, 3), [])}), InputError, r"tasks\['a'\]: expected at least one batch"),
    "used up": (call(tasks={"a": (nn.Linear(8, 3), iter([]))}), InputError, r"tasks\['a'\]: .*got none"),
    "all frozen": (call(frozen="*"), InputError, "all of them are frozen"),
    "a head frozen": (call(frozen="a.*"), InputError, "task 'a' does not depend on any"),
    "a keyword": (call(rank=3), TypeError, "unexpected keyword 'rank'"),
    "steps": (call(steps=-1), InputError, "steps: .*at least 0"),
    "another task": (
        call(validation={"c": (nn.Linear(8, 3), BATCHES)}),
        InputError,
        "validation: 'c' is no task; expected some of 'a', 'b'",
    ),
    "a loss of many": (call(loss=lambda z, y: z), ShapeError, "one number"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
