"""Steps chosen by cross-validation: curves in closed form, folds that are fair, and a model that is left alone."""

import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from helpers.draws import gaussian
from rmtllmf.errors import InputError, NonFiniteError, ShapeError
from rmtllmf.resilience import few_shot, realign
from rmtllmf.resilience.cross_validation import steps_by_cross_validation


class Constant(nn.Module):
    """Predicts one number for every sample, at first 0."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.value.expand(len(x))


def half_mse(prediction, target):
    return mse_loss(prediction, target) / 2


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


@pytest.mark.parametrize(
    ("lr", "every", "best"), [(0.05, 1, 8), (0.05, 5, 10), (0.1, 1, 4), (0.1, 3, 3), (0.02, 1, 21)]
)
def test_leave_one_out_finds_where_overfitting_starts(lr, every, best):
    """theta_t is s = 1 - (1 - lr)^t times the mean m of the others; sum (y - s m)^2 is smallest at s = .35."""
    y = torch.tensor([3.0, -1.0, 2.0, 0.5, -1.5, 2.5, 1.0, -0.5])
    steps = 30
    mean_of_others = (y.double().sum() - y.double()) / (len(y) - 1)
    curve = [float(((y - mean_of_others * (1 - (1 - lr) ** t)) ** 2).mean() / 2) for t in range(steps + 1)]
    assert float((y * mean_of_others).sum() / mean_of_others.square().sum()) == pytest.approx(0.35)
    model = Constant()
    found = steps_by_cross_validation(
        model, [(torch.zeros(8, 1), y)], steps=steps, every=every, seed=0, loss=half_mse, optimizer=sgd(lr)
    )
    evaluated = sorted({*range(0, steps, every), steps})
    assert found.evaluated == tuple(evaluated)
    assert found.losses == pytest.approx([curve[t] for t in evaluated], rel=1e-5)
    assert found.steps == best == min(evaluated, key=curve.__getitem__)
    assert len(found.folds) == 8
    assert model.value == 0
    realign(model, [(torch.zeros(8, 1), y)], steps=found, loss=half_mse, optimizer=sgd(lr))
    assert model.value.item() == pytest.approx(float(y.mean()) * (1 - (1 - lr) ** best), rel=1e-5)


class Spy(nn.Module):
    """Notes the labels, hidden in the inputs, that it is trained on and evaluated on."""

    seen: list

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.alive = []

    def forward(self, x):
        Spy.seen.append((weakref.ref(self), self.training, x[:, 0].int().tolist()))
        return self.layer(x)


def labelled(counts, seed=0):
    """Inputs that start with a number of their own."""
    y = torch.tensor([label for label, count in enumerate(counts) for _ in range(count)])
    x = gaussian(len(y), 3, seed=seed)
    x[:, 0] = torch.arange(len(y))
    return x, y


def folds_seen(count, **options):
    """For every fold what was trained on, and what was evaluated on before the first step."""
    Spy.seen, trained, left_out = [], [], []
    x, y = labelled(count)
    batches = DataLoader(TensorDataset(x, y), batch_size=4)
    found = steps_by_cross_validation(Spy(), batches, steps=8, every=8, **options)
    copies = list(dict.fromkeys(id(reference) for reference, *_ in Spy.seen))  # one reference for each copy
    for copy in copies:
        calls = [(training, numbers) for reference, training, numbers in Spy.seen if id(reference) == copy]
        trained.append([numbers for training, numbers in calls if training])
        evaluated = [numbers for training, numbers in calls if not training]
        assert evaluated[: len(evaluated) // 2] == evaluated[len(evaluated) // 2 :]  # at the start and at the end
        left_out.append(evaluated[: len(evaluated) // 2])
    return found, y, trained, left_out


@pytest.mark.parametrize(("counts", "folds", "expected"), [((3, 3), None, 3), ((5, 4, 7), 2, 2), ((6, 6), 3, 3)])
def test_folds_are_stratified_and_what_is_left_out_is_not_trained_on(counts, folds, expected):
    found, y, trained, left_out = folds_seen(counts, folds=folds, seed=0)
    assert len(found.folds) == len(trained) == len(left_out) == expected
    together = []
    for parts, held_out in zip(trained, left_out, strict=True):
        held = [number for part in held_out for number in part]
        used = {number for part in parts for number in part}
        assert used == set(range(len(y))) - set(held)
        for label, count in enumerate(counts):
            assert Counter(y[held].tolist())[label] in (count // expected, -(-count // expected))
        together += held
    assert sorted(together) == list(range(len(y)))


def test_batches_are_as_large_as_given_and_go_round_in_a_new_order():
    _, _, trained, _ = folds_seen((6, 6), folds=2, seed=0)
    for parts in trained:
        assert [len(part) for part in parts] == [4, 2] * 4
        rounds = [tuple(parts[k] + parts[k + 1]) for k in range(0, 8, 2)]
        assert len(set(rounds)) == 4
        assert len({frozenset(numbers) for numbers in rounds}) == 1
    _, _, trained, _ = folds_seen((6, 6), folds=2, seed=0, batch_size=100)
    assert {len(part) for parts in trained for part in parts} == {6}


def test_folds_and_order_follow_the_seed_each_on_its_own():
    runs = [folds_seen((6, 6), folds=2, seed=seed) for seed in (0, 1)]
    assert runs[0][3] != runs[1][3]

    def order(parts):
        """Where each sample stands among those that are trained on: what does not depend on which these are."""
        used = sorted({number for part in parts for number in part})
        return [[used.index(number) for number in part] for part in parts]

    orders = [order(parts) for _, _, trained, _ in runs for parts in trained]
    assert all(orders.count(one) == 1 for one in orders)


def test_one_copy_of_the_model_is_alive_at_a_time():
    Spy.seen = []
    alive = []

    def loss(logits, targets):
        alive.append(len({id(found) for reference, *_ in Spy.seen if (found := reference()) is not None}))
        return cross_entropy(logits, targets)

    steps_by_cross_validation(Spy(), [labelled((4, 4))], steps=2, folds=4, seed=0, loss=loss)
    assert set(alive) == {1}


def two_tasks():
    heads = [nn.Linear(4, 3), nn.Linear(4, 2)]
    return {
        name: (
            head,
            DataLoader(
                few_shot(TensorDataset(gaussian(40, 4, seed=k), torch.arange(40) % head.out_features), 4, seed=k),
                batch_size=4,
            ),
        )
        for k, (name, head) in enumerate(zip("ab", heads, strict=True))
    }


def test_the_same_seed_gives_the_same_and_model_heads_and_generator_are_left_alone():
    tasks = two_tasks()
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].eval()
    model[0].bias.requires_grad_(False)
    modules = [model, *(head for head, _ in tasks.values())]
    before = [tensor.clone() for module in modules for tensor in module.state_dict().values()]
    results = [steps_by_cross_validation(model, tasks, steps=4, lr=0.1, seed=seed) for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]
    assert len(results[0].folds) == 4
    assert all(map(torch.equal, before, (t for module in modules for t in module.state_dict().values())))
    assert [part.training for part in model.modules()] == [True, True, False]
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert all(p.grad is None for module in modules for p in module.parameters())


def test_folds_of_a_task_do_not_depend_on_other_tasks():
    both, one = two_tasks(), two_tasks()
    del one["b"]
    splits = []
    for tasks in (both, one):
        seen = []

        def loss(logits, targets, seen=seen):
            if not logits.requires_grad and logits.shape[1] == 3:
                seen.append(targets.tolist())
            return cross_entropy(logits, targets)

        model = nn.Linear(4, 4)
        steps_by_cross_validation(model, tasks, steps=1, seed=3, folds=2, loss=loss)
        splits.append(seen)
    assert splits[0] == splits[1]


def test_options_reach_realign():
    """An anchor that holds everything: no step changes the loss."""
    found = steps_by_cross_validation(
        nn.Linear(3, 2), [labelled((4, 4))], steps=5, seed=0, lr=0.1, anchor="start", anchor_weight=1e12
    )
    assert found.losses == pytest.approx([found.losses[0]] * 6, rel=1e-5)
    frozen = nn.Linear(3, 2)
    with pytest.raises(InputError, match="all of them are frozen"):
        steps_by_cross_validation(frozen, [labelled((4, 4))], steps=5, seed=0, frozen="*")


def test_inputs_of_several_tensors():
    class Sum(nn.Linear):
        def forward(self, left, right):
            return super().forward(left + right)

    x, y = labelled((4, 4))
    model = Sum(3, 2)
    pair = [((x[:5], x[:5]), y[:5]), ((x[5:], x[5:]), y[5:])]
    named = [({"left": a, "right": b}, targets) for (a, b), targets in pair]
    results = [steps_by_cross_validation(model, batches, steps=3, seed=0, folds=2) for batches in (pair, named)]
    assert results[0] == results[1]


def bad(batches=None, model=None, seed=0, **options):
    return lambda: steps_by_cross_validation(
        model or nn.Linear(3, 2), batches or [labelled((3, 3))], seed=seed, **options
    )


X, Y = labelled((3, 3))
BAD = {
    "no module": (bad(model=len), TypeError, "model: expected a torch.nn.Module"),
    "one fold": (bad(folds=1), InputError, "folds: .*at least 2, got 1"),
    "too many folds": (
        bad(folds=4),
        InputError,
        "folds: expected at least 4 samples .* class 0 of tasks_or_batches has 3",
    ),
    "a lonely sample": (bad([labelled((3, 1))]), InputError, "at least two samples of every class"),
    "steps 0": (bad(steps=0), InputError, "steps: .*at least 1"),
    "every 0": (bad(every=0), InputError, "every: .*at least 1"),
    "batch size 0": (bad(batch_size=0), InputError, "batch_size: .*at least 1"),
    "a seed": (bad(seed="x"), TypeError, "seed: expected an int"),
    "a keyword": (bad(patience=3), TypeError, "unexpected keyword 'patience'"),
    "no batches": (bad({"a": (nn.Linear(2, 2), [])}), InputError, r"\['a'\]: expected at least one batch"),
    "lengths": (bad([(X, Y[:5])]), ShapeError, "expected as many inputs as targets, got 6 and 5"),
    "shapes": (bad([(X, Y), (X[:, :2], Y)]), ShapeError, r"inputs of tasks_or_batches: .* got \(6, 3\), \(6, 2\)"),
    "kinds": (bad([(X, Y), ((X,), Y)]), TypeError, "expected the same in every batch, got Tensor, tuple"),
    "names": (bad([({"input": X}, Y), ({"x": X}, Y)]), InputError, "the same names in every batch, as in 'input'"),
    "numbers of them": (bad([((X,), Y), ((X, X), Y)]), InputError, "expected 1 of them in every batch"),
    "texts": (bad([("text", Y)]), TypeError, "expected tensors, or tuples or mappings of tensors, got str"),
    "targets": (bad([(X, {"y": Y})]), TypeError, "expected targets that are a tensor, got dict"),
    "not finite": (bad([(X * float("inf"), Y)]), NonFiniteError, "the loss is nan after 0 steps"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
