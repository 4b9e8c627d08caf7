"""One row for each fusion rule: `tests/taskvec/rules/test_rules.py` holds every rule to the same properties.

To add a rule, write its definition naively (on float64, whole tensors, as the paper does) and add a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from helpers import mask_definitions as masks
from helpers import robust_definitions as robust
from helpers import sparse_definitions as sparse
from helpers import spectral_definitions as spectral
from helpers import statistics_definitions as statistics
from helpers import subspace_definitions as subspace
from helpers import ties_definition
from rmtllmf.taskvec import (
    breadcrumbs,
    concrete,
    consensus,
    coordinate_median,
    dare,
    della,
    do_merging,
    doge,
    emr_unified,
    essential_subspace,
    fisher,
    fisher_grafting,
    geometric_median,
    iso_c,
    iso_cts,
    led_merging,
    metrics_weighted_average,
    model_stock,
    multi_krum,
    norm_clipping,
    opcm,
    optimal_brain_merging,
    pcb_merging,
    regmean,
    task_arithmetic,
    ties,
    trimmed_mean,
    tsv,
    weighted_average,
    widen,
    wudi,
)

Vectors = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Row:
    """A rule with options, and what is true of it."""

    name: str
    rule: Callable[..., Any]  # (vectors, **options) -> update
    naive: Callable[..., dict[str, torch.Tensor]] | None  # (vectors in float64) -> update; None: has a test of its own
    permutable: bool = True  # the order of the tasks does not matter
    homogeneous: bool = True  # rule(c tau) = c rule(tau) for c > 0
    premultiplied: bool = True  # weights mean: fuse w tau
    tolerance: float = 1e-5  # relative to the largest entry, in float32
    fewest: int = 1  # vectors


def each_key(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Vectors], dict[str, torch.Tensor]]:
    """The naive form of a rule that works tensor by tensor, from a function of the stacked (N, ...) tensors."""
    return lambda vectors: {key: function(torch.stack([v[key] for v in vectors])) for key in vectors[0]}


def shared_mask(vectors: Vectors) -> dict[str, torch.Tensor]:
    """Shares that all tasks keep of their entries."""
    found = {key: tensor.sigmoid() for key, tensor in masks.like(vectors, "mask").items()}
    return found | ({"head": found["l0.w"]} if "head" in found else {})


def by_losses(vectors: Vectors, **options: Any) -> Any:
    """The average weighted by the losses 1, 1/2, 1/3, ..."""
    return metrics_weighted_average(vectors, [1 / (q + 1) for q in range(len(vectors))], **options)


ROWS = [
    Row("task arithmetic", partial(task_arithmetic, scale=0.3), each_key(lambda x: 0.3 * x.sum(0))),
    Row(
        "Concrete task arithmetic",
        masks.given(concrete, shared_mask, scale=0.4),
        lambda vectors: {k: 0.4 * m.double() * sum(v[k] for v in vectors) for k, m in shared_mask(vectors).items()},
    ),
    Row("weighted average", weighted_average, each_key(lambda x: x.mean(0)), premultiplied=False),
    Row(
        "metrics-weighted average",
        by_losses,
        each_key(
            lambda x: torch.einsum("n,n...->...", torch.arange(1.0, len(x) + 1).double() / sum(range(len(x) + 1)), x)
        ),
        permutable=False,
    ),
    Row("coordinate median", coordinate_median, each_key(robust.median)),
    Row("trimmed mean", partial(trimmed_mean, trim=1), each_key(partial(robust.trimmed, trim=1)), fewest=3),
    Row("trimmed mean by share", partial(trimmed_mean, trim=0.3), each_key(partial(robust.trimmed, trim=0.3))),
    Row("geometric median", geometric_median, robust.whole(robust.geometric_median)),
    Row("norm clipping", norm_clipping, robust.whole(robust.clipped)),
    Row("multi-Krum", partial(multi_krum, hostile=0, keep=2), robust.whole(partial(robust.krum, 0, 2)), fewest=3),
    Row("Model Stock", model_stock, each_key(sparse.model_stock), fewest=2),
    Row("consensus", partial(consensus, scale=0.3), each_key(partial(robust.consensus, scale=0.3)), fewest=2),
    Row("Iso-C", iso_c, each_key(spectral.iso_c), tolerance=1e-4),
    Row("Iso-CTS", partial(iso_cts, common=0.5), each_key(partial(subspace.iso_cts, common=0.5)), tolerance=1e-3),
    Row("WUDI", wudi, each_key(subspace.wudi), tolerance=1e-4),
    Row(
        "WUDI by steps",
        partial(wudi, steps=4, step_size=1e-3),
        each_key(partial(subspace.wudi_by_steps, steps=4, step_size=1e-3)),
        homogeneous=False,  # steps have a fixed length
        tolerance=1e-4,
    ),
    Row("OPCM", opcm, subspace.opcm, permutable=False, tolerance=1e-4),
    Row(
        "DOGE",
        partial(doge, density=0.5, subspace=2, steps=4, step_size=1e-3),
        partial(subspace.doge, density=0.5, subspace=2, steps=4, step_size=1e-3),
        homogeneous=False,  # coefficients are over the norms, steps have a fixed length
        premultiplied=False,  # weights multiply the coefficients
        tolerance=1e-4,
        fewest=2,  # one task shares its directions with none
    ),
    Row("TSV-Merge", tsv, each_key(spectral.tsv), tolerance=1e-3),
    # weights apply after trimming: per layer they do not change what is kept of the whole vector
    Row("TIES", ties, partial(ties_definition.merged, density=0.2), premultiplied=False),
    Row("TIES by tensor", partial(ties, trim="tensor"), partial(ties_definition.merged, density=0.2, by_tensor=True)),
    Row("TIES sum", partial(ties, density=1, combine="sum"), partial(ties_definition.merged, density=1.0, mean=False)),
    Row(
        "TIES elected otherwise",
        partial(ties, density=0.5, trim="tensor", elect="count", undecided="majority", combine="weighted mean"),
        None,
        premultiplied=False,
    ),
    Row(
        "breadcrumbs",
        partial(breadcrumbs, smallest=0.5, largest=0.1, scale=0.3),
        each_key(partial(sparse.breadcrumbs, smallest=0.5, largest=0.1, scale=0.3)),
    ),
    Row("breadcrumbs with TIES", partial(breadcrumbs, smallest=0.3, largest=0.1, rule=ties, density=1.0), None),
    Row(
        "PCB-Merging",
        partial(pcb_merging, density=0.3),
        robust.whole(partial(sparse.pcb_merging, density=0.3)),
        homogeneous=False,  # the second factor saturates
        premultiplied=False,  # weights apply after the competition
    ),
    Row("DARE", partial(dare, seed=0), None, permutable=False),
    Row("DELLA", partial(della, window=0.2, seed=0), None, permutable=False),
    Row("DELLA linear", partial(della, seed=0, by="tensor", rule=task_arithmetic), None, permutable=False),
    Row("DARE with TIES", partial(dare, drop=0.3, seed=0, rule=ties, trim="tensor"), None, permutable=False),
    Row("LED-Merging", statistics.with_scores(led_merging), statistics.led_of_sizes),
    Row(
        "LED-Merging of neurons",
        statistics.with_scores(led_merging, unit="neuron"),
        partial(statistics.led_of_sizes, neurons=True),
    ),
    Row("EMR, unified", emr_unified, each_key(masks.emr_unified)),
    Row("WIDEN", masks.given(widen, masks.base_of), masks.widen, homogeneous=False),
    # weights are those of an average
    Row("Fisher", statistics.with_information(fisher), statistics.fisher_of_sizes, premultiplied=False),
    Row(
        "Fisher grafting",
        masks.given(fisher_grafting, masks.curvature_of),
        masks.given(masks.grafted, masks.curvature_of, density=0.1),
    ),
    Row(
        "Fisher grafting by tensor",
        masks.given(fisher_grafting, masks.curvature_of, density=0.4, within="tensor", combine="sum"),
        masks.given(masks.grafted, masks.curvature_of, density=0.4, by_tensor=True, combine="sum"),
    ),
    Row("OBIM", masks.given(optimal_brain_merging, masks.moments_of), masks.obim, permutable=False),
    Row(
        "RegMean",
        statistics.with_grams(regmean),
        statistics.regmean_of_grams,
        premultiplied=False,
        tolerance=1e-4,
    ),
    Row("DO-Merging", do_merging, each_key(subspace.decoupled)),
    Row("ESM", statistics.with_grams(essential_subspace), None, tolerance=1e-4),
]
