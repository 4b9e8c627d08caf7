"""A world for the experiments that costs nothing: a tiny vision transformer, random tasks, random task vectors."""

import torch
from open_clip.transformer import VisionTransformer
from torch import nn
from torch.utils.data import TensorDataset

from paper.world import Arena, World
from rmtllmf.taskvec import TaskVector


class Toy(World):
    """Random tasks of a tiny vision transformer."""

    width, layers = 16, 1

    @property
    def base(self):
        if not hasattr(self, "_base"):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self._base = VisionTransformer(8, 4, self.width, self.layers, 2, 2.0, output_dim=8).eval()
        return self._base

    def load(self, name):
        source = torch.Generator().manual_seed(ord(name))
        head = nn.Linear(8, 3, bias=False).requires_grad_(False)
        head.weight.copy_(torch.randn(3, 8, generator=source))
        images = torch.randn(24, 3, 8, 8, generator=source)
        labels = torch.arange(24) % 3
        return Arena(head, TensorDataset(images[:12], labels[:12]), TensorDataset(images[12:], labels[12:]))

    def vectors(self, seed):
        source = torch.Generator().manual_seed(seed)
        names = self.base.state_dict()
        return [
            TaskVector({k: 0.05 * torch.randn(t.shape, generator=source) for k, t in names.items()})
            for _ in self.protocol.tasks
        ]

    def identity(self):
        return "toy"
