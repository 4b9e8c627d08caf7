"""Receptions of a batch: those of its draws one by one, whoever stands beside them, in one go or in parts."""

import numpy as np
import pytest
import torch

from helpers.oracles import complex_normal, random_covariance
from helpers.receiver_cases import ANTENNAS, USERS, call, covariance
from rmtllmf.channel import lmmse, receivers, sic
from rmtllmf.errors import NonFiniteError, ShapeError

# before, the last bits of a solution hung on the size of the batch
EXACT = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)


def test_batches_equal_single_calls():
    rng = np.random.default_rng(10)
    H, P = complex_normal(rng, 3, 1, 4, 3), rng.uniform(0.1, 1, (3, 1, 3))
    C = np.stack([covariance(kind, rng) for kind in ("regular", 2)])  # a singular item takes the others along
    order = np.array([[0, 1, 2], [2, 0, 1]])
    rx = sic(H, P, C, order=order, designed_for=np.eye(4))
    matched = sic(H, P, C, order=order)
    linear = lmmse(H, P, C)
    assert rx.mse.shape == (3, 2, 3)
    assert rx.order.shape == (3, 2, 3)
    for i in range(3):
        for j in range(2):
            one = sic(H[i, 0], P[i, 0], C[j], order=order[j], designed_for=np.eye(4))
            np.testing.assert_allclose(rx.error_covariance[i, j], one.error_covariance, atol=1e-12)
            np.testing.assert_allclose(matched.mse[i, j], sic(H[i, 0], P[i, 0], C[j], order=order[j]).mse, atol=1e-9)
            np.testing.assert_allclose(linear.mse[i, j], lmmse(H[i, 0], P[i, 0], C[j]).mse, atol=1e-9)


@pytest.mark.parametrize("receiver", [sic, lmmse])
def test_a_singular_neighbour_changes_nothing_for_the_rest_of_the_batch(receiver):
    """Users that are nearly parallel and very loud, where squaring the condition would cost half the digits."""
    rng = np.random.default_rng(15)
    h, g = complex_normal(rng, 4, 1), complex_normal(rng, 4, 1)
    H = np.hstack([h, h + 1e-6 * g])
    regular, singular = np.eye(4), random_covariance(rng, 4, 2)
    both = receiver(H, 1e12, np.stack([regular, singular]))
    np.testing.assert_array_equal(both.mse[0], receiver(H, 1e12, regular).mse)
    np.testing.assert_array_equal(both.mse[1], receiver(H, 1e12, singular).mse)


@pytest.mark.filterwarnings("ignore:C. is singular to the precision of complex64")  # it is meant to be
@pytest.mark.parametrize("order", ["weakest_first", "shared", "own"])
@pytest.mark.parametrize("design", [None, "shared", "own", "singular"])
@pytest.mark.parametrize("kind", ["numpy", "torch", "single"])
def test_a_long_batch_in_parts_has_the_same_bits(monkeypatch, kind, design, order):
    """Draws and shared arguments, regular and singular noise in one batch, and a last part of a single draw."""
    rng = np.random.default_rng(9)
    draws = 25
    H, P = complex_normal(rng, draws, ANTENNAS, USERS), rng.uniform(0.2, 2.0, (draws, USERS))
    C = np.stack([covariance("regular" if k % 5 else 2, rng) for k in range(draws)])
    design = {
        None: None,
        "shared": covariance("regular", rng),
        "own": np.stack([covariance("regular", rng) for _ in range(draws)]),
        "singular": np.stack([covariance(k % 3 + 1, rng) for k in range(draws)]),
    }[design]
    order = {"shared": np.array([2, 0, 1]), "own": rng.permuted(np.tile(np.arange(USERS), (draws, 1)), axis=-1)}.get(
        order, order
    )
    if kind == "single":
        H, C = H.astype(np.complex64), C.astype(np.complex64)
    if kind == "torch":
        H, P, C = map(torch.from_numpy, (H, P, C))
    for receiver in ("sic", "lmmse"):
        if kind == "numpy" or receiver == "sic" or isinstance(order, str):
            whole = call(receiver, H, P, C, design, order)
            monkeypatch.setattr("rmtllmf.channel.receivers._CHUNK", 8)
            parts = call(receiver, H, P, C, design, order)
            monkeypatch.undo()
            for name, expected in vars(whole).items():
                found = getattr(parts, name)
                assert type(found) is type(expected), name
                if expected is not None:
                    assert found.dtype == expected.dtype, name
                    np.testing.assert_allclose(found, expected, rtol=0 if EXACT else 1e-12, err_msg=name)
                    end = (USERS, USERS) if name.endswith("covariance") else (USERS,)
                    assert found.shape == (draws, *end)


def test_what_is_and_what_is_not_received_in_parts(monkeypatch):
    """Gradients and errors are those of the whole batch; arguments that do not fit are not cut to fit."""
    monkeypatch.setattr("rmtllmf.channel.receivers._CHUNK", 4)
    lengths = []
    receive_part = receivers._receive
    monkeypatch.setattr(receivers, "_receive", lambda H, *rest: lengths.append(len(H)) or receive_part(H, *rest))
    rng = np.random.default_rng(10)
    H = complex_normal(rng, 8, ANTENNAS, USERS)
    C = np.stack([covariance("regular", rng) for _ in range(8)])
    sic(H, np.ones((8, USERS)), C, designed_for=C, order=np.tile(np.arange(USERS), (8, 1)))
    assert lengths == [4, 4]  # a third one would be the whole batch, after a part that did not fit
    lengths.clear()
    sic(H, [1.0, 2.0, 3.0], C[:1], order=[0, 1, 2])
    assert lengths == [4, 4]
    lengths.clear()
    leaf = torch.from_numpy(H).requires_grad_()
    sic(leaf, 1.0, C).mse.sum().backward()
    assert lengths == [8]
    assert (leaf.grad.abs() > 0).all()
    with pytest.raises(ShapeError, match="batch dimensions"):
        sic(H, 1.0, C[:4])
    with pytest.raises(ShapeError, match="does not broadcast"):
        lmmse(H, np.ones((4, USERS)).tolist(), C)
    H[6:, 0, 0] = np.nan
    with pytest.raises(NonFiniteError, match=f"2 non-finite entries of {H.size}"):
        lmmse(H, 1.0, C)
