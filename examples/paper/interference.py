r"""The link between MSE and interference, which is the paper's analysis: ``python -m paper.interference`` in examples.

All users are heard with the same mean squared error and independent errors. The received vectors are added up at the
heuristic scale, and on one figure over the sum MSE stand

- the accuracy of the fused model, relative to the fine-tuned ones (the mean over the tasks);
- the weight disentanglement error (eq. 7, 8) with each task's own model made of its *received* vector, which is eq. 8
  with :math:`\hat\tau` for :math:`\tau` and tells how the vectors that the base station holds disturb each other; or of
  its *sent* vector, which tells what noise and fusion change together. It is scaled as the sum is;
- the rejection rate of the disturbance test (eq. 9 to 12) of the fused model against the fusion of the sent vectors,
  with the variance of the ideal uplink tolerated. In a linear model it is
  :math:`2 (1 - \Phi(z_{1 - \alpha/2} / \sqrt r))` at r times that variance;
- the first-order theory (eq. 10, 11): the logit differences in units of the predicted standard deviation, which have
  the luck of a few draws in them; and in units of those in a linear model under the same noise. The theory stops to
  hold where the latter first leave 1 by 10 % (which is slow, so that more ``--draws`` tell it better), or a factor
  of 2. The residual, what the differences have beside their linear part, asks that each single logit is right.

The noise hits all floating-point entries, also those that fine-tuning did not change.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from rmtllmf.channel import transmit
from rmtllmf.metrics import accuracy, disturbance_test, normalized_accuracy, weight_disentanglement_error
from rmtllmf.taskvec import TaskVector, heuristic_scale, task_arithmetic

from ._files import replacing
from .protocol import TESTBED, Protocol
from .uplink import reception, reference_of
from .world import Testbed

HERE = Path(__file__).parents[1]
CURVES = ("accuracy", "received", "sent", "rejection", "to_predicted", "to_linear", "residual")
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # told apart by the colour-blind
STEP = 1e-5  # of the central difference, in units of the noise at MSE 1

Tasks = Mapping[str, tuple[nn.Module, list[tuple[Tensor, Tensor]]]]  # name -> (head, [(pictures, labels)])


@dataclass(frozen=True, eq=False)
class Interference:
    """What `measure` found with one seed, under P mean squared errors with D draws of the noise.

    Attributes:
        seed, users: of the noise; Q, how many vectors are added up.
        alpha, tolerated: level of the disturbance test, and sum MSE that it tolerates.
        sum_mse: (P,) over the users; each has a Q-th of it.
        accuracy: (P, D) normalised accuracy of the fused model.
        received, sent: (P, D) weight disentanglement error, 0 to Q, single-task models being of these vectors.
        rejection: (P, D) share of the logits that the test rejects.
        theory: (P,) the same of a linear model.
        to_predicted: (P, D) logit differences to the fusion of the sent vectors / predicted standard deviations.
        to_linear: (P, D) the same / logit differences in a linear model under the same noise.
        residual: (P, D) what these two differ by / the latter. All are ratios of root mean squares.
        clean_accuracy, clean_error: of the fusion of the sent vectors: normalised accuracy, disentanglement error.
        base_accuracy: normalised accuracy of the untouched base model.
        marks: uplink -> its sum MSE, and the variance of the sum of its errors; equal if they are independent, as here.
    """

    seed: int
    users: int
    alpha: float
    tolerated: float
    sum_mse: np.ndarray
    accuracy: np.ndarray
    received: np.ndarray
    sent: np.ndarray
    rejection: np.ndarray
    theory: np.ndarray
    to_predicted: np.ndarray
    to_linear: np.ndarray
    residual: np.ndarray
    clean_accuracy: float
    clean_error: float
    base_accuracy: float
    marks: dict[str, list[float]] = field(default_factory=dict)

    def limits(self) -> dict[str, float | None]:
        """Sum MSEs above which things change; 0 if they do from the first point on, None if nowhere."""
        off, loss = np.abs(np.log(self.to_linear.mean(1))), -self.accuracy.mean(1)
        levels = {
            "first order off by 10 %": (off, math.log(1.1)),
            "first order off by a factor of 2": (off, math.log(2)),
            "residual 10 % of the linear part": (self.residual.mean(1), 0.1),
            "residual as large as the linear part": (self.residual.mean(1), 1.0),
            "half of the logits rejected": (self.rejection.mean(1), 0.5),
            "accuracy 5 % below the clean fusion": (loss, -0.95 * self.clean_accuracy),
            "accuracy below the untouched base": (loss, -self.base_accuracy),
        }
        return {name: crossing(self.sum_mse, *level) for name, level in levels.items()}


def measure(
    model: nn.Module,
    vectors: Sequence[TaskVector],
    tasks: Tasks,
    sum_mse: Sequence[float],
    *,
    reference: float,
    tolerated: float,
    inputs: int = 24,
    draws: int = 4,
    alpha: float = 0.05,
    seed: int = 0,
) -> Interference:
    """Fuse what is received under each mean squared error, and compare it with the fusion of what was sent.

    Args:
        model, vectors, tasks: the base, in evaluation mode; Q >= 2 task vectors; Q tasks in the same order.
        sum_mse: (P,) of which every user has a Q-th. At 0 the three ratios are their limits.
        reference: standard deviation of the noise of a weight at MSE 1.
        tolerated: sum MSE that the disturbance test tolerates, more than 0.
        inputs: the test and the logit differences are about the first ones of each task.
        draws, seed: of the noise; the same draws, louder or fainter, under every MSE.
    """
    users, scale = len(vectors), heuristic_scale(len(vectors))
    update = task_arithmetic(vectors, scale)
    clean = _moved(model, update)
    some = {name: (head, [(x[:inputs], y[:inputs])]) for name, (head, [(x, y)]) in tasks.items()}
    # The gradients are taken once: the test's threshold does not depend on the disturbance.
    variance = {f"0.{name}": scale**2 * tolerated * reference**2 for name in update}
    wholes = [(nn.Sequential(clean, head), few) for head, [(few, _)] in some.values()]
    tests = [disturbance_test(whole, whole, whole, variance, few, alpha=alpha, method="exact") for whole, few in wholes]
    predicted = _size([test.sd for test in tests]) / tolerated**0.5
    undisturbed = _logits(clean, some)
    pairs = list(zip(vectors, tasks.items(), strict=True))
    alone = [_logits(_moved(model, vector * scale), {name: task})[0].argmax(-1) for vector, (name, task) in pairs]
    individual = [accuracy(_moved(model, vector), batch, head=head) for vector, (_, (head, batch)) in pairs]

    error = partial(weight_disentanglement_error, model, model, tasks=tasks, scale=scale)

    def worth(fused: nn.Module) -> float:
        return normalized_accuracy([accuracy(fused, batch, head=head) for head, batch in tasks.values()], individual)

    def one(received: Sequence[TaskVector], level: float, slope: list[Tensor]) -> dict[str, float]:
        fused = _moved(model, task_arithmetic(received, scale))
        change = [after - before for after, before in zip(_logits(fused, some), undisturbed, strict=True)]
        straight = [level**0.5 * part for part in slope]
        differ = [logits.argmax(-1) != own for logits, own in zip(_logits(fused, tasks), alone, strict=True)]
        over = [part.abs() > test.threshold for part, test in zip(change, tests, strict=True)]
        along = _size(straight if level else slope)
        return {
            "accuracy": worth(fused),
            "received": error(received).total,
            "sent": sum(float(share.double().mean()) for share in differ),
            "rejection": sum(float(share.double().mean()) for share in over) / len(over),
            "to_predicted": _size(change) / (level**0.5 * predicted) if level else along / predicted,
            "to_linear": _size(change) / along if level else 1.0,
            "residual": _size([whole - part for whole, part in zip(change, straight, strict=True)]) / along,
        }

    curves = {name: np.zeros((len(sum_mse), draws)) for name in CURVES}
    for draw in range(draws):
        noise = {"seed": 1000 * seed + draw, "scale": reference}
        loud = task_arithmetic(transmit(vectors, [1 / users] * users, **noise), scale)
        slope = _slope(clean, loud - update, some)
        for point, level in enumerate(tqdm(sum_mse, f"seed {seed}, noise {draw}", disable=None)):
            for name, value in one(transmit(vectors, [level / users] * users, **noise), level, slope).items():
                curves[name][point, draw] = value
    curves |= {"sum_mse": np.array(sum_mse), "theory": rejection_rate(np.array(sum_mse) / tolerated, alpha)}
    found = {"clean_accuracy": worth(clean), "clean_error": error(vectors).total, "base_accuracy": worth(model)}
    return Interference(seed, users, alpha, tolerated, **curves, **found)


def rejection_rate(ratio: np.ndarray, alpha: float) -> np.ndarray:
    """Of the disturbance test in a linear model, at so many times the tolerated variance."""
    z = NormalDist().inv_cdf(1 - alpha / 2)
    return np.array([2 * NormalDist().cdf(-z / math.sqrt(value)) if value else 0.0 for value in ratio])


def crossing(x: np.ndarray, y: np.ndarray, level: float) -> float | None:
    """Where `y` first reaches `level`, on straight lines over log x; 0 if at the first point, None if nowhere."""
    places = [(a, b) for a, b in zip(x, y, strict=True) if a > 0]
    if places and places[0][1] >= level:
        return 0.0
    for (left, low), (right, high) in pairwise(places):
        if high >= level:
            return float(left * (right / left) ** ((level - low) / (high - low)))
    return None


def _moved(model: nn.Module, vector: TaskVector) -> nn.Module:
    return vector.apply_to(copy.deepcopy(model))


@torch.no_grad()
def _logits(model: nn.Module, tasks: Tasks) -> list[Tensor]:
    return [head(model(pictures)).double() for head, [(pictures, _)] in tasks.values()]


@torch.no_grad()
def _slope(model: nn.Module, noise: TaskVector, tasks: Tasks) -> list[Tensor]:
    """The derivative of the logits along the noise: a central difference in float64."""
    exact, noise = copy.deepcopy(model).double(), noise.to(torch.float64)
    high, low = (noise.apply_to(exact.state_dict(), step) for step in (STEP, -STEP))
    result = []
    for head, [(pictures, _)] in tasks.values():
        last, first = copy.deepcopy(head).double(), pictures.double()
        after, before = (last(functional_call(exact, state, first)) for state in (high, low))
        result.append((after - before) / (2 * STEP))
    return result


def _size(parts: Sequence[Tensor]) -> float:
    """Root of the mean over the tasks of the mean square."""
    return math.sqrt(sum(float(part.square().mean()) for part in parts) / len(parts))


def run(protocol: Protocol, folder: Path, seed: int, points: int, images: int, **options: Any) -> Interference:
    """`measure` on the testbed, whose reference is a number of times the rms; vectors are kept in the folder."""
    world, tasks, marks = Testbed(protocol, folder), {}, {}
    for name in protocol.tasks:
        arena = world.arena(name)
        chosen = torch.randperm(len(arena.test), generator=torch.Generator().manual_seed(seed))[:images]
        pictures, labels = zip(*(arena.test[int(index)] for index in chosen), strict=True)
        tasks[name] = (arena.head, [(torch.stack(pictures), torch.as_tensor(labels))])
    for condition in protocol.conditions:
        heard = reception(protocol, condition, seed)
        marks[condition] = [float(heard.mse.sum(-1).mean()), float(heard.error_covariance.real.sum((-2, -1)).mean())]
    vectors = world.vectors(seed)
    options |= {"reference": reference_of(protocol, vectors), "tolerated": marks["ideal"][0]}
    sweep = len(vectors) * np.logspace(-6, 0, points)
    return replace(measure(world.base, vectors, tasks, sweep.tolist(), seed=seed, **options), marks=marks)


def write_json(path: Path, results: Sequence[Interference]) -> None:
    """One object a seed, and its limits; the whole file or the old one."""
    rows = [asdict(result) | {"limits": result.limits()} for result in results]
    with replacing(path) as part:
        part.write_text(json.dumps(rows, default=np.ndarray.tolist, allow_nan=False) + "\n")


def read_json(path: Path) -> list[Interference]:
    """What `write_json` wrote."""
    rows = [{k: v for k, v in row.items() if k != "limits"} for row in json.loads(path.read_text())]
    return [Interference(**{k: np.array(v) if isinstance(v, list) else v for k, v in row.items()}) for row in rows]


def formatted(result: Interference) -> str:
    """One seed as text."""
    names = ("sum_mse", *CURVES[:4], "theory", *CURVES[4:])
    lines = ["".join(name.rjust(13) for name in names)]
    for point in range(len(result.sum_mse)):
        lines.append("".join(f"{np.mean(getattr(result, name)[point]):13.3g}" for name in names))
    lines.append(f"without noise: accuracy {result.clean_accuracy:.3f}, disentanglement error {result.clean_error:.2f}")
    lines.append(f"untouched base: accuracy {result.base_accuracy:.3f}")
    lines += [f"{name}: sum MSE {sums:.3g}, variance of the sum {of:.3g}" for name, (sums, of) in result.marks.items()]
    lines += [
        f"{k}: " + ("nowhere" if v is None else f"above a sum MSE of {v:.2g}") for k, v in result.limits().items()
    ]
    return "\n".join(lines)


def draw(results: Sequence[Interference], path: Path) -> None:
    """Three panels over the sum MSE: means, and the range over seeds and draws of the noise."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 9), layout="constrained")
    first, panels = results[0], figure.subplots(3, 1, sharex=True)
    for panel, name, factor, style, colour, label in (
        (0, "accuracy", 100, "o-", BLUE, "normalised accuracy of the fusion"),
        (0, "received", 100 / first.users, "s--", ORANGE, "disentanglement error / N, single tasks as received"),
        (0, "sent", 100 / first.users, "^:", PURPLE, "the same, single tasks as sent"),
        (1, "rejection", 100, "o-", BLUE, "measured"),
        (2, "to_predicted", 1, "o-", BLUE, "logit difference / predicted standard deviation"),
        (2, "to_linear", 1, "s--", GREEN, "logit difference / linear one under the same noise"),
        (2, "residual", 1, "^:", PURPLE, "what is not linear / linear difference"),
    ):
        values = factor * np.concatenate([getattr(result, name) for result in results], axis=1)
        panels[panel].plot(first.sum_mse, values.mean(1), style, color=colour, label=label, markersize=4)
        panels[panel].fill_between(first.sum_mse, values.min(1), values.max(1), color=colour, alpha=0.2, linewidth=0)
    for name, style, label in (("clean", ":", "accuracy without noise"), ("base", "-.", "accuracy of the base")):
        level = 100 * np.mean([getattr(result, f"{name}_accuracy") for result in results])
        panels[0].axhline(level, linestyle=style, color="black", linewidth=1, label=label)
    fine = np.geomspace(*first.sum_mse[[0, -1]], 200)
    theory = 100 * np.mean([rejection_rate(fine / result.tolerated, result.alpha) for result in results], axis=0)
    panels[1].plot(fine, theory, "--", color=ORANGE, label="in a linear model")
    panels[1].axhline(100 * first.alpha, linestyle=":", color="black", linewidth=1, label="level of the test")
    panels[2].axhspan(1 / 1.1, 1.1, color="#cccccc", alpha=0.6, linewidth=0, label="within 10 %")
    panels[0].set(ylabel="accuracy, changed predictions (%)", ylim=(0, 105))
    panels[1].set(ylabel="logits rejected (%)", ylim=(-2, 105))
    panels[2].set(xscale="log", yscale="log", ylabel="ratio of root mean squares", xlabel="sum MSE of all users")
    for ax, corner in zip(panels, ((0.01, 0.23), "upper left", "lower right"), strict=True):
        for mark in first.marks:
            place = float(np.mean([result.marks[mark][0] for result in results]))
            ax.axvline(place, color="#666666", linewidth=1, zorder=0)
            if ax is panels[0]:
                ax.text(place, 107, mark.replace("_", " "), rotation=90, fontsize=8, ha="center")
        ax.grid(True, color="#dddddd", linewidth=0.6)
        ax.legend(fontsize=8, loc=corner)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None, protocol: Protocol = TESTBED) -> list[Interference]:
    """Parse the command line, measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"seeds": 1, "points": 12, "inputs": 24, "images": 100, "draws": 4}
    told = ("0 to N - 1", "mean squared errors", "pictures a task in the test", "and in all else", "of the noise")
    for (name, default), text in zip(numbers.items(), told, strict=True):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", default=HERE / ".cache" / "paper", help="task vectors")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE")
    parser.add_argument("--figure", type=Path, metavar="FILE", default=HERE / "out" / "interference.png")
    options = vars(parser.parse_args(arguments))
    extent = {name: options[name] for name in numbers}
    for name, value in extent.items():
        if value < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    if extent["inputs"] > extent["images"]:
        parser.error(f"--inputs: expected at most the {extent['images']} images, got {extent['inputs']}")
    results, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # the same bits on any number of cores
    try:
        for seed in range(extent.pop("seeds")):
            results.append(run(protocol, options["cache"], seed, **extent))
            print(f"\nseed {seed}\n{formatted(results[-1])}\n")
    finally:
        torch.set_num_threads(threads)
    if options["json"]:
        write_json(options["json"], results)
    draw(results, options["figure"])
    print(f"figure: {options['figure']}")
    return results


if __name__ == "__main__":
    main()
