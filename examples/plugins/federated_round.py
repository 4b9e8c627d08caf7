"""Federated learning over a jammed uplink, in plain PyTorch: the loop that Flower runs, without Flower.

In every round the server sends its model to the clients, each trains it on data of its own, and all send their task
vectors back at once, over an uplink on which a jammer does its worst. The server averages what it heard, weighted by
the clients' numbers of examples, or fuses it by any other rule::

    def client(state):  # trains from there
        return new_state, number_of_examples

    state = federated(model.state_dict(), clients, rounds=10, rule=geometric_median)

`uplink` is a function of the number of users and a seed that returns what ``transmit`` takes: a ``Reception``, or
mean squared errors. `flower_strategy` and `flower_messages` do the same inside Flower.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from rmtllmf.channel import Reception, UplinkScenario, sic, transmit, worst_case_covariance
from rmtllmf.taskvec import TaskVector, weighted_average

State = Mapping[str, Tensor]


def jammed_uplink(users: int, seed: int) -> Reception:
    up = UplinkScenario(num_users=users).draw(seed=seed)
    C = worst_case_covariance(up.H, up.P, P_N=124 * up.noise, noise=up.noise)
    return sic(up.H, up.P, C + up.noise_covariance, designed_for=up.noise_covariance, order="strongest_first")


def next_state(
    start: State,
    clients: Sequence[tuple[State, int]],
    *,
    seed: int,
    uplink: Callable[[int, int], Reception | float] = jammed_uplink,
    rule: Callable[[list[TaskVector]], TaskVector] | None = None,
) -> dict[str, Tensor]:
    sent = [TaskVector.between(start, state) for state, _ in clients]
    heard = transmit(sent, uplink(len(sent), seed), seed=seed)
    update = rule(heard) if rule else weighted_average(heard, weights=[examples for _, examples in clients])
    return update.apply_to(start)


def federated(state: State, clients: Sequence[Callable[[State], tuple[State, int]]], rounds: int, **how: Any) -> State:
    for number in range(1, rounds + 1):
        state = next_state(state, [client(state) for client in clients], seed=number, **how)
    return state
