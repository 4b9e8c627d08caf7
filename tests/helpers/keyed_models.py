"""Small models of every library, the names of their embeddings, and those of their attention projections."""

import timm
import torchvision
import transformers
from open_clip import CLIP, CoCa, CustomTextCLIP
from open_clip.transformer import VisionTransformer
from torch import nn

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
