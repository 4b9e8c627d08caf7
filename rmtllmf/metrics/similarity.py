"""How alike task vectors are, as a whole and layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .._state import Tensors, as_vectors, check_finite, is_bendable, select_names
from ..errors import InputError
from ._layers import layers_of

__all__ = ["cosine_similarity", "layer_cosine_similarity"]

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
    checked, keys = _checked(vectors)
    similarity = _cosines(checked, keys)
    for index, zero in enumerate(similarity.diagonal().isnan().tolist()):
        if zero:
            raise InputError(f"vectors[{index}]: is all zero, so that it has no direction")
    return similarity


def layer_cosine_similarity(
    vectors: Sequence[Tensors],
    layers: Mapping[str, str | Iterable[str]] | Iterable[str] | None = None,
) -> dict[str, Tensor]:
    r"""The cosines of the angles between N vectors, layer by layer.

    .. math:: S^{(l)}_{ij} = \frac{\langle \tau_i^{(l)}, \tau_j^{(l)} \rangle}
              {\lVert \tau_i^{(l)} \rVert\, \lVert \tau_j^{(l)} \rVert}

    The same as `cosine_similarity` of the entries of each layer, bit by bit; with it one sees where in a model tasks
    interfere. A layer in which a vector is all zero, such as embeddings that were frozen in fine-tuning, has no
    direction there: the vector's row and column are NaN, the diagonal included.

    Args:
        vectors: N mappings with the same keys and shapes; the floating-point entries count, without running
            statistics of normalisation layers.
        layers: None: one layer for each block, that is for each prefix such as ``"transformer.resblocks.3"``,
            ``"encoder.layers.3"`` or ``"blocks.3"``, and for each first part of the other names, such as ``"conv1"``
            of ``"conv1.weight"``. Or layer -> names or glob patterns, or patterns that make up a layer each. Layers
            may overlap, and entries may belong to none.

    Returns:
        Layer -> (N, N) float64 on the device of the first vector, in the order of `layers` or of the first vector.

    Raises:
        InputError: no vectors, no layers, or a pattern that matches nothing. StateMismatchError: keys or shapes
            disagree. NonFiniteError: NaN or infinity. TypeError: not mappings, no patterns, or complex entries.

    Source: Ilharco et al., "Editing models with task arithmetic", 2023, figure 5, for whole vectors.

    Example:
        >>> import torch
        >>> one = {"blocks.0.w": torch.tensor([1.0, 0.0]), "blocks.1.w": torch.tensor([1.0, 0.0])}
        >>> two = {"blocks.0.w": torch.tensor([0.0, 2.0]), "blocks.1.w": torch.tensor([3.0, 4.0])}
        >>> {layer: float(S[0, 1]) for layer, S in layer_cosine_similarity([one, two]).items()}
        {'blocks.0': 0.0, 'blocks.1': 0.6}
        >>> list(layer_cosine_similarity([one, two], {"all": "*"}))
        ['all']
    """
    checked, keys = _checked(vectors)
    return {layer: _cosines(checked, sorted(names)) for layer, names in _named(layers, keys, checked[0]).items()}


def _named(layers: object, keys: list[str], order: Tensors) -> dict[str, list[str]]:
    """Layer -> names."""
    if layers is None:
        known = set(keys)
        return layers_of(name for name in order if name in known)
    if isinstance(layers, Mapping):
        groups = dict(layers)
    elif isinstance(layers, str):
        groups = {layers: layers}
    elif isinstance(layers, Iterable):
        groups = {pattern: pattern for pattern in layers}
    else:
        raise TypeError(f"layers: expected layer -> patterns, or patterns, got {type(layers).__name__}")
    if not groups:
        raise InputError("layers: expected at least one layer, got none")
    chosen = {}
    for layer, patterns in groups.items():
        if not isinstance(layer, str):
            raise TypeError(f"layers: expected names or glob patterns, got {type(layer).__name__}")
        chosen[layer] = select_names(keys, patterns, f"layers[{layer!r}]")
        if not chosen[layer]:
            raise InputError(f"layers[{layer!r}]: expected at least one name or pattern, got none")
    return chosen


def _checked(vectors: Sequence[Tensors]) -> tuple[list[dict[str, Tensor]], list[str]]:
    """The vectors, and the sorted names of the entries that count."""
    checked = as_vectors(vectors, "vectors")
    keys = sorted(key for key, tensor in checked[0].items() if is_bendable(key, tensor.dtype))
    if not keys:
        raise InputError("vectors: hold no floating-point entries, so they have no direction")
    for index, vector in enumerate(checked):
        check_finite({key: vector[key] for key in keys}, f"vectors[{index}]")
    return checked, keys


def _cosines(vectors: Sequence[Tensors], keys: list[str]) -> Tensor:
    """(N, N) over the entries `keys`; NaN in the row and the column of a vector that is all zero there."""
    peaks = [max((float(v[key].detach().abs().max()) for key in keys if v[key].numel()), default=0.0) for v in vectors]
    device = vectors[0][keys[0]].device
    # in units of the largest entry squares neither overflow nor vanish
    scale = torch.tensor([peak or 1.0 for peak in peaks], dtype=torch.float64, device=device)[:, None]
    gram = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=device)
    for key in keys:
        flat = [vector[key].detach().reshape(-1) for vector in vectors]
        for start in range(0, len(flat[0]), _BLOCK):
            block = torch.stack([part[start : start + _BLOCK].to(device, torch.float64) for part in flat]) / scale
            gram += block @ block.mT
    norms = gram.diagonal().sqrt()
    similarity = ((gram + gram.mT) / 2 / torch.outer(norms, norms)).clamp_(-1, 1).fill_diagonal_(1.0)
    for index, peak in enumerate(peaks):
        if peak == 0:
            similarity[index, :] = similarity[:, index] = math.nan
    return similarity
