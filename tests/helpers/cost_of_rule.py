"""Time and memory of one rule beside task arithmetic in a process of its own: ``cost_of_rule.py NAME`` prints JSON.

Eight fine-tuned models: a vision transformer of RMTLLMF_BENCH_BLOCKS (2) blocks with ViT-B/16's 768 features and ten
classes, Gaussian task vectors, three batches of 16 pictures of 32 x 32 pixels a task.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from open_clip.transformer import VisionTransformer

from rmtllmf import taskvec as tv

COUNT, STEPS = 8, 2
BLOCKS = int(os.environ.get("RMTLLMF_BENCH_BLOCKS", 2))
REPETITIONS = int(os.environ.get("RMTLLMF_BENCH_REPETITIONS", 3))


class World:
    """A model, vectors and tasks, and what the rules take beside them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = VisionTransformer(32, 16, 768, BLOCKS, 12, 4.0, output_dim=512).eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(True).data.add_(torch.randn_like(parameter), alpha=0.01)
        names = dict(self.model.named_parameters())
        self.vectors = [{name: 0.01 * torch.randn_like(p) for name, p in names.items()} for _ in range(COUNT)]
        batches = [[(torch.randn(16, 3, 32, 32), torch.arange(16) % 10) for _ in range(3)] for _ in range(COUNT)]
        heads = [torch.nn.Linear(512, 10).requires_grad_(False) for _ in range(COUNT)]
        self.tasks = {str(q): task for q, task in enumerate(zip(heads, batches, strict=True))}
        self.squares = [{name: tensor.square() for name, tensor in vector.items()} for vector in self.vectors]

    @property
    def base(self):
        return self.model.state_dict()

    def grams(self):
        """Of the base model, for all vectors."""
        batches = [x for x, _ in self.tasks["0"][1]]
        return [tv.input_grams(self.model, batches)] * COUNT

    def training_step(self):
        """Forward and backward for one batch of every task: what learning cannot do without."""
        for head, batches in self.tasks.values():
            torch.nn.functional.cross_entropy(head(self.model(batches[0][0])), batches[0][1]).backward()
        self.model.zero_grad()


def plain(name, **options):
    """A rule of vectors only."""
    return lambda w: lambda: getattr(tv, name)(w.vectors, **options)


def learned(name, **options):
    """A rule of vectors, a model and tasks."""
    return lambda w: lambda: getattr(tv, name)(w.vectors, w.model, w.tasks, **options)


def with_grams(name):
    """A rule that is given Gram matrices."""

    def prepare(w):
        grams = w.grams()
        return lambda: getattr(tv, name)(w.vectors, grams)

    return prepare


def with_squares(name):
    """A rule that is given squares of gradients."""
    return lambda w: lambda: getattr(tv, name)(w.vectors, w.squares)


FROM_VECTORS = {
    "task_arithmetic": plain("task_arithmetic"),
    "weighted_average": plain("weighted_average"),
    "model_stock": plain("model_stock"),
    "ties": plain("ties"),
    "dare": plain("dare", seed=0),
    "della": plain("della", seed=0),
    "breadcrumbs": plain("breadcrumbs"),
    "pcb_merging": plain("pcb_merging"),
    "consensus": plain("consensus"),
    "emr_unified": plain("emr_unified"),
    "coordinate_median": plain("coordinate_median"),
    "trimmed_mean": plain("trimmed_mean", trim=1),
    "geometric_median": plain("geometric_median"),
    "norm_clipping": plain("norm_clipping"),
    "multi_krum": plain("multi_krum", hostile=1),
    "widen": lambda w: lambda: tv.widen(w.vectors, w.base),
    "iso_c": plain("iso_c"),
    "iso_cts": plain("iso_cts"),
    "tsv": plain("tsv"),
    "wudi": plain("wudi"),
    "opcm": plain("opcm"),
    "do_merging": plain("do_merging"),
    "doge, 20 steps": plain("doge", steps=20),  # of 400: it goes on as it begins
    "led_merging": lambda w: lambda: tv.led_merging(w.vectors, w.squares, w.squares, 0.3),
    "fisher": with_squares("fisher"),
    "fisher_grafting": with_squares("fisher_grafting"),
    "optimal_brain_merging": with_squares("optimal_brain_merging"),
    "regmean": with_grams("regmean"),
    "essential_subspace": with_grams("essential_subspace"),
    "emr": plain("emr"),
    "tall_compression": plain("tall_compression"),
    "smile": lambda w: lambda: tv.smile(w.model, w.vectors, rank=16, gate_rank=16),
}
LEARNED = {
    "regmean_plus_plus": learned("regmean_plus_plus"),
    "adamerging": learned("adamerging", steps=STEPS),
    "adamerging, density=0.2": learned("adamerging", steps=STEPS, density=0.2),
    "expert_merging": learned("expert_merging", steps=STEPS),
    "concrete_mask": learned("concrete_mask", seed=0, steps=STEPS),
    "frank_wolfe": learned("frank_wolfe", steps=STEPS),
}


def memory(field):
    """Of this process, in bytes: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main(name):
    """Print the medians of both, and the most memory above what was there before, in vectors."""
    torch.set_num_threads(2)
    world = World()
    call = {**FROM_VECTORS, **LEARNED}[name](world)
    unit = world.training_step if name in LEARNED else FROM_VECTORS["task_arithmetic"](world)
    seconds = {unit: [], call: []}
    for function in seconds:
        function()  # what is loaded or made once
    most = 0
    for _ in range(REPETITIONS):
        for function, times in seconds.items():
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")
            before, start = memory("VmRSS"), time.perf_counter()
            kept = function()
            times.append(time.perf_counter() - start)
            if function is call:
                most = max(most, memory("VmHWM") - before)
            del kept
    size = sum(tensor.numel() * tensor.element_size() for tensor in world.vectors[0].values())
    found = {function: statistics.median(times) for function, times in seconds.items()}
    print(json.dumps({"seconds": found[call], "unit": found[unit], "memory": most / size}))


if __name__ == "__main__":
    main(sys.argv[1])
