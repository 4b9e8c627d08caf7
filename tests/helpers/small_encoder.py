"""A small encoder, its state, task vectors for it, and whether a model still holds a state."""

import torch
from torch import nn

from helpers.draws import gaussian, seeded


def encoder(seed=0):
    return seeded(lambda: nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16)), seed)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def vectors_like(state, users=4, size=0.05):
    return [
        {name: size * gaussian(*tensor.shape, seed=100 * q + k) for k, (name, tensor) in enumerate(state.items())}
        for q in range(users)
    ]
