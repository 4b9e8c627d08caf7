"""Which names count as embeddings and as attention, on real models of every family, with the expected sets in full."""

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from helpers.keyed_models import (
    CLIP_VISION_EMBEDDINGS,
    HF_VISION,
    MODELS,
    TIMM,
    VIT_EMBEDDINGS,
    clip_layers,
    projections,
    under,
)
from rmtllmf.resilience import attention_keys, embedding_keys


@pytest.fixture(scope="module", params=MODELS, ids=list(MODELS))
def case(request):
    make, embeddings, attention = MODELS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(), embeddings, attention


def test_embeddings(case):
    model, embeddings, _ = case
    found = embedding_keys(model)
    assert set(found) == embeddings
    assert list(found) == [name for name in model.state_dict() if name in embeddings]


def test_attention(case):
    model, _, attention = case
    found = attention_keys(model)
    assert set(found) == attention
    assert list(found) == [name for name in model.state_dict() if name in attention]


def test_a_state_dict_gives_the_same_as_the_module(case):
    model, embeddings, attention = case
    assert set(embedding_keys(model.state_dict())) == embeddings
    assert set(attention_keys(model.state_dict())) == attention


def test_ties_lost_on_the_way_are_found_by_value(case):
    model, embeddings, _ = case
    untied = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert set(embedding_keys(untied)) == embeddings


def test_any_prefix(case):
    model, embeddings, attention = case
    wrapped = nn.ModuleDict({"module": nn.ModuleDict({"trunk": model})})
    assert set(embedding_keys(wrapped)) == under("module.trunk.", embeddings)
    assert set(attention_keys(wrapped)) == under("module.trunk.", attention)


def test_half_precision_counts_and_integers_do_not(case):
    model, embeddings, _ = case
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    assert set(embedding_keys(state)) == embeddings
    assert embedding_keys({name: torch.zeros(2, dtype=torch.int64) for name in state}) == ()
    assert attention_keys({name: torch.zeros(2, dtype=torch.int64) for name in state}) == ()


# transformers 5 renamed the attention of its vision transformers; checkpoints have either
VIT_ATTENTION = (
    projections("layers.0.attention.", ("q_proj", "k_proj", "v_proj", "o_proj")),
    projections("encoder.layer.0.attention.", ("q_proj", "k_proj", "v_proj", "o_proj")),
    projections("encoder.layer.0.attention.", ("attention.query", "attention.key", "attention.value", "output.dense")),
)


@pytest.mark.parametrize(
    ("make", "extra"),
    [
        (lambda: transformers.ViTModel(transformers.ViTConfig(**HF_VISION)), set()),
        (
            lambda: transformers.DeiTModel(transformers.DeiTConfig(**HF_VISION)),
            {"embeddings.distillation_token"},
        ),
        (lambda: transformers.Dinov2Model(transformers.Dinov2Config(**HF_VISION)), {"embeddings.mask_token"}),
        (
            lambda: transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**HF_VISION)),
            {"embeddings.mask_token", "embeddings.register_tokens"},
        ),
    ],
    ids=["ViT", "DeiT", "DINOv2", "DINOv2 with registers"],
)
def test_vision_transformers_of_hugging_face(make, extra):
    model = make()
    assert set(embedding_keys(model)) == VIT_EMBEDDINGS | extra
    assert set(attention_keys(model)) in VIT_ATTENTION


@pytest.mark.parametrize("names", VIT_ATTENTION)
def test_attention_names_old_and_new(names):
    state = dict.fromkeys([*sorted(names), "encoder.layer.0.output.dense.weight", "layernorm.weight"], torch.ones(2))
    assert set(attention_keys(state)) == names


def test_clip_vision_model_of_hugging_face():
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF_VISION))
    prefix = "" if "embeddings.class_embedding" in model.state_dict() else "vision_model."
    assert set(embedding_keys(model)) == under(prefix, CLIP_VISION_EMBEDDINGS)
    assert set(attention_keys(model)) == clip_layers(prefix)


def test_a_timm_trunk_inside_open_clip():
    model = timm.create_model("vit_tiny_patch16_224", **TIMM)
    tower = nn.ModuleDict({"visual": nn.ModuleDict({"trunk": model, "head": nn.Linear(16, 8)})})
    expected = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert set(embedding_keys(tower)) == under("visual.trunk.", expected)


def test_a_stem_counts_only_beside_a_class_embedding():
    stem = {"conv1.weight": torch.zeros(2), "attnpool.positional_embedding": torch.zeros(2)}
    assert embedding_keys(stem) == ("attnpool.positional_embedding",)
    assert embedding_keys({**stem, "visual.class_embedding": torch.zeros(2)}) == (
        "attnpool.positional_embedding",
        "visual.class_embedding",
    )
    assert embedding_keys({**stem, "class_embedding": torch.zeros(2)})[0] == "conv1.weight"


def test_masks_and_rotary_tables_are_no_attention_projections():
    names = [
        "h.0.attn.bias",
        "h.0.attn.masked_bias",
        "layers.0.self_attn.rotary_emb.inv_freq",
        "blocks.0.attn.norm.weight",
    ]
    assert attention_keys({name: torch.ones(2) for name in names}) == ()


def test_a_checkpoint_that_dropped_the_tied_names(tmp_path):
    state = {"shared.weight": torch.ones(4, 2), "encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 2)}
    save_file(state, tmp_path / "t5.safetensors")
    assert embedding_keys(tmp_path / "t5.safetensors") == ("shared.weight",)
    assert embedding_keys({"shared.weight": torch.ones(4, 2), "mlp.weight": torch.ones(2)}) == ()


def test_ties_on_the_meta_device():
    with torch.device("meta"):
        model = nn.ModuleDict({"embed_tokens": nn.Embedding(4, 2), "out": nn.Linear(2, 4, bias=False)})
    assert embedding_keys(model) == ("embed_tokens.weight",)
    model["out"].weight = model["embed_tokens"].weight
    assert embedding_keys(model) == ("embed_tokens.weight", "out.weight")
