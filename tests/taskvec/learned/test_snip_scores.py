"""SNIP scores against a loop over samples, with other weights than the model's, and into LED-Merging."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from helpers.attentive_encoder import Encoder, X, Y
from rmtllmf._sample_gradients import SampleGradients
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.taskvec import TaskVector, led_masks, led_merging, snip_scores


def encoder(seed=0):
    torch.manual_seed(seed)
    return Encoder().double()


def by_hand(model, head, x=X, y=Y):
    model = copy.deepcopy(model).eval()
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters(remove_duplicate=False)}
    for i in range(len(y)):
        model.zero_grad()
        cross_entropy(head(model(x[i : i + 1])), y[i : i + 1]).backward()
        for name, p in model.named_parameters(remove_duplicate=False):
            if p.grad is not None:
                found[name] += (p.grad * p.detach()).abs() / len(y)
    return found


@pytest.mark.parametrize("path", ["together", "one by one"])
def test_a_loop_over_samples(path, monkeypatch):
    if path == "one by one":
        monkeypatch.setattr("rmtllmf._sample_gradients.ENTRIES", 1)
    broken = "_looped" if path == "together" else "_vmapped"
    monkeypatch.setattr(SampleGradients, broken, lambda *_: pytest.fail(broken))
    model, head = encoder().train(), nn.Linear(5, 4).double()
    state = copy.deepcopy(model.state_dict())
    found = snip_scores(model, {"t": (head, [(X[:4], Y[:4]), (X[4:], Y[4:])])})
    expected = by_hand(model, head)
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor)
    assert found["a.weight"] is found["b.weight"]
    assert not found["unused"].any()
    assert model.training
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_other_weights_than_the_models_own():
    base, other, head = encoder(), encoder(1), nn.Linear(5, 4).double()
    other.norm.running_mean += 0.5
    found = snip_scores(base, {"t": (head, [(X, Y)])}, state=other)
    expected = by_hand(other, head)
    assert all(torch.allclose(found[key], tensor, atol=1e-12) for key, tensor in expected.items())
    broken = {key: tensor for key, tensor in other.state_dict().items() if key != "unused"}
    with pytest.raises(StateMismatchError, match="state lacks 'unused'"):
        snip_scores(base, {"t": (head, [(X, Y)])}, state=broken)


def test_tasks_count_the_same():
    model, heads = encoder(), [nn.Linear(5, 4).double() for _ in range(2)]
    found = snip_scores(model, {"a": (heads[0], [(X, Y)]), "b": (heads[1], [(X[:1], Y[:1])])})
    first, second = by_hand(model, heads[0]), by_hand(model, heads[1], X[:1], Y[:1])
    for key in first:
        torch.testing.assert_close(found[key], (first[key] + second[key]) / 2)


def test_scores_of_half_precision_are_float32():
    model = nn.Linear(5, 4).bfloat16()
    batches = [(X[:, 0].bfloat16(), Y)]
    assert {t.dtype for t in snip_scores(model, batches).values()} == {torch.float32}


def test_two_tasks_that_look_at_different_inputs_keep_what_is_theirs():
    """Each task needs two of four inputs: LED-Merging gives these columns to it and throws the rest away."""
    source = torch.Generator().manual_seed(0)
    base = nn.Linear(4, 3, bias=False)
    models, tasks = [], {}
    for index, name in enumerate("ab"):
        x = torch.randn(64, 4, generator=source)
        x[:, [2 - 2 * index, 3 - 2 * index]] = 0.0
        change = 0.5 * torch.randn(3, 4, generator=source)
        tasks[name] = (nn.Identity(), [(x, torch.randint(3, (64,), generator=source))])
        models.append({"weight": base.weight.detach() + change})
    vectors = [TaskVector.between(base, model) for model in models]
    before = [snip_scores(base, {name: task}) for name, task in tasks.items()]
    after = [
        snip_scores(base, {name: task}, state=model) for (name, task), model in zip(tasks.items(), models, strict=True)
    ]
    masks = led_masks(before, after, 0.9)
    assert masks[0]["weight"].all(0).tolist() == [True, True, False, False]
    assert masks[1]["weight"].all(0).tolist() == [False, False, True, True]
    fused = led_merging(vectors, before, after, 0.9).apply_to(base.state_dict())
    for model, (head, batches) in zip(models, tasks.values(), strict=True):
        for x, _ in batches:
            torch.testing.assert_close(head(x @ fused["weight"].T), x @ model["weight"].T)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "encoder"}, TypeError, "model: expected a torch.nn.Module"),
        ({"loss": None}, TypeError, "loss: expected a function"),
        ({"tasks": []}, InputError, "tasks: expected at least one batch"),
        ({"tasks": [(X[:0, 0], Y[:0])]}, InputError, "tasks: expected at least one sample"),
        ({"tasks": [(X[:, 0], Y[:3])]}, ShapeError, "one sample in each row"),
        ({"tasks": [(X[:, 0] * float("inf"), Y)]}, NonFiniteError, "the gradient of 'weight' is not finite"),
        ({"model": nn.Identity()}, InputError, "model: expected floating-point parameters, found none"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    given = {"model": nn.Linear(5, 4).double(), "tasks": [(X[:, 0], Y)]} | arguments
    with pytest.raises(error, match=message):
        snip_scores(**given)
