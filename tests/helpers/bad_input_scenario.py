"""Wrong input to the pieces of a scenario, and what the error must say: (id, call, exception, pattern)."""

from __future__ import annotations

import numpy as np
import torch

from rmtllmf.channel import (
    Rician,
    Shadowing,
    UplinkScenario,
    exponential_correlation,
    free_space,
    ldpc_decode,
    ldpc_encode,
    log_distance,
    los_probability,
    rma,
    sionna_uplink,
    steering_vector,
    uma,
    umi,
)
from rmtllmf.errors import InputError, NonFiniteError, NotPSDError, ShapeError

NAN = float("nan")


def every_cell():
    """The same mistakes at every door of TR 38.901."""
    for name, cell in {"uma": uma, "umi": umi, "rma": rma}.items():
        highest = "3e.10" if name == "rma" else "1e.11"
        yield from [
            (f"{name}: too near", lambda c=cell: c(5.0, 1e9, los=True), InputError, "distance: .*10 m to .*got 5 m"),
            (f"{name}: too far", lambda c=cell: c([20.0, 6e3], 1e9, los=False), InputError, "to 5000 m, got 6000 m"),
            (f"{name}: NaN", lambda c=cell: c(NAN, 1e9, los=True), NonFiniteError, "distance: "),
            (f"{name}: negative", lambda c=cell: c(-1.0, 1e9, los=True), InputError, "distance: expected positive"),
            (f"{name}: carrier", lambda c=cell: c(50.0, 2.4, los=True), InputError, "carrier: .*5e[+]08 .*got 2.4 Hz"),
            (
                f"{name}: carrier high",
                lambda c=cell: c(50.0, 2e11, los=True),
                InputError,
                f"carrier: .*{highest} Hz",
            ),
            (f"{name}: base", lambda c=cell: c(50.0, 1e9, los=True, base_height=0.5), InputError, "base_height: "),
            (
                f"{name}: user",
                lambda c=cell: c(50.0, 1e9, los=True, user_height=50),
                InputError,
                "user_height: .*got 50",
            ),
            (f"{name}: los", lambda c=cell: c(50.0, 1e9, los=0.5), TypeError, "los: .*booleans, got torch.float64"),
            (
                f"{name}: los shape",
                lambda c=cell: c(np.full(3, 50.0), 1e9, los=np.array([True, False])),
                ShapeError,
                r"los: shape \(2,\).*\(3,\)",
            ),
        ]


CASES = [
    *every_cell(),
    ("free space: zero", lambda: free_space(0.0, 1e9), InputError, "distance: expected positive numbers, got 0.0"),
    ("free space: carrier", lambda: free_space(1.0, 0.0), InputError, "carrier: .*positive"),
    ("free space: text", lambda: free_space("1", 1e9), TypeError, "distance: .*str"),
    ("log-distance: exponent", lambda: log_distance(1.0, 1e9, -2.0), InputError, "exponent: .*positive"),
    ("log-distance: reference", lambda: log_distance(1.0, 1e9, 2, reference=0), InputError, "reference: .*positive"),
    ("rma: far", lambda: rma(2e4, 1e9, los=True), InputError, "RMa from 10 m to 10000 m, got 20000 m"),
    ("rma: buildings", lambda: rma(50.0, 1e9, los=True, building_height=2), InputError, "building_height: .*5 to 50 m"),
    ("rma: streets", lambda: rma(50.0, 1e9, los=True, street_width=99), InputError, "street_width: .*got 99 m"),
    (
        "uma: high users",
        lambda: uma(50.0, 1e9, los=True, user_height=15),
        InputError,
        "environment_height: .*random .from 13 m on.; give one",
    ),
    (
        "uma: environment above users",
        lambda: uma(50.0, 1e9, los=True, environment_height=3),
        InputError,
        "environment_height: .*1.5 m, got 3",
    ),
    ("los: model", lambda: los_probability(50.0, "inh"), InputError, "model: .*'umi'.*got 'inh'"),
    ("los: user", lambda: los_probability(50.0, "uma", user_height=30), InputError, "user_height: .*23 m"),
    ("rician: K", lambda: Rician(NAN), InputError, "k_factor: .*nan"),
    ("rician: no dB", lambda: Rician(4e3), InputError, "k_factor: .*decibels.*4000.0"),
    ("rician: text", lambda: Rician("9 dB"), TypeError, "k_factor: .*str"),
    ("rician: spacing", lambda: Rician(9.0, spacing=0.0), InputError, "spacing: .*positive"),
    ("steering: antennas", lambda: steering_vector(0.0, 0), InputError, "num_antennas: .*at least 1"),
    ("steering: half", lambda: steering_vector(0.0, 1.5), TypeError, "num_antennas: .*float"),
    ("steering: azimuth", lambda: steering_vector(NAN, 2), NonFiniteError, "azimuth: "),
    (
        "exponential: above 1",
        lambda: exponential_correlation(1.1j, 2),
        InputError,
        "correlation: .*at most 1, got 1.1j",
    ),
    ("exponential: text", lambda: exponential_correlation("1", 2), TypeError, "correlation: .*str"),
    ("exponential: size", lambda: exponential_correlation(0.1, 0), InputError, "size: .*at least 1"),
    ("shadowing: negative", lambda: Shadowing(-1.0), InputError, "shadowing: .*at least 0 dB, got -1.0"),
    ("shadowing: name", lambda: Shadowing("umi"), InputError, "shadowing: .*'3gpp'.*'umi'"),
    ("shadowing: both", lambda: Shadowing(1.0, 0.5, decorrelation=9.0), InputError, "decorrelation: .*one of the two"),
    ("shadowing: distance", lambda: Shadowing(1.0, decorrelation=0.0), InputError, "decorrelation: .*positive"),
    ("scenario: shadowing", lambda: UplinkScenario(shadowing=-3.0), InputError, "shadowing: .*-3.0"),
    ("scenario: shadowing none", lambda: UplinkScenario(shadowing=None), TypeError, "shadowing: .*NoneType"),
    (
        "scenario: 3gpp shadowing",
        lambda: UplinkScenario(shadowing="3gpp"),
        InputError,
        "shadowing: '3gpp' needs .*'umi'",
    ),
    (
        "scenario: shadowing correlation",
        lambda: UplinkScenario(shadowing=Shadowing(3.0, -0.5)),
        InputError,
        "shadowing correlation: expected -0.143 to 1 .* 8 users, got -0.5",
    ),
    (
        "scenario: shadowing matrix",
        lambda: UplinkScenario(shadowing=Shadowing(3.0, np.eye(3))),
        ShapeError,
        r"shadowing correlation: .*8, 8\), got \(3, 3\)",
    ),
    ("scenario: fading", lambda: UplinkScenario(fading="rice"), InputError, "fading: .*Rician, got 'rice'"),
    ("scenario: fading number", lambda: UplinkScenario(fading=9.0), InputError, "fading: .*got 9.0"),
    ("scenario: correlation", lambda: UplinkScenario(correlation=1.5), InputError, "correlation: .*at most 1, got 1.5"),
    ("scenario: correlation none", lambda: UplinkScenario(correlation=None), TypeError, "correlation: .*NoneType"),
    (
        "scenario: correlation shape",
        lambda: UplinkScenario(correlation=np.eye(8)),
        ShapeError,
        r"correlation: .*16, 16\), got \(8, 8\)",
    ),
    (
        "scenario: correlation users",
        lambda: UplinkScenario(correlation=np.stack([np.eye(16)] * 3)),
        ShapeError,
        r"correlation: .*\(8, 16, 16\), got \(3, 16, 16\)",
    ),
    (
        "scenario: correlation diagonal",
        lambda: UplinkScenario(correlation=2 * np.eye(16)),
        InputError,
        "correlation: expected ones on the diagonal",
    ),
    (
        "scenario: correlation indefinite",
        lambda: UplinkScenario(num_antennas=2, correlation=np.array([[1, 2], [2, 1.0]])),
        NotPSDError,
        "correlation: .*-1.000e",
    ),
    (
        "scenario: correlation not Hermitian",
        lambda: UplinkScenario(num_antennas=2, correlation=np.array([[1, 0.5], [0, 1.0]])),
        NotPSDError,
        "correlation: expected Hermitian",
    ),
    (
        "scenario: out of reach",
        lambda: UplinkScenario(path_loss="umi", max_distance=6e3),
        InputError,
        "path_loss: 'umi' does not fit .*10 m to 5000 m, got 6000 m",
    ),
    (
        "scenario: placed out of reach",
        lambda: UplinkScenario(path_loss="uma", num_users=1, placement=[(3.0, 4.0)]),
        InputError,
        "path_loss: 'uma' does not fit .*got 5 m",
    ),
    (
        "scenario: out of band",
        lambda: UplinkScenario(path_loss="rma", carrier=6e10),
        InputError,
        "path_loss: 'rma' does not fit .*carrier",
    ),
    (
        "scenario: three coordinates",
        lambda: UplinkScenario(num_users=1, placement=[(1.0, 2.0, 3.0)]),
        ShapeError,
        r"placement\[0\]: expected two coordinates",
    ),
    (
        "scenario: coordinates and distances",
        lambda: UplinkScenario(num_users=2, placement=[(1.0, 2.0), 3.0]),
        ShapeError,
        r"placement\[1\]: expected two",
    ),
    (
        "scenario: user in the base station",
        lambda: UplinkScenario(num_users=1, placement=[(0.0, 0.0)]),
        InputError,
        r"placement\[0\]: \(0, 0\)",
    ),
    ("scenario: placement none", lambda: UplinkScenario(placement=None), TypeError, "placement: .*NoneType"),
    ("sionna: scenario", lambda: sionna_uplink("inf", seed=0), InputError, "scenario: .*'umi'.*got 'inf'"),
    ("sionna: los", lambda: sionna_uplink("umi", seed=0, los=0.5), TypeError, "los: .*float"),
    ("sionna: offset", lambda: sionna_uplink("umi", seed=0, offset=NAN), InputError, "offset: .*nan"),
    ("sionna: seed", lambda: sionna_uplink("umi", seed=None), TypeError, "seed: "),
    ("sionna: batch", lambda: sionna_uplink("umi", -1, seed=0), InputError, "batch: "),
    (
        "sionna: dtype",
        lambda: sionna_uplink("umi", seed=0, dtype=torch.float64),
        InputError,
        "dtype: .*torch.float64",
    ),
    (
        "sionna: fading of its own",
        lambda: sionna_uplink("umi", seed=0, cell=UplinkScenario(fading=Rician(9.0))),
        InputError,
        "cell: expected fading at its default.*Rician",
    ),
    (
        "sionna: path loss of its own",
        lambda: sionna_uplink("umi", seed=0, cell=UplinkScenario(path_loss=3.0)),
        InputError,
        "cell: expected path_loss at its default.*3.0",
    ),
    (
        "sionna: out of reach",
        lambda: sionna_uplink("umi", seed=0, cell=UplinkScenario(max_distance=6e3)),
        InputError,
        "path_loss: 'umi' does not fit .*6000 m",
    ),
    ("ldpc: no bits", lambda: ldpc_encode(torch.tensor([0.5] * 20), 40), InputError, "bits: expected zeros and ones"),
    ("ldpc: a number", lambda: ldpc_encode(torch.tensor(1), 40), ShapeError, "bits: "),
    ("ldpc: NaN", lambda: ldpc_decode(torch.full((40,), NAN), 20), NonFiniteError, "llr: "),
    ("ldpc: n", lambda: ldpc_encode(torch.ones(20), 40.0), TypeError, "n: .*float"),
    ("ldpc: k", lambda: ldpc_decode(torch.ones(40), 0), InputError, "k: .*got 0"),
    ("ldpc: iterations", lambda: ldpc_decode(torch.ones(40), 20, iterations=0), InputError, "iterations: .*got 0"),
]
