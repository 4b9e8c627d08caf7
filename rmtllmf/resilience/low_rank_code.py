"""Send the low-rank factors of a task vector's matrices in place of the matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor

from .._state import Tensors, as_vectors, finite_number, quoted, select_names, whole_number
from ..errors import InputError
from ..taskvec import low_rank
from ._factors import encoding_of, scaled
from ._form import Form
from .coding import Encoding

__all__ = ["low_rank_code", "ranks_for"]


def low_rank_code(
    vector: Tensors,
    rank: int | Mapping[str, int] | None = None,
    *,
    energy: float | None = None,
    ratio: float | None = None,
    only: str | Iterable[str] | None = None,
) -> Encoding:
    r"""A vector whose m x n matrices are sent as their best factors of rank r: r (m + n) numbers in place of m n.

    .. math:: \Delta \approx U_r S_r V_r^H = (m n)^{-1/4} B A, \qquad
              B = m^{1/4} U_r S_r^{1/2}, \quad A = n^{1/4} S_r^{1/2} V_r^H

    Noise of variance :math:`\sigma^2` in every number leaves the product unbiased, and adds to what the rank leaves out
    :math:`\sigma^2 (\sqrt m + \sqrt n) \sum_{i \le r} s_i + r \sqrt{m n}\, \sigma^4`. With errors of variance
    :math:`\mu` in units of the rms of the N numbers that are sent, the first-order error of all matrices k, and of
    tensors j that are sent whole, becomes

    .. math:: \frac{\mu}{N} \Bigl(\sum_k (\sqrt{m_k} + \sqrt{n_k}) \sum_{i \le r_k} s_{ki}
              + \sum_j \sqrt{n_j}\, \|\tau_j\|\Bigr)^2

    and no other gains make that less: it is why B and A are scaled as they are (the shapes tell how much), and why a
    tensor j is sent in units of the root of its rms, which has to be told. Sending everything as it is costs
    :math:`\mu \|\tau\|^2`. For a square matrix with r equal singular values the code costs twice that, so that it pays
    from :math:`K = m n / (r (m + n)) > 2` repetitions on; earlier where few singular values matter.

    Args:
        vector: a mapping of name -> tensor. Matrices are tensors of two dimensions, and kernels of two-dimensional
            convolutions (four dimensions) as their first by all others. The rest is sent whole.
        rank: r for every matrix, or name -> r for those that are to be factored (see `ranks_for`).
        energy: the share of every matrix's energy that is to be kept, in (0, 1]: the least rank that does. Other users
            will need other ranks: find common ones with `ranks_for`.
        ratio: the share of the vector's numbers that may be sent, in (0, 1): ranks about proportional to
            m n / (m + n), at least 1, so that all that is sent (the rest included) is no more than that.
        only: names or globs of what is sent at all; what is not decodes to 0.

    Returns:
        An `Encoding` with 32 bits (a float32) for each tensor that is sent whole beside factors. A factored tensor "w"
        is sent as "w/A" and "w/B"; tied tensors once. A matrix that has no fewer numbers in factors is sent whole.

    Raises:
        InputError: not exactly one of `rank`, `energy` and `ratio`; one that is out of range; a `ratio` that not even
            rank 1 keeps; a name that matches nothing or is no matrix. NonFiniteError: NaN or infinity. TypeError: no
            mapping.

    Source: Eckart and Young, 1936, for the factors; E. Hu et al., "LoRA", 2022, for how low the rank of an update is.

    Example:
        >>> import torch
        >>> code = low_rank_code({"w": torch.ones(4, 6), "b": torch.ones(4)}, rank=1)
        >>> {name: tuple(tensor.shape) for name, tensor in code.sent.items()}
        {'b': (4,), 'w/A': (1, 6), 'w/B': (4, 1)}
        >>> torch.allclose(code.decode(code.sent)["w"], torch.ones(4, 6))
        True
    """
    given = {"rank": rank, "energy": energy, "ratio": ratio}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise InputError(f"rank, energy, ratio: expected exactly one of them, got {' and '.join(named) or 'none'}")
    form, parts = Form.of(vector)
    parts = _chosen(form, parts, only)
    matrices = {key: tensor.flatten(1) for key, tensor in parts.items() if _is_matrix(tensor)}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    if isinstance(rank, Mapping):
        ranks = _named_ranks(form, matrices, rank)
    elif rank is not None:
        ranks = dict.fromkeys(matrices, whole_number(rank, "rank", at_least=1))
    elif energy is not None:
        factors = _svd(matrices, None)
        share = _share(energy, "energy", one=True)
        ranks = {key: _rank_for(_singular_values(factors[key]), share) for key in matrices}
    else:
        ranks = _ranks_within(matrices, parts, form, ratio)
    ranks = {key: r for key, r in ranks.items() if r * sum(matrices[key].shape) < matrices[key].numel()}
    factors = factors or _svd({key: matrices[key] for key in ranks}, max(ranks.values(), default=1))
    cut = {key: (factors[key][0][:, :r], factors[key][1][:r]) for key, r in ranks.items()}
    return encoding_of(form, parts, {key: scaled(*pair) for key, pair in cut.items()}, loaded=bool(cut))


def ranks_for(vectors: Iterable[Tensors], energy: float) -> dict[str, int]:
    r"""Common ranks for several users: name of a matrix -> the least rank that keeps this share of its energy for all.

    .. math:: r = \max_q \min \Bigl\{ r : \sum_{i \le r} s_{qi}^2 \ge \text{energy} \sum_i s_{qi}^2 \Bigr\}

    Args:
        vectors: mappings of name -> tensor with the same names and shapes.
        energy: in (0, 1].

    Returns:
        Name -> rank, for ``low_rank_code(vector, rank=...)``: one number for each matrix is agreed on beforehand.

    Raises:
        InputError: an `energy` out of range, or no vectors. StateMismatchError: names or shapes disagree.
        NonFiniteError: NaN or infinity.

    Source: Eckart and Young, 1936.

    Example:
        >>> import torch
        >>> ranks_for([{"w": torch.diag(torch.tensor([4.0, 3.0, 0.1]))}, {"w": torch.eye(3)}], energy=0.6)
        {'w': 2}
    """
    share = _share(energy, "energy", one=True)
    ranks: dict[str, int] = {}
    for index, vector in enumerate(as_vectors(vectors, "vectors")):
        _, parts = Form.of(vector, f"vectors[{index}]")
        factors = _svd({key: tensor.flatten(1) for key, tensor in parts.items() if _is_matrix(tensor)}, None)
        for key, pair in factors.items():
            ranks[key] = max(ranks.get(key, 1), _rank_for(_singular_values(pair), share))
    return ranks


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.ndim in (2, 4) and tensor.numel() > 0


def _share(value: object, argument: str, *, one: bool) -> float:
    share = finite_number(value, argument)
    if not 0 < share <= 1 or (share == 1 and not one):
        raise InputError(f"{argument}: expected a share in (0, 1{']' if one else ')'}, got {share:g}")
    return share


def _chosen(form: Form, parts: dict[str, Tensor], only: str | Iterable[str] | None) -> dict[str, Tensor]:
    if only is None:
        return parts
    owner = {name: key for key in parts for name in form.names_of(key)}
    names = {owner[name] for name in select_names(owner, only, "only")}
    if not names:
        raise InputError("only: expected at least one name or pattern, got none")
    return {key: tensor for key, tensor in parts.items() if key in names}


def _named_ranks(form: Form, matrices: Tensors, rank: Mapping[str, int]) -> dict[str, int]:
    owner = {name: key for key in matrices for name in form.names_of(key)}
    if rank.keys() - owner.keys():
        raise InputError(f"rank: {quoted(rank.keys() - owner.keys())} is no matrix that is sent: {quoted(owner, 8)}")
    return {owner[name]: whole_number(r, f"rank[{name!r}]", at_least=1) for name, r in rank.items()}


def _ranks_within(matrices: Tensors, parts: Tensors, form: Form, ratio: object) -> dict[str, int]:
    """The largest common share of the full cost of every matrix, so that everything is at most `ratio` of the whole."""
    room = _share(ratio, "ratio", one=False) * form.stream.length
    costs = {key: sum(tensor.shape) for key, tensor in matrices.items() if sum(tensor.shape) < tensor.numel()}
    rest = sum(tensor.numel() for key, tensor in parts.items() if key not in costs)

    def ranks(share: float) -> dict[str, int]:
        return {key: max(1, math.floor(share * matrices[key].numel() / cost)) for key, cost in costs.items()}

    def total(share: float) -> int:
        return rest + sum(min(costs[key] * r, matrices[key].numel()) for key, r in ranks(share).items())

    if total(0.0) > room:
        raise InputError(
            f"ratio: {ratio} of {form.stream.length} numbers is less than the {total(0.0)} of rank 1 and of what is "
            "sent as it is; leave something out with only, or send more"
        )
    low, high = 0.0, 1.0
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) <= room else (low, middle)
    return ranks(low)


def _svd(matrices: Tensors, rank: int | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (B, A), the singular values split evenly and in descending order."""
    if not matrices:
        return {}
    full = max(min(tensor.shape) for tensor in matrices.values())
    found = low_rank(matrices, rank=full if rank is None else rank, names=list(matrices))
    return {key: (found.B[key], found.A[key]) for key in matrices}


def _singular_values(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[1].double().square().sum(1)


def _rank_for(values: Tensor, energy: float) -> int:
    """The least rank with this share of the sum of squares."""
    scaled = values / (float(values.max()) or 1.0)
    kept = scaled.square().cumsum(0)
    return min(len(values), int((kept < energy * kept[-1]).sum()) + 1)
