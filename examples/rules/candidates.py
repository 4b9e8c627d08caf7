"""The rules that are compared, with the defaults of their papers: each makes one update of eight, or one a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from rmtllmf import taskvec as tv
from rmtllmf.metrics import accuracy
from rmtllmf.taskvec import TaskVector

from .held import Held

Update: TypeAlias = Mapping[str, Tensor]
Fuse: TypeAlias = Callable[[Held, list[TaskVector]], Update | Sequence[Update] | nn.Module]

STEPS = 60  # of what learns coefficients or masks: fewer than the sources take, at larger step sizes


@dataclass(frozen=True)
class Candidate:
    """One row of the table.

    Attributes:
        fuse: what is given and vectors -> an update, one for each task, or a model that routes its inputs.
        needs: beside the vectors: nothing, "inputs" without labels, or "labels".
    """

    fuse: Fuse
    needs: str = ""


def plain(rule: Callable[..., Update], **options: Any) -> Candidate:
    """A rule that takes nothing but the vectors."""
    return Candidate(lambda held, vectors: rule(vectors, **options))


def learned(rule: Callable[..., Update], needs: str, **options: Any) -> Candidate:
    """A rule that takes the base model and a few pictures."""
    return Candidate(lambda held, vectors: rule(vectors, held.world.base, held.shots(), **options), needs)


def informed(rule: Callable[..., Update], **options: Any) -> Candidate:
    """A rule that takes the Fisher information of what the base station has of each model."""
    return Candidate(lambda held, vectors: rule(vectors, held.information(vectors), **options), "labels")


def by_grams(rule: Callable[..., Update], **options: Any) -> Candidate:
    """A rule that takes the Gram matrices of the inputs that layers get."""
    return Candidate(lambda held, vectors: rule(vectors, held.grams(vectors), **options), "inputs")


def sized(rule: Callable[..., Update], **options: Any) -> Candidate:
    """A rule that averages, brought to the length of task arithmetic's sum."""
    return Candidate(lambda held, vectors: rule(vectors, scale=0.3 * len(vectors), **options))


def led(held: Held, vectors: list[TaskVector]) -> Update:
    """LED-Merging, with scores from the few labelled pictures."""
    model, states = held.world.base, held.states(vectors)
    base = [tv.snip_scores(model, task) for task in held.by_task()]
    tuned = [tv.snip_scores(model, task, state=state) for task, state in zip(held.by_task(), states, strict=True)]
    return tv.led_merging(vectors, base, tuned, LOCATED)


def concrete(held: Held, vectors: list[TaskVector]) -> Update:
    """Task arithmetic inside of a Concrete mask."""
    found = tv.concrete_mask(vectors, held.world.base, held.shots(), seed=held.seed, steps=STEPS, lr=2 / STEPS)
    return tv.concrete(vectors, found.mask)


def by_accuracy(held: Held, vectors: list[TaskVector]) -> Update:
    """Metrics-weighted averaging, by each model's accuracy on its own task's pictures, as long as task arithmetic."""
    models = [held.model(vector) for vector in vectors]
    tasks = held.shots().values()
    found = [accuracy(model, batches, head=head) for model, (head, batches) in zip(models, tasks, strict=True)]
    return tv.metrics_weighted_average(vectors, found, larger_is_better=True, scale=0.3 * len(vectors))


def restored(compress: Callable[..., Any]) -> Candidate:
    """What is stored as one vector with masks, and taken back task by task."""

    def fuse(held: Held, vectors: list[TaskVector]) -> list[Update]:
        stored = compress(vectors)
        return [stored.task_vector(q) for q in range(len(vectors))]

    return Candidate(fuse)


def twin(held: Held, vectors: list[TaskVector]) -> nn.Module:
    """Twin-Merging, with a router that knows the tasks of the few pictures."""
    model = tv.twin_merging(held.world.base, vectors, rank=RANK)
    tv.train_router(model, held.shots(), seed=held.seed)
    return model


LOCATED = 0.3  # of every tensor, by LED-Merging
RANK = 16  # of 128
CANDIDATES: dict[str, Candidate] = {
    "task arithmetic": plain(tv.task_arithmetic),
    "TIES": plain(tv.ties),
    "DARE": plain(tv.dare, seed=0),
    "DELLA": plain(tv.della, seed=0),
    "breadcrumbs": plain(tv.breadcrumbs),
    "PCB-Merging": plain(tv.pcb_merging),
    "consensus": plain(tv.consensus),
    "EMR, unified": plain(tv.emr_unified),
    "Model Stock": plain(tv.model_stock),
    "WIDEN": Candidate(lambda held, vectors: tv.widen(vectors, held.world.base)),
    "coordinate median": sized(tv.coordinate_median),
    "trimmed mean": sized(tv.trimmed_mean, trim=1),
    "geometric median": sized(tv.geometric_median),
    "norm clipping": sized(tv.norm_clipping),
    "multi-Krum": sized(tv.multi_krum, hostile=1),
    "Iso-C": plain(tv.iso_c),
    "Iso-CTS": plain(tv.iso_cts),
    "TSV-Merge": plain(tv.tsv),
    "DO-Merging": plain(tv.do_merging),
    "DOGE": plain(tv.doge),
    "OPCM": plain(tv.opcm),
    "WUDI": plain(tv.wudi),
    "essential subspaces": by_grams(tv.essential_subspace),
    "RegMean": by_grams(tv.regmean),
    "RegMean++": learned(tv.regmean_plus_plus, "inputs"),
    "AdaMerging": learned(tv.adamerging, "inputs", steps=STEPS, lr=0.01),
    "Expert Merging": learned(tv.expert_merging, "inputs", steps=STEPS),
    "Concrete mask": Candidate(concrete, "inputs"),
    "Frank-Wolfe": learned(tv.frank_wolfe, "labels"),
    "by accuracy": Candidate(by_accuracy, "labels"),
    "Fisher": informed(tv.fisher),
    "Fisher grafting": informed(tv.fisher_grafting),
    "optimal brain": informed(tv.optimal_brain_merging),
    "LED-Merging": Candidate(led, "labels"),
    "EMR, each task": restored(tv.emr),
    "TALL masks, each task": restored(tv.tall_compression),
    "SMILE": Candidate(lambda held, vectors: tv.smile(held.world.base, vectors, rank=RANK, gate_rank=RANK)),
    "Twin-Merging": Candidate(twin, "inputs"),
}
"""In the order of the table; of the last four, two have a model for each task, and two find out the task."""
