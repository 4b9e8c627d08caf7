"""What low-rank realignment changes: matrices by at most the rank, along the projected gradient, and nothing else."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from helpers.draws import gaussian, seeded
from helpers.realigned_models import TOKENS, Tied
from rmtllmf.errors import InputError, NonFiniteError
from rmtllmf.resilience import attention_keys
from rmtllmf.resilience.realign_lora import realign_lora


def mlp(dtype=torch.float64):
    return seeded(lambda: nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 3))).to(dtype)


def transformer(dtype=torch.float64):
    """Packed attention weights, and a layer that has a fast path of its own in evaluation mode."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
            self.out = nn.Linear(8, 3)

        def forward(self, x):
            return self.out(self.layer(x).mean(1))

    return seeded(Model).to(dtype)


def batches_of(model):
    shape = (6, 5) if isinstance(model, nn.Sequential) else (6, 4, 8)
    dtype = next(model.parameters()).dtype
    return [(gaussian(*shape, seed=k).to(dtype), torch.arange(6) % 3) for k in range(2)]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def rank_of(matrix):
    return int((torch.linalg.svdvals(matrix.double()) > 1e-10).sum())


@pytest.mark.parametrize("rank", [1, 2, 7])
@pytest.mark.parametrize("make", [mlp, transformer])
def test_every_matrix_changes_by_exactly_the_rank_and_nothing_else_changes(make, rank):
    model = make()
    before, ids = state(model), {name: id(p) for name, p in model.named_parameters()}
    done = realign_lora(model, batches_of(model), rank=rank, steps=12, lr=0.05, seed=0)
    matrices = tuple(name for name, p in model.named_parameters() if p.ndim == 2)
    assert done.trained == matrices
    assert done.losses[10] < done.losses[0]  # of the same batch
    for name, tensor in state(model).items():
        if name in matrices:
            assert rank_of(tensor - before[name]) == min(rank, *tensor.shape), name
        else:
            assert torch.equal(tensor, before[name]), name
    assert {name: id(p) for name, p in model.named_parameters()} == ids


@pytest.mark.parametrize("make", [mlp, transformer])
def test_the_first_step_is_the_full_gradient_projected_on_the_rows_of_a(make):
    """With B = 0: dL/dB = G A^T and dL/dA = 0, so that gradient descent adds -lr G A^T A."""
    model = make()
    before, batches = state(model), batches_of(model)
    loss = cross_entropy(model(batches[0][0]), batches[0][1])
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.ndim == 2}
    model.zero_grad()
    start = []

    def optimizer(factors):
        start.extend(factor.detach().clone() for factor in factors[: len(gradients)])
        return torch.optim.SGD(factors, lr=0.5)

    done = realign_lora(model, batches[:1], rank=2, steps=1, optimizer=optimizer, seed=3)
    assert done.losses[0] == pytest.approx(loss.item(), rel=1e-12)
    for (name, gradient), a in zip(gradients.items(), start, strict=True):
        change = model.get_parameter(name).detach() - before[name]
        torch.testing.assert_close(change, -0.5 * gradient @ a.T @ a, rtol=1e-9, atol=1e-12)
        assert a.abs().max() <= 1 / math.sqrt(a.shape[1])
        assert change.abs().max() > 0


def test_peft_trains_the_same():
    peft = pytest.importorskip("peft")
    model = mlp(torch.float32)
    batches, start = batches_of(model), []

    def optimizer(factors):
        start.extend(factor.detach().clone() for factor in factors[:2])
        return torch.optim.SGD(factors, lr=0.3)

    config = peft.LoraConfig(r=2, lora_alpha=2, lora_dropout=0.0, target_modules=["0", "3"])
    peer = peft.get_peft_model(copy.deepcopy(model), config)
    realign_lora(model, batches, rank=2, steps=8, optimizer=optimizer, seed=1)
    layers = [peer.base_model.model[place] for place in (0, 3)]
    for layer, a in zip(layers, start, strict=True):
        layer.lora_A["default"].weight.data.copy_(a)
    steps = torch.optim.SGD([p for p in peer.parameters() if p.requires_grad], lr=0.3)
    for step in range(8):
        steps.zero_grad()
        x, y = batches[step % 2]
        cross_entropy(peer(x), y).backward()
        steps.step()
    merged = peer.merge_and_unload()
    for place in (0, 3):
        torch.testing.assert_close(model[place].weight, merged[place].weight, rtol=1e-4, atol=1e-6)


def test_validation_sees_what_is_merged_on_the_fast_path_too():
    """In evaluation mode without gradients torch's transformer layer runs one fused kernel on the weights."""
    model = transformer(torch.float32)
    batches = batches_of(model)
    held_out = [(gaussian(6, 4, 8, seed=9), torch.arange(6) % 3)]
    done = realign_lora(model, batches, steps=10, lr=0.05, seed=0, validation=held_out)
    with torch.no_grad():
        final = cross_entropy(model.eval()(held_out[0][0]), held_out[0][1])
    assert float(final) == pytest.approx(min(done.validation), rel=1e-5)
    assert len(set(done.validation)) > 5


def test_only_the_attention_and_frozen_wins():
    model = transformer()
    before = state(model)
    done = realign_lora(
        model, batches_of(model), steps=3, lr=0.1, seed=0, trainable=attention_keys(model), frozen="*.out_proj.*"
    )
    assert done.trained == ("layer.self_attn.in_proj_weight",)
    changed = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {"layer.self_attn.in_proj_weight"}


@pytest.mark.parametrize("trainable", [None, "embed.weight", "out.weight"])
def test_ties_hold_and_both_uses_are_trained(trainable):
    """Its gradient is that of both uses: what gradient descent adds tells it."""
    model = seeded(Tied)
    model.drop.p = 0.0
    peer, start = copy.deepcopy(model), []
    cross_entropy(peer(TOKENS[0][0]), TOKENS[0][1]).backward()

    def optimizer(factors):
        start.append(factors[0].detach().clone())
        return torch.optim.SGD(factors, lr=1.0)

    before = model.embed.weight.detach().clone()
    done = realign_lora(model, TOKENS, rank=2, steps=1, seed=0, trainable=trainable, optimizer=optimizer)
    assert done.trained == ("embed.weight",)
    assert model.out.weight is model.embed.weight
    expected = -peer.embed.weight.grad @ start[0].T @ start[0]
    torch.testing.assert_close(model.embed.weight.detach() - before, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["well", "not finite", "optimizer"])
def test_flags_gradients_modes_and_frozen_statistics_are_left_as_they_were(how):
    model = seeded(Tied)
    model.eval()
    model.drop.train()
    model.norm.bias.requires_grad_(False)
    model.norm.weight.grad = kept = torch.ones(4)
    flags = [p.requires_grad for p in model.parameters()]
    modes = [part.training for part in model.modules()]
    before, calls = state(model), []

    def loss(logits, targets):
        calls.append((model.training, model.norm.training, model.drop.training))
        return cross_entropy(logits, targets) * (math.nan if how == "not finite" and len(calls) == 2 else 1)

    class Optimizer(torch.optim.SGD):
        def step(self, closure=None):
            if how == "optimizer":
                raise KeyError
            super().step(closure)

    def run():
        realign_lora(model, TOKENS, steps=3, seed=0, loss=loss, frozen="norm.running_*", optimizer=Optimizer)

    if how == "well":
        run()
    else:
        with pytest.raises({"not finite": NonFiniteError, "optimizer": KeyError}[how]):
            run()
        assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items() if "norm" not in name)
    assert calls[0] == (True, False, True)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [part.training for part in model.modules()] == modes
    assert model.norm.weight.grad is kept
    assert model.embed.weight.grad is None
    assert not model.norm.running_mean.any()
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in model.parameters())


def test_the_same_seed_gives_the_same_bits_and_draws_nothing_else():
    results = []
    for seed in (0, 0, 1, torch.Generator().manual_seed(5)):
        torch.manual_seed(len(results))
        model, random = mlp(), torch.get_rng_state()
        realign_lora(model, batches_of(model), steps=3, lr=0.1, seed=seed)
        results.append(model[0].weight.detach().clone())
        assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(results[0], results[1])
    assert not any(torch.equal(results[0], other) for other in results[2:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_factors_in_float32(dtype):
    """Steps that would round to nothing add up, and what was trained is what is merged."""
    model = nn.Linear(5, 3).to(dtype)
    batches = [(gaussian(6, 5).to(dtype), torch.arange(6) % 3)]
    seen = []

    def optimizer(factors):
        seen.extend(factor.dtype for factor in factors)
        return torch.optim.AdamW(factors, lr=1e-3)

    done = realign_lora(model, batches, steps=100, seed=0, optimizer=optimizer, validation=batches)
    assert seen == [torch.float32] * 2
    assert model.weight.dtype == dtype
    with torch.no_grad():
        final = float(cross_entropy(model(batches[0][0]), batches[0][1]))
    assert final == min(done.validation) < done.losses[0]


def test_no_steps_change_nothing():
    model = mlp()
    before = state(model)
    assert realign_lora(model, {}, steps=0, seed=0).losses == ()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


def test_a_result_that_is_not_finite_changes_nothing():
    """Factors that are finite, with a product that float16 cannot hold."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).half()
    before = state(model)

    class Huge(torch.optim.SGD):
        def step(self, closure=None):
            for factor in (self.param_groups[0]["params"][place] for place in (1, 3)):
                factor.data.fill_(300.0)

    with pytest.raises(NonFiniteError, match=r"updated '1.weight' is not finite"):
        realign_lora(model, batches_of(model), steps=1, seed=0, optimizer=lambda p: Huge(p, lr=1.0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


def bad(model=None, batches=None, seed=0, **options):
    return lambda: realign_lora(model or mlp(), batches or batches_of(mlp()), seed=seed, **options)


BAD = {
    "no module": (bad(model=len), TypeError, "model: expected a torch.nn.Module"),
    "rank 0": (bad(rank=0), InputError, "rank: .*at least 1, got 0"),
    "rank is a float": (bad(rank=1.5), TypeError, "rank: expected an int"),
    "no matrix": (
        bad(trainable="*.bias"),
        InputError,
        "trainable: expected at least one matrix to adapt, got '0.bias'",
    ),
    "a pattern": (bad(trainable="x"), InputError, "trainable: 'x' matches none"),
    "a frozen pattern": (bad(frozen="x"), InputError, "frozen: 'x' matches none"),
    "a seed": (bad(seed=1.5), TypeError, "seed: expected an int"),
    "a keyword": (bad(alpha=3), TypeError, "unexpected keyword 'alpha'"),
    "an anchor": (bad(anchor="start"), TypeError, "unexpected keyword 'anchor'"),
    "lr": (bad(lr=-1.0), InputError, "lr: expected a positive"),
    "steps": (bad(steps=-1), InputError, "steps: .*at least 0"),
    "no tasks": (bad(batches=3), TypeError, "tasks_or_batches: expected batches"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
