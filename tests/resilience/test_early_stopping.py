"""Validation while realigning: what is measured, when it stops, and what the model is left with."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from helpers.draws import gaussian
from rmtllmf.errors import InputError, NonFiniteError, ShapeError
from rmtllmf.resilience import realign


def encoder(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.0), nn.Linear(16, 4))


def head(classes, seed):
    made = nn.Linear(4, classes)
    made.weight.data = gaussian(classes, 4, seed=seed)
    made.bias.data.zero_()
    return made


HEADS = {"a": head(3, 1), "b": head(2, 2)}


def tasks(seed, batches):
    """Random labels: what is learnt on one draw is overfitting on another."""
    return {
        name: (
            made,
            [
                (gaussian(n, 4, seed=seed + k), gaussian(n, made.out_features, seed=seed + k + 50).argmax(1))
                for k, n in enumerate(batches)
            ],
        )
        for name, made in HEADS.items()
    }


TRAIN, HELD_OUT = tasks(100, (6, 6)), tasks(200, (5, 2))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


@torch.no_grad()
def held_out_loss(model):
    """Over samples, then over tasks."""
    model = copy.deepcopy(model).eval()
    losses = []
    for made, batches in HELD_OUT.values():
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        losses.append(float(cross_entropy(made(model(x)), y)))
    return sum(losses) / 2


@pytest.mark.parametrize("every", [1, 3])
def test_the_model_is_left_as_it_was_at_the_smallest_validation_loss(every):
    """Every evaluated state is made again by a run that stops there: values and running statistics are its own."""
    model, steps = encoder(), 10
    options = {"lr": 0.02, "schedule_steps": 10}
    done = realign(model, TRAIN, steps=steps, validation=HELD_OUT, validate_every=every, **options)
    evaluated = sorted({*range(0, steps, every), steps})
    states, losses = [], []
    for number in evaluated:
        peer = encoder()
        realign(peer, TRAIN, steps=number, **options)
        states.append(state(peer))
        losses.append(held_out_loss(peer))
    assert done.validation == pytest.approx(losses, rel=1e-5)
    best = losses.index(min(losses))
    assert 0 < best < len(evaluated) - 1
    assert done.kept == evaluated[best]
    assert same(states[best], state(model))
    assert len(done.losses) == steps


def test_without_validation_nothing_is_kept():
    done = realign(encoder(), TRAIN, steps=2)
    assert (done.validation, done.kept, done.penalties) == ((), None, ())


def test_patience_counts_evaluations_without_a_new_minimum():
    free = realign(encoder(), TRAIN, steps=40, lr=0.02, validation=HELD_OUT, validate_every=2)
    for patience in (1, 3):
        worse, smallest, stop = 0, free.validation[0], None
        for place, loss in enumerate(free.validation[1:], 1):
            worse = 0 if loss < smallest else worse + 1
            smallest = min(smallest, loss)
            if worse == patience:
                stop = place
                break
        assert stop is not None
        model = encoder()
        done = realign(model, TRAIN, steps=40, lr=0.02, validation=HELD_OUT, validate_every=2, patience=patience)
        assert done.validation == free.validation[: stop + 1]
        assert len(done.losses) == 2 * stop
        assert held_out_loss(model) == pytest.approx(min(done.validation), rel=1e-6)


def test_training_that_only_harms_leaves_the_model_as_it_was():
    """Validation on the opposite labels of a model that is already right."""
    model = encoder()
    x = gaussian(12, 4)
    y = HEADS["b"](model.eval()(x)).argmax(1)
    model.train()
    before = state(model)
    done = realign(model, {"b": (HEADS["b"], [(x, 1 - y)])}, steps=5, lr=0.05, validation={"b": (HEADS["b"], [(x, y)])})
    assert done.kept == 0
    assert same(before, state(model))


def test_it_evaluates_in_evaluation_mode_without_gradients_and_trains_as_without():
    seen, model, peer = [], encoder(), encoder()

    def loss(logits, targets):
        seen.append((model.training, logits.requires_grad))
        return cross_entropy(logits, targets)

    model.eval()
    model[1].train()
    flags = [module.training for module in model.modules()]
    peer.eval()
    peer[1].train()
    done = realign(model, TRAIN, steps=3, loss=loss, validation=HELD_OUT, validate_every=2)
    assert (
        seen
        == [(False, False)] * 4 + [(True, True)] * 4 + [(False, False)] * 4 + [(True, True)] * 2 + [(False, False)] * 4
    )
    assert [module.training for module in model.modules()] == flags
    assert done.losses == realign(peer, TRAIN, steps=3).losses
    assert all(
        parameter.requires_grad and parameter.grad is None for made in HEADS.values() for parameter in made.parameters()
    )


def test_no_steps_still_tell_the_validation_loss():
    model = encoder()
    done = realign(model, {}, steps=0, validation=HELD_OUT)
    assert done.validation == pytest.approx([held_out_loss(model)], rel=1e-6)
    assert done.kept == 0


def test_schedule_steps_are_the_length_of_the_schedule():
    """The first steps of a longer run, to the bit."""
    first, second = encoder(), encoder()
    long = realign(first, TRAIN, steps=8, lr=0.02, warmup=0.25)
    short = realign(second, TRAIN, steps=3, lr=0.02, warmup=0.25, schedule_steps=8)
    assert short.losses == long.losses[:3]


def test_an_exception_in_the_middle_leaves_flags_and_modes():
    model = encoder()
    model[0].bias.requires_grad_(False)
    model[1].eval()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    poison = {"a": (HEADS["a"], [(torch.full((4, 4), math.nan), torch.zeros(4, dtype=torch.int64))])}
    with pytest.raises(NonFiniteError, match=r"validation\['a'\]: the loss is nan after 0 steps"):
        realign(model, TRAIN, steps=3, validation=poison)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes


def bad(steps=2, **options):
    return lambda: realign(encoder(), TRAIN, steps=steps, **options)


def vector_when_validating(logits, targets):
    return cross_entropy(logits, targets, reduction="mean" if logits.requires_grad else "none")


BAD = {
    "patience alone": (bad(patience=3), InputError, "need `validation`"),
    "every alone": (bad(validate_every=3), InputError, "need `validation`"),
    "patience 0": (bad(validation=HELD_OUT, patience=0), InputError, "patience: .*at least 1, got 0"),
    "every 0": (bad(validation=HELD_OUT, validate_every=0), InputError, "validate_every: .*at least 1, got 0"),
    "every is a float": (bad(validation=HELD_OUT, validate_every=1.5), TypeError, "validate_every: expected an int"),
    "an iterator": (
        bad(validation=iter([1])),
        InputError,
        "validation: expected batches that can be gone through again",
    ),
    "no batches": (
        bad(validation={"a": (HEADS["a"], [])}),
        InputError,
        r"validation\['a'\]: expected at least one batch",
    ),
    "no tasks": (bad(validation={}), InputError, "validation: expected at least one task"),
    "a vector": (
        bad(validation=HELD_OUT, loss=vector_when_validating),
        ShapeError,
        r"expected one number on validation\['a'\], got \(5,\)",
    ),
    "a short schedule": (bad(steps=5, schedule_steps=4), InputError, "schedule_steps: .*at least 5, got 4"),
    "a schedule beside an optimizer": (
        bad(schedule_steps=4, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)),
        InputError,
        "schedule_steps: belong to the default optimizer",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
