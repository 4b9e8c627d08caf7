"""What tests of whole models share."""

import copy

import pytest
import torch
from torch import nn

import rmtllmf.taskvec._engine as engine


@pytest.fixture
def small_pieces(monkeypatch):
    """Several pieces a tensor, and threads for small vectors too."""
    monkeypatch.setattr(engine, "PIECE", 8)


class Net(nn.Module):
    """Everything a checkpoint may hold: norm statistics, integers, booleans, a tied head."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(7, 4)
            self.norm = nn.BatchNorm1d(4)
            self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        self.register_buffer("used", torch.tensor([True, False]))


@pytest.fixture
def pair():
    """A base and what fine-tuning made of it: parameters, statistics, counters and flags have changed."""
    base = Net()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.embed.weight += 0.5
        tuned.norm.bias -= 0.25
    tuned.norm.running_mean += 9
    tuned.norm.num_batches_tracked += 3
    tuned.used[1] = True
    return base, tuned
