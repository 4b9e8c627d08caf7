"""Vectors and a reception that several tests of transmissions send over."""

import numpy as np
import pytest
import torch

from helpers.oracles import complex_normal, random_covariance
from helpers.transmitted import USERS
from rmtllmf.channel import lmmse
from rmtllmf.taskvec import TaskVector


@pytest.fixture(scope="module")
def vectors():
    """Task vectors over the parameters of a real vision transformer, 2 million, of very different lengths."""
    import open_clip  # which takes seconds, and most tests of the channel do without

    torch.manual_seed(0)
    tower = open_clip.transformer.VisionTransformer(32, 8, 192, 4, 3, 4.0, output_dim=65)
    state = {key: value for key, value in tower.state_dict().items() if value.is_floating_point()}
    state["zz.odd"] = torch.zeros(31)  # an odd number of coefficients: a last half symbol, and pairs across tensors
    source = torch.Generator().manual_seed(1)
    return [
        TaskVector({key: (q + 1) * 1e-3 * torch.randn(v.shape, generator=source) for key, v in state.items()})
        for q in range(USERS)
    ]


@pytest.fixture(scope="module")
def mismatched():
    """A receiver whose errors are correlated, with an imaginary part."""
    rng = np.random.default_rng(2)
    H = complex_normal(rng, 4, USERS)
    rx = lmmse(H, 0.5, 0.3 * random_covariance(rng, 4, 2) + 0.1 * np.eye(4), designed_for=0.1 * np.eye(4))
    assert np.abs(rx.error_covariance.imag).max() > 0.01
    return rx
