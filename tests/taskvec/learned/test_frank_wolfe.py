"""Frank-Wolfe merging beside a naive transcription, its guarantee on convex losses, and what it refuses."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

from helpers.learned_world import Encoder, fingerprint, normal, same_fingerprint, tasks_of, vectors_of
from rmtllmf.errors import InputError, ShapeError
from rmtllmf.taskvec import frank_wolfe, frank_wolfe_coefficients, fuse, task_arithmetic


def naive(vectors, model, tasks, by, steps, cosine, eta=1.0, start=0.3, labelled=True):
    """The paper's algorithm on whole models (the names of a tie are one): the fused parameters, losses and gaps."""
    model = model.eval()
    names = [name for name in vectors[0] if name != "again.weight"]
    base = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    pool = [{n: base[n] + v[n] for n in names} for v in vectors]
    pool.append({n: base[n] + start * sum(v[n] for v in vectors) for n in names})
    theta, losses, gaps = pool[-1], [], []
    for t in range(steps):
        leaves = {n: tensor.clone().requires_grad_() for n, tensor in theta.items()}
        loss = 0
        for head, batches in tasks.values():
            X, y = (torch.cat(part) for part in zip(*batches, strict=True))
            z = head(functional_call(model, {**base, **leaves, "again.weight": leaves["middle.weight"]}, (X,)))
            p = z.softmax(-1)
            loss = loss + (cross_entropy(z, y) if labelled else -(p * p.log()).sum(-1).mean()) / len(tasks)
        gradient = dict(zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True))

        def score(n, s, gradient=gradient):
            product = float((gradient[n] * s[n]).sum())
            return product / float(gradient[n].norm() * s[n].norm()) if cosine else product

        if by == "task":
            best = min(pool, key=lambda s: sum(score(n, s) for n in names))
            s = dict(best)
        else:
            s = {n: min(pool, key=lambda s: score(n, s))[n] for n in names}
        gaps.append(sum(float((gradient[n] * (theta[n] - s[n])).sum()) for n in names))
        losses.append(float(loss.detach()))
        gamma = 2 / (t + 2) * eta
        theta = {n: (1 - gamma) * theta[n] + gamma * s[n] for n in names}
    return theta, losses, gaps


@pytest.mark.parametrize("by", ["layer", "task"])
@pytest.mark.parametrize("oracle", ["inner product", "cosine"])
@pytest.mark.parametrize("options", [{}, {"step_size": 0.3, "start": 0.1}, {"loss": None}])
def test_the_naive_algorithm(by, oracle, options):
    model, tasks = Encoder(), tasks_of()
    several = [name for name in model.state_dict() if name not in ("gain", "calls") and "running" not in name]
    vectors = [v.select([n for n in several if n in v]) for v in vectors_of(model)]  # a single entry has no direction
    theta, losses, gaps = naive(
        vectors,
        Encoder(),
        tasks,
        by,
        5,
        oracle == "cosine",
        options.get("step_size", 1.0),
        options.get("start", 0.3),
        "loss" not in options,
    )
    found = frank_wolfe_coefficients(vectors, model, tasks, by=by, oracle=oracle, steps=5, **options)
    assert found.losses == pytest.approx(losses, abs=1e-10)
    assert found.gaps == pytest.approx(gaps, abs=1e-10)
    fused = frank_wolfe(vectors, model, tasks, by=by, oracle=oracle, steps=5, **options).apply_to(model.state_dict())
    for name, tensor in theta.items():
        torch.testing.assert_close(fused[name], tensor)


def convex(seed=0, count=4):
    """Linear regression: vectors, model, base and batches of different lengths."""
    model = nn.Linear(4, 2, bias=False, dtype=torch.float64)
    base = {"weight": normal(2, 4, seed=seed)}
    vectors = [{"weight": normal(2, 4, seed=seed + q + 1)} for q in range(count)]
    target = base["weight"] + 0.3 * vectors[0]["weight"] + 0.5 * vectors[1]["weight"] + 0.2 * vectors[2]["weight"]
    X = normal(12, 4, seed=seed + 99)
    return vectors, model, base, [(X[:3], X[:3] @ target.mT), (X[3:], X[3:] @ target.mT)], X, target


def test_the_gap_bounds_what_is_left_and_closes():
    """What Frank-Wolfe promises; the solution is in the hull of three of four vectors."""
    vectors, model, base, batches, X, target = convex()
    short = frank_wolfe_coefficients(vectors, model, batches, base=base, steps=40, loss=mse_loss)
    assert all(loss <= gap + 1e-12 for loss, gap in zip(short.losses, short.gaps, strict=True))  # least loss: 0
    found = frank_wolfe_coefficients(vectors, model, batches, base=base, steps=400, loss=mse_loss)
    assert found.losses[-1] < 1e-3
    W = base["weight"] + sum(c * v["weight"] for c, v in zip(found.weights["weight"], vectors, strict=True))
    assert float(mse_loss(X @ W.mT, X @ target.mT)) < 1e-3
    assert all(c >= 0 for c in found.weights["weight"])


def test_irrelevant_models_cost_little():
    """What the paper claims; the sum of all is far away then."""
    vectors, model, base, batches, X, target = convex()
    away = [{"weight": -5 * (target - base["weight"]) + normal(2, 4, seed=50 + q)} for q in range(6)]
    found = frank_wolfe_coefficients(vectors[:3] + away, model, batches, base=base, steps=100, loss=mse_loss, start=0)
    W = task_arithmetic(vectors[:3] + away).apply_to(base)["weight"]
    assert found.losses[-1] < 1e-2 < 50 < float(mse_loss(X @ W.mT, X @ target.mT))
    assert sum(found.weights["weight"][3:]) < 0.1


def test_nothing_is_touched_and_fuse_gives_the_same():
    model, tasks = Encoder().train(), tasks_of()
    vectors = vectors_of(model)
    before = fingerprint(model)
    update = frank_wolfe(vectors, model, tasks, steps=3)
    same_fingerprint(fingerprint(model), before)
    weights = frank_wolfe_coefficients(vectors, model, tasks, steps=3).weights
    expected = task_arithmetic(vectors, 1.0, weights=weights)
    assert all(torch.equal(update[name], expected[name]) for name in expected)
    tuned = [vector.apply_to(model.state_dict()) for vector in vectors]
    fused = fuse(model, tuned, partial(frank_wolfe, model=model, tasks=tasks, steps=3))
    for name, tensor in update.apply_to(model.state_dict()).items():
        torch.testing.assert_close(fused[name], tensor)
    skipped = frank_wolfe(vectors, model, tasks, steps=1, skip="norm.*", weights=[1, 2, 1])
    assert not any(name.startswith("norm") for name in skipped)


@pytest.mark.parametrize("oracle", ["inner product", "cosine"])
def test_edges(oracle):
    model, tasks = Encoder(torch.bfloat16), tasks_of(dtype=torch.bfloat16)
    vectors = vectors_of(model)
    one = frank_wolfe_coefficients(vectors[:1], model, tasks, steps=2, oracle=oracle)
    assert all(row == (1.0,) for row in one.weights.values())  # start and vertex are the same
    zeros = frank_wolfe_coefficients([0 * vector for vector in vectors], model, tasks, steps=2, oracle=oracle)
    assert all(torch.tensor(row).isfinite().all() for row in zeros.weights.values())
    assert frank_wolfe_coefficients(vectors, model, tasks, steps=0).weights["gain"] == (0.3,) * 3
    empty = nn.Linear(2, 2)
    empty.none = nn.Parameter(torch.zeros(0))
    batches = [(torch.ones(0, 2), torch.zeros(0).long()), (torch.ones(1, 2), torch.zeros(1).long())]
    found = frank_wolfe_coefficients([dict(empty.state_dict())], empty, batches, steps=2, oracle=oracle)
    assert all(torch.tensor(found.losses).isfinite())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"by": "tensor"}, InputError, "by: expected one of 'layer', 'task', got 'tensor'"),
        ({"oracle": 1}, InputError, "oracle: expected one of 'inner product', 'cosine', got 1"),
        ({"steps": 1.5}, TypeError, "steps: expected an int"),
        ({"step_size": 2}, InputError, r"step_size: expected a number in \(0, 1\], got 2"),
        ({"loss": "mse"}, TypeError, "loss: expected a function of logits and targets or None, got str"),
        ({"tasks": [torch.ones(1, 2)]}, TypeError, r"tasks: expected batches \(inputs, targets\), got a bare tensor"),
        ({"tasks": [(torch.ones(0, 2), torch.ones(0))]}, InputError, "tasks: expected at least one sample"),
        (
            {"loss": partial(cross_entropy, reduction="none")},
            ShapeError,
            r"loss: expected one number, got shape \(3,\)",
        ),
        ({"wrong": 1}, TypeError, "unexpected keyword 'wrong'"),
    ],
)
def test_bad_input(options, error, message):
    batches = [(torch.ones(3, 2), torch.zeros(3).long())]
    with pytest.raises(error, match=message):
        frank_wolfe([{"weight": torch.ones(2, 2)}], **{"model": nn.Linear(2, 2), "tasks": batches, **options})


@pytest.mark.gpu
@pytest.mark.parametrize("oracle", ["inner product", "cosine"])
def test_on_the_device(oracle):
    model, tasks = Encoder(torch.float32), tasks_of(dtype=torch.float32)
    vectors = [vector.to(torch.float32) for vector in vectors_of(model)]
    options = {"by": "task", "steps": 4, "oracle": oracle}
    expected = frank_wolfe_coefficients(vectors, model, tasks, **options)
    heads = {name: (head.cuda(), batches) for name, (head, batches) in tasks.items()}
    found = frank_wolfe_coefficients(vectors, model.cuda(), heads, **options)
    assert found.losses == pytest.approx(expected.losses, abs=1e-4)
