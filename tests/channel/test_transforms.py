"""torch.func, forward mode, vectorised Jacobians and torch.compile: what works agrees, what does not says so."""

import pytest
import torch
from torch.autograd.functional import jacobian

from rmtllmf.channel import (
    UplinkScenario,
    barrage_covariance,
    sic,
    sum_rate,
    worst_case,
    worst_case_covariance,
    worst_case_rate,
)
from rmtllmf.errors import InputError


@pytest.fixture(scope="module")
def up():
    return UplinkScenario(num_users=3, num_antennas=4).draw(5, seed=0)


VMAPPED = {
    "worst_case_covariance": lambda H, P, n: worst_case_covariance(H, P, 124 * n, noise=n),
    "worst_case_rate": lambda H, P, n: worst_case_rate(H, P, 124 * n, noise=n),
    "barrage_covariance": lambda H, P, n: barrage_covariance(H, n),
    "sum_rate": lambda H, P, n: sum_rate(H, P, torch.eye(4, dtype=torch.complex128) * n),
    "sic": lambda H, P, n: sic(H, P, torch.eye(4, dtype=torch.complex128) * n).mse,
}


@pytest.mark.parametrize("name", VMAPPED)
def test_vmap_is_refused_and_batches_take_its_place(up, name):
    with pytest.raises(InputError, match=r"torch\.func\.vmap.*leading dimensions are batches"):
        torch.func.vmap(VMAPPED[name])(up.H, up.P, up.noise)


def rate(up):
    return lambda P_N: worst_case_rate(up.H[0], up.P[0], P_N, noise=up.noise[0])


def covariance(up):
    return lambda P_N: worst_case_covariance(up.H[0], up.P[0], P_N, noise=up.noise[0]).real


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own, in forward mode
@pytest.mark.parametrize(
    "transform",
    [
        lambda up, x: torch.func.grad(rate(up))(x),
        lambda up, x: torch.func.jacrev(covariance(up))(x),
        lambda up, x: torch.func.jvp(covariance(up), (x,), (x,)),
        lambda up, x: jacobian(rate(up), x, vectorize=True, strategy="forward-mode"),
        lambda up, x: jacobian(covariance(up), x, vectorize=True, strategy="forward-mode"),
    ],
    ids=["grad", "jacrev", "jvp", "forward rate", "forward covariance"],
)
def test_derivatives_by_transformation_are_refused_and_not_dropped(up, transform):
    with pytest.raises(InputError, match=r"use torch\.autograd\.grad"):
        transform(up, 124 * up.noise[0])


def test_vectorised_jacobians_are_those_of_the_loop(up):
    x = 124 * up.noise[0]
    plain, fast = (jacobian(covariance(up), x, vectorize=flag) for flag in (False, True))
    torch.testing.assert_close(fast, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(fast.trace(), torch.ones_like(fast.trace()))


def test_receivers_work_under_derivatives_of_torch_func(up):
    def total(factor):
        return sum_rate(up.H[0], up.P[0], factor * up.noise_covariance[0])

    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(torch.func.grad(total)(one), jacobian(total, one))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_results_are_the_same_with_gradients_too(up):
    """Graphs break at every check of a value; `fullgraph` is out of reach."""
    compiled = torch.compile(worst_case)

    def found(function):
        P_N = (124 * up.noise).requires_grad_()
        result = function(up.H, up.P, P_N, noise=up.noise)
        return result.covariance.detach(), *torch.autograd.grad(result.sum_rate.sum(), P_N)

    try:
        for got, expected in zip(found(compiled), found(worst_case), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    finally:
        torch._dynamo.reset()
