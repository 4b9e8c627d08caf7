"""Published checkpoints: folders and hub of the format that transformers writes, and everything that can be wrong."""

import dataclasses
import json
import re
import shutil
import sys

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import LocalEntryNotFoundError, RepositoryNotFoundError, filter_repo_objects
from open_clip import CLIP, list_models, list_pretrained_tags_by_model
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import load_file, save_file
from torch import nn

from rmtllmf.clip.hugging_face import to_hugging_face
from rmtllmf.clip.published import PUBLISHED, PublishedModel, load_finetuned
from rmtllmf.errors import InputError, NonFiniteError, RmtllmfWarning, StateMismatchError
from rmtllmf.taskvec import TaskVector

CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "projection_dim": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_channels": 3,
    "image_size": 12,
    "patch_size": 4,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def tower(*, output_dim=6, activation=QuickGELU, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = VisionTransformer(
            12, 4, 16, layers=2, heads=2, mlp_ratio=1.5, output_dim=output_dim, act_layer=activation
        )
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.3)
    return made.eval()


def tuned(base, seed=1):
    """The base's state, a little changed everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 1e-3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in base.state_dict().items()
    }


def written(folder, state, config=CONFIG, *, projection=True, prefix="vision_model."):
    """A folder as transformers writes it."""
    folder.mkdir(exist_ok=True)
    theirs = to_hugging_face(state, prefix=prefix)
    if not projection:
        del theirs["visual_projection.weight"]
    save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def base():
    return tower()


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


HUB = "owner/clip-tuned"


def test_a_name_on_the_hub(tmp_path, base, monkeypatch):
    expected = tuned(base)
    folder = written(tmp_path / "snapshot", expected)
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same(load_finetuned(HUB, base, cache_dir=tmp_path / "cache", revision="v1"), expected)
    assert same(load_finetuned(PUBLISHED["cars"].name, base), expected)
    assert [name for name, _ in asked] == [HUB, "tanganke/clip-vit-base-patch16_stanford-cars"]
    assert [options["revision"] for _, options in asked] == ["v1", None]
    assert [options["cache_dir"] for _, options in asked] == [str(tmp_path / "cache"), None]
    patterns = {key: value for key, value in asked[0][1].items() if key.endswith("_patterns")}
    there = [
        "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "README.md", "preprocessor_config.json",
        "onnx/model.safetensors", "onnx/config.json", "run.py", "model.safetensors.pkl",
    ]  # fmt: skip
    assert list(filter_repo_objects(there, **patterns)) == there[:4]


def test_a_folder_goes_before_the_hub(tmp_path, base, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    expected = tuned(base)
    written(tmp_path / HUB, expected)
    assert same(load_finetuned(HUB, base), expected)
    with pytest.raises(InputError, match=rf"revision: '{HUB}' is a local path"):
        load_finetuned(HUB, base, revision="main")


def failing(monkeypatch, error):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def test_a_hub_that_cannot_be_reached(tmp_path, base, monkeypatch):
    for error in (LocalEntryNotFoundError("no connection"), ConnectionError("offline")):
        failing(monkeypatch, error)
        with pytest.raises(FileNotFoundError, match=rf"'{HUB}' is no local path.*cannot be reached.*hf download {HUB}"):
            load_finetuned(HUB, base)


def test_the_real_hub_package_without_a_network(tmp_path, base, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"not in the cache, and the Hugging Face hub cannot be reached"):
        load_finetuned(HUB, base, cache_dir=tmp_path)
    with pytest.raises(InputError, match=r"where: 'owner/a--b' is neither a local path nor a name on the hub"):
        load_finetuned("owner/a--b", base, cache_dir=tmp_path)
    # a cache as the hub's package fills it
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--owner--clip-tuned"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots").mkdir()
    expected = tuned(base)
    written(folder / "snapshots" / commit, expected)
    assert same(load_finetuned(HUB, base, cache_dir=tmp_path), expected)
    (folder / "snapshots" / commit / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .safetensors file on the hub \(or, without a connection"):
        load_finetuned(HUB, base, cache_dir=tmp_path)


def test_a_model_that_the_hub_does_not_have(base, monkeypatch):
    failing(monkeypatch, RepositoryNotFoundError.__new__(RepositoryNotFoundError))
    with pytest.raises(FileNotFoundError, match=rf"neither a local path nor a model on the hub: '{HUB}'$"):
        load_finetuned(HUB, base)
    with pytest.raises(FileNotFoundError, match=rf"'{HUB}' with the revision 'v9'$"):
        load_finetuned(HUB, base, revision="v9")


def test_other_errors_of_a_download_are_left_alone(base, monkeypatch):
    failing(monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        load_finetuned(HUB, base)


def test_without_the_hub_package(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"no folder 'owner/clip-tuned'.*pip install huggingface_hub"):
        load_finetuned(HUB, base)


def test_what_is_neither_a_path_nor_a_name(tmp_path, base):
    for bad in ("nothing", tmp_path / "nothing", "a/b/c", "owner/model.safetensors", "./owner/x", "owner/", "ö/x"):
        with pytest.raises(FileNotFoundError, match=r"where: there is no file or folder .*owner/name"):
            load_finetuned(bad, base)
    for bad in (3, None, b"owner/name", base):
        with pytest.raises(TypeError, match="where: expected a path or a name owner/name on the hub, got"):
            load_finetuned(bad, base)
    for bad in ("", "a\0b"):
        with pytest.raises(InputError, match="where: expected a path or a name"):
            load_finetuned(bad, base)


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_nothing_is_unpickled(tmp_path, base):
    with pytest.raises(FileNotFoundError, match=r"has no .safetensors file\. Other formats"):
        load_finetuned(tmp_path, base)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.save(Evil(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no .safetensors file, only 'pytorch_model.bin'\..*could hold code"):
        load_finetuned(tmp_path, base)
    with pytest.raises(InputError, match=r"expected a .safetensors file.*could hold code"):
        load_finetuned(tmp_path / "pytorch_model.bin", base)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "pytorch_model.bin").read_bytes())
    with pytest.raises(InputError, match="is no safetensors file"):
        load_finetuned(tmp_path, base)


def test_shards_that_do_not_keep_what_the_index_says(tmp_path, base):
    theirs = to_hugging_face(tuned(base))
    names = list(theirs)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: theirs[name] for name in part}, tmp_path / file)
    index = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert same(load_finetuned(tmp_path, base), tuned(base))
    (tmp_path / "b.safetensors").rename(tmp_path / "c.safetensors")
    with pytest.raises(FileNotFoundError, match=r"the shard 'b.safetensors'"):
        load_finetuned(tmp_path, base)
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"is in 'a.safetensors' and in 'b.safetensors'"):
        load_finetuned(tmp_path, base)


@pytest.mark.parametrize(
    ("key", "value", "has"),
    [
        ("hidden_size", 32, 16),
        ("intermediate_size", 64, 24),
        ("num_hidden_layers", 12, 2),
        ("num_channels", 1, 3),
        ("patch_size", 16, 4),
        ("patch_size", [4, 6], 4),
        ("image_size", 16, 12),
        ("image_size", "12", 12),
        ("num_attention_heads", 4, 2),
        ("num_attention_heads", None, 2),
        ("layer_norm_eps", 1e-6, 1e-5),
        ("hidden_act", "gelu", "quick_gelu"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_config_that_disagrees_with_the_base(tmp_path, base, key, value, has, nested):
    config = {**CONFIG, key: value}
    if nested:
        config = {"model_type": "clip", "vision_config": config, "hidden_size": 999}
    written(tmp_path, tuned(base), config)
    with pytest.raises(StateMismatchError, match=rf"config.json has {key} .*; the base has {has!r}"):
        load_finetuned(tmp_path, base)
    unseen = key in ("num_attention_heads", "layer_norm_eps", "hidden_act")
    if unseen:  # by a state dict
        assert load_finetuned(tmp_path, base.state_dict())


def test_the_activation_must_be_that_of_the_checkpoint(tmp_path):
    base = tower(activation=nn.GELU)
    silent = {key: value for key, value in CONFIG.items() if key != "hidden_act"}
    for config in (CONFIG, silent):
        written(tmp_path, tuned(base), config)
        with pytest.raises(
            StateMismatchError, match=r"hidden_act 'quick_gelu'; .*'gelu'; load the base as .*quickgelu"
        ):
            load_finetuned(tmp_path, base)
    written(tmp_path, tuned(base), {**CONFIG, "hidden_act": "gelu"})
    assert same(load_finetuned(tmp_path, base), tuned(base))


@pytest.mark.parametrize("change", [{"image_size": 15}, {"image_size": [12, 12], "patch_size": [4, 4]}, {"torch": 3}])
def test_configs_that_say_the_same_in_other_words(tmp_path, base, change):
    expected = tuned(base)
    assert same(load_finetuned(written(tmp_path, expected, {**CONFIG, **change}), base), expected)
    sparse = {"model_type": "clip", "vision_config": {"num_attention_heads": 2, "patch_size": 4}}
    assert same(load_finetuned(written(tmp_path, expected, sparse), base), expected)
    assert same(load_finetuned(written(tmp_path / "none", expected, None), base), expected)


def test_a_config_of_something_else(tmp_path, base):
    written(tmp_path, tuned(base), {**CONFIG, "model_type": "siglip_vision_model"})
    with pytest.raises(
        InputError, match=r"model_type is 'siglip_vision_model'; expected 'clip_vision_model' or 'clip'"
    ):
        load_finetuned(tmp_path, base)
    for text in ("{", "[]", "3", '{"model_type": "clip"}', '{"model_type": "clip", "vision_config": 3}', "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config.json' is no JSON|its config.json is no configuration of a model"):
            load_finetuned(tmp_path, base)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="model_type is None"):
        load_finetuned(tmp_path, base)


def test_another_shape_or_another_depth_than_the_base(tmp_path, base):
    big = VisionTransformer(16, 4, 16, layers=2, heads=2, mlp_ratio=1.5, output_dim=6)
    written(tmp_path / "more positions", big.state_dict(), None)
    with pytest.raises(
        StateMismatchError, match=r"'positional_embedding'\] has shape \(17, 16\); the base has \(10, 16\)"
    ):
        load_finetuned(tmp_path / "more positions", base)
    deep = VisionTransformer(12, 4, 16, layers=3, heads=2, mlp_ratio=1.5, output_dim=6)
    written(tmp_path / "deeper", deep.state_dict(), None)
    with pytest.raises(StateMismatchError, match=r"deeper' has the unexpected 'transformer.resblocks.2"):
        load_finetuned(tmp_path / "deeper", base)
    headless = base.state_dict()
    del headless["proj"]
    written(tmp_path / "projected", tuned(base))
    with pytest.raises(StateMismatchError, match="has the unexpected 'proj'; its keys must be those of the base"):
        load_finetuned(tmp_path / "projected", headless)
    written(tmp_path / "bare", tuned(base), projection=False)
    assert "proj" not in load_finetuned(tmp_path / "bare", headless)


def test_names_that_are_missing_or_too_many_in_the_checkpoint(tmp_path, base):
    written(tmp_path, tuned(base))
    theirs = load_file(tmp_path / "model.safetensors")
    name = "vision_model.encoder.layers.1.mlp.fc1.bias"
    save_file({key: tensor for key, tensor in theirs.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(StateMismatchError, match=rf"{tmp_path.name}' lacks '{name}'"):
        load_finetuned(tmp_path, base)
    save_file({**theirs, "classifier.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(StateMismatchError, match=r"has the unexpected 'classifier.weight'"):
        load_finetuned(tmp_path, base)


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


def test_another_base_model_is_suspected(tmp_path, base):
    written(tmp_path, tower(seed=3).state_dict())
    with pytest.warns(RmtllmfWarning, match=r"differs from the base by 1\d\d% .*another base model") as caught:
        load_finetuned(tmp_path, base)
    assert caught[0].filename == __file__


def test_numbers_that_are_none(tmp_path, base):
    state = tuned(base)
    state["ln_pre.bias"][3] = torch.nan
    written(tmp_path, state)
    with pytest.raises(NonFiniteError, match=r"'ln_pre.bias'\] holds 1 non-finite"):
        load_finetuned(tmp_path, base)


def test_weights_that_are_whole_numbers(tmp_path, base):
    theirs = to_hugging_face(tuned(base))
    name = next(name for name in theirs if name.endswith("layer_norm1.weight"))
    save_file(
        {key: tensor.clone() for key, tensor in theirs.items()} | {name: theirs[name].int()},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(StateMismatchError, match=rf"{re.escape(name)}'\] is torch.int32; expected a floating-point"):
        load_finetuned(tmp_path, base)


def test_a_base_that_is_no_image_tower_alone(tmp_path, base):
    written(tmp_path, tuned(base))
    vision = {"image_size": 12, "patch_size": 4, "width": 16, "layers": 2, "head_width": 8}
    model = CLIP(embed_dim=6, vision_cfg=vision, text_cfg={"width": 8, "heads": 2, "layers": 1})
    for bad in (model, model.state_dict()):
        with pytest.raises(InputError, match=r"base: expected the image tower alone.*pass model.visual"):
            load_finetuned(tmp_path, bad)
    with pytest.raises(StateMismatchError, match="base lacks 'class_embedding'"):
        load_finetuned(tmp_path, nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"base: expected a torch.nn.Module"):
        load_finetuned(tmp_path, 3)


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
