"""Wrong input to the symbol link, and what the error must say: (id, call, exception, pattern)."""

from __future__ import annotations

import numpy as np
import torch

from rmtllmf.channel import Constellation, LdpcCode, symbol_error_rate, transmit_symbols
from rmtllmf.errors import InputError, NonFiniteError, NotPSDError, ShapeError, StateMismatchError

H = np.eye(3, 2) + 0j
V = [{"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([0.5, 1.0])}]


def send(vectors=V, H=H, P=1.0, C=np.eye(3), seed=0, **options):  # noqa: B008 (never written to)
    return transmit_symbols(vectors, H, P, C, seed=seed, **options)


CASES = [
    ("symbols: modulation", lambda: send(modulation=32), InputError, "modulation: expected 4, 16.*got 32"),
    ("symbols: modulation name", lambda: send(modulation="qam"), InputError, "modulation: .*'analog', got 'qam'"),
    ("symbols: receiver", lambda: send(receiver="zf"), InputError, "receiver: .*'lmmse', got 'zf'"),
    ("symbols: cancellation", lambda: send(cancellation="none"), InputError, "cancellation: .*got 'none'"),
    ("symbols: bits", lambda: send(bits=0), InputError, "bits: expected .* at least 1, got 0"),
    ("symbols: half bits", lambda: send(bits=1.5), TypeError, "bits: expected an int"),
    ("symbols: quantiser", lambda: send(quantiser="vector"), InputError, "quantiser: .*'lloyd_max', got 'vector'"),
    ("symbols: decisions", lambda: send(decisions="firm"), InputError, "decisions: .*got 'firm'"),
    ("symbols: digital scale", lambda: send(scale="rms"), InputError, "scale: belongs to the analog link"),
    ("symbols: analog bits", lambda: send(modulation="analog", bits=8), InputError, "bits: the analog link"),
    (
        "symbols: analog tensors",
        lambda: send(modulation="analog", per_tensor=True),
        InputError,
        "per_tensor: the analog",
    ),
    ("symbols: analog scale", lambda: send(modulation="analog", scale="max"), InputError, "scale: expected one of"),
    ("symbols: number of vectors", lambda: send(V * 2), InputError, "H: has 2 users, but there are 4 vectors"),
    ("symbols: no vectors", lambda: send([]), InputError, "vectors: expected at least one"),
    ("symbols: keys", lambda: send([V[0], {"b": V[1]["w"]}]), StateMismatchError, "lacks 'w'"),
    ("symbols: silent user", lambda: send(P=[1.0, 0.0]), InputError, "P: a silent user"),
    ("symbols: NaN", lambda: send([V[0], {"w": V[1]["w"] * float("nan")}]), NonFiniteError, r"vectors\[1\]\['w'\]"),
    ("symbols: all zero", lambda: send([V[0], {"w": torch.zeros(2)}]), InputError, r"vectors\[1\] is all zero"),
    ("symbols: real H", lambda: send(H=H.real), TypeError, "H: expected complex"),
    ("symbols: H batch", lambda: send(H=np.ones((2, 2, 3, 2)) + 0j), InputError, "H: expected at most one leading"),
    ("symbols: too many blocks", lambda: send(H=np.stack([H] * 9), bits=1), InputError, "H: 9 blocks are more than"),
    ("symbols: C", lambda: send(C=-np.eye(3)), NotPSDError, "C: "),
    ("symbols: C shape", lambda: send(C=np.eye(2)), ShapeError, "C: "),
    ("symbols: order", lambda: send(order="random"), InputError, "order: "),
    ("symbols: seed", lambda: send(seed="0"), TypeError, "seed: "),
    ("symbols: code", lambda: send(code="ldpc"), TypeError, "code: expected an LdpcCode or None, got str"),
    ("symbols: soft code", lambda: send(code=LdpcCode(50, 100), decisions="soft"), InputError, "decisions: .*'soft'"),
    ("symbols: analog code", lambda: send(modulation="analog", code=LdpcCode(50, 100)), InputError, "code: the analog"),
    (
        "symbols: code over blocks",
        lambda: send(H=np.stack([H] * 2), code=LdpcCode(50, 100), cancellation="real"),
        InputError,
        "cancellation: .*single fading block",
    ),
    ("code: too short", lambda: LdpcCode(k=100, n=50), InputError, "n: expected at least the 100"),
    ("code: no iterations", lambda: LdpcCode(k=1, n=2, iterations=0), InputError, "iterations: .*got 0"),
    ("symbols: linear, order", lambda: send(receiver="lmmse", order=[1, 0]), InputError, "order: the linear receiver"),
    (
        "symbols: linear, cancellation",
        lambda: send(receiver="lmmse", order="strongest_first", cancellation="real"),
        InputError,
        "order, cancellation: the linear receiver cancels nothing",
    ),
    ("symbols: no order", lambda: send(order=None), TypeError, "order: .*None"),
    ("constellation", lambda: Constellation(8), InputError, "order: expected 4, 16, 64, 256, got 8"),
    (
        "constellation: bits",
        lambda: Constellation(16).modulate(np.ones((3, 2))),
        ShapeError,
        r"bits: .*4\), got \(3, 2",
    ),
    ("constellation: list", lambda: Constellation(4).modulate([0, 1]), TypeError, "bits: .*got list"),
    ("constellation: real", lambda: Constellation(4).decide(np.ones(3)), TypeError, "symbols: expected complex"),
    ("constellation: text", lambda: Constellation(4).nearest(np.array(["a"])), TypeError, "symbols: .*dtype <U1"),
    ("symbol error rate", lambda: symbol_error_rate(4, -1.0), InputError, r"snr: .*>= 0.*from_db\(-1.0\)"),
    ("symbol error rate: order", lambda: symbol_error_rate(8, 1.0), InputError, "order: expected 4.*256, got 8"),
]
