"""The disturbance test in forward mode on ViT-B/16's tower, in units of forward passes; figures are printed only.

Run with ``python -m pytest tests/benchmarks/test_metrics.py -s``. Two threads, RMTLLMF_BENCH_BATCH (32) inputs, four
tangents. Forward passes are taken before and after, and the faster one counts. The floating-point operations of matrix
products are counted by torch, and do not depend on what else the machine does.
"""

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from rmtllmf.metrics import disturbance_test

pytestmark = pytest.mark.usefixtures("two_threads")

BATCH = int(os.environ.get("RMTLLMF_BENCH_BATCH", 32))
TANGENTS = 4


class Peak:
    """The most memory of this process while it runs, above that at its start, in bytes; and the seconds it took."""

    def __enter__(self):
        self.start = self.most = self.now()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.began
        self.stop.set()
        self.thread.join()
        self.bytes = self.most - self.start

    def now(self):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def watch(self):
        while not self.stop.wait(0.002):
            self.most = max(self.most, self.now())


def products(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def tower(layers, batch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(
            image_size=224, patch_size=16, width=768, layers=layers, heads=12, mlp_ratio=4, output_dim=512
        ).eval()
    disturbed = {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    return model, disturbed, torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def test_forward_mode_in_units_of_forward_passes():
    model, disturbed, x = tower(12, BATCH)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())

    def forward():
        with torch.no_grad():
            model(x)

    def test():
        disturbance_test(model, model, disturbed, 1e-6, x, method="jvp", tangents=TANGENTS, seed=0)

    disturbance_test(model, model, disturbed, 1e-6, x[:1], method="jvp", tangents=1, seed=0)  # loads torch's formulas
    forward()
    with Peak() as first:
        forward()
    with Peak() as ours:
        test()
    with Peak() as second:
        forward()
    with Peak() as graph:
        kept = model(x)
    del kept
    seconds = min(first.seconds, second.seconds)
    activations = max(first.bytes, second.bytes)
    print(
        f"\nViT-B/16, batch {BATCH}, {TANGENTS} tangents: {ours.seconds / seconds:.1f} forward passes' time "
        f"({ours.seconds / seconds / TANGENTS:.2f} a tangent; a forward pass took {first.seconds:.1f} and "
        f"{second.seconds:.1f} s); {(weights + ours.bytes) / (weights + activations):.2f} times the memory of weights "
        f"({weights / 1e6:.0f} MB) and activations of a forward pass ({activations / 1e6:.0f} MB), "
        f"{(weights + ours.bytes) / (weights + graph.bytes):.2f} times with those that a graph keeps "
        f"({graph.bytes / 1e6:.0f} MB)"
    )


def test_matrix_products_of_forward_mode():
    model, disturbed, x = tower(2, 2)

    def forward():
        with torch.no_grad():
            model(x)

    def test(tangents):
        disturbance_test(model, model, disturbed, 1e-6, x, method="jvp", tangents=tangents, seed=0)

    one = products(forward)
    torch.backends.mha.set_fastpath_enabled(False)
    one = max(one, products(forward))
    torch.backends.mha.set_fastpath_enabled(True)
    print(f"\noperations in units of a forward pass: {[round(products(lambda n=n: test(n)) / one, 2) for n in (1, 4)]}")
