"""What protects a fusion: before, during and after; one mechanism, one file, each usable alone on plain mappings.

All at once: `protect`, from what was received to a repaired model with a report; `resilient_fusion` is the paper's
R-MTLLMF.

- **Estimate** what was sent, from what was received and its noise: `shrink`, `joint_shrink`, `spectral_shrink`, with
  `measured_sensitivity` for what a model feels of it.
- **Fuse** as the noise asks for: `inverse_variance_weights`, `mse_optimal_weights`, `select_users`, `search_scale`.
- **Restore** parameters from the base model: `restore`, what noise harms (`harmful_keys`, `squared_gradients`), or
  by name, `embedding_keys`, `attention_keys`, `normalization_keys`.
- **Realign** on a few labelled samples (`few_shot`): `realign`, with an anchor and early stopping; `realign_lora`,
  `realign_heads`, `steps_by_cross_validation`.
- **Send less**, and that with more energy: `low_rank_code`, `factors_code`, `top_k_code`, `sign_code`, `power_loading`.
- **Distrust** senders: `suspects`; what liars send, to measure that, is in `rmtllmf.resilience.attacks`.
"""

from .coding import Encoding, channel_uses, reliable_bits, repeated_mse, repetitions
from .cross_validation import CrossValidation, steps_by_cross_validation
from .factors_code import factors_code
from .few_shot import few_shot
from .fusion import resilient_fusion
from .fusion_weights import inverse_variance_weights, mse_optimal_weights, select_users
from .harmful_keys import harmful_keys, squared_gradients
from .joint_shrink import joint_shrink
from .keys import attention_keys, embedding_keys, normalization_keys
from .low_rank_code import low_rank_code, ranks_for
from .power_loading import loaded, power_loading
from .protect import Protection, TensorReport, protect
from .realign import Realignment, realign
from .realign_heads import realign_heads
from .realign_lora import realign_lora
from .restore import restore
from .search_scale import ScaleSearch, search_scale
from .sensitivity import MeasuredSensitivity, measured_sensitivity
from .shrink import shrink
from .sign_code import sign_code, soft_signs
from .spectral_shrink import spectral_shrink
from .suspects import Suspicion, suspects
from .top_k_code import top_k_code

__all__ = [
    "CrossValidation",
    "Encoding",
    "MeasuredSensitivity",
    "Protection",
    "Realignment",
    "ScaleSearch",
    "Suspicion",
    "TensorReport",
    "attention_keys",
    "channel_uses",
    "embedding_keys",
    "factors_code",
    "few_shot",
    "harmful_keys",
    "inverse_variance_weights",
    "joint_shrink",
    "loaded",
    "low_rank_code",
    "measured_sensitivity",
    "mse_optimal_weights",
    "normalization_keys",
    "power_loading",
    "protect",
    "ranks_for",
    "realign",
    "realign_heads",
    "realign_lora",
    "reliable_bits",
    "repeated_mse",
    "repetitions",
    "resilient_fusion",
    "restore",
    "search_scale",
    "select_users",
    "shrink",
    "sign_code",
    "soft_signs",
    "spectral_shrink",
    "squared_gradients",
    "steps_by_cross_validation",
    "suspects",
    "top_k_code",
]
