"""Send factors that exist already: LoRA adapters as they were trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .._state import Tensors, quoted, wide
from ..errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from ._factors import encoding_of, scaled
from ._form import Form
from .coding import Encoding

__all__ = ["factors_code"]


def factors_code(
    factors: Mapping[str, tuple[Tensor, Tensor]], rest: Tensors | None = None, *, balance: bool = True
) -> Encoding:
    r"""Factors that exist already, such as those of LoRA adapters: :math:`\Delta = B A`, B (m, r) and A (r, n).

    Any :math:`B M, M^{-1} A` has the same product, but not the same noise in it. Balanced factors are those that
    `low_rank_code` would find in the product, with the least: little-trained adapters, where A is large and B small,
    gain a lot.

    Args:
        factors: name -> (B, A). A LoRA scale (alpha / r) is part of one of them. The same shapes for all users.
        rest: other tensors, sent whole as by `low_rank_code`; integer entries are carried.
        balance: whether factors are balanced first; their rank becomes min(m, r, n). False: all is sent as it is.

    Returns:
        An `Encoding`, that decodes to a dict of name -> B A (m, n) in the dtype of B, and the rest. Balanced, it tells
        32 bits for each tensor of the rest.

    Raises:
        InputError: no factors, or a name that is also in `rest`. ShapeError: factors that cannot be multiplied.
        TypeError: no mapping of pairs of floating-point tensors. NonFiniteError: NaN or infinity.
        StateMismatchError: B and A differ in dtype.

    Source: E. Hu et al., "LoRA: low-rank adaptation of large language models", 2022.

    Example:
        >>> import torch
        >>> code = factors_code({"w": (torch.ones(4, 1), torch.ones(1, 3))})
        >>> code.decode(code.sent)["w"].shape, sum(tensor.numel() for tensor in code.sent.values())
        (torch.Size([4, 3]), 7)
    """
    if not isinstance(factors, Mapping):
        raise TypeError(f"factors: expected a mapping of name -> (B, A), got {type(factors).__name__}")
    if not factors:
        raise InputError("factors: expected at least one pair (B, A), got an empty mapping")
    if rest is not None and not isinstance(rest, Mapping):
        raise TypeError(f"rest: expected a mapping of name -> tensor, got {type(rest).__name__}")
    rest = {} if rest is None else dict(rest)
    if factors.keys() & rest.keys():
        raise InputError(f"rest: {quoted(factors.keys() & rest.keys())} stands among the factors too")
    whole = {key: _product_like(*_checked_pair(pair, key)) for key, pair in factors.items()}
    form, parts = Form.of({**whole, **rest}, "rest")
    found = {}
    for key, pair in factors.items():
        B, A = (wide(factor.detach()) for factor in pair)
        found[key] = _balanced(B, A) if balance else (B, A, 1.0)
    return encoding_of(form, {key: tensor for key, tensor in parts.items() if key in rest}, found, loaded=balance)


def _checked_pair(pair: object, key: str) -> tuple[Tensor, Tensor]:
    where = f"factors[{key!r}]"
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"{where}: expected a pair (B, A) of tensors, got {type(pair).__name__}")
    B, A = pair
    for name, factor in (("B", B), ("A", A)):
        if not isinstance(factor, Tensor) or not factor.is_floating_point():
            kind = factor.dtype if isinstance(factor, Tensor) else type(factor).__name__
            raise TypeError(f"{where}: expected a floating-point tensor as {name}, got {kind}")
        if not torch.isfinite(factor).all():
            raise NonFiniteError(f"{where}: {name} holds NaN or infinity; expected finite numbers")
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0] or 0 in (*B.shape, *A.shape):
        raise ShapeError(
            f"{where}: expected B (m, r) and A (r, n), got {tuple(B.shape)} and {tuple(A.shape)} (B comes first)"
        )
    if B.dtype != A.dtype:
        raise StateMismatchError(f"{where}: B is {B.dtype}, A is {A.dtype}. Convert one of them first")
    return B, A


def _product_like(B: Tensor, A: Tensor) -> Tensor:
    """A tensor of the product's shape, without calculating it."""
    return B.new_zeros(()).expand(B.shape[0], A.shape[1])


def _balanced(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, float]:
    left, right = (torch.linalg.qr(factor.to(torch.float64)) for factor in (B, A.T))
    U, values, Vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    half = values.sqrt()
    return scaled((left.Q @ U * half).to(B.dtype), (half[:, None] * (Vh @ right.Q.T)).to(A.dtype))
