"""Task vectors, and the rules that fuse them.

`TaskVector.between` makes one from a base and a fine-tuned model; a rule such as `task_arithmetic` fuses several into
one update; ``update.apply_to(base)`` makes the multi-task model. Every rule takes the keywords of `FusionOptions`.
"""

from ._options import FusionOptions
from .arithmetic import heuristic_scale, task_arithmetic
from .vector import TaskVector
from .weighted_average import weighted_average

__all__ = [
    "FusionOptions",
    "TaskVector",
    "heuristic_scale",
    "task_arithmetic",
    "weighted_average",
]
