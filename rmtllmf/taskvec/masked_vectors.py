"""Several task vectors as one, with a bit mask and a factor for each task: what EMR and TALL masks store."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .._sharded import is_sharded, local, part_of, sharded_like
from .._state import all_finite, identity, map_tied, quoted, unclipped, whole_number, wide
from ..errors import InputError
from ._bits import Masks, packed, unpacked
from ._engine import Fusion, Piece
from ._files import check_vector, load_tensors, save_tensors
from ._sinks import Memory
from .vector import TaskVector

__all__ = ["MaskedVectors"]

_KIND = "masked_vectors"
_RESCALERS = "rescalers"


@dataclass(frozen=True, eq=False)
class MaskedVectors:
    r"""N task vectors, stored as one vector, N bit masks and N factors.

    .. math:: \tau_q \approx \lambda_q \, m_q \odot \tau

    Made by `emr` and `tall_compression`.

    Attributes:
        unified: :math:`\tau`, the vector that all tasks share.
        masks: for each task a mapping of name -> boolean tensor :math:`m_q`, of which a bit an entry is stored: the
            tensor is made when it is read.
        rescalers: :math:`\lambda_q`, a number for each task.

    Example:
        >>> import torch
        >>> from rmtllmf.taskvec import tall_compression
        >>> stored = tall_compression([{"w": torch.tensor([4.0, 0.1])}, {"w": torch.tensor([0.1, 2.0])}])
        >>> stored.masks[0]["w"], dict(stored.task_vector(0))
        (tensor([ True, False]), {'w': tensor([4.1000, 0.0000])})
    """

    unified: TaskVector
    masks: tuple[Mapping[str, Tensor], ...]
    rescalers: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.masks)

    def task_vector(self, task: int) -> TaskVector:
        r"""What is stored of one task: :math:`\lambda_q \, m_q \odot \tau`.

        Args:
            task: q, from 0 on.

        Returns:
            A `TaskVector` in the dtype of `unified`; ``.apply_to(base)`` makes the task's model. Ties are kept.

        Raises:
            InputError: there is no such task. NonFiniteError: the rescaled entries overflow the dtype.

        Example: see `MaskedVectors`.
        """
        task = whole_number(task, "task", at_least=0)
        if task >= len(self.masks):
            raise InputError(f"task: expected a number below {len(self.masks)}, that of the tasks, got {task}")
        mask, factor = self.masks[task], self.rescalers[task]

        def restored(tensor: Tensor, bits: Tensor) -> Tensor:
            chosen = unpacked(bits, tuple(tensor.shape))
            values = local(tensor)
            if is_sharded(tensor):
                chosen = part_of(chosen, tensor)
            scaled = torch.where(chosen, wide(values) * factor, 0.0)
            values = unclipped(scaled, values.dtype).to(values.dtype)
            return sharded_like(values, tensor) if is_sharded(tensor) else values

        return TaskVector._finite(map_tied(restored, self.unified, self.unified, _bits(mask)), f"task {task}")

    @property
    def storage_bits(self) -> int:
        """Bits that are stored: the vector's, one a task for each entry (whole bytes a tensor), 64 for each factor.

        Tied names count once. The base model is needed beside them: for n entries in float32, (64 + N) n bits in all
        stand for the 32 N n of N models.
        """
        tensors = [*self.unified.values(), *(bits for mask in self.masks for bits in _bits(mask).values())]
        stored = {identity(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}
        return 8 * sum(stored.values()) + 64 * len(self.rescalers)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, atomically: a reader sees the old file or the new one, never a part.

        Args:
            path: ends in ``.safetensors``. Tied tensors are stored once, masks as bits.

        Raises:
            InputError: another ending. OSError: the file cannot be written; what was there stays.

        Example:
            >>> import tempfile, torch
            >>> from rmtllmf.taskvec import emr
            >>> stored = emr([{"w": torch.tensor([4.0, -1.0])}, {"w": torch.tensor([2.0, 3.0])}])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     stored.save(f"{folder}/tasks.safetensors")
            ...     MaskedVectors.load(f"{folder}/tasks.safetensors")
            MaskedVectors(2 tasks, 1 tensors, 2 entries, float32)
        """
        tensors = {f"vector.{key}": tensor for key, tensor in self.unified.items()}
        for task, mask in enumerate(self.masks):
            tensors |= {f"mask.{task}.{key}": bits for key, bits in _bits(mask).items()}
        tensors[_RESCALERS] = torch.tensor(self.rescalers, dtype=torch.float64)
        save_tensors(tensors, path, kind=_KIND)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> MaskedVectors:
        """Read what `save` wrote; nothing is ever unpickled.

        Raises:
            InputError: the file holds something else, or contradicts itself. FileNotFoundError: there is none.
            NonFiniteError: NaN or infinity in it.

        Example: see `save`.
        """
        tensors = load_tensors(path, device, kind=_KIND, writer="MaskedVectors.save")
        damaged = f"path: {os.fspath(path)!r} is damaged"
        rescalers = tensors.pop(_RESCALERS, torch.tensor(0))
        if rescalers.ndim != 1 or rescalers.dtype != torch.float64 or not len(rescalers) or not all_finite(rescalers):
            raise InputError(f"{damaged}: it holds no finite rescalers")
        vector = {key.removeprefix("vector."): value for key, value in tensors.items() if key.startswith("vector.")}
        check_vector(vector, path)
        sizes = {key: (-(-tensor.numel() // 8),) for key, tensor in vector.items()}
        bits: list[dict[str, Tensor]] = [{} for _ in range(len(rescalers))]
        places = {f"mask.{task}": masks for task, masks in enumerate(bits)}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            task, _, key = rest.partition(".")
            if kind == "mask" and f"mask.{task}" in places:
                places[f"mask.{task}"][key] = value
            elif kind != "vector":
                raise InputError(f"{damaged}: {name!r} is of none of its {len(bits)} tasks")
        for number, masks in enumerate(bits):
            wrong = [key for key in {**sizes, **masks} if key not in masks or masks[key].dtype != torch.uint8]
            wrong += [key for key in masks if key not in wrong and masks[key].shape != sizes.get(key)]
            if wrong:
                raise InputError(f"{damaged}: the mask of task {number} for {quoted(wrong)}")
        shapes = {key: tuple(tensor.shape) for key, tensor in vector.items()}
        masks_of = tuple(Masks(masks, shapes) for masks in bits)
        return cls(TaskVector._of(vector), masks_of, tuple(rescalers.tolist()))

    def __repr__(self) -> str:
        entries = repr(self.unified).removeprefix("TaskVector(").removesuffix(")")
        return f"MaskedVectors({len(self)} tasks, {entries})"


class MaskRecorder:
    """Collects the masks of all tasks while a fusion calculates the vector that they go with."""

    def __init__(self, fusion: Fusion) -> None:
        if not isinstance(fusion.sink, Memory):
            raise InputError("rule: this one stores a vector for each task, and makes no single update to be applied")
        self.fusion = fusion
        self.bits = [
            {key: torch.empty(-(-s.size // 8), dtype=torch.uint8, device=s.device) for key, s in fusion.specs.items()}
            for _ in range(fusion.count)
        ]

    def put(self, task: int, piece: Piece, chosen: Tensor) -> None:
        """Keep the mask of a piece; pieces start at multiples of 8 entries."""
        self.bits[task][piece.key][piece.start // 8 : -(-piece.stop // 8)] = packed(chosen)

    def done(self) -> tuple[Masks, ...]:
        """The masks, ties included, in the order of the vectors' names."""
        fusion = self.fusion
        owner = {**{key: key for key in fusion.keys}, **fusion.alias}
        names = [key for key in fusion.sources[0].specs if key in owner]
        shapes = {key: fusion.specs[owner[key]].shape for key in names}
        return tuple(Masks({key: bits[owner[key]] for key in names}, shapes) for bits in self.bits)


def _bits(mask: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The packed entries; those of a caller's own booleans are packed here."""
    if isinstance(mask, Masks):
        return mask.bits
    return map_tied(lambda chosen: packed(chosen.reshape(-1)), mask, mask)
