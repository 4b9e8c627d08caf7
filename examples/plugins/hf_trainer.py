"""Hugging Face Trainer: send what a user fine-tuned, and realign what the base station made of it.

A user hands `OverTheAir` to a Trainer. With every checkpoint it writes ``heard.safetensors``, the task vector as the
base station receives it; the checkpoint itself stays free of noise. The base station loads what it heard with
`load_fused`, which leaves the embeddings as in the base model, and realigns the rest in a Trainer of its own, which
`FrozenEmbeddings` keeps away from them (from before the optimizer is made, so that weight decay does not touch them)::

    base = copy.deepcopy(model)
    Trainer(model, args, train_dataset=data, callbacks=[OverTheAir(base, mse=0.2)]).train()

    load_fused(model, base, [TaskVector.load(path) for path in paths])
    Trainer(model, args, train_dataset=few_samples, callbacks=[FrozenEmbeddings()]).train()
"""

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rmtllmf.channel import transmit
from rmtllmf.resilience import embedding_keys, restore
from rmtllmf.taskvec import TaskVector, task_arithmetic


class OverTheAir(TrainerCallback):
    def __init__(self, base: nn.Module, mse: float, seed: int = 0) -> None:
        self.base, self.mse, self.seed = base, mse, seed

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **found: Any) -> None:
        if state.is_world_process_zero:
            sent = TaskVector.between(self.base.to(found["model"].device), found["model"]).to("cpu")
            (heard,) = transmit([sent], self.mse, seed=self.seed)
            heard.save(f"{args.output_dir}/checkpoint-{state.global_step}/heard.safetensors")


class FrozenEmbeddings(TrainerCallback):
    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **found: Any) -> None:
        frozen = embedding_keys(found["model"])
        for name, parameter in found["model"].named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name not in frozen)


def load_fused(model: nn.Module, base: nn.Module, heard: Iterable[TaskVector]) -> None:
    fused = task_arithmetic(heard).apply_to(base.state_dict())
    model.load_state_dict(restore(fused, base, embedding_keys(model)))
