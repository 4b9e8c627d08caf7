"""Wrong input to the channel and to task vectors, and what the error must say: (id, call, exception, pattern)."""

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
    transmit,
    transmit_sum,
    worst_case,
    worst_case_covariance,
)
from rmtllmf.errors import InputError, NonFiniteError, NotPSDError, ShapeError, StateMismatchError
from rmtllmf.taskvec import TaskVector, heuristic_scale, task_arithmetic

NAN, INF = float("nan"), float("inf")
H = np.arange(1, 7).reshape(3, 2) * (1 + 0.5j)
I3 = np.eye(3)
V = {"w": torch.tensor([1.0, 2.0])}
BASE = {"w": torch.zeros(2), "steps": torch.tensor(1)}


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


MASKED = np.ma.masked_array([1.0, 2.0])
BIG = TaskVector({"w": torch.tensor([3e38])})


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
    ("P: list of masked", lambda: worst_case(np.stack([H] * 2), [MASKED, MASKED], 1.0), TypeError, "P: .*masked"),
    ("noise: negative", lambda: worst_case(H, 1.0, 1.0, noise=-104.0), InputError, r"noise: .*from_dbm\(-104.0\)"),
    ("snapshots: real", lambda: covariance_of(I3), TypeError, "snapshots: .*amplitudes have phases"),
    ("decibels: masked", lambda: dbm(MASKED), TypeError, "power: .*masked"),
    ("sic: no order", lambda: sic(H, 1.0, I3, order=None), TypeError, "order: .*got None.*lmmse"),
    ("seed: NumPy's", lambda: transmit([V], 0.1, seed=np.random.default_rng(0)), TypeError, "seed: .*NumPy.*integers"),
    ("transmit: None", lambda: transmit(None, 0.1, seed=0), TypeError, "vectors: .*NoneType"),
    ("vector: arrays", lambda: TaskVector({"w": np.ones(3)}), TypeError, r"\['w'\]: .*ndarray"),
    (
        "vector: between arrays",
        lambda: TaskVector.between(BASE, {"w": np.ones(3)}),
        TypeError,
        r"finetuned\['w'\]: .*ndarray; torch.from_numpy makes one",
    ),
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
    ("vector: times a lot", lambda: BIG * 10, NonFiniteError, r"the product\['w'\] holds 1 non-finite"),
    ("vector: plus a lot", lambda: BIG + BIG, NonFiniteError, r"the result\['w'\]"),
    ("vector: plus NaN", lambda: TaskVector(V) + {"w": torch.tensor([NAN, 0])}, NonFiniteError, r"the result\['w'\]"),
    ("vector: plus complex", lambda: TaskVector(V) + {"w": torch.ones(2) + 0j}, TypeError, "complex"),
    ("vector: to half", lambda: BIG.to(torch.float16), NonFiniteError, "to: 'w' overflows torch.float16"),
    ("vector: map to NaN", lambda: TaskVector(V).map(lambda n, t: t / 0), NonFiniteError, "function's result"),
    ("vector: map nothing", lambda: TaskVector(V).map(None), TypeError, "function: .*NoneType"),
    ("vector: times a NaN tensor", lambda: TaskVector(V) * torch.tensor(NAN), InputError, "factor: .*nan"),
    ("vector: times a complex tensor", lambda: TaskVector(V) * torch.tensor(1j), TypeError, "factor: .*complex"),
    ("vector: by a zero tensor", lambda: TaskVector(V) / torch.tensor(0.0), ZeroDivisionError, "divisor"),
    ("vector: by a vector", lambda: TaskVector(V) / torch.ones(2), ShapeError, "divisor: .*one number"),
    ("vector: numbered", lambda: TaskVector({0: V["w"]}), TypeError, "tensors: .*names as keys"),
    ("vector: select a number", lambda: TaskVector(V).select(3), TypeError, "keys: .*int"),
    ("vector: dot a number", lambda: TaskVector(V).dot(5), TypeError, "other: .*int"),
    ("vector: apply to a path", lambda: TaskVector(V).apply_to("base.safetensors"), TypeError, "base: .*load the file"),
    (
        "vector: apply overflows",
        lambda: TaskVector({"w": torch.tensor([1e5])}).apply_to({"w": torch.ones(1, dtype=torch.float16)}),
        NonFiniteError,
        r"base\['w'\] plus the task vector overflows torch.float16",
    ),
    ("arithmetic: a model", lambda: task_arithmetic(torch.nn.Linear(1, 1)), TypeError, "vectors: .*Linear"),
    (
        "arithmetic: integers in one",
        lambda: task_arithmetic([V, {"w": torch.tensor([1, 2])}]),
        StateMismatchError,
        r"vectors\[1\]\['w'\] is torch.int64; vectors\[0\] has torch.float32",
    ),
    ("arithmetic: complex", lambda: task_arithmetic([{"w": torch.ones(2) + 0j}]), TypeError, "complex entries"),
    ("arithmetic: complex scale", lambda: task_arithmetic([V], np.complex128(1 + 2j)), TypeError, "scale: .*complex"),
    ("arithmetic: flag", lambda: task_arithmetic([V], np.True_), TypeError, "scale: .*bool"),
    ("arithmetic: huge scale", lambda: task_arithmetic([V], 10**400), InputError, "scale: .*finite"),
    ("min_max: order", lambda: min_max_rate_covariance(H, 1.0, 1.0, order="fastest"), InputError, "order: .*'fastest'"),
    ("imperfect: error", lambda: imperfect_channel(H, 1.5, seed=0), InputError, "error: .*between 0 and 1, got 1.5"),
    ("imperfect: shape", lambda: imperfect_channel(H, [0.1, 0.2], seed=0), ShapeError, r"error: shape \(2,\)"),
    ("imperfect: real H", lambda: imperfect_channel(H.real, 0.1, seed=0), TypeError, "H: expected complex"),
    *every_jammer(),
    *every_receiver(),
    *every_out(),
    *every_sum(),
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
    ("vector: empty", lambda: TaskVector({}), InputError, "tensors: expected at least one"),
    ("vector: integers", lambda: TaskVector({"n": torch.tensor([1])}), TypeError, r"tensors\['n'\] is torch.int64"),
    ("vector: no tensor", lambda: TaskVector({"n": 1.0}), TypeError, r"tensors\['n'\]: expected a tensor, got float"),
    ("vector: no mapping", lambda: TaskVector([1.0]), TypeError, "tensors: expected .*got list"),
    ("vector: NaN", lambda: TaskVector({"w": torch.tensor([NAN, 1])}), NonFiniteError, r"tensors\['w'\] holds 1 "),
    ("vector: times NaN", lambda: TaskVector(V) * NAN, InputError, "factor: .*nan"),
    ("vector: times text", lambda: TaskVector(V) * "2", TypeError, "factor: .*str"),
    ("vector: times a vector", lambda: TaskVector(V) * torch.ones(2), ShapeError, r"factor: .*\(2,\)"),
    ("vector: times a mapping", lambda: TaskVector(V) * TaskVector(V), TypeError, "unsupported operand"),
    ("vector: by zero", lambda: TaskVector(V) / 0, ZeroDivisionError, "divisor"),
    ("vector: plus other keys", lambda: TaskVector(V) + {"b": V["w"]}, StateMismatchError, "lacks 'w'.*unexpected 'b'"),
    ("vector: plus other shapes", lambda: TaskVector(V) - {"w": torch.ones(3)}, StateMismatchError, r"\(3,\)"),
    ("vector: plus a number", lambda: TaskVector(V) + 1, TypeError, "unsupported operand"),
    ("vector: dot", lambda: TaskVector(V).dot({"b": V["w"]}), StateMismatchError, "other lacks 'w'"),
    ("vector: to integers", lambda: TaskVector(V).to(torch.int64), TypeError, "to: .*int64"),
    (
        "vector: map to nothing",
        lambda: TaskVector(V).map(lambda n, t: None),
        TypeError,
        "function: .*'w', got NoneType",
    ),
    ("vector: select nothing", lambda: TaskVector(V).select([]), InputError, "keys: expected at least one"),
    ("vector: select unknown", lambda: TaskVector(V).select("attn.*"), InputError, r"keys: 'attn.\*' matches none"),
    ("vector: apply to less", lambda: TaskVector(V).apply_to({"b": V["w"]}), StateMismatchError, "base lacks 'w'"),
    (
        "vector: apply to other shape",
        lambda: TaskVector(V).apply_to({"w": torch.ones(3)}),
        StateMismatchError,
        r"\(2,\)",
    ),
    ("vector: apply to integers", lambda: TaskVector(V).apply_to({"w": torch.tensor([1, 2])}), TypeError, "int64"),
    ("vector: apply with NaN", lambda: TaskVector(V).apply_to(BASE, scale=NAN), InputError, "scale: "),
    ("vector: save elsewhere", lambda: TaskVector(V).save("tau.pt"), InputError, "path: .*safetensors.*'tau.pt'"),
    ("vector: between a pickle", lambda: TaskVector.between("base.pt", BASE), InputError, "base: .*'base.pt'"),
    ("vector: between numbers", lambda: TaskVector.between(1, BASE), TypeError, "base: .*got int"),
    (
        "vector: nothing to tune",
        lambda: TaskVector.between({"n": torch.tensor(1)}, {"n": torch.tensor(2)}),
        InputError,
        "base: holds no floating-point",
    ),
    ("arithmetic: none", lambda: task_arithmetic([]), InputError, "vectors: expected at least one"),
    ("arithmetic: one mapping", lambda: task_arithmetic(V), TypeError, "vectors: .*sequence"),
    ("arithmetic: scale", lambda: task_arithmetic([V], INF), InputError, "scale: "),
    ("arithmetic: missing key", lambda: task_arithmetic([V, {"b": V["w"]}]), StateMismatchError, r"vectors\[1\] lacks"),
    ("heuristic: none", lambda: heuristic_scale(0), InputError, "num_tasks: .*got 0"),
    ("heuristic: half", lambda: heuristic_scale(1.5), TypeError, "num_tasks: .*float"),
]
