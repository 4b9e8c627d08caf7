"""Run as a script: every reader is given pickles under every name; the interpreter itself tells if one is opened.

Prints what was unpickled; nothing if all is well.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import open_clip
import torch

from helpers.readers import READERS, files
from rmtllmf.clip import load, load_finetuned


class Evil:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return (print, ("UNPICKLED",))


def watch(event, arguments):
    if event == "pickle.find_class":
        print("UNPICKLED", arguments, flush=True)


def attempt(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return type(error).__name__
    return "read"


FORCED = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")


def main(folder):
    for name in FORCED:
        os.environ.pop(name, None)
    torch.save(Evil(), folder / "evil.pt")
    torch.save(Evil(), folder / "old.pt", _use_new_zipfile_serialization=False)
    pickles = [(folder / name).read_bytes() for name in ("evil.pt", "old.pt")]
    prepared = []
    for name, reader in READERS.items():
        place = folder / name
        place.mkdir()
        reader.make(place)
        prepared.append((reader, place, {path: path.read_bytes() for path in files(place)}))
    tower = open_clip.transformer.VisionTransformer(8, 4, width=16, layers=1, heads=2, mlp_ratio=2.0, output_dim=8)
    configs = folder / "configs"
    configs.mkdir()
    vision = {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8}
    text = {"width": 16, "heads": 2, "layers": 1}
    (configs / "tiny.json").write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(configs)
    if "--as-before-torch-2.6" in sys.argv:
        original = torch.load

        def old(file, *arguments, weights_only=None, **options):
            """Unpickles unless it is asked not to, and fails at first as a damaged file can make it fail."""
            if weights_only:
                raise TypeError("a function of the file was given the wrong arguments")
            forced = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == "1"
            return original(file, *arguments, weights_only=forced, **options)

        torch.load = old
    sys.addaudithook(watch)
    for content in pickles:
        for reader, place, valid in prepared:
            for path in valid:
                path.write_bytes(content)
                assert attempt(reader.read, place) != "read" or path.name == "config.json", path  # which is copied only
                path.write_bytes(valid[path])
            for extra in ("pytorch_model.bin", "adapter_model.bin", "model.pt", "training_args.bin"):
                (place / extra).write_bytes(content)
                attempt(reader.read, place)
                (place / extra).unlink()
    for name in ("evil.pt", "old.pt"):
        assert attempt(load, "tiny", folder / name) == "InputError"
    for name in ("pytorch_model.bin", "model.safetensors"):
        (folder / "hub").mkdir(exist_ok=True)
        (folder / "hub" / name).write_bytes(pickles[0])
        assert attempt(load_finetuned, folder / "hub", tower) in ("FileNotFoundError", "InputError")
    assert not {*FORCED} & {*os.environ}
    torch.load(folder / "evil.pt", weights_only=False)  # the watch is awake
    print("done")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
