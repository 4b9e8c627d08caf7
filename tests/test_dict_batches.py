"""Batches as Hugging Face's collators make them, {"input_ids": ..., "labels": ...}: the same numbers as from pairs."""

import copy
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from rmtllmf import metrics, resilience, taskvec
from rmtllmf.channel import transmit


class Classifier(nn.Module):
    """Takes what a tokenizer makes, by name, and no labels."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        return self.fc((self.embed_tokens(input_ids) * attention_mask[..., None]).mean(1))


def world():
    """A model, batches as pairs of a mapping and labels, and two task vectors."""
    torch.manual_seed(0)
    model = Classifier()
    batches = []
    for _ in range(2):
        ids = torch.randint(20, (12, 5))
        batches.append(({"input_ids": ids, "attention_mask": torch.ones(12, 5)}, torch.arange(12) % 3))
    names = model.state_dict()
    return model, batches, [taskvec.TaskVector({k: 0.1 * torch.randn_like(t) for k, t in names.items()}) for _ in "ab"]


def one(pair):
    inputs, labels = pair
    return {**inputs, "labels": labels}


def trained(function, **options):
    def run(model, batches, vectors):
        function(model, batches, steps=3, lr=0.1, **options)
        return model.state_dict()

    return run


def fused(function):
    def run(model, batches, vectors):
        base = copy.deepcopy(model.state_dict())
        return function(model, base, transmit(vectors, 0.1, seed=0), batches).state_dict()

    return run


def resiliently(model, base, heard, batches):
    resilience.resilient_fusion(model, base, heard, {"a": batches}, steps=3)
    return model


def protected(model, base, heard, batches):
    resilience.protect(model, base, heard, 0.1, {"a": batches}, steps=3, seed=0)
    return model


def heads(model, batches, vectors):
    found, _ = resilience.realign_heads(model, {"a": (nn.Linear(3, 3), batches)}, steps=2)
    return found["a"].state_dict()


def searched(model, batches, vectors):
    return dict(resilience.search_scale(model, model, vectors[0], batches, refinements=0).losses)


def cross_validated(model, batches, vectors):
    return resilience.steps_by_cross_validation(model, batches, steps=2, folds=2, seed=0).losses


def stepped(model, batches, vectors):
    return taskvec.frank_wolfe_coefficients(vectors, model, batches, steps=2).losses


LABELLED = {
    "accuracy": lambda model, batches, vectors: metrics.accuracy(model, batches),
    "realign": trained(resilience.realign),
    "realign, validated": lambda m, b, v: resilience.realign(m, b, steps=2, validation=b).validation,
    "realign_lora": trained(resilience.realign_lora, rank=1, seed=0),
    "realign_heads": heads,
    "resilient_fusion": fused(resiliently),
    "protect": fused(protected),
    "search_scale": searched,
    "steps_by_cross_validation": cross_validated,
    "squared_gradients": lambda model, batches, vectors: resilience.squared_gradients(model, batches),
    "fisher_information": lambda m, b, v: taskvec.fisher_information(m, b, labels="given"),
    "frank_wolfe": stepped,
}
UNLABELLED = {
    "adamerging": lambda m, b, v: taskvec.adamerging_coefficients(v, m, b, steps=2).losses,
    "fisher_information": lambda model, batches, vectors: taskvec.fisher_information(model, batches),
    "input_grams": lambda model, batches, vectors: taskvec.input_grams(model, batches),
    "disentanglement": lambda m, b, v: metrics.weight_disentanglement_error(m, m, v, {"a": b, "b": b[:1]}).per_task,
    "disentanglement_grid": lambda m, b, v: (
        metrics.disentanglement_grid(m, m, v, {"a": b, "b": b[:1]}, scales=(0.0, 9.0)).per_task
    ),
    "task_disturbance": lambda m, b, v: metrics.task_disturbance(
        m, m, v[0].apply_to(m.state_dict()), 1e-3, {"a": b}, seed=0
    ),
}
BARE = {
    "disturbance_test": lambda m, b, v: metrics.disturbance_test(m, m, m, 1e-3, b[0]).sd,
    "measured_sensitivity": lambda m, b, v: resilience.measured_sensitivity(m, v, 0.1, b, seed=0).ratio,
    "protect": lambda m, b, v: resilience.protect(m, copy.deepcopy(m), v, 0.1, inputs=b, seed=0).sensitivity.ratio,
}


def equal(found, expected):
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(equal(found[key], expected[key]) for key in expected)
    return found == expected


@pytest.mark.parametrize("kind", [dict, UserDict])  # transformers.BatchEncoding is a UserDict
@pytest.mark.parametrize("name", LABELLED)
def test_labels_in_the_mapping_are_the_targets(name, kind):
    expected = LABELLED[name](*world())
    model, batches, vectors = world()
    assert equal(LABELLED[name](model, [kind(one(pair)) for pair in batches], vectors), expected)


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("name", UNLABELLED)
def test_what_needs_no_labels_takes_mappings_with_and_without_them(name, kind):
    expected = UNLABELLED[name](*world())
    for batch in (one, lambda pair: pair[0]):
        model, batches, vectors = world()
        assert equal(UNLABELLED[name](model, [kind(batch(pair)) for pair in batches], vectors), expected)


@pytest.mark.parametrize("name", BARE)
def test_labels_are_no_inputs_where_inputs_are_expected(name):
    results = []
    for batch in (one, lambda pair: pair[0]):
        model, batches, vectors = world()
        results.append(BARE[name](model, [batch(pair) for pair in batches], vectors))
    assert equal(*results)


@pytest.mark.parametrize("name", LABELLED)
def test_a_mapping_without_labels_is_an_error_that_names_its_keys(name):
    model, batches, vectors = world()
    with pytest.raises(TypeError, match=r"got a dict of 'input_ids', 'attention_mask'; .* under the key 'labels'"):
        LABELLED[name](model, [inputs for inputs, _ in batches], vectors)


def test_the_batches_of_a_caller_stay_as_they_are():
    model, batches, _ = world()
    mine = [one(pair) for pair in batches]
    resilience.realign(model, mine, steps=2)
    assert [list(batch) for batch in mine] == [["input_ids", "attention_mask", "labels"]] * 2


@pytest.mark.parametrize("key", ["labels", "label"])
def test_few_shots_of_rows_that_are_mappings(key):
    rows = [{"input_ids": torch.tensor([i]), key: i % 3} for i in range(12)]
    chosen = resilience.few_shot(rows, 2, seed=0)
    assert sorted(row[key] for row in chosen) == [0, 0, 1, 1, 2, 2]
    with pytest.raises(TypeError, match="got a dict of 'input_ids'; a mapping needs the key 'labels' or 'label'"):
        resilience.few_shot([{"input_ids": row["input_ids"]} for row in rows], 2, seed=0)


def test_a_loader_with_a_collator_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=20,
        num_labels=3,
        pad_token_id=0,
    )
    model = transformers.LlamaForSequenceClassification(config).eval()
    rows = [{"input_ids": torch.randint(1, 20, (5,)), "label": i % 3} for i in range(9)]
    collate = transformers.default_data_collator
    loader = DataLoader(resilience.few_shot(rows, 2, seed=0), batch_size=3, collate_fn=collate)
    before = metrics.accuracy(model, [(batch["input_ids"], batch["labels"]) for batch in loader])
    assert metrics.accuracy(model, loader) == before
    encoded = [transformers.BatchEncoding(batch) for batch in loader]
    assert metrics.accuracy(model, encoded) == before
    assert resilience.realign(model, encoded, steps=2).losses == pytest.approx(
        resilience.realign(model, loader, steps=2).losses, rel=0.1
    )
    update = taskvec.adamerging_coefficients(
        [{"score.weight": torch.randn(3, 16)}], model, {"a": loader}, steps=1, by="task"
    )
    assert len(update.losses) == 1


class TestTasksWithoutNames:
    """A list where a mapping was expected is recognised by what is in it."""

    X, Y = torch.zeros(4, 5), torch.arange(4) % 3
    TASKS = (
        [[(X, Y)], [(X, Y)]],
        [[(X, Y)] * 2] * 2,
        [[(X, Y)] * 3] * 2,
        [[[X, Y]] * 3] * 2,
        [[{"x": X, "labels": Y}] * 2] * 2,
        [[UserDict(x=X, labels=Y)] * 3],
        ([(X, Y)], [(X, Y)]),
        [(nn.Linear(5, 3), [(X, Y)])] * 2,
        [DataLoader([(X, Y)])] * 2,
    )
    BATCHES = (
        [(X, Y)],
        [[X, Y]] * 2,
        [(X, Y), (X, Y)],
        ((X, Y), (X, Y)),
        [((X, X), Y)] * 2,
        [[(X, X), Y]] * 2,
        [[[X, X], [Y, Y]]] * 2,
        [((X, X), (Y, Y))] * 2,
        [[{"x": X}, {"y": Y}]] * 2,
        [({"x": X}, Y)] * 2,
        [[{"x": X}, Y]] * 2,
        [{"x": X, "labels": Y}] * 2,
        [X, X],
        [[X, X, X]] * 2,
    )

    @pytest.mark.parametrize("tasks", TASKS, ids=range(len(TASKS)))
    def test_tasks(self, tasks):
        model = nn.Linear(5, 3)
        vector = {"weight": torch.ones(3, 5)}
        says = rf"tasks: expected tasks as a mapping of name.*got a (list|tuple) of {len(tasks)} tasks without names"
        with pytest.raises(TypeError, match=says):
            taskvec.adamerging([vector], model, tasks, steps=1)
        with pytest.raises(TypeError, match="tasks_or_batches: expected tasks as a mapping"):
            resilience.realign(model, tasks, steps=1)

    @pytest.mark.parametrize("batches", BATCHES, ids=range(len(BATCHES)))
    def test_batches(self, batches):
        class Any(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(3, 5))

            def forward(self, *args, **kwargs):
                return torch.zeros(4, 5) @ self.weight.T

        found = taskvec.adamerging_coefficients([{"weight": torch.ones(3, 5)}], Any(), batches, steps=1)
        assert len(found.losses) == 1


def test_the_loss_on_all_tokens_in_the_guide_is_that_of_the_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(1, 20, (3, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.where(ids > 3, -100)}

    def next_token_loss(logits, labels):
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    own = model(**batch).loss.item()
    assert resilience.realign(model, [batch], steps=1, loss=next_token_loss).losses == pytest.approx((own,))
