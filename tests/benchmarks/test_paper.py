"""The full sweep of the paper's experiment beside a plain loop that rebuilds every model; figures are printed.

Run with ``python -m pytest tests/benchmarks/test_paper.py -s``. Two threads. The plain loop fuses every subset anew
from the received task vectors with `task_arithmetic`, puts it on the base and loads it, as one would by hand. Fusion is
measured for the visual tower of ViT-B/16 with RMTLLMF_BENCH_BLOCKS (2; the model has 12) blocks, the total, with the
evaluation of every fused model on 100 images of each of its own tasks, for the testbed.
"""

import copy
import os
import time
from dataclasses import replace

import pytest
import torch
from open_clip.transformer import VisionTransformer

from paper.fusion import Fuser
from paper.protocol import TESTBED
from rmtllmf.metrics import accuracy
from rmtllmf.taskvec import TaskVector, task_arithmetic
from testbed import base_encoder, load_task, prototype_head

pytestmark = pytest.mark.usefixtures("two_threads")

BLOCKS = int(os.environ.get("RMTLLMF_BENCH_BLOCKS", 2))


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def vectors_of(base):
    source = torch.Generator().manual_seed(0)
    return [
        TaskVector({k: 0.01 * torch.randn(t.shape, generator=source) for k, t in base.state_dict().items()})
        for _ in TESTBED.tasks
    ]


def all_subsets():
    return replace(TESTBED, subsets=0).chosen_subsets()


def test_fusion_of_all_subsets():
    base = VisionTransformer(224, 16, 768, BLOCKS, 12, 4.0, output_dim=512)
    vectors, subsets = vectors_of(base), all_subsets()
    entries = sum(tensor.numel() for tensor in vectors[0].values())

    def shared():
        fuser = Fuser(base, vectors, task_arithmetic, None)
        for subset in subsets:
            fuser.fused(subset)

    def plain():
        model = copy.deepcopy(base)
        for subset in subsets:
            fused = task_arithmetic([vectors[index] for index in subset]).apply_to(base.state_dict())
            model.load_state_dict(fused)

    shared()
    runs = [(seconds(shared), seconds(plain)) for _ in range(3)]
    ours, theirs = (sorted(run[i] for run in runs)[1] for i in (0, 1))
    print(
        f"\n{len(subsets)} fused models of {entries:,} entries: {ours:.2f} s, rebuilding every model {theirs:.2f} s: "
        f"{theirs / ours:.1f} times as long"
    )


def test_total_time():
    base = base_encoder()
    vectors, subsets = vectors_of(base), all_subsets()
    tasks = [load_task(name, fewer=100) for name in TESTBED.tasks]
    heads = [prototype_head(base, task) for task in tasks]
    batches = [[task.test.tensors] for task in tasks]

    def evaluated(model, subset):
        return [accuracy(model, batches[index], head=heads[index]) for index in subset]

    def shared():
        fuser = Fuser(base, vectors, task_arithmetic, None)
        return [evaluated(fuser.fused(subset), subset) for subset in subsets]

    def plain(on_all_tasks):
        model, found = copy.deepcopy(base), []
        for subset in subsets:
            fused = task_arithmetic([vectors[index] for index in subset]).apply_to(base.state_dict())
            model.load_state_dict(fused)
            values = evaluated(model, range(len(tasks)) if on_all_tasks else subset)
            found.append([values[index] for index in subset] if on_all_tasks else values)
        return found

    assert shared() == plain(False) == plain(True)
    ours, theirs, everywhere = seconds(shared), seconds(lambda: plain(False)), seconds(lambda: plain(True))
    print(
        f"\n{len(subsets)} fused models of the testbed, evaluated on their own tasks (100 images each): {ours:.1f} s, "
        f"the plain loop {theirs:.1f} s ({theirs / ours:.2f} times), on all eight tasks {everywhere:.1f} s "
        f"({everywhere / ours:.2f} times)"
    )
