"""What stands beside the weights in a model's folder, and goes with them: configuration, tokenizer, texts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from .._untrusted import check_inside, parsed, read_whole

CONFIG = "config.json"
# nothing that can hold code; the last four are of tokenizers
_ENDINGS = (".json", ".txt", ".md", ".jinja", ".model", ".tiktoken", ".bpe", ".spm")
_NAMES = ("LICENSE", "NOTICE")
_FOLDERS = ("chat_templates", "additional_chat_templates")  # of .jinja
# what is about weights of the base's own: how they are divided, how they were trained, what they are added to
_NOT = (".index.json", "trainer_state.json", "adapter_config.json")
_DTYPE = re.compile(r'("(?:torch_)?dtype"\s*:\s*)"(\w+)"')
_KEYS = ("dtype", "torch_dtype")


def beside(folder: Path, label: str) -> list[Path]:
    """The files to copy, none of which is a link that leads out of the folder."""
    found = [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and (file.name in _NAMES or file.name.endswith(_ENDINGS)) and not file.name.endswith(_NOT)
    ]
    for name in _FOLDERS:
        if (folder / name).is_dir():
            found += [file for file in sorted((folder / name).iterdir()) if file.is_file() and file.suffix == ".jinja"]
    for file in found:
        check_inside(file, folder, label)
    return found


def config_in(folder: Path, dtype: torch.dtype, label: str) -> bytes | None:
    """The folder's configuration with another dtype where it says one, and else byte for byte; None if all is well.

    Parts of a model, such as ``text_config``, say theirs; what ``quantization_config`` says is about something else.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    content = read_whole(path, label, inside=folder)
    before = parsed(content, f"{label}: {str(path)!r} is no JSON")
    name = str(dtype).removeprefix("torch.")
    after = _with_dtype(before, name)
    if after == before:
        return None
    text = _DTYPE.sub(lambda match: f'{match[1]}"{name}"' if _is_dtype(match[2]) else match[0], content.decode())
    if parsed(text, "") != after:  # there is another dtype that must stay
        text = json.dumps(after, indent=2, ensure_ascii=False) + "\n"
    return text.encode()


def _with_dtype(config: Any, name: str) -> Any:
    if not isinstance(config, dict):
        return config
    result = {}
    for key, value in config.items():
        if key in _KEYS and isinstance(value, str) and _is_dtype(value):
            result[key] = name
        elif key.endswith("_config") and key != "quantization_config":
            result[key] = _with_dtype(value, name)
        else:
            result[key] = value
    return result


def _is_dtype(text: str) -> bool:
    found = getattr(torch, text, None)
    return isinstance(found, torch.dtype) and found.is_floating_point
