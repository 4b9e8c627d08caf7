"""``nn.MultiheadAttention`` with projections that are layers of their own.

torch's module hands bare matrices to one function: whatever stands in place of a layer in it is never called.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention

from ...errors import InputError


def can_open(attention: nn.MultiheadAttention) -> bool:
    """Whether `OpenAttention` does the same: not with a learnt or a zero key beside the others."""
    return attention.bias_k is None and attention.bias_v is None and not attention.add_zero_attn


class OpenAttention(nn.Module):
    r"""What a ``nn.MultiheadAttention`` does, by four linear layers.

    .. math:: \mathrm{softmax}\Bigl(\frac{q k^T}{\sqrt{d}} + M\Bigr) v\, W_O^T + b_O, \qquad
        q = x W_Q^T + b_Q,\; k = y W_K^T + b_K,\; v = z W_V^T + b_V

    Args:
        attention: taken apart; its parameters are used where they are whole, else copied.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.head_dim, self.dropout = attention.head_dim, attention.dropout
        self.batch_first = attention.batch_first
        # torch's encoder layers ask for these before they take matrices past their modules, and then do not
        self._qkv_same_embed_dim, self.in_proj_bias = False, None
        weights: list[Tensor | None]
        if attention.in_proj_weight is not None:
            weights = list(attention.in_proj_weight.detach().chunk(3))
        else:
            weights = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
        bias = attention.in_proj_bias
        biases = [None] * 3 if bias is None else bias.detach().chunk(3)
        self.q, self.k, self.v = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As of ``nn.MultiheadAttention``: the output and, on request, the weights of attention."""
        if is_causal and attn_mask is None:
            raise InputError("attn_mask: expected the causal mask with is_causal=True, got None")
        batched = query.ndim == 3
        if not batched:
            query, key, value = (tensor[None] for tensor in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        first = self.batch_first or not batched
        q, k, v = (self._heads(part, first) for part in (self.q(query), self.k(key), self.v(value)))
        mask = self._mask(key_padding_mask, attn_mask, q)
        rate = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.mT / math.sqrt(self.head_dim)
            weights = dropout((scores if mask is None else scores + mask).softmax(-1), rate)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            mixed = scaled_dot_product_attention(q, k, v, mask, rate)
        output = self.out(mixed.permute(*((0, 2, 1, 3) if first else (2, 0, 1, 3))).flatten(2))
        return (output if batched else output[0]), weights

    def _heads(self, x: Tensor, batch_first: bool) -> Tensor:
        """(B, H, L, d)."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)

    def _mask(self, padding: Tensor | None, mask: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the scores, (B or 1, H or 1, L, S)."""
        total = None
        if padding is not None:
            total = _additive(padding, q.dtype)[:, None, None]
        if mask is not None:
            mask = _additive(mask, q.dtype)
            mask = mask[None, None] if mask.ndim == 2 else mask.unflatten(0, (-1, self.num_heads))
            total = mask if total is None else total + mask
        return total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """True: not allowed."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)


def _linear(weight: Tensor | None, bias: Tensor | None) -> nn.Linear:
    assert weight is not None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(_own(weight), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(_own(bias), requires_grad=False)
    return layer


def _own(tensor: Tensor) -> Tensor:
    """Not a view of a larger one, which a file of tensors could not hold."""
    tensor = tensor.detach()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
