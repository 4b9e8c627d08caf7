"""A tiny open_clip model with both towers: fine-tuned against frozen zero-shot heads, and fused."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

open_clip = pytest.importorskip("open_clip")

from plugins.open_clip_finetuning import finetune, fuse_into  # noqa: E402
from rmtllmf.clip import image_classifier  # noqa: E402

TASKS = {"fruit": ["a lemon", "a lime"], "letters": ["an A", "a B", "a C"]}
FROZEN = {"class_embedding", "positional_embedding", "conv1.weight"}


def pictures(number, kinds, count=30):
    source = torch.Generator().manual_seed(number)
    labels = torch.arange(count) % kinds
    means = torch.randn(kinds, 3, 16, 16, generator=source)
    return [(means[labels] + 0.5 * torch.randn(count, 3, 16, 16, generator=source), labels)]


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    image = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=image, text_cfg={"width": 32, "heads": 2, "layers": 1})
    before = copy.deepcopy(model.state_dict())
    loaders = {name: pictures(number, len(TASKS[name])) for number, name in enumerate(TASKS)}
    vectors = [finetune(model, TASKS[name], loaders[name], epochs=20, lr=1e-3) for name in TASKS]
    return model, before, loaders, vectors


def test_only_the_image_tower_learns_and_the_model_stays_as_it_is(world):
    model, before, loaders, vectors = world
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    for (name, class_names), vector in zip(TASKS.items(), vectors, strict=True):
        assert set(vector) == set(model.visual.state_dict())
        user = copy.deepcopy(model)
        user.visual.load_state_dict({key: before[f"visual.{key}"] + tensor for key, tensor in vector.items()})
        # the oracle: open_clip's own zero-shot head, of the model that nobody trained
        head = open_clip.build_zero_shot_classifier(model, tokenizer, class_names, ("a photo of a {}.",), None)
        ((images, labels),) = loaders[name]
        with torch.no_grad():
            right = (user.encode_image(images, normalize=True) @ head).argmax(1) == labels
            untrained = (model.encode_image(images, normalize=True) @ head).argmax(1) == labels
        assert right.float().mean() > 0.9
        assert untrained.float().mean() < 0.8


def test_the_fused_tower_knows_both_tasks_under_the_same_heads(world):
    model, before, loaders, vectors = world
    fused = copy.deepcopy(model)
    fuse_into(fused, vectors)
    for key, tensor in fused.visual.state_dict().items():
        moved = 0 if key in FROZEN else 0.3 * (vectors[0][key] + vectors[1][key])
        torch.testing.assert_close(tensor, before[f"visual.{key}"] + moved)
        assert torch.equal(tensor, before[f"visual.{key}"]) == (key in FROZEN), key
    for key, tensor in fused.state_dict().items():
        assert key.startswith("visual.") or torch.equal(tensor, before[key])
    for name, class_names in TASKS.items():
        old, new = image_classifier(model, class_names), image_classifier(fused, class_names)
        assert torch.equal(old.head.weight, new.head.weight), "the heads come from the text tower"
        ((images, labels),) = loaders[name]
        with torch.no_grad():
            losses = [float(cross_entropy(classifier(images), labels)) for classifier in (old, new)]
        assert losses[1] < 0.9 * losses[0]
