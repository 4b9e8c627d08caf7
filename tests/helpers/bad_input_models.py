"""Wrong input to resilience, metrics, clip and plot, and what the error must say: (id, call, exception, pattern)."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from rmtllmf import clip, plot
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.metrics import (
    accuracy,
    cosine_similarity,
    disturbance_test,
    normalized_accuracy,
    snr_db,
    weight_disentanglement_error,
)
from rmtllmf.resilience import attention_keys, embedding_keys, few_shot, realign, resilient_fusion, restore

NAN, INF = float("nan"), float("inf")
X, Y = torch.ones(3, 2), torch.tensor([0, 1, 0])
BATCHES = [(X, Y)]
W = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
LABELLED = TensorDataset(torch.zeros(5, 1), torch.tensor([0, 0, 0, 1, 7]))
ROW = {"condition": "ideal", "method": "both", "mean": 0.5, "values": [0.5]}


def linear():
    return nn.Linear(2, 2)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


def changed(**entries):
    return {**W, **entries}


def without(key):
    return {name: tensor for name, tensor in W.items() if name != key}


def realigned(batches=BATCHES, **options):
    return lambda: realign(linear(), batches, **{"steps": 1, **options})


def fused(*, model=None, base=W, received=(W, W), tasks=BATCHES, **options):
    return lambda: resilient_fusion(
        linear() if model is None else model, base, received, tasks, **{"frozen": (), "steps": 1, **options}
    )


def disentangled(*, model=None, base=W, vectors=(W, W), tasks=None, **options):
    two = {"a": BATCHES, "b": BATCHES} if tasks is None else tasks
    return lambda: weight_disentanglement_error(linear() if model is None else model, base, vectors, two, **options)


def disturbance(undisturbed=W, disturbed=W, variance=1.0, inputs=X, **options):
    return lambda: disturbance_test(linear(), undisturbed, disturbed, variance, inputs, **options)


def charted(**entries):
    return lambda: plot.fusion_chart([{**ROW, **entries}])


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


class TextTower(nn.Module):
    """Enough of a model for the checks that come before it is asked."""

    def encode_text(self, tokens, normalize=False):
        raise AssertionError("the arguments should have been refused")


def head_of(names=("cat", "dog"), templates=("a {}",), model=None, **options):
    return lambda: clip.zero_shot_head(TextTower() if model is None else model, names, templates, **options)


CLIP = [
    ("zero_shot_head: no names", head_of([]), InputError, "class_names.*empty"),
    ("zero_shot_head: one name bare", head_of("cat"), TypeError, "class_names.*str"),
    ("zero_shot_head: a blank name", head_of(["cat", " "]), InputError, r"class_names\[1\].*' '"),
    ("zero_shot_head: a number", head_of(["cat", 3]), TypeError, r"class_names\[1\].*int"),
    ("zero_shot_head: no templates", head_of(templates=()), InputError, "templates.*empty"),
    ("zero_shot_head: one template bare", head_of(templates="a {}"), TypeError, "templates.*str"),
    ("zero_shot_head: without {}", head_of(templates=["a {}", "a cat"]), InputError, r"templates\[1\].*'a cat'"),
    ("zero_shot_head: two {}", head_of(templates=["{} {}"]), InputError, r"templates\[0\].*'\{\} \{\}'"),
    ("zero_shot_head: a named {}", head_of(templates=["a {name}"]), InputError, r"templates\[0\]"),
    ("zero_shot_head: a function that forgets", head_of(templates=[lambda c: "cat"]), InputError, r"templates\[0\]"),
    ("zero_shot_head: a number as template", head_of(templates=[3]), TypeError, r"templates\[0\].*int"),
    ("zero_shot_head: batch size", head_of(batch_size=0), InputError, "batch_size.*0"),
    ("zero_shot_head: no text tower", head_of(model=linear()), TypeError, "text tower.*Linear"),
    ("image_classifier: no image tower", lambda: clip.image_classifier(TextTower(), ["a"]), TypeError, "image tower"),
    ("ZeroShotHead: no tensor", lambda: clip.ZeroShotHead([[1.0]]), TypeError, "weight.*list"),
    ("ZeroShotHead: no matrix", lambda: clip.ZeroShotHead(torch.ones(3)), ShapeError, r"weight.*\(3,\)"),
    ("ZeroShotHead: NaN", lambda: clip.ZeroShotHead(X * NAN), NonFiniteError, "weight"),
    ("ZeroShotHead: scale", lambda: clip.ZeroShotHead(X, logit_scale=0.0), InputError, "logit_scale.*positive"),
    ("ImageClassifier: no module", lambda: clip.ImageClassifier(None, linear()), TypeError, "encoder.*NoneType"),
    ("load: unknown name", lambda: clip.load("ViT-B-17"), InputError, "name.*'ViT-B-17'.*did you mean"),
    ("load: unknown weights", lambda: clip.load("ViT-B-16", "nope"), InputError, "pretrained.*'nope'.*openai"),
    ("evaluate: no batches", lambda: clip.evaluate(linear(), []), InputError, "at least one batch"),
]

PLOT = [
    ("similarity_heatmap: a row", lambda: plot.similarity_heatmap([1.0, 0.5]), ShapeError, r"square.*\(2,\)"),
    ("similarity_heatmap: not square", lambda: plot.similarity_heatmap(X), ShapeError, r"square.*\(3, 2\)"),
    (
        "similarity_heatmap: names",
        lambda: plot.similarity_heatmap(torch.eye(2), ["a"]),
        ShapeError,
        "names.*2 rows, got 1",
    ),
    ("similarity_heatmap: NaN", lambda: plot.similarity_heatmap([[NAN]]), NonFiniteError, "similarity"),
    ("similarity_heatmap: no cosines", lambda: plot.similarity_heatmap([[7.0]]), InputError, "between -1 and 1.*7"),
    ("similarity_heatmap: words", lambda: plot.similarity_heatmap([["a"]]), TypeError, "similarity"),
    ("similarity_heatmap: ax", lambda: plot.similarity_heatmap([[1.0]], ax=3), TypeError, "ax.*int"),
    ("fusion_chart: no rows", lambda: plot.fusion_chart([]), InputError, "rows.*none"),
    ("fusion_chart: one row bare", lambda: plot.fusion_chart(ROW), TypeError, "rows.*dict"),
    ("fusion_chart: no mapping", lambda: plot.fusion_chart([3]), TypeError, r"rows\[0\].*int"),
    (
        "fusion_chart: no mean",
        lambda: plot.fusion_chart([{"condition": "ideal", "method": "both"}]),
        InputError,
        "lacks mean",
    ),
    ("fusion_chart: condition", charted(condition="idle"), InputError, "condition is 'idle'.*'ideal'"),
    ("fusion_chart: method", charted(method="all"), InputError, "method is 'all'.*'both'"),
    ("fusion_chart: base under attack", charted(method="base"), InputError, "method is 'base'"),
    ("fusion_chart: twice", lambda: plot.fusion_chart([ROW, ROW]), InputError, r"rows\[1\].*second row"),
    ("fusion_chart: NaN", charted(mean=NAN), InputError, r"rows\[0\]\['mean'\].*nan"),
    ("fusion_chart: values", charted(values=[0.5, INF]), InputError, r"rows\[0\]\['values'\].*inf"),
]

CASES = [
    *KEYS,
    *RESTORE,
    *FEW_SHOT,
    *REALIGN,
    *FUSION,
    *ACCURACY,
    *VECTORS,
    *DISENTANGLEMENT,
    *DISTURBANCE,
    *CLIP,
    *PLOT,
]
