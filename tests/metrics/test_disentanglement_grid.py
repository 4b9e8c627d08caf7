"""The grid of two scales, point by point, against the weight disentanglement error of vectors scaled beforehand."""

import pytest
import torch
from torch import nn

from helpers.entangled_tasks import entangled
from rmtllmf.errors import InputError, StateMismatchError
from rmtllmf.metrics import disentanglement_grid, weight_disentanglement_error

SCALES = (-0.5, 0.0, 0.4, 1.0)


@pytest.fixture(scope="module")
def setting():
    return entangled(classes=(3, 5), sizes=(0.1, 0.3))


def scaled(vector, scale):
    return {name: scale * tensor for name, tensor in vector.items()}


def test_every_point_is_the_error_of_scaled_vectors(setting):
    model, base, vectors, tasks = setting
    grid = disentanglement_grid(*setting, SCALES)
    assert grid.scales == SCALES
    assert list(grid.per_task) == ["a", "b"]
    assert grid.total.shape == (4, 4)
    for row, first in enumerate(SCALES):
        for column, second in enumerate(SCALES):
            both = [scaled(vectors[0], first), scaled(vectors[1], second)]
            naive = weight_disentanglement_error(model, base, both, tasks, scale=1.0)
            for name, share in naive.per_task.items():
                assert float(grid.per_task[name][row, column]) == pytest.approx(share)
            assert float(grid.total[row, column]) == pytest.approx(naive.total)
    assert not torch.equal(grid.total, grid.total.T), "the setting must tell the axes apart"
    zero = SCALES.index(0.0)
    assert not grid.per_task["a"][:, zero].any()
    assert not grid.per_task["b"][zero].any()
    assert grid.per_task["a"][zero].any()


def test_the_number_of_evaluations(setting):
    """Of every batch S of the task's own models and S^2 of both."""
    model, base, vectors, tasks = setting
    seen = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    try:
        disentanglement_grid(model, base, vectors, tasks, SCALES)
    finally:
        handle.remove()
    assert sorted(seen) == sorted(([20] * (4 + 16) + [7] * (4 + 16)) * 2)


def test_batches_that_come_once_and_in_another_order_every_time(setting):
    model, base, vectors, tasks = setting

    class Shuffled:
        def __init__(self, batches):
            self.inputs, self.times = torch.cat([inputs for inputs, _ in batches]), 0

        def __iter__(self):
            self.times += 1
            order = torch.randperm(27, generator=torch.Generator().manual_seed(self.times))
            return iter([(part, torch.zeros(len(part))) for part in self.inputs[order].split(10)])

    found = disentanglement_grid(
        model, base, vectors, {name: (head, Shuffled(batches)) for name, (head, batches) in tasks.items()}, SCALES
    )
    once = disentanglement_grid(
        model, base, vectors, {name: (head, iter(batches)) for name, (head, batches) in tasks.items()}, SCALES
    )
    expected = disentanglement_grid(*setting, SCALES)
    assert torch.equal(found.total, expected.total)
    assert torch.equal(once.total, expected.total)


def test_by_name_and_nothing_is_touched(setting):
    model, base, vectors, tasks = setting
    model.train()
    model.ln_pre.eval()
    named = disentanglement_grid(model, model, dict(zip("ba", reversed(vectors), strict=True)), tasks, [0.3, 0.7])
    assert model.training
    assert not model.ln_pre.training
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(named.total, disentanglement_grid(*setting, [0.3, 0.7]).total)


def test_bad_input(setting):
    model, base, vectors, tasks = setting
    third = {**tasks, "c": tasks["a"]}
    flat = {name: [(torch.zeros(size, 2), torch.zeros(size))] for name, size in (("a", 3), ("b", 0))}
    small = [{"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}] * 2
    for given, scales, error, pattern in (
        ((model, base, vectors, third), SCALES, InputError, "tasks: expected two.*got 3"),
        ((model, base, vectors, list(tasks.values())), SCALES, TypeError, "tasks: expected a mapping.*list"),
        ((model, base, vectors[:1], tasks), SCALES, InputError, "vectors: expected one for each of the 2.*got 1"),
        ((model, base, [vectors[0], {}], tasks), SCALES, StateMismatchError, r"vectors\[1\] lacks"),
        ((nn.Linear(2, 2), small[0], small, flat), [1.0], InputError, r"tasks\['b'\].*at least one input"),
        ((model, base, vectors, tasks), [], InputError, r"scales.*at least one.*\[\]"),
        ((model, base, vectors, tasks), [0.5, 0.5], InputError, r"scales.*strictly increasing, got \[0.5, 0.5\]"),
        ((model, base, vectors, tasks), [0.5, float("nan")], InputError, r"scales\[1\]: .*finite.*nan"),
        ((model, base, vectors, tasks), 0.5, TypeError, "scales: expected a sequence of numbers, got float"),
        ((nn.Linear, base, vectors, tasks), SCALES, TypeError, "model: expected a torch.nn.Module"),
    ):
        with pytest.raises(error, match=pattern):
            disentanglement_grid(*given, scales)
