"""Checkpoints that hold code, disagree with themselves, or belong to another base."""

import json
import re
import shutil

import pytest
import torch
from open_clip import CLIP
from open_clip.transformer import VisionTransformer
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.published_tower import CONFIG, same, tower, tuned, written
from rmtllmf.clip.hugging_face import to_hugging_face
from rmtllmf.clip.published import load_finetuned
from rmtllmf.errors import InputError, NonFiniteError, RmtllmfWarning, StateMismatchError


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
