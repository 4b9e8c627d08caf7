"""Hugging Face folders: fuse checkpoints on disk, sharded or not, into a folder that ``from_pretrained`` loads.

No model is ever whole in memory while it is fused. Configuration and tokenizer are those of the base; the embeddings
too, as the paper has it: their names are found on a model without memory, on PyTorch's device "meta". The result lies
in as many shards as the base. All options of ``fuse_files`` can be passed on; with ``mse`` the fine-tuned models pass
the jammed uplink on the way::

    model = fuse_folders(AutoModelForCausalLM, "llama", ["llama-law", "llama-code"], "llama-both", ties, density=0.2)
    model = fuse_folders(AutoModelForCausalLM, "llama", users, "llama-heard", mse=[0.01, 0.2], seed=0)
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel

from rmtllmf.resilience import embedding_keys
from rmtllmf.taskvec import fuse_files, task_arithmetic


def embeddings_on_disk(auto_class: Any, folder: str) -> list[str]:
    with torch.device("meta"):
        names = embedding_keys(auto_class.from_config(AutoConfig.from_pretrained(folder)))
    shards = [safe_open(path, "pt") for path in Path(folder).glob("*.safetensors")]
    stored = {name for shard in shards for name in shard.keys()}  # noqa: SIM118
    return [name for name in names if name in stored]  # a head that is tied to an embedding is not


def fuse_folders(
    auto_class: Any,
    base: str,
    finetuned: Sequence[str],
    out: str,
    rule: Callable[..., Any] = task_arithmetic,
    **options: Any,
) -> PreTrainedModel:
    fuse_files(base, finetuned, out, rule, skip=embeddings_on_disk(auto_class, base), **options)
    model: PreTrainedModel = auto_class.from_pretrained(out)
    return model
