"""An encoder in which gradients are easily got wrong, and samples for it."""

from __future__ import annotations

import torch
from torch import nn

X = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.tensor([0, 3, 1, 1, 2, 0, 3])


class Encoder(nn.Module):
    """Attention, a tie, a buffer, dropout and a parameter that nothing needs."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(5, 1, dropout=0.3, batch_first=True)
        self.a = nn.Linear(5, 5, bias=False)
        self.b = nn.Linear(5, 5, bias=False)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(5)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.norm(self.b(torch.tanh(self.a(self.attn(x, x, x, need_weights=False)[0].mean(1)))))
