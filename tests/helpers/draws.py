"""Numbers and modules drawn with a seed, the same ones in every test that asks for them."""

from __future__ import annotations

import numpy as np
import torch


def gaussian(*shape, seed=0, dtype=torch.float32):
    """From torch's generator, drawn in the precision asked for."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def double(*shape, seed=0):
    """From torch's generator, in double precision."""
    return gaussian(*shape, seed=seed, dtype=torch.float64)


def rounded(*shape, seed=0, dtype=torch.float32):
    """The numbers of `double`, rounded: nearly the same ones in every precision."""
    return double(*shape, seed=seed).to(dtype)


def normal(*shape, seed=0):
    """From NumPy's generator, in double precision."""
    return torch.as_tensor(np.random.default_rng(seed).standard_normal(shape))


def seeded(make, seed=0):
    """What `make` makes when torch's own generator starts at the seed, which is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def orthogonal(energies, size, seed=0):
    """For each user, tensors w0, w1, ... of exactly these mean squares (Q, K), the users' ones orthogonal."""
    users, tensors = np.shape(energies)
    sent = [{} for _ in range(users)]
    for k in range(tensors):
        basis = np.linalg.qr(np.random.default_rng([seed, k]).standard_normal((size, users)))[0]
        for q in range(users):
            sent[q][f"w{k}"] = torch.from_numpy(basis[:, q] * (size * energies[q][k]) ** 0.5)
    return sent


def with_energies(energies, size, seed=0):
    """For each user, tensors w0, w1, ... of these energies, (Q, K)."""
    draw = np.random.default_rng(seed)
    return [
        {f"w{k}": torch.from_numpy(v**0.5 * draw.standard_normal(size)) for k, v in enumerate(row)} for row in energies
    ]


def independent(users, shapes, seed=0):
    """For each user, tensors of these names and shapes that have nothing to do with those of others."""
    draw = np.random.default_rng(seed)
    return [{key: torch.as_tensor(draw.standard_normal(shape)) for key, shape in shapes.items()} for _ in range(users)]
