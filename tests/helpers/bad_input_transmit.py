"""Wrong input to what sends vectors over the channel, and what the error must say: (id, call, exception, pattern)."""

from __future__ import annotations

import numpy as np
import torch

from rmtllmf.channel import Uplink, sic, transmit, transmit_sum
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError

NAN, INF = float("nan"), float("inf")
H = np.arange(1, 7).reshape(3, 2) * (1 + 0.5j)
I3 = np.eye(3)
V = {"w": torch.tensor([1.0, 2.0])}


def every_out():
    """What `transmit` and `transmit_sum` cannot write to."""
    F, W = {"w": torch.tensor([1.0, 2.0], requires_grad=True)}, torch.tensor([1.0, 2.0])
    pair = [{"w": W}, {"w": W + 1}]
    for name, argument, call in (
        ("transmit", r"out\[1\]", lambda place, v=pair, mse=0.1: transmit(v, mse, seed=0, out=[{"w": W * 0}, place])),
        ("transmit_sum", "out", lambda place, v=pair, mse=0.1: transmit_sum(v, mse, seed=0, out=place)),
    ):
        yield from [
            (f"{name} out: a number", lambda c=call: c(3), TypeError, f"{argument}: .*mapping.*int"),
            (f"{name} out: less", lambda c=call: c({}), StateMismatchError, f"{argument} lacks 'w'"),
            (f"{name} out: more", lambda c=call: c({"w": W * 0, "v": W}), StateMismatchError, "unexpected 'v'"),
            (f"{name} out: no tensor", lambda c=call: c({"w": [0.0]}), TypeError, rf"{argument}\['w'\]: .*list"),
            (
                f"{name} out: shape",
                lambda c=call: c({"w": torch.ones(3)}),
                StateMismatchError,
                r"\['w'\] has shape \(3",
            ),
            (
                f"{name} out: dtype",
                lambda c=call: c({"w": W.double()}),
                StateMismatchError,
                r"\['w'\] is torch.float64",
            ),
            (
                f"{name} out: a vector",
                lambda c=call: c({"w": W}),
                InputError,
                rf"{argument}\['w'\] shares memory with vectors\[0\]\['w'\]",
            ),
            (
                f"{name} out: expanded",
                lambda c=call: c({"w": torch.zeros(1).expand(2)}),
                InputError,
                rf"{argument}\['w'\]: is an expanded view",
            ),
            (f"{name} out: with gradient", lambda c=call: c(F), InputError, rf"{argument}\['w'\]: requires a grad"),
            (
                f"{name} out: gradient of a vector",
                lambda c=call: c({"w": W * 0}, v=[F, V]),
                InputError,
                "gradient.*torch.no_grad",
            ),
            (
                f"{name} out: gradient of the errors",
                lambda c=call: c({"w": W * 0}, mse=torch.tensor(0.1, requires_grad=True)),
                InputError,
                "gradient.*torch.no_grad",
            ),
        ]
    yield from [
        ("transmit out: a mapping", lambda: transmit(pair, 0.1, seed=0, out={"w": W}), TypeError, "out: .*list.*dict"),
        ("transmit out: one", lambda: transmit(pair, 0.1, seed=0, out=[{"w": W * 0}]), InputError, "out: .*2.*got 1"),
        (
            "transmit out: one for two",
            lambda: transmit(pair, 0.1, seed=0, out=[{"w": (same := W * 0)}, {"w": same}]),
            InputError,
            r"out\[.\]\['w'\] shares memory with out\[.\]\['w'\]",
        ),
    ]


def every_sum():
    """The mistakes that `transmit_sum` can be asked to make."""
    pair, one = [V, V], [V]
    yield from [
        ("sum: few weights", lambda: transmit_sum(pair, 0.1, seed=0, weights=[1.0]), ShapeError, "weights: .*2.*got 1"),
        ("sum: one weight", lambda: transmit_sum(pair, 0.1, seed=0, weights=1.0), TypeError, "weights: .*2 .*float"),
        ("sum: text", lambda: transmit_sum(pair, 0.1, seed=0, weights="12"), TypeError, "weights: .*str"),
        (
            "sum: NaN weight",
            lambda: transmit_sum(pair, 0.1, seed=0, weights=[1, NAN]),
            InputError,
            r"weights\[1\]: .*nan",
        ),
        (
            "sum: weights with gradient",
            lambda: transmit_sum(one, 0.1, seed=0, weights=torch.ones(1, requires_grad=True)),
            InputError,
            "weights: gradients",
        ),
        ("sum: none", lambda: transmit_sum([], 0.1, seed=0), InputError, "vectors: expected at least one"),
        ("sum: estimator", lambda: transmit_sum(one, 0.1, seed=0, estimator="ml"), InputError, "estimator: .*'ml'"),
        ("sum: scale", lambda: transmit_sum(one, 0.1, seed=0, scale="max"), InputError, "scale: .*'max'"),
        ("sum: seed", lambda: transmit_sum(one, 0.1, seed=None), TypeError, "seed: "),
        ("sum: users", lambda: transmit_sum(one, [0.1, 0.2], seed=0), ShapeError, r"mse: .*got \(2,\)"),
        ("sum: blocks", lambda: transmit_sum(one, np.ones((2, 1)), seed=0), InputError, "2 blocks .* 1 symbols"),
        *[
            (
                f"sum: {value}, {scale}",
                lambda value=value, scale=scale: transmit_sum(
                    [V, {"w": torch.tensor([1.0, value])}], 0.1, seed=0, scale=scale
                ),
                NonFiniteError,
                r"vectors\[1\]\['w'\] holds NaN or infinity",
            )
            for value in (NAN, INF)
            for scale in ("rms", "peak", "tensor_rms", 1.0)
        ],
        (
            "sum: all zero",
            lambda: transmit_sum([V, {"w": torch.zeros(2)}], 0.1, seed=0),
            InputError,
            r"vectors\[1\] is all zero",
        ),
    ]


CASES = [
    ("transmit: None", lambda: transmit(None, 0.1, seed=0), TypeError, "vectors: .*NoneType"),
    ("seed: NumPy's", lambda: transmit([V], 0.1, seed=np.random.default_rng(0)), TypeError, "seed: .*NumPy.*integers"),
    (
        "transmit: numbered",
        lambda: transmit([{0: V["w"]}], 0.1, seed=0),
        TypeError,
        r"vectors\[0\]: .*names as keys, got 0",
    ),
    (
        "transmit: integers only",
        lambda: transmit([{"n": torch.tensor([1])}], 0.1, seed=0),
        InputError,
        "nothing to send",
    ),
    ("transmit: an uplink", lambda: transmit([V], Uplink(H, 1, 1), seed=0), TypeError, "reception: .*got Uplink"),
    ("transmit: receptions", lambda: transmit([V], [sic(H, 1.0, I3)], seed=0), TypeError, "reception: .*got list"),
    (
        "transmit: overflow",
        lambda: transmit([{"w": torch.full((999,), 6e4, dtype=torch.float16)}], 4.0, seed=0),
        NonFiniteError,
        r"vectors\[0\]\['w'\]: the received values overflow torch.float16",
    ),
    *every_out(),
    *every_sum(),
    ("transmit: none", lambda: transmit([], 0.1, seed=0), InputError, "vectors: expected at least one"),
    ("transmit: one mapping", lambda: transmit(V, 0.1, seed=0), TypeError, "vectors: .*sequence"),
    ("transmit: a tensor", lambda: transmit([V["w"]], 0.1, seed=0), TypeError, r"vectors\[0\]: .*mapping"),
    ("transmit: missing key", lambda: transmit([V, {"b": V["w"]}], 0.1, seed=0), StateMismatchError, "lacks 'w'"),
    (
        "transmit: extra key",
        lambda: transmit([V, {**V, "b": V["w"]}], 0.1, seed=0),
        StateMismatchError,
        r"vectors\[1\] has the unexpected 'b'",
    ),
    (
        "transmit: reshaped key",
        lambda: transmit([V, {"w": torch.ones(3)}], 0.1, seed=0),
        StateMismatchError,
        r"vectors\[1\]\['w'\] has shape \(3,\); vectors\[0\] has \(2,\)",
    ),
    (
        "transmit: integer in one",
        lambda: transmit([V, {"w": torch.tensor([1, 2])}], 0.1, seed=0),
        StateMismatchError,
        r"vectors\[1\]\['w'\] is torch.int64",
    ),
    ("transmit: complex", lambda: transmit([{"w": torch.ones(2) + 0j}], 0.1, seed=0), TypeError, "complex entries"),
    (
        "transmit: NaN",
        lambda: transmit([{"w": torch.tensor([NAN])}], 0.1, seed=0),
        NonFiniteError,
        r"vectors\[0\]\['w'\]",
    ),
    (
        "transmit: NaN, numeric scale",
        lambda: transmit([{"w": torch.tensor([NAN])}], 0.1, seed=0, scale=1.0),
        NonFiniteError,
        r"vectors\[0\]\['w'\]",
    ),
    (
        "transmit: inf, peak",
        lambda: transmit([{"w": torch.tensor([INF])}], 0.1, seed=0, scale="peak"),
        NonFiniteError,
        r"vectors\[0\]\['w'\]",
    ),
    *[
        (
            f"transmit: all zero, {scale}",
            lambda scale=scale: transmit([{"w": torch.zeros(2)}], 0.1, seed=0, scale=scale),
            InputError,
            r"vectors\[0\].* is all zero",
        )
        for scale in ("rms", "peak", "tensor_rms", "tensor_peak")
    ],
    (
        "transmit: one zero tensor",
        lambda: transmit([{**V, "z": torch.zeros(2)}], 0.1, seed=0, scale="tensor_rms"),
        InputError,
        r"vectors\[0\]\['z'\] is all zero",
    ),
    ("transmit: scale name", lambda: transmit([V], 0.1, seed=0, scale="max"), InputError, "scale: .*'peak'.*got 'max'"),
    ("transmit: zero scale", lambda: transmit([V], 0.1, seed=0, scale=0.0), InputError, "scale: .*positive"),
    ("transmit: scale kind", lambda: transmit([V], 0.1, seed=0, scale=None), TypeError, "scale: .*NoneType"),
    ("transmit: estimator", lambda: transmit([V], 0.1, seed=0, estimator="ml"), InputError, "estimator: .*'ml'"),
    ("transmit: seed", lambda: transmit([V], 0.1, seed=None), TypeError, "seed: "),
    ("transmit: number of users", lambda: transmit([V], [0.1, 0.2], seed=0), ShapeError, r"mse: .*1\).*got \(2,\)"),
    ("transmit: no block", lambda: transmit([V], np.ones((0, 1)), seed=0), ShapeError, "mse: .*at least one block"),
    ("transmit: too many blocks", lambda: transmit([V], np.ones((2, 1)), seed=0), InputError, "2 blocks .* 1 symbols"),
    ("transmit: too many dimensions", lambda: transmit([V], np.ones((1, 1, 1)), seed=0), ShapeError, "mse: "),
    ("transmit: negative mse", lambda: transmit([V], -0.1, seed=0), InputError, "mse: .*'additive'.*at least 0"),
    ("transmit: NaN mse", lambda: transmit([V], NAN, seed=0), NonFiniteError, "mse: "),
    ("transmit: mse > 1", lambda: transmit([V], 1.1, seed=0, estimator="mmse"), InputError, "mse: .*between 0 and 1"),
    ("transmit: mse = 1", lambda: transmit([V], 1.0, seed=0, estimator="unbiased"), InputError, "mse: .*below 1"),
    (
        "transmit: silent user, unbiased",
        lambda: transmit([V] * 2, sic(H, [1.0, 0.0], I3), seed=0, estimator="unbiased"),
        InputError,
        "silent user",
    ),
    (
        "transmit: reception of others",
        lambda: transmit([V] * 3, sic(H, 1.0, I3), seed=0),
        ShapeError,
        r"reception.error_covariance: .*3 vectors, got \(2, 2\)",
    ),
]
