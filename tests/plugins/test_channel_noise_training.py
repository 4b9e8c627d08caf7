"""Training with the channel's noise: gradients at the noisy point, clean weights afterwards, what it is good for."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from plugins.channel_noise_training import channel_noise
from rmtllmf.channel import transmit
from rmtllmf.taskvec import TaskVector

MSE = 0.3


def new_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 3))


def data(count, seed):
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=source)
    return x, (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 1).long()


def state_of(model):
    return copy.deepcopy(model.state_dict())


def moved(model, amount=0.1):
    """As after some training: the base, and a model that is not there any more."""
    base = state_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn(parameter.shape))
    return base


def noisy_point(model, base, seed):
    """The oracle: base plus what is heard of the difference, from plain dicts."""
    difference = {name: tensor - base[name] for name, tensor in model.state_dict().items()}
    (heard,) = transmit([difference], MSE, seed=seed)
    return {name: base[name] + heard[name] for name in base}


def test_gradients_are_those_of_the_noisy_point_and_steps_are_taken_from_the_clean_one():
    model, (x, y) = new_model(), data(20, 1)
    base = moved(model)
    clean = state_of(model)
    there = {name: tensor.requires_grad_() for name, tensor in noisy_point(model, base, seed=7).items()}
    loss = cross_entropy(functional_call(model, there, (x,)), y)
    expected = dict(zip(there, torch.autograd.grad(loss, list(there.values())), strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with channel_noise(model, base, optimizer, MSE, seed=7):
        found = cross_entropy(model(x), y)
        assert torch.equal(found, loss)
        found.backward()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, there[name])
            assert torch.equal(parameter.grad, expected[name])
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, clean[name] - 0.5 * expected[name])
        assert not torch.allclose(expected[name], torch.zeros(()))


def test_clean_weights_come_back_bit_by_bit():
    model, (x, y) = new_model(), data(20, 1)
    base = moved(model)
    clean = state_of(model)
    frozen = model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def is_clean():
        return all(torch.equal(tensor, clean[name]) for name, tensor in model.state_dict().items())

    with channel_noise(model, base, optimizer, MSE):
        cross_entropy(model(x), y).backward()
        assert not is_clean()
        assert torch.equal(frozen, clean["0.bias"]), "what is not trained is not sent"
        noisy = state_of(model)
        cross_entropy(model(x), y).backward()
        assert all(torch.equal(tensor, noisy[name]) for name, tensor in model.state_dict().items()), "one draw a step"
        optimizer.step()
        assert is_clean()
        model(x)
        assert not all(torch.equal(tensor, noisy[name]) for name, tensor in model.state_dict().items()), "a new one"
        model.eval()(x)
        assert is_clean(), "evaluation is without noise"
        model.train()(x)
        assert not is_clean()
    assert is_clean()

    def fail():
        with channel_noise(model, base, optimizer, MSE):
            model(x)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert is_clean()
    model(x)
    optimizer.step()
    assert is_clean(), "no hook is left"
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_the_first_step_has_nothing_to_send():
    model, (x, _) = new_model(), data(20, 1)
    base = state_of(model)
    with channel_noise(model, base, torch.optim.SGD(model.parameters(), lr=0.1), MSE):
        model(x)
        assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())


def trained(noise, seed):
    model, (x, y) = new_model(seed), data(200, seed)
    base = state_of(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def train():
        for _ in range(200):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()

    if noise:
        with channel_noise(model, base, optimizer, MSE, seed=1000):
            train()
    else:
        train()
    return model, base


def test_it_makes_models_that_stand_the_channel_better():
    """Three tasks, forty receptions each, unseen samples: the loss of what is heard is less than half."""
    for seed in range(3):
        losses, (x, y) = {}, data(400, 100 + seed)
        for noise in (False, True):
            model, base = trained(noise, seed)
            sent = TaskVector.between(base, model)
            heard = (transmit([sent], MSE, seed=number)[0].apply_to(base) for number in range(40))
            with torch.no_grad():
                losses[noise] = torch.stack([cross_entropy(functional_call(model, s, (x,)), y) for s in heard])
        assert losses[True].mean() < 0.5 * losses[False].mean(), seed
