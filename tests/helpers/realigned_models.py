"""Small models to realign, two tasks for one of them, and whether modules are as they were."""

import torch
from torch import nn

from helpers.draws import gaussian, seeded


def encoder(seed=0):
    return seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)), seed)


def two_tasks(sizes=(6, 3)):
    """Heads and batches of two tasks with different numbers of batches and classes."""
    heads = [nn.Linear(4, 3), nn.Linear(4, 2)]
    for index, head in enumerate(heads):
        head.weight.data = gaussian(*head.weight.shape, seed=10 + index)
        head.bias.data.zero_()
    return {
        name: (head, [(gaussian(5, 4, seed=100 * place + k), torch.arange(5) % classes) for k in range(size)])
        for place, (name, head, classes, size) in enumerate(zip("ab", heads, (3, 2), sizes, strict=True))
    }


def snapshot(*modules):
    return [tensor.clone() for module in modules for tensor in module.state_dict().values()]


def unchanged(before, *modules):
    return all(map(torch.equal, before, snapshot(*modules)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.drop(self.norm(self.embed(x))))


TOKENS = [(torch.arange(6), torch.arange(6).roll(1))]
