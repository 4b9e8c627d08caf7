"""A file of masked vectors, tensor by tensor, as `MaskedVectors.save` would write it."""

from __future__ import annotations

import torch

MASKED = {"rmtllmf": "masked_vectors", "version": "1"}
GOOD = {
    "vector.w": torch.ones(9),
    "mask.0.w": torch.ones(2, dtype=torch.uint8),
    "rescalers": torch.ones(1, dtype=torch.float64),
}
