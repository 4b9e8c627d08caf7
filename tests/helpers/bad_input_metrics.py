"""Wrong input to metrics, and what the error must say: (id, call, exception, pattern)."""

from __future__ import annotations

import torch
from torch import nn

from helpers.two_by_two import BATCHES, W, X, Y, changed, linear, without
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.metrics import (
    accuracy,
    cosine_similarity,
    disturbance_test,
    normalized_accuracy,
    snr_db,
    weight_disentanglement_error,
)

NAN, INF = float("nan"), float("inf")


def disentangled(*, model=None, base=W, vectors=(W, W), tasks=None, **options):
    two = {"a": BATCHES, "b": BATCHES} if tasks is None else tasks
    return lambda: weight_disentanglement_error(linear() if model is None else model, base, vectors, two, **options)


def disturbance(undisturbed=W, disturbed=W, variance=1.0, inputs=X, **options):
    return lambda: disturbance_test(linear(), undisturbed, disturbed, variance, inputs, **options)


ACCURACY = [
    ("accuracy: no model", lambda: accuracy(3, BATCHES), TypeError, "model.*int"),
    ("accuracy: no batches", lambda: accuracy(linear(), []), InputError, "at least one batch"),
    ("accuracy: only empty", lambda: accuracy(linear(), [(X[:0], Y[:0])]), InputError, "only empty batches"),
    ("accuracy: a tensor", lambda: accuracy(linear(), X), TypeError, "batches.*Tensor"),
    ("accuracy: tasks", lambda: accuracy(linear(), {"a": BATCHES}), TypeError, "batches.*mapping"),
    ("accuracy: no pairs", lambda: accuracy(linear(), [(X, Y, Y)]), TypeError, "tuple of 3"),
    ("accuracy: soft targets", lambda: accuracy(linear(), [(X, X)]), TypeError, "class indices.*float32"),
    ("accuracy: too few targets", lambda: accuracy(linear(), [(X, Y[:2])]), ShapeError, r"\(3,\), got \(2,\)"),
    ("accuracy: logits of images", lambda: accuracy(nn.Identity(), [(X[0], Y)]), ShapeError, r"\(B, K\), got \(2,\)"),
    ("accuracy: NaN", lambda: accuracy(linear(), [(X * NAN, Y)]), NonFiniteError, "NaN"),
    ("normalized_accuracy: other tasks", lambda: normalized_accuracy({"a": 1}, {"b": 1}), InputError, "lacks 'b'"),
    ("normalized_accuracy: other length", lambda: normalized_accuracy([1, 1], [1]), ShapeError, "1, got 2"),
    ("normalized_accuracy: one of each", lambda: normalized_accuracy({"a": 1}, [1]), TypeError, "one of each"),
    ("normalized_accuracy: none", lambda: normalized_accuracy([], []), InputError, "at least one task"),
    ("normalized_accuracy: a number", lambda: normalized_accuracy(0.5, 0.6), TypeError, "accuracies.*float"),
    ("normalized_accuracy: zero", lambda: normalized_accuracy([1], [0.0]), InputError, r"references\[0\].*positive"),
    ("normalized_accuracy: NaN", lambda: normalized_accuracy({"a": NAN}, {"a": 1}), InputError, r"accuracies\['a'\]"),
    ("normalized_accuracy: negative", lambda: normalized_accuracy([-0.1], [1]), InputError, r"accuracies\[0\].*-0.1"),
]

VECTORS = [
    ("cosine_similarity: none", lambda: cosine_similarity([]), InputError, "vectors.*empty"),
    ("cosine_similarity: one bare", lambda: cosine_similarity(W), TypeError, "vectors.*sequence"),
    (
        "cosine_similarity: zero",
        lambda: cosine_similarity([W, {k: 0 * v for k, v in W.items()}]),
        InputError,
        r"\[1\]: is all zero",
    ),
    (
        "cosine_similarity: NaN",
        lambda: cosine_similarity([changed(bias=torch.tensor([NAN, 0]))]),
        NonFiniteError,
        "bias",
    ),
    (
        "cosine_similarity: missing",
        lambda: cosine_similarity([W, without("bias")]),
        StateMismatchError,
        r"\[1\] lacks 'bias'",
    ),
    (
        "cosine_similarity: reshaped",
        lambda: cosine_similarity([W, changed(bias=torch.zeros(3))]),
        StateMismatchError,
        r"vectors\[1\]\['bias'\]",
    ),
    ("cosine_similarity: complex", lambda: cosine_similarity([{"w": torch.ones(2) * 1j}]), TypeError, "complex"),
    ("snr_db: nothing sent", lambda: snr_db({"w": torch.zeros(2)}, {"w": torch.ones(2)}), InputError, "sent.*zero"),
    ("snr_db: missing", lambda: snr_db(W, without("bias")), StateMismatchError, "received lacks 'bias'"),
    ("snr_db: extra", lambda: snr_db(without("bias"), W), StateMismatchError, "unexpected 'bias'"),
    ("snr_db: reshaped", lambda: snr_db(W, changed(bias=torch.zeros(1))), StateMismatchError, r"received\['bias'\]"),
    (
        "snr_db: infinite",
        lambda: snr_db(W, changed(bias=torch.tensor([INF, 0]))),
        NonFiniteError,
        r"received\['bias'\]",
    ),
    ("snr_db: a tensor", lambda: snr_db(X, X), TypeError, "sent.*Tensor"),
]

DISENTANGLEMENT = [
    ("disentanglement: no model", disentangled(model=W), TypeError, "model.*dict"),
    ("disentanglement: one task", disentangled(tasks={"a": BATCHES}, vectors=[W]), InputError, "at least two.*1"),
    ("disentanglement: bare batches", disentangled(tasks=BATCHES), TypeError, "tasks.*mapping"),
    ("disentanglement: three vectors", disentangled(vectors=[W] * 3), InputError, "each of the 2 tasks, got 3"),
    ("disentanglement: other names", disentangled(vectors={"a": W, "c": W}), StateMismatchError, "vectors lacks 'b'"),
    ("disentanglement: a single vector", disentangled(vectors=W), StateMismatchError, "vectors lacks 'a', 'b'"),
    ("disentanglement: missing", disentangled(vectors=[without("bias")] * 2), StateMismatchError, "lacks 'bias'"),
    ("disentanglement: extra", disentangled(vectors=[changed(x=X)] * 2), StateMismatchError, "unexpected 'x'"),
    ("disentanglement: reshaped", disentangled(vectors=[changed(bias=X)] * 2), StateMismatchError, r"\['bias'\] has"),
    ("disentanglement: disagreeing", disentangled(vectors=[W, changed(x=X)]), StateMismatchError, r"vectors\[1\]"),
    ("disentanglement: base lacks", disentangled(base=without("bias")), StateMismatchError, "base lacks 'bias'"),
    ("disentanglement: scale", disentangled(scale=NAN), InputError, "scale.*nan"),
    ("disentanglement: single scale", disentangled(single_scale="x"), TypeError, "single_scale.*str"),
    ("disentanglement: no inputs", disentangled(tasks={"a": BATCHES, "b": []}), InputError, r"tasks\['b'\].*batch"),
    (
        "disentanglement: NaN",
        disentangled(vectors=[W, changed(bias=torch.tensor([NAN, 0]))]),
        NonFiniteError,
        "NaN",
    ),
]

DISTURBANCE = [
    ("disturbance_test: missing", disturbance(disturbed=without("bias")), StateMismatchError, "disturbed lacks 'bias'"),
    ("disturbance_test: extra", disturbance(changed(x=X)), StateMismatchError, "undisturbed has the unexpected 'x'"),
    ("disturbance_test: reshaped", disturbance(changed(bias=X)), StateMismatchError, r"undisturbed\['bias'\]"),
    (
        "disturbance_test: unknown name",
        disturbance(variance={"wieght": 1.0}),
        InputError,
        "tolerated_variance: 'wieght'",
    ),
    ("disturbance_test: negative variance", disturbance(variance=-1.0), InputError, "tolerated_variance.*-1"),
    (
        "disturbance_test: infinite variance",
        disturbance(variance={"bias": INF}),
        InputError,
        r"tolerated_variance\['bias'\]",
    ),
    ("disturbance_test: variance of a kind", disturbance(variance="small"), TypeError, "tolerated_variance.*str"),
    (
        "disturbance_test: a variance each",
        disturbance(variance=torch.ones(2)),
        ShapeError,
        r"tolerated_variance.*\(2,\)",
    ),
    ("disturbance_test: alpha", disturbance(alpha=5), InputError, "alpha.*between 0 and 1.*5"),
    ("disturbance_test: alpha 0", disturbance(alpha=0.0), InputError, "alpha"),
    ("disturbance_test: method", disturbance(method="bootstrap"), InputError, "method: .*'exact'.*'bootstrap'"),
    ("disturbance_test: no inputs", disturbance(inputs=X[:0]), InputError, "inputs.*empty"),
    ("disturbance_test: no batch", disturbance(inputs=torch.tensor(1.0)), ShapeError, "inputs.*batch dimension"),
    ("disturbance_test: unequal batches", disturbance(inputs=(X, X[:2])), ShapeError, r"inputs.*\(3, 2\), \(2, 2\)"),
    ("disturbance_test: inputs of a kind", disturbance(inputs="x"), TypeError, "inputs.*str"),
    ("disturbance_test: infinite logits", disturbance(inputs=X * INF), NonFiniteError, "logits"),
    (
        "disturbance_test: no logits",
        lambda: disturbance_test(nn.Flatten(0), {}, {}, 1.0, X),
        ShapeError,
        r"\(B, K\), got \(2,\)",
    ),
]

CASES = [*ACCURACY, *VECTORS, *DISENTANGLEMENT, *DISTURBANCE]
