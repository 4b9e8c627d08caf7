"""Which names count as embeddings and as attention, on real models of every family, with the expected sets in full."""

import pytest
import timm
import torch
import torchvision
import transformers
from open_clip import CLIP, CoCa, CustomTextCLIP
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from torch import nn

from rmtllmf.resilience import attention_keys, embedding_keys

VISION = {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8, "mlp_ratio": 2}
TEXT = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
HF_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
HF_TEXT = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TIMM = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
GPT2 = {
    "vocab_size": 20,
    "n_positions": 8,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}

OPEN_CLIP_VISION = {"class_embedding", "positional_embedding", "conv1.weight"}
OPEN_CLIP_ATTENTION = {
    "transformer.resblocks.0.attn.in_proj_weight",
    "transformer.resblocks.0.attn.in_proj_bias",
    "transformer.resblocks.0.attn.out_proj.weight",
    "transformer.resblocks.0.attn.out_proj.bias",
}
TIMM_ATTENTION = {
    "blocks.0.attn.qkv.weight",
    "blocks.0.attn.qkv.bias",
    "blocks.0.attn.proj.weight",
    "blocks.0.attn.proj.bias",
}
BERT_EMBEDDINGS = {
    "embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weight",
    "embeddings.token_type_embeddings.weight",
}
VIT_EMBEDDINGS = {
    "embeddings.cls_token",
    "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.projection.bias",
}
CLIP_VISION_EMBEDDINGS = {
    "embeddings.class_embedding",
    "embeddings.patch_embedding.weight",
    "embeddings.position_embedding.weight",
}
TEXT_EMBEDDINGS = {"embeddings.token_embedding.weight", "embeddings.position_embedding.weight"}


def under(prefix, names):
    return {prefix + name for name in names}


def projections(prefix, names, *, bias=True):
    return {f"{prefix}{name}.{part}" for name in names for part in (("weight", "bias") if bias else ("weight",))}


def clip_layers(prefix):
    return projections(f"{prefix}encoder.layers.0.self_attn.", ("q_proj", "k_proj", "v_proj", "out_proj"))


BERT_ATTENTION = projections("encoder.layer.0.attention.", ("self.query", "self.key", "self.value", "output.dense"))
LLAMA_ATTENTION = projections("model.layers.0.self_attn.", ("q_proj", "k_proj", "v_proj", "o_proj"), bias=False)
T5_ATTENTION = {
    f"{block}.block.0.layer.{layer}.{kind}.{part}.weight"
    for block, layer, kind in (
        ("encoder", 0, "SelfAttention"),
        ("decoder", 0, "SelfAttention"),
        ("decoder", 1, "EncDecAttention"),
    )
    for part in "qkvo"
}

# id -> (how the model is made, its embeddings, its attention projections)
MODELS = {
    "open_clip VisionTransformer": (
        lambda: VisionTransformer(image_size=8, patch_size=4, width=16, layers=1, heads=2, mlp_ratio=2, output_dim=8),
        OPEN_CLIP_VISION,
        OPEN_CLIP_ATTENTION,
    ),
    "open_clip CLIP": (
        lambda: CLIP(embed_dim=8, vision_cfg=VISION, text_cfg=TEXT),
        {*under("visual.", OPEN_CLIP_VISION), "positional_embedding", "token_embedding.weight"},
        OPEN_CLIP_ATTENTION | under("visual.", OPEN_CLIP_ATTENTION),
    ),
    "open_clip CustomTextCLIP": (
        lambda: CustomTextCLIP(embed_dim=8, vision_cfg=VISION, text_cfg=TEXT),
        under("visual.", OPEN_CLIP_VISION) | {"text.positional_embedding", "text.token_embedding.weight"},
        under("text.", OPEN_CLIP_ATTENTION) | under("visual.", OPEN_CLIP_ATTENTION),
    ),
    "open_clip CoCa": (
        lambda: CoCa(
            embed_dim=8,
            multimodal_cfg={**TEXT, "mlp_ratio": 2},
            text_cfg={**TEXT, "embed_cls": True, "output_tokens": True},
            vision_cfg={**VISION, "output_tokens": True},
        ),
        under("visual.", OPEN_CLIP_VISION)
        | {"text.cls_emb", "text.positional_embedding", "text.token_embedding.weight"},
        under("text.", OPEN_CLIP_ATTENTION)
        | under("visual.", OPEN_CLIP_ATTENTION)
        | {
            name.replace("transformer.resblocks", f"text_decoder.{stack}")
            for name in OPEN_CLIP_ATTENTION
            for stack in ("resblocks", "cross_attn")
        },
    ),
    "timm ViT with registers": (
        lambda: timm.create_model("vit_tiny_patch16_224", reg_tokens=2, **TIMM),
        {"cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"},
        TIMM_ATTENTION,
    ),
    "timm DeiT": (
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", **TIMM),
        {"cls_token", "dist_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"},
        TIMM_ATTENTION,
    ),
    "torchvision ViT": (
        lambda: torchvision.models.VisionTransformer(
            image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3
        ),
        {"class_token", "conv_proj.weight", "conv_proj.bias", "encoder.pos_embedding"},
        {
            f"encoder.layers.encoder_layer_0.self_attention.{name}"
            for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        },
    ),
    "HF CLIPModel": (
        lambda: transformers.CLIPModel(transformers.CLIPConfig(text_config=HF_TEXT, vision_config=HF_VISION)),
        under("text_model.", TEXT_EMBEDDINGS) | under("vision_model.", CLIP_VISION_EMBEDDINGS),
        clip_layers("text_model.") | clip_layers("vision_model."),
    ),
    "HF SiglipModel": (
        lambda: transformers.SiglipModel(transformers.SiglipConfig(text_config=HF_TEXT, vision_config=HF_VISION)),
        under("text_model.", TEXT_EMBEDDINGS)
        | {
            "vision_model.embeddings.patch_embedding.weight",
            "vision_model.embeddings.patch_embedding.bias",
            "vision_model.embeddings.position_embedding.weight",
        },
        clip_layers("text_model.")
        | clip_layers("vision_model.")
        | {
            f"vision_model.head.attention.{name}"
            for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        },
    ),
    "HF BertModel": (
        lambda: transformers.BertModel(transformers.BertConfig(**HF_TEXT)),
        BERT_EMBEDDINGS,
        BERT_ATTENTION,
    ),
    "HF BertForMaskedLM, tied head": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**HF_TEXT)),
        under("bert.", BERT_EMBEDDINGS) | {"cls.predictions.decoder.weight"},
        under("bert.", BERT_ATTENTION),
    ),
    "HF RobertaForMaskedLM, tied head": (
        lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**HF_TEXT)),
        under("roberta.", BERT_EMBEDDINGS) | {"lm_head.decoder.weight"},
        under("roberta.", BERT_ATTENTION),
    ),
    "HF Llama, tied head": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**HF_TEXT, tie_word_embeddings=True)),
        {"model.embed_tokens.weight", "lm_head.weight"},
        LLAMA_ATTENTION,
    ),
    "HF Llama, head of its own": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**HF_TEXT, tie_word_embeddings=False)),
        {"model.embed_tokens.weight"},
        LLAMA_ATTENTION,
    ),
    "HF GPT-2, tied head": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
        {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"},
        projections("transformer.h.0.attn.", ("c_attn", "c_proj")),
    ),
    "HF T5, tied head": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, tie_word_embeddings=True)),
        {
            "shared.weight",
            "encoder.embed_tokens.weight",
            "decoder.embed_tokens.weight",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "lm_head.weight",
        },
        T5_ATTENTION,
    ),
    "a ResNet": (lambda: torchvision.models.resnet18(num_classes=3), set(), set()),
    "timm ResNet": (lambda: timm.create_model("resnet10t", num_classes=3), set(), set()),
    "an MLP": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), set(), set()),
}


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
