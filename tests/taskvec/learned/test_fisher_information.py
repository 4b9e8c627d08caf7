"""The Fisher diagonal against a loop over samples and classes, against Gauss-Newton, and estimates of it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import log_softmax

from helpers.attentive_encoder import Encoder, X, Y
from rmtllmf._sample_gradients import SampleGradients
from rmtllmf.errors import InputError, NonFiniteError, ShapeError
from rmtllmf.taskvec import fisher_information


def setting(seed=0):
    torch.manual_seed(seed)
    return Encoder().double(), nn.Linear(5, 4).double()


def by_hand(model, head, labels="expected"):
    """One backward pass for each sample and class."""
    model = copy.deepcopy(model).eval()
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters(remove_duplicate=False)}
    for i in range(len(X)):
        p = log_softmax(head(model(X[i : i + 1])), -1).exp()[0].detach()
        for label in range(4) if labels == "expected" else [int(Y[i])]:
            model.zero_grad()
            log_softmax(head(model(X[i : i + 1])), -1)[0, label].backward()
            for name, parameter in model.named_parameters(remove_duplicate=False):
                if parameter.grad is not None:
                    weight = float(p[label]) if labels == "expected" else 1.0
                    found[name] += weight * parameter.grad**2 / len(X)
    return found


@pytest.mark.parametrize("labels", ["expected", "given"])
@pytest.mark.parametrize("path", ["together", "one by one"])
def test_a_loop_over_samples_and_classes(labels, path, monkeypatch):
    if path == "one by one":
        monkeypatch.setattr("rmtllmf._sample_gradients.ENTRIES", 1)
    broken = "_looped" if path == "together" else "_vmapped"
    monkeypatch.setattr(SampleGradients, broken, lambda *_: pytest.fail(broken))
    model, head = setting()
    model.train()
    before = copy.deepcopy(model.state_dict())
    batches = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    found = fisher_information(model, {"t": (head, batches)}, labels=labels)
    expected = by_hand(model, head, labels)
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor)
    assert found["a.weight"] is found["b.weight"]
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_labels_are_not_looked_at():
    model, head = setting()
    plain = fisher_information(model, {"t": (head, [X])})
    labelled = fisher_information(model, {"t": (head, [(X, torch.zeros(7))])})
    assert all(torch.equal(plain[key], labelled[key]) for key in plain)


def test_it_is_the_gauss_newton_diagonal():
    """For softmax and cross-entropy the Fisher matrix is J^T (diag p - p p^T) J."""
    model = nn.Linear(5, 4).double()
    x = X[:, 0]
    p = model(x).softmax(-1)
    variance = p * (1 - p)  # of a class, which is all that the diagonal of a linear model sees
    expected = (variance[:, :, None] * x[:, None, :] ** 2).mean(0)
    found = fisher_information(model, [x])
    torch.testing.assert_close(found["weight"], expected.detach())
    torch.testing.assert_close(found["bias"], variance.mean(0).detach())


def test_drawn_classes_estimate_the_expectation():
    model = nn.Linear(5, 4).double()
    x = X[:, 0]
    exact = fisher_information(model, [x])["weight"]
    drawn = [fisher_information(model, [x], labels="sampled", draws=10, seed=seed)["weight"] for seed in range(20)]
    mean, spread = torch.stack(drawn).mean(0), torch.stack(drawn).std(0) / 20**0.5
    assert ((mean - exact).abs() < 4.5 * spread).all()
    again = fisher_information(model, [x], labels="sampled", draws=10, seed=0)["weight"]
    assert torch.equal(again, drawn[0])
    assert not torch.equal(drawn[1], drawn[0])


def test_the_order_of_tasks_does_not_matter_to_what_is_drawn():
    model = nn.Linear(5, 4).double()
    tasks = {"a": [X[:, 0]], "b": [X[:, 1]]}
    found = fisher_information(model, tasks, labels="sampled", seed=3)["weight"]
    turned = fisher_information(model, dict(reversed(tasks.items())), labels="sampled", seed=3)["weight"]
    torch.testing.assert_close(found, turned)
    alone = [fisher_information(model, {k: v}, labels="sampled", seed=3)["weight"] for k, v in tasks.items()]
    torch.testing.assert_close(found, sum(alone) / 2)


def test_a_certain_model_has_no_information_and_half_precision_is_float32():
    model = nn.Linear(5, 2).bfloat16()
    nn.init.zeros_(model.weight)
    model.bias.data = torch.tensor([500.0, -500.0]).bfloat16()
    found = fisher_information(model, [X[:, 0].bfloat16()])
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert not any(tensor.any() for tensor in found.values())


def test_another_state():
    (base, head), (other, _) = setting(), setting(1)
    found = fisher_information(base, {"t": (head, [X])}, state=other.state_dict())
    for key, tensor in by_hand(other, head).items():
        torch.testing.assert_close(found[key], tensor)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": None}, TypeError, "model: expected a torch.nn.Module"),
        ({"labels": "true"}, InputError, "labels: expected one of 'expected', 'sampled', 'given', got 'true'"),
        ({"labels": "sampled"}, InputError, 'seed: labels="sampled" needs one'),
        ({"labels": "sampled", "seed": 0, "draws": 0}, InputError, "draws: expected a whole number of at least 1"),
        ({"tasks": []}, InputError, "tasks: expected at least one batch"),
        ({"tasks": [X[:0, 0]]}, InputError, "tasks: expected at least one sample"),
        ({"tasks": {"t": [X]}}, ShapeError, r"tasks\['t'\]: expected logits of shape \(B, K\)"),
        ({"tasks": [X[:, 0] * float("nan")]}, NonFiniteError, "tasks: the logits hold NaN"),
        ({"labels": "given"}, TypeError, r"tasks: expected batches \(inputs, targets\)"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    given = {"model": nn.Linear(5, 4).double(), "tasks": [X[:, 0]]} | arguments
    with pytest.raises(error, match=message):
        fisher_information(**given)
