"""timm: fine-tune an encoder for several tasks, fuse the task vectors, protect the fusion.

Every task has a head of its own on one shared encoder (``num_classes=0`` takes timm's own head off). The optimizer is
timm's, handed to ``realign`` as a function of the parameters; any of its other optimizers works the same way::

    encoder, transform = encoder_with_transform("vit_small_patch16_224", pretrained=True)
    sent = [finetuned_vector(encoder, head, loader, steps=1000) for head, loader in tasks.values()]
    heard = transmit(sent, reception, seed=0)
    report = protect_encoder(encoder, heard, reception, few_samples)  # in place; print(report) says what was done
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import timm
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from rmtllmf.channel import Reception
from rmtllmf.resilience import Protection, protect, realign
from rmtllmf.taskvec import TaskVector


def encoder_with_transform(name: str, **options: Any) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    encoder = timm.create_model(name, num_classes=0, **options)
    return encoder, timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))


def finetuned_vector(encoder: nn.Module, head: nn.Module, batches: Iterable[Any], steps: int, lr: float) -> TaskVector:
    user = copy.deepcopy(encoder)
    realign(user, {"task": (head, batches)}, steps=steps, optimizer=lambda p: create_optimizer_v2(p, "adamw", lr=lr))
    return TaskVector.between(encoder, user)


def protect_encoder(
    encoder: nn.Module, heard: Sequence[TaskVector], reception: Reception, few: Mapping[str, Any], **options: Any
) -> Protection:
    base = copy.deepcopy(encoder.state_dict())
    return protect(encoder, base, heard, reception, few, frozen=None, seed=0, **options)
