"""The shared encoder, its frozen heads and fine-tuning."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from tqdm import tqdm

from .common import eight_bit
from .pool import make_pool
from .tasks import Task, normalise

WIDTH, LAYERS, HEADS, PATCH, SIZE = 128, 4, 4, 7, 28
LOGIT_SCALE = 16.0
BASE_FILE = Path(__file__).with_name("base.safetensors")


def new_encoder() -> VisionTransformer:
    """The architecture alone (weights drawn from PyTorch's global generator)."""
    return VisionTransformer(SIZE, PATCH, WIDTH, LAYERS, HEADS, 4.0, output_dim=WIDTH)


def base_encoder() -> VisionTransformer:
    """The pre-trained encoder, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        encoder = new_encoder()
    encoder.load_state_dict({name: value.float() for name, value in load_file(BASE_FILE).items()})
    return encoder.eval()


class PrototypeHead(nn.Module):
    """Cosine similarity to one fixed vector per class, times a fixed scale."""

    def __init__(self, prototypes: torch.Tensor, scale: float = LOGIT_SCALE) -> None:
        super().__init__()
        self.linear = nn.Linear(prototypes.shape[1], prototypes.shape[0], bias=False, device="meta")
        self.linear.weight = nn.Parameter(prototypes * scale, requires_grad=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of features that need not be normalised."""
        return self.linear(F.normalize(features, dim=-1))


@torch.no_grad()
def prototype_head(encoder: nn.Module, task: Task) -> PrototypeHead:
    """The head of a task: the mean normalised feature of each class over the training set, normalised, frozen."""
    images, labels = task.train.tensors
    features = torch.cat([F.normalize(encoder(part), dim=-1) for part in images.split(256)])
    means = [features[labels == kind].mean(0) for kind in range(len(task.classes))]
    return PrototypeHead(F.normalize(torch.stack(means), dim=-1))


def _batches(
    data: TensorDataset, steps: int, size: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """``steps`` batches of images and labels; every image once before any comes again."""
    images, labels = data.tensors
    size = min(size, len(labels))
    order, start = torch.randperm(len(labels), generator=generator), 0
    for _ in range(steps):
        if start + size > len(labels):
            order, start = torch.randperm(len(labels), generator=generator), 0
        part = order[start : start + size]
        start += size
        yield images[part], labels[part]


@cache
def _generic_pictures() -> torch.Tensor:
    """One picture of each class of the pre-training, half of them noisy; what ``finetune`` keeps features of."""
    rng = np.random.default_rng(11)
    pictures, _ = make_pool(rng, each=1)
    noise = rng.choice([0, 0, 20, 45], (len(pictures), 1, 1, 1)) * rng.standard_normal(pictures.shape)
    return normalise(eight_bit(pictures + noise))


def finetune(
    encoder: VisionTransformer,
    head: nn.Module,
    task: Task,
    *,
    steps: int = 150,
    lr: float = 1.2e-3,
    batch_size: int = 64,
    keep: float = 3.0,
    shortest: float = 0.3,
    seed: int = 0,
    progress: bool = False,
) -> VisionTransformer:
    """A copy of the encoder fine-tuned on the task's training set through its frozen head.

    AdamW without weight decay, gradients clipped to length 1, ten steps of warming up, then a half cosine to 0. Three
    things help fusion. Only the matrices inside the transformer and the projection at its end are trained: embeddings,
    norms and biases act on every picture alike, so changing them would disturb the other tasks. Every batch has a
    quarter as many generic pictures, whose normalised features are held near those of the starting encoder with weight
    ``keep`` (0: off). And each step's gradient is taken at a random point between ``shortest`` of the way from the
    starting encoder and the whole way (``shortest=1``: off), so that a shortened task vector works, too.
    ``seed`` decides the order of the images; the global random state is neither read nor changed.
    """
    tuned = copy.deepcopy(encoder).requires_grad_(False)
    weights = [
        weight.requires_grad_()
        for name, weight in tuned.named_parameters()
        if weight.ndim >= 2 and name not in ("conv1.weight", "positional_embedding")
    ]
    start = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    generic = _generic_pictures() if keep else torch.empty(0, *task.train.tensors[0].shape[1:])
    with torch.no_grad():
        wanted = torch.cat([F.normalize(encoder(part), dim=-1) for part in generic.split(256)]) if keep else generic
    batches = _batches(task.train, steps, batch_size, generator)
    for step, (images, labels) in enumerate(tqdm(batches, task.name, steps, disable=not progress)):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
        share = shortest + (1 - shortest) * torch.rand((), generator=generator).item()
        ends = [weight.detach().clone() for weight in weights]
        _set(weights, [torch.lerp(a, b, share) for a, b in zip(start, ends, strict=True)])
        some = torch.randint(len(generic), (batch_size // 4,), generator=generator) if keep else torch.empty(0).long()
        features = tuned(torch.cat([images, generic[some]]))
        loss = F.cross_entropy(head(features[: len(labels)]), labels)
        if keep:
            drift = F.normalize(features[len(labels) :], dim=-1) - wanted[some]
            loss = loss + keep * drift.square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        _set(weights, ends)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    tuned.zero_grad()
    return tuned.eval().requires_grad_(True)


@torch.no_grad()
def _set(weights: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)
