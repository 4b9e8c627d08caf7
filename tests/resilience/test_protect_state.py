"""`protect` touches nothing when it refuses, and never leaves a model in between."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from helpers.small_encoder import encoder, same, state_of
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.resilience import joint_shrink, protect
from rmtllmf.taskvec import task_arithmetic

NAN = float("nan")

BAD = [
    ({"model": 3}, TypeError, "model: expected a torch.nn.Module, got int"),
    ({"base": {"w": torch.ones(2)}}, StateMismatchError, "base lacks"),
    ({"base": encoder().double().state_dict()}, StateMismatchError, r"base\['0.weight'\] is torch.float64"),
    ({"received": []}, InputError, "received: expected at least one"),
    ({"received": {"w": torch.ones(2)}}, TypeError, "received: expected a sequence.*single dict"),
    ({"received": 3}, TypeError, "received: .*int"),
    ({"received": [{"w": torch.ones(2)}] * 4}, StateMismatchError, "base lacks 'w', which received names"),
    ({"received": [{"0.bias": torch.ones(2)}] * 4}, StateMismatchError, r"received\[0\]\['0.bias'\] has shape"),
    ({"reception": [0.1, 0.2]}, ShapeError, "4 vectors"),
    ({"reception": -1.0}, InputError, "mse"),
    ({"seed": "0"}, TypeError, "seed"),
    ({"estimator": "best"}, InputError, "estimator"),
    ({"scale": "peak"}, InputError, "scale"),
    ({"scale": [1.0, 2.0]}, ShapeError, "scale"),
    ({"inputs": torch.ones(2, 24)}, TypeError, "inputs: expected batches.*Tensor"),
    ({"inputs": []}, InputError, "inputs: expected at least one batch"),
    ({"inputs": [torch.ones(2, 24)], "sensitivity": 2.0}, InputError, "inputs: .*leave out one of the two"),
    ({"sensitivity": -1.0}, InputError, "sensitivity"),
    ({"sensitivity": {"nothing": 1.0}}, InputError, "sensitivity: 'nothing' matches none"),
    ({"screen": "no"}, TypeError, "screen: expected True or False, got str"),
    ({"search": 1}, TypeError, "search: expected True or False, got int"),
    ({"rule": "ties"}, TypeError, "rule: expected a function"),
    ({"steps": -1}, InputError, "steps"),
    ({"steps": 1.5}, TypeError, "steps"),
    ({"frozen": "nothing.*"}, InputError, "frozen: 'nothing.*' matches none"),
    ({"frozen": ["*"]}, InputError, "nothing to train"),
    ({"loss": None}, TypeError, "loss"),
    ({"lr": 0.0}, InputError, "lr"),
    ({"tasks_or_batches": {}}, InputError, "tasks_or_batches: expected at least one task"),
    ({"tasks_or_batches": []}, InputError, "tasks_or_batches: expected at least one batch"),
    ({"tasks_or_batches": iter([])}, InputError, "tasks_or_batches: .*used up"),
    ({"tasks_or_batches": [torch.ones(2, 24)]}, TypeError, "tasks_or_batches: .*bare tensor"),
    (
        {"tasks_or_batches": [(torch.ones(0, 24), torch.zeros(0).long())]},
        InputError,
        "tasks_or_batches: expected at least one sample",
    ),
    ({"tasks_or_batches": dict.fromkeys("ab", iter([(torch.ones(1, 24), torch.zeros(1))]))}, InputError, "share"),
]


class TestState:
    @pytest.mark.parametrize(("change", "error", "pattern"), BAD, ids=[pattern for *_, pattern in BAD])
    def test_a_wrong_argument_leaves_the_model_untouched(self, setting, change, error, pattern):
        base, heard, tasks = setting
        model = encoder(1)
        before = state_of(model)
        arguments = {"received": heard, "reception": 0.3, "tasks_or_batches": tasks, "seed": 0, **change}
        with pytest.raises(error, match=pattern):
            protect(arguments.pop("model", model), arguments.pop("base", base), **arguments)
        assert same(model, before)

    def test_options_are_checked_without_samples_too(self, setting):
        base, heard, _ = setting
        for change, error, pattern in BAD:
            if {"steps", "loss", "lr"} & set(change):
                with pytest.raises(error, match=pattern):
                    protect(encoder(), base, heard, 0.3, seed=0, **change)

    @pytest.mark.parametrize(
        ("rule", "error", "pattern"),
        [
            (lambda vectors: 3, TypeError, "rule: expected it to return a mapping.*int"),
            (lambda vectors: {"w": torch.ones(2)}, StateMismatchError, "rule's result has the unexpected 'w'"),
            (lambda vectors: 1 / 0, ZeroDivisionError, "zero"),
        ],
    )
    def test_a_rule_that_fails_leaves_the_base_model_at_worst(self, setting, rule, error, pattern):
        base, heard, tasks = setting
        model = encoder(1)
        before = state_of(model)
        with pytest.raises(error, match=pattern):
            protect(model, base, heard, 0.3, seed=0, rule=rule)
        assert same(model, before)
        with pytest.raises(error, match=pattern):
            protect(model, base, heard, 0.3, tasks, seed=0, rule=rule)
        assert same(model, base)

    @pytest.mark.parametrize("fails_at", [1, 5, None])
    def test_flags_and_modes_stay_and_an_error_in_the_search_leaves_the_base(self, setting, fails_at):
        base, heard, tasks = setting
        model = nn.Sequential(*encoder(1), nn.Dropout(0.5))
        model.train()
        model[2].eval()
        model[0].bias.requires_grad_(False)
        model[2].weight.grad = torch.ones(32 // 2, 32)
        head = tasks["a"][0]
        calls = []

        def loss(logits, targets):
            calls.append(1)
            if fails_at is not None and len(calls) >= fails_at:
                raise RuntimeError("no loss")
            return cross_entropy(logits, targets)

        if fails_at is None:
            protect(model, base, heard, 0.3, tasks, seed=0, steps=2, loss=loss)
            assert torch.equal(model[0].bias, model[0].bias.detach())
        else:
            with pytest.raises(RuntimeError, match="no loss"):
                protect(model, base, heard, 0.3, tasks, seed=0, steps=2, loss=loss)
            assert same(model, base)
        assert [part.training for part in model] == [True, True, False, True]
        assert (model.training, head.training) == (True, True)
        assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
        assert torch.equal(model[2].weight.grad, torch.ones(16, 32))
        assert model[0].weight.grad is None
        assert all(p.grad is None and p.requires_grad for p in head.parameters())

    def test_an_error_in_the_realignment_leaves_the_fused_model(self, setting):
        base, heard, tasks = setting
        model = encoder(1)
        with pytest.raises(NonFiniteError, match="in step 0"):
            protect(
                model,
                base,
                heard,
                0.3,
                tasks,
                seed=0,
                sensitivity=1.0,
                search=False,
                loss=lambda logits, targets: NAN * logits.sum(),
            )
        assert same(model, task_arithmetic(joint_shrink(heard, 0.3)).apply_to(base))

    def test_received_vectors_are_not_written_to(self, setting):
        base, heard, tasks = setting
        before, kept = copy.deepcopy(heard), copy.deepcopy(base)
        protect(encoder(1), base, heard, 0.3, tasks, seed=0, steps=2, rule=lambda vectors: vectors[0])
        for vector, copied in zip(heard, before, strict=True):
            assert all(torch.equal(vector[name], copied[name]) for name in copied)
        assert all(torch.equal(base[name], kept[name]) for name in base)

    def test_the_report_cannot_be_changed(self, setting):
        base, heard, _ = setting
        done = protect(encoder(), base, heard, 0.3, seed=0)
        for mapping in (done.reasons, done.tensors):
            with pytest.raises(TypeError):
                mapping["x"] = 1
