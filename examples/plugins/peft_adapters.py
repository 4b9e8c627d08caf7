"""PEFT: adapters as task vectors, fused, and saved as one adapter again.

An adapter changes a matrix W by the product B A of two thin ones. The product is the task vector; thin matrices are
never added up, for a sum of products is no product of sums. Adapters that were trained on different layers are
``aligned`` first: what an adapter does not touch, it does not change. What is fused goes into the base model, or
becomes an adapter that ``PeftModel.from_pretrained`` loads; with the sum of the adapters' ranks nothing is lost::

    update = fuse_adapters(model, ["adapters/law", "adapters/medicine"], weighted_average)
    update.apply_to(model)  # in place, or:
    save_as_adapter(update, "adapters/both", model, rank=16)

With a `reception` (or a mean squared error) the adapters pass the jammed uplink on the way.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from rmtllmf.channel import Reception, transmit
from rmtllmf.taskvec import TaskVector, adapter_vector, aligned, low_rank, task_arithmetic

Folder = str | os.PathLike[str]


def fuse_adapters(
    model: nn.Module,
    adapters: Iterable[Folder | nn.Module],
    rule: Callable[..., TaskVector] = task_arithmetic,
    *,
    reception: Reception | float | None = None,
    seed: int = 0,
    **options: Any,
) -> TaskVector:
    sent = aligned([adapter_vector(adapter, base=model) for adapter in adapters])
    return rule(sent if reception is None else transmit(sent, reception, seed=seed), **options)


def save_as_adapter(update: TaskVector, folder: Folder, model: nn.Module, rank: int, **says: str | None) -> None:
    low_rank(update, rank).save_adapter(folder, model=model, **says)  # base_model_name=, task_type="CAUSAL_LM"
