"""Defence-aware merging beside a naive transcription, what it does to a planted trigger, and what it refuses."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from helpers.learned_world import Encoder, fingerprint, normal, same_fingerprint, tasks_of, vectors_of
from rmtllmf._random import generator
from rmtllmf.errors import InputError, ShapeError
from rmtllmf.taskvec import concrete, concrete_mask, defense_aware_mask


def naive(vectors, model, tasks, steps, lr, trigger_lr, alpha, against, bounds, scale, seed):
    """The authors' alternation with the gradients that torch finds."""
    model = model.eval()
    names = [name for name in vectors[0] if name != "middle.weight"]
    x = {name: torch.zeros_like(vectors[0][name]).requires_grad_() for name in names}
    triggers = {task: torch.zeros(5, dtype=torch.float64, requires_grad=True) for task in tasks}
    adam = torch.optim.Adam(list(x.values()), lr=lr)
    attack = torch.optim.Adam(list(triggers.values()), lr=trigger_lr)
    places = dict.fromkeys(tasks, 0)

    def sampled(step):
        masks = {}
        for n in names:
            u = torch.rand(x[n].shape, generator=generator(seed, "concrete", step, n), dtype=torch.float64)
            m = ((x[n] + torch.logit(u)) / 0.5).sigmoid()
            masks[n] = m / m.mean()
        return masks

    def logits(task, state, trigger):
        head, batches = tasks[task]
        inputs = batches[places[task] % len(batches)][0]
        places[task] += 1
        disturbed = inputs + trigger
        if bounds is not None:
            disturbed = disturbed.clamp(*bounds)
        return head(functional_call(model, state, (inputs,))), head(functional_call(model, state, (disturbed,)))

    def entropy(z):
        p = z.softmax(-1)
        return -(p * p.log()).sum(-1).mean()

    def disagreement(calm, disturbed):
        return -disturbed.log_softmax(-1)[torch.arange(len(calm)), calm.argmax(-1)].mean()

    losses, disagreements = [], []
    for step in range(steps):
        m = sampled(step)
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        for n in names:
            state[n] = state[n] + scale * m[n] * sum(v[n] for v in vectors)
        state["middle.weight"] = state["again.weight"]
        fixed = {name: tensor.detach() for name, tensor in state.items()}
        fixed["middle.weight"] = fixed["again.weight"]
        raised = sum(disagreement(*logits(task, fixed, triggers[task])) for task in tasks)
        attack.zero_grad()
        (-raised).backward()
        attack.step()
        loss = 0
        for task in tasks:
            calm, disturbed = logits(task, state, triggers[task].detach())
            extra = entropy(disturbed) if against == "entropy" else disagreement(calm, disturbed)
            loss = loss + entropy(calm) + alpha * extra
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()) / len(tasks))
        disagreements.append(float(raised.detach()) / len(tasks))
    return {n: mask.detach() for n, mask in sampled(steps).items()}, triggers, losses, disagreements


@pytest.mark.parametrize(
    ("against", "alpha", "bounds"), [("entropy", 0.1, None), ("prediction", 1.0, (-0.5, 0.5)), ("entropy", 0.0, None)]
)
def test_the_naive_algorithm(against, alpha, bounds):
    model, tasks = Encoder(), tasks_of(batches=3)
    vectors = vectors_of(model)
    mask, triggers, losses, disagreements = naive(
        vectors, Encoder(), tasks, 5, 0.05, 0.02, alpha, against, bounds, 0.4, 3
    )
    found = defense_aware_mask(
        vectors,
        model,
        tasks,
        seed=3,
        scale=0.4,
        defense=alpha,
        against=against,
        steps=5,
        lr=0.05,
        trigger_lr=0.02,
        bounds=bounds,
    )
    assert found.losses == pytest.approx(losses, abs=1e-9)
    assert found.disagreements == pytest.approx(disagreements, abs=1e-9)
    for name, expected in mask.items():
        torch.testing.assert_close(found.mask[name], expected)
    for name, trigger in triggers.items():
        torch.testing.assert_close(found.triggers[name], trigger.detach())
    assert list(found.mask) == list(vectors[0])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_trigger_is_obeyed_less(seed):
    """Than in the plain sum, as the paper says; the mask alone, without a defense, does as much in this model."""
    honest, planted = torch.zeros(4, 8), torch.zeros(4, 8)
    honest[:, :4] = planted[:, :4] = 3 * torch.eye(4)
    planted[0, 7], planted[1:, 7] = 12.0, -4.0  # the last input is 0, unless someone knows better
    inputs = normal(128, 8, dtype=torch.float32)
    inputs[:, 4:] = 0
    triggered = inputs + torch.eye(8)[7]
    found = defense_aware_mask(
        [{"weight": planted}, {"weight": honest}],
        nn.Linear(8, 4, bias=False),
        [inputs],
        base={"weight": torch.zeros(4, 8)},
        seed=seed,
        scale=0.5,
        steps=150,
        lr=0.05,
        trigger_lr=0.01,
        bounds=(-3.0, 3.0),
        kind="probability",
    )
    right = (inputs @ honest.T).argmax(-1)
    plain = 0.5 * (planted + honest)
    update = concrete([{"weight": planted}, {"weight": honest}], found.mask, scale=0.5)["weight"]

    def obeyed(weight):
        return float(((triggered[right != 0] @ weight.T).argmax(-1) == 0).float().mean())

    assert obeyed(plain) > 0.8
    assert obeyed(update) < 0.2
    assert ((inputs @ update.T).argmax(-1) == right).float().mean() > 0.95


def test_triggers_find_what_changes_predictions():
    """The inner problem alone: at a mask that stays where it is, the disagreement rises."""
    model, tasks = Encoder(), tasks_of()
    vectors = vectors_of(model)
    found = defense_aware_mask(vectors, model, tasks, seed=0, steps=60, lr=1e-9, trigger_lr=0.05)
    assert sum(found.disagreements[-10:]) > 2 * sum(found.disagreements[:10])


def test_without_a_defense_it_is_the_concrete_mask():
    model, tasks = Encoder(), tasks_of(batches=1)
    vectors = vectors_of(model)
    one = defense_aware_mask(vectors, model, tasks, seed=1, steps=3, defense=0.0)
    other = concrete_mask(vectors, model, tasks, seed=1, steps=3)
    assert one.losses == pytest.approx(other.losses)
    for name, mask in other.mask.items():
        torch.testing.assert_close(one.mask[name], mask)


def test_nothing_is_touched_and_the_seed_decides():
    model, tasks = Encoder().train(), tasks_of()
    vectors = vectors_of(model)
    before, state = fingerprint(model), torch.get_rng_state()
    found = defense_aware_mask(vectors, model, tasks, seed=3, steps=2)
    same_fingerprint(fingerprint(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    again, other = (defense_aware_mask(vectors, model, tasks, seed=seed, steps=2) for seed in (3, 4))
    assert all(torch.equal(again.mask[name], tensor) for name, tensor in found.mask.items())
    assert again.losses == found.losses != other.losses


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"against": "all"}, InputError, "against: expected one of 'entropy', 'prediction', got 'all'"),
        ({"kind": "hard"}, InputError, "kind: expected one of 'sample'"),
        ({"defense": -1}, InputError, "defense: expected at least 0, got -1"),
        ({"bounds": (1, 0)}, InputError, "bounds: expected the lowest value before the highest"),
        ({"trigger_lr": 0}, InputError, "trigger_lr: expected a positive finite number"),
        ({"tasks": [[1]]}, TypeError, "tasks: expected inputs .* as one floating-point tensor, got a list of 1"),
        ({"tasks": [torch.ones(1, 2).long()]}, TypeError, "tasks: expected inputs .* got a bare tensor"),
        (
            {"tasks": [torch.ones(1, 2), torch.ones(1, 3)]},
            ShapeError,
            r"tasks: expected inputs \(B, 2\), as in the first",
        ),
    ],
)
def test_bad_input(options, error, message):
    vectors, model = [{"weight": torch.ones(2, 2)}], nn.Linear(2, 2)
    with pytest.raises(error, match=message):
        defense_aware_mask(vectors, **{"model": model, "tasks": [torch.ones(1, 2)], "seed": 0, "steps": 1, **options})
