r"""Eigenvalues of batches of small Hermitian matrices, by whichever solver is the faster where they are.

.. math:: G = V\,\mathrm{diag}(v)\,V^H

On the CPU these are `torch.linalg.eigh` and `torch.linalg.eigvalsh`. Elsewhere there are two ways for thousands of
small matrices, the device's own batched solver, or to the host and back, and which one wins depends on the device, its
driver and the size of the matrices. So the first large batch of each kind measures both on a sample, and the process
remembers the faster. Where the device's solver fails the host takes over for that call. The two agree up to rounding
(and the phases of the eigenvectors), so last bits may differ with the choice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, MutableMapping
from typing import TypeAlias

import torch
from torch import Tensor

Solver: TypeAlias = Callable[[Tensor], tuple[Tensor, ...]]

LARGE = 256  # fewer matrices are not worth a measurement, and stay on the device
_SAMPLE = 2048  # matrices to measure on, at most
_SAMPLE_ENTRIES = 1 << 20  # and entries of them: seconds on the host otherwise
_REPETITIONS = 2

_chosen: dict[Hashable, str] = {}


def eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n), ascending, and eigenvectors (..., n, n) of `gram`, on its own device."""
    if gram.device.type == "cpu":
        return torch.linalg.eigh(gram)
    v, V = solve(gram, torch.linalg.eigh, _through_host(torch.linalg.eigh), _chosen, "eigh")
    return v, V


def eigvalsh(gram: Tensor) -> Tensor:
    """Eigenvalues (..., n) alone."""
    if gram.device.type == "cpu":
        return torch.linalg.eigvalsh(gram)

    def own(matrices: Tensor) -> tuple[Tensor, ...]:
        return (torch.linalg.eigvalsh(matrices),)

    return solve(gram, own, _through_host(own), _chosen, "eigvalsh")[0]


def solve(
    gram: Tensor,
    own: Solver,
    host: Solver,
    chosen: MutableMapping[Hashable, str],
    name: str,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Tensor, ...]:
    """`own` or `host` applied to `gram`: what `chosen` says, or a measurement that is added to it.

    The kind of a batch is its device, matrix size and dtype, the function, and how many matrices there are in powers of
    two up to the size of a sample: a device that is slow on 300 matrices may be fast on 3,000.
    """
    size = gram.shape[-1]
    matrices = gram.reshape(-1, size, size)
    choice = "own"
    try:
        if len(matrices) >= LARGE:
            sample = matrices[: max(LARGE, min(_SAMPLE, _SAMPLE_ENTRIES // size**2))]
            kind = (name, gram.device, size, gram.dtype, len(sample).bit_length())
            if kind not in chosen:
                ways = {"own": lambda: _finished(own(sample)), "host": lambda: _finished(host(sample))}
                chosen[kind] = faster(ways, clock)
            choice = chosen[kind]
        if choice == "own":
            return own(gram)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:  # of which LinAlgError is one: no convergence; and NotImplementedError: no such solver there
        pass
    return host(gram)


def faster(ways: Mapping[str, Callable[[], object]], clock: Callable[[], float]) -> str:
    """The name of the way with the shortest run, each warmed up first; the first of equals."""
    best = dict.fromkeys(ways, float("inf"))
    for run in ways.values():
        run()
    for _ in range(_REPETITIONS):
        for name, run in ways.items():
            start = clock()
            run()
            best[name] = min(best[name], clock() - start)
    return min(best, key=best.__getitem__)


def _through_host(solver: Solver) -> Solver:
    return lambda gram: tuple(part.to(gram.device) for part in solver(gram.cpu()))


def _finished(results: tuple[Tensor, ...]) -> None:
    """Wait until they are there: devices work on after the call has returned, and one number read back waits."""
    results[-1].reshape(-1)[:1].cpu()
