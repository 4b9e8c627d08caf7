"""Small models and tasks for the rules that learn from data."""

import torch
from torch import nn

from rmtllmf.taskvec import TaskVector


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Encoder(nn.Module):
    """Everything that is easily got wrong: tied weights, buffers that forward() writes to, statistics, dropout."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.enter = nn.Linear(5, 6, dtype=dtype)
        self.norm = nn.BatchNorm1d(6, dtype=dtype)
        self.middle = nn.Linear(6, 6, bias=False, dtype=dtype)
        self.again = nn.Linear(6, 6, dtype=dtype)
        self.again.weight = self.middle.weight
        self.leave = nn.Linear(6, 4, dtype=dtype)
        self.gain = nn.Parameter(torch.tensor(1.5, dtype=dtype))
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("shift", torch.full((6,), 0.25, dtype=dtype))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("seen", torch.zeros(6, dtype=dtype), persistent=False)
        for index, parameter in enumerate(self.parameters()):
            parameter.data.copy_(normal(*parameter.shape, seed=100 + index) * 0.7)

    def forward(self, inputs):
        self.calls += 1
        hidden = self.norm(self.enter(inputs)).tanh() + self.shift
        self.seen += hidden.detach().mean(0)
        return self.gain * self.leave(self.dropout(self.again(self.middle(hidden).tanh())))


def head(seed, classes=3, dtype=torch.float64):
    layer = nn.Linear(4, classes, dtype=dtype)
    layer.weight.data.copy_(normal(classes, 4, seed=seed))
    layer.bias.data.copy_(normal(classes, seed=seed + 1))
    return layer


def vectors_of(model, count=3, size=0.3, dtype=None):
    """Random ones, of which tied tensors are tied."""
    state = model.state_dict()
    made = []
    for q in range(count):
        step = {}
        for index, (name, tensor) in enumerate(state.items()):
            if tensor.is_floating_point() and "running" not in name:
                step[name] = size * normal(*tensor.shape, seed=1000 * (q + 1) + index, dtype=dtype or tensor.dtype)
        if "again.weight" in step:
            step["again.weight"] = step["middle.weight"]
        made.append(TaskVector(step))
    return made


def tasks_of(count=2, batches=2, size=7, dtype=torch.float64):
    def batch(seed):
        return normal(size, 5, seed=seed).to(dtype), torch.arange(size) % 3

    return {f"t{i}": (head(10 * i, dtype=dtype), [batch(50 * i + b) for b in range(batches)]) for i in range(count)}


def fingerprint(module):
    """All that must not change: names, entries, modes, flags, gradients and hooks."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return (
        {name: (tensor.clone(), tensor.data_ptr(), tensor.requires_grad) for name, tensor in state.items()},
        {name: part.training for name, part in module.named_modules()},
        [p.grad for p in module.parameters()],
        [len(part._forward_hooks) for part in module.modules()],
    )


def same_fingerprint(left, right):
    assert left[1:] == right[1:]
    assert left[0].keys() == right[0].keys()
    for name, (tensor, *rest) in left[0].items():
        assert torch.equal(tensor, right[0][name][0]), name
        assert rest == list(right[0][name][1:]), name
