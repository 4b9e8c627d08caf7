"""TALL-mask compression: the models of many tasks as one vector and a bit mask for each."""

from __future__ import annotations

from collections.abc import Iterable

from typing_extensions import Unpack

from ..._state import Tensors
from .._engine import Fusion, Piece
from .._options import FusionOptions
from ..masked_vectors import MaskedVectors, MaskRecorder
from .consensus import Election, Threshold

__all__ = ["tall_compression"]


def tall_compression(
    vectors: Iterable[Tensors],
    threshold: Threshold = 0.4,
    *,
    merged: Tensors | None = None,
    **options: Unpack[FusionOptions],
) -> MaskedVectors:
    r"""N task vectors as their sum and, for each task, one bit an entry that says whether it is taken from there.

    .. math:: \tau_q \approx m_q \odot \tau_{\text{MTL}}, \qquad \tau_{\text{MTL}} = \sum_{q=1}^{N} \tau_q

    with the masks :math:`m_q` of `tall_masks`. Each task's model comes back as
    ``result.task_vector(q).apply_to(base)``; for n entries in float32, base, sum and masks are (64 + N) n bits, where N
    models are 32 N n. An entry that only one task changed comes back exactly.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        threshold: of the masks, see `tall_masks`.
        merged: what takes the place of :math:`\tau_{\text{MTL}}`, for example ``ties(vectors, combine="sum")``. Not
            written to.
        options: as for every rule, see `FusionOptions`. Weights multiply the vectors, which are what is taken back.

    Returns:
        A `MaskedVectors`, with 1 for all factors: ``.save(path)`` writes it, ``.storage_bits`` says how large it is.
        Memory is that of the result and a few pieces a thread.

    Raises:
        InputError: `threshold` is negative; or called by ``fuse``, which needs a rule that makes one update.
        StateMismatchError: `merged` has other names, shapes or ties. NonFiniteError: NaN or infinity in a vector.

    Source: Wang et al., "Localizing task information for improved model merging and compression", 2024, sections 4 and
    5.

    Example:
        >>> import torch
        >>> stored = tall_compression([{"w": torch.tensor([4.0, 0.0, 3.0])}, {"w": torch.tensor([0.0, 2.0, 3.0])}])
        >>> dict(stored.unified)
        {'w': tensor([4., 2., 6.])}
        >>> [stored.task_vector(task)["w"].tolist() for task in range(2)]
        [[4.0, 0.0, 6.0], [0.0, 2.0, 6.0]]
        >>> stored.storage_bits  # 3 entries in float32, a byte for each mask, two factors
        240
    """
    fusion = Fusion(vectors, options)
    recorder = MaskRecorder(fusion)
    election = Election(fusion, threshold, merged)

    def combine(piece: Piece) -> None:
        total = election.total(piece, piece.into)
        for task, elected in enumerate(election.elected(piece, total)):
            recorder.put(task, piece, elected)
        piece.into.copy_(total)

    total = fusion.by_entry(combine, positional=True)
    return MaskedVectors(total, recorder.done(), (1.0,) * fusion.count)
