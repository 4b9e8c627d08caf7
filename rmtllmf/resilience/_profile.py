"""Whether a vector's energy lies in the tensors in which that of the others lies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._inner_products import Sums, score

_FEWEST = 5  # tensors that make a profile
_MEASURED = 1 / 3  # largest relative error of an energy whose logarithm says something
_SCATTER = 0.5  # of the logarithms of honest vectors' energies about the common profile


def profiles(parts: Sums, key_of: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """(Q,) slopes of the logarithms of mean squares per tensor over those of the others' median, and p-values."""
    from scipy.special import stdtr

    keys, users = int(key_of.max()) + 1, parts.noise.shape[-1]
    noise = parts.noise.diagonal(dim1=-2, dim2=-1)
    taken = parts.length[:, None] * noise
    zeros = torch.zeros(keys, users, dtype=torch.float64)
    length = torch.zeros(keys, dtype=torch.float64).index_add(0, key_of, parts.length)
    energy = zeros.index_add(0, key_of, parts.gram.diagonal(dim1=-2, dim2=-1) - taken)
    floor = zeros.index_add(0, key_of, 2 * taken * noise)
    mean_noise = zeros.index_add(0, key_of, taken) / length.clamp_min(1)[:, None]
    shrink = torch.ones_like(zeros)
    if parts.measured and int(parts.group.max()) > 0:  # a power that tells the noise, too, tells the energy better
        total = zeros.index_add(0, key_of, parts.gram.diagonal(dim1=-2, dim2=-1))
        shrink = torch.where(total > 0, (energy / total.where(total > 0, torch.ones(()))).clamp(0, 1), 1.0)
    whole = energy.sum(0)
    slopes = torch.full((users,), torch.nan, dtype=torch.float64)
    p_values = torch.ones(users, dtype=torch.float64)
    for q in range(users):
        others = [r for r in range(users) if r != q and whole[r] > 0]
        if not others or whole[q] <= 0:
            continue
        shares = (energy[:, others] / whole[others]).quantile(0.5, dim=1)
        expected = shares[:, None].clamp_min(0) * whole.clamp_min(0)  # as if all had the common profile
        error = (floor + 4 * mean_noise * expected).sqrt() * shrink
        relative = torch.where(expected > 0, error / expected.where(expected > 0, torch.ones(())), torch.inf)
        doubt = relative[:, others].quantile(0.5, dim=1)
        use = (length > 0) & (shares > 0) & (relative[:, q] <= _MEASURED) & (doubt <= _MEASURED)
        if int(use.sum()) < _FEWEST:
            continue
        x = (energy[use, q].maximum(error[use, q]).maximum(expected[use, q] * 1e-6) / length[use]).log()
        m = (shares[use] / length[use]).log()
        own, common = relative[use, q] ** 2, doubt[use] ** 2 * min(1.0, math.pi / 2 / len(others))  # of a median
        w = 1 / (_SCATTER**2 + own + common)
        dm = m - (w @ m) / w.sum()
        below = float(w @ dm**2 - w @ common)  # the noise in m would flatten the slope
        if below <= 1e-6 * float(w.sum()):
            continue
        slope = float(w @ (dm * x)) / below
        rest = x - (w @ x) / w.sum() - slope * dm
        scatter = float(w @ rest**2) / (len(x) - 2) * float(w @ dm**2)
        error_of_slope = math.sqrt(max(scatter, float((w * dm) ** 2 @ (own + common)))) / below
        slopes[q] = slope
        certainty = float(score(torch.tensor(least - slope), torch.tensor(error_of_slope)))
        p_values[q] = float(stdtr(len(x) - 2, -certainty))
    return slopes, p_values
