"""Adam for one tensor with a gradient that is known in closed form."""

from __future__ import annotations

import torch
from torch import Tensor


class Adam:
    """Steps of Adam, with torch's defaults; writes to the tensor."""

    def __init__(self, tensor: Tensor, step_size: float, epsilon: float = 1e-8) -> None:
        self.tensor, self.step_size, self.epsilon = tensor, step_size, epsilon
        self.first, self.second = torch.zeros_like(tensor), torch.zeros_like(tensor)
        self.count = 0

    def step(self, gradient: Tensor) -> None:
        """One step against `gradient`, which is written to."""
        self.count += 1
        self.first.lerp_(gradient, 1 - 0.9)
        self.second.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
        root = torch.sqrt(self.second, out=gradient).div_((1 - 0.999**self.count) ** 0.5).add_(self.epsilon)
        self.tensor.addcdiv_(self.first, root, value=-self.step_size / (1 - 0.9**self.count))
