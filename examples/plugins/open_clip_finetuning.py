"""open_clip: fine-tune the image tower against a frozen zero-shot head, send what changed, fuse it.

The head of a task is made from the names of its classes by the text tower and is never trained; so all tasks share one
embedding space, and only the image tower is different afterwards. Models of this package's ``clip.load`` and of
``open_clip.create_model`` are the same::

    model = open_clip.create_model("ViT-B-32-quickgelu", pretrained="openai")
    sent = [finetune(model, names, loader) for names, loader in tasks]
    fuse_into(model, transmit(sent, reception, seed=0))
    accuracy(image_classifier(model, names), test_loader)
"""

import copy
from collections.abc import Iterable, Sequence

import torch
from open_clip import CLIP
from torch import Tensor
from torch.nn.functional import cross_entropy

from rmtllmf.clip import image_classifier
from rmtllmf.resilience import embedding_keys
from rmtllmf.taskvec import TaskVector, task_arithmetic


def finetune(
    model: CLIP,
    class_names: Sequence[str],
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int = 1,
    lr: float = 1e-5,
) -> TaskVector:
    classifier = image_classifier(copy.deepcopy(model), class_names).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=0.1)
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            cross_entropy(classifier(images), labels).backward()
            optimizer.step()
    return TaskVector.between(model.visual, classifier.encoder)


def fuse_into(model: CLIP, heard: Sequence[TaskVector]) -> None:
    task_arithmetic(heard, skip=embedding_keys(model.visual)).apply_to(model.visual)
