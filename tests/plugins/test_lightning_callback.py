"""Lightning's real Trainer: the task vector of a fit, and a fit that starts from what was heard."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

lightning = pytest.importorskip("lightning")

from plugins.lightning_callback import SendTaskVector, StartFused  # noqa: E402
from rmtllmf.taskvec import TaskVector  # noqa: E402

MSE = 0.2
FROZEN = {"body.embedding.weight"}
# what Lightning has to say about few workers and little data
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict(
            {"embedding": nn.Embedding(12, 16), "mlp": nn.Linear(16, 64), "norm": nn.BatchNorm1d(64)}
        )
        self.head = nn.Linear(64, 3)
        self.losses = []

    def forward(self, tokens):
        hidden = self.body["embedding"](tokens).mean(1)
        return self.head(self.body["norm"](self.body["mlp"](hidden)).relu())

    def training_step(self, batch, _):
        tokens, targets = batch
        loss = cross_entropy(self(tokens), targets)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        self.given = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(self.given, lr=1e-2, weight_decay=0.5)


class Look(lightning.Callback):
    """What a fit starts from."""

    def on_train_start(self, trainer, pl_module):
        self.start = copy.deepcopy(pl_module.state_dict())


def fit(module, loader, folder, *callbacks, epochs=5, ckpt_path=None):
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def task(number):
    tokens = torch.randint(12, (32, 6), generator=torch.Generator().manual_seed(number))
    return DataLoader(TensorDataset(tokens, tokens[:, number] // 4), batch_size=16)


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    torch.manual_seed(0)
    folder, base, found = tmp_path_factory.mktemp("users"), Module(), []
    for number in range(2):
        module, path = copy.deepcopy(base), folder / f"heard-{number}.safetensors"
        fit(module, task(number), folder, SendTaskVector(base, path, MSE, seed=number))
        found.append((module, TaskVector.load(path)))
    return base, found


def test_the_end_of_fit_is_heard_with_the_noise_of_the_channel(users):
    base, found = users
    before = base.state_dict()
    for module, heard in found:
        after = module.state_dict()
        assert set(before) - set(heard) == {
            f"body.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
        }
        sent = {name: after[name] - before[name] for name in heard}
        energy, noise = (
            sum(float(tensor.square().sum()) for tensor in tensors)
            for tensors in (sent.values(), (heard[name] - sent[name] for name in heard))
        )
        assert noise == pytest.approx(MSE * energy, rel=0.15)
        assert module.losses[-1] < module.losses[0]


def test_a_fit_from_what_was_heard_leaves_the_embeddings_alone(users, tmp_path):
    base, found = users
    before, heard = base.state_dict(), [vector for _, vector in found]
    module, look = copy.deepcopy(base), Look()
    both = DataLoader(ConcatDataset([task(0).dataset, task(1).dataset]), batch_size=16)
    fit(module, both, tmp_path, StartFused(base, heard), look)
    for name, tensor in before.items():
        fused = name in heard[0] and name not in FROZEN
        expected = tensor + 0.3 * (heard[0][name] + heard[1][name]) if fused else tensor
        torch.testing.assert_close(look.start[name], expected)
        assert torch.equal(module.state_dict()[name], look.start[name]) == (name in FROZEN), name
        assert name not in FROZEN or torch.equal(look.start[name], tensor)
    assert {id(parameter) for parameter in module.given} == {
        id(parameter) for name, parameter in module.named_parameters() if name not in FROZEN
    }
    assert sum(module.losses[-4:]) < 0.7 * sum(module.losses[:4])


def test_a_fit_that_is_resumed_does_not_start_anew(users, tmp_path):
    base, found = users
    heard, module, again, look = [vector for _, vector in found], copy.deepcopy(base), copy.deepcopy(base), Look()
    path = tmp_path / "last.ckpt"
    fit(module, task(0), tmp_path, StartFused(base, heard), epochs=1).save_checkpoint(path)
    fit(again, task(0), tmp_path, StartFused(base, heard), look, epochs=2, ckpt_path=path)
    assert all(torch.equal(tensor, look.start[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(again.body["embedding"].weight, base.body["embedding"].weight)
