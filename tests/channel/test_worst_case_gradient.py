"""Gradients of the worst case against finite differences, where a spectrum is generic and where it is degenerate."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import hessian

from helpers.oracles import complex_normal
from rmtllmf.channel import worst_case, worst_case_covariance, worst_case_rate
from rmtllmf.errors import InputError


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


@pytest.mark.parametrize(
    ("kind", "noise"),
    [(kind, noise) for kind in KINDS for noise in (0.0, 0.3) if noise or kind != "rank deficient"],
)
def test_second_derivatives_of_the_rate(kind, noise):
    H, users = channel(kind).requires_grad_(), channel(kind).shape[1]
    P = torch.linspace(0.5, 0.5 if kind in ("orthonormal", "pairs") else 1.5, users, dtype=torch.float64)
    P_N = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    floor = torch.tensor(noise, dtype=torch.float64, requires_grad=noise > 0)

    def rate(H, P, P_N, floor):
        return worst_case_rate(H, P, P_N, noise=floor)

    assert gradgradcheck(rate, (H, P.requires_grad_(), P_N, floor), atol=1e-5)


def test_second_derivatives_where_some_modes_are_jammed_and_in_batches():
    rng = np.random.default_rng(5)
    left, _ = np.linalg.qr(complex_normal(rng, 5, 5))
    H = torch.from_numpy(left[:, :3] @ np.diag([2.0, 1.7, 0.5]))[None].requires_grad_()
    P_N = torch.tensor([0.5, 0.4], dtype=torch.float64, requires_grad=True)
    floor = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda H, P_N, floor: worst_case_rate(H, 1.0, P_N, noise=floor), (H, P_N, floor), atol=1e-5)


@pytest.mark.parametrize("vectorize", [False, True])
def test_a_hessian_at_physical_scales(vectorize):
    H = channel("tall")
    hessians = []
    for factor in (1.0, 1e-17):
        P = torch.tensor([1.0, 0.5], dtype=torch.float64) * factor

        def rate(P, factor=factor):
            return worst_case_rate(H, P, 2.0 * factor, noise=1e-3 * factor)

        hessians.append(factor**2 * hessian(rate, P, vectorize=vectorize))
    assert float(hessians[0].abs().min()) > 1e-3
    torch.testing.assert_close(*hessians, rtol=1e-9, atol=1e-12)


def test_first_derivatives_have_the_same_bits_with_a_graph():
    H = channel("wide").requires_grad_()
    plain, graphed = (
        torch.autograd.grad(worst_case_rate(H, 1.0, 2.0, noise=0.1), H, create_graph=graph)[0]
        for graph in (False, True)
    )
    assert graphed.requires_grad
    assert torch.equal(plain, graphed)


@pytest.mark.parametrize(
    "loss",
    [
        lambda found: found.covariance[0, 0].real,
        lambda found: found.level,
        lambda found: found.sum_rate + found.level,
    ],
    ids=["covariance", "level", "sum"],
)
def test_other_second_derivatives_are_refused_and_not_zero(loss):
    P_N = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(worst_case(channel("tall"), 1.0, P_N)), P_N, create_graph=True)
    with pytest.raises(InputError, match="worst_case: the sum rate has first and second derivatives"):
        slope.backward()
    with pytest.raises(InputError, match="the covariance and the level have first ones only"):
        hessian(lambda P_N: loss(worst_case(channel("tall"), 1.0, P_N)), P_N)


@pytest.mark.parametrize(("kind", "P"), [("rank deficient", 1.0), ("tall", [1.0, 0.0]), ("square", 0.0)])
def test_no_second_derivatives_where_there_are_no_first_ones(kind, P):
    P_N = torch.tensor(2.0, dtype=torch.float64)
    with pytest.raises(InputError, match="no second derivatives where C has no first ones"):
        hessian(lambda P_N: worst_case_rate(channel(kind), P, P_N), P_N)


def test_third_derivatives_are_refused():
    P_N = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(worst_case_rate(channel("tall"), 1.0, P_N), P_N, create_graph=True)
    (bend,) = torch.autograd.grad(slope, P_N, create_graph=True)
    with pytest.raises(InputError, match="first and second derivatives"):
        bend.backward()


def test_complex_gradients_follow_the_convention_of_torch():
    H = channel("tall").requires_grad_()
    worst_case_rate(H, 1.0, 2.0, noise=0.1).backward()
    dH = 1e-6 * torch.from_numpy(complex_normal(np.random.default_rng(0), *H.shape))
    with torch.no_grad():
        change = worst_case_rate(H + dH, 1.0, 2.0, noise=0.1) - worst_case_rate(H - dH, 1.0, 2.0, noise=0.1)
    assert float((H.grad.conj() * dH).sum().real) == pytest.approx(float(change) / 2, rel=1e-7)


def test_the_derivative_integrates_to_the_rate():
    """dR = -nu dP_N, over a grid."""
    H = channel("square")
    P_N = torch.linspace(0.5, 3.0, 2001, dtype=torch.float64, requires_grad=True)
    rate = worst_case(H, 1.0, P_N, noise=0.1).sum_rate
    (slope,) = torch.autograd.grad(rate.sum(), P_N)
    integral = torch.trapezoid(slope, P_N.detach())
    assert float(integral) == pytest.approx(float(rate[-1].detach() - rate[0].detach()), rel=1e-6)
