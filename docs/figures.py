"""The figures of the channel pages, and the table of jammers beside them, from the public API alone.

Seeds are fixed. Most of the time goes into the min-max attack.

    python docs/figures.py                    into docs/_static, about a minute on one core
    python docs/figures.py --out elsewhere --draws 20
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from rmtllmf.channel import (
    Constellation,
    Uplink,
    UplinkScenario,
    barrage_covariance,
    min_max_rate_covariance,
    sic,
    strongest_user_covariance,
    sum_rate,
    transmit_symbols,
    worst_case_covariance,
)
from rmtllmf.errors import RmtllmfWarning
from rmtllmf.plot import constellation_plot, countermeasure_chart, mse_distribution, water_filling

ROOT = Path(__file__).resolve().parents[1]
JAMMING = 124.0  # the jammer's power, in units of the thermal noise power per antenna


def jammers(up: Uplink) -> dict[str, Tensor]:
    """What is added to the thermal noise."""
    P_N = JAMMING * up.noise
    return {
        "none (ideal)": 0 * up.noise_covariance,
        "barrage": barrage_covariance(up.H, P_N),
        "strongest user": strongest_user_covariance(up.H, up.P, P_N),
        "min-max": min_max_rate_covariance(up.H, up.P, P_N, noise=up.noise),
        "sum rate": worst_case_covariance(up.H, up.P, P_N, noise=up.noise),
    }


def water() -> Figure:
    """One draw of a wide cell, without a thermal floor and with one."""
    up = UplinkScenario(max_distance=10_000.0).draw(seed=0)
    figure = Figure(figsize=(10.5, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    water_filling(up.H, up.P, 4 * float(up.noise), ax=left)
    water_filling(up.H, up.P, 4 * float(up.noise), noise=float(up.noise), ax=right)
    for ax, text in ((left, "without thermal noise"), (right, "with thermal noise, and a jammer 6 dB above it")):
        ax.set_title(f"{text}\n\n", fontsize=10)
    return figure


def distributions(up: Uplink, attacks: dict[str, Tensor]) -> Figure:
    """Every user of every draw, for a receiver that knows the jammer and for one that does not."""
    figure = Figure(figsize=(11.0, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    receivers = (
        ("unaware of the jammer, strongest user first", {"designed_for": up.noise_covariance}, "strongest_first"),
        ("knows the noise covariance, weakest user first", {}, "weakest_first"),
    )
    for ax, (text, design, order) in zip(axes, receivers, strict=True):
        errors = {
            name: sic(up.H, up.P, C + up.noise_covariance, order=order, **design).mse for name, C in attacks.items()
        }
        mse_distribution(errors, ax=ax)
        ax.set_title(f"receiver {text}", fontsize=10)
    axes[1].set_ylabel("")
    return figure


def rates(up: Uplink, attacks: dict[str, Tensor]) -> Iterator[str]:
    """Lines of a table: largest rate, smallest rate and sum rate, with their standard errors over the draws."""
    yield f"{'jammer':16s}{'largest rate':>18s}{'smallest rate':>18s}{'sum rate':>18s}"
    for name, C in attacks.items():
        whole = C + up.noise_covariance
        rate = sic(up.H, up.P, whole).rate
        columns = (rate.amax(-1), rate.amin(-1), sum_rate(up.H, up.P, whole))
        cells = "".join(f"{float(x.mean()):10.2f} ± {float(x.std()) / len(x) ** 0.5:.2f} " for x in columns)
        yield f"{name:16s}{cells}"


def countermeasures(draws: int) -> Figure:
    """The rows of ``examples/countermeasures.py``."""
    sys.path.insert(0, str(ROOT / "examples"))
    from countermeasures import rows

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "null_directions", category=RmtllmfWarning)
        ax = countermeasure_chart([asdict(row) for row in rows(draws)])
    return ax.figure


def constellations() -> Figure:
    """16-QAM of the strongest of eight users, at a receiver that does not know the jammer.

    The analog link with coefficients that are the coordinates of QAM points: what comes out are the estimates before
    any decision.
    """
    up = UplinkScenario().draw(seed=0)
    source = torch.Generator().manual_seed(0)
    grid = Constellation(16)
    sent = grid.modulate(torch.randint(0, 2, (8, 1000, grid.bits), generator=source))
    vectors = [{"s": torch.view_as_real(symbols)} for symbols in sent]
    strongest = int((up.P * up.H.abs().square().sum(-2)).argmax())
    P_N = JAMMING * up.noise
    attacks = {
        "thermal noise alone": 0 * up.noise_covariance,
        "strongest-user attack": strongest_user_covariance(up.H, up.P, P_N),
        "sum-rate attack": worst_case_covariance(up.H, up.P, P_N, noise=up.noise),
    }
    figure = Figure(figsize=(12.0, 4.9), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for ax, (text, C) in zip(axes, attacks.items(), strict=True):
        received = transmit_symbols(
            vectors,
            up.H,
            up.P,
            C + up.noise_covariance,
            designed_for=up.noise_covariance,
            order="strongest_first",
            modulation="analog",
            scale=2**-0.5,
            seed=0,
        )
        estimates = torch.view_as_complex(received[strongest]["s"])
        constellation_plot(estimates, sent[strongest], modulation=16, ax=ax)
        ax.set_title(f"{text}\n\n\n", fontsize=10)
    limit = max(ax.get_xlim()[1] for ax in axes)
    for ax in axes:
        ax.set_xlim(-limit, limit)
        ax.set_ylim(-limit, limit)
    for ax in axes[1:]:
        ax.set_ylabel("")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, draw everything, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "_static", help="folder (default: docs/_static)")
    parser.add_argument("--draws", type=int, default=100, metavar="N", help="of the jammers (default: 100)")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)

    def save(figure: Figure, name: str) -> None:
        figure.savefig(options.out / f"{name}.png", dpi=110, metadata={"Software": None})

    save(water(), "water_filling")
    save(constellations(), "constellations")
    up = UplinkScenario().draw(options.draws, seed=0)
    attacks = jammers(up)
    save(distributions(up, attacks), "mse_distribution")
    for line in rates(up, attacks):
        print(line)
    save(countermeasures(4 * options.draws), "countermeasures")
    print(f"{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    torch.set_num_threads(1)  # for matrices this small, threads only get in each other's way
    main()
