"""Task vectors, and the rules that fuse them.

`TaskVector.between` makes one from a base and a fine-tuned model; a rule such as `task_arithmetic` fuses several into
one update; ``update.apply_to(base)`` makes the multi-task model. Every rule takes the keywords of `FusionOptions`.
"""

from ._options import FusionOptions
from .adapters import adapter_vector
from .aligned import aligned
from .fuse import fuse
from .fuse_files import fuse_files
from .low_rank import LowRank, low_rank
from .rules.arithmetic import heuristic_scale, task_arithmetic
from .rules.consensus import consensus, tall_masks
from .rules.dare import dare
from .rules.geometric_median import geometric_median
from .rules.iso_c import iso_c
from .rules.lines import lines
from .rules.median import coordinate_median
from .rules.multi_krum import krum_scores, multi_krum
from .rules.norm_clipping import norm_clipping
from .rules.ties import ties
from .rules.trimmed_mean import trimmed_mean
from .rules.tsv import tsv
from .rules.weighted_average import weighted_average
from .vector import TaskVector

__all__ = [
    "FusionOptions",
    "LowRank",
    "TaskVector",
    "adapter_vector",
    "aligned",
    "consensus",
    "coordinate_median",
    "dare",
    "fuse",
    "fuse_files",
    "geometric_median",
    "heuristic_scale",
    "iso_c",
    "krum_scores",
    "lines",
    "low_rank",
    "multi_krum",
    "norm_clipping",
    "tall_masks",
    "task_arithmetic",
    "ties",
    "trimmed_mean",
    "tsv",
    "weighted_average",
]
