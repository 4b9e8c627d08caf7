"""What decides the numbers of the paper's experiment, and the two ready settings."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from itertools import combinations
from typing import Any, get_type_hints

CONDITIONS = ("ideal", "strongest_user", "sum_rate", "barrage")
PROTECTIONS = ("unprotected", "restored", "realigned", "both", "attention")
SETTINGS = ("testbed", "clip")

EXTENT = ("seeds", "subsets", "conditions", "protections", "ablation", "ablation_shots")

Subset = tuple[int, ...]


def _says(text: str, default: Any, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


@dataclass(frozen=True)
class Protocol:
    """Everything that decides the numbers; `testbed` and `clip` are the ready ones."""

    setting: str = _says("which models and data", "testbed", SETTINGS)
    model: str = _says("open_clip's name of the model (clip)", "")
    pretrained: str = _says("open_clip's tag, or the path, of its weights (clip)", "")
    tasks: tuple[str, ...] = _says("tasks, in the order of the users", ())
    seeds: tuple[int, ...] = _says("seeds of fine-tuning, uplink, noise and shots", (0,))
    subsets: int = _says("random subsets of tasks of every size from 2 on; 0: all of them", 4)
    images: int = _says("most training and test images of a task; 0: all of them", 0)

    finetuned: str = _says("'own': fine-tune; 'published': what is on the hub; or a folder of one folder a task", "own")
    finetuning_steps: int = _says("steps of fine-tuning", 150)
    finetuning_batch: int = _says("images in each of them", 64)
    finetuning_lr: float = _says("largest step size", 1.2e-3)

    antennas: int = _says("of the base station", 16)
    blocks: int = _says("independent draws of the uplink that a vector passes through, one after the other", 50)
    jamming: float = _says("the jammer's power, in units of the thermal noise power of an antenna", 124.0)
    conditions: tuple[str, ...] = _says("uplinks", CONDITIONS[:3], CONDITIONS)
    receiver: str = _says("successive interference cancellation, or a linear receiver", "sic", ("sic", "lmmse"))
    order: str = _says("in which users are decoded", "strongest_first", ("strongest_first", "weakest_first"))
    knows_jammer: bool = _says("whether the receiver knows the covariance of the jammer's noise", False)
    estimator: str = _says("what the base station makes of the symbols", "additive", ("additive", "mmse", "unbiased"))
    reference: str = _says("what the noise is relative to: 'rms', 'peak', or a number of times the rms", "peak")

    rule: str = _says("of fusion, a name in rmtllmf.taskvec", "task_arithmetic")
    scale: float = _says("of the fused update; 0: the rule's own (task arithmetic's goes by the number of tasks)", 0.0)

    protections: tuple[str, ...] = _says("of every subset", ("unprotected", "both"), PROTECTIONS)
    ablation: tuple[str, ...] = _says("protections of all tasks together, beside those", PROTECTIONS, PROTECTIONS)
    shots: int = _says("images a class for realignment", 10)
    ablation_shots: tuple[int, ...] = _says("the same, varied, under the first condition", (1, 2, 5, 20, 50))
    shots_from: str = _says("'tasks', or where pictures of other classes come from: 'public', or a folder", "tasks")
    realignment_steps: int = _says("steps of realignment", 60)
    realignment_batch: int = _says("images of every task in each of them", 16)
    realignment_lr: float = _says("largest step size", 1e-3)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for option in fields(self):
            value, kind = getattr(self, option.name), hints[option.name]
            values = value if isinstance(value, tuple) else (value,)
            expected = {tuple[str, ...]: str, tuple[int, ...]: int}.get(kind, kind)
            for entry in values:
                if not isinstance(entry, expected) or (isinstance(entry, bool) and expected is not bool):
                    raise ValueError(f"{option.name}: expected {expected.__name__}, got {entry!r}")
                choices = option.metadata.get("choices")
                if choices and entry not in choices:
                    raise ValueError(f"{option.name}: expected {', '.join(choices)}, got {entry!r}")
            if isinstance(value, tuple) and len(set(value)) < len(value):
                raise ValueError(f"{option.name}: {value} names something twice")
        if len(self.tasks) < 2:
            raise ValueError(f"tasks: expected at least two, got {self.tasks}")
        for name in ("seeds", "conditions"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one")
        for name in ("blocks", "antennas", "shots", "realignment_batch", "finetuning_steps", "finetuning_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("subsets", "images", "realignment_steps", "jamming", "scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("finetuning_lr", "realignment_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if min(self.ablation_shots, default=1) < 1:
            raise ValueError(f"ablation_shots: expected at least 1, got {min(self.ablation_shots)}")
        if self.reference not in ("rms", "peak") and not 0 < _number(self.reference) < math.inf:
            raise ValueError(f"reference: expected 'rms', 'peak' or a positive number, got {self.reference!r}")
        if self.receiver == "lmmse" and self.order != "strongest_first":
            raise ValueError(f"order: a linear receiver decodes all users at once, got {self.order!r}")

    def chosen_subsets(self) -> list[Subset]:
        """Indices of tasks, ascending: the subsets of at least two, or a few of every size; in lexicographic order.

        In this order each subset follows one with which it shares all but its last tasks.
        """
        count = len(self.tasks)
        found: list[Subset] = []
        for size in range(2, count + 1):
            every = list(combinations(range(count), size))
            few = self.subsets and self.subsets < len(every)
            found += random.Random(size).sample(every, self.subsets) if few else every
        return sorted(found)

    def identity(self) -> dict[str, Any]:
        """What stands in the first line of a file of results: all that decides a result, not which results there are.

        So a file goes on when seeds, subsets, uplinks or protections are added.
        """
        values = {name: value for name, value in asdict(self).items() if name not in EXTENT}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


TESTBED = Protocol(
    tasks=("digits", "textures", "letters", "spectra", "automata", "signs", "land", "gratings"),
    # A min-max quantiser in front of a QAM modulator scales symbols by the peak of what it sends. The paper's SNRs
    # imply a peak of 30 to 57 times the rms for CLIP ViT-B/16; the small model's own is about 4, so the ratio is set.
    reference="30",
)
CLIP = Protocol(
    setting="clip",
    model="ViT-B-16-quickgelu",
    pretrained="openai",
    tasks=("cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "sun397", "svhn"),
    finetuning_steps=2000,
    finetuning_batch=128,
    finetuning_lr=1e-5,
    ablation_shots=(1, 2, 5, 20),  # cars: 8,144 training images of 196 classes; 50 of each there are not
    realignment_steps=100,
    realignment_lr=1e-5,
)
READY = {"testbed": TESTBED, "clip": CLIP}


def add_options(parser: argparse.ArgumentParser) -> None:
    """One option for every field of a `Protocol`, of the same name; what is not given is left to the ready setting."""
    hints = get_type_hints(Protocol)
    for option in fields(Protocol):
        if option.name == "setting":
            continue
        kind, choices = hints[option.name], option.metadata["choices"]
        several = kind in (tuple[str, ...], tuple[int, ...])
        parse: Any = {tuple[int, ...]: int, tuple[str, ...]: str, bool: _truth}.get(kind, kind)
        assert option.default is not MISSING
        parser.add_argument(
            "--" + option.name.replace("_", "-"),
            type=parse,
            nargs="*" if several else None,
            choices=choices,
            default=None,
            metavar=None if choices else "X",
            help=option.metadata["help"],
        )


def from_options(setting: str, options: argparse.Namespace) -> Protocol:
    """The ready setting with what the command line says otherwise."""
    given = {option.name: getattr(options, option.name, None) for option in fields(Protocol)}
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return replace(READY[setting], **{name: value for name, value in changes.items() if value is not None})


def _truth(text: str) -> bool:
    values = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected yes or no, got {text!r}")
    return values[text.lower()]


def named(tasks: Sequence[str], subset: Subset) -> list[str]:
    """The names of a subset."""
    return [tasks[index] for index in subset]
