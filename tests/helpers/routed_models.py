"""Small models with attention of every make, and random vectors for them."""

import torch
from open_clip.transformer import VisionTransformer
from torch import nn

from rmtllmf.taskvec import TaskVector


class Blocks(nn.Module):
    """torch's own encoder, which takes matrices past its layers where it can."""

    def __init__(self, batch_first=True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
        self.batch_first = batch_first

    def forward(self, x):
        """(B, T, 8) -> (B, 8)."""
        return self.blocks(x).mean(1) if self.batch_first else self.blocks(x.transpose(0, 1)).mean(0)


def clip(batch_first=True):
    model = VisionTransformer(8, 4, 16, 2, 2, 2.0, output_dim=8)
    for module in model.modules():
        if hasattr(module, "batch_first"):
            module.batch_first = batch_first
    return model, torch.randn(4, 3, 8, 8, dtype=torch.float64)


def timm():
    import timm as library

    model = library.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3
    )
    return model, torch.randn(4, 3, 16, 16, dtype=torch.float64)


def hugging_face():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    return ViTModel(config, add_pooling_layer=False), torch.randn(4, 3, 16, 16, dtype=torch.float64)


MODELS = {
    "open_clip": clip,
    "open_clip, sequence first": lambda: clip(False),
    "timm": timm,
    "Hugging Face": hugging_face,
    "torch": lambda: (Blocks(), torch.randn(4, 5, 8, dtype=torch.float64)),
    "torch, sequence first": lambda: (Blocks(False), torch.randn(4, 5, 8, dtype=torch.float64)),
}


def made(name):
    """The model in float64 and evaluation mode, and inputs for it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = MODELS[name]()
    return model.double().eval(), inputs


def random_vectors(model, count=3, scale=0.2, seed=0):
    source = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    return [
        TaskVector({k: scale * torch.randn(v.shape, generator=source, dtype=v.dtype) for k, v in state.items()})
        for _ in range(count)
    ]


def in_linear_layers(model):
    """Names of weights and biases of linear layers, as the model has them."""
    names = set()
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.MultiheadAttention):
            names |= {f"{prefix}.{key}".lstrip(".") for key, _ in module.named_parameters()}
    return names


def run(model, inputs):
    output = model(inputs)
    return getattr(output, "last_hidden_state", output)


def run_with(model, state, inputs):
    output = torch.func.functional_call(model, state, (inputs,))
    return getattr(output, "last_hidden_state", output)
