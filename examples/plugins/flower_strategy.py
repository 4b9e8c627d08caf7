"""Flower, strategies of ``flwr.server``: FedAvg whose clients are heard over a jammed uplink.

Use it where you would use ``FedAvg``, whose options it takes. Flower's parameters are arrays without names; `names`
says what they are, in the order in which the clients send them::

    strategy = JammedFedAvg(names=list(model.state_dict()), min_fit_clients=8, min_available_clients=8)
    ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=10))

What is fused is each client's change of the model that it was sent. Clients are sorted by their ids, so that the same
round gives the same bits in whatever order they answer. `fuse` is ``next_state`` of `federated_round`, or
``functools.partial(next_state, rule=geometric_median)``, say.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from flwr.common import FitIns, FitRes, Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg

from .federated_round import State, next_state


class JammedFedAvg(FedAvg):
    def __init__(self, names: Sequence[str], fuse: Callable[..., State] = next_state, **options: Any) -> None:
        super().__init__(**options)
        self.names, self.fuse = names, fuse

    def state_of(self, sent: Parameters) -> State:
        return dict(zip(self.names, map(torch.from_numpy, parameters_to_ndarrays(sent)), strict=True))

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        self.base = self.state_of(parameters)
        return super().configure_fit(server_round, parameters, client_manager)

    def aggregate_fit(self, server_round: int, results: list[tuple[ClientProxy, FitRes]], failures: Any) -> Any:
        averaged, metrics = super().aggregate_fit(server_round, results, failures)
        if averaged is None:  # nobody answered, or not all did who had to
            return None, metrics
        answers = [answer for _, answer in sorted(results, key=lambda result: result[0].cid)]
        clients = [(self.state_of(answer.parameters), answer.num_examples) for answer in answers]
        fused = self.fuse(self.base, clients, seed=server_round)
        return ndarrays_to_parameters([tensor.numpy() for tensor in fused.values()]), metrics
