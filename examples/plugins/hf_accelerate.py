"""Accelerate: the base station's repair inside a plain training loop, on whatever devices Accelerate finds.

The loop is the one of Accelerate's own documentation. Added are the fused start, with the embeddings of the base model,
and that the optimizer is not given them::

    base = copy.deepcopy(model.state_dict())
    load_fused(model, base, heard)
    losses = realign(Accelerator(gradient_accumulation_steps=2), model, few_samples, epochs=10)

`few_samples` is a DataLoader of what a collator of Hugging Face makes, {"input_ids": ..., "labels": ...}, of which
their models know the loss themselves; or of (inputs, targets). The model is realigned in place.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rmtllmf.resilience import embedding_keys, restore
from rmtllmf.taskvec import TaskVector, task_arithmetic


def load_fused(model: nn.Module, base: Mapping[str, Tensor], heard: Iterable[TaskVector]) -> None:
    model.load_state_dict(restore(task_arithmetic(heard).apply_to(base), base, embedding_keys(model)))


def realign(accelerator: Accelerator, model: nn.Module, loader: Any, *, epochs: int, lr: float = 1e-4) -> list[float]:
    frozen, losses = embedding_keys(model), []
    trained = [parameter for name, parameter in model.named_parameters() if name not in frozen]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    wrapped, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(wrapped):
                labelled = isinstance(batch, Mapping)
                loss = wrapped(**batch).loss if labelled else cross_entropy(wrapped(batch[0]), batch[1])
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses
