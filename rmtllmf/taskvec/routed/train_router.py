"""The router of Twin-Merging, trained to tell from which task an input is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..._display import counted, course
from ..._random import Seed, seed_number
from ..._state import finite_number, whole_number
from ..._tasks import Batches, Tasks, describe, device_of, forward, inputs_of, mode, named_tasks
from ...errors import InputError, NonFiniteError
from .twin_merging import TwinMerged

__all__ = ["Router", "RouterTraining", "train_router"]


class Router(nn.Sequential):
    """Embeddings (B, D) -> logits (B, N): three linear layers, as in the authors' code.

    Args:
        width: D.
        count: N, tasks.
        hidden: width of the two layers between.
    """

    def __init__(self, width: int, count: int, hidden: int) -> None:
        super().__init__(
            nn.Linear(width, hidden),
            nn.BatchNorm1d(hidden),
            nn.LeakyReLU(),
            nn.Dropout(0.5),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.LeakyReLU(),
            nn.Dropout(0.5),
            nn.Linear(hidden, count),
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        """See the class; in the router's own precision."""
        x = embeddings.to(next(self.parameters()).dtype)
        for layer in self:
            x = layer(x)
        return x


@dataclass(frozen=True)
class RouterTraining:
    """What `train_router` did.

    Attributes:
        tasks: their names, in the order of the router's outputs.
        inputs: number of inputs of each.
        losses: mean cross-entropy in each epoch, while training.
        accuracy: share of the inputs, in percent, whose task the trained router finds: on what it was trained with.

    Example:
        >>> RouterTraining(tasks=("cars", "digits"), inputs=(10, 10), losses=(0.7, 0.1), accuracy=95.0).losses[-1]
        0.1
    """

    tasks: tuple[str, ...]
    inputs: tuple[int, ...]
    losses: tuple[float, ...]
    accuracy: float

    def __repr__(self) -> str:
        return (
            f"RouterTraining({', '.join(self.tasks)}; {counted(sum(self.inputs), 'input')}, "
            f"{course(self.losses, 'epoch')}, {self.accuracy:.1f} % found)"
        )


def train_router(
    twin: TwinMerged,
    tasks: Tasks,
    *,
    epochs: int = 50,
    batch_size: int = 1024,
    lr: float = 5e-4,
    hidden: int | None = None,
    seed: Seed,
) -> RouterTraining:
    r"""Give `twin` a router that tells the tasks apart, trained on a few inputs of each.

    .. math:: \min_R \; -\frac{1}{S} \sum_{s=1}^{S} \log \mathrm{softmax}\bigl(R(E(x_s; \theta_s))\bigr)_{t(s)}

    where :math:`t(s)` is the task that input s is from. Classes are not needed, and the model is run once for each
    input: the router is trained on embeddings that are kept, in float32.

    Args:
        twin: from `twin_merging`; its router is replaced if it has one.
        tasks: name -> batches or (head, batches) for each of the N tasks, in the order of the vectors that `twin` was
            made of. Heads and targets are not used.
        epochs: passes over all embeddings.
        batch_size: embeddings in a step, at least 2; a single one that is left over waits for another epoch.
        lr: of Adam, falling linearly to 0.
        hidden: width of the router's two layers between; None: twice that of the embeddings, 64 at
            least.
        seed: of the initial weights, the order and the dropout.

    Returns:
        A `RouterTraining`. The same seed on the same machine gives the same router.

    Raises:
        InputError: another number of tasks than vectors, no inputs, or settings out of range. NonFiniteError: an
            embedding is not finite.

    Source: Lu et al., "Twin-Merging: dynamic integration of modular expertise in model merging", 2024; the layers, 50
    epochs, the batch size and 5e-4 are those of the authors' code for language models that classify.

    Example:
        >>> import torch
        >>> from rmtllmf.taskvec import twin_merging
        >>> vectors = [{"weight": torch.eye(2)}, {"weight": -torch.eye(2)}]
        >>> base = nn.Linear(2, 2, bias=False)
        >>> _ = base.weight.data.copy_(torch.eye(2))
        >>> twin = twin_merging(base, vectors, rank=2)
        >>> cloud = torch.rand(32, 2, generator=torch.Generator().manual_seed(0))
        >>> train_router(twin, {"left": [cloud - 5], "right": [cloud + 4]}, seed=0).accuracy
        100.0
        >>> twin.route(torch.tensor([[-4.0, -4.0], [4.0, 4.0]])).argmax(-1)
        tensor([0, 1])
    """
    if not isinstance(twin, TwinMerged):
        raise TypeError(f"twin: expected what twin_merging returns, got {type(twin).__name__}")
    epochs = whole_number(epochs, "epochs", at_least=1)
    batch_size = whole_number(batch_size, "batch_size", at_least=2)
    lr = finite_number(lr, "lr", positive=True)
    named = named_tasks(tasks, "tasks")
    if len(named) != twin.count:
        raise InputError(f"tasks: expected {twin.count}, as many as there were vectors, got {len(named)}")
    found = [_embeddings(twin, task.batches, f"tasks[{name!r}]") for name, task in named.items()]
    x = torch.cat(found)
    if len(x) < 2:
        raise InputError(f"tasks: expected at least two inputs, got {len(x)}")
    targets = torch.cat([torch.full((len(part),), index) for index, part in enumerate(found)]).to(x.device)
    width = x.shape[1]
    hidden = max(2 * width, 64) if hidden is None else whole_number(hidden, "hidden", at_least=1)
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.enable_grad():
        torch.manual_seed(seed_number(seed) % 2**63)
        router = Router(width, twin.count, hidden).to(x.device)
        losses = _trained(router, x, targets, epochs, min(batch_size, len(x)), lr)
    router.requires_grad_(False).eval()
    with torch.no_grad():
        accuracy = 100.0 * float((router(x).argmax(-1) == targets).double().mean())
    twin.router = router
    return RouterTraining(tuple(named), tuple(map(len, found)), tuple(losses), accuracy)


def _embeddings(twin: TwinMerged, batches: Batches, argument: str) -> Tensor:
    parts = []
    with mode(False, twin):
        for inputs in inputs_of(batches, argument, device_of(twin)):
            parts.append(forward(twin.embed, inputs).float())
            if not bool(parts[-1].isfinite().all()):
                raise NonFiniteError(f"{argument}: the embeddings of {describe(inputs)} are not finite")
    return torch.cat(parts)


def _trained(router: nn.Module, x: Tensor, targets: Tensor, epochs: int, batch_size: int, lr: float) -> list[float]:
    steps = math.ceil(len(x) / batch_size)
    optimizer = torch.optim.Adam(router.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * steps)
    losses = []
    for _ in range(epochs):
        total, seen = 0.0, 0
        for rows in torch.randperm(len(x)).to(x.device).split(batch_size):
            if len(rows) > 1:  # batch normalisation knows nothing of a single one
                optimizer.zero_grad()
                loss = cross_entropy(router(x[rows]), targets[rows])
                loss.backward()
                optimizer.step()
                total, seen = total + float(loss.detach()) * len(rows), seen + len(rows)
            schedule.step()
        losses.append(total / seen)
    return losses
