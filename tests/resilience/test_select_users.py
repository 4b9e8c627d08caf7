"""Which users to fuse, against all subsets on risks that are known exactly."""

import itertools

import numpy as np
import pytest
import torch

from helpers.known_risk import covariance, noise_of, reception_of, true_risk, vectors
from rmtllmf.channel import transmit
from rmtllmf.resilience.fusion_weights import select_users


class TestSelection:
    @pytest.mark.parametrize("seed", range(6))
    def test_is_the_best_of_all_subsets_on_the_exact_risk(self, seed):
        """By the definition: every subset, the risk from what was sent. Clear cases, so that estimates decide alike."""
        rng = np.random.default_rng(seed)
        E, sent = 2 * covariance(5, seed), vectors(5, 60_000, seed, norms=rng.uniform(0.5, 2, 5))
        V = noise_of(E, sent)
        risk = {
            chosen: true_risk(np.isin(np.arange(5), chosen).astype(float), 1.0, sent, V)
            for size in range(6)
            for chosen in itertools.combinations(range(5), size)
        }
        received = transmit(sent, reception_of(E), seed=seed)
        found = select_users(received, reception_of(E), at_least=0)
        assert risk[found] <= 1.02 * min(risk.values())
        assert risk[found] <= 1.02 * risk[(0, 1, 2, 3, 4)]

    def test_stronger_than_its_noise_or_not(self):
        mse = [0.5, 2.0, 0.9, 1.1, 0.0]
        sent = vectors(5, 200_000, seed=0, common=0.0)
        received = transmit(sent, mse, seed=1)
        assert select_users(received, mse) == (0, 2, 4)
        order = [4, 1, 0, 3, 2]
        turned = select_users([received[q] for q in order], [mse[q] for q in order])
        assert turned == (0, 2, 4)

    def test_what_others_share_with_a_vector_decides_too(self):
        """Each is noisier than strong, yet without any 9 units of power would be missing; and opposites cancel."""
        one = vectors(1, 100_000, seed=0)[0]
        opposite = {key: -value for key, value in one.items()}
        mse = [1.5, 1.3, 1.7]  # all: 4.5; the better two: 1 + 2.8; the best alone: 4 + 1.3; none: 9
        assert select_users(transmit([one] * 3, mse, seed=1), mse, at_least=0) == (0, 1)
        assert select_users(transmit([one, opposite], [0.1, 0.1], seed=1), [0.1, 0.1], at_least=0) == ()

    def test_nobody_only_if_asked(self):
        mse = [3.0, 2.0, 4.0]
        received = transmit(vectors(3, 50_000, seed=0, common=0.0), mse, seed=1)
        assert select_users(received, mse, at_least=0) == ()
        assert select_users(received, mse) == (1,)
        assert select_users(received, mse, at_least=3) == (0, 1, 2)

    def test_without_noise_everybody(self):
        assert select_users(vectors(4, 100, seed=0), [0.0] * 4) == (0, 1, 2, 3)
        assert select_users([{"w": torch.zeros(5)}] * 3, [0.1] * 3) == (0, 1, 2)

    def test_many_users_are_left_out_one_by_one(self):
        """13 and more; with independent vectors greedy is exact."""
        mse = [0.3, 1.8] * 8
        received = transmit(vectors(16, 100_000, seed=0, common=0.0), mse, seed=1)
        assert select_users(received, mse) == tuple(range(0, 16, 2))
        assert len(select_users(received, mse, at_least=10)) == 10
