"""Expert Merging beside a naive transcription, what it promises, and what it refuses."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call

from helpers.learned_world import Encoder, fingerprint, head, normal, same_fingerprint, tasks_of, vectors_of
from rmtllmf.errors import InputError, ShapeError
from rmtllmf.taskvec import expert_merging, expert_merging_coefficients, fuse, task_arithmetic


def naive(vectors, model, tasks, steps, T, mu, gamma, beta, hidden, lr=0.05, start=0.3):
    """The paper's objective on whole tensors, sample by sample; the names of a tie are one."""
    model = model.eval()
    names = [name for name in vectors[0] if name != "again.weight"]
    base = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    seen = []
    if hidden == "middle":
        model.middle.register_forward_hook(lambda module, inputs, output: seen.append(output))

    def answer(theta, head, X):
        seen.clear()
        features = functional_call(model, {**base, **theta, "again.weight": theta["middle.weight"]}, (X,))
        return head(features), (seen[0] if hidden == "middle" else features)

    a = torch.full((len(names), len(vectors)), start, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([a], lr=lr)
    losses = []
    for _ in range(steps):
        merged = {n: base[n] + sum(a[i, q] * v[n] for q, v in enumerate(vectors)) for i, n in enumerate(names)}
        loss = gamma * (a - start).abs().sum() / a.numel()
        for k, (head_k, batches) in enumerate(tasks.values()):
            X = torch.cat([X for X, _ in batches])
            with torch.no_grad():
                z_k, h_k = answer({n: base[n] + vectors[k][n] for n in names}, head_k, X)
            z, h = answer(merged, head_k, X)
            p = (z_k / T).softmax(-1)
            kl = (p * (p.log() - (z / T).log_softmax(-1))).sum(-1).mean()
            loss = loss + beta[k] * (mu * ((h - h_k) ** 2).sum(-1).mean() / h.shape[1] + T**2 * kl)
        adam.zero_grad()
        loss.backward()
        adam.step()
        a.data.clamp_(0, 1)
        losses.append(float(loss.detach()))
    return {name: a[i].tolist() for i, name in enumerate(names)}, losses


@pytest.mark.parametrize(
    ("T", "mu", "gamma", "beta", "hidden"),
    [(3.0, 1.0, 0.8, None, None), (1.0, 0.5, 5.0, [1.0, 0.0, 2.0], None), (2.0, 1.0, 0.0, None, "middle")],
)
def test_the_naive_algorithm(T, mu, gamma, beta, hidden):
    model, tasks = Encoder(), tasks_of(3)
    tasks["t0"][1][0] = tuple(part[:4] for part in tasks["t0"][1][0])  # batches of different lengths
    vectors = vectors_of(model)
    expected, losses = naive(vectors, Encoder(), tasks, 6, T, mu, gamma, beta or [1.0] * 3, hidden)
    found = expert_merging_coefficients(
        vectors,
        model,
        tasks,
        hidden=hidden,
        steps=6,
        lr=0.05,
        temperature=T,
        hidden_weight=mu,
        anchor_weight=gamma,
        task_weights=beta,
    )
    assert found.losses == pytest.approx(losses, abs=1e-10)
    for name, row in expected.items():
        assert found.weights[name] == pytest.approx(row, abs=1e-7), name


def test_a_lone_expert_is_found_and_the_anchor_holds():
    model, tasks = Encoder(), tasks_of(1, size=20)
    vectors = vectors_of(model, 1)
    free = expert_merging_coefficients(vectors, model, tasks, steps=60, anchor_weight=0, lr=0.03, start=0.5)
    assert free.losses[-1] < 0.05 * free.losses[0]
    held = expert_merging_coefficients(vectors, model, tasks, steps=20, anchor_weight=1e6, start=0.5)
    assert all(abs(c - 0.5) < 0.011 for row in held.weights.values() for c in row)


def test_task_weights_favour_a_task():
    """What the paper claims of its weights: the answers come nearer to those of the expert that counts more."""
    model, tasks = Encoder(), tasks_of(2)
    vectors = vectors_of(model, 2)

    def apart(k, task_weights):
        update = expert_merging(vectors, model, tasks, steps=12, lr=0.1, anchor_weight=0, task_weights=task_weights)
        (_, batches), state = tasks[f"t{k}"], model.state_dict()
        run = [functional_call(model.eval(), v.apply_to(state), (batches[0][0],)) for v in (update, vectors[k])]
        return float((run[0] - run[1]).norm())

    assert apart(0, [5, 0.2]) < apart(0, [0.2, 5])
    assert apart(1, [5, 0.2]) > apart(1, [0.2, 5])


def test_nothing_is_touched_and_fuse_gives_the_same():
    model, tasks = Encoder().train(), tasks_of(2)
    vectors = vectors_of(model, 2)
    before = fingerprint(model)
    update = expert_merging(vectors, model, tasks, steps=2, hidden=["middle", "e*"])
    same_fingerprint(fingerprint(model), before)
    found = expert_merging_coefficients(vectors, model, tasks, steps=2, hidden=["middle", "e*"])
    expected = task_arithmetic(vectors, 1.0, weights=found.weights)
    assert all(torch.equal(update[name], expected[name]) for name in expected)
    tuned = [vector.apply_to(model.state_dict()) for vector in vectors]
    rule = partial(expert_merging, model=model, tasks=tasks, steps=2, hidden=["middle", "e*"])
    fused = fuse(model, tuned, rule)
    for name, tensor in update.apply_to(model.state_dict()).items():
        torch.testing.assert_close(fused[name], tensor)


def test_hooks_are_removed_after_an_error():
    model = Encoder()
    before = fingerprint(model)
    with pytest.raises(TypeError, match="expected logits as a tensor"):
        expert_merging(vectors_of(model, 1), model, {"t": (lambda z: "no", [normal(3, 5)])}, hidden="middle")
    same_fingerprint(fingerprint(model), before)


def test_a_complete_model_with_tuples_and_tokens():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, x):
            return self.layer(x).tanh(), None

    class Complete(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()
            self.head = nn.Linear(4, 3, dtype=torch.float64)

        def forward(self, x):
            return self.head(self.block(x)[0])

    model = Complete()
    vectors = [{name: normal(*t.shape, seed=q) for name, t in model.state_dict().items()} for q in range(2)]
    tasks = {"a": [normal(6, 4)], "b": [normal(6, 4, seed=1)]}
    tokens = {name: [batches[0].view(2, 3, 4)] for name, batches in tasks.items()}
    flat = expert_merging_coefficients(vectors, model, tasks, hidden="block", steps=3)
    assert expert_merging_coefficients(vectors, model, tokens, hidden="block", steps=3).losses == pytest.approx(
        flat.losses
    )
    none = expert_merging_coefficients(vectors, model, tasks, steps=3)
    assert none == expert_merging_coefficients(vectors, model, tasks, hidden=(), steps=3)
    assert none.losses[0] < flat.losses[0]
    model.pair = nn.Module()
    model.pair.forward = lambda x: {"x": x}
    model.forward = lambda x: model.head(model.pair(x)["x"])
    with pytest.raises(TypeError, match="hidden: the output of 'pair': expected a tensor"):
        expert_merging(vectors, model, tasks, hidden="pair")


def test_edges():
    model = Encoder(torch.bfloat16)
    tasks, vectors = tasks_of(3, dtype=torch.bfloat16), vectors_of(model)
    found = expert_merging_coefficients(vectors, model, tasks, steps=2)
    assert all(torch.tensor(found.losses).isfinite())
    zeros = expert_merging_coefficients([0 * v for v in vectors], model, tasks, steps=2)
    assert zeros.losses[0] == pytest.approx(0, abs=1e-6)
    assert {c for row in zeros.weights.values() for c in row} == {0.3}
    assert expert_merging_coefficients(vectors, model, tasks, steps=0).losses == ()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"tasks": {"a": [torch.ones(1, 5)]}},
            InputError,
            "tasks: expected one for each of 2 vectors, in their order, got 1",
        ),
        ({"hidden": "nowhere"}, InputError, "hidden: 'nowhere' matches none"),
        ({"temperature": 0}, InputError, "temperature: expected a positive finite number"),
        ({"hidden_weight": -1}, InputError, "hidden_weight: expected a number >= 0, got -1"),
        ({"anchor_weight": -1}, InputError, "anchor_weight: expected a number >= 0"),
        ({"task_weights": [1]}, ShapeError, "task_weights: expected 2 numbers, one for each task, got 1"),
        ({"task_weights": {"a": 1}}, TypeError, "task_weights: expected 2 numbers or None, got dict"),
        ({"task_weights": [1, -1]}, InputError, r"task_weights\[1\]: expected a number >= 0"),
        ({"start": 2}, InputError, "bounds: expected them around start, 2"),
        ({"wrong": 1}, TypeError, "unexpected keyword 'wrong'"),
    ],
)
def test_bad_input(options, error, message):
    model = Encoder(torch.float32)
    tasks = {name: (head(1, dtype=torch.float32), [torch.ones(1, 5)]) for name in "ab"}
    with pytest.raises(error, match=message):
        expert_merging(vectors_of(model, 2), **{"model": model, "tasks": tasks, **options})


@pytest.mark.gpu
def test_on_the_device():
    model, tasks = Encoder(torch.float32), tasks_of(2, dtype=torch.float32)
    vectors = [vector.to(torch.float32) for vector in vectors_of(model, 2)]
    options = {"steps": 4, "hidden": "middle"}
    expected = expert_merging_coefficients(vectors, model, tasks, **options)
    heads = {name: (head.cuda(), batches) for name, (head, batches) in tasks.items()}
    found = expert_merging_coefficients(vectors, model.cuda(), heads, **options)
    assert found.losses == pytest.approx(expected.losses, rel=1e-3)
