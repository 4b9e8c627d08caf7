"""Speed of `transmit` and `transmit_sum` beside plain torch in one run; figures are printed, nothing is asserted.

Run with ``python -m pytest tests/benchmarks/test_transmit.py -s``. Two threads; medians of interleaved repetitions.
Eight visual towers of ViT-B/16 take 2.8 GB, and as much again twice; ``RMTLLMF_BENCH_SIZE`` asks for fewer
coefficients a vector (whole layers of the tower), ``RMTLLMF_BENCH_REPETITIONS`` for another number than 5.
"""

import os
import statistics
import time

import pytest
import torch

from rmtllmf.channel import transmit, transmit_sum
from rmtllmf.taskvec import task_arithmetic

USERS, WIDTH = 8, 768
MSE = [0.01 * (q + 1) for q in range(USERS)]
REPETITIONS = int(os.environ.get("RMTLLMF_BENCH_REPETITIONS", 5))


def tower(size):
    """Shapes of a visual tower of ViT-B/16, 86,192,640 coefficients, or of so many of its layers that `size` fits."""
    shapes = {
        "conv1": (WIDTH, 3, 16, 16),
        "class": (WIDTH,),
        "position": (197, WIDTH),
        "projection": (WIDTH, 512),
        **{f"{norm}.{part}": (WIDTH,) for norm in ("ln_pre", "ln_post") for part in ("weight", "bias")},
    }
    layer = {
        **{f"{norm}.{part}": (WIDTH,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")},
        "in.weight": (3 * WIDTH, WIDTH),
        "in.bias": (3 * WIDTH,),
        "out.weight": (WIDTH, WIDTH),
        "out.bias": (WIDTH,),
        "fc.weight": (4 * WIDTH, WIDTH),
        "fc.bias": (4 * WIDTH,),
        "proj.weight": (WIDTH, 4 * WIDTH),
        "proj.bias": (WIDTH,),
    }
    layers = min(12, max(1, round(12 * size / 86_192_640)))
    return shapes | {f"{i}.{key}": shape for i in range(layers) for key, shape in layer.items()}


@pytest.fixture(scope="module")
def vectors():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    shapes = tower(int(os.environ.get("RMTLLMF_BENCH_SIZE", 86_192_640)))
    source = torch.Generator().manual_seed(0)
    yield [{key: torch.randn(s, generator=source) * 0.01 for key, s in shapes.items()} for _ in range(USERS)]
    torch.set_num_threads(threads)


def interleaved(*functions):
    """Median seconds of each, on the clock and of the processor; run in turn, so that all see the same machine."""
    wall, busy = ([[] for _ in functions] for _ in range(2))
    for repetition in range(REPETITIONS + 1):
        for index, function in enumerate(functions):
            start, used = time.perf_counter(), time.process_time()
            function()
            if repetition:
                wall[index].append(time.perf_counter() - start)
                busy[index].append(time.process_time() - used)
    return [(statistics.median(a), statistics.median(b)) for a, b in zip(wall, busy, strict=True)]


def show(title, names, found, *references):
    print(f"\n{title}")
    for name, (wall, busy) in zip(names, found, strict=True):
        ratios = ", ".join(f"{found[i][0] / wall:.2f} times as fast as {names[i]}" for i in references)
        print(f"  {name:24s} {wall:6.2f} s, processor {busy:6.2f} s; {ratios}")


def test_transmit_against_noise_added_per_tensor(vectors):
    spare = {key: torch.empty_like(tensor) for key, tensor in vectors[0].items()}
    place = [{key: torch.zeros_like(tensor) for key, tensor in vector.items()} for vector in vectors]
    source = torch.Generator().manual_seed(0)

    def fresh_noise():
        return [{k: v + 0.01 * torch.randn(v.shape, generator=source) for k, v in x.items()} for x in vectors]

    def noise_in_place():
        return [{k: v + 0.01 * spare[k].normal_(generator=source) for k, v in x.items()} for x in vectors]

    found = interleaved(
        lambda: transmit(vectors, MSE, seed=0),
        lambda: transmit(vectors, MSE, seed=0, out=place),
        fresh_noise,
        noise_in_place,
    )
    names = ["transmit", "transmit, out=", "v + s * randn", "v + s * normal_"]
    show(f"8 x {sum(v.numel() for v in vectors[0].values()):,} float32, independent errors", names, found, 2, 3)


def test_transmit_sum_against_two_steps(vectors):
    heard = [{key: torch.zeros_like(tensor) for key, tensor in vector.items()} for vector in vectors]
    place = {key: torch.zeros_like(tensor) for key, tensor in vectors[0].items()}

    found = interleaved(
        lambda: transmit_sum(vectors, MSE, seed=0),
        lambda: transmit_sum(vectors, MSE, seed=0, out=place),
        lambda: task_arithmetic(transmit(vectors, MSE, seed=0), 1.0),
        lambda: task_arithmetic(transmit(vectors, MSE, seed=0, out=heard), 1.0, out=place),
    )
    names = ["transmit_sum", "transmit_sum, out=", "transmit, add up", "the same, both out="]
    show(f"8 x {sum(v.numel() for v in vectors[0].values()):,} float32, independent errors", names, found, 2, 3)
