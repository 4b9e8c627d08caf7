"""Wrong input to jammers, receivers and scenarios, and what the error must say: (id, call, exception, pattern)."""

from __future__ import annotations

import numpy as np
import torch

from rmtllmf.channel import (
    Uplink,
    UplinkScenario,
    barrage_covariance,
    covariance_of,
    dbm,
    imperfect_channel,
    lmmse,
    min_max_rate_covariance,
    sic,
    strongest_user_covariance,
    sum_rate,
    worst_case,
    worst_case_covariance,
)
from rmtllmf.errors import InputError, NonFiniteError, NotPSDError, ShapeError

NAN, INF = float("nan"), float("inf")
H = np.arange(1, 7).reshape(3, 2) * (1 + 0.5j)
I3 = np.eye(3)


def poisoned(value, like=H):
    bad = like.copy()
    bad[0, 0] = value
    return bad


def every_jammer():
    """The same mistakes at every door that takes H, P, P_N."""
    doors = {
        "worst_case": lambda H=H, P=1.0, P_N=1.0: worst_case(H, P, P_N),
        "worst_case_covariance": lambda H=H, P=1.0, P_N=1.0: worst_case_covariance(H, P, P_N),
        "min_max_rate": lambda H=H, P=1.0, P_N=1.0: min_max_rate_covariance(H, P, P_N),
        "strongest_user": lambda H=H, P=1.0, P_N=1.0: strongest_user_covariance(H, P, P_N),
    }
    for name, call in doors.items():
        yield from [
            (f"{name}: real H", lambda c=call: c(H=H.real), TypeError, r"H: .*float64; a channel.*\.astype\(complex\)"),
            (f"{name}: real H, torch", lambda c=call: c(H=torch.ones(3, 2)), TypeError, r"\.to\(torch.complex128\)"),
            (f"{name}: H vector", lambda c=call: c(H=H[0]), ShapeError, r"H: expected shape.*got \(2,\)"),
            (f"{name}: H empty", lambda c=call: c(H=H[:, :0]), ShapeError, r"H: .*got \(3, 0\)"),
            (f"{name}: H NaN", lambda c=call: c(H=poisoned(NAN)), NonFiniteError, "H: holds 1 non-finite.*of 6"),
            (f"{name}: H inf", lambda c=call: c(H=poisoned(INF)), NonFiniteError, "H: "),
            (f"{name}: H None", lambda c=call: c(H=None), TypeError, "H: .*NoneType"),
            (f"{name}: H string", lambda c=call: c(H="H"), TypeError, "H: .*str"),
            (f"{name}: H objects", lambda c=call: c(H=np.array([[object()]])), TypeError, "H: .*object"),
            (f"{name}: negative P", lambda c=call: c(P=[1.0, -1.0]), InputError, "P: expected numbers >= 0, got -1.0"),
            (f"{name}: NaN P", lambda c=call: c(P=NAN), NonFiniteError, "P: "),
            (f"{name}: complex P", lambda c=call: c(P=1j), TypeError, "P: expected real.*complex"),
            (f"{name}: P string", lambda c=call: c(P="1"), TypeError, "P: .*str"),
            (f"{name}: P length", lambda c=call: c(P=[1.0] * 3), ShapeError, r"P: expected .*2\).*got \(3,\)"),
            (f"{name}: P matrix", lambda c=call: c(P=np.ones((2, 2))), InputError, "P: .*exactly diagonal"),
            (f"{name}: P matrix size", lambda c=call: c(P=np.eye(3)), ShapeError, r"P: .*\(2, 2\), got \(3, 3\)"),
            (f"{name}: P too deep", lambda c=call: c(P=np.ones((5, 1, 2))), ShapeError, "P: .*add an axis to H"),
            (
                f"{name}: P batch",
                lambda c=call: c(H=np.stack([H] * 3), P=np.ones((4, 2))),
                ShapeError,
                r"P: shape \(4, 2\) does not broadcast",
            ),
            (
                f"{name}: negative P_N",
                lambda c=call: c(P_N=-80.0),
                InputError,
                r"P_N: expected numbers >= 0, got -80.0; powers are linear, in W: is it dBm\? from_dbm\(-80.0\)",
            ),
            (f"{name}: masked H", lambda c=call: c(H=np.ma.masked_array(H)), TypeError, r"H: .*masked.*\.filled"),
            (f"{name}: masked P", lambda c=call: c(P=np.ma.masked_array([1.0, 2.0])), TypeError, "P: .*masked"),
            (f"{name}: masked P_N", lambda c=call: c(P_N=np.ma.masked_array(1.0)), TypeError, "P_N: .*masked"),
            (f"{name}: inf P_N", lambda c=call: c(P_N=INF), NonFiniteError, "P_N: "),
            (f"{name}: NaN P_N", lambda c=call: c(P_N=NAN), NonFiniteError, "P_N: "),
            (f"{name}: P_N bool", lambda c=call: c(P_N=np.array([True])), TypeError, "P_N: expected real.*bool"),
            (
                f"{name}: P_N batch",
                lambda c=call: c(H=np.stack([H] * 3), P_N=np.ones(2)),
                ShapeError,
                r"batch dimensions do not broadcast: H \(3,\), P_N \(2,\)(?!.* P \().*to sweep P_N .* P_N\[:, None\]",
            ),
        ]


def every_receiver():
    """The same mistakes at every door that takes H, P, C."""
    for name, call in {"sic": sic, "lmmse": lmmse, "sum_rate": sum_rate}.items():
        yield from [
            (f"{name}: real H", lambda c=call: c(H.real, 1.0, I3), TypeError, "H: expected complex"),
            (f"{name}: negative P", lambda c=call: c(H, -1.0, I3), InputError, "P: expected numbers >= 0"),
            (f"{name}: C shape", lambda c=call: c(H, 1.0, np.eye(2)), ShapeError, r"C: .*3, 3\), got \(2, 2\)"),
            (f"{name}: C number", lambda c=call: c(H, 1.0, 1.0), ShapeError, r"C: .*got \(\)"),
            (f"{name}: C not Hermitian", lambda c=call: c(H, 1.0, np.triu(np.ones((3, 3)))), NotPSDError, "Hermitian"),
            (f"{name}: C indefinite", lambda c=call: c(H, 1.0, np.diag([1, 1, -1.0])), NotPSDError, "-1.000e"),
            (f"{name}: C negative", lambda c=call: c(H, 1.0, -I3), NotPSDError, "C: expected positive semidef"),
            (f"{name}: masked C", lambda c=call: c(H, 1.0, np.ma.masked_array(I3)), TypeError, "C: .*masked"),
            (
                f"{name}: C of two precisions",
                lambda c=call: c(H, 1.0, np.diag([1.0, 1.0, -1e-7])),
                NotPSDError,
                "C: .*within the precision of complex64, but C is in double",
            ),
            (f"{name}: C NaN", lambda c=call: c(H, 1.0, poisoned(NAN, I3)), NonFiniteError, "C: "),
            (
                f"{name}: C batch",
                lambda c=call: c(np.stack([H] * 2), 1.0, np.stack([I3] * 3)),
                ShapeError,
                r"batch .*H \(2,\).*C \(3,\)",
            ),
        ]
    for name, call in {"sic": sic, "lmmse": lmmse}.items():
        yield from [
            (
                f"{name}: designed_for shape",
                lambda c=call: c(H, 1.0, I3, designed_for=np.eye(4)),
                ShapeError,
                r"designed_for: .*\(4, 4\)",
            ),
            (
                f"{name}: designed_for indefinite",
                lambda c=call: c(H, 1.0, I3, designed_for=np.diag([1, 1, -1.0])),
                NotPSDError,
                "designed_for",
            ),
        ]


MASKED = np.ma.masked_array([1.0, 2.0])

CASES = [
    ("H: ragged", lambda: worst_case([[1j], [1j, 2j]], 1.0, 1.0), ShapeError, "H: .*rows of equal length"),
    ("P: ragged", lambda: worst_case(H, [[1.0], [1.0, 2.0]], 1.0), ShapeError, "P: .*rows of equal length"),
    (
        "P: listed leaves",
        lambda: worst_case(H, [torch.ones((), requires_grad=True)] * 2, 1.0),
        TypeError,
        r"P: expected numbers \(.*requires grad",
    ),
    ("scenario: placement number", lambda: UplinkScenario(placement=5.0), TypeError, "placement: .*float"),
    ("scenario: noise figure", lambda: UplinkScenario(noise_figure=4000.0), InputError, "noise_figure: "),
    ("scenario: power flag", lambda: UplinkScenario(power=np.True_), TypeError, "power: .*bool"),
    ("min_max: order", lambda: min_max_rate_covariance(H, 1.0, 1.0, order="fastest"), InputError, "order: .*'fastest'"),
    ("imperfect: error", lambda: imperfect_channel(H, 1.5, seed=0), InputError, "error: .*between 0 and 1, got 1.5"),
    ("imperfect: shape", lambda: imperfect_channel(H, [0.1, 0.2], seed=0), ShapeError, r"error: shape \(2,\)"),
    ("imperfect: real H", lambda: imperfect_channel(H.real, 0.1, seed=0), TypeError, "H: expected complex"),
    *every_jammer(),
    *every_receiver(),
    ("P: list of masked", lambda: worst_case(np.stack([H] * 2), [MASKED, MASKED], 1.0), TypeError, "P: .*masked"),
    ("noise: negative", lambda: worst_case(H, 1.0, 1.0, noise=-104.0), InputError, r"noise: .*from_dbm\(-104.0\)"),
    ("snapshots: real", lambda: covariance_of(I3), TypeError, "snapshots: .*amplitudes have phases"),
    ("decibels: masked", lambda: dbm(MASKED), TypeError, "power: .*masked"),
    ("sic: no order", lambda: sic(H, 1.0, I3, order=None), TypeError, "order: .*got None.*lmmse"),
    ("worst_case: negative noise", lambda: worst_case(H, 1.0, 1.0, noise=-1e-3), InputError, "noise: .*-0.001"),
    ("worst_case: NaN noise", lambda: worst_case(H, 1.0, 1.0, noise=NAN), NonFiniteError, "noise: "),
    ("barrage: real H", lambda: barrage_covariance(H.real, 1.0), TypeError, "H: expected complex"),
    ("barrage: negative P_N", lambda: barrage_covariance(H, -1.0), InputError, "P_N: "),
    ("sic: unknown order", lambda: sic(H, 1.0, I3, order="loudest"), InputError, "order: .*weakest_first.*'loudest'"),
    ("sic: short order", lambda: sic(H, 1.0, I3, order=[0]), ShapeError, r"order: .*2\), got \(1,\)"),
    ("sic: no permutation", lambda: sic(H, 1.0, I3, order=[1, 1]), InputError, r"order: .*each of 0..1 once"),
    ("uplink: real H", lambda: Uplink(H.real, 1.0, 1.0), TypeError, "H: expected complex"),
    ("uplink: negative noise", lambda: Uplink(H, 1.0, -1.0), InputError, "noise: "),
    ("uplink: shapes", lambda: Uplink(np.stack([H] * 2), 1.0, np.ones(3)), ShapeError, "broadcast.*noise"),
    ("scenario: no users", lambda: UplinkScenario(num_users=0), InputError, "num_users: expected .* at least 1, got 0"),
    ("scenario: half an antenna", lambda: UplinkScenario(num_antennas=1.5), TypeError, "num_antennas: .*int"),
    ("scenario: negative power", lambda: UplinkScenario(power=-1.0), InputError, "power: "),
    ("scenario: NaN power", lambda: UplinkScenario(power=NAN), InputError, "power: .*nan"),
    ("scenario: zero distance", lambda: UplinkScenario(min_distance=0), InputError, "min_distance: .*positive"),
    ("scenario: distances", lambda: UplinkScenario(max_distance=50.0), InputError, "max_distance: .*100.0 m, got 50.0"),
    ("scenario: placement", lambda: UplinkScenario(placement="square"), InputError, "placement: .*'square'"),
    ("scenario: positions", lambda: UplinkScenario(placement=[1.0]), ShapeError, "placement: expected 8 .*got 1"),
    ("scenario: position", lambda: UplinkScenario(num_users=1, placement=[-1.0]), InputError, r"placement\[0\]"),
    ("scenario: path loss", lambda: UplinkScenario(path_loss="urban"), InputError, "path_loss: .*'urban'"),
    ("scenario: exponent", lambda: UplinkScenario(path_loss=-2.0), InputError, "path_loss: .*positive"),
    (
        "scenario: path loss function",
        lambda: UplinkScenario(path_loss=lambda d: -d).draw(seed=0),
        InputError,
        "path_loss: the function must return",
    ),
    ("scenario: bandwidth", lambda: UplinkScenario(bandwidth=0.0), InputError, "bandwidth: "),
    ("draw: batch", lambda: UplinkScenario().draw(-1, seed=0), InputError, "batch: "),
    ("draw: dtype", lambda: UplinkScenario().draw(seed=0, dtype=torch.float32), InputError, "dtype: .*float32"),
    ("draw: seed", lambda: UplinkScenario().draw(seed="0"), TypeError, "seed: expected an int or"),
    ("draw: float seed", lambda: UplinkScenario().draw(seed=0.5), TypeError, "seed: .*float"),
]
