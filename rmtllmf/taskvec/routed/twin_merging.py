"""Twin-Merging: what tasks share in one model, what each has for itself in low-rank factors, mixed for every input."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..._call import check_model
from ..._state import Tensors, is_bendable, quoted, whole_number
from ..._tasks import device_of
from ...errors import InputError, ShapeError, StateMismatchError
from .._sources import source_of, sources_of
from ..rules.arithmetic import task_arithmetic
from ._replace import Change, factored, routed_copy

__all__ = ["TwinLinear", "TwinMerged", "twin_merging"]


class _Mixture(threading.local):
    """The weights (B, N) that the layers of one model use at the moment, on this thread; None: the shared part alone.

    `sequence_first`: the model has modules that want the sequence in front of the samples.
    """

    weights: Tensor | None = None

    def __init__(self, sequence_first: bool) -> None:
        self.sequence_first = sequence_first

    def __reduce__(self) -> tuple[type, tuple[bool]]:
        return _Mixture, (self.sequence_first,)

    @contextmanager
    def of(self, weights: Tensor | None) -> Iterator[None]:
        before, self.weights = self.weights, weights
        try:
            yield
        finally:
            self.weights = before


def mixture_of(model: nn.Module) -> _Mixture:
    """A new one, for the layers of a copy of `model`."""
    return _Mixture(any(getattr(module, "batch_first", True) is False for module in model.modules()))


class TwinLinear(nn.Module):
    r"""A linear layer, and N low-rank changes of which every sample has its own mixture.

    .. math:: y_s = W x_s + b + \sum_{t=1}^{N} w_{st} (U_t \Sigma_t V_t^T x_s + \Delta b_t)

    for sample s: two thin matrix products for a batch, whatever its weights. Made by `twin_merging`.

    Attributes:
        weight, bias: (m, n) and (m,) or None, of the shared model.
        right: (rank, N, n), the leading right singular vectors of every task's own part.
        left: (rank, N, m), its left singular vectors times the singular values.
        shift: (N, m), its own part of the bias; None without one.
    """

    right: Tensor
    left: Tensor
    shift: Tensor | None

    def __init__(self, layer: nn.Linear, right: Tensor, left: Tensor, shift: Tensor | None, mixture: _Mixture) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("right", right.to(layer.weight).contiguous())
        self.register_buffer("left", left.to(layer.weight).contiguous())
        self.register_buffer("shift", None if shift is None else shift.to(layer.weight).contiguous())
        self.mixture = mixture

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., n) -> (B, ..., m); the samples may also lie along the second dimension, behind the sequence."""
        output = linear(x, self.weight, self.bias)
        weights = self.mixture.weights
        if weights is None:
            return output
        rank, count = self.right.shape[:2]
        shares = _spread(weights.to(x.dtype), x, self.mixture.sequence_first)
        own = linear(x, self.right.flatten(0, 1)).unflatten(-1, (rank, count)) * shares.unsqueeze(-2)
        output = output + own.flatten(-2) @ self.left.flatten(0, 1)
        return output if self.shift is None else output + shares @ self.shift

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        rank, count = self.right.shape[:2]
        return f"in_features={self.in_features}, out_features={self.out_features}, tasks={count}, rank={rank}"


def _spread(weights: Tensor, x: Tensor, sequence_first: bool) -> Tensor:
    """`weights` (B, N), so that they broadcast against (..., N) with the leading dimensions of `x`."""
    samples, leading = len(weights), x.shape[:-1]
    second = len(leading) > 1 and leading[1] == samples
    if samples == 1:
        return weights.view(*[1] * len(leading), -1)
    if second and sequence_first:
        if leading[0] == samples:
            raise ShapeError(
                f"a layer was given {tuple(x.shape)}: it cannot be told which dimension are the samples, because the "
                "model has modules with batch_first=False; split the batch"
            )
        return weights.view(1, samples, *[1] * (len(leading) - 2), -1)
    if leading and leading[0] % samples == 0:
        each = weights.repeat_interleave(leading[0] // samples, 0)  # windows or tokens of one sample lie together
        return each.view(leading[0], *[1] * (len(leading) - 1), -1)
    if second:
        return weights.view(1, samples, *[1] * (len(leading) - 2), -1)
    raise ShapeError(
        f"a layer was given {tuple(x.shape)} for a batch of {samples}: expected the samples along the first dimension, "
        "or along the second"
    )


class TwinMerged(nn.Module):
    r"""A shared model, what every task has beside it, and a router that mixes this for every sample.

    .. math:: \theta(x) = \theta_s + \sum_{t=1}^{N} w_t\, \mathrm{SVD}_r(\theta_t - \theta_s), \qquad
        w = \mathrm{softmax}\,R(E(x; \theta_s))

    A call runs the model twice: the shared one for the embedding E, then the one that is mixed for each sample. Made by
    `twin_merging`; frozen but for the router.

    Attributes:
        model: a copy of the base model in which linear layers are `TwinLinear`.
        router: embeddings (B, D) -> logits (B, N), such as `train_router` makes; None: only `mixed` can be called.
        count: N.

    Example:
        >>> import torch
        >>> tasks = [{"weight": torch.eye(2)}, {"weight": -torch.eye(2)}]
        >>> twin = twin_merging(nn.Linear(2, 2), tasks, rank=1, router=nn.Linear(2, 2))
        >>> twin.route(torch.ones(5, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        count: int,
        mixture: _Mixture,
        router: nn.Module | None,
        embed: Callable[[Any], Tensor] | None,
    ) -> None:
        super().__init__()
        self.model, self.router, self.embed_with, self.count = model, router, embed or _pooled, count
        self.mixture = mixture

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model makes of its usual arguments, with the weights that the router finds for each sample."""
        return self.mixed(self.route(*args, **kwargs), *args, **kwargs)

    def embed(self, *args: Any, **kwargs: Any) -> Tensor:
        """(B, D), what the shared model makes of its usual arguments, without gradients."""
        with torch.no_grad(), self.mixture.of(None):
            embeddings = self.embed_with(self.model(*args, **kwargs))
        if not isinstance(embeddings, Tensor) or embeddings.ndim != 2:
            found = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise ShapeError(f"embed: expected a tensor (B, D), got {found}")
        return embeddings

    def route(self, *args: Any, **kwargs: Any) -> Tensor:
        """(B, N) the weights of the tasks, for the model's usual arguments.

        Raises:
            InputError: there is no router.
        """
        if self.router is None:
            raise InputError("router: there is none yet; train_router makes one, and mixed() takes given weights")
        logits: Tensor = self.router(self.embed(*args, **kwargs))
        return logits.softmax(-1)

    def mixed(self, weights: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's output with given weights (B, N), or (N,) for all samples, in place of the router's.

        Raises:
            ShapeError: other shapes, or a layer that is not given the samples along its first or second dimension.
        """
        weights = torch.as_tensor(weights)
        if weights.ndim == 1:
            weights = weights[None]
        if weights.ndim != 2 or weights.shape[1] != self.count:
            raise ShapeError(f"weights: expected shape (B, {self.count}), got {tuple(weights.shape)}")
        with self.mixture.of(weights.to(device_of(self.model))):
            return self.model(*args, **kwargs)


def twin_merging(
    model: nn.Module,
    vectors: Iterable[Tensors],
    *,
    rank: int,
    shared: Tensors | None = None,
    router: nn.Module | None = None,
    embed: Callable[[Any], Tensor] | None = None,
    skip: str | Iterable[str] = (),
) -> TwinMerged:
    r"""A model that adds to what all tasks share, for every sample, what the tasks that it belongs to have beside it.

    .. math:: \theta(x) = \theta_s + \sum_{t=1}^{N} w_t(x)\, \mathrm{SVD}_r(\theta_t - \theta_s), \qquad
        \theta_s = \theta_0 + \lambda \sum_t \tau_t

    The mixture is never written out: a linear layer adds, for a whole batch, two thin products to its own, so that
    samples of different tasks can share a batch. The rest (norms, embeddings, convolutions, GPT-2's ``Conv1D``, weights
    that two modules share) is that of :math:`\theta_s` for all samples; the paper's code mixes it too, one sample at a
    time.

    Args:
        model: the base model, :math:`\theta_0`: an encoder, or with its heads. Not written to.
        vectors: N mappings of name -> tensor, :math:`\tau_t`, what each task changed; read one layer at a time.
        rank: r, of each linear layer's part, at least 1; a layer (m, n) has min(r, m, n). Biases are kept whole.
        shared: the update from :math:`\theta_0` to :math:`\theta_s`, of any rule; None: ``task_arithmetic(vectors)``.
        router: embeddings (B, D) -> logits (B, N); None: `train_router` makes one.
        embed: what the model returns -> embeddings (B, D). None: that itself, the mean over tokens of (B, T, D), and of
            ``last_hidden_state`` where the output has one.
        skip: names or glob patterns of `vectors` that are taken for unchanged.

    Returns:
        A `TwinMerged`, in the mode of `model`. Its state dict can be saved as safetensors. With weights of 1 for task t
        and 0 for the others, and a rank as large as the layers', it treats an input as the model of task t does, apart
        from the rest. Linear layers are those of ``nn.Linear`` and the four projections of a ``nn.MultiheadAttention``,
        which is replaced by a module that calls them as layers.

    Raises:
        InputError: no vectors, or a `rank` out of range. StateMismatchError: names or shapes disagree.
        NonFiniteError: NaN or infinity in a vector. TypeError: `model` is no module.

    Source: Lu et al., "Twin-Merging: dynamic integration of modular expertise in model merging", 2024.

    Example:
        >>> import torch
        >>> base = nn.Linear(2, 1, bias=False)
        >>> _ = base.weight.data.zero_()
        >>> tasks = [{"weight": torch.tensor([[1.0, 0.0]])}, {"weight": torch.tensor([[0.0, 10.0]])}]
        >>> twin = twin_merging(base, tasks, rank=1)
        >>> twin.mixed(torch.eye(2), torch.tensor([[3.0, 1.0], [3.0, 1.0]]))
        tensor([[ 3.0000],
                [10.0000]])
    """
    rank = whole_number(rank, "rank", at_least=1)
    sources = sources_of(vectors, "vectors")
    common = source_of(task_arithmetic(sources) if shared is None else shared, "shared")
    names = [key for key, spec in sources[0].specs.items() if is_bendable(key, spec.dtype)]
    if missing := set(names) - set(common.specs):
        raise StateMismatchError(f"shared lacks {quoted(missing)}, which the vectors have")
    check_model(model)
    mixture = mixture_of(model)

    def make(layer: nn.Linear, changes: list[Change]) -> nn.Module:
        *own, everyones = changes
        kept = min(rank, *layer.weight.shape)
        found = [factored(change.weight - everyones.weight, kept) for change in own]
        right, left = (torch.stack(parts, 1) for parts in zip(*found, strict=True))
        layer.weight.add_(everyones.weight.to(layer.weight.dtype))
        shift = None
        if layer.bias is not None and everyones.bias is not None:
            shift = torch.stack([change.bias - everyones.bias for change in own if change.bias is not None])
            layer.bias.add_(everyones.bias.to(layer.bias.dtype))
        return TwinLinear(layer, right, left, shift, mixture)

    merged = routed_copy(model, [*sources, common], make, rest=common, skip=skip)
    return TwinMerged(merged, len(sources), mixture, router, embed).train(model.training)


def _pooled(output: Any) -> Tensor:
    hidden = getattr(output, "last_hidden_state", output)
    hidden = hidden[0] if isinstance(hidden, tuple) and hidden else hidden
    if not isinstance(hidden, Tensor):
        raise TypeError(f"embed: expected one that makes (B, D) of the model's {type(output).__name__}")
    return hidden.mean(1) if hidden.ndim == 3 else hidden
