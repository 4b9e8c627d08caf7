"""timm's own test models: fine-tuned, fused and protected."""

import copy

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")

from PIL import Image  # noqa: E402

from plugins.timm_models import encoder_with_transform, finetuned_vector, protect_encoder  # noqa: E402
from rmtllmf.channel import transmit  # noqa: E402
from rmtllmf.metrics import accuracy  # noqa: E402
from rmtllmf.resilience import embedding_keys  # noqa: E402
from rmtllmf.taskvec import task_arithmetic  # noqa: E402

MSE = [100.0, 200.0]  # of a hopeless uplink, or of symbols that are scaled by their peak


def task(number, width, count=24):
    """Noisy pictures of four kinds, and a head that stays as it is."""
    torch.manual_seed(number + 1)
    kinds, labels = torch.randn(4, 3, 32, 32), torch.arange(count) % 4
    head = nn.Linear(width, 4).requires_grad_(False)
    return head, [(kinds[labels] + 0.5 * torch.randn(count, 3, 32, 32), labels)]


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    encoder, _ = encoder_with_transform("test_vit", img_size=32)
    before = copy.deepcopy(encoder.state_dict())
    tasks = {name: task(number, encoder.num_features) for number, name in enumerate(("lemons", "limes"))}
    sent = [finetuned_vector(encoder, head, batches, steps=15, lr=3e-3) for head, batches in tasks.values()]
    return encoder, before, tasks, sent


def test_the_transform_fits_the_encoder():
    encoder, transform = encoder_with_transform("test_vit", img_size=32)
    inputs = transform(Image.new("RGB", (50, 40)))
    assert encoder(inputs[None]).shape == (1, encoder.num_features)


def test_users_learn_their_tasks_and_the_encoder_stays_as_it_is(world):
    encoder, before, tasks, sent = world
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    for vector, (head, batches) in zip(sent, tasks.values(), strict=True):
        user = copy.deepcopy(encoder)
        user.load_state_dict({name: tensor + vector[name] for name, tensor in before.items()})
        assert accuracy(user, batches, head=head) > 0.9
    fused = task_arithmetic(sent, 0.4).apply_to(before)
    for name, tensor in before.items():
        torch.testing.assert_close(fused[name], tensor + 0.4 * (sent[0][name] + sent[1][name]))


def test_the_protected_encoder_is_better_and_has_its_old_embeddings(world):
    encoder, before, tasks, sent = world
    heard = transmit(sent, MSE, seed=0)

    def score(model):
        return sum(accuracy(model, batches, head=head) for head, batches in tasks.values()) / 2

    unprotected = copy.deepcopy(encoder)
    unprotected.load_state_dict(task_arithmetic(heard).apply_to(before))
    protected = copy.deepcopy(encoder)
    report = protect_encoder(protected, heard, MSE, tasks, steps=10, lr=1e-3)
    assert report.users == (0, 1)
    assert score(protected) > score(unprotected) + 0.1
    frozen = embedding_keys(encoder)
    assert set(frozen) == {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    for name, tensor in protected.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name in frozen), name


def test_running_statistics_are_the_encoders_own():
    torch.manual_seed(0)
    encoder, _ = encoder_with_transform("test_resnet")
    head, batches = task(0, encoder.num_features, count=8)
    vector = finetuned_vector(encoder, head, batches, steps=2, lr=1e-3)
    statistics = {name for name in encoder.state_dict() if "running" in name or "num_batches" in name}
    assert statistics
    assert set(vector) == set(encoder.state_dict()) - statistics
