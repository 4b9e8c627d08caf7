"""The federated loop in plain torch: against FedAvg written out, and learning through a jammed uplink."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from plugins.federated_round import federated, jammed_uplink, next_state
from rmtllmf.channel import transmit
from rmtllmf.taskvec import geometric_median


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def data(number, count=60):
    source = torch.Generator().manual_seed(number)
    x = torch.randn(count, 6, generator=source)
    return x, x[:, :3].argmax(1)


def client(number, count=60):
    """Trains on data of its own, from the state that it is given."""

    def train(state):
        model, (x, y) = new_model(), data(number, count)
        model.load_state_dict(state)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(5):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        return model.state_dict(), count

    return train


CLIENTS = [client(number, count) for number, count in enumerate((30, 60, 90))]


def ideal(users, seed):
    return 0.0


def loss(state, training=True):
    x, y = data(99, 300)
    with torch.no_grad():
        return float(cross_entropy(functional_call(new_model().train(training), dict(state), (x,)), y))


def test_without_noise_it_is_federated_averaging():
    start = new_model().state_dict()
    answers = [train(start) for train in CLIENTS]
    found = next_state(start, answers, seed=1, uplink=ideal)
    for name, tensor in start.items():
        if "running" in name or "num_batches" in name:
            assert torch.equal(found[name], tensor), "statistics are not sent"
        else:
            average = sum(count * state[name] for state, count in answers) / 180
            torch.testing.assert_close(found[name], average)
            assert not torch.equal(found[name], tensor)


def test_what_is_heard_has_the_noise_of_that_rounds_uplink():
    start = {name: tensor for name, tensor in new_model().state_dict().items() if tensor.is_floating_point()}
    answers = [({name: tensor + 0.1 for name, tensor in start.items()}, 1) for _ in range(2)]
    reception = jammed_uplink(2, seed=4)
    names = [name for name in start if "running" not in name]
    sent = [{name: state[name] - start[name] for name in names} for state, _ in answers]
    heard = transmit(sent, reception, seed=4)
    found = next_state(start, answers, seed=4)
    for name in names:
        torch.testing.assert_close(found[name], start[name] + (heard[0][name] + heard[1][name]) / 2)
    assert jammed_uplink(2, seed=5).mse.tolist() != pytest.approx(reception.mse.tolist())


def test_rounds_are_taken_one_after_another():
    start = new_model().state_dict()
    once = next_state(start, [train(start) for train in CLIENTS], seed=1)
    twice = next_state(once, [train(once) for train in CLIENTS], seed=2)
    found = federated(start, CLIENTS, rounds=2)
    assert all(torch.equal(tensor, twice[name]) for name, tensor in found.items())


def test_it_learns_unless_the_uplink_is_hopeless():
    start = new_model().state_dict()
    uplinks = (ideal, jammed_uplink, lambda users, seed: 30.0)
    clean, jammed, hopeless = (loss(federated(start, CLIENTS, rounds=5, uplink=uplink)) for uplink in uplinks)
    assert clean < 0.5 * loss(start)
    assert jammed < 0.8 * loss(start)
    assert hopeless > 1.5 * clean


def test_any_rule_will_do():
    start = new_model().state_dict()
    answers = [train(start) for train in CLIENTS]
    huge = {name: tensor + 1000 if tensor.is_floating_point() else tensor for name, tensor in start.items()}
    robust = partial(next_state, start, [*answers, (huge, 1)], seed=1, uplink=ideal, rule=geometric_median)()
    averaged = next_state(start, [*answers, (huge, 1)], seed=1, uplink=ideal)
    assert loss(robust) < loss(start) < loss(averaged)
