"""Speed and memory of the channel, side by side with its peers in one run; figures are printed, nothing is asserted.

Run with ``python -m pytest tests/benchmarks/test_channel.py -s``. One thread; medians of interleaved repetitions.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.oracles import complex_normal, worst_case_by_cvxpy
from helpers.timing import interleaved
from rmtllmf.channel import UplinkScenario, _eigen, min_max_rate_covariance, worst_case, worst_case_rate

pytestmark = pytest.mark.usefixtures("one_thread")


def naive(H, P, P_N, noise):
    """eigh and 60 bisection steps, plain NumPy."""
    v, U = np.linalg.eigh((H * P) @ H.conj().T)
    v, U = v[-H.shape[1] :], U[:, -H.shape[1] :]
    low, high = 1e-12, 1e12
    for _ in range(60):
        nu = np.sqrt(low * high)
        total = np.maximum(0, v / 2 * (np.sqrt(1 + 4 / (v * nu)) - 1) - noise).sum()
        low, high = (nu, high) if total > P_N else (low, nu)
    return (U * np.maximum(0, v / 2 * (np.sqrt(1 + 4 / (v * nu)) - 1) - noise)) @ U.conj().T


@pytest.mark.parametrize("draws", [10_000, 100_000])
def test_batch_against_bare_eigh(draws):
    up = UplinkScenario().draw(draws, seed=0)
    P_N = 124 * up.noise
    G = up.H.mH @ up.H
    aligned = torch.empty(draws, 16, 16, dtype=torch.complex128)
    array = np.empty((draws, 16, 16), dtype=complex)  # of another alignment: results are copied there

    def full(out=None):
        return worst_case(up.H, up.P, P_N, noise=up.noise, out=out)

    repetitions = 15 if draws == 10_000 else 3
    ours, again, copied, rate, eigh = interleaved(
        full,
        lambda: full(aligned),
        lambda: full(torch.from_numpy(array)),
        lambda: worst_case_rate(up.H, up.P, P_N, noise=up.noise),
        lambda: torch.linalg.eigh(G),
        repetitions=repetitions,
    )
    print(
        f"\n{draws} draws of 16 x 8 with floor: {1e6 * ours / draws:.1f} us a draw, {ours / eigh:.2f} times bare eigh; "
        f"with out= {again / eigh:.2f} times, an array {copied / eigh:.2f} times; "
        f"rate alone {rate / ours:.2f} of the time; {full().iterations} Newton steps"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 8, 16, 32, 64])
def test_eigensolvers_on_the_device(size):
    """Which of the two ways `rmtllmf.channel._eigen` should find to be the faster, on all of 10,000 matrices."""
    A = torch.randn(10_000, size, size, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    G = (A @ A.mH).cuda()
    torch.set_num_threads(os.cpu_count() or 1)  # the host with all that it has, as in use

    def timed(solver):
        return lambda: (solver(G), torch.cuda.synchronize())

    own, host = interleaved(timed(torch.linalg.eigh), timed(_eigen._through_host(torch.linalg.eigh)), repetitions=3)
    _eigen._chosen.clear()
    _eigen.eigh(G)
    print(
        f"\n10,000 of {size} x {size} on {torch.cuda.get_device_name()}: its own eigh {1e3 * own:.1f} ms, "
        f"through the host {1e3 * host:.1f} ms; chosen: {', '.join(_eigen._chosen.values())}"
    )


@pytest.mark.gpu
def test_worst_case_on_the_device():
    torch.set_num_threads(os.cpu_count() or 1)
    up = UplinkScenario().draw(10_000, seed=0)
    there = UplinkScenario().draw(10_000, seed=0, device="cuda")

    def solved(u):
        return lambda: (worst_case(u.H, u.P, 124 * u.noise, noise=u.noise), torch.cuda.synchronize())

    device, cpu = interleaved(solved(there), solved(up), repetitions=5)
    print(
        f"\n10,000 draws of 16 x 8 on {torch.cuda.get_device_name()}: {1e3 * device:.1f} ms, on the CPU with "
        f"{torch.get_num_threads()} threads {1e3 * cpu:.1f} ms"
    )


def test_batch_against_a_convex_solver():
    rng = np.random.default_rng(0)
    H = complex_normal(rng, 10_000, 16, 8)
    (ours,) = interleaved(lambda: worst_case(H, 1.0, 2.0, noise=0.1), repetitions=3)
    start = time.perf_counter()
    worst_case_by_cvxpy(H[0], np.ones(8), 2.0, 0.1)
    cvxpy = time.perf_counter() - start
    print(f"\nCVXPY with CLARABEL {cvxpy:.2f} s a draw: {cvxpy / (ours / len(H)):,.0f} times as long")


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_single_draw_against_plain_numpy(kind):
    array = complex_normal(np.random.default_rng(1), 16, 8)
    H = kind(array)
    ours, plain = interleaved(
        lambda: worst_case(H, 1.0, 2.0, noise=0.1), lambda: naive(array, 1.0, 2.0, 0.1), repetitions=15, calls=50
    )
    print(f"\na single draw: {1e3 * ours:.3f} ms, eigh and bisection in plain NumPy {plain / ours:.1f} times as long")


def test_min_max_beside_the_worst_case():
    up = UplinkScenario().draw(200, seed=0)
    one = UplinkScenario().draw(seed=0)
    batch, alone, other = interleaved(
        lambda: min_max_rate_covariance(up.H, up.P, 124 * up.noise, noise=up.noise, order="strongest_first"),
        lambda: min_max_rate_covariance(one.H, one.P, 124 * one.noise, noise=one.noise, order="strongest_first"),
        lambda: worst_case(up.H, up.P, 124 * up.noise, noise=up.noise),
        repetitions=5,
    )
    print(
        f"\nmin-max, 200 draws of 16 x 8: {1e3 * batch / 200:.1f} ms a draw, {batch / other:.0f} times the worst case; "
        f"a single draw {1e3 * alone:.0f} ms"
    )


RECEIVER = """
import resource, torch
from rmtllmf.channel import UplinkScenario, sic
torch.set_num_threads(1)
up = UplinkScenario().draw(100_000, seed=0)
C = up.noise_covariance
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rx = sic(up.H, up.P, C)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024**2)
print(sum(value.nbytes for value in vars(rx).values()) / 1024**3)
"""


def test_receiver_memory():
    run = subprocess.run([sys.executable, "-c", RECEIVER], capture_output=True, text=True, check=True)
    peak, results = map(float, run.stdout.split())
    print(f"\nsic, 100,000 draws of 16 x 8: {peak:.2f} GiB beyond the inputs, {results:.2f} GiB of them the results")


MEMORY = """
import json, resource, time, torch
from rmtllmf.channel import UplinkScenario, transmit_symbols
torch.set_num_threads(1)
users, size = 8, {size}
vectors = [{{"w": torch.randn(size, generator=torch.Generator().manual_seed(q))}} for q in range(users)]
up = UplinkScenario().draw(seed=0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
received = transmit_symbols(vectors, up.H, up.P, up.noise_covariance, seed=0, modulation={modulation!r})
print(json.dumps([time.perf_counter() - start, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)]))
"""


@pytest.mark.parametrize("modulation", [64, "analog"])
def test_symbol_link_memory(modulation):
    """Eight vectors of ViT-B/16's visual tower; the received vectors themselves are 2.76 GB of what is printed."""
    size = int(os.environ.get("RMTLLMF_BENCH_SIZE", 86_192_640))
    root = Path(__file__).parents[2]
    script = MEMORY.format(size=size, modulation=modulation)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True)
    seconds, peak = json.loads(run.stdout)
    print(
        f"\n8 users x {size:,} coefficients, {modulation}: {seconds:.0f} s, {peak / 1e9:.2f} GB beyond the vectors "
        f"sent, of which {8 * 4 * size / 1e9:.2f} GB are the vectors received"
    )
