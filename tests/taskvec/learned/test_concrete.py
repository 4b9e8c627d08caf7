"""The Concrete mask beside a naive transcription, what it promises, and what it refuses."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call

from helpers.learned_world import Encoder, fingerprint, normal, same_fingerprint, tasks_of, vectors_of
from rmtllmf._random import generator
from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.taskvec import concrete, concrete_mask, fuse, task_arithmetic


def uniform(seed, step, name, shape, dtype=torch.float64):
    """The documented numbers: one generator for each seed, step and name."""
    u = torch.rand(shape, generator=generator(seed, "concrete", step, name), dtype=dtype)
    return u.clamp(torch.finfo(dtype).eps, 1 - torch.finfo(dtype).eps)


def naive(vectors, model, tasks, steps, lr, T, scale, seed):
    """The paper's algorithm with the gradients that torch finds; the names of a tie are one: the sample, the odds."""
    model = model.eval()
    names = [name for name in vectors[0] if name != "middle.weight"]  # the tie's first name in sorted order stays
    x = {name: torch.zeros_like(vectors[0][name]).requires_grad_() for name in names}
    adam = torch.optim.Adam(list(x.values()), lr=lr)

    def sampled(step):
        m = {n: ((x[n] + torch.logit(uniform(seed, step, n, x[n].shape))) / T).sigmoid() for n in names}
        return {n: mask / mask.mean() for n, mask in m.items()}

    losses = []
    for step in range(steps):
        m = sampled(step)
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        for n in names:
            state[n] = state[n] + scale * m[n] * sum(v[n] for v in vectors)
        state["middle.weight"] = state["again.weight"]
        loss = 0
        for head, batches in tasks.values():
            p = head(functional_call(model, state, (batches[step % len(batches)][0],))).softmax(-1)
            loss = loss - (p * p.log()).sum(-1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()) / len(tasks))
    return {n: mask.detach() for n, mask in sampled(steps).items()}, {n: x[n].detach().sigmoid() for n in names}, losses


@pytest.mark.parametrize(("T", "scale", "seed"), [(0.5, 0.3, 0), (1.0, 0.7, 5)])
def test_the_naive_algorithm(T, scale, seed):
    model, tasks = Encoder(), tasks_of()
    vectors = vectors_of(model)
    sample, odds, losses = naive(vectors, Encoder(), tasks, 5, 0.05, T, scale, seed)
    learn = partial(concrete_mask, vectors, model, tasks, seed=seed, scale=scale, steps=5, lr=0.05, temperature=T)
    found = learn()
    assert found.losses == pytest.approx(losses, abs=1e-10)
    assert list(found.mask) == list(vectors[0])
    for name, mask in sample.items():
        torch.testing.assert_close(found.mask[name], mask)
    assert found.mask["middle.weight"] is found.mask["again.weight"]
    likely, binary = learn(kind="probability").mask, learn(kind="binary").mask
    for name, probability in odds.items():
        torch.testing.assert_close(likely[name], probability / probability.mean())
        expected = (uniform(seed, 5, name, probability.shape) < probability).double()
        torch.testing.assert_close(binary[name], expected / expected.mean().clamp_min(1e-300))


def test_the_update_is_masked_task_arithmetic():
    model, tasks = Encoder(), tasks_of()
    vectors = vectors_of(model)
    mask = concrete_mask(vectors, model, tasks, seed=1, steps=2).mask
    plain, update = task_arithmetic(vectors), concrete(vectors, mask)
    for name in mask:
        torch.testing.assert_close(update[name], plain[name] * mask[name])
        torch.testing.assert_close(mask[name].mean(), torch.ones((), dtype=torch.float64))
    tuned = [vector.apply_to(model.state_dict()) for vector in vectors]
    fused = fuse(model, tuned, partial(concrete, mask=mask))
    for name, tensor in update.apply_to(model.state_dict()).items():
        torch.testing.assert_close(fused[name], tensor)


def test_what_disturbs_is_masked():
    """What the paper claims: entries on which the vectors interfere with the predictions lose their share."""
    model = nn.Linear(6, 3, bias=False, dtype=torch.float64)
    base = {"weight": 2 * normal(3, 6)}
    good = base["weight"].clone()
    good[:, 3:] = 0
    bad = -1.5 * base["weight"]
    bad[:, :3] = 0
    vectors = [{"weight": good}, {"weight": bad}]  # one makes the first inputs count more, one the others nothing
    found = concrete_mask(
        vectors, model, [normal(32, 6, seed=3)], base=base, seed=0, scale=0.5, steps=100, lr=0.05, kind="probability"
    )
    assert found.mask["weight"][:, :3].mean() > 1.3 > 0.7 > found.mask["weight"][:, 3:].mean()
    assert sum(found.losses[-10:]) < sum(found.losses[:10])


def test_nothing_is_touched_and_the_seed_decides():
    model, tasks = Encoder().train(), tasks_of()
    vectors = vectors_of(model)
    before, state = fingerprint(model), torch.get_rng_state()
    found = concrete_mask(vectors, model, tasks, seed=3, steps=2)
    same_fingerprint(fingerprint(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    turned = [dict(reversed(list(vector.items()))) for vector in vectors]
    again, other = (concrete_mask(turned, model, tasks, seed=seed, steps=2) for seed in (3, 4))
    assert all(torch.equal(again.mask[name], tensor) for name, tensor in found.mask.items())
    assert again.losses == found.losses != other.losses
    assert not torch.equal(other.mask["middle.weight"], found.mask["middle.weight"])


def test_weights_and_skip():
    model, tasks = Encoder(), tasks_of()
    vectors = vectors_of(model)
    doubled = concrete_mask([2 * v for v in vectors], model, tasks, seed=0, steps=2, skip="leave.*")
    weighted = concrete_mask(vectors, model, tasks, seed=0, steps=2, skip="leave.*", weights=[2, 2, 2])
    assert weighted.losses == pytest.approx(doubled.losses)
    assert "leave.weight" not in weighted.mask
    assert "leave.weight" not in concrete(vectors, weighted.mask, skip="leave.*")


def test_edges():
    model = Encoder(torch.bfloat16)
    tasks, vectors = tasks_of(dtype=torch.bfloat16), vectors_of(model)
    found = concrete_mask(vectors, model, tasks, seed=0, steps=2)
    assert found.mask["gain"] == 1
    assert found.mask["enter.weight"].dtype == torch.float32
    for kind in ("sample", "binary", "probability"):
        cold = concrete_mask(vectors[:1], model, tasks, seed=0, steps=1, temperature=1e-3, kind=kind)
        assert all(mask.isfinite().all() for mask in cold.mask.values())
        zeros = concrete_mask([0 * v for v in vectors], model, tasks, seed=0, steps=1, kind=kind)
        assert all(mask.isfinite().all() for mask in zeros.mask.values())
    empty = nn.Linear(2, 2)
    empty.none = nn.Parameter(torch.zeros(0, 3))
    found = concrete_mask([dict(empty.state_dict())], empty, [torch.ones(1, 2)], seed=0, steps=2)
    assert found.mask["none"].shape == (0, 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": 0.5}, TypeError, "seed: expected an int or a torch.Generator"),
        ({"kind": "hard"}, InputError, "kind: expected one of 'sample', 'binary', 'probability', got 'hard'"),
        ({"temperature": 0}, InputError, "temperature: expected a positive finite number"),
        ({"steps": -1}, InputError, "steps: expected a whole number of at least 0"),
        ({"lr": "1"}, TypeError, "lr: expected a real number"),
        ({"tasks": []}, InputError, "tasks: expected at least one batch"),
    ],
)
def test_bad_input(options, error, message):
    vectors, model = [{"weight": torch.ones(2, 2)}], nn.Linear(2, 2)
    with pytest.raises(error, match=message):
        concrete_mask(vectors, **{"model": model, "tasks": [torch.ones(1, 2)], "seed": 0, **options})


def test_bad_masks():
    vectors = [{"w": torch.ones(2), "b": torch.ones(2)}]
    with pytest.raises(StateMismatchError, match="mask lacks 'b'"):
        concrete(vectors, {"w": torch.ones(2)})
    with pytest.raises(StateMismatchError, match=r"mask\['b'\] has shape \(3,\); the vectors have \(2,\)"):
        concrete(vectors, {"w": torch.ones(2), "b": torch.ones(3)})
    with pytest.raises(NonFiniteError, match=r"mask\['b'\] holds non-finite entries"):
        concrete(vectors, {"w": torch.ones(2), "b": torch.tensor([1.0, float("inf")])})


@pytest.mark.gpu
def test_on_the_device():
    model = Encoder(torch.float32).cuda()
    tasks = {name: (head.cuda(), batches) for name, (head, batches) in tasks_of(dtype=torch.float32).items()}
    vectors = [vector.to("cuda", torch.float32) for vector in vectors_of(model.cpu())]
    found, again = (concrete_mask(vectors, model.cuda(), tasks, seed=0, steps=3) for _ in range(2))
    assert all(mask.is_cuda for mask in found.mask.values())
    assert found.losses == pytest.approx(again.losses, abs=1e-4)
    assert concrete(vectors, found.mask)["enter.weight"].is_cuda
