"""What `protect` did, as a report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..taskvec import TaskVector
from ._plan import Realignment
from .sensitivity import MeasuredSensitivity

_SHOWN = 5  # tensors at each end of a long list
_RESTORED = 0.01


@dataclass(frozen=True)
class TensorReport:
    """What happened to a tensor, in the mean over the users that were kept.

    Attributes:
        signal: mean square of what was sent, as estimated.
        noise: mean square of the error in what was received, divided by the gains; infinite where nobody was heard.
        kept: norm of the estimates relative to that of what was received; 0: restored from the base model. With the
            estimator "mmse", which has shrunk them once, it may exceed 1.

    Example:
        >>> print(TensorReport(signal=1.0, noise=100.0, kept=0.01))  # SNR in dB, and what is kept
            -20.0  0.010
    """

    signal: float
    noise: float
    kept: float

    def __str__(self) -> str:
        if self.noise == 0:
            snr = "no noise"
        elif self.signal > 0 and math.isfinite(self.noise):
            snr = f"{10 * (math.log10(self.signal) - math.log10(self.noise)):.1f}"
        else:
            snr = "no signal"
        return f"{snr:>9}  {self.kept:5.3f}"


@dataclass(frozen=True, eq=False, repr=False)
class Protection:
    """What `protect` did.

    Attributes:
        users: those whose vectors were fused.
        reasons: user -> why it was left out.
        sensitivity: what was measured; None if it was given, or nothing was there to measure it on.
        tensors: name -> a `TensorReport`.
        update: what `rule` made of the estimates; zero where parameters are frozen.
        scale: what `update` was multiplied by before it was added to the base model, beside the rule's own scale: 1
            without samples to choose it on.
        realignment: None without samples.

    Example:
        >>> import torch
        >>> from rmtllmf.channel import transmit
        >>> model, draw = torch.nn.Linear(64, 64), torch.Generator().manual_seed(0)
        >>> base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        >>> sent = [{"weight": torch.randn(64, 64, generator=draw), "bias": torch.zeros(64)} for _ in range(4)]
        >>> from rmtllmf.resilience import protect
        >>> protect(model, base, transmit(sent, 1.0, seed=1), 1.0, seed=0)
        Protection of 4 users' task vectors
          2 tensors kept, 0 as good as restored from the base
            tensor   SNR (dB)   kept
            weight        0.1  0.50...
            bias        -11...  0.07...
          the update times 1
    """

    users: tuple[int, ...]
    reasons: Mapping[int, str]
    sensitivity: MeasuredSensitivity | None
    tensors: Mapping[str, TensorReport]
    scale: float
    update: TaskVector
    realignment: Realignment | None

    def __repr__(self) -> str:
        lines = [f"Protection of {len(self.users) + len(self.reasons)} users' task vectors"]
        lines += [f"  user {user} left out: {why}" for user, why in self.reasons.items()]
        if self.sensitivity is not None:
            s = self.sensitivity
            lines.append(f"  outputs feel signal {s.ratio:.3g} (+- {s.error:.2g}) times as much as noise of its energy")
        names = sorted(self.tensors, key=lambda name: -self.tensors[name].kept)
        restored = sum(self.tensors[name].kept < _RESTORED for name in names)
        lines.append(f"  {len(names) - restored} tensors kept, {restored} as good as restored from the base")
        hidden = max(0, len(names) - 2 * _SHOWN)
        first, last = (names[:_SHOWN], names[-_SHOWN:]) if hidden else (names, [])
        width = max(len(name) for name in ["tensor", *first, *last])
        lines.append(f"    {'tensor'.ljust(width)}   SNR (dB)   kept")
        lines += [f"    {name.ljust(width)}  {self.tensors[name]}" for name in first]
        lines += [f"    ... {hidden} in between ..."] if hidden else []
        lines += [f"    {name.ljust(width)}  {self.tensors[name]}" for name in last]
        lines.append(f"  the update times {self.scale:.3g}")
        if self.realignment is not None and self.realignment.losses:
            losses = self.realignment.losses
            lines.append(f"  realigned in {len(losses)} steps, loss {losses[0]:.3g} to {losses[-1]:.3g}")
        return "\n".join(lines)
