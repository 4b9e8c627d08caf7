"""SMILE: every linear layer sends every token to the low-rank expert whose input directions it lies along."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..._state import Tensors, whole_number
from ...errors import InputError
from .._sources import sources_of
from ._replace import Change, factored, routed_copy

__all__ = ["SmileLinear", "smile"]


class SmileLinear(nn.Module):
    r"""A linear layer and N low-rank experts, of which each token is given the K whose directions hold most of it.

    .. math:: y = W x + b + \sum_{i \in \mathcal{K}} p_i (U_i \Sigma_i V_i^T x + \Delta b_i), \qquad
        p = \mathrm{softmax}_{i \in \mathcal{K}}\, r_i, \quad r_i = \|\tilde V_i^T x\|_2, \quad
        \mathcal{K} = \text{the } K \text{ largest } r_i

    Made by `smile`.

    Attributes:
        weight, bias: (m, n) and (m,) or None, of the base model.
        right: (N, max(rank, gate rank), n), the leading right singular vectors of every expert's matrix.
        left: (N, m, rank), its left singular vectors times the singular values.
        shift: (N, m), what every expert changes in the bias; None without one.
        routing: the gate rank and K, so that a state dict says everything.
    """

    right: Tensor
    left: Tensor
    shift: Tensor | None
    routing: Tensor

    def __init__(
        self, layer: nn.Linear, right: Tensor, left: Tensor, shift: Tensor | None, gate_rank: int, top_k: int
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("right", right.to(layer.weight).contiguous())
        self.register_buffer("left", left.to(layer.weight).contiguous())
        self.register_buffer("shift", None if shift is None else shift.to(layer.weight).contiguous())
        self.register_buffer("routing", torch.tensor([gate_rank, top_k], device=layer.weight.device))
        self.gate_rank, self.top_k = gate_rank, top_k

    @property
    def count(self) -> int:
        """N."""
        return len(self.left)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., n) -> the weights p and the indices of the chosen experts, (..., K) each, the heaviest first."""
        projected = linear(x, self.right[:, : self.gate_rank].flatten(0, 1)).unflatten(-1, (self.count, -1))
        norms, chosen = torch.linalg.vector_norm(projected, dim=-1).topk(self.top_k, dim=-1)
        return norms.softmax(-1), chosen

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        rows = x.reshape(-1, self.in_features)
        output = linear(rows, self.weight, self.bias)
        share, chosen = self.route(rows)
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.count).tolist()
        rank = self.left.shape[-1]
        for expert, slots in enumerate(order.split(counts)):
            if not len(slots):
                continue
            tokens = slots if self.top_k == 1 else slots // self.top_k
            made = linear(linear(rows[tokens], self.right[expert, :rank]), self.left[expert], self._shift(expert))
            if self.top_k > 1:
                made = made * share.flatten()[slots, None]
            output.index_add_(0, tokens, made)
        return output.reshape(*x.shape[:-1], self.out_features)

    def _shift(self, expert: int) -> Tensor | None:
        return None if self.shift is None else self.shift[expert]

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        rank = self.left.shape[-1]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, experts={self.count}, rank={rank}, "
            f"gate_rank={self.gate_rank}, top_k={self.top_k}"
        )


def smile(
    model: nn.Module,
    vectors: Iterable[Tensors],
    *,
    rank: int,
    gate_rank: int,
    top_k: int = 1,
    rest: Tensors | None = None,
    skip: str | Iterable[str] = (),
) -> nn.Module:
    r"""A copy of the base model in which every linear layer has a low-rank expert for each task, and routes tokens.

    Each layer becomes a `SmileLinear`: the expert of task i is the best approximation of rank `rank` to what the task
    changed in the weight, :math:`\tau_i \approx U_i \Sigma_i V_i^T`, and what it changed in the bias. Nothing is
    trained, and no data is needed.

    Args:
        model: the base model: an encoder, or with its heads. Not written to.
        vectors: N mappings of name -> tensor, what each task changed; names that are missing did not change. Read one
            layer at a time.
        rank: of the experts, at least 1; a layer (m, n) has min(rank, m, n).
        gate_rank: number of leading input directions :math:`\tilde V_i` that the router looks at, likewise; all n
            directions would hold all of any token, for every task.
        top_k: K, experts for each token, 1 to N.
        rest: an update for all that has no experts, such as ``weighted_average(vectors)``; None: it stays as in the
            base, as in the paper's experiments.
        skip: names or glob patterns of `vectors` that are taken for unchanged.

    Returns:
        A new model of the same class, with the same methods, frozen, in the mode of `model`. Experts are buffers: its
        state dict can be saved as safetensors, and loaded into the result of another call with the same options. With
        `top_k` of 1 and ranks as large as the layers', an input of which all tokens choose task i is treated as by the
        model of task i, apart from the rest.

    Linear layers are those of ``nn.Linear``, and the four projections of a ``nn.MultiheadAttention`` (as in open_clip),
    which is replaced by a module that calls them as layers. All else is the rest: norms, embeddings, convolutions,
    GPT-2's ``Conv1D``, and weights that two modules share, such as a tied output head. A layer whose matrix the model
    reads itself, instead of calling the layer, works as in the base.

    Raises:
        InputError: no vectors, or ranks or `top_k` out of range. StateMismatchError: names or shapes disagree.
        NonFiniteError: NaN or infinity in a vector. TypeError: `model` is no module.

    Source: Tang et al., "SMILE: zero-shot sparse mixture of low-rank experts construction from pre-trained foundation
    models", 2024. Directions at the level that rounding makes, which a matrix of lower rank has, do not count for the
    router.

    Example:
        >>> import torch
        >>> base = nn.Linear(2, 1, bias=False)
        >>> _ = base.weight.data.zero_()
        >>> tasks = [{"weight": torch.tensor([[1.0, 0.0]])}, {"weight": torch.tensor([[0.0, 10.0]])}]
        >>> routed = smile(base, tasks, rank=1, gate_rank=1)
        >>> routed(torch.tensor([[3.0, 1.0], [1.0, 3.0]]))
        tensor([[ 3.],
                [30.]])
    """
    rank = whole_number(rank, "rank", at_least=1)
    gate_rank = whole_number(gate_rank, "gate_rank", at_least=1)
    top_k = whole_number(top_k, "top_k", at_least=1)
    sources = sources_of(vectors, "vectors")
    if top_k > len(sources):
        raise InputError(f"top_k: expected at most {len(sources)}, the number of vectors, got {top_k}")

    def make(layer: nn.Linear, changes: list[Change]) -> nn.Module:
        m, n = layer.weight.shape
        kept, looked_at = min(rank, m, n), min(gate_rank, m, n)
        found = [factored(change.weight, max(kept, looked_at)) for change in changes]
        right = torch.stack([directions for directions, _ in found])
        left = torch.stack([images[:kept].mT for _, images in found])
        shift = None if changes[0].bias is None else torch.stack([c.bias for c in changes if c.bias is not None])
        return SmileLinear(layer, right, left, shift, looked_at, top_k)

    return routed_copy(model, sources, make, rest=rest, skip=skip)
