"""How alike task vectors are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._state import Tensors, as_vectors, check_finite, is_bendable
from ..errors import InputError

__all__ = ["cosine_similarity"]

_BLOCK = 1 << 20  # entries a block: float64 copies of the vectors stay small


def cosine_similarity(vectors: Sequence[Tensors]) -> Tensor:
    r"""The cosines of the angles between N vectors, each a mapping of name -> tensor.

    .. math:: S_{ij} = \frac{\langle \tau_i, \tau_j \rangle}{\lVert \tau_i \rVert\, \lVert \tau_j \rVert}

    Vectors of tasks that do not interfere are close to orthogonal. Accumulated in float64 over the sorted names,
    tensor by tensor, so that nothing is concatenated and the order of the names does not matter.

    Args:
        vectors: N mappings with the same keys and shapes; the floating-point entries count, without running
            statistics of normalisation layers.

    Returns:
        (N, N) float64 on the device of the first vector: symmetric, within -1 and 1, exactly 1 on the diagonal.

    Raises:
        InputError: no vectors, or one that is all zero. StateMismatchError: keys or shapes disagree.
        NonFiniteError: NaN or infinity. TypeError: not mappings, or complex entries.

    Source: Ilharco et al., "Editing models with task arithmetic", 2023, figure 5; R-MTLLMF, figures 3 and 4.

    Example:
        >>> import torch
        >>> cosine_similarity([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([3.0, 4.0])}])
        tensor([[1.0000, 0.6000],
                [0.6000, 1.0000]], dtype=torch.float64)
    """
    vectors = as_vectors(vectors, "vectors")
    keys = sorted(key for key, tensor in vectors[0].items() if is_bendable(key, tensor))
    if not keys:
        raise InputError("vectors: hold no floating-point entries, so they have no direction")
    for index, vector in enumerate(vectors):
        check_finite({key: vector[key] for key in keys}, f"vectors[{index}]")
    peaks = [max((float(v[key].detach().abs().max()) for key in keys if v[key].numel()), default=0.0) for v in vectors]
    for index, peak in enumerate(peaks):
        if peak == 0:
            raise InputError(f"vectors[{index}]: is all zero, so that it has no direction")
    device = vectors[0][keys[0]].device
    # in units of the largest entry squares neither overflow nor vanish
    scale = torch.tensor(peaks, dtype=torch.float64, device=device)[:, None]
    gram = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=device)
    for key in keys:
        flat = [vector[key].detach().reshape(-1) for vector in vectors]
        for start in range(0, len(flat[0]), _BLOCK):
            block = torch.stack([part[start : start + _BLOCK].to(device, torch.float64) for part in flat]) / scale
            gram += block @ block.mT
    norms = gram.diagonal().sqrt()
    similarity = (gram + gram.mT) / 2 / torch.outer(norms, norms)
    return similarity.clamp_(-1, 1).fill_diagonal_(1.0)
