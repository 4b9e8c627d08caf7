"""What each countermeasure on the physical layer buys, against the two jammers of the paper.

The set-up is the paper's (the defaults of UplinkScenario, a jammer with 124 times the thermal noise power per antenna,
error-free cancellation, strongest user first). What is printed is the mean squared error of a symbol, averaged over
users and draws, with its standard error over the draws.

    python examples/countermeasures.py                  400 draws, about ten seconds on one core
    python examples/countermeasures.py --draws 4000 --seed 1
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmtllmf.channel import (
    Reception,
    Uplink,
    UplinkScenario,
    channel_inversion,
    estimated_covariance,
    fractional_power_control,
    null_directions,
    power_only_covariance,
    repeat_block,
    scheduled,
    sic,
    stack_blocks,
    strongest_user_covariance,
    worst_case_covariance,
)
from rmtllmf.errors import RmtllmfWarning

JAMMING = 124.0  # the jammer's power, in units of the thermal noise power per antenna
STRONGEST = "strongest_first"
SCENARIO = UplinkScenario()

JAMMERS: dict[str, Callable[[Uplink], Tensor]] = {
    "SU": lambda up: strongest_user_covariance(up.H, up.P, JAMMING * up.noise),
    "SR": lambda up: worst_case_covariance(up.H, up.P, JAMMING * up.noise, noise=up.noise),
}


@dataclass(frozen=True)
class Row:
    """A countermeasure, and for each jammer the mean over the draws and its standard error."""

    name: str
    uses: int  # channel uses per symbol of every user
    mean: dict[str, float]
    error: dict[str, float]


def row(name: str, up: Uplink, receive: Callable[[Uplink, Tensor], Reception], uses: int = 1) -> Row:
    """`receive` gets the uplink and the covariance of the whole noise under each jammer in turn."""
    mean, error = {}, {}
    for jammer, covariance in JAMMERS.items():
        mse = receive(up, covariance(up) + up.noise_covariance).mse.mean(-1)
        mean[jammer], error[jammer] = float(mse.mean()), float(mse.std() / len(mse) ** 0.5)
    return Row(name, uses, mean, error)


def placed(distances: Tensor, blocks: int, source: torch.Generator) -> Uplink:
    """Per row of distances, `blocks` fading blocks in which the users stay where they are: H (draws, blocks, 16, 8)."""
    drawn = [UplinkScenario(placement=where.tolist()).draw(blocks, seed=source) for where in distances]
    return Uplink(*(torch.stack([getattr(up, part) for up in drawn]) for part in ("H", "P", "noise")))


def known(up: Uplink, C: Tensor) -> Reception:
    return sic(up.H, up.P, C, order=STRONGEST)


def unaware(up: Uplink, C: Tensor) -> Reception:
    return sic(up.H, up.P, C, designed_for=up.noise_covariance, order=STRONGEST)


def power_only(up: Uplink, C: Tensor) -> Reception:
    return sic(up.H, up.P, C, designed_for=power_only_covariance(C), order=STRONGEST)


def estimated(seed: int, snapshots: int, **how: Any) -> Callable[[Uplink, Tensor], Reception]:
    def receive(up: Uplink, C: Tensor) -> Reception:
        belief = estimated_covariance(C, snapshots, seed=seed, **how)
        return sic(up.H, up.P, C, designed_for=belief, order=STRONGEST)

    return receive


def repeated(K: int) -> Callable[[Uplink, Tensor], Reception]:
    def receive(up: Uplink, C: Tensor) -> Reception:
        H, stacked = repeat_block(up.H, C, K)
        return sic(H, up.P, stacked, order=STRONGEST)

    return receive


def combined(up: Uplink, C: Tensor) -> Reception:
    """HARQ: a jammer for each block, users decoded in the order of their mean power over the blocks."""
    H, stacked = stack_blocks(up.H, C)
    return sic(H, up.P[:, 0], stacked, order=STRONGEST)


def nulled(count: int, reorder: bool = False) -> Callable[[Uplink, Tensor], Reception]:
    """Users decoded in the order of their power before the projection, or after it (`reorder`)."""

    def receive(up: Uplink, C: Tensor) -> Reception:
        H, left = null_directions(up.H, C, count, P=up.P)
        return sic(H, up.P, left, order=STRONGEST if reorder else known(up, C).order)

    return receive


def in_turn(up: Uplink, C: Tensor) -> Reception:
    """Each user alone, and a jammer that knows whose turn it is: with one user, both jammers are the same."""
    alone = up.H.swapaxes(-1, -2)[..., None]
    jammer = strongest_user_covariance(alone, up.P[..., None], JAMMING * up.noise[:, None])
    whole = jammer + up.noise_covariance[:, None]
    return scheduled(up.H, up.P, whole, per_slot=True)


def rows(draws: int = 400, seed: int = 0) -> Iterator[Row]:
    """Every row of the table in docs/theory.md, in its order."""
    up = SCENARIO.draw(draws, seed=seed)
    source = torch.Generator().manual_seed(seed)
    inner, outer = SCENARIO.min_distance**2, SCENARIO.max_distance**2
    share = torch.rand(draws, SCENARIO.num_users, generator=source, dtype=torch.float64)
    distances = (inner + (outer - inner) * share).sqrt()

    yield row("unaware of the jammer", up, unaware)
    yield row("C known", up, known)
    for snapshots in (256, 64, 32):
        yield row(f"C from {snapshots} snapshots", up, estimated(seed, snapshots))
    yield row("C from 32 snapshots, loading 0.1", up, estimated(seed, 32, loading=0.1))
    yield row("C from 32 snapshots, Ledoit-Wolf", up, estimated(seed, 32, shrinkage="ledoit_wolf"))
    yield row("power of the noise known", up, power_only)
    for K in (2, 4):
        yield row(f"HARQ, {K} independent blocks", placed(distances, K, source), combined, K)
    for K in (2, 4):
        yield row(f"repetition, {K} times", up, repeated(K), K)
    for antennas in (32, 64):
        yield row(f"{antennas} antennas", UplinkScenario(num_antennas=antennas).draw(draws, seed=seed), known)
    for count in (1, 2):
        yield row(f"nulling, {count} direction{'s' if count > 1 else ''}", up, nulled(count))
    yield row("nulling, 1 direction, reordered", up, nulled(1, reorder=True))

    there = placed(distances, 1, source)
    H, noise = there.H[:, 0], there.noise[:, 0]
    gains = SCENARIO.num_antennas * SCENARIO.gain(distances)
    edge = SCENARIO.num_antennas * SCENARIO.gain(torch.tensor(SCENARIO.max_distance, dtype=torch.float64))
    inverted = Uplink(H, channel_inversion(H, SCENARIO.power * edge, max_power=SCENARIO.power, gain=gains), noise)
    yield row("channel inversion, unaware", inverted, unaware)
    yield row("channel inversion, C known", inverted, known)
    halfway = Uplink(up.H, fractional_power_control(up.H, up.P, exponent=0.5), up.noise)
    yield row("fractional power control, C known", halfway, known)
    # what repeat_block(up.H, C, 8) amounts to when C is known, without its 128 antennas
    yield row("repetition, 8 times", up, lambda up, C: known(up, C / 8), 8)
    yield row("users in turn, C known", up, in_turn, 8)


def formatted(row: Row) -> str:
    cells = "".join(f"{row.mean[name]:12.4f} ± {row.error[name]:.4f}" for name in JAMMERS)
    return f"{row.name:36s}{row.uses:6d}{cells}"


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Parse the command line and print the table; returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=400, metavar="N", help="draws of the uplink (default: 400)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    options = parser.parse_args(arguments)
    if options.draws < 2:
        parser.error(f"--draws: expected at least 2, got {options.draws}")
    begin = time.monotonic()
    print(f"{'mean squared error':36s}{'uses':>6s}{'strongest user':>21s}{'sum rate':>21s}")
    found = []
    with warnings.catch_warnings():
        # null_directions says, rightly, that nulling does harm here: that is what its rows are to show
        warnings.filterwarnings("ignore", "null_directions", category=RmtllmfWarning)
        for line in rows(options.draws, options.seed):
            print(formatted(line), flush=True)
            found.append(line)
    print(f"{time.monotonic() - begin:.0f} s")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)  # for matrices this small, threads only get in each other's way
    main()
