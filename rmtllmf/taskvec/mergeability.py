"""Whether a model was moved away from its base by a transform that leaves its function as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import hypot

import torch
from torch import Tensor

from .._display import counted
from .._state import StateLike, as_state, check_finite, check_keys, check_shapes, whole_number, wide
from .._threads import share_out
from ..errors import InputError, UnmergeableWarning
from ._hidden import Pair, hidden_pairs

__all__ = ["HiddenLayer", "Mergeability", "mergeability"]

CANCELLED = 0.5  # cancellation below which a change is no fine-tuning: that has about 1, or more
LEAST_CHANGE = 0.01  # relative change of the matrices below which merging is not harmed
ALIKE = 0.8  # cosine of a hidden unit with the one of the base that it was
ROWS = 1024  # units compared with all others at once


@dataclass(frozen=True)
class HiddenLayer:
    r"""What became of two matrices A (m, a) and B (m, b), of which a model only uses the product :math:`A^T B`.

    Attributes:
        kind: "query and key", "value and output" or "MLP" (of which the product is what a linear one would use).
        names: of the tensors.
        change: :math:`\sqrt{(\|\Delta A\|^2 + \|\Delta B\|^2) / (\|A\|^2 + \|B\|^2)}`.
        product_change: :math:`\|\Delta(A^T B)\| / \|A^T B\|`.
        cancellation: :math:`\|X + Y + Z\| / \sqrt{\|X\|^2 + \|Y\|^2 + \|Z\|^2}` of the parts :math:`X = \Delta A^T B`,
            :math:`Y = A^T \Delta B`, :math:`Z = \Delta A^T \Delta B` of the product's change: about 1 if both matrices
            changed on their own, more if they pulled together, 0 if one takes back what the other does.
        moved: share of the hidden units that are found in the place of another one of the base; looked for in an MLP
            that is not mergeable.
        mergeable: whether the change may come from training.

    Example:
        >>> import torch
        >>> base = {"fc1.weight": torch.eye(3), "fc2.weight": torch.eye(3)}
        >>> (layer,) = mergeability(base, base | {"fc2.weight": 1.5 * torch.eye(3)}).layers
        >>> layer.kind, layer.product_change, layer.mergeable
        ('MLP', 0.5, True)
    """

    kind: str
    names: tuple[str, ...]
    change: float
    product_change: float
    cancellation: float
    moved: float
    mergeable: bool


@dataclass(frozen=True)
class Mergeability:
    """What `mergeability` found.

    Attributes:
        layers: every attention block's two pairs of matrices, and every MLP's one.
        unchecked: names of matrices of attention whose layout was not understood.

    Example: of a permutation of an MLP's hidden units.
        >>> import torch
        >>> base = {"fc1.weight": torch.eye(3), "fc2.weight": torch.eye(3)}
        >>> order = torch.tensor([1, 0, 2])
        >>> moved = {"fc1.weight": torch.eye(3)[order], "fc2.weight": torch.eye(3)[:, order]}
        >>> with warnings.catch_warnings(action="ignore"):
        ...     report = mergeability(base, moved)
        >>> report.mergeable, report.transformed[0].product_change
        (False, 0.0)
    """

    layers: tuple[HiddenLayer, ...]
    unchecked: tuple[str, ...]

    def __repr__(self) -> str:
        lines = [f"Mergeability({counted(len(self.layers), 'hidden layer')}, {len(self.transformed)} not mergeable"]
        lines[0] += f", {counted(len(self.unchecked), 'name')} unchecked)" if self.unchecked else ")"
        for layer in self.transformed:
            lines.append(
                f"  {layer.kind} of {', '.join(layer.names)}: changed by {layer.change:.2f}, "
                f"their product by {layer.product_change:.2f}"
            )
        return "\n".join(lines)

    @property
    def transformed(self) -> tuple[HiddenLayer, ...]:
        """The layers that are not mergeable."""
        return tuple(layer for layer in self.layers if not layer.mergeable)

    @property
    def mergeable(self) -> bool:
        """Whether all are."""
        return not self.transformed


def mergeability(base: StateLike, finetuned: StateLike, *, head_size: int | None = None) -> Mergeability:
    r"""Whether fine-tuning alone made `finetuned` of `base`, or also a transform that only merging notices.

    .. math:: (Q, K) \to (T Q, T^{-T} K), \qquad (V, O) \to (T V, O T^{-1}), \qquad (W_1, W_2) \to (P W_1, W_2 P^T)

    leave a model as it is, for scales or any invertible T of a head, and permutations P of an MLP's hidden units, but
    its matrices lie far from the base's then, and an average of both is of no use. Such a change of one matrix is taken
    back by the other, while what training does to them adds up: gradients lie across the directions in which the
    product stays. See `HiddenLayer` for how this is measured; a layer is not mergeable below a cancellation of 0.5, if
    its matrices changed by more than 1 %.

    Args:
        base, finetuned: modules, state dicts or paths of safetensors files with the same names and shapes.
        head_size: rows of a head, needed where keys have fewer heads than queries, and for GPT-NeoX's and BLOOM's
            ``query_key_value``; without it these are in `Mergeability.unchecked`.

    Returns:
        A `Mergeability`. Names of open_clip, timm, torch, torchvision and Hugging Face models are known, with any
        prefix.

    Raises:
        InputError: no attention block and no MLP is known by its names. StateMismatchError: names or shapes disagree.
        NonFiniteError: NaN or infinity.

    Warns:
        UnmergeableWarning: naming the layers that are not mergeable.

    Source: the transforms are those of Wei, Yu and Sakuma, "Disrupting model merging: a parameter-level defense without
    sacrificing accuracy", 2025 (scales for every dimension of a head, permutations), and any invertible one. The test
    is the library's own.

    Example:
        >>> import torch
        >>> draw = torch.Generator().manual_seed(0)
        >>> base = {f"attn.{name}.weight": torch.randn(32, 32, generator=draw) for name in ("q", "k", "v", "o")}
        >>> tuned = {key: value + 0.1 * torch.randn(32, 32, generator=draw) for key, value in base.items()}
        >>> mergeability(base, tuned).mergeable
        True
        >>> tuned["attn.q.weight"] *= 3
        >>> tuned["attn.k.weight"] /= 3
        >>> with warnings.catch_warnings(action="ignore"):
        ...     [(layer.kind, round(layer.cancellation, 1)) for layer in mergeability(base, tuned).transformed]
        [('query and key', 0.1)]
    """
    head_size = None if head_size is None else whole_number(head_size, "head_size", at_least=1)
    before, after = as_state(base, "base"), as_state(finetuned, "finetuned")
    check_keys(after, before, "finetuned", "base")
    check_shapes(after, before, "finetuned", "base")
    pairs, unknown = hidden_pairs(before, head_size)
    if not pairs and not unknown:
        raise InputError("base: no attention block and no MLP is known by its names")
    names = {name for pair in pairs for name in pair.names}
    for state, argument in ((before, "base"), (after, "finetuned")):
        check_finite({name: state[name] for name in names}, argument)
    layers: list[HiddenLayer | None] = [None] * len(pairs)

    def worker() -> Callable[[int], None]:
        def work(index: int) -> None:
            layers[index] = _compared(pairs[index], before, after)

        return work

    share_out(worker, range(len(pairs)), alone=any(before[name].device.type != "cpu" for name in names))
    report = Mergeability(tuple(layer for layer in layers if layer is not None), tuple(unknown))
    if not report.mergeable:
        first = report.transformed[0]
        warnings.warn(
            f"finetuned: {len(report.transformed)} of {len(report.layers)} layers lie far from the base's, though what "
            f"they do is the same: {first.kind} of {', '.join(map(repr, first.names))} and the like. Merging destroys "
            "such a model, and what it is merged with; ask its author for one that can be merged",
            UnmergeableWarning,
            stacklevel=2,
        )
    return report


def _compared(pair: Pair, before: dict[str, Tensor], after: dict[str, Tensor]) -> HiddenLayer:
    A, B = (wide(matrix.detach()) for matrix in pair.matrices(before))
    newA, newB = (wide(matrix.detach()).to(A.device) for matrix in pair.matrices(after))
    dA, dB = newA - A, newB - B
    change = hypot(_norm(dA), _norm(dB)) / (hypot(_norm(A), _norm(B)) or 1.0)
    X, Y, Z = dA.mT @ B, A.mT @ dB, dA.mT @ dB
    together, apart = _norm(X + Y + Z), hypot(_norm(X), _norm(Y), _norm(Z))
    cancellation = together / apart if apart else 1.0
    mergeable = cancellation >= CANCELLED or change < LEAST_CHANGE
    moved = 0.0 if mergeable or pair.kind != "MLP" else _moved(torch.cat([A, B], 1), torch.cat([newA, newB], 1))
    product = _norm(A.mT @ B)
    return HiddenLayer(pair.kind, pair.names, change, together / (product or 1.0), cancellation, moved, mergeable)


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def _moved(units: Tensor, found: Tensor) -> float:
    """Share of the rows of `found` that are more like another row of `units` than like their own."""
    units, found = (torch.nn.functional.normalize(rows, dim=1) for rows in (units, found))
    count = 0
    for start in range(0, len(found), ROWS):
        rows = found[start : start + ROWS]
        likest, place = (rows @ units.mT).max(1)
        own = torch.arange(start, start + len(rows), device=rows.device)
        count += int(((place != own) & (likest > ALIKE)).sum())
    return count / len(found)
