"""What protects a fusion: restore the parameters that must not be bent, and realign the rest on a few samples.

Find the parameters that everything else depends on (`embedding_keys`, `attention_keys`), put them back after fusion
(`restore`), pick a few labelled samples of every class (`few_shot`) and train what is left on them (`realign`).
`resilient_fusion` does all of it in one call: the paper's R-MTLLMF.
"""

from .few_shot import few_shot
from .fusion import resilient_fusion
from .keys import attention_keys, embedding_keys
from .realign import Realignment, realign
from .restore import restore

__all__ = [
    "Realignment",
    "attention_keys",
    "embedding_keys",
    "few_shot",
    "realign",
    "resilient_fusion",
    "restore",
]
