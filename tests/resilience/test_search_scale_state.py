"""What a search for the scale leaves as it was, what it copies, and how often it reads a batch."""

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from helpers.draws import gaussian
from helpers.searched_models import linear, quadratic
from rmtllmf.resilience.search_scale import search_scale
from rmtllmf.taskvec import TaskVector

pytestmark = pytest.mark.usefixtures("torch_seeded")


class Stateful(nn.Module):
    """Writes to its buffers in every forward pass, and would see the last pass in the next."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("hidden", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        self.hidden += 1
        return self.linear(x) * (1 + self.calls + self.hidden)


def test_model_base_and_update_keep_their_bits_modes_and_flags():
    model, head = Stateful(), nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3))
    base = {name: tensor.clone() for name, tensor in Stateful().state_dict().items()}
    update = {"linear.weight": gaussian(3, 4), "linear.bias": torch.ones(3)}
    held = [*model.state_dict().values(), model.hidden, *head.state_dict().values(), *base.values(), *update.values()]
    before = [tensor.clone() for tensor in held]
    head[1].eval()
    batches = [(gaussian(6, 4), torch.arange(6) % 3)]
    first = search_scale(model, base, update, {"t": (head, batches)})
    second = search_scale(model, base, update, {"t": (head, batches)}, scales=[*reversed(list(first.losses))])
    assert all(map(torch.equal, before, held))
    assert model.training
    assert head[0].training
    assert not head[1].training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()
    for scale, value in first.losses.items():  # in another order: no scale hears of the others
        assert second.losses[scale] == value


def test_one_copy_of_what_moves_and_none_of_the_rest():
    """By the addresses of what the model is called with."""
    seen = []

    class Watched(nn.Linear):
        def forward(self, x):
            seen.append((self.weight.data_ptr(), self.bias.data_ptr()))
            return super().forward(x)

    model, base = Watched(4, 3), {name: tensor.clone() for name, tensor in nn.Linear(4, 3).state_dict().items()}
    batches = [(gaussian(6, 4), torch.arange(6) % 3)]
    found = search_scale(model, base, {"weight": torch.ones(3, 4)}, batches)
    assert len(seen) == found.evaluations
    assert len(set(seen)) == 1
    assert seen[0][0] not in {base["weight"].data_ptr(), model.weight.data_ptr()}
    assert seen[0][1] == base["bias"].data_ptr()


def test_after_an_exception_too():
    model = Stateful()
    before = [tensor.clone() for tensor in model.state_dict().values()]
    batches = [(gaussian(6, 4), torch.arange(6) % 3)]

    def loss(logits, targets):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        search_scale(model, model, {"linear.bias": torch.ones(3)}, batches, loss=loss)
    assert model.training
    assert all(map(torch.equal, before, model.state_dict().values()))


def test_the_model_may_be_its_own_base():
    base, update, tasks, best = quadratic(3, 0.6)
    model = linear()
    model.load_state_dict(base)
    found = search_scale(model, model, TaskVector(update), tasks, loss=mse_loss)
    assert found.scale == pytest.approx(best, abs=1e-9)
    assert torch.equal(model.weight, base["weight"])


def test_what_the_update_does_not_bend_is_carried():
    """Integers and running statistics in an update, as resilience hands on, change nothing."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    batches = [(gaussian(6, 4), torch.arange(6) % 3)]
    update = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    bent = {name: update[name] for name in ("0.weight", "0.bias", "1.weight", "1.bias")}
    assert search_scale(model, model, update, batches) == search_scale(model, model, bent, batches)


def test_batches_are_read_once_and_kept():
    """A loader that shuffles and augments, and an iterator: every scale sees the same samples."""
    base, update, tasks, best = quadratic(5, 0.4)
    reads = []

    class Noisy(TensorDataset):
        def __getitem__(self, index):
            reads.append(index)
            x, y = super().__getitem__(index)
            return x + 0.1 * torch.randn(4, dtype=torch.float64), y

    x, y = (torch.cat(part) for part in zip(*tasks["t0"][1], strict=True))
    loader = DataLoader(Noisy(x, y), batch_size=3, shuffle=True)
    found = search_scale(linear(), base, update, {"t0": (tasks["t0"][0], loader)}, loss=mse_loss)
    assert len(reads) == len(x)
    values = sorted(found.losses.items())
    curvature = [
        ((c[1] - b[1]) / (c[0] - b[0]) - (b[1] - a[1]) / (b[0] - a[0])) / (c[0] - a[0])
        for a, b, c in zip(values, values[1:], values[2:], strict=False)
        if b[0] - a[0] > 0.05 and c[0] - b[0] > 0.05
    ]
    assert curvature == pytest.approx([curvature[0]] * len(curvature))  # all on one parabola
    streams = {name: (head, iter(batches)) for name, (head, batches) in tasks.items()}
    assert search_scale(linear(), base, update, streams, loss=mse_loss).scale == pytest.approx(best, abs=1e-9)
