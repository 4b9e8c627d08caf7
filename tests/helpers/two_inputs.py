"""A model that is called with two inputs."""

from __future__ import annotations

from torch import nn


class Sum(nn.Module):
    """Of its inputs, by a linear layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, left, right):
        return self.linear(left + right)
