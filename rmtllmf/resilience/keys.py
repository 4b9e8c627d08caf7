"""Which parameters of a model are embeddings, attention projections or normalisation layers."""

from __future__ import annotations

import re
from collections.abc import Hashable

import torch
from torch import Tensor, nn

from .._state import StateLike, Tensors, as_state, identity

__all__ = ["attention_keys", "embedding_keys", "normalization_keys"]

# Only the last parts of a name decide, so that any wrapper's prefix ("visual.", "visual.trunk.", "model.") is fine.
_EMBEDDING = re.compile(
    r"""(?:^|\.)(?:
        class_embedding | cls_emb | cls_token | class_token           # class tokens
      | reg_token | register_tokens | dist_token | distillation_token | mask_token
      | (?:positional|position|pos)_embed(?:ding|dings)?(?:\.weight)? # positions: learnt tables, bare or nn.Embedding
      | \w+_position_embeddings\.weight | embed_positions\.weight | wpe\.weight
      | relative_position_bias_table | relative_attention_bias\.weight | rel_embeddings\.weight
      | pos_embed_\d+ | patch_pos | pixel_pos | pixel_embed\.proj\.(?:weight|bias)
      | patch_embed\.proj\.(?:weight|bias) | (?:patch_)?embeds(?:\.\d+)?\.proj\.(?:weight|bias)
      | patch_embeddings?(?:\.projection)?\.(?:weight|bias)           # patches
      | (?:token|word|tok|token_type)_embeddings?\.weight             # words
      | embed_tokens\.weight | wte\.weight | embed_in\.weight | embeddings?\.weight
    )$""",
    re.VERBOSE,
)
# Names that mean an embedding only in company: name -> what must stand beside it (same prefix).
_IN_COMPANY = (
    (re.compile(r"(.*\.|)conv1\.(?:weight|bias)"), ("class_embedding", "positional_embedding")),  # open_clip
    (re.compile(r"(.*\.|)conv_proj\.(?:weight|bias)"), ("class_token",)),  # torchvision
    (re.compile(r"(.*\.|)shared\.weight"), ("encoder.", "decoder.")),  # T5, BART
)
_HEAD = re.compile(
    r"(?:^|\.)(?:lm_head(?:\.decoder)?|predictions\.decoder|vocab_projector|embed_out|output_projection)\.weight$"
)
_ATTENTION = re.compile(
    r"""(?:^|\.)\w*(?:attn|attention)\w*\.
    (?:(?:self|attention|output)\.)?       # BERT: attention.self.query, attention.output.dense
    (?:
        (?:in_proj|out_proj|[qkvoc]_proj|qkv_proj|qkv|kv|[qkvo]|proj|query|key|value|query_key_value|dense
          |(?:query|key|value|pos|pos_q)_proj|(?:query|key|value)_global   # DeBERTa, Longformer
          |(?:q|kv)_[ab]_proj|kv_a_proj_with_mqa                           # DeepSeek
          |c_attn|q_attn|[qkv]_lin|out_lin|w[qkvo]|Wqkv|Wo)\.(?:weight|bias)
      | in_proj_weight | in_proj_bias | [qkv]_proj_weight | bias_[kv] | [qv]_bias
    )$""",
    re.VERBOSE | re.IGNORECASE,
)

_NORMALIZATIONS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance normalisation of any dimension
)
_NORMALIZATION = re.compile(
    r"""(?:^|\.)(?:
        \w*(?:norm|layrnorm)\w*       # as Hugging Face's CLIP spells it
      | (?:\w+_)?(?:ln|bn)\d*(?:_\w+)?
    )\.(?:weight|bias|gamma|beta)$""",
    re.VERBOSE | re.IGNORECASE,
)


def embedding_keys(model_or_state: StateLike) -> tuple[str, ...]:
    r"""The names :math:`\mathcal{E}` of a transformer's embeddings, which fusion over a bad channel should not touch.

    .. math:: \theta_{\mathcal{E}} \subset \theta, \qquad
              \mathcal{E} = \{\text{position, patch, class, register, mask and token embeddings}\}

    Names of open_clip, timm, torchvision and Hugging Face models are known, with any prefix. LayerNorms inside an
    embedding block do not count, nor does a convolutional stem. An output head that is tied to an embedding goes with
    it: tied by memory, or, in a state dict whose ties were lost, a head by its name that equals an embedding in
    every entry.

    Args:
        model_or_state: a module, a state dict or the path of a checkpoint.

    Returns:
        The names in the order of the state dict, floating entries only. Empty if there is none (a ResNet).

    Raises:
        TypeError: neither a module nor a mapping of name -> tensor nor a path.

    Source: R-MTLLMF, section III (the embedding layers are frozen and restored).

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"embed_tokens": nn.Embedding(8, 4), "mlp": nn.Linear(4, 4)})
        >>> embedding_keys(model)
        ('embed_tokens.weight',)
    """
    state = _floating(model_or_state)
    found = {key for key in state if _EMBEDDING.search(key) or _is_embedding_in_company(key, state)}
    memory: set[Hashable] = {identity(state[key]) for key in found}
    tied = {key for key, tensor in state.items() if key not in found and identity(tensor) in memory}
    copies = {
        key
        for key, tensor in state.items()
        if _HEAD.search(key) and any(_equal(tensor, state[embedding]) for embedding in found)
    }
    found |= tied | copies
    return tuple(key for key in state if key in found)


def attention_keys(model_or_state: StateLike) -> tuple[str, ...]:
    r"""The names of the attention projections: the weights and biases of queries, keys, values and outputs.

    .. math:: \mathrm{softmax}\bigl((x W_Q + b_Q)(x W_K + b_K)^T / \sqrt{d}\bigr)(x W_V + b_V)\, W_O + b_O

    LayerNorms, masks, rotary tables and relative position biases beside them do not count. Names of open_clip, timm,
    torchvision, ``torch.nn.MultiheadAttention`` and Hugging Face models are known, with any prefix.

    Args:
        model_or_state: a module, a state dict or the path of a checkpoint.

    Returns:
        The names in the order of the state dict, floating entries only. Empty if there is none.

    Raises:
        TypeError: neither a module nor a mapping of name -> tensor nor a path.

    Source: R-MTLLMF, section III (fine-tuning mostly affects the self-attention layers).

    Example:
        >>> from torch import nn
        >>> attention_keys(nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2, bias=False), "mlp": nn.Linear(4, 4)}))
        ('attn.in_proj_weight', 'attn.out_proj.weight')
    """
    return tuple(key for key in _floating(model_or_state) if _ATTENTION.search(key))


def normalization_keys(model_or_state: StateLike) -> tuple[str, ...]:
    r"""The names of the weights and biases of normalisation layers, few numbers that steer everything else.

    .. math:: \gamma \odot \frac{x - \mathrm{mean}(x)}{\sqrt{\mathrm{var}(x) + \varepsilon}} + \beta

    For ``realign(trainable=normalization_keys(model))``: with 10 samples a class there is little to overfit. In a
    module the layers are told by their type: layer, RMS, group, batch and instance normalisation of torch, what derives
    from them, and any other class with "norm" in its name whose parameters are vectors (open_clip, timm, torchvision
    and Hugging Face have their own). In a state dict they are told as a vector ``weight`` beside a ``bias`` of the
    same shape, or a lone vector by its name. Running statistics themselves do not count.

    Args:
        model_or_state: a module, a state dict or the path of a checkpoint.

    Returns:
        The names in the order of the state dict, floating entries only. Empty if there is none. A state dict does not
        tell a weight over several dimensions, nor a lone weight without a telling name.

    Raises:
        TypeError: neither a module nor a mapping of name -> tensor nor a path.

    Source: Frankle, Schwab and Morcos, "Training BatchNorm and only BatchNorm", 2021; Zhao et al., "Tuning LayerNorm
    in attention: towards efficient multi-modal LLM finetuning", 2024.

    Example:
        >>> from torch import nn
        >>> normalization_keys(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)))
        ('1.weight', '1.bias')
    """
    state = _floating(model_or_state)
    if isinstance(model_or_state, nn.Module):
        found = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in model_or_state.named_modules(remove_duplicate=False)
            if _is_normalization(module)
            for name, parameter in module.named_parameters(recurse=False)
        }
        return tuple(key for key in state if key in found)
    return tuple(key for key in state if _is_normalization_entry(key, state))


def _is_normalization(module: nn.Module) -> bool:
    if isinstance(module, _NORMALIZATIONS):
        return True
    own = list(module.parameters(recurse=False))
    return "norm" in type(module).__name__.lower() and all(parameter.ndim <= 1 for parameter in own)


def _is_normalization_entry(key: str, state: Tensors) -> bool:
    owner, _, last = key.rpartition(".")
    prefix = f"{owner}." if owner else ""
    if last not in ("weight", "bias", "gamma", "beta") or state[key].ndim != 1:
        return False
    weight, bias = state.get(prefix + "weight"), state.get(prefix + "bias")
    if weight is not None and bias is not None:
        return weight.ndim == 1 and weight.shape == bias.shape
    if weight is None and last == "bias":  # of something else with such a name
        return False
    return bool(_NORMALIZATION.search(key))


def _floating(source: StateLike) -> dict[str, Tensor]:
    # keep_vars: tied parameters are then the same object, which tells a tie even on the meta device
    if isinstance(source, nn.Module):
        items = source.state_dict(keep_vars=True).items()
        state = {key: tensor for key, tensor in items if isinstance(tensor, Tensor)}
    else:
        state = as_state(source, "model_or_state")
    return {key: tensor for key, tensor in state.items() if tensor.is_floating_point()}


def _is_embedding_in_company(key: str, state: Tensors) -> bool:
    for pattern, company in _IN_COMPANY:
        match = pattern.fullmatch(key)
        if match and any(name.startswith(match[1] + other) for other in company for name in state):
            return True
    return False


def _equal(first: Tensor, second: Tensor) -> bool:
    if first.is_meta or (first.shape, first.dtype, first.device) != (second.shape, second.dtype, second.device):
        return False
    return torch.equal(first, second) and bool(second.any())  # zeros, in a task vector, say nothing
