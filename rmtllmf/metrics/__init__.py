"""How well it went: numbers about models and about task vectors.

`accuracy` and `normalized_accuracy` tell what a fused model is worth, `cosine_similarity` (of whole vectors,
`layer_cosine_similarity` of their layers) and `weight_disentanglement_error` (`disentanglement_grid` over two scales)
how far its tasks interfere, `snr_db` how loud the channel's noise is beside a task vector, and `disturbance_test`
whether a disturbed model's outputs still agree with the undisturbed one's; `rejection_rate` and `task_disturbance`
count on how much of a task they do not.
"""

from .accuracy import accuracy, normalized_accuracy
from .disentanglement import Disentanglement, weight_disentanglement_error
from .disentanglement_grid import DisentanglementGrid, disentanglement_grid
from .disturbance import DisturbanceTest, disturbance_test
from .rejection import RejectionRate, rejection_rate, task_disturbance
from .similarity import cosine_similarity, layer_cosine_similarity
from .snr import snr_db

__all__ = [
    "Disentanglement",
    "DisentanglementGrid",
    "DisturbanceTest",
    "RejectionRate",
    "accuracy",
    "cosine_similarity",
    "disentanglement_grid",
    "disturbance_test",
    "layer_cosine_similarity",
    "normalized_accuracy",
    "rejection_rate",
    "snr_db",
    "task_disturbance",
    "weight_disentanglement_error",
]
