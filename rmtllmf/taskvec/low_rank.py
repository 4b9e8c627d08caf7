"""The best low-rank factors of an update, and adapters made of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from .._state import Tensors, all_finite, inner_product, is_bendable, select_names, whole_number
from .._threads import share_out
from ..errors import InputError, NonFiniteError
from ._adapter_save import save_adapter
from ._sources import Source, source_of
from .vector import TaskVector

__all__ = ["LowRank", "low_rank"]


@dataclass(frozen=True, eq=False)
class LowRank:
    r"""Low-rank factors of an update, and what of it was not factored; see `low_rank`.

    Attributes:
        A: name -> factor (r, n).
        B: name -> factor (m, r): :math:`B A` is the matrix, the singular values split evenly. A convolution kernel
            (m, c, h, w) is the matrix of m rows and c h w columns.
        error: name -> :math:`\|\Delta - B A\|_F / \|\Delta\|_F` of a matrix, 0 if it is all zero.
        total_error: the same of the whole update, the rest included.
        rest: the entries that were not factored, as they are.
        shapes: name -> shape, of all entries in their order.

    Example:
        >>> import torch
        >>> low_rank({"w": torch.ones(2, 3), "b": torch.ones(2)}, rank=1)
        LowRank(1 matrices of rank 1, 1 other tensors, error ...)
    """

    A: Mapping[str, Tensor]
    B: Mapping[str, Tensor]
    error: Mapping[str, float]
    total_error: float
    rest: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]

    def dense(self) -> TaskVector:
        r"""The update that the factors make: :math:`B A` for every matrix, and the rest.

        Returns:
            A `TaskVector` with the names and shapes of the update that was factored; ties are kept.

        Raises:
            NonFiniteError: a product overflows.

        Example:
            >>> import torch
            >>> factors = low_rank({"w": torch.ones(2, 3), "b": torch.ones(2)}, rank=1)
            >>> torch.allclose(factors.dense()["w"], torch.ones(2, 3))
            True
        """
        made: dict[Hashable, Tensor] = {}
        result = {}
        for key, shape in self.shapes.items():
            if key not in self.A:
                result[key] = self.rest[key]
                continue
            pair = (id(self.A[key]), id(self.B[key]))
            if pair not in made:
                made[pair] = (self.B[key] @ self.A[key]).reshape(shape)
            result[key] = made[pair]
        return TaskVector(result)

    def save_adapter(
        self,
        folder: str | os.PathLike[str],
        base_model_name: str | None = None,
        *,
        model: nn.Module | None = None,
        embeddings: str | Iterable[str] | None = None,
        fan_in_fan_out: bool | None = None,
        rest: str = "error",
        overwrite: bool = False,
        task_type: str | None = None,
    ) -> None:
        r"""Write a LoRA adapter that ``PeftModel.from_pretrained`` loads, and whose merging adds :math:`B A`.

        The folder appears as a whole or not at all. Ranks that differ from the most common one are in ``rank_pattern``,
        with as much in ``alpha_pattern``, so that the scale is 1 everywhere.

        Args:
            folder: where adapter_config.json and adapter_model.safetensors go.
            base_model_name: what the configuration says the adapter is for: a name on a hub, or a path.
            model: the base model, which tells which layers are embeddings and which store (in, out), like GPT-2's; and
                without it:
            embeddings: names or globs of the factored embedding tables, () if there are none; None: none, and an error
                for names that look as if they were.
            fan_in_fan_out: whether the layers store (in, out); None: they do not, and an error for names that look as
                if they did.
            rest: what happens to what an adapter cannot hold (biases, norms, matrices that are no layer's weight, tied
                tensors, convolutions in groups): "error" if any of it is not zero, or "drop".
            overwrite: whether an adapter that is there is replaced, if the folder holds nothing but its two files.
            task_type: what the configuration says the model is: "CAUSAL_LM", "SEQ_2_SEQ_LM" or "FEATURE_EXTRACTION".
                With it and a `base_model_name` ``AutoPeftModelForCausalLM.from_pretrained`` loads base model and
                adapter in one go. Of the adapters that were fused it is in their configurations; an update does not
                know it. None: nothing is said, which ``PeftModel.from_pretrained(model, folder)`` does not mind.

        Raises:
            InputError: something would be lost, and `rest` is not "drop"; it cannot be told what is an embedding or
                stores (in, out); no factor is the weight of a layer; another
                `task_type`.
            FileExistsError: the folder exists, and `overwrite` is not set or would delete other files.
            StateMismatchError: `model` lacks a layer, or its weight has another shape.

        Source: PEFT, the checkpoint format of ``save_pretrained``.

        Example:
            >>> import tempfile, torch
            >>> from rmtllmf.taskvec import adapter_vector
            >>> update = {"fc.weight": torch.tensor([[2.0, 4.0], [1.0, 2.0]])}
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     low_rank(update, rank=1).save_adapter(f"{folder}/fused")
            ...     torch.allclose(adapter_vector(f"{folder}/fused")["fc.weight"], update["fc.weight"])
            True
        """
        save_adapter(
            self.A,
            self.B,
            self.rest,
            self.shapes,
            folder,
            base_model_name,
            model=model,
            embeddings=embeddings,
            fan_in_fan_out=fan_in_fan_out,
            rest_is=rest,
            overwrite=overwrite,
            task_type=task_type,
        )

    def __repr__(self) -> str:
        ranks = ", ".join(map(str, sorted({len(A) for A in self.A.values()})))
        return (
            f"LowRank({len(self.A)} matrices{ranks and f' of rank {ranks}'}, {len(self.rest)} other tensors, "
            f"error {self.total_error:.3g})"
        )


def low_rank(update: Tensors, rank: int, *, names: str | Iterable[str] | None = None) -> LowRank:
    r"""The best rank-r factors of every matrix of an update.

    .. math:: B A = \arg\min_{\operatorname{rank} X \le r} \|\Delta - X\|_F, \qquad
        \|\Delta - B A\|_F^2 = \sum_{i > r} \sigma_i^2

    so that fused adapters become an adapter again, in one line:
    ``low_rank(task_arithmetic(aligned([adapter_vector(p) for p in paths])), rank=16).save_adapter("fused")``. Nothing
    is lost where the rank is at least the sum of the adapters' ranks.

    Args:
        update: a mapping of name -> floating-point tensor: what a fusion rule returns, or a task vector.
        rank: r, at least 1; a matrix (m, n) gets min(r, m, n).
        names: names or globs of what is factored: tensors of two dimensions or more, as matrices of their first
            dimension by all others. None: all matrices, and kernels of two-dimensional convolutions (four dimensions).

    Returns:
        A `LowRank`: factors in float32 (float64 for float64), errors, and the entries that are not factored. The same
        bits for any number of threads; one matrix a thread. Tied tensors are factored once.

    Raises:
        InputError: no entries, a `rank` below 1, a name that matches nothing, or an update that requires a gradient,
            which the factors would not have. NonFiniteError: NaN or infinity.
        TypeError: an entry is not floating-point, or `rank` is not an int.

    Source: Eckart and Young, "The approximation of one matrix by another of lower rank", 1936. float32 matrices are
    projected onto the leading eigenvectors of their Gram matrix in float64, which is as exact as float32 can tell;
    float64 ones onto their singular vectors.

    Example:
        >>> import torch
        >>> factors = low_rank({"w": torch.diag(torch.tensor([4.0, 3.0, 0.0])), "b": torch.ones(3)}, rank=1)
        >>> factors.A["w"].shape, factors.B["w"].shape, list(factors.rest)
        (torch.Size([1, 3]), torch.Size([3, 1]), ['b'])
        >>> factors.error["w"]
        0.6
    """
    rank = whole_number(rank, "rank", at_least=1)
    source = source_of(update, "update")
    if not source.specs:
        raise InputError("update: expected at least one floating-point tensor, got an empty mapping")
    for key, spec in source.specs.items():
        if not spec.dtype.is_floating_point:
            raise TypeError(f"update[{key!r}] is {spec.dtype}; expected floating-point entries")
    if source.wants_gradient and torch.is_grad_enabled():
        raise InputError(
            "update: gradients do not flow through its factors; detach it, or call low_rank() under torch.no_grad()"
        )
    wanted = list(source.specs) if names is None else select_names(source.specs, names, "names")
    factored = [key for key in wanted if _is_matrix(key, source, by_name=names is not None)]
    first: dict[Hashable, str] = {}
    owner = {key: first.setdefault((source.identity(key), key in factored), key) for key in source.specs}
    work = sorted((key for key in factored if owner[key] == key), key=lambda key: (-source.specs[key].size, key))
    found: dict[str, tuple[Tensor, Tensor, float, float]] = {}

    def worker() -> Callable[[str], None]:
        def factor(key: str) -> None:
            found[key] = _factors(source, key, rank)

        return factor

    share_out(worker, work, alone=any(spec.device.type != "cpu" for spec in source.specs.values()))
    kept: dict[str, Tensor] = {}
    for key in source.specs:
        if owner[key] == key and key not in found:
            kept[key] = source[key]
            if not all_finite(kept[key]):
                raise NonFiniteError(f"{source.label}[{key!r}] holds NaN or infinity; expected finite numbers")
    chosen = set(factored)
    lost = math.hypot(*(found[owner[key]][2] for key in factored))
    sizes = [found[owner[key]][3] for key in factored]
    sizes += [inner_product(kept[owner[k]], kept[owner[k]]) ** 0.5 for k in source.specs if k not in chosen]
    return LowRank(
        A=MappingProxyType({key: found[owner[key]][0] for key in source.specs if key in chosen}),
        B=MappingProxyType({key: found[owner[key]][1] for key in source.specs if key in chosen}),
        error=MappingProxyType({k: _ratio(*found[owner[k]][2:]) for k in source.specs if k in chosen}),
        total_error=_ratio(lost, math.hypot(*sizes)),
        rest=MappingProxyType({key: kept[owner[key]] for key in source.specs if key not in chosen}),
        shapes=MappingProxyType({key: spec.shape for key, spec in source.specs.items()}),
    )


def _is_matrix(key: str, source: Source, *, by_name: bool) -> bool:
    spec = source.specs[key]
    matrix = len(spec.shape) in (2, 4) or (by_name and len(spec.shape) > 1)
    return matrix and spec.size > 0 and is_bendable(key, spec.dtype)


def _factors(source: Source, key: str, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """A, B, and the Frobenius norms of what they miss and of the whole."""
    spec = source.specs[key]
    matrix = source.whole(key).flatten(1)
    if not all_finite(matrix):
        raise NonFiniteError(f"{source.label}[{key!r}] holds NaN or infinity; expected finite numbers")
    precise = matrix.to(torch.float64)
    unit = float(precise.abs().max()) or 1.0  # so that no square over- or underflows
    precise = precise / unit
    wide = precise.shape[0] <= precise.shape[1]
    if spec.calculated_in == torch.float64:
        left = torch.linalg.svd(precise if wide else precise.T, full_matrices=False)[0][:, :rank]
    else:
        gram = precise @ precise.T if wide else precise.T @ precise
        left = torch.linalg.eigh(gram)[1][:, -rank:].flip(1)
    right = left.T @ (precise if wide else precise.T)
    values = torch.linalg.vector_norm(right, dim=1, keepdim=True)
    root = torch.where(values > 0, values, 1.0).sqrt()
    right = right / root * math.sqrt(unit)
    left = left * (values.sqrt() * math.sqrt(unit)).T
    A, B = (right, left) if wide else (left.T, right.T)
    A, B = (factor.to(spec.calculated_in).contiguous() for factor in (A, B))
    missed = precise - B.to(torch.float64) / unit @ A.to(torch.float64)
    return A, B, unit * inner_product(missed, missed) ** 0.5, unit * inner_product(precise, precise) ** 0.5


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
