"""Wrong input to what protects the physical layer, and what the error must say: (id, call, exception, pattern)."""

from __future__ import annotations

import numpy as np

from rmtllmf.channel import (
    channel_inversion,
    covariance_of,
    estimated_covariance,
    fractional_power_control,
    null_directions,
    power_only_covariance,
    repeat_block,
    scheduled,
    stack_blocks,
)
from rmtllmf.errors import InputError, NonFiniteError, NotPSDError, ShapeError

NAN, INF = float("nan"), float("inf")
H = np.arange(1, 7).reshape(3, 2) * (1 + 0.5j)
I3 = np.eye(3)
Z = np.ones((3, 4)) + 0j
BLOCKS = np.stack([H, H])


def every_covariance():
    """The same mistakes at every door that takes a covariance."""
    doors = {
        "estimated": lambda C: estimated_covariance(C, 5, seed=0),
        "power only": power_only_covariance,
        "stack": lambda C: stack_blocks(BLOCKS, C),
        "repeat": lambda C: repeat_block(H, C, 2),
        "null": lambda C: null_directions(H, C, 1),
        "scheduled": lambda C: scheduled(H, 1.0, C),
    }
    for name, call in doors.items():
        yield from [
            (f"{name}: C None", lambda c=call: c(None), TypeError, "C: .*NoneType"),
            (f"{name}: C vector", lambda c=call: c(np.ones(3)), ShapeError, r"C: expected shape.*got \(3,\)"),
            (f"{name}: C not square", lambda c=call: c(np.ones((3, 2))), ShapeError, r"C: expected shape.*\(3, 2\)"),
            (f"{name}: C NaN", lambda c=call: c(NAN * I3), NonFiniteError, "C: holds 9 non-finite"),
            (f"{name}: C not Hermitian", lambda c=call: c(np.triu(np.ones((3, 3)))), NotPSDError, "C: .*Hermitian"),
        ]
        if name not in ("stack", "repeat"):  # where the receivers look at the sign
            yield f"{name}: C indefinite", lambda c=call: c(-I3), NotPSDError, "C: .*positive semidefinite"


def every_channel():
    """The same mistakes at every door that takes a channel."""
    doors = {
        "repeat": lambda H: repeat_block(H, I3, 2),
        "null": lambda H: null_directions(H, I3, 1),
        "inversion": lambda H: channel_inversion(H, 1.0),
        "fractional": lambda H: fractional_power_control(H, 1.0),
        "scheduled": lambda H: scheduled(H, 1.0, I3),
    }
    for name, call in doors.items():
        yield from [
            (f"{name}: real H", lambda c=call: c(H.real), TypeError, "H: expected complex"),
            (f"{name}: H vector", lambda c=call: c(H[:, 0]), ShapeError, r"H: expected shape.*got \(3,\)"),
            (f"{name}: H NaN", lambda c=call: c(H * NAN), NonFiniteError, "H: holds 6"),
        ]


CASES = [
    *every_covariance(),
    *every_channel(),
    ("covariance_of: real", lambda: covariance_of(Z.real), TypeError, "snapshots: expected complex"),
    ("covariance_of: vector", lambda: covariance_of(Z[0]), ShapeError, r"snapshots: .*N_R, L\).*\(4,\)"),
    ("covariance_of: none", lambda: covariance_of(Z[:, :0]), ShapeError, r"snapshots: .*\(3, 0\)"),
    ("covariance_of: NaN", lambda: covariance_of(Z * NAN), NonFiniteError, "snapshots: holds 12"),
    ("covariance_of: loading", lambda: covariance_of(Z, loading=-0.1), InputError, "loading: .*-0.1"),
    ("covariance_of: loading shape", lambda: covariance_of([Z] * 2, loading=[1.0] * 3), ShapeError, r"loading \(3,\)"),
    ("covariance_of: rule", lambda: covariance_of(Z, shrinkage="oas"), InputError, "shrinkage: .*ledoit_wolf.*'oas'"),
    ("covariance_of: too much", lambda: covariance_of(Z, shrinkage=1.5), InputError, "shrinkage: .*0 to 1, got 1.5"),
    ("covariance_of: negative", lambda: covariance_of(Z, shrinkage=-0.5), InputError, "shrinkage: .*-0.5"),
    (
        "covariance_of: one snapshot",
        lambda: covariance_of(Z[:, :1], shrinkage="ledoit_wolf"),
        InputError,
        "snapshots: 'ledoit_wolf' needs at least 2.*got 1",
    ),
    ("estimated: none", lambda: estimated_covariance(I3, 0, seed=0), InputError, "snapshots: .*at least 1, got 0"),
    ("estimated: half", lambda: estimated_covariance(I3, 2.5, seed=0), TypeError, "snapshots: .*int, got float"),
    ("estimated: seed", lambda: estimated_covariance(I3, 2, seed=None), TypeError, "seed: "),
    ("estimated: rule", lambda: estimated_covariance(I3, 2, seed=0, shrinkage="lw"), InputError, "shrinkage: .*'lw'"),
    (
        "estimated: one snapshot",
        lambda: estimated_covariance(I3, 1, seed=0, shrinkage="ledoit_wolf"),
        InputError,
        "snapshots: .*at least 2",
    ),
    (
        "estimated: loading shape",
        lambda: estimated_covariance(np.stack([I3] * 2), 4, seed=0, loading=np.ones(3)),
        ShapeError,
        r"C \(2,\), loading \(3,\)",
    ),
    ("stack: one block", lambda: stack_blocks(H, I3), ShapeError, r"H: expected shape \(..., K, N_R, Q\).*\(3, 2\)"),
    ("stack: real H", lambda: stack_blocks(BLOCKS.real, I3), TypeError, "H: expected complex"),
    ("stack: blocks", lambda: stack_blocks(BLOCKS, np.stack([I3] * 3)), ShapeError, r"H \(2,\), C \(3,\)"),
    ("stack: other", lambda: stack_blocks(BLOCKS, I3, np.eye(2)), ShapeError, r"others\[0\]: .*\(2, 2\)"),
    ("repeat: never", lambda: repeat_block(H, I3, 0), InputError, "K: .*at least 1, got 0"),
    ("repeat: half", lambda: repeat_block(H, I3, 1.5), TypeError, "K: expected an int, got float"),
    ("repeat: other", lambda: repeat_block(H, I3, 2, 1.0), ShapeError, r"others\[0\]: .*\(\)"),
    ("null: negative", lambda: null_directions(H, I3, -1), InputError, "count: .*at least 0, got -1"),
    ("null: everything", lambda: null_directions(H, I3, 3), InputError, "count: at least one of 3 dimensions.*got 3"),
    ("null: half", lambda: null_directions(H, I3, 0.5), TypeError, "count: .*float"),
    ("null: P", lambda: null_directions(H, I3, 1, P=[1.0, -1.0]), InputError, "P: expected numbers >= 0"),
    ("null: other", lambda: null_directions(H, I3, 1, np.eye(2)), ShapeError, r"others\[0\]"),
    ("null: batch", lambda: null_directions(BLOCKS, np.stack([I3] * 3), 1), ShapeError, r"H \(2,\), C \(3,\)"),
    ("inversion: negative", lambda: channel_inversion(H, -1.0), InputError, "target: .*-1.0"),
    ("inversion: infinite", lambda: channel_inversion(H, INF), NonFiniteError, "target: "),
    ("inversion: users", lambda: channel_inversion(H, [1.0] * 3), ShapeError, r"target: .*2\), got \(3,\)"),
    ("inversion: batch", lambda: channel_inversion(BLOCKS, np.ones((3, 1))), ShapeError, r"target: .*\(2, 2\)"),
    ("inversion: maximum", lambda: channel_inversion(H, 1.0, max_power=-1.0), InputError, "max_power: "),
    ("inversion: gain", lambda: channel_inversion(H, 1.0, gain=[1.0, -1.0]), InputError, "gain: "),
    ("inversion: no gain", lambda: channel_inversion(0 * H, 1.0), InputError, "max_power: .*infinite power"),
    ("fractional: maximum", lambda: fractional_power_control(H, -1.0), InputError, "max_power: .*-1.0"),
    ("fractional: users", lambda: fractional_power_control(H, [1.0] * 3), ShapeError, r"max_power: .*\(3,\)"),
    (
        "fractional: exponent",
        lambda: fractional_power_control(H, 1.0, exponent=1.5),
        InputError,
        "exponent: .*0 to 1, got 1.5",
    ),
    ("fractional: text", lambda: fractional_power_control(H, 1.0, exponent="1"), TypeError, "exponent: .*str"),
    ("scheduled: negative P", lambda: scheduled(H, -1.0, I3), InputError, "P: expected numbers >= 0"),
    (
        "scheduled: design",
        lambda: scheduled(H, 1.0, I3, designed_for=np.eye(2)),
        ShapeError,
        r"designed_for: .*3, 3\), got \(2, 2\)",
    ),
    (
        "scheduled: slots",
        lambda: scheduled(H, 1.0, np.stack([I3] * 3), per_slot=True),
        ShapeError,
        r"C: expected 2 slots.*\(3, 3, 3\)",
    ),
    ("scheduled: no slots", lambda: scheduled(H, 1.0, I3, per_slot=True), ShapeError, "C: expected 2 slots"),
]
