"""Print how good the base, the fine-tuned encoders and their clean fusion are.

python -m testbed.report --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence

import torch
from open_clip.transformer import VisionTransformer
from torch import nn

from .model import base_encoder, finetune, prototype_head
from .tasks import TASKS, Task, load_task


@torch.no_grad()
def accuracy(encoder: nn.Module, head: nn.Module, task: Task) -> float:
    """Share of the test images that are classified rightly."""
    images, labels = task.test.tensors
    found = torch.cat([head(encoder(part)).argmax(1) for part in images.split(256)])
    return (found == labels).float().mean().item()


@torch.no_grad()
def fuse(base: VisionTransformer, tuned: Sequence[nn.Module], scale: float) -> VisionTransformer:
    """Plain task arithmetic: the base plus ``scale`` times the sum of the differences to it."""
    fused = copy.deepcopy(base)
    others = [dict(encoder.named_parameters()) for encoder in tuned]
    for name, weight in fused.named_parameters():
        start = weight.clone()
        for other in others:
            weight += scale * (other[name] - start)
    return fused


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="accuracies of the testbed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--scales", type=float, nargs="+", default=[0.2, 0.3, 0.4])
    parser.add_argument("--threads", type=int, default=None, help="PyTorch threads")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    began = time.perf_counter()
    tasks = [load_task(name) for name in TASKS]
    print(f"made {len(tasks)} data sets in {time.perf_counter() - began:.1f} s")
    base = base_encoder()
    heads = [prototype_head(base, task) for task in tasks]
    start = [accuracy(base, head, task) for head, task in zip(heads, tasks, strict=True)]
    for seed in given.seeds:
        began = time.perf_counter()
        tuned = [finetune(base, head, task, seed=seed) for head, task in zip(heads, tasks, strict=True)]
        took = time.perf_counter() - began
        own = [accuracy(e, h, t) for e, h, t in zip(tuned, heads, tasks, strict=True)]
        fused = [fuse(base, tuned, scale) for scale in given.scales]
        table = [start, own, *([accuracy(e, h, t) for h, t in zip(heads, tasks, strict=True)] for e in fused)]
        names = ["base", "tuned", *(f"x {scale:g}" for scale in given.scales)]
        print(f"\nseed {seed}, fine-tuning took {took:.0f} s\n{'accuracy':12}" + "".join(f"{n:>9}" for n in names))
        for row, task in enumerate(tasks):
            print(f"{task.name:12}" + "".join(f"{column[row]:9.3f}" for column in table))
        print(f"{'mean':12}" + "".join(f"{sum(column) / len(column):9.3f}" for column in table))
        ratios = [sum(a / b for a, b in zip(column, own, strict=True)) / len(own) for column in table]
        print(f"{'normalised':12}" + "".join(f"{ratio:9.3f}" for ratio in ratios))


if __name__ == "__main__":
    main()
