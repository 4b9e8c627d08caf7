"""Cosines layer by layer are those of the vectors that hold this layer only."""

import pytest
import torch
from open_clip.transformer import VisionTransformer

from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.metrics import cosine_similarity, layer_cosine_similarity
from rmtllmf.metrics._layers import layer_of


def vectors(count=3):
    model = VisionTransformer(image_size=8, patch_size=4, width=16, layers=12, heads=2, mlp_ratio=2, output_dim=6)
    source = torch.Generator().manual_seed(0)
    return [
        {name: torch.randn(tensor.shape, generator=source) for name, tensor in model.state_dict().items()}
        for _ in range(count)
    ]


def only(vector, start):
    return {name: tensor for name, tensor in vector.items() if name == start or name.startswith(f"{start}.")}


def test_every_layer_is_the_similarity_of_its_own_entries():
    taus = vectors()
    found = layer_cosine_similarity(taus)
    assert list(found)[:3] == ["class_embedding", "positional_embedding", "proj"]
    blocks = [layer for layer in found if "resblocks" in layer]
    assert blocks == [f"transformer.resblocks.{index}" for index in range(12)]
    assert set(found) - set(blocks) == {
        "class_embedding",
        "positional_embedding",
        "proj",
        "conv1",
        "ln_pre",
        "ln_post",
    }
    for layer, similarity in found.items():
        assert torch.equal(similarity, cosine_similarity([only(tau, layer) for tau in taus])), layer
    assert torch.equal(layer_cosine_similarity(taus, {"all": "*"})["all"], cosine_similarity(taus))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("visual.transformer.resblocks.11.attn.in_proj_weight", "visual.transformer.resblocks.11"),
        ("transformer.resblocks.1.mlp.c_fc.bias", "transformer.resblocks.1"),
        ("vision_model.encoder.layers.10.self_attn.k_proj.weight", "vision_model.encoder.layers.10"),
        ("encoder.layer.3.attention.output.dense.weight", "encoder.layer.3"),
        ("blocks.7.norm1.weight", "blocks.7"),
        ("transformer.h.2.attn.c_attn.weight", "transformer.h.2"),
        ("encoder.block.7.layer.1.DenseReluDense.wi.weight", "encoder.block.7"),
        ("layers.2.blocks.5.attn.qkv.weight", "layers.2.blocks.5"),
        ("layers.2.downsample.norm.weight", "layers.2"),
        ("layer2.1.conv1.weight", "layer2.1"),
        ("encoder.layers.encoder_layer_3.mlp.0.weight", "encoder.layers.encoder_layer_3"),
        ("patch_embed.proj.weight", "patch_embed"),
        ("head.weight", "head"),
        ("0.weight", "0"),
        ("cls_token", "cls_token"),
        ("my_blocks.3.weight", "my_blocks"),
    ],
)
def test_the_layer_of_a_name(name, layer):
    assert layer_of(name) == layer


def test_layers_of_ones_own():
    taus = vectors(2)
    groups = {
        "attention": ["*.attn.*"],
        "first": ("transformer.resblocks.0.*", "conv1.weight"),
        "all attention": "*attn*",
    }
    found = layer_cosine_similarity(taus, groups)
    assert list(found) == list(groups)
    assert torch.equal(found["attention"], found["all attention"])
    chosen = [
        {k: v for k, v in tau.items() if k == "conv1.weight" or k.startswith("transformer.resblocks.0.")}
        for tau in taus
    ]
    assert torch.equal(found["first"], cosine_similarity(chosen))
    assert list(layer_cosine_similarity(taus, ["ln_*", "conv1.weight"])) == ["ln_*", "conv1.weight"]
    assert list(layer_cosine_similarity(taus, "ln_*")) == ["ln_*"]


def test_a_layer_that_is_all_zero_has_no_direction():
    taus = [{"embed.w": torch.ones(2), "blocks.0.w": torch.ones(2)} for _ in range(3)]
    taus[1]["embed.w"] = torch.zeros(2)
    found = layer_cosine_similarity(taus)
    nan = found["embed"].isnan()
    assert nan.tolist() == [[False, True, False], [True, True, True], [False, True, False]]
    torch.testing.assert_close(found["embed"][0, 2], torch.tensor(1.0, dtype=torch.float64))
    assert not found["blocks.0"].isnan().any()
    with pytest.raises(InputError, match=r"vectors\[1\]: is all zero"):
        cosine_similarity([{"w": tau["embed.w"]} for tau in taus])


def test_integers_and_running_statistics_belong_to_no_layer():
    one = {"bn.weight": torch.ones(2), "bn.running_mean": torch.ones(2), "steps": torch.tensor(1)}
    assert list(layer_cosine_similarity([one, one])) == ["bn"]


def test_bad_input():
    one = {"w": torch.ones(2)}
    for given, layers, error, pattern in (
        ([one], {"a": "v*"}, InputError, r"layers\['a'\]: 'v\*' matches none of the 1 names: 'w'"),
        ([one], ["v"], InputError, r"layers\['v'\]: 'v' matches none"),
        ([one], {}, InputError, "layers: expected at least one layer"),
        ([one], {"a": []}, InputError, r"layers\['a'\]: expected at least one name or pattern"),
        ([one], 3, TypeError, "layers: expected .*got int"),
        ([one], [3], TypeError, "layers: expected .*got int"),
        ([one], {"a": 3}, TypeError, r"layers\['a'\]: expected .*got int"),
        ([], None, InputError, "vectors: expected at least one"),
        ([one, {"v": torch.ones(2)}], None, StateMismatchError, r"vectors\[1\]"),
        ([{"w": torch.tensor([float("nan")])}], None, NonFiniteError, r"vectors\[0\]\['w'\]"),
    ):
        with pytest.raises(error, match=pattern):
            layer_cosine_similarity(given, layers)
