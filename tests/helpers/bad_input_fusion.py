"""Wrong input to fusion rules and to metrics, and what the error must say: (id, call, exception, pattern)."""

from __future__ import annotations

import datetime

import numpy as np
import torch
from torch import nn

from rmtllmf.channel import UplinkScenario, barrage_covariance, transmit_symbols
from rmtllmf.errors import InputError, ShapeError, StateMismatchError
from rmtllmf.metrics import cosine_similarity, weight_disentanglement_error
from rmtllmf.resilience import protect, realign
from rmtllmf.taskvec import (
    TaskVector,
    fisher_information,
    fuse,
    lines,
    regmean_plus_plus,
    task_arithmetic,
    train_router,
    twin_merging,
    weighted_average,
)

V = {"w": torch.tensor([1.0, 2.0])}
H = np.eye(3, 2) + 0j
TINY = nn.Linear(2, 2, bias=False)
TASKS = {"a": [torch.ones(3, 2)], "b": [torch.ones(3, 2)]}
LABELLED = {"a": [(torch.ones(3, 2), torch.zeros(3, dtype=torch.long))]}
LAYERS = {f"layers.{i}.w": V["w"] + i for i in range(2)}
VECTORS = [{"weight": torch.eye(2)}, {"weight": -torch.eye(2)}]


def deleted(vector):
    del vector.anything


def with_unused_layer():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.forward = lambda x: model[0](x)
    vectors = [{key: torch.ones_like(p) for key, p in model.state_dict().items()}]
    return regmean_plus_plus(vectors, model, {"a": [torch.ones(3, 2)]}, layers=["0", "1"])


def with_counters():
    model = nn.Module()
    model.register_parameter("count", nn.Parameter(torch.ones(2, dtype=torch.long), requires_grad=False))
    model.weight = nn.Parameter(torch.ones(2))
    model.forward = lambda x: x * model.weight
    return realign(model, LABELLED, trainable=["count"])


CASES = [
    # what vectors are
    ("names are numbers", lambda: task_arithmetic([{1: V["w"]}]), TypeError, r"vectors\[0\]: expected names.*got 1 of"),
    (
        "no tensor",
        lambda: task_arithmetic([V, {"w": 1.0}]),
        TypeError,
        r"vectors\[1\]\['w'\]: expected a tensor",
    ),
    ("all skipped", lambda: task_arithmetic([V], skip="w"), InputError, "skip: leaves nothing"),
    ("delete", lambda: deleted(TaskVector(V)), AttributeError, "immutable"),
    ("sum from 1", lambda: sum([TaskVector(V)], 1), TypeError, "unsupported operand"),
    ("half a character", lambda: TaskVector({"\ud800": V["w"]}).save("never.safetensors"), InputError, "half a char"),
    ("too many names", lambda: TaskVector({"w" * 10**6: V["w"]}).save("never.safetensors"), InputError, "cannot hold"),
    # options of every rule
    ("weights match nothing", lambda: task_arithmetic([V, V], weights={"v*": 1.0}), InputError, r"weights: 'v\*'.*'w'"),
    (
        "weights with a gradient",
        lambda: task_arithmetic([V, V], weights=torch.ones(2, requires_grad=True)),
        InputError,
        "weights: gradients.*detach",
    ),
    (
        "three weights for two",
        lambda: task_arithmetic([V, V], weights={"*": [1, 2, 3]}),
        ShapeError,
        r"weights\['\*'\]: expected 2 numbers.*got 3",
    ),
    (
        "weights without a mean",
        lambda: weighted_average([V, V], weights=[1, -1]),
        InputError,
        "weights: add up to 0 for 'w'",
    ),
    ("rule is a name", lambda: fuse(V, [V], rule="ties"), TypeError, "rule: expected a function.*got str"),
    (
        "out is a list",
        lambda: lines(LAYERS, out=[]),
        TypeError,
        "out: expected a mapping.*list",
    ),
    # rules that look at the model
    ("loss is a name", lambda: fisher_information(TINY, TASKS, loss="mse"), TypeError, "loss: .*got str"),
    ("a layer that is not called", with_unused_layer, InputError, "layers: 1 of 2 are not called"),
    (
        "one input for a router",
        lambda: train_router(twin_merging(TINY, VECTORS[:1], rank=1), {"a": [torch.ones(1, 2)]}, seed=0),
        InputError,
        "tasks: expected at least two inputs, got 1",
    ),
    # the channel
    (
        "powers are dates",
        lambda: barrage_covariance(H, np.zeros(1, "M8[D]")),
        TypeError,
        "P_N: .*datetime",
    ),
    ("a date", lambda: barrage_covariance(H, datetime.date(2026, 1, 1)), TypeError, "P_N: "),
    (
        "extended precision",
        lambda: barrage_covariance(H, np.ones(1, np.longdouble)),
        TypeError,
        "P_N: extended precision",
    ),
    (
        "NumPy on another device",
        lambda: UplinkScenario().draw(seed=0, numpy=True, device="meta"),
        InputError,
        "device: NumPy.*meta",
    ),
    (
        "13 bits",
        lambda: transmit_symbols([V, V], H, 1.0, np.eye(3), seed=0, bits=13),
        InputError,
        "bits: expected at most 12.*13",
    ),
    # models and metrics
    ("count is trainable", with_counters, TypeError, "trainable: 'count' is torch.int64"),
    (
        "vectors are a set",
        lambda: weight_disentanglement_error(TINY, TINY, {1, 2}, LABELLED | {"b": LABELLED["a"]}),
        TypeError,
        "vectors: expected a sequence or a mapping.*set",
    ),
    (
        "only empty batches",
        lambda: weight_disentanglement_error(
            TINY, TINY, VECTORS, {"b": [(torch.ones(0, 2), torch.ones(0, dtype=torch.long))]} | LABELLED
        ),
        InputError,
        r"tasks\['b'\]: expected at least one input",
    ),
    ("no direction", lambda: cosine_similarity([{"n": torch.tensor(1)}]), InputError, "vectors: hold no floating"),
    (
        "received a whole number's update",
        lambda: protect(
            nn.BatchNorm1d(2), nn.BatchNorm1d(2), [{"num_batches_tracked": torch.tensor(1.0)}], 0.1, seed=0
        ),
        StateMismatchError,
        r"received\[0\]\['num_batches_tracked'\] is torch.float32; base has torch.int64",
    ),
]
