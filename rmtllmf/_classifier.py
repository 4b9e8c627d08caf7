"""An encoder with a head on normalised features: plain torch, whatever the encoder comes from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ._state import finite_number
from .errors import NonFiniteError, ShapeError

__all__ = ["ImageClassifier", "ZeroShotHead"]


class ZeroShotHead(nn.Module):
    r"""Frozen linear classifier over normalised features, one column a class.

    .. math:: z_k(f) = s \,\frac{f^T w_k}{\lVert f \rVert} + b

    Weight, scale and bias are buffers that move with the module, but are no part of its state dict: nothing trains
    them, no channel bends them, and a classifier that is loaded from a file gets them from the class names again.

    Args:
        weight: (D, K) text features of the K classes, of unit length each.
        logit_scale: the factor s of the logits, for CLIP the exponential of the model's own ``logit_scale``.
        logit_bias: b, which only SigLIP models have.

    Raises:
        ShapeError: `weight` is no matrix. NonFiniteError: it holds NaN or infinity.
        TypeError: `weight` is no floating-point tensor, or another argument is no number.

    Source: Radford et al., "Learning transferable visual models from natural language supervision", 2021, section 3.1.

    Example:
        >>> import torch
        >>> ZeroShotHead(torch.eye(2), logit_scale=10.0)(torch.tensor([[3.0, 4.0]]))
        tensor([[6., 8.]])
    """

    weight: Tensor
    logit_scale: Tensor
    logit_bias: Tensor

    def __init__(self, weight: Tensor, *, logit_scale: float = 100.0, logit_bias: float = 0.0) -> None:
        super().__init__()
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"weight: expected a floating-point tensor (D, K), got {kind}")
        if weight.ndim != 2 or 0 in weight.shape:
            raise ShapeError(f"weight: expected shape (D, K), got {tuple(weight.shape)}")
        if not bool(weight.isfinite().all()):
            raise NonFiniteError("weight: holds NaN or infinity; expected finite numbers")
        numbers = {
            "logit_scale": finite_number(logit_scale, "logit_scale", positive=True),
            "logit_bias": finite_number(logit_bias, "logit_bias"),
        }
        self.register_buffer("weight", weight.detach().clone(), persistent=False)
        for name, number in numbers.items():
            self.register_buffer(name, torch.tensor(number, dtype=weight.dtype, device=weight.device), persistent=False)

    def forward(self, features: Any) -> Tensor:
        """(B, D) features, or a tuple that starts with them (CoCa's towers) -> (B, K) logits."""
        if isinstance(features, tuple):
            features = features[0]
        logits: Tensor = self.logit_scale * (normalize(features, dim=-1) @ self.weight) + self.logit_bias
        return logits


class ImageClassifier(nn.Module):
    """An image encoder with a head: ``logits = head(encoder(images))``.

    Args:
        encoder: images -> features; what is fine-tuned, sent and fused.
        head: features -> logits, such as a `ZeroShotHead`.

    Raises:
        TypeError: one of them is no module.

    Example:
        >>> import torch
        >>> classifier = ImageClassifier(torch.nn.Flatten(), ZeroShotHead(torch.eye(4)[:, :3]))
        >>> classifier(torch.ones(2, 1, 2, 2)).shape
        torch.Size([2, 3])
    """

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        for name, part in (("encoder", encoder), ("head", head)):
            if not isinstance(part, nn.Module):
                raise TypeError(f"{name}: expected a torch.nn.Module, got {type(part).__name__}")
        self.encoder = encoder
        self.head = head

    def forward(self, images: Tensor) -> Any:
        """Images -> logits."""
        return self.head(self.encoder(images))
