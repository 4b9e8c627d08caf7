"""What is said where cross entropy cannot take logits and targets: shapes, classes, the task, and what to do."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from rmtllmf._loss import loss_of
from rmtllmf.errors import InputError, ShapeError
from rmtllmf.metrics import accuracy
from rmtllmf.resilience import (
    protect,
    realign,
    realign_heads,
    resilient_fusion,
    search_scale,
    squared_gradients,
    steps_by_cross_validation,
)
from rmtllmf.taskvec import fisher_information, frank_wolfe_coefficients


class Language(nn.Module):
    """A causal language model as Hugging Face's: logits (B, T, V) as an attribute."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(7, 4)
        self.lm_head = nn.Linear(4, 7, bias=False)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.lm_head(self.embed_tokens(input_ids)))


IDS = torch.arange(12).reshape(2, 6) % 7
TOKENS = [{"input_ids": IDS, "labels": IDS}] * 2
PICKS = r"of a language model pick a token, head=lambda output: output\.logits\[:, -1\]"
SHIFTS = (
    r"or train on all tokens with a loss of your own that shifts by one, loss=lambda logits, labels: cross_entropy\("
)


def last(output):
    return output.logits[:, -1]


def shifted(logits, labels):
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def some(model):
    """What was received, or a fused update, of the model."""
    return {name: torch.full_like(tensor, 0.1) for name, tensor in model.state_dict().items()}


def base_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def validated(model, tasks, **options):
    return realign(model, {"fine": (last, [(IDS, IDS[:, 0])])}, steps=1, validation=tasks, **options)


def fused(model, tasks, **options):
    return resilient_fusion(model, base_of(model), [some(model)], tasks, steps=2, **options)


def protected(model, tasks, **options):
    return protect(model, base_of(model), [some(model)], 0.1, tasks, seed=0, search=False, **options)


CALLS = {
    "realign": lambda model, tasks, **options: realign(model, tasks, steps=2, **options),
    "resilient_fusion": fused,
    "protect": protected,
    "search_scale": lambda model, tasks, **options: search_scale(model, model, some(model), tasks, **options),
    "squared_gradients": squared_gradients,
    "fisher_information": lambda m, tasks, **options: fisher_information(m, tasks, labels="given", **options),
    "cross validation": lambda m, t, **options: steps_by_cross_validation(m, t, steps=2, seed=0, folds=2, **options),
}


@pytest.mark.parametrize("name", CALLS)
def test_labels_of_all_tokens_are_an_error_that_says_what_to_do(name):
    says = rf"got targets \((1|2), 6\) for logits \((1|2), 6, 7\); {PICKS}, {SHIFTS}"
    with pytest.raises(ShapeError, match=rf"\['a'\]: .*{says}"):
        CALLS[name](Language(), {"a": TOKENS})
    CALLS[name](Language(), {"a": TOKENS}, loss=shifted)


@pytest.mark.parametrize("name", CALLS)
def test_a_class_that_does_not_exist_is_named_with_its_task(name):
    batches = [{"input_ids": IDS, "labels": torch.tensor([3, 7])}] * 2
    found = "(3|7) to 7"  # samples may come alone
    options = {} if name != "cross validation" else {"batch_size": 2}
    with pytest.raises(InputError, match=rf"\['a'\]: expected class indices from 0 to 6, .*got {found}; is this the"):
        CALLS[name](Language(), {"a": (last, batches * 2)}, **options)


def test_validation_and_one_standard_error_and_learned_rules_say_the_same():
    bad = [{"input_ids": IDS, "labels": torch.tensor([-1, 2])}]
    with pytest.raises(ShapeError, match=rf"validation\['a'\]: .*{PICKS}, {SHIFTS}"):
        validated(Language(), {"a": TOKENS})
    with pytest.raises(InputError, match=r"validation\['a'\]: expected class indices from 0 to 6.*got -1 to 2"):
        validated(Language(), {"a": (last, bad)})
    model = Language()
    with pytest.raises(InputError, match=r"tasks\['a'\]: expected class indices from 0 to 6"):
        search_scale(model, model, some(model), {"a": (last, bad)}, one_standard_error=True)
    with pytest.raises(InputError, match=r"tasks\['a'\]: expected class indices from 0 to 6"):
        frank_wolfe_coefficients([some(model)], model, {"a": (last, bad)}, steps=1)
    with pytest.raises(InputError, match=r"expected class indices from 0 to 6.*got -1 to 2"):
        accuracy(model, bad, head=last)
    with pytest.raises(InputError, match=r"tasks_or_batches\['a'\]: expected class indices from 0 to 2"):
        realign_heads(nn.Linear(4, 5), {"a": (nn.Linear(5, 3), [(torch.ones(2, 4), torch.tensor([0, 3]))])}, steps=1)


def test_without_a_name_the_batches_are_named():
    with pytest.raises(
        ShapeError, match=r"^tasks_or_batches: expected targets \(B,\) for logits \(B, K\), got targets"
    ):
        realign(Language(), TOKENS)


def test_accuracy_gives_the_same_hint():
    with pytest.raises(ShapeError, match=rf"\(B, K\), got \(2, 6, 7\); {PICKS}"):
        accuracy(Language(), TOKENS)


GOOD = (
    (cross_entropy, torch.zeros(4, 3), torch.tensor([0, 1, 2, 2])),
    (cross_entropy, torch.zeros(4, 3), torch.tensor([0, 1, -100, 2])),
    (cross_entropy, torch.zeros(4, 3), torch.full((4, 3), 1 / 3)),
    (cross_entropy, torch.zeros(3), torch.tensor(1)),
    (cross_entropy, torch.zeros(4, 3, 5), torch.zeros(4, 5, dtype=torch.int64)),
    (cross_entropy, torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
    (nn.CrossEntropyLoss(ignore_index=9, reduction="sum"), torch.zeros(4, 3), torch.tensor([0, 9, 1, 2])),
    (mse_loss, torch.zeros(4, 3), torch.zeros(4, 3)),
    (lambda logits, targets: targets, SimpleNamespace(), torch.tensor(1.0)),
)


@pytest.mark.parametrize(("loss", "logits", "targets"), GOOD)
def test_what_the_loss_can_take_is_left_to_it(loss, logits, targets):
    found, expected = loss_of(loss, logits, targets, "tasks"), loss(logits, targets)
    torch.testing.assert_close(found, expected, equal_nan=True)


BAD = (
    (torch.zeros(4, 3), torch.tensor([0, 1]), ShapeError, r"targets \(2,\) for logits \(4, 3\)$"),
    (torch.zeros(4, 6, 3), torch.tensor([0, 1, 2, 0]), ShapeError, rf"targets \(4,\) for logits \(4, 6, 3\); {PICKS}$"),
    (
        torch.zeros(4, 3),
        torch.zeros(4),
        ShapeError,
        r"probabilities.*\(4, 3\), got torch.float32.*\(4,\); .*pass loss=",
    ),
    (torch.zeros(3), torch.tensor(3), InputError, "from 0 to 2.*got 3 to 3"),
    (SimpleNamespace(), torch.tensor([0]), TypeError, "logits as a tensor.*SimpleNamespace; a head makes them"),
    (torch.zeros(4, 3), [0, 1, 2, 0], TypeError, "targets as a tensor.*list"),
)


@pytest.mark.parametrize("loss", [cross_entropy, nn.CrossEntropyLoss()])
@pytest.mark.parametrize(("logits", "targets", "error", "says"), BAD)
def test_what_it_cannot_take_is_named(loss, logits, targets, error, says):
    with pytest.raises(error, match=f"^tasks: expected .*{says}"):
        loss_of(loss, logits, targets, "tasks")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_half_precision_model_and_base_are_named_at_once(dtype):
    model = nn.Linear(4, 3).to(dtype)
    tasks = {"a": [(torch.ones(3, 4), torch.arange(3))]}
    says = r"realign in float32, both the model \(model.float\(\)\) and a `base` or `anchor` of half precision"
    for call in (realign, fused, protected):
        with pytest.raises(InputError, match=says):
            call(model, tasks, **({} if call is realign else {"frozen": ()}))
    protected(model.float(), tasks, frozen=())
