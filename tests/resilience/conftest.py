"""What several files on one mechanism start from."""

import pytest
import torch
from torch import nn

from helpers.draws import gaussian, seeded
from helpers.small_encoder import encoder, state_of, vectors_like
from rmtllmf.channel import transmit


@pytest.fixture
def setting():
    """For `protect`: a base, what is heard of four vectors for it, and two tasks."""
    base = state_of(encoder())
    heard = transmit(vectors_like(base), 0.3, seed=0)
    heads = seeded(lambda: [nn.Linear(16, 3) for _ in range(2)])
    tasks = {
        name: (heads[k], [(gaussian(6, 24, seed=7 * k + i), torch.arange(6) % 3) for i in range(2)])
        for k, name in enumerate("ab")
    }
    return base, heard, tasks


@pytest.fixture
def torch_seeded():
    """Torch's own generator starts at 0, and is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
