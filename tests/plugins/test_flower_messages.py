"""Flower's message strategies with real messages, and its own loop of rounds over a grid in this process."""

from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("flwr.serverapp.strategy", reason="needs Flower 1.21 or newer")

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from plugins.federated_round import next_state
from plugins.flower_messages import JammedFedAvg

EXAMPLES = {11: 10, 22: 30}  # of the nodes


def state(seed):
    source = torch.Generator().manual_seed(seed)
    numbers = {"layer.weight": (4, 6), "layer.bias": (4,), "norm.running_mean": (4,)}
    tensors = {name: torch.randn(shape, generator=source) for name, shape in numbers.items()}
    return {**tensors, "norm.num_batches_tracked": torch.tensor(seed)}


START = state(7)


@pytest.fixture(autouse=True)
def in_a_run(monkeypatch):
    """Messages carry numbers that recent versions ask of the process, where Flower itself has started it."""
    if find_spec("flwr.supercore") and find_spec("flwr.supercore.task_identity"):
        from flwr.supercore.task_identity import TaskIdentity

        for name in ("_run_id", "_node_id", "_task_id"):
            monkeypatch.setattr(TaskIdentity, name, 1, raising=False)


def answer(message, node):
    metrics = MetricRecord({"num-examples": EXAMPLES[node], "loss": float(node)})
    return Message(RecordDict({"anything": ArrayRecord(state(node)), "numbers": metrics}), reply_to=message)


class LocalGrid(Grid):
    """Two nodes in this process; what each of them was sent; `turned`: they answer in the other order."""

    def __init__(self, turned=False):
        self.turned, self.was_sent = turned, {node: [] for node in EXAMPLES}

    def get_node_ids(self):
        return list(EXAMPLES)

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.was_sent[node].append(message.content["arrays"].to_torch_state_dict())
            replies.append(answer(message, node))
        return replies[::-1] if self.turned else replies

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        raise NotImplementedError

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError


def ideal(users, seed):
    return 0.0


def one_round(strategy, number, grid=None):
    grid = LocalGrid() if grid is None else grid
    messages = strategy.configure_train(number, ArrayRecord(START), ConfigRecord(), grid)
    arrays, metrics = strategy.aggregate_train(number, grid.send_and_receive(messages))
    return arrays.to_torch_state_dict(), dict(metrics)


def test_without_noise_it_is_flowers_own_average_of_what_is_learnt():
    found, metrics = one_round(JammedFedAvg(lambda *a, **k: next_state(*a, **k, uplink=ideal)), 1)
    expected, theirs = one_round(FedAvg(), 1)
    assert metrics == theirs
    for name, tensor in found.items():
        if name.startswith("layer"):
            torch.testing.assert_close(tensor, expected[name])
        else:
            assert torch.equal(tensor, START[name]), "running statistics and counters are not sent"
        assert tensor.dtype == START[name].dtype


def test_what_is_fused_is_what_was_heard_in_that_round():
    found, _ = one_round(JammedFedAvg(), 3)
    expected = next_state(START, [(state(11), 10), (state(22), 30)], seed=3)
    assert list(found) == list(START)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    turned, _ = one_round(JammedFedAvg(), 3, LocalGrid(turned=True))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in turned.items())
    other, _ = one_round(JammedFedAvg(), 4)
    assert not torch.equal(found["layer.weight"], other["layer.weight"])


def test_clients_that_fail_are_left_out():
    strategy, grid = JammedFedAvg(), LocalGrid()
    first, second = strategy.configure_train(5, ArrayRecord(START), ConfigRecord(), grid)
    failed = Message(Error(code=0, reason="gone"), reply_to=second)
    arrays, _ = strategy.aggregate_train(5, [failed, answer(first, 11)])
    expected = next_state(START, [(state(11), 10)], seed=5)
    found = arrays.to_torch_state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert strategy.aggregate_train(6, [failed]) == (None, None)


def test_flowers_own_loop_runs_with_it():
    strategy = JammedFedAvg(fraction_evaluate=0.0)
    strategy.start(grid=LocalGrid(), initial_arrays=ArrayRecord(state(8)), num_rounds=1)
    grid = LocalGrid()  # and once more, which must not remember anything
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord(START), num_rounds=2)
    first, _ = one_round(JammedFedAvg(), 1)
    for sent in grid.was_sent.values():
        assert all(torch.equal(sent[0][name], tensor) for name, tensor in START.items())
        assert all(torch.equal(sent[1][name], tensor) for name, tensor in first.items())
    second = next_state(first, [(state(11), 10), (state(22), 30)], seed=2)
    found = result.arrays.to_torch_state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in second.items())
