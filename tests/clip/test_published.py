"""Published checkpoints: folders of the format that transformers writes, and what is made of them."""

import dataclasses

import pytest
import torch
from open_clip import list_models, list_pretrained_tags_by_model
from safetensors.torch import load_file, save_file

from helpers.published_tower import CONFIG, same, tuned, written
from rmtllmf.clip.hugging_face import to_hugging_face
from rmtllmf.clip.published import PUBLISHED, PublishedModel, load_finetuned
from rmtllmf.errors import InputError, StateMismatchError
from rmtllmf.taskvec import TaskVector


@pytest.mark.parametrize("shard", [None, "4KB"])
@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel"])
def test_what_transformers_saves(tmp_path, base, kind, shard):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(**CONFIG)
    if kind == "CLIPModel":
        text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision = config.to_dict()
        config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=6)
    model = getattr(transformers, kind)(config)
    expected = tuned(base)
    theirs = to_hugging_face(expected)
    if kind == "CLIPVisionModel":
        del theirs["visual_projection.weight"]
        expected["proj"] = base.proj.detach()
    in_memory = "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""
    theirs = {name.replace("vision_model.", in_memory): tensor for name, tensor in theirs.items()}
    assert not model.load_state_dict(theirs, strict=False).unexpected_keys
    model.save_pretrained(tmp_path, **({} if shard is None else {"max_shard_size": shard}))
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (shard is not None)
    drop = kind == "CLIPModel"
    if drop:
        with pytest.raises(InputError, match=r"has 'logit_scale', 'text_model.*drop_text_tower"):
            load_finetuned(tmp_path, base)
    for where in (tmp_path, str(tmp_path), tmp_path / "model.safetensors" if shard is None else index):
        assert same(load_finetuned(where, base, drop_text_tower=drop), expected)


def test_the_result_fits_the_base_and_computes_what_transformers_computes(tmp_path, base):
    transformers = pytest.importorskip("transformers")
    written(tmp_path, tuned(base), projection=False)
    model = transformers.CLIPVisionModel.from_pretrained(tmp_path).eval()
    images = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    state = load_finetuned(tmp_path, base)
    vector = TaskVector.between(base, state)
    assert vector["proj"].norm() == 0
    assert vector.norm() > 0
    assert list(state) == list(base.state_dict())
    projection = base.proj.detach().clone()
    base.load_state_dict(state)
    with torch.no_grad():
        expected = model(images).pooler_output @ projection
        torch.testing.assert_close(base(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_names_with_and_without_the_prefix_and_bases_of_all_kinds(tmp_path, base, prefix):
    expected = tuned(base)
    written(tmp_path / "tuned", expected, prefix=prefix)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    kinds = [base, base.state_dict(), dict(base.named_parameters()), tmp_path / "base.safetensors"]
    for kind in kinds:
        assert same(load_finetuned(tmp_path / "tuned", kind), expected)


def test_the_projection_of_the_base_is_copied_not_shared(tmp_path, base):
    state = load_finetuned(written(tmp_path, tuned(base), projection=False), base)
    before = base.proj.detach().clone()
    state["proj"].zero_()
    assert torch.equal(base.proj, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype_is_never_cast(tmp_path, base, dtype):
    state = {name: tensor.to(dtype) for name, tensor in tuned(base).items()}
    written(tmp_path, state)
    with pytest.raises(StateMismatchError, match=rf"is {dtype}; the base has torch.float32.*\.to\({dtype}\)"):
        load_finetuned(tmp_path, base)
    assert same(load_finetuned(tmp_path, base.to(dtype)), state)


@pytest.mark.gpu
def test_the_result_is_where_the_base_is(tmp_path, base):
    expected = tuned(base)
    written(tmp_path, expected)
    state = load_finetuned(tmp_path, base.cuda())
    assert all(tensor.device.type == "cuda" for tensor in state.values())
    assert same({name: tensor.cpu() for name, tensor in state.items()}, expected)


@pytest.mark.parametrize("change", [{"image_size": 15}, {"image_size": [12, 12], "patch_size": [4, 4]}, {"torch": 3}])
def test_configs_that_say_the_same_in_other_words(tmp_path, base, change):
    expected = tuned(base)
    assert same(load_finetuned(written(tmp_path, expected, {**CONFIG, **change}), base), expected)
    sparse = {"model_type": "clip", "vision_config": {"num_attention_heads": 2, "patch_size": 4}}
    assert same(load_finetuned(written(tmp_path, expected, sparse), base), expected)
    assert same(load_finetuned(written(tmp_path / "none", expected, None), base), expected)


def test_a_checkpoint_with_position_ids(tmp_path, base):
    written(tmp_path, tuned(base))
    theirs = load_file(tmp_path / "model.safetensors")
    save_file(
        {**theirs, "vision_model.embeddings.position_ids": torch.arange(10)[None]}, tmp_path / "model.safetensors"
    )
    assert same(load_finetuned(tmp_path, base), tuned(base))


def test_what_was_frozen_must_be_the_bases(tmp_path, base):
    state = tuned(base)
    for name in ("proj", "ln_post.weight"):
        state[name] = base.state_dict()[name]
    written(tmp_path, state)
    for frozen in ("proj", ["proj", "ln_post.weight"], "*_post.weight", ()):
        assert same(load_finetuned(tmp_path, base, frozen=frozen), state)
    with pytest.raises(
        StateMismatchError, match=r"'ln_post.bias'\] should be frozen and is not the base's: another base"
    ):
        load_finetuned(tmp_path, base, frozen=["proj", "ln_post.*"])
    with pytest.raises(InputError, match="frozen: 'projection' matches none"):
        load_finetuned(tmp_path, base, frozen="projection")
    without = written(tmp_path / "without", tuned(base), projection=False)
    assert load_finetuned(without, base, frozen="proj")


def test_the_published_models_are_those_of_the_eight_tasks():
    assert list(PUBLISHED) == ["cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "sun397", "svhn"]
    assert [model.name.removeprefix("tanganke/clip-vit-base-patch16_") for model in PUBLISHED.values()] == [
        "stanford-cars",
        *list(PUBLISHED)[1:],
    ]
    with pytest.raises(TypeError):
        PUBLISHED["cars"] = PublishedModel("", 0.0, 0.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        PUBLISHED["cars"].zero_shot = 1.0
    percent = {name: (100 * model.zero_shot, 100 * model.finetuned) for name, model in PUBLISHED.items()}
    assert percent == {
        "sun397": pytest.approx((65.5, 78.9)),
        "cars": pytest.approx((64.7, 85.9)),
        "resisc45": pytest.approx((66.4, 96.6)),
        "eurosat": pytest.approx((54.1, 99.0)),
        "svhn": pytest.approx((52.0, 97.6)),
        "gtsrb": pytest.approx((43.5, 99.0)),
        "mnist": pytest.approx((51.7, 99.7)),
        "dtd": pytest.approx((45.0, 82.3)),
    }
    # the base model keeps 60.7 % of the accuracy of the individual models
    kept = [model.zero_shot / model.finetuned for model in PUBLISHED.values()]
    assert sum(kept) / 8 == pytest.approx(0.607, abs=5e-4)


def test_open_clip_has_the_base_of_the_published_models():
    assert "ViT-B-16-quickgelu" in list_models()
    assert "openai" in list_pretrained_tags_by_model("ViT-B-16-quickgelu")
