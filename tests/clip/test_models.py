"""open_clip models as classifiers, against the logits that one computes by hand with open_clip."""

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.transforms import ToTensor

from rmtllmf.clip import ImageClassifier, OpenClip, ZeroShotHead, evaluate, image_classifier, load, zero_shot_head
from rmtllmf.errors import InputError
from rmtllmf.resilience import embedding_keys, realign

VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
TEXT = {"width": 16, "heads": 2, "layers": 1}
NAMES = ["cat", "dog", "fire engine"]
TEMPLATES = ("a photo of a {}.", "a drawing of the {}.")


def tiny(kind=open_clip.CLIP, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(embed_dim=8, vision_cfg=VISION, text_cfg={**TEXT, **options.pop("text", {})}, **options)


@pytest.fixture(scope="module", params=["CLIP", "CustomTextCLIP", "with a bias"])
def model(request):
    if request.param == "CustomTextCLIP":
        return tiny(open_clip.CustomTextCLIP)
    return tiny(init_logit_bias=-3.0) if request.param == "with a bias" else tiny()


def test_the_logits_are_those_of_open_clip(model):
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    model.eval()
    with torch.no_grad():
        columns = []
        for name in NAMES:
            text = model.encode_text(tokenizer([template.format(name) for template in TEMPLATES]))
            mean = (text / text.norm(dim=-1, keepdim=True)).mean(0)
            columns.append(mean / mean.norm())
        image = model.encode_image(images)
        image = image / image.norm(dim=-1, keepdim=True)
        logits = model.logit_scale.exp() * image @ torch.stack(columns, 1)
        if model.logit_bias is not None:
            logits = logits + model.logit_bias
        found = image_classifier(model, NAMES, TEMPLATES)(images)
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)


def test_batches_of_classes_functions_and_tokenizers_change_nothing(model):
    expected = zero_shot_head(model, NAMES, TEMPLATES)
    others = [
        zero_shot_head(model, NAMES, TEMPLATES, batch_size=1),
        zero_shot_head(model, tuple(NAMES), [lambda name: f"a photo of a {name}.", TEMPLATES[1]]),
        zero_shot_head(model, NAMES, TEMPLATES, tokenizer=open_clip.SimpleTokenizer()),
    ]
    for other in others:
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], tensor)
    columns = zero_shot_head(model, NAMES[::-1], TEMPLATES).weight
    torch.testing.assert_close(columns.flip(1), expected.weight)


def test_the_head_is_frozen_and_the_model_left_as_it_was(model):
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classifier = image_classifier(model, NAMES, TEMPLATES)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert classifier.encoder is model.visual
    assert not list(classifier.head.parameters())
    assert not any(tensor.requires_grad for tensor in classifier.head.buffers())
    assert {name for name, _ in classifier.head.named_buffers()} == {"weight", "logit_scale", "logit_bias"}
    assert classifier.head.weight.shape == (8, 3)
    torch.testing.assert_close(classifier.head.weight.norm(dim=0), torch.ones(3))
    assert {name.partition(".")[0] for name, _ in classifier.named_parameters()} == {"encoder"}


def test_the_text_tower_is_asked_in_evaluation_mode(model, monkeypatch):
    seen, encode = [], model.encode_text

    def watched(*args, **kwargs):
        seen.append((model.training, torch.is_grad_enabled()))
        return encode(*args, **kwargs)

    monkeypatch.setitem(vars(model), "encode_text", watched)
    model.train()
    zero_shot_head(model, NAMES, TEMPLATES)
    assert seen == [(False, False)]


def test_a_tower_that_returns_tokens_too():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CoCa(
            embed_dim=8,
            multimodal_cfg={**TEXT, "vocab_size": 49408},
            text_cfg={**TEXT, "embed_cls": True, "output_tokens": True},
            vision_cfg={**VISION, "output_tokens": True},
        ).eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    classifier = image_classifier(model, NAMES, TEMPLATES)
    with torch.no_grad():
        expected = model.logit_scale.exp() * model.encode_image(images, normalize=True) @ classifier.head.weight
        torch.testing.assert_close(classifier(images), expected, rtol=1e-5, atol=1e-5)


def test_evaluate_on_any_loader():
    classifier = image_classifier(tiny(), NAMES, TEMPLATES)
    data = FakeData(23, (3, 16, 16), num_classes=3, transform=ToTensor())
    loader = DataLoader(data, batch_size=8)
    classifier.eval()
    with torch.no_grad():
        right = [classifier(image[None]).argmax().item() == int(label) for image, label in data]
    assert evaluate(classifier.train(), loader) == pytest.approx(sum(right) / 23)
    assert classifier.training
    assert evaluate(classifier, list(loader)) == pytest.approx(sum(right) / 23)


def test_encoder_and_head_fit_realignment():
    classifier = image_classifier(tiny(), NAMES, TEMPLATES)
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batches = [(images, torch.arange(6) % 3)]
    keys = embedding_keys(classifier.encoder)
    done = realign(classifier.encoder, {"t": (classifier.head, batches)}, steps=20, lr=1e-2, frozen=keys)
    assert keys
    assert done.losses[-1] < done.losses[0]
    assert evaluate(classifier, batches) > 0.5


def test_a_zero_shot_head_moves_and_keeps_its_dtype():
    head = ZeroShotHead(torch.eye(3, dtype=torch.float64), logit_scale=2.0, logit_bias=0.5)
    assert head(torch.tensor([[0.0, 3.0, 4.0]], dtype=torch.float64)).tolist() == [[0.5, 1.7, 2.1]]
    assert head.to(torch.bfloat16)(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    weight = torch.eye(2)
    ZeroShotHead(weight).weight.fill_(7)
    assert weight.trace() == 2


def test_a_model_without_a_text_tower_or_image_tower():
    with pytest.raises(TypeError, match="text tower"):
        zero_shot_head(tiny().visual, NAMES)
    with pytest.raises(TypeError, match="image tower"):
        image_classifier(tiny().visual, NAMES)


def test_another_vocabulary_needs_its_tokenizer():
    model = tiny(text={"vocab_size": 50})
    with pytest.raises(InputError, match=r"tokenizer: .*50 words.*open_clip.get_tokenizer"):
        zero_shot_head(model, NAMES)

    def letters(prompts):
        tokens = torch.zeros(len(prompts), 77, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor([ord(letter) % 49 for letter in prompt])
        return tokens

    assert zero_shot_head(model, NAMES, tokenizer=letters).weight.shape == (8, 3)


@pytest.fixture
def small_model(tmp_path):
    """A model that open_clip knows by name, small enough for a test."""
    import json

    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "tiny-test.json").write_text(json.dumps({"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}))
    open_clip.add_model_config(folder)
    yield "tiny-test"
    from open_clip import factory

    factory._MODEL_CONFIG_PATHS.remove(folder)
    factory._rescan_model_configs()


def test_load_gives_the_model_its_transforms_and_its_tokenizer(small_model, tmp_path):
    state = tiny().state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    torch.save(state, tmp_path / "weights.pt")
    for path in (tmp_path / "weights.safetensors", str(tmp_path / "weights.pt")):
        clip = load(small_model, path)
        assert isinstance(clip, OpenClip)
        assert clip.name == small_model
        assert all(torch.equal(tensor, state[name]) for name, tensor in clip.model.state_dict().items())
    image, _ = FakeData(1, (3, 40, 30))[0]
    assert clip.transform(image).shape == (3, 16, 16)
    assert clip.train_transform(image).shape == (3, 16, 16)
    assert torch.equal(clip.tokenizer(["a cat"]), open_clip.SimpleTokenizer()(["a cat"]))
    assert load(small_model, image_size=24).transform(image).shape == (3, 24, 24)


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_load_never_unpickles(small_model, tmp_path, capsys):
    torch.save({"state_dict": tiny().state_dict(), "extra": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match=r"(?i)weights.?only|unpickl"):
        load(small_model, tmp_path / "evil.pt")
    assert "unpickled" not in capsys.readouterr().out


def test_load_refuses_an_open_clip_that_would_unpickle(small_model, tmp_path, monkeypatch):
    def old(model_name, pretrained=None, device="cpu", precision="fp32", force_image_size=None, cache_dir=None):
        assert pretrained is None
        return torch.nn.Identity(), None, None

    monkeypatch.setattr(open_clip, "create_model_and_transforms", old)
    save_file(tiny().state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ImportError, match="would unpickle"):
        load(small_model, tmp_path / "weights.safetensors")
    assert isinstance(load(small_model).model, torch.nn.Identity)


def test_unknown_names_and_weights(tmp_path):
    with pytest.raises(InputError, match=r"name: open_clip has no model 'ViT-B-17'; did you mean 'ViT-B-16'"):
        load("ViT-B-17")
    with pytest.raises(InputError, match=r"pretrained: 'nope' is no file and no tag of 'ViT-B-16', which has .*openai"):
        load("ViT-B-16", "nope")
    with pytest.raises(InputError, match=r"pretrained: .* brings its own weights"):
        load("hf-hub:org/model", "openai")


def test_a_classifier_is_two_modules():
    classifier = ImageClassifier(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    assert classifier(torch.ones(3, 1, 2, 2)).shape == (3, 2)
    with pytest.raises(TypeError, match="head"):
        ImageClassifier(torch.nn.Flatten(), lambda x: x)


def test_the_head_is_no_part_of_what_is_sent():
    """Frozen means that neither a task vector nor the channel can change it."""
    classifier = ImageClassifier(nn.Linear(4, 3), ZeroShotHead(torch.eye(3)))
    assert set(classifier.state_dict()) == {"encoder.weight", "encoder.bias"}
