"""Fine-tuning an image encoder through its frozen head: on one device or many, and killed runs go on.

The protocol of task arithmetic (Ilharco et al., "Editing models with task arithmetic", 2023, appendix; their code):
AdamW on all weights, the learning rate rising over ``warmup`` steps and falling to 0 along half a cosine, weight decay
0.1, gradients clipped to length 1, cross entropy through a head that is not trained.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from rmtllmf.errors import InputError, NonFiniteError

from ._checkpoints import alone, fingerprint, put, put_moments, read, tensors_of, whole, write


def finetune(
    encoder: nn.Module,
    head: nn.Module,
    train: Dataset[tuple[Tensor, int]],
    *,
    steps: int = 2000,
    batch_size: int = 128,
    lr: float = 1e-5,
    weight_decay: float = 0.1,
    warmup: int = 500,
    max_norm: float | None = 1.0,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 200,
    parallel: Literal["ddp", "fsdp"] | None = None,
    workers: int = 0,
    precision: Literal["bf16"] | None = None,
    accumulate: int = 1,
    progress: bool = True,
) -> nn.Module:
    """A copy of the encoder fine-tuned on `train` through the frozen head, in evaluation mode.

    The (seed, epoch) alone decide the order of the images, and (seed, position in that order) what a random transform
    draws from torch's, Python's or NumPy's global generator, whose states are neither read nor changed: a step sees
    the same pixels whatever the number of processes and workers, and wherever the run was resumed.

    Without `parallel` all is calculated where the encoder is; on a CPU, with the same number of threads, a run that was
    killed and started again ends with the same bits. With `parallel` every process takes an equal share of every batch;
    the result is the same on all, and that of one process up to rounding (except for dropout, which draws other
    numbers, and batch norm, which looks at each share alone).

    Args:
        encoder: images (B, ...) -> features (B, D), or a tuple that starts with them. Its trainable parameters
            (``requires_grad``) are float32, or float64 if `precision` is None. It is not changed.
        head: features -> logits (B, K), such as an `rmtllmf.clip.ZeroShotHead`. It is not changed.
        train: map-style data set of (image, label in 0 ... K - 1).
        steps, batch_size: how many steps of AdamW, on how many images each, over all processes. Every image comes
            once before any comes again; a batch may reach over the border of two such epochs.
        lr, weight_decay, warmup: of AdamW; steps in which the learning rate rises, fewer than `steps`.
        max_norm: length that a step's gradient is clipped to; None: no clipping.
        seed: of the order, of the transforms and of dropout.
        checkpoint: folder in which a run that stopped goes on, with what must not differ; made where there is none.
            Of several processes the first one writes; all must see the folder. A finished run is read, not repeated.
            The images are not compared, only their number.
        every: steps between checkpoints; the one before is replaced, which for a moment takes twice the disk.
        parallel: "ddp" (every process holds all) or "fsdp" (FSDP2: weights, gradients and moments are spread), under
            ``torchrun --nproc-per-node N``, or after ``torch.distributed.init_process_group``. A group started here
            (gloo on a CPU, NCCL on CUDA) stays for the next task. CUDA: the device is that of ``LOCAL_RANK``.
        workers: processes that load images, each time. The result does not depend on them, unless a transform's bits
            depend on the number of threads (workers have one), or it draws from a generator of its own.
        precision: "bf16": the encoder runs under autocast; weights, moments, head and loss keep their precision.
        accumulate: parts that a batch is cut into to save memory; the result is the same up to rounding.
        progress: a bar on the first process.

    Returns:
        The tuned encoder, with the device and the ``requires_grad`` flags of `encoder`.

    Raises:
        InputError: an argument out of range; a `batch_size` that does not divide by processes times `accumulate`, or
            exceeds the data; labels that the head has no class for; a checkpoint of another run (it names what
            differs), or one that another process is writing; processes that were given different things.
        NonFiniteError: the loss or the gradient is not finite; the step is not taken.
        OSError: a checkpoint could not be written; the one before is intact.
        TypeError: a data set without a length, or whose items are no pairs; labels that are no whole numbers.
    """
    length = None if max_norm is None else float(max_norm)
    run = {"steps": steps, "batch_size": batch_size, "lr": float(lr), "weight_decay": float(weight_decay)}
    run |= {"warmup": warmup, "max_norm": length, "seed": int(seed), "precision": precision}
    _check_numbers(run | {"every": every, "accumulate": accumulate, "parallel": parallel})
    _check_models(encoder, train, batch_size, precision)
    here = _processes(parallel, next(encoder.parameters()).device)
    if batch_size % (here.world * accumulate):
        raise InputError(
            f"batch_size: expected a multiple of {here.world * accumulate} ({here.world} processes times "
            f"accumulate={accumulate}), got {batch_size}"
        )
    tuned = copy.deepcopy(encoder).to(here.device).train()
    frozen = copy.deepcopy(head).to(here.device).eval().requires_grad_(False)
    run |= {"samples": len(train), "encoder": fingerprint(tuned), "head": fingerprint(frozen)}  # type: ignore[arg-type]
    folder = None if checkpoint is None else Path(checkpoint)
    with nullcontext() if folder is None or here.rank else alone(folder):
        found = None if folder is None else read(folder, run)
        done = found.steps if found else 0
        _check_same(here, run, done)
        if found:
            put(tuned, found.tensors)
        model = _spread(tuned, parallel, here)
        trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
        if found and done < steps:
            put_moments(tuned, optimizer, found.tensors)
        found = None  # its memory
        places = _Places(len(train), batch_size, seed, range(done, steps), accumulate, here)  # type: ignore[arg-type]
        batches = iter(
            DataLoader(
                _Drawn(train, seed),
                batch_sampler=places,
                num_workers=workers,
                pin_memory=here.device.type == "cuda",
                generator=torch.Generator(),
            )
        )
        hidden = not progress or here.rank > 0
        for step in (bar := tqdm(range(done, steps), "fine-tuning", steps, initial=done, disable=hidden)):
            for group in optimizer.param_groups:
                group["lr"] = lr * _factor(step, steps, warmup)
            loss = torch.zeros((), device=here.device)
            for part in range(accumulate):
                images, labels = _pair(next(batches))
                summing = parallel == "ddp" and part < accumulate - 1
                draws = drawing(here.device, seed, "step", step, part, here.rank)
                with draws, model.no_sync() if summing else nullcontext():
                    with torch.autocast(here.device.type, torch.bfloat16, enabled=precision == "bf16"):
                        features = model(images.to(here.device, non_blocking=True))
                    features = features[0] if isinstance(features, tuple) else features
                    logits = frozen(features.float() if precision else features)
                    _check_labels(labels, logits.shape[-1])
                    share = F.cross_entropy(logits, labels.to(here.device, non_blocking=True)) / accumulate
                    share.backward()
                loss += share.detach()
            norm = whole(nn.utils.clip_grad_norm_(trained, math.inf if max_norm is None else max_norm))
            _check_finite(loss, norm, step, here)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if folder is not None and ((step + 1) % every == 0 or step + 1 == steps):
                tensors = tensors_of(tuned, None if step + 1 == steps else optimizer, keep=here.rank == 0)
                if here.rank == 0:
                    write(folder, run, step + 1, tensors)
        result = copy.deepcopy(encoder).eval()
        put(result, tensors_of(tuned, None, keep=True))
    return result


class _Processes(NamedTuple):
    rank: int
    world: int
    device: torch.device


def _processes(parallel: str | None, device: torch.device) -> _Processes:
    """Who takes part, and the device of this process; starts the group that torchrun describes."""
    if parallel is None:
        return _Processes(0, 1, device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise InputError(
                f"parallel: {parallel!r} needs several processes: start the program with torchrun --nproc-per-node N, "
                "or call torch.distributed.init_process_group first"
            )
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return _Processes(dist.get_rank(), dist.get_world_size(), device)


def _spread(module: nn.Module, parallel: str | None, here: _Processes) -> Any:
    """The module as it is called; its parameters stay reachable by name in `module` itself."""
    if parallel == "ddp":
        return DistributedDataParallel(module, device_ids=[here.device] if here.device.type == "cuda" else None)
    if parallel == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(here.device.type, (here.world,))
        for block in getattr(getattr(module, "transformer", None), "resblocks", ()):
            fully_shard(block, mesh=mesh)
        return fully_shard(module, mesh=mesh)
    return module


@dataclass(frozen=True)
class _Places:
    """For every part of every step the (position, index) of this process's images; starts at any step at once."""

    samples: int
    batch_size: int
    seed: int
    steps: range
    accumulate: int
    here: _Processes

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // (self.accumulate * self.here.world)
        epoch, order = -1, []
        for step in self.steps:
            for part in range(self.accumulate):
                start = step * self.batch_size + (part * self.here.world + self.here.rank) * share
                places = []
                for position in range(start, start + share):
                    if position // self.samples != epoch:
                        epoch = position // self.samples
                        source = torch.Generator().manual_seed(_number(self.seed, "order", epoch))
                        order = torch.randperm(self.samples, generator=source).tolist()
                    places.append((position, order[position % self.samples]))
                yield places


class _Drawn(Dataset[Any]):
    """The data set's items, each with random numbers of its own: those of its position in the order."""

    def __init__(self, data: Dataset[Any], seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, place: tuple[int, int]) -> Any:
        position, index = place
        with drawing(torch.device("cpu"), self.seed, "image", position):
            return self.data[index]


@contextmanager
def drawing(device: torch.device, *key: int | str) -> Iterator[None]:
    """The global generators start where `key` says, and are put back afterwards."""
    number = _number(*key)
    sources = [torch.default_generator]
    if device.type == "cuda":
        sources.append(torch.cuda.default_generators[device.index or 0])
    states = [source.get_state() for source in sources]
    others = random.getstate(), np.random.get_state()  # noqa: NPY002 (what transforms draw from)
    try:
        for source in sources:
            source.manual_seed(number)
        random.seed(number)
        np.random.seed(number % 2**32)  # noqa: NPY002
        yield
    finally:
        for source, state in zip(sources, states, strict=True):
            source.set_state(state)
        random.setstate(others[0])
        np.random.set_state(others[1])  # noqa: NPY002


def _number(*key: int | str) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def _factor(step: int, steps: int, warmup: int) -> float:
    """Of the learning rate: rising linearly to 1, then half a cosine that ends at 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _check_numbers(run: dict[str, Any]) -> None:
    for name in ("steps", "batch_size", "every", "accumulate"):
        if run[name] < 1:
            raise InputError(f"{name}: expected at least 1, got {run[name]}")
    steps, warmup = run["steps"], run["warmup"]
    if not 0 <= warmup < steps:
        raise InputError(f"warmup: expected 0 to {steps - 1}, fewer than steps={steps}, got {warmup}")
    for name in ("lr", "weight_decay", "max_norm"):
        number = run[name]
        if number is not None and not (0 <= number < math.inf and (number or name == "weight_decay")):
            raise InputError(f"{name}: expected a positive finite number, got {number}")
    for name, known in (("parallel", ("ddp", "fsdp")), ("precision", ("bf16",))):
        if run[name] is not None and run[name] not in known:
            raise InputError(f"{name}: expected None or {' or '.join(map(repr, known))}, got {run[name]!r}")


def _check_models(encoder: nn.Module, train: object, batch_size: int, precision: str | None) -> None:
    if not isinstance(train, Sized) or not hasattr(train, "__getitem__"):
        raise TypeError(f"train: expected a data set with a length and items, got {type(train).__name__}")
    if len(train) < batch_size:
        raise InputError(f"train: expected at least batch_size={batch_size} images, got {len(train)}")
    trained = {name: tensor for name, tensor in encoder.named_parameters() if tensor.requires_grad}
    if not trained:
        raise InputError("encoder: expected parameters to train, all have requires_grad=False")
    for name, tensor in trained.items():
        if tensor.dtype != torch.float32 and (precision or tensor.dtype != torch.float64):
            raise InputError(f"encoder: expected float32 weights, {name!r} is {tensor.dtype}; use encoder.float()")


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise TypeError(f"train: expected items (image, label), got batches of {type(batch).__name__}")
    return batch[0], batch[1]


def _check_labels(labels: Tensor, classes: int) -> None:
    if labels.is_floating_point() or labels.ndim != 1:
        raise TypeError(f"train: expected one whole number as label, got {labels.dtype}, shape {labels.shape[1:]}")
    low, high = map(int, labels.aminmax())
    if low < 0 or high >= classes:
        raise InputError(f"train: the head has classes 0 to {classes - 1}, got label {low if low < 0 else high}")


def _check_finite(loss: Tensor, norm: Tensor, step: int, here: _Processes) -> None:
    """The mean loss of all processes, and the length of the gradient; each raises on all of them or on none."""
    if here.world > 1:
        dist.all_reduce(loss)
        loss /= here.world
    for name, value in (("loss", loss.item()), ("length of the gradient", norm.item())):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the {name} is {value} at step {step}, which was not taken; try a smaller lr, and look for such images"
            )


def _check_same(here: _Processes, run: dict[str, Any], done: int) -> None:
    """All processes begin with the same weights and numbers, after the same step."""
    if here.world == 1:
        return
    digest = hashlib.sha256(repr((sorted(run.items()), done)).encode()).digest()
    mine = torch.tensor(list(digest), device=here.device)
    found = [torch.empty_like(mine) for _ in range(here.world)]
    dist.all_gather(found, mine)
    if any(not torch.equal(one, mine) for one in found):
        raise InputError(
            "parallel: the processes were given different encoders, heads, data or numbers, or do not see the same "
            "checkpoint; expected the same of each"
        )
