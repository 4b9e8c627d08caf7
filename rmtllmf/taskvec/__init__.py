"""Task vectors, and the rules that fuse them.

`TaskVector.between` makes one from a base and a fine-tuned model; a rule such as `task_arithmetic` fuses several into
one update; ``update.apply_to(base)`` makes the multi-task model. Every rule takes the keywords of `FusionOptions`.
"""

from ._options import FusionOptions
from .adapters import adapter_vector
from .aligned import aligned
from .fuse import fuse
from .fuse_files import fuse_files
from .learned.adamerging import adamerging, adamerging_coefficients
from .learned.concrete_mask import ConcreteMask, concrete_mask
from .learned.defense_aware_mask import DefenseAwareMask, defense_aware_mask
from .learned.expert_merging import expert_merging, expert_merging_coefficients
from .learned.fisher_information import fisher_information
from .learned.frank_wolfe import frank_wolfe, frank_wolfe_coefficients
from .learned.input_grams import input_grams
from .learned.pareto_front import ParetoFront, pareto_front
from .learned.regmean_plus_plus import regmean_plus_plus
from .learned.snip_scores import snip_scores
from .learned.weights import LearnedWeights
from .low_rank import LowRank, low_rank
from .masked_vectors import MaskedVectors
from .mergeability import HiddenLayer, Mergeability, mergeability
from .osrm import osrm
from .reversible_merging import ReversibleMerge, reversible_merging
from .routed.load_routed import load_routed
from .routed.smile import smile
from .routed.train_router import RouterTraining, train_router
from .routed.twin_merging import TwinMerged, twin_merging
from .rules.arithmetic import heuristic_scale, task_arithmetic
from .rules.breadcrumbs import breadcrumbs
from .rules.concrete import concrete
from .rules.consensus import consensus, tall_masks
from .rules.dare import dare
from .rules.della import della
from .rules.do_merging import do_merging
from .rules.doge import doge
from .rules.emr import emr, emr_unified
from .rules.essential_subspace import essential_subspace
from .rules.fisher import fisher
from .rules.fisher_grafting import fisher_grafting
from .rules.geometric_median import geometric_median
from .rules.iso_c import iso_c
from .rules.iso_cts import iso_cts
from .rules.led_merging import led_masks, led_merging
from .rules.lines import lines
from .rules.median import coordinate_median
from .rules.metrics_weighted_average import metric_weights, metrics_weighted_average
from .rules.model_stock import model_stock, model_stock_ratios
from .rules.multi_krum import krum_scores, multi_krum
from .rules.norm_clipping import norm_clipping
from .rules.opcm import ContinualMerge, opcm
from .rules.optimal_brain_merging import optimal_brain_merging
from .rules.pcb_merging import pcb_merging
from .rules.regmean import regmean
from .rules.slerp import slerp
from .rules.tall_compression import tall_compression
from .rules.ties import ties
from .rules.trimmed_mean import trimmed_mean
from .rules.tsv import tsv
from .rules.weighted_average import weighted_average
from .rules.widen import widen
from .rules.wudi import wudi
from .vector import TaskVector

__all__ = [
    "ConcreteMask",
    "ContinualMerge",
    "DefenseAwareMask",
    "FusionOptions",
    "HiddenLayer",
    "LearnedWeights",
    "LowRank",
    "MaskedVectors",
    "Mergeability",
    "ParetoFront",
    "ReversibleMerge",
    "RouterTraining",
    "TaskVector",
    "TwinMerged",
    "adamerging",
    "adamerging_coefficients",
    "adapter_vector",
    "aligned",
    "breadcrumbs",
    "concrete",
    "concrete_mask",
    "consensus",
    "coordinate_median",
    "dare",
    "defense_aware_mask",
    "della",
    "do_merging",
    "doge",
    "emr",
    "emr_unified",
    "essential_subspace",
    "expert_merging",
    "expert_merging_coefficients",
    "fisher",
    "fisher_grafting",
    "fisher_information",
    "frank_wolfe",
    "frank_wolfe_coefficients",
    "fuse",
    "fuse_files",
    "geometric_median",
    "heuristic_scale",
    "input_grams",
    "iso_c",
    "iso_cts",
    "krum_scores",
    "led_masks",
    "led_merging",
    "lines",
    "load_routed",
    "low_rank",
    "mergeability",
    "metric_weights",
    "metrics_weighted_average",
    "model_stock",
    "model_stock_ratios",
    "multi_krum",
    "norm_clipping",
    "opcm",
    "optimal_brain_merging",
    "osrm",
    "pareto_front",
    "pcb_merging",
    "regmean",
    "regmean_plus_plus",
    "reversible_merging",
    "slerp",
    "smile",
    "snip_scores",
    "tall_compression",
    "tall_masks",
    "task_arithmetic",
    "ties",
    "train_router",
    "trimmed_mean",
    "tsv",
    "twin_merging",
    "weighted_average",
    "widen",
    "wudi",
]
