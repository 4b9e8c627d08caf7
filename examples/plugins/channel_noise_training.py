"""Training that expects the channel: every step sees the model as a base station would have heard it.

In a ``with`` block, the first forward pass of every step in training mode replaces what is trained by the base model
plus the task vector so far, sent over the channel; gradients are those at this noisy point, and are applied to the
clean parameters, which come back bit by bit before the optimizer takes its step. In evaluation mode the parameters are
clean. It favours models whose loss changes little when they are received with noise::

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    with channel_noise(model, base, optimizer, mse=0.2):
        train(model, optimizer)  # as always: forward, backward, optimizer.step()

The optimizer must not be one that calls a closure (LBFGS).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count

import torch
from torch import Tensor, nn

from rmtllmf.channel import transmit
from rmtllmf.taskvec import TaskVector


@contextmanager
def channel_noise(
    model: nn.Module, base: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, mse: float, *, seed: int = 0
) -> Iterator[None]:
    seeds, clean = count(seed), dict[str, Tensor]()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def put(values: dict[str, Tensor]) -> None:
        for name in list(values):
            trained[name].copy_(values.pop(name))

    def before_forward(*_: object) -> None:
        if not model.training:
            put(clean)
        elif not clean and (sent := TaskVector.between(base, model).select(trained)).norm() > 0:
            clean.update({name: parameter.detach().clone() for name, parameter in trained.items()})
            (heard,) = transmit([sent], mse, seed=next(seeds))
            put({name: base[name] + tensor for name, tensor in heard.items()})

    with model.register_forward_pre_hook(before_forward), optimizer.register_step_pre_hook(lambda *_: put(clean)):
        try:
            yield
        finally:
            put(clean)
