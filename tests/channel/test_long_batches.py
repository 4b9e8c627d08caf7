"""A long batch is solved in parts: the same numbers as of each draw alone."""

import numpy as np
import pytest
import torch

from rmtllmf.channel import UplinkScenario, worst_case, worst_case_rate
from rmtllmf.channel.worst_case import _CHUNK

LENGTH = 2 * _CHUNK + 3


@pytest.mark.parametrize("numpy", [True, False])
def test_the_rate_alone_of_a_long_batch(numpy):
    up = UplinkScenario(num_users=2, num_antennas=3).draw(LENGTH, seed=0, numpy=numpy)
    P_N = np.linspace(0.0, 200.0, LENGTH) * np.asarray(up.noise)
    rate = worst_case_rate(up.H, up.P, P_N if numpy else torch.from_numpy(P_N), noise=up.noise)
    assert rate.shape == (LENGTH,)
    assert isinstance(rate, np.ndarray) is numpy
    for index in (0, 1, _CHUNK - 1, _CHUNK, 2 * _CHUNK, LENGTH - 1):
        alone = worst_case(up.H[index], up.P[index], P_N[index], noise=up.noise[index])
        assert float(rate[index]) == pytest.approx(float(alone.sum_rate), rel=1e-12)
