"""Numbers and modules drawn with a seed, the same ones in every test that asks for them."""

from __future__ import annotations

import numpy as np
import torch


def gaussian(*shape, seed=0, dtype=torch.float32):
    """From torch's generator, drawn in the precision asked for."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def normal(*shape, seed=0):
    """From NumPy's generator, in double precision."""
    return torch.as_tensor(np.random.default_rng(seed).standard_normal(shape))


def seeded(make, seed=0):
    """What `make` makes when torch's own generator starts at the seed, which is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()
