"""Flower, strategies of ``flwr.serverapp``: FedAvg whose clients are heard over a jammed uplink.

Since version 1.21 Flower's clients and servers talk in messages, in which tensors have names. Use it where you would
use ``FedAvg``, whose options it takes::

    strategy = JammedFedAvg(min_train_nodes=8, min_available_nodes=8)
    strategy.start(grid=grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=10)

All else is as in `flower_strategy`.
"""

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from .federated_round import next_state


class JammedFedAvg(FedAvg):
    def __init__(self, fuse: Callable[..., dict[str, Tensor]] = next_state, **options: Any) -> None:
        super().__init__(**options)
        self.fuse = fuse

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.base = arrays.to_torch_state_dict()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = sorted(replies, key=lambda reply: reply.metadata.src_node_id)
        averaged, metrics = super().aggregate_train(server_round, replies)
        if averaged is None:  # nobody answered
            return None, metrics
        answers = [reply.content for reply in replies if not reply.has_error()]
        clients = []
        for answer in answers:  # Flower has seen to it that each holds one record of either kind
            (arrays,), (numbers,) = answer.array_records.values(), answer.metric_records.values()
            clients.append((arrays.to_torch_state_dict(), numbers[self.weighted_by_key]))
        return ArrayRecord(self.fuse(self.base, clients, seed=server_round)), metrics
