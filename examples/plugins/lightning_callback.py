"""Lightning: callbacks that send what ``fit`` learnt, and that start ``fit`` from what the base station heard.

A user adds `SendTaskVector`; at the end of ``fit`` it writes the task vector as the base station receives it. The base
station fits the same module with `StartFused`: it loads the fused model before the optimizer is made, with the
embeddings of the base model, and keeps them as they are::

    base = copy.deepcopy(module)
    Trainer(callbacks=[SendTaskVector(base, "heard-0.safetensors", mse=0.2)]).fit(module, loader)

    heard = [TaskVector.load(path) for path in paths]
    Trainer(callbacks=[StartFused(base, heard)]).fit(module, few_samples)
"""

from collections.abc import Sequence

from lightning import Callback, LightningModule, Trainer

from rmtllmf.channel import transmit
from rmtllmf.resilience import embedding_keys, restore
from rmtllmf.taskvec import TaskVector, task_arithmetic


class SendTaskVector(Callback):
    def __init__(self, base: LightningModule, path: str, mse: float, seed: int = 0) -> None:
        self.base, self.path, self.mse, self.seed = base, path, mse, seed

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            sent = TaskVector.between(self.base.to(pl_module.device), pl_module).to("cpu")
            (heard,) = transmit([sent], self.mse, seed=self.seed)
            heard.save(self.path)


class StartFused(Callback):
    def __init__(self, base: LightningModule, heard: Sequence[TaskVector]) -> None:
        self.base, self.heard = base, heard

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            frozen = embedding_keys(pl_module)
            fused = task_arithmetic(self.heard).apply_to(self.base.state_dict())
            pl_module.load_state_dict(restore(fused, self.base, frozen))
            for name, parameter in pl_module.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and name not in frozen)
