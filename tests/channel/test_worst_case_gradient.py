"""Gradients of the worst case against finite differences, where a spectrum is generic and where it is degenerate."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from helpers.oracles import complex_normal
from rmtllmf.channel import worst_case, worst_case_covariance


def channel(kind):
    rng = np.random.default_rng(3)
    if kind == "orthonormal":  # all eigenvalues equal: eigh's own backward gives NaN here
        return torch.eye(4, 3, dtype=torch.complex128)
    if kind == "pairs":
        return torch.diag(torch.tensor([2.0, 2.0, 1.0, 1.0])).to(torch.complex128)[:, :4]
    if kind == "rank deficient":
        h = complex_normal(rng, 4, 2)
        return torch.from_numpy(np.hstack([h, h[:, :1]]))
    shape = {"tall": (4, 2), "square": (3, 3), "wide": (2, 4), "one user": (3, 1), "one antenna": (1, 3)}[kind]
    return torch.from_numpy(complex_normal(rng, *shape))


def outputs(H, P, P_N, noise):
    found = worst_case(H, P, P_N, noise=noise)
    return found.covariance, found.sum_rate, found.level


KINDS = ["tall", "square", "wide", "one user", "one antenna", "orthonormal", "pairs", "rank deficient"]


@pytest.mark.parametrize(
    ("kind", "noise"),
    # without a floor C is not differentiable at a zero eigenvalue
    [(kind, noise) for kind in KINDS for noise in (0.0, 0.3, 20.0) if noise or kind != "rank deficient"],
)
def test_against_finite_differences(kind, noise):
    H = channel(kind).requires_grad_()
    users = H.shape[1]
    P = torch.ones(users, dtype=torch.float64)
    if kind not in ("orthonormal", "pairs"):
        P = P * torch.linspace(0.5, 1.5, users)
    P.requires_grad_()
    P_N = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    if noise == 0:
        assert gradcheck(lambda H, P, P_N: outputs(H, P, P_N, 0.0), (H, P, P_N))
    else:
        floor = torch.tensor(noise, dtype=torch.float64, requires_grad=True)
        assert gradcheck(outputs, (H, P, P_N, floor), atol=1e-5, eps=1e-5 if noise > 1 else 1e-6)


def test_some_modes_are_jammed_and_some_are_not():
    """Divided differences across the border, in a rotated basis."""
    rng = np.random.default_rng(5)
    left, _ = np.linalg.qr(complex_normal(rng, 5, 5))
    right, _ = np.linalg.qr(complex_normal(rng, 4, 4))
    H = torch.from_numpy(left[:, :4] @ np.diag([2.0, 1.7, 0.5, 0.4]) @ right).requires_grad_()
    P_N = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    floor = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    assert torch.linalg.matrix_rank(worst_case_covariance(H, 1.0, P_N, noise=floor).detach()) == 2
    assert gradcheck(lambda H, P_N, floor: outputs(H, 1.0, P_N, floor), (H, P_N, floor))


def test_batches_and_broadcasting():
    rng = np.random.default_rng(6)
    H = torch.from_numpy(complex_normal(rng, 2, 1, 3, 2)).requires_grad_()
    P = torch.tensor([[0.5, 1.0]], dtype=torch.float64, requires_grad=True)
    P_N = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda H, P, P_N: outputs(H, P, P_N, 0.1), (H, P, P_N))


def test_a_silent_user_may_start_to_speak():
    """The derivative in the power of a silent user is finite with a floor, where that of its square root is not."""
    H = channel("tall").requires_grad_()
    P_N = 1.5

    def at(p):
        P = torch.stack([torch.tensor(1.0, dtype=torch.float64), p])
        found = worst_case(H, P, P_N, noise=0.3)
        return found.sum_rate + found.covariance[0, 1].real

    zero = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(at(zero), zero)
    step = torch.tensor(1e-7, dtype=torch.float64)
    with torch.no_grad():
        one_sided = (at(step) - at(torch.zeros_like(step))) / step
    assert float(slope) == pytest.approx(float(one_sided), rel=1e-5)


def test_physical_scales():
    """At 1e-17 W: the gradient of a scale-free loss scales as it must."""
    rng = np.random.default_rng(7)
    H = torch.from_numpy(complex_normal(rng, 4, 3))
    gradients = []
    for factor in (1.0, 1e-17):
        P_N = torch.tensor(2.0 * factor, dtype=torch.float64, requires_grad=True)
        P = torch.full((3,), factor, dtype=torch.float64, requires_grad=True)
        found = worst_case(H, P, P_N, noise=0.1 * factor)
        (found.sum_rate + found.covariance[0, 0].real / factor + found.level * factor).backward()
        gradients.append((factor * P_N.grad, factor * P.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_second_derivatives_are_refused_rather_than_wrong():
    P_N = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    rate = worst_case(channel("tall"), 1.0, P_N).sum_rate
    (slope,) = torch.autograd.grad(rate.square(), P_N, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.backward()
    (slope,) = torch.autograd.grad(worst_case(channel("tall"), 1.0, P_N).sum_rate, P_N, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(slope, P_N)


def test_the_derivative_integrates_to_the_rate():
    """dR = -nu dP_N, over a grid."""
    H = channel("square")
    P_N = torch.linspace(0.5, 3.0, 2001, dtype=torch.float64, requires_grad=True)
    rate = worst_case(H, 1.0, P_N, noise=0.1).sum_rate
    (slope,) = torch.autograd.grad(rate.sum(), P_N)
    integral = torch.trapezoid(slope, P_N.detach())
    assert float(integral) == pytest.approx(float(rate[-1].detach() - rate[0].detach()), rel=1e-6)
