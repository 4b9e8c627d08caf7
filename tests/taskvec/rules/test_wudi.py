"""WUDI-Merging: that the minimum is one, also where it is not the only one, and other tools' values."""

import contextlib
import io

import pytest
import torch

from helpers.subspace_definitions import wudi as naive
from helpers.subspace_definitions import wudi_loss
from rmtllmf.errors import InputError
from rmtllmf.taskvec import wudi


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(actual, expected):
    return float(torch.linalg.norm(actual.double() - expected) / torch.linalg.norm(expected))


def fused(matrices, **options):
    return wudi([{"w": matrix} for matrix in matrices], **options)["w"]


def tasks(m, n, rank, count, dtype=torch.float64):
    return torch.stack([normal(m, rank, seed=q) @ normal(rank, n, seed=99 + q) for q in range(count)]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (5, 30), (16, 16)])
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_no_other_update_interferes_less(shape, rank, dtype):
    x = tasks(*shape, rank, 3, dtype)
    X = fused(x)
    assert X.dtype == dtype
    exact = naive(x.double())
    assert error(X, exact) < (1e-5 if dtype == torch.float32 else 1e-8)
    leaf = X.double().requires_grad_()
    loss = wudi_loss(leaf, x.double())
    loss.backward()
    assert torch.linalg.norm(leaf.grad) < 1e-4 * torch.linalg.norm(
        torch.autograd.functional.vjp(lambda Y: wudi_loss(Y, x.double()), x.double().sum(0))[1]
    )
    assert loss < wudi_loss(x.double().sum(0), x.double())


def test_of_several_minima_the_one_that_descent_from_the_sum_finds():
    x = tasks(10, 20, 2, 3)  # six of twenty directions
    X = x.sum(0)
    for _ in range(3000):
        (gradient,) = torch.autograd.grad(wudi_loss(X.requires_grad_(), x), X)
        X = (X - 0.2 * gradient).detach()
    assert error(fused(x), X) < 1e-4


def test_tasks_with_inputs_of_their_own_all_get_what_they_want():
    """The paper's claim: where the rows of tasks are orthogonal nothing interferes, and the sum is the minimum."""
    Q = torch.linalg.qr(normal(12, 12)).Q
    x = torch.stack([normal(7, 4, seed=q) @ Q[4 * q : 4 * q + 4] for q in range(3)])
    assert error(fused(x), x.sum(0)) < 1e-9
    assert wudi_loss(fused(x), x) < 1e-20


def test_equal_tasks_give_that_one_and_not_the_sum():
    x = normal(9, 6).expand(4, 9, 6)
    assert error(fused(x), x[0]) < 1e-9


def test_one_task_comes_back():
    torch.testing.assert_close(fused([normal(3, 5)], scale=2.0), 2 * normal(3, 5))


def test_a_silent_task_has_no_say():
    x = tasks(6, 6, 6, 3)
    assert error(fused([*x, torch.zeros_like(x[0])]), fused(x)) < 1e-9


def test_damping_is_between_the_minimum_and_the_sum():
    x = tasks(8, 6, 6, 4)
    assert error(fused(x, damping=1e9), x.sum(0)) < 1e-6
    assert error(fused(x, damping=1e-12), fused(x)) < 1e-6
    assert error(fused(1e6 * x, damping=0.1), 1e6 * fused(x, damping=0.1)) < 1e-9
    n = x.flatten(1).norm(dim=1) ** 2
    C = sum(task.mT @ task / k for task, k in zip(x, n, strict=True))
    weight = 0.1 * torch.linalg.eigvalsh(C).mean()
    leaf = fused(x, damping=0.1).requires_grad_()
    (wudi_loss(leaf, x) + weight * ((leaf - x.sum(0)) ** 2).sum()).backward()
    assert torch.linalg.norm(leaf.grad) < 1e-9 * torch.linalg.norm(x)


def test_nearly_equal_inputs_with_different_outputs_make_it_large_and_damping_helps():
    x = torch.stack([normal(5, 1, seed=q) @ (normal(1, 8, seed=9) + 1e-3 * normal(1, 8, seed=20 + q)) for q in (0, 1)])
    assert torch.linalg.norm(fused(x)) > 50 * torch.linalg.norm(x)
    assert torch.linalg.norm(fused(x, damping=1e-2)) < 2 * torch.linalg.norm(x)


def test_the_values_of_fusion_bench():
    peer = pytest.importorskip("fusion_bench.method.wudi")
    shapes = {"square": (16, 16), "tall": (30, 12), "wide": (12, 30), "b": (5,)}
    vectors = [
        {k: 1e-3 * normal(*s, seed=10 * q + i, dtype=torch.float32) for i, (k, s) in enumerate(shapes.items())}
        for q in range(4)
    ]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        theirs = peer.wudi_merging(vectors, accelerator="cpu", iter_num=100)
    ours = wudi(vectors, steps=100)
    for key, expected in theirs.items():
        torch.testing.assert_close(ours[key], expected.detach(), rtol=0, atol=1e-7)  # a hundredth of a step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, "damping: expected a number that is not negative, got -1"),
        ({"step_size": 0.0}, "step_size: expected a positive number, got 0"),
        ({"steps": 0}, "steps"),
        ({"steps": 3, "damping": 0.1}, "give one of damping, steps"),
        ({"scale": float("nan")}, "scale"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        fused([torch.ones(2, 2)], **options)
