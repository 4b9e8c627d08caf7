"""What every shrinkage of received vectors refuses: id -> (arguments, options, exception, pattern)."""

from __future__ import annotations

import math
import re

import torch

from helpers.known_errors import correlated
from rmtllmf.errors import InputError, NonFiniteError, NotPSDError, ShapeError, StateMismatchError

GOOD = [{"w": torch.eye(4), "b": torch.ones(4)}, {"w": torch.ones(4, 4), "b": torch.ones(4)}]
PAIR = [0.1, 0.2]
NAN = [{"w": torch.tensor([1.0, math.nan])}]

EVERY = {
    "no vectors": (([], [0.1]), {}, InputError, "at least one mapping"),
    "one mapping": ((GOOD[0], PAIR), {}, TypeError, "sequence of mappings"),
    "users": ((GOOD, [0.1, 0.1, 0.1]), {}, ShapeError, "2 vectors"),
    "estimator": ((GOOD, PAIR), {"estimator": "best"}, InputError, "estimator: expected one of"),
}
# of those that go by the energies of tensors
BY_ENERGY = {
    **EVERY,
    "other keys": (([GOOD[0], {"w": torch.eye(4)}], PAIR), {}, StateMismatchError, "'b'"),
    "not PSD": ((GOOD, correlated([[1.0, 2.0], [2.0, 1.0]])), {}, NotPSDError, "error_covariance"),
    "sensitivity 0": ((GOOD, PAIR), {"sensitivity": 0}, InputError, "sensitivity: expected a positive finite number"),
    "sensitivity name": ((GOOD, PAIR), {"sensitivity": {"v*": 2}}, InputError, re.escape("'v*' matches none")),
    "NaN": ((NAN, [0.1]), {"scale": 1.0}, NonFiniteError, re.escape("received[0]['w'] holds NaN")),
}
