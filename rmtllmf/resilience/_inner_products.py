"""Sums of products of received coefficients, the known noise taken off, and how far they may be off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._noise import KnownNoise, Scale

_BLOCK = 1 << 18  # entries of a vector that are taken to float64 at once
_CELLS = 1 << 21  # numbers in the largest array of the tests


@dataclass(frozen=True)
class Sums:
    """All that is left of the vectors: their inner products, where noise has one law. Parts lead, gains divided out."""

    length: Tensor  # (parts,)
    gram: Tensor  # (parts, Q, Q)
    noise: Tensor  # (parts, Q, Q) covariance of a coefficient
    weight: Tensor  # (parts, Q) gain^2
    group: Tensor  # (parts,) that share a scale
    measured: bool  # whether that is read off the received power

    @classmethod
    def of(cls, known: KnownNoise, users: list[int], scale: Scale) -> tuple[Sums, Tensor]:
        """The sums, and the tensor that each part is of."""
        flat = [{key: vector[key].detach().reshape(-1) for key in known.stream.keys} for vector in known.stream.vectors]
        lengths, grams, noises, weights, keys = [], [], [], [], []
        for index, key in enumerate(known.stream.keys):
            for part in known.parts[key]:
                gain = known.gain[part.block][users]
                both = gain[:, None] * gain[None, :]
                lengths.append(part.stop - part.start)
                grams.append(gram([flat[q][key][part.start : part.stop] for q in users]) / both)
                noises.append(known.covariance_of(key, part.block)[users][:, users] / both)
                weights.append(gain**2)
                keys.append(index)
        of = torch.tensor(keys)
        group = of if isinstance(scale, str) and scale.startswith("tensor") else torch.zeros_like(of)
        length = torch.tensor(lengths, dtype=torch.float64)
        sums = cls(length, torch.stack(grams), torch.stack(noises), torch.stack(weights), group, isinstance(scale, str))
        return sums, of

    def pooled(self) -> Sums:
        """The same with parts put together that share gains, noise and scale: few, for most tests."""
        laws: dict[Any, int] = {}
        rows = zip(self.noise.flatten(1).tolist(), self.weight.tolist(), self.group.tolist(), strict=True)
        to = torch.tensor([laws.setdefault((tuple(n), tuple(w), g), len(laws)) for n, w, g in rows])
        first = torch.tensor([int((to == i).nonzero()[0]) for i in range(len(laws))])
        length = torch.zeros(len(laws), dtype=torch.float64).index_add(0, to, self.length)
        gram = torch.zeros(len(laws), *self.gram.shape[1:], dtype=torch.float64).index_add(0, to, self.gram)
        return Sums(length, gram, self.noise[first], self.weight[first], self.group[first], self.measured)

    def form(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """(tests, Q, Q) symmetric -> (tests,) sums of W times the inner products, noise taken off, and their errors."""
        step = max(1, _CELLS // self.noise.numel())
        found = [self._form(some) for some in W.split(step)] or [(W.new_zeros(0), W.new_zeros(0))]
        return torch.cat([value for value, _ in found]), torch.cat([error for _, error in found])

    def _form(self, W: Tensor) -> tuple[Tensor, Tensor]:
        off = self.length[:, None, None] * self.noise
        value = torch.einsum("tqr,pqr->t", W, self.gram - off)
        M = W[:, None].expand(-1, len(self.length), -1, -1)
        if self.measured:  # what is taken off follows the received power of each user
            shape = (int(self.group.max()) + 1, self.noise.shape[-1])
            power = torch.zeros(shape, dtype=torch.float64)
            power.index_add_(0, self.group, self.weight * self.gram.diagonal(dim1=-2, dim2=-1))
            taken = torch.zeros(len(W), *shape, dtype=torch.float64)
            taken.index_add_(1, self.group, torch.einsum("tqr,pqr->tpq", W, off))
            share = torch.where(power > 0, taken / power.where(power > 0, torch.ones(())), 0.0)
            M = M - torch.diag_embed(share[:, self.group] * self.weight)
        MC = M @ self.noise
        spread = 2 * torch.einsum("p,tpqr,tprq->t", self.length, MC, MC)
        signal = 4 * torch.einsum("tpqr,tprs,psq->t", MC, M, self.gram - off)
        return value, (spread.clamp_min(0) + signal.clamp_min(0)).sqrt()

    def against(self, a: Tensor, b: Tensor, limit: float) -> tuple[Tensor, Tensor]:
        """(tests,) cosines between the combinations a and b (tests, Q), and by how many errors they exceed `limit`."""
        aa, bb, ab = (x[:, :, None] * y[:, None, :] for x, y in ((a, a), (b, b), (a, b)))
        ab = (ab + ab.mT) / 2
        long, wide = ((value.maximum(error)) for value, error in (self.form(aa), self.form(bb)))
        heard = (long > 0) & (wide > 0)
        ratio = torch.where(heard, wide / long.where(heard, torch.ones(())), 1.0).sqrt()[:, None, None]
        cosine = self.form(ab)[0] / (long * wide).sqrt().where(heard, torch.ones(()))
        value, error = self.form(ab - limit / 2 * (ratio * aa + bb / ratio))
        return torch.where(heard, cosine, 0.0).clamp(-1, 1), torch.where(heard, score(value, error), 0.0)


def gram(rows: list[Tensor]) -> Tensor:
    """(Q, Q) inner products in float64."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for start in range(0, len(rows[0]), _BLOCK):
        block = torch.stack([row[start : start + _BLOCK].to(rows[0].device, torch.float64) for row in rows])
        total += (block @ block.mT).cpu()
    return (total + total.mT) / 2


def score(value: Tensor, error: Tensor) -> Tensor:
    """In errors; where there is none the sign is certain."""
    certain = torch.where(value == 0, 0.0, value.sign() * torch.inf)
    return torch.where(error > 0, value / error.where(error > 0, torch.ones((), dtype=error.dtype)), certain)
