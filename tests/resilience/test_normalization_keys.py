"""Which names count as normalisation layers, on real models, from the modules and from their state dicts alike."""

import pytest
import timm
import torch
import torchvision
import transformers
from open_clip.transformer import LayerNormFp32, VisionTransformer
from torch import nn

from helpers.keyed_models import HF_TEXT, HF_VISION, T5
from rmtllmf.resilience import realign
from rmtllmf.resilience.keys import normalization_keys


def both(*owners):
    return {f"{owner}.{last}" for owner in owners for last in ("weight", "bias")}


MODELS = {
    "open_clip": (
        lambda: VisionTransformer(
            image_size=8, patch_size=4, width=16, layers=1, heads=2, mlp_ratio=2, output_dim=8, norm_layer=LayerNormFp32
        ),
        both("ln_pre", "transformer.resblocks.0.ln_1", "transformer.resblocks.0.ln_2", "ln_post"),
    ),
    "timm ViT with normalised queries": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, qk_norm=True
        ),
        both("blocks.0.norm1", "blocks.0.attn.q_norm", "blocks.0.attn.k_norm", "blocks.0.norm2", "norm"),
    ),
    "HF CLIP, misspelt": (
        lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**HF_VISION)),
        both(
            "vision_model.pre_layrnorm",
            "vision_model.encoder.layers.0.layer_norm1",
            "vision_model.encoder.layers.0.layer_norm2",
            "vision_model.post_layernorm",
        ),
    ),
    "HF BERT": (
        lambda: transformers.BertModel(transformers.BertConfig(**HF_TEXT)),
        both("embeddings.LayerNorm", "encoder.layer.0.attention.output.LayerNorm", "encoder.layer.0.output.LayerNorm"),
    ),
    "HF Llama, a class of its own without bias": (
        lambda: transformers.LlamaModel(transformers.LlamaConfig(**HF_TEXT)),
        {"layers.0.input_layernorm.weight", "layers.0.post_attention_layernorm.weight", "norm.weight"},
    ),
    "HF T5": (
        lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)),
        {
            "encoder.block.0.layer.0.layer_norm.weight",
            "encoder.block.0.layer.1.layer_norm.weight",
            "encoder.final_layer_norm.weight",
        },
    ),
    "torchvision ViT": (
        lambda: torchvision.models.VisionTransformer(
            image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3
        ),
        both("encoder.layers.encoder_layer_0.ln_1", "encoder.layers.encoder_layer_0.ln_2", "encoder.ln"),
    ),
    "numbered layers": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.PReLU(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)
        ),
        both("1", "3", "4"),
    ),
    "without parameters": (lambda: nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 4)), set()),
    "names that only look like it": (
        lambda: nn.ModuleDict({"norm_mlp": nn.Linear(4, 4), "lnear": nn.Linear(2, 2), "bn": nn.Linear(3, 3)}),
        set(),
    ),
}


@pytest.fixture(scope="module", params=MODELS, ids=list(MODELS))
def case(request):
    make, expected = MODELS[request.param]
    return make(), expected


def in_order(state, names):
    return tuple(name for name in state if name in names)


def prefixes_vary(found, expected):
    """transformers renamed the towers of CLIP: with or without a leading part."""
    return {name.removeprefix("vision_model.") for name in found} == {n.removeprefix("vision_model.") for n in expected}


def test_modules_and_state_dicts(case):
    model, expected = case
    found = normalization_keys(model)
    assert prefixes_vary(found, expected)
    assert found == in_order(model.state_dict(), found)
    assert normalization_keys(model.state_dict()) == found


def test_half_precision_counts_and_a_prefix_does_not_matter(case):
    model, _ = case
    wrapped = nn.ModuleDict({"visual": model})
    found = normalization_keys({name: tensor.bfloat16() for name, tensor in wrapped.state_dict().items()})
    assert found == tuple(f"visual.{name}" for name in normalization_keys(model))
    assert normalization_keys(wrapped) == found


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "efficientnet_b0"])
def test_convolutional_models_by_name_and_by_type(name):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(num_classes=3)
    expected = {
        f"{prefix}.{last}"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm)
        for last in ("weight", "bias")
    }
    assert set(normalization_keys(model)) == expected
    assert set(normalization_keys(model.state_dict())) == expected


def test_layer_norm_over_several_dimensions_is_told_by_its_type():
    assert normalization_keys(nn.Sequential(nn.LayerNorm((2, 3)))) == ("0.weight", "0.bias")
    assert normalization_keys(nn.Sequential(nn.LayerNorm((2, 3))).state_dict()) == ()


def test_a_layer_that_is_used_twice_has_all_its_names():
    norm = nn.LayerNorm(4)
    found = normalization_keys(nn.ModuleDict({"first": norm, "second": norm, "mlp": nn.Linear(4, 4)}))
    assert found == ("first.weight", "first.bias", "second.weight", "second.bias")


def test_a_class_with_norm_in_its_name_and_a_matrix_is_none():
    class NormalizedLinear(nn.Linear):
        pass

    class ScaleNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    assert normalization_keys(nn.Sequential(NormalizedLinear(4, 4), ScaleNorm())) == ("1.weight",)


def test_old_names_and_entries_that_are_no_parameters():
    state = {
        "LayerNorm.gamma": torch.ones(4),
        "LayerNorm.beta": torch.ones(4),
        "ls1.gamma": torch.ones(4),
        "norm_proj.bias": torch.ones(4),
        "bn.running_mean": torch.ones(4),
        "bn.num_batches_tracked": torch.tensor(1),
        "bn.weight": torch.ones(4),
    }
    assert normalization_keys(state) == ("LayerNorm.gamma", "LayerNorm.beta", "bn.weight")


def test_realignment_of_the_normalisation_alone():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    done = realign(model, [(torch.eye(4), torch.arange(4) % 2)], steps=2, trainable=normalization_keys(model))
    assert done.trained == ("1.weight", "1.bias")


def test_bad_input():
    with pytest.raises(TypeError, match=r"model_or_state: expected a torch\.nn\.Module"):
        normalization_keys(3)
