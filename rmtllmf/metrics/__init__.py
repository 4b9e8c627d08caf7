"""How well it went: numbers about models and about task vectors.

`accuracy` and `normalized_accuracy` tell what a fused model is worth, `cosine_similarity` and
`weight_disentanglement_error` how far its tasks interfere, `snr_db` how loud the channel's noise is beside a task
vector, and `disturbance_test` whether a disturbed model's outputs still agree with the undisturbed one's.
"""

from .accuracy import accuracy, normalized_accuracy
from .disentanglement import Disentanglement, weight_disentanglement_error
from .disturbance import DisturbanceTest, disturbance_test
from .similarity import cosine_similarity
from .snr import snr_db

__all__ = [
    "Disentanglement",
    "DisturbanceTest",
    "accuracy",
    "cosine_similarity",
    "disturbance_test",
    "normalized_accuracy",
    "snr_db",
    "weight_disentanglement_error",
]
