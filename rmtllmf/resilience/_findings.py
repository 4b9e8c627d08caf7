"""The tests behind `suspects`: norms, directions, copies and profiles, and what their findings add up to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._state import finite_number
from ..errors import InputError
from ._inner_products import Sums, score
from ._noise import KnownNoise, Scale
from ._profile import profiles


@dataclass(frozen=True)
class Limits:
    """What honest vectors may do."""

    false_alarm: float
    norm_ratio: float
    opposed: float
    copied: float
    profile: float

    @classmethod
    def of(cls, *values: object) -> Limits:
        names = ("false_alarm", "norm_ratio", "opposed", "copied", "profile")
        numbers = dict(zip(names, values, strict=True))
        checked = cls(**{name: finite_number(value, name) for name, value in numbers.items()})
        allowed = {
            "false_alarm": (0 < checked.false_alarm < 1, "above 0 and below 1"),
            "norm_ratio": (checked.norm_ratio >= 1, "of at least 1"),
            "opposed": (-1 < checked.opposed <= 0, "above -1 and up to 0"),
            "copied": (0 < checked.copied < 1, "above 0 and below 1"),
            "profile": (0 <= checked.profile < 1, "from 0 to below 1"),
        }
        for name, (fine, text) in allowed.items():
            if not fine:
                raise InputError(f"{name}: expected a number {text}, got {numbers[name]}")
        return checked


@dataclass(frozen=True)
class Found:
    """What the tests say about users who sent finite numbers."""

    users: list[int]
    sums: Sums
    energy: Tensor
    typical: Tensor
    direction: Tensor
    cosines: Tensor
    slope: Tensor
    p_values: dict[str, Tensor]

    @classmethod
    def of(cls, known: KnownNoise, users: list[int], scale: Scale, limits: Limits) -> Found:
        count = len(users)
        if not users:
            none, square = torch.zeros(0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
            p = {"norm": none, "direction": none, "opposed": square, "copied": square, "profile": none}
            one = torch.ones(1, dtype=torch.float64)
            sums = Sums(one, square[None], square[None], none[None], torch.zeros(1, dtype=torch.long), False)
            return cls([], sums, none, none, none, square, none, p)
        parts, key_of = Sums.of(known, users, scale)
        sums = parts.pooled()
        eye = torch.eye(count, dtype=torch.float64)
        energy, error = sums.form(torch.diag_embed(eye))
        middle, typical, ratio = _typical(energy, error, limits.norm_ratio)
        over = score(*sums.form(torch.diag_embed(eye - ratio[:, None] ** 2 * middle)))
        under = score(*sums.form(torch.diag_embed(middle / ratio[:, None] ** 2 - eye)))
        norm = (2 * torch.minimum(_tail(over), _tail(under))).clamp_max(1)
        if count == 1:
            norm = torch.ones_like(norm)
        everyone = list(range(count))
        direction, z = _directions(sums, everyone, limits)
        rows, columns = torch.triu_indices(count, count, 1)
        cosine, low = sums.against(eye[rows], eye[columns], limits.opposed)
        high = sums.against(eye[rows], eye[columns], limits.copied)[1]
        slope, profile = profiles(parts, key_of, limits.profile)
        cosines, opposed, same = (_symmetric(v, rows, columns, count) for v in (cosine, _tail(-low), _tail(high)))
        p = {"norm": norm, "direction": _tail(-z), "opposed": opposed, "copied": same, "profile": profile}
        return cls(users, sums, energy, typical, direction, cosines, slope, p)

    @property
    def tests(self) -> int:
        count = len(self.energy)
        return 3 * count + count * (count - 1)

    def reasons(self, limits: Limits) -> dict[int, str]:
        """User -> why it is suspected."""
        level = limits.false_alarm / max(1, self.tests)
        texts: dict[int, list[str]] = {}
        for q in (self.p_values["norm"] <= level).nonzero().flatten().tolist():
            norm, middle = (math.sqrt(max(0.0, float(values[q]))) for values in (self.energy, self.typical))
            times = f"{norm / middle:.3g} times" if middle > 0 else "far above"
            texts.setdefault(q, []).append(f"norm is {times} the median of the others")
        for q in (self.p_values["profile"] <= level).nonzero().flatten().tolist():
            slope = f"energy per tensor does not follow the others' (slope {float(self.slope[q]):.2f})"
            texts.setdefault(q, []).append(slope)
        active = [q for q in range(len(self.energy)) if q not in texts]
        texts |= self._copies(active, level)
        texts |= self._opponents([q for q in active if q not in texts], level, limits)
        return {self.users[q]: "; ".join(text) for q, text in texts.items()}

    def _copies(self, active: list[int], level: float) -> dict[int, list[str]]:
        noise = torch.einsum("p,pqq->q", self.sums.length, self.sums.noise) / self.energy.clamp_min(1e-300)
        length = (self.energy / self.typical.clamp_min(1e-300)).clamp_min(1e-300).log().abs()
        kept: list[int] = []
        texts = {}
        for q in sorted(active, key=lambda q: (round(float(noise[q]), 9), float(length[q]), q)):
            same = [r for r in kept if float(self.p_values["copied"][q, r]) <= level]
            if same:
                texts[q] = [f"is the vector of {self._pair(q, same[0])}"]
            else:
                kept.append(q)
        return texts

    def _opponents(self, active: list[int], level: float, limits: Limits) -> dict[int, list[str]]:
        """Round by round the user that opposes the others most, with its opponent where the rest cannot tell them."""
        texts: dict[int, list[str]] = {}
        pairs = self.p_values["opposed"] <= level
        while len(active) > 1:
            cosines, z = _directions(self.sums, active, limits)
            against = {q: float(cosines[i]) for i, q in enumerate(active)}
            enemies = {q: [r for r in active if pairs[q, r]] for q in active}
            hits = [q for i, q in enumerate(active) if float(_tail(-z[i])) <= level or enemies[q]]
            if not hits:
                break
            worst = min(hits, key=lambda q: against[q])
            equal = [r for r in enemies[worst] if not self._told_apart(worst, r, active, level, limits)]
            if not equal:
                texts[worst] = [f"opposes the others (cosine {against[worst]:.2f} with their sum)"]
            for q, r in [(worst, r) for r in equal] + [(r, worst) for r in equal]:
                texts.setdefault(q, []).append(f"opposes {self._pair(q, r)}")
            active = [q for q in active if q not in texts]
        return texts

    def _pair(self, q: int, r: int) -> str:
        return f"user {self.users[r]} (cosine {float(self.cosines[q, r]):.2f})"

    def _told_apart(self, worst: int, other: int, active: list[int], level: float, limits: Limits) -> bool:
        """Whether the rest sides with `other`."""
        rest = [q for q in active if q not in (worst, other)]
        if not rest:
            return False
        unit = _units(self.sums)
        a, b = torch.zeros(1, len(unit), dtype=torch.float64), torch.zeros(1, len(unit), dtype=torch.float64)
        a[0, other], a[0, worst], b[0, rest] = unit[other], -unit[worst], unit[rest]
        return float(_tail(self.sums.against(a, b, -limits.opposed)[1])[0]) <= level


def _directions(sums: Sums, active: list[int], limits: Limits) -> tuple[Tensor, Tensor]:
    """Of the active users, the cosine with the sum of the others, each in units of its received norm."""
    chosen = torch.zeros(sums.noise.shape[-1], dtype=torch.float64)
    chosen[active] = _units(sums)[active]
    own = torch.eye(len(chosen), dtype=torch.float64)[active]
    return sums.against(own, chosen * (1 - own), limits.opposed)


def _units(sums: Sums) -> Tensor:
    power = sums.gram.diagonal(dim1=-2, dim2=-1).sum(0)
    return torch.where(power > 0, power, torch.inf).rsqrt()


def _typical(energy: Tensor, error: Tensor, norm_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """For each user: weights of the median of the others' energies, that median, and the ratio of norms allowed."""
    count = len(energy)
    middle, typical = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    ratio = torch.full((count,), norm_ratio, dtype=torch.float64)
    seen = energy.maximum(error)  # an energy below its error has no logarithm
    for q in range(count):
        others = [r for r in energy.argsort().tolist() if r != q]
        if not others:
            continue
        two = {others[(len(others) - 1) // 2], others[len(others) // 2]}
        for r in two:
            middle[q, r] = 1 / len(two)
        typical[q] = middle[q] @ energy
        logs = [0.5 * math.log(e) for e in seen[others].tolist() if e > 0]
        if logs:
            centre = _median(logs)
            spread = 1.4826 * _median([abs(value - centre) for value in logs])
            ratio[q] = max(norm_ratio, math.exp(min(3 * spread, 300.0)))
    return middle, typical, ratio


def _tail(score: Tensor) -> Tensor:
    """Probability that a normal number exceeds `score`."""
    return torch.special.ndtr(-score)


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def _symmetric(values: Tensor, rows: Tensor, columns: Tensor, count: int) -> Tensor:
    """A matrix with these values off the diagonal and 1 on it."""
    square = torch.eye(count, dtype=torch.float64)
    square[rows, columns] = square[columns, rows] = values
    return square
