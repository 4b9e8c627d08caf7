"""Flower's real server and its FedAvg, with clients in this process instead of a network."""

import numpy as np
import pytest
import torch

flwr = pytest.importorskip("flwr")

from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays  # noqa: E402
from flwr.server.client_proxy import ClientProxy  # noqa: E402
from flwr.server.strategy import FedAvg  # noqa: E402

from plugins.federated_round import next_state  # noqa: E402
from plugins.flower_strategy import JammedFedAvg  # noqa: E402

NAMES = ["layer.weight", "layer.bias", "norm.running_mean", "norm.num_batches_tracked"]
SHAPES = [(4, 6), (4,), (4,), ()]


def arrays(seed):
    rng = np.random.default_rng(seed)
    numbers = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES[:-1]]
    return [*numbers, np.array(seed, dtype=np.int64)]


class Client(ClientProxy):
    """Answers with its own arrays, whatever it is sent."""

    def __init__(self, cid, seed, examples):
        super().__init__(cid)
        self.seed, self.examples, self.was_sent = seed, examples, []

    def fit(self, ins, timeout, group_id):
        self.was_sent.append(parameters_to_ndarrays(ins.parameters))
        parameters = ndarrays_to_parameters(arrays(self.seed))
        return FitRes(Status(Code.OK, ""), parameters, self.examples, {"loss": float(self.seed)})

    def get_properties(self, ins, timeout, group_id):
        raise NotImplementedError

    def get_parameters(self, ins, timeout, group_id):
        raise NotImplementedError

    def evaluate(self, ins, timeout, group_id):
        raise NotImplementedError

    def reconnect(self, ins, timeout, group_id):
        raise NotImplementedError


class Manager:
    """What a strategy asks of Flower's client manager."""

    def __init__(self, clients):
        self.clients = clients

    def num_available(self):
        return len(self.clients)

    def sample(self, num_clients, min_num_clients=None, criterion=None):
        return self.clients


CLIENTS = [Client("b", 1, 10), Client("a", 2, 30)]
START = arrays(7)


def ideal(users, seed):
    return 0.0


def averaged_metrics(metrics):
    return {"loss": sum(count * values["loss"] for count, values in metrics) / sum(count for count, _ in metrics)}


def one_round(strategy, number, clients=CLIENTS, failures=()):
    asked = strategy.configure_fit(number, ndarrays_to_parameters(START), Manager(clients))
    answers = [(client, client.fit(instructions, None, None)) for client, instructions in asked]
    found, metrics = strategy.aggregate_fit(number, answers, list(failures))
    return found and parameters_to_ndarrays(found), metrics


def jammed(**how):
    options = {"fit_metrics_aggregation_fn": averaged_metrics} | how.pop("options", {})
    return JammedFedAvg(NAMES, lambda *args, **more: next_state(*args, **more, **how), **options)


def test_without_noise_it_is_flowers_own_average_of_what_is_learnt():
    found, metrics = one_round(jammed(uplink=ideal), 1)
    expected, theirs = one_round(FedAvg(fit_metrics_aggregation_fn=averaged_metrics), 1)
    assert metrics == theirs == {"loss": 1.75}
    for index in (0, 1):
        np.testing.assert_allclose(found[index], expected[index], rtol=1e-5, atol=1e-6)
    for index in (2, 3):
        assert np.array_equal(found[index], START[index]), "running statistics and counters are not sent"
    assert [array.dtype for array in found] == [array.dtype for array in START]


def test_what_is_fused_is_what_was_heard_in_that_round():
    found, _ = one_round(jammed(), 3)
    start, *states = ({n: torch.from_numpy(a) for n, a in zip(NAMES, arrays(seed), strict=True)} for seed in (7, 2, 1))
    expected = next_state(start, [(states[0], 30), (states[1], 10)], seed=3)  # client "a" first
    for array, tensor in zip(found, expected.values(), strict=True):
        assert np.array_equal(array, tensor.numpy())
    clean, _ = one_round(jammed(uplink=ideal), 3)
    assert not np.allclose(found[0], clean[0], atol=0.01)
    other, _ = one_round(jammed(), 4)
    assert not np.array_equal(found[0], other[0])


def test_the_order_in_which_clients_answer_does_not_matter():
    found, _ = one_round(jammed(), 3)
    turned, _ = one_round(jammed(), 3, clients=CLIENTS[::-1])
    assert all(np.array_equal(a, b) for a, b in zip(found, turned, strict=True))


def test_rounds_that_flower_gives_up_are_given_up():
    assert one_round(jammed(), 1, clients=[]) == (None, {})
    strict = jammed(options={"accept_failures": False})
    assert one_round(strict, 1, failures=[RuntimeError("gone")]) == (None, {})


def test_flowers_own_server_runs_with_it():
    from flwr.server import Server, SimpleClientManager

    manager = SimpleClientManager()
    clients = [Client("b", 1, 10), Client("a", 2, 30)]
    for client in clients:
        assert manager.register(client)
    strategy = jammed(options={"fraction_evaluate": 0.0, "initial_parameters": ndarrays_to_parameters(START)})
    server = Server(client_manager=manager, strategy=strategy)
    server.fit(num_rounds=2, timeout=None)
    first, second = clients[0].was_sent
    assert all(np.array_equal(a, b) for a, b in zip(first, START, strict=True))
    expected, _ = one_round(jammed(), 1)
    assert all(np.array_equal(a, b) for a, b in zip(second, expected, strict=True))
