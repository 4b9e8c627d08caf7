"""Wrong input to clip, and what the error must say: (id, call, exception, pattern)."""

from __future__ import annotations

import torch
from torch import nn

from helpers.two_by_two import X, linear
from rmtllmf import clip
from rmtllmf.errors import InputError, NonFiniteError, ShapeError

NAN, INF = float("nan"), float("inf")


class TextTower(nn.Module):
    """Enough of a model for the checks that come before it is asked."""

    def encode_text(self, tokens, normalize=False):
        raise AssertionError("the arguments should have been refused")


def head_of(names=("cat", "dog"), templates=("a {}",), model=None, **options):
    return lambda: clip.zero_shot_head(TextTower() if model is None else model, names, templates, **options)


CASES = [
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
