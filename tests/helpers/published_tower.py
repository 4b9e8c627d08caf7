"""A small image tower, a fine-tuned state of it, and the folder that transformers would write of that."""

import json

import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import save_file
from torch import nn

from rmtllmf.clip.hugging_face import to_hugging_face

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
