"""Wrong input to resilience, and what the error must say: (id, call, exception, pattern)."""

from __future__ import annotations

import torch
from torch.utils.data import IterableDataset, TensorDataset

from helpers.two_by_two import BATCHES, W, X, Y, changed, linear, without
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.resilience import attention_keys, embedding_keys, few_shot, realign, resilient_fusion, restore

NAN, INF = float("nan"), float("inf")

LABELLED = TensorDataset(torch.zeros(5, 1), torch.tensor([0, 0, 0, 1, 7]))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


def realigned(batches=BATCHES, **options):
    return lambda: realign(linear(), batches, **{"steps": 1, **options})


def fused(*, model=None, base=W, received=(W, W), tasks=BATCHES, **options):
    return lambda: resilient_fusion(
        linear() if model is None else model, base, received, tasks, **{"frozen": (), "steps": 1, **options}
    )


KEYS = [
    ("embedding_keys: no model", lambda: embedding_keys(3), TypeError, "model_or_state.*int"),
    ("embedding_keys: no tensors", lambda: embedding_keys({"w": 1.0}), TypeError, r"model_or_state\['w'\].*float"),
    ("attention_keys: a pickle", lambda: attention_keys("model.pt"), InputError, r"\.safetensors.*'model\.pt'"),
]

RESTORE = [
    ("restore: unknown name", lambda: restore(W, W, ["wieght"]), InputError, "keys: 'wieght' matches none"),
    ("restore: unknown pattern", lambda: restore(W, W, "embed.*"), InputError, r"keys: 'embed\.\*' matches none"),
    ("restore: no names", lambda: restore(W, W, [3]), TypeError, "keys.*int"),
    ("restore: missing", lambda: restore(W, without("bias"), "bias"), StateMismatchError, "base lacks 'bias'"),
    (
        "restore: reshaped",
        lambda: restore(W, changed(bias=torch.zeros(3)), "*"),
        StateMismatchError,
        r"state\['bias'\] has shape \(2,\); base has \(3,\)",
    ),
    (
        "restore: dtype",
        lambda: restore(W, changed(bias=torch.zeros(2, dtype=torch.float16)), "bias"),
        StateMismatchError,
        "float32.*float16",
    ),
    ("restore: no state", lambda: restore([1], W, "bias"), TypeError, "state.*list"),
    ("restore: no base", lambda: restore(W, None, "bias"), TypeError, "base.*NoneType"),
]

FEW_SHOT = [
    ("few_shot: too few", lambda: few_shot(LABELLED, 2, seed=0), InputError, "at least 2.*class 1 has 1, 7 has 1"),
    ("few_shot: zero shots", lambda: few_shot(LABELLED, 0, seed=0), InputError, "shots.*at least 1.*0"),
    ("few_shot: half a shot", lambda: few_shot(LABELLED, 0.5, seed=0), TypeError, "shots.*float"),
    ("few_shot: no seed", lambda: few_shot(LABELLED, 1, seed=None), TypeError, "seed.*NoneType"),
    ("few_shot: empty", lambda: few_shot([], 1, seed=0), InputError, "dataset.*empty"),
    ("few_shot: a stream", lambda: few_shot(Stream(), 1, seed=0), TypeError, "map-style.*Stream"),
    ("few_shot: no pairs", lambda: few_shot([torch.ones(2)], 1, seed=0), TypeError, r"dataset\[0\].*bare tensor"),
    ("few_shot: floats", lambda: few_shot([("x", 0.5)], 1, seed=0), TypeError, "labels.*float"),
    (
        "few_shot: several labels",
        lambda: few_shot(TensorDataset(X, torch.ones(3, 4)), 1, seed=0),
        TypeError,
        r"one class a sample.*\(4,\)",
    ),
]

REALIGN = [
    ("realign: no model", lambda: realign(3, BATCHES), TypeError, "model.*int"),
    ("realign: negative steps", realigned(steps=-1), InputError, "steps.*-1"),
    ("realign: half a step", realigned(steps=0.5), TypeError, "steps.*float"),
    ("realign: frozen matches nothing", realigned(frozen=["embed*"]), InputError, r"frozen: 'embed\*' matches none"),
    ("realign: trainable matches nothing", realigned(trainable="head"), InputError, "trainable: 'head' matches none"),
    ("realign: all frozen", realigned(frozen="*"), InputError, "nothing to train.*frozen"),
    (
        "realign: nothing requires gradients",
        lambda: realign(linear().requires_grad_(False), BATCHES),
        InputError,
        "nothing to train.*requires_grad",
    ),
    ("realign: no tasks", realigned({}), InputError, "tasks_or_batches.*empty"),
    ("realign: no batches", realigned([]), InputError, "tasks_or_batches.*at least one batch"),
    ("realign: a task without batches", realigned({"a": (linear(), [])}), InputError, r"\['a'\].*at least one batch"),
    ("realign: used up", realigned(iter(BATCHES), steps=2), InputError, "pass a list or a DataLoader"),
    ("realign: a tensor", realigned(X), TypeError, "tasks_or_batches.*Tensor"),
    ("realign: a head without batches", realigned({"a": linear()}), TypeError, r"\['a'\].*Linear"),
    ("realign: no pairs", realigned([X]), TypeError, r"\(inputs, targets\).*bare tensor"),
    ("realign: loss is NaN", realigned([(X * NAN, Y)]), NonFiniteError, "loss is nan in step 0"),
    ("realign: loss is no number", realigned(loss=lambda z, y: z), ShapeError, r"loss.*one number.*\(3, 2\)"),
    ("realign: loss is no tensor", realigned(loss=lambda z, y: 1.0), TypeError, "loss.*float"),
    ("realign: loss is a name", realigned(loss="mse"), TypeError, "loss.*str"),
    ("realign: negative lr", realigned(lr=-0.1), InputError, "lr.*-0.1"),
    ("realign: lr is NaN", realigned(lr=NAN), InputError, "lr.*nan"),
    ("realign: negative decay", realigned(weight_decay=-1.0), InputError, "weight_decay.*-1"),
    ("realign: warmup of steps", realigned(warmup=10), InputError, "warmup.*share.*10"),
    ("realign: optimizer is a name", realigned(optimizer="adam"), TypeError, "optimizer.*str"),
    ("realign: optimizer makes nothing", realigned(optimizer=lambda p: None), TypeError, "optimizer.*NoneType"),
    ("realign: lr twice", realigned(lr=0.1, optimizer=torch.optim.SGD), InputError, "lr: belong"),
]

FUSION = [
    ("resilient_fusion: no model", fused(model=W), TypeError, "model.*dict"),
    ("resilient_fusion: nothing received", fused(received=[]), InputError, "received.*empty"),
    ("resilient_fusion: one vector bare", fused(received=W), TypeError, "received.*sequence"),
    ("resilient_fusion: missing key", fused(received=[W, without("bias")]), StateMismatchError, r"received\[1\] lacks"),
    ("resilient_fusion: base lacks", fused(base=without("bias")), StateMismatchError, "base lacks 'bias'"),
    (
        "resilient_fusion: base reshaped",
        fused(base=changed(bias=torch.zeros(3))),
        StateMismatchError,
        r"base\['bias'\] has shape \(3,\)",
    ),
    ("resilient_fusion: received NaN", fused(received=[changed(bias=torch.tensor([0, NAN]))]), NonFiniteError, "bias"),
    ("resilient_fusion: no embeddings", fused(frozen=None), InputError, r"frozen: no embeddings.*frozen=\(\)"),
    ("resilient_fusion: frozen matches nothing", fused(frozen="conv*"), InputError, "frozen: 'conv.*matches none"),
    ("resilient_fusion: rule is a name", fused(rule="ties"), TypeError, "rule.*str"),
    ("resilient_fusion: negative steps", fused(steps=-3), InputError, "steps.*-3"),
]

CASES = [*KEYS, *RESTORE, *FEW_SHOT, *REALIGN, *FUSION]
