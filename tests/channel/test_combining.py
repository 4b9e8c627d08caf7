"""Combined blocks against the sum of Gram matrices, explicit filters, and the equivalent single block."""

import numpy as np
import pytest
import torch
from scipy.linalg import block_diag

from helpers.oracles import complex_normal, random_covariance, receive
from rmtllmf.channel import lmmse, repeat_block, sic, stack_blocks, sum_rate


def blocks(rng, K, antennas=4, users=3, batch=()):
    H = complex_normal(rng, *batch, K, antennas, users)
    factor = complex_normal(rng, *batch, K, antennas, antennas)
    return H, factor @ factor.conj().swapaxes(-1, -2) + 0.1 * np.eye(antennas)


def gram(H, P, C):
    B = H * np.sqrt(P)
    return B.conj().swapaxes(-1, -2) @ np.linalg.inv(C) @ B


def test_what_counts_is_the_sum_of_the_gram_matrices():
    rng = np.random.default_rng(0)
    P = np.array([1.0, 0.5, 0.2])
    H, C = blocks(rng, 3, batch=(5,))
    stacked, noise = stack_blocks(H, C)
    assert stacked.shape == (5, 12, 3)
    total = gram(H, P, C).sum(1)
    np.testing.assert_allclose(gram(stacked, P, noise), total, atol=1e-9)
    np.testing.assert_allclose(lmmse(stacked, P, noise).error_covariance, np.linalg.inv(np.eye(3) + total), atol=1e-9)
    np.testing.assert_allclose(sum_rate(stacked, P, noise), np.linalg.slogdet(np.eye(3) + total).logabsdet, rtol=1e-9)


def test_a_mismatched_receiver_of_the_stack_against_explicit_filters():
    rng = np.random.default_rng(1)
    P = np.array([1.0, 0.5, 0.2])
    H, C = blocks(rng, 2)
    stacked, noise, design = stack_blocks(H, C, 0.3 * np.eye(4))
    np.testing.assert_array_equal(noise, block_diag(*C))
    np.testing.assert_array_equal(design, 0.3 * np.eye(8))
    order = [2, 0, 1]
    E, N, _ = receive(np.concatenate(list(H)), P, block_diag(*C), 0.3 * np.eye(8), order)
    rx = sic(stacked, P, noise, designed_for=design, order=order)
    np.testing.assert_allclose(rx.error_covariance, E, atol=1e-9)
    np.testing.assert_allclose(rx.noise_covariance, N, atol=1e-9)


def test_users_are_ordered_by_their_mean_power():
    H = np.zeros((2, 3, 2), complex)
    H[0, 0, 0], H[1, 0, 0] = 2.0, 0.1  # louder in the first block ...
    H[0, 1, 1], H[1, 1, 1] = 1.0, 3.0  # ... but not on average
    stacked, noise = stack_blocks(H, np.eye(3))
    assert sic(stacked, 1.0, noise, order="strongest_first").order.tolist() == [1, 0]


def test_more_blocks_never_hurt():
    rng = np.random.default_rng(2)
    H, C = blocks(rng, 4, batch=(20,))
    errors = []
    for K in range(1, 5):
        stacked, noise = stack_blocks(H[:, :K], C[:, :K])
        errors.append(sic(stacked, 1.0, noise, order=[0, 1, 2]).mse)
    assert np.all(np.diff(errors, axis=0) < 0)


@pytest.mark.parametrize("receiver", [sic, lmmse])
def test_repetition_divides_the_noise(receiver):
    rng = np.random.default_rng(3)
    H, C = (part[0] for part in blocks(rng, 1, batch=()))
    repeated, noise, design = repeat_block(H, C, 3, np.eye(4))
    np.testing.assert_allclose(receiver(repeated, 0.7, noise).mse, receiver(H, 0.7, C / 3).mse, rtol=1e-9)
    mismatched = receiver(repeated, 0.7, noise, designed_for=design).mse
    np.testing.assert_allclose(mismatched, receiver(H, 0.7, C / 3, designed_for=np.eye(4) / 3).mse, rtol=1e-9)
    once = repeat_block(H, C, 1)
    np.testing.assert_array_equal(once[0], H)
    np.testing.assert_allclose(once[1], C, atol=1e-15)


def test_kinds_precisions_and_broadcasting():
    rng = np.random.default_rng(4)
    H, C = blocks(rng, 2, batch=(5,))
    shared = stack_blocks(H, C[0, 0])  # one covariance for every block and draw
    assert shared[1].shape == (8, 8)
    fresh = stack_blocks(H[:, :1], C)  # the same channel, another noise in each block
    assert fresh[0].shape == (5, 8, 3)
    np.testing.assert_array_equal(fresh[0][:, :4], fresh[0][:, 4:])
    tensors = stack_blocks(torch.from_numpy(H), torch.from_numpy(C))
    for tensor, array in zip(tensors, stack_blocks(H, C), strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
    mixed = stack_blocks(H, C.astype(np.complex64))
    assert (mixed[0].dtype, mixed[1].dtype) == (np.complex128, np.complex64)
    singular = stack_blocks(H, np.stack([random_covariance(rng, 4, rank=1)] * 2))
    assert np.all(sic(singular[0], 1.0, singular[1]).mse == 0)  # nulled in either block


def test_gradients_pass_through():
    rng = np.random.default_rng(5)
    H, C = (torch.from_numpy(part).requires_grad_() for part in blocks(rng, 2, 2, 2))

    def outputs(H, C):
        return lmmse(*with_power(stack_blocks(H, 0.5 * (C + C.mH)))).mse

    def with_power(stacked):
        return stacked[0], 0.5, stacked[1]

    assert torch.autograd.gradcheck(outputs, (H, C))
