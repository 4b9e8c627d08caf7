"""The scale that is found, against losses that are solved by hand, and where losses are none."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from helpers.draws import gaussian
from helpers.searched_models import linear, quadratic
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.resilience.search_scale import ScaleSearch, search_scale
from rmtllmf.taskvec import TaskVector

pytestmark = pytest.mark.usefixtures("torch_seeded")


class Counted(nn.Module):
    """Counts forward passes, and remembers how they were made."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        assert not torch.is_grad_enabled()
        assert not self.training
        return self.inner(x)


@given(st.integers(0, 1000), st.floats(0.01, 3.8))
@settings(max_examples=40, deadline=None)
def test_a_quadratic_loss_is_solved_exactly(seed, target_scale):
    """The closed form; a parabola through any three points is the loss itself, so five refinements do (from an end one
    or two golden sections first)."""
    base, update, tasks, best = quadratic(seed, target_scale)
    found = search_scale(linear(), base, update, tasks, loss=mse_loss)
    expected = min(max(best, 0.0), 4.0)
    if 0.0 < best < 4.0:
        assert found.scale == pytest.approx(expected, abs=1e-9)
        assert found.evaluations <= 7 + 5
    else:
        assert found.scale == pytest.approx(expected, abs=0.05)


@given(st.integers(0, 1000), st.lists(st.floats(-3, 3), min_size=1, max_size=5), st.integers(0, 8))
@settings(max_examples=30, deadline=None)
def test_never_worse_than_the_grid_nor_twice_the_same_nor_outside(seed, scales, refinements):
    torch.manual_seed(seed)
    model, head = nn.Linear(4, 4), nn.Linear(4, 3)
    counted = Counted(model)
    base = {f"inner.{name}": tensor for name, tensor in copy.deepcopy(model).state_dict().items()}
    update = {"inner.weight": gaussian(4, 4, seed=seed)}
    batches = [(gaussian(5, 4, seed=k), torch.arange(5) % 3) for k in range(2)]
    seen = []

    def loss(logits, targets):
        seen.append(float(cross_entropy(logits, targets)))
        return cross_entropy(logits, targets)

    found = search_scale(
        counted, base, update, {"a": (head, batches)}, scales=scales, refinements=refinements, loss=loss
    )
    grid = {0.0, *scales}
    assert grid <= set(found.losses)
    assert found.losses[found.scale] == min(found.losses.values())
    assert list(found.losses) == sorted(found.losses)
    assert min(grid) <= min(found.losses) <= max(found.losses) <= max(grid)
    assert found.evaluations == len(found.losses) <= len(grid) + refinements
    assert counted.calls == 2 * found.evaluations
    assert len(seen) == 2 * found.evaluations


@pytest.mark.parametrize("refinements", [5, 10, 20])
def test_a_loss_that_is_no_parabola(refinements):
    """|scale - 0.3|^1.5 with a kink beside it; at worst golden sections, each of which leaves .618 of the bracket."""

    def loss(logits, targets):
        scale = logits.mean()
        return (scale - 0.3).abs() ** 1.5 + 0.5 * (scale - 0.3).clamp_min(0.0)

    model = nn.Linear(1, 1, bias=False).double()
    batches = [(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1))]
    base, update = {"weight": torch.zeros(1, 1).double()}, {"weight": torch.ones(1, 1).double()}
    found = search_scale(model, base, update, batches, loss=loss, refinements=refinements, tolerance=1e-3)
    assert abs(found.scale - 0.3) <= max(0.375 * 0.618 ** (refinements / 2), 1e-3 * 0.375 * 2)


def test_no_look_is_taken_twice_where_numbers_run_out():
    """A tolerance below the spacing of the numbers, and a kink that parabolas never hit."""
    looks = []

    def loss(logits, targets):
        looks.append(float(logits))
        return (logits.mean() - 0.3).abs()

    model = nn.Linear(1, 1, bias=False).double()
    batches = [(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1))]
    base, update = {"weight": torch.zeros(1, 1).double()}, {"weight": torch.ones(1, 1).double()}
    found = search_scale(model, base, update, batches, loss=loss, refinements=500, tolerance=1e-18)
    assert len(looks) == len(set(looks)) == found.evaluations < 300
    assert found.scale == pytest.approx(0.3, rel=1e-15)


def test_the_loss_is_that_of_the_model_that_apply_to_makes():
    """Of every scale, for half precision, ties, buffers, batches of unequal sizes and tasks of unequal sizes."""
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(6, 4)
            self.norm = nn.BatchNorm1d(4)
            self.low = nn.Linear(4, 4).bfloat16()
            self.drop = nn.Dropout(0.5)
            self.out = nn.Linear(4, 6, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens):
            x = self.low(self.norm(self.embed(tokens)).bfloat16()).float()
            return self.out(self.drop(x))

    model, base = Tied(), Tied()
    base.norm(gaussian(9, 4))
    update = TaskVector(
        {
            name: gaussian(*tensor.shape, seed=len(name))
            for name, tensor in base.state_dict().items()
            if tensor.is_floating_point() and "running" not in name and name != "out.weight"
        }
    )
    sizes = {"a": (4, 2), "b": (3,)}
    tasks = {
        name: [(torch.arange(size) + k, torch.arange(size)) for k, size in enumerate(parts)]
        for name, parts in sizes.items()
    }
    found = search_scale(model, base, update, tasks, scales=[-0.5, 0.7, 1.0], refinements=4)
    for scale, value in found.losses.items():
        moved = update.apply_to(copy.deepcopy(base), scale).eval()
        means = []
        for batches in tasks.values():
            logits = torch.cat([moved(tokens) for tokens, _ in batches]).detach()
            means.append(float(cross_entropy(logits, torch.cat([labels for _, labels in batches]))))
        assert value == pytest.approx(sum(means) / 2, rel=1e-5)


def test_a_scale_at_which_the_loss_overflows_counts_as_infinite():
    model = nn.Linear(2, 2, bias=False)
    base, update = {"weight": torch.zeros(2, 2)}, {"weight": torch.full((2, 2), 1e19)}
    found = search_scale(model, base, update, [(torch.eye(2), torch.zeros(2, 2))], loss=mse_loss, scales=[1.0, 10.0])
    assert found.scale == 0
    assert found.losses[10.0] == math.inf


def test_a_flat_loss_is_the_base_model():
    model, batches = nn.Linear(2, 2), [(torch.eye(2), torch.tensor([0, 1]))]
    found = search_scale(model, model, {"bias": torch.ones(2)}, batches, loss=lambda x, y: 0 * x.sum() + 1)
    assert found.scale == 0
    assert set(found.losses.values()) == {1.0}


def test_ties_go_to_the_scale_nearest_to_the_base():
    model = nn.Linear(1, 1, bias=False)
    base, update = {"weight": torch.zeros(1, 1)}, {"weight": torch.ones(1, 1)}

    def loss(logits, targets):
        return (logits.abs() - 1).abs().clamp_min(0.5).mean()

    found = search_scale(
        model, base, update, [(torch.ones(1, 1), torch.zeros(1))], loss=loss, scales=[-1, -0.5, 1.5, 1], refinements=0
    )
    assert found == ScaleSearch(-0.5, {-1: 0.5, -0.5: 0.5, 0.0: 1.0, 1.0: 0.5, 1.5: 0.5}, 5)


def test_one_standard_error_is_of_the_differences_sample_by_sample():
    """Against the definition, from the losses of every sample, at the scales that were looked at."""
    base, update, tasks, _ = quadratic(11, 1.0)
    fine = {"scales": [k / 100 for k in range(301)], "refinements": 0}
    plain = search_scale(linear(), base, update, tasks, loss=mse_loss, **fine)
    cautious = search_scale(linear(), base, update, tasks, loss=mse_loss, one_standard_error=True, **fine)
    assert cautious.losses == pytest.approx(plain.losses)

    def rows(scale):
        weight = base["weight"] + scale * update["weight"]
        return [
            torch.cat([((head(x @ weight.T) - y) ** 2).mean(-1) for x, y in batches])
            for head, batches in tasks.values()
        ]

    allowed = []
    for scale in plain.losses:
        apart = [row - best for row, best in zip(rows(scale), rows(plain.scale), strict=True)]
        error = math.sqrt(sum(float(d.std()) ** 2 / len(d) for d in apart)) / 2
        if sum(float(d.mean()) for d in apart) / 2 <= error + 1e-15:
            allowed.append(scale)
    assert cautious.scale == min(allowed, key=abs)
    assert cautious.scale < plain.scale


MODEL = nn.Linear(2, 2)
BASE = {name: tensor.clone() for name, tensor in MODEL.state_dict().items()}
UPDATE = {"weight": torch.ones(2, 2)}
BATCHES = [(torch.eye(2), torch.tensor([0, 1]))]
TIED = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
TIED["b"].weight = TIED["a"].weight


def call(model=MODEL, base=BASE, update=UPDATE, tasks=BATCHES, **options):
    return lambda: search_scale(model, base, update, tasks, **options)


def used_up():
    stream = iter(BATCHES)
    list(stream)
    return stream


BAD = [
    (call(model=lambda x: x), TypeError, "model: expected a torch.nn.Module"),
    (call(base={"weight": BASE["weight"]}), StateMismatchError, "base lacks 'bias'"),
    (call(base={**BASE, "bias": torch.zeros(3)}), StateMismatchError, r"base\['bias'\] has shape"),
    (call(base={**BASE, "bias": torch.zeros(2).half()}), StateMismatchError, r"base\['bias'\] is torch.float16"),
    (call(update=[UPDATE]), TypeError, "update: expected a mapping"),
    (call(update={"wieght": torch.ones(2, 2)}), StateMismatchError, "base lacks 'wieght'"),
    (call(update={"weight": torch.ones(2)}), StateMismatchError, r"update\['weight'\] has shape"),
    (call(update={"weight": torch.ones(2, 2, dtype=torch.int64)}), InputError, "update: holds no floating"),
    (call(update={}), InputError, "update: holds no floating"),
    (call(update={"weight": torch.full((2, 2), math.nan)}), NonFiniteError, r"update\['weight'\]"),
    (
        call(
            model=nn.BatchNorm1d(2),
            base=nn.BatchNorm1d(2).state_dict(),
            update={"num_batches_tracked": torch.tensor(1.0)},
        ),
        StateMismatchError,
        "num_batches_tracked",
    ),
    (
        call(model=TIED, base=TIED, update={"a.weight": torch.ones(2, 2), "b.weight": torch.zeros(2, 2)}),
        StateMismatchError,
        "'a.weight' and 'b.weight' are one tensor.*in update",
    ),
    (
        call(
            model=TIED,
            base=nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}),
            update={"a.bias": torch.ones(2)},
        ),
        StateMismatchError,
        "one tensor.*in base",
    ),
    (call(tasks={}), InputError, "tasks: expected at least one task"),
    (call(tasks=[]), InputError, "tasks: expected at least one batch"),
    (call(tasks=used_up()), InputError, "iterator that is used up"),
    (call(tasks={"a": iter(BATCHES), "b": used_up()}), InputError, r"tasks\['b'\].*used up"),
    (call(tasks=[torch.eye(2)]), TypeError, r"tasks: expected batches \(inputs, targets\)"),
    (call(tasks=[(torch.zeros(0, 2), torch.zeros(0))]), InputError, "only empty batches"),
    (call(scales=[]), InputError, "scales: expected at least one"),
    (call(scales=1.0), TypeError, "scales: expected a sequence"),
    (call(scales=[0.1, math.inf]), InputError, r"scales\[1\]"),
    (call(scales=["a"]), TypeError, r"scales\[0\]"),
    (call(loss="mse"), TypeError, "loss: expected a function"),
    (call(loss=lambda x, y: 1.0), TypeError, "loss: expected a tensor, got float"),
    (call(loss=lambda x, y: x), ShapeError, r"loss: expected one number, got shape \(2, 2\)"),
    (call(loss=lambda x, y: x.sum() * math.nan), NonFiniteError, "loss of the base model"),
    (call(refinements=-1), InputError, "refinements"),
    (call(refinements=1.5), TypeError, "refinements"),
    (call(tolerance=0), InputError, "tolerance"),
    (call(one_standard_error="yes"), TypeError, "one_standard_error"),
    (call(tasks=[(torch.eye(2)[:1], torch.tensor([0]))], one_standard_error=True), InputError, "two samples"),
    (call(tasks=[(torch.eye(2), [0, 1])], one_standard_error=True), InputError, "targets as tensors"),
    (
        call(tasks={"t": (lambda x: x[:1], BATCHES)}, one_standard_error=True),
        InputError,
        "one row for each target",
    ),
]


@pytest.mark.parametrize(("call", "error", "pattern"), BAD)
def test_bad_input(call, error, pattern):
    with pytest.raises(error, match=pattern):
        call()
