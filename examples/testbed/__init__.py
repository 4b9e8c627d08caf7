"""A testbed for model fusion: eight small image classification tasks and one pre-trained vision transformer."""

from __future__ import annotations

from .model import base_encoder, finetune, prototype_head
from .tasks import TASKS, Task, load_task

__all__ = ["TASKS", "Task", "base_encoder", "finetune", "load_task", "prototype_head"]
