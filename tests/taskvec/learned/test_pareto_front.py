"""Amortised Pareto fronts: exact where the metric is quadratic, efficient beside a grid, and what is refused."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

from helpers.learned_world import Encoder, fingerprint, normal, same_fingerprint, tasks_of, vectors_of
from rmtllmf.errors import InputError, NonFiniteError, ShapeError
from rmtllmf.taskvec import pareto_front, task_arithmetic
from rmtllmf.taskvec.learned._pareto import efficient, front_of
from rmtllmf.taskvec.learned._quadratics import Quadratic, fitted


def quadratic(count=2, tasks=2):
    """Linear regression: losses that are quadratic in the coefficients. Model, base, vectors, tasks."""
    model = nn.Linear(4, 2, bias=False, dtype=torch.float64)
    base = {"weight": normal(2, 4)}
    vectors = [{"weight": normal(2, 4, seed=q + 1)} for q in range(count)]
    batches = {}
    for t in range(tasks):
        X = normal(10, 4, seed=50 + t)
        target = base["weight"] + 0.7 * vectors[t % count]["weight"]
        batches[f"t{t}"] = [(X[:3], X[:3] @ target.mT), (X[3:], X[3:] @ target.mT)]
    return model, base, vectors, batches


def losses_at(points, model, base, vectors, tasks):
    """One by one, as the definition says."""
    rows = []
    for c in points.tolist():
        W = base["weight"] + sum(a * v["weight"] for a, v in zip(c, vectors, strict=True))
        row = []
        for batches in tasks.values():
            X, y = (torch.cat(part) for part in zip(*batches, strict=True))
            row.append(float(mse_loss(X @ W.mT, y)))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_quadratic_metric_is_found_exactly(count):
    model, base, vectors, tasks = quadratic(count)
    front = pareto_front(
        vectors, model, tasks, base=base, metric=mse_loss, larger_is_better=False, seed=1, size=20, measure=True
    )
    assert front.tasks == ("t0", "t1")
    assert front.metric == "mse_loss"
    assert front.sampled.shape == (5 * (count + 1) * (count + 2) // 2, count)
    torch.testing.assert_close(front.values, losses_at(front.sampled, model, base, vectors, tasks))
    assert max(front.errors) < 1e-12
    torch.testing.assert_close(front.predicted, front.measured)
    for f, (X, _) in zip(front.surrogates, (zip(*b, strict=True) for b in tasks.values()), strict=True):
        X = torch.cat(X)
        moved = torch.stack([(X @ v["weight"].mT).reshape(-1) for v in vectors])
        torch.testing.assert_close(f.curvature, 2 * moved @ moved.mT / moved.shape[1])


def test_the_front_is_that_of_a_fine_grid():
    """No point of a grid beats one of the front, and every efficient one has a neighbour in it."""
    model, base, vectors, tasks = quadratic()
    front = pareto_front(vectors, model, tasks, base=base, metric=mse_loss, larger_is_better=False, seed=0)
    assert 50 <= len(front.coefficients) <= 100
    axis = torch.linspace(0, 1, 81, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    values = torch.stack([f(grid) for f in front.surrogates], dim=-1)
    ranges = values.amax(0) - values.amin(0)
    gains = ((front.predicted[:, None] - values[None]) / ranges).amin(-1)
    assert gains.max() < 3e-3
    best = values[efficient(-values)]
    assert ((best[:, None] - front.predicted[None]).abs() / ranges).amax(-1).amin(1).max() < 0.03
    assert front.predicted[:, 0].diff().min() >= 0
    assert (front.predicted[:, 1].diff() / ranges[1]).max() < 1e-3


def test_preferences_choose_along_the_front():
    model, base, vectors, tasks = quadratic()
    front = pareto_front(vectors, model, tasks, base=base, metric=mse_loss, larger_is_better=False, seed=0)
    first, second, both = (front.best(p) for p in ([1, 0], [0, 1], None))
    at = losses_at(torch.tensor([first, second, both]), model, base, vectors, tasks)
    assert at[0, 0] < at[2, 0] < at[1, 0]
    assert at[1, 1] < at[2, 1] < at[0, 1]
    dense = torch.rand(20000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    least = min(float(sum(f(c) for f in front.surrogates)) for c in dense[:500])
    assert float(at[2].sum()) < least + 1e-2
    for bad, error in (([1], ShapeError), ([-1, 1], InputError), ([0, 0], InputError)):
        with pytest.raises(error, match="preference"):
            front.best(bad)


def test_accuracies_of_an_encoder_with_heads():
    model, tasks = Encoder().train(), tasks_of(2, size=40)
    vectors = vectors_of(model, 2, size=0.2)
    before = fingerprint(model)
    front = pareto_front(vectors, model, tasks, seed=2, evaluations=12, size=10, measure=True)
    same_fingerprint(fingerprint(model), before)
    assert front.metric == "accuracy"
    fused = task_arithmetic(vectors, 1.0, weights=front.best()).apply_to(model.state_dict())
    chosen = front.coefficients.tolist().index(list(front.best()))
    for t, (head, batches) in enumerate(tasks.values()):
        X, y = (torch.cat(part) for part in zip(*batches, strict=True))
        right = (head(functional_call(model.eval(), fused, (X,))).argmax(-1) == y).double().mean()
        assert float(right) == pytest.approx(float(front.measured[chosen, t]))
    assert ((front.predicted > 0) & (front.predicted < 1)).all()
    again = pareto_front(vectors, Encoder(), tasks, seed=2, evaluations=12, size=10)
    assert torch.equal(again.coefficients, front.coefficients)
    assert again.measured is None
    other = pareto_front(vectors, Encoder(), tasks, seed=3, evaluations=12, size=10)
    assert not torch.equal(other.sampled, front.sampled)


@pytest.mark.parametrize("link", ["sigmoid", "softplus"])
def test_links_are_fitted_to_the_values_themselves(link):
    true = Quadratic(0.3, torch.tensor([1.0, -2.0]).double(), torch.tensor([[1.0, 0.5], [0.5, -1.0]]).double(), link)
    points = normal(40, 2, seed=4)
    found = fitted(points, true(points), link)
    torch.testing.assert_close(found.curvature, true.curvature, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found(points), true(points), atol=1e-5, rtol=1e-5)
    noisy = true(points) + 0.05 * normal(40, seed=5)
    fit = fitted(points, noisy, link)
    residual = (fit(points) - noisy).square().sum()
    for delta in (0.01, -0.01):  # a local minimum of the squares
        moved = Quadratic(fit.constant + delta, fit.slope, fit.curvature, link)
        assert (moved(points) - noisy).square().sum() > residual


def test_extreme_accuracies_and_one_task():
    values = torch.ones(30, dtype=torch.float64)
    found = fitted(normal(30, 2), values, "sigmoid")
    assert found(normal(5, 2)).isfinite().all()
    model, base, vectors, tasks = quadratic()
    alone = pareto_front(vectors, model, tasks["t0"], base=base, metric=mse_loss, larger_is_better=False, seed=0)
    assert len(alone.coefficients) == 1
    assert alone.tasks == ("",)
    torch.testing.assert_close(alone.coefficients[0], torch.tensor([0.7, 0.0]).double(), atol=1e-2, rtol=0)
    zeros = [{"weight": torch.zeros(2, 4)} for _ in vectors]
    flat = pareto_front(zeros, model, tasks, base=base, metric=mse_loss, larger_is_better=False, seed=0, size=5)
    assert flat.predicted.isfinite().all()
    half = nn.Linear(3, 2, dtype=torch.bfloat16)
    X = normal(8, 3, dtype=torch.bfloat16)
    small = pareto_front([dict(half.state_dict())], half, [(X, torch.zeros(8).long())], seed=0, metric=cross_entropy)
    assert small.predicted.isfinite().all()


def test_efficient_points():
    values = torch.tensor([[1.0, 3.0], [2.0, 2.0], [2.0, 2.0], [1.0, 2.0], [0.0, 4.0], [0.0, 3.9]])
    assert efficient(values).tolist() == [True, True, True, False, True, False]
    found = front_of(lambda x: -((x - 0.25) ** 2), 0.0, 1.0, 3, 10, torch.Generator().manual_seed(0))
    assert found.shape[1] == 3  # three tasks, one optimum
    torch.testing.assert_close(found.mean(0), torch.full((3,), 0.25).double(), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": None}, TypeError, "seed: expected an int or a torch.Generator"),
        ({"metric": "f1"}, TypeError, "metric: expected a function of logits and targets or None, got str"),
        ({"link": "log"}, InputError, "link: expected one of 'identity', 'sigmoid', 'softplus', got 'log'"),
        ({"bounds": (1, 0)}, InputError, "bounds: expected the lower one first"),
        ({"bounds": 1}, TypeError, "bounds: expected .lowest, highest., got 1"),
        ({"evaluations": 2}, InputError, "evaluations: 1 vectors have 3 unknowns a task; expected as many, got 2"),
        ({"size": 0}, InputError, "size: expected a whole number of at least 1"),
        ({"metric": lambda z, y: z}, ShapeError, r"metric: expected one number, got shape \(3, 2\) for tasks"),
        ({"metric": lambda z, y: "1.x"}, TypeError, "metric: expected a number, got str for tasks"),
        ({"metric": lambda z, y: float("nan")}, NonFiniteError, "metric of tasks is nan"),
        ({"tasks": [(torch.ones(3, 2), torch.ones(3, 1))]}, ShapeError, r"tasks: expected targets of shape \(3,\)"),
    ],
)
def test_bad_input(options, error, message):
    batches = [(torch.ones(3, 2), torch.zeros(3).long())]
    arguments = {"model": nn.Linear(2, 2), "tasks": batches, "seed": 0, **options}
    with pytest.raises(error, match=message):
        pareto_front([{"weight": torch.ones(2, 2)}], **arguments)


@pytest.mark.gpu
def test_on_the_device():
    model, base, vectors, tasks = quadratic()
    options = {"metric": mse_loss, "larger_is_better": False, "seed": 0, "size": 5}
    expected = pareto_front(vectors, model, tasks, base=base, **options)
    found = pareto_front(vectors, model.cuda(), tasks, base=base, **options)
    torch.testing.assert_close(found.values, expected.values)
