"""AdaMerging beside a naive transcription, what it promises, and what it refuses."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call

from helpers.learned_world import Encoder, fingerprint, normal, same_fingerprint, tasks_of, vectors_of
from rmtllmf.errors import InputError, NonFiniteError, ShapeError
from rmtllmf.taskvec import adamerging, adamerging_coefficients, fuse, task_arithmetic, ties


def naive(vectors, model, tasks, by, steps, lr, bounds=(0.0, 1.0), start=0.3):
    """The paper's algorithm on whole tensors, with the gradients that torch finds; the names of a tie are one."""
    model = model.eval()
    names = [name for name in vectors[0] if name != "again.weight"]
    raw = torch.full((len(names) if by == "layer" else 1, len(vectors)), start, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([raw], lr=lr)
    losses = []
    for step in range(steps):
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        for index, name in enumerate(names):
            state[name] = state[name] + sum(
                raw[index if by == "layer" else 0, q] * vector[name] for q, vector in enumerate(vectors)
            )
        state["again.weight"] = state["middle.weight"]
        loss = 0
        for head, batches in tasks.values():
            p = head(functional_call(model, state, (batches[step % len(batches)][0],))).softmax(-1)
            loss = loss - (p * p.log()).sum(-1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        if bounds:
            raw.data.clamp_(*bounds)
        losses.append(float(loss.detach()) / len(tasks))
    rows = {name: raw[index if by == "layer" else 0].tolist() for index, name in enumerate(names)}
    return {**rows, "again.weight": rows["middle.weight"]}, losses


@pytest.mark.parametrize("by", ["layer", "task"])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.2, 0.35), None])
def test_the_naive_algorithm(by, bounds):
    model, tasks = Encoder(), tasks_of()
    vectors = vectors_of(model)
    expected, losses = naive(vectors, Encoder(), tasks, by, 8, 0.05, bounds)
    found = adamerging_coefficients(vectors, model, tasks, by=by, steps=8, lr=0.05, bounds=bounds)
    assert found.losses == pytest.approx(losses, abs=1e-12)
    assert set(found.weights) == set(vectors[0])
    for name, row in expected.items():
        assert found.weights[name] == pytest.approx(row, abs=1e-9), name


@pytest.mark.parametrize("by", ["layer", "task"])
def test_the_update_is_the_sum_with_these_coefficients(by):
    model, tasks = Encoder(), tasks_of()
    vectors = vectors_of(model)
    found = adamerging_coefficients(vectors, model, tasks, by=by, steps=3)
    update = adamerging(vectors, model, tasks, by=by, steps=3)
    expected = task_arithmetic(vectors, 1.0, weights=found.weights)
    assert all(torch.equal(update[name], expected[name]) for name in vectors[0])
    fused = fuse(
        model,
        [v.apply_to(model.state_dict()) for v in vectors],
        partial(adamerging, model=model, tasks=tasks, by=by, steps=3),
    )
    for name, tensor in update.apply_to(model.state_dict()).items():
        torch.testing.assert_close(fused[name], tensor)


def test_nothing_is_touched():
    """Neither in training mode nor with gradients, of encoder and heads; also where forward() writes to buffers."""
    model, tasks = Encoder().train(), tasks_of()
    model.middle.eval()
    model.enter.bias.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    parts = [model, *(head for head, _ in tasks.values())]
    before = [fingerprint(part) for part in parts]
    vectors = vectors_of(model)
    copies = [{name: tensor.clone() for name, tensor in vector.items()} for vector in vectors]
    with torch.no_grad():
        found = adamerging_coefficients(vectors, model, tasks, steps=2)
    for part, state in zip(parts, before, strict=True):
        same_fingerprint(fingerprint(part), state)
    for vector, copy in zip(vectors, copies, strict=True):
        assert all(torch.equal(vector[name], copy[name]) for name in copy)
    assert adamerging_coefficients(vectors, model, tasks, steps=2) == found


def test_entropy_falls_and_a_harmful_vector_is_given_less():
    """What the paper claims: a vector that makes predictions unsure loses its weight."""
    model = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    base = {"weight": normal(3, 4)}
    vectors = [{"weight": base["weight"]}, {"weight": -base["weight"]}]
    found = adamerging_coefficients(vectors, model, [normal(32, 4, seed=9)], base=base, steps=60, lr=0.01)
    assert found.losses[-1] < found.losses[0]
    useful, harmful = found.weights["weight"]
    assert useful > 0.6
    assert harmful == 0.0


def test_a_complete_model_labels_mappings_and_tokens_are_all_the_same():
    class Complete(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3, dtype=torch.float64)

        def forward(self, inputs):
            return type("Output", (), {"logits": self.layer(inputs)})()

    model = Complete()
    vectors = [{name: normal(*t.shape, seed=q) for name, t in model.state_dict().items()} for q in range(2)]
    X = normal(6, 4)
    expected = adamerging_coefficients(vectors, model, [X], steps=3)
    for batches in ([(X, torch.zeros(6))], [{"inputs": X}], iter([X, X, X]), [X.view(2, 3, 4)]):
        assert adamerging_coefficients(vectors, model, batches, steps=3).losses == pytest.approx(expected.losses)


def test_plus_plus_merges_what_ties_keeps():
    model, tasks = Encoder(), tasks_of()
    vectors = vectors_of(model)
    for options in ({}, {"skip": "leave.*"}):
        unlearned = adamerging(vectors, model, tasks, density=0.2, start=0.4, steps=0, **options)
        expected = ties(vectors, 0.2, scale=0.4, combine="sum", **options)
        for name in expected:
            torch.testing.assert_close(unlearned[name], expected[name])
    learned = adamerging(vectors, model, tasks, density=0.2, steps=4, lr=0.05)
    zero = sum(int((tensor == 0).sum()) for tensor in learned.values())
    assert zero > 0.3 * sum(tensor.numel() for tensor in learned.values())


def test_weights_skip_and_out():
    model, tasks = Encoder(), tasks_of()
    vectors = vectors_of(model)
    doubled = [2 * vector for vector in vectors]
    expected = adamerging(doubled, model, tasks, steps=3, skip="gain")
    out = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    update = adamerging(vectors, model, tasks, steps=3, skip="gain", weights=[2, 2, 2], out=out)
    assert "gain" not in update
    for name, tensor in expected.items():
        torch.testing.assert_close(update[name], tensor)
        assert update[name].data_ptr() == out[name].data_ptr()


def test_edges():
    model, tasks = Encoder(torch.bfloat16), tasks_of(dtype=torch.bfloat16)
    vectors = vectors_of(model)
    found = adamerging_coefficients(vectors[:1], model, tasks, steps=2)  # one vector, half precision
    assert all(0.29 < c < 0.31 for row in found.weights.values() for c in row)
    zeros = [0 * vector for vector in vectors]
    found = adamerging_coefficients(zeros, model, tasks, steps=2)  # no slope
    assert {c for row in found.weights.values() for c in row} == {0.3}
    equal = adamerging_coefficients([vectors[0]] * 2, model, tasks, steps=2)
    assert all(a == b for a, b in equal.weights.values())
    assert adamerging_coefficients(vectors, model, tasks, steps=0).losses == ()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"by": "tensor"}, InputError, "by: expected 'layer' or 'task', got 'tensor'"),
        ({"steps": -1}, InputError, "steps: expected a whole number of at least 0, got -1"),
        ({"lr": 0.0}, InputError, "lr: expected a positive finite number"),
        ({"start": float("nan")}, InputError, "start: expected a finite number"),
        ({"bounds": (0.5, 1)}, InputError, "bounds: expected them around start, 0.3"),
        ({"bounds": 1}, TypeError, "bounds: expected .lowest, highest. or None, got 1"),
        ({"density": 20}, InputError, "density: expected a share"),
        ({"tasks": {}}, InputError, "tasks: expected at least one task"),
        ({"tasks": iter([])}, InputError, "tasks: expected at least one batch, got none"),
        ({"tasks": [torch.ones(2, 2)], "model": nn.Flatten(0)}, InputError, "model lacks"),
        ({"wrong": 1}, TypeError, "unexpected keyword 'wrong'"),
    ],
)
def test_bad_input(options, error, message):
    model = nn.Linear(2, 2)
    vectors = [{"weight": torch.ones(2, 2)}]
    with pytest.raises(error, match=message):
        adamerging(vectors, **{"model": model, "tasks": [torch.ones(1, 2)], "steps": 1, **options})


def test_bad_models():
    vectors = [{"weight": torch.ones(2, 2)}]
    shared = iter([torch.ones(1, 2)] * 4)
    with pytest.raises(InputError, match="two tasks share one iterator"):
        adamerging(vectors, nn.Linear(2, 2), {"a": shared, "b": shared}, steps=1)
    with pytest.raises(ShapeError, match=r"tasks\['a'\]: expected logits of shape \(B, K\), got \(2,\)"):
        adamerging(vectors, nn.Linear(2, 2), {"a": [torch.ones(2)]}, steps=1)
    with pytest.raises(NonFiniteError, match=r"tasks: the logits hold NaN"):
        adamerging(vectors, nn.Linear(2, 2), [torch.full((1, 2), float("nan"))], steps=1)
    with pytest.raises(InputError, match="loss of tasks does not depend on what the vectors change"):
        adamerging(vectors, nn.Linear(2, 2), {"": (lambda z: torch.ones(1, 2), [torch.ones(1, 2)])}, steps=1)


@pytest.mark.gpu
@pytest.mark.parametrize("vectors_on", ["cpu", "cuda"])
def test_on_the_device(vectors_on):
    model, tasks = Encoder(torch.float32), tasks_of(dtype=torch.float32)
    vectors = [vector.to(torch.float32) for vector in vectors_of(model)]
    expected = adamerging_coefficients(vectors, model, tasks, steps=5, lr=0.05)
    heads = {name: (head.cuda(), batches) for name, (head, batches) in tasks.items()}
    found = adamerging_coefficients([v.to(vectors_on) for v in vectors], model.cuda(), heads, steps=5, lr=0.05)
    assert found.losses == pytest.approx(expected.losses, abs=1e-4)
    for name, row in expected.weights.items():
        assert found.weights[name] == pytest.approx(row, abs=0.02), name
