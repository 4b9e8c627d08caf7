"""The real setting, reduced: a tiny CLIP and small files in the data sets' own formats, through the real loaders."""

import argparse
import json
import struct
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from paper.__main__ import main
from paper.clip_world import ClipWorld
from paper.protocol import CLIP, PROTECTIONS, add_options, from_options
from paper.sweep import Job, Sweep
from rmtllmf.clip import class_names, load, to_hugging_face
from rmtllmf.clip.prompts import folders
from rmtllmf.taskvec import TaskVector

NAME = "tiny-for-tests"
TASKS = ("eurosat", "mnist", "resisc45")
CONFIG = {
    "embed_dim": 8,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}


def pictures(folder, label, count):
    folder.mkdir(parents=True)
    for index in range(count):
        noise = np.random.default_rng([label, index]).integers(0, 60, (16, 16, 3), dtype=np.uint8)
        noise[label % 16] = 255  # what can be learnt
        Image.fromarray(noise).save(folder / f"{index}.jpg")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten images of every class of EuroSAT and MNIST, and of RESISC45 two for training and one for testing."""
    root = tmp_path_factory.mktemp("data")
    for label, name in enumerate(folders("eurosat")):
        pictures(root / "eurosat" / "2750" / name, label, 10)
    for label, name in enumerate(folders("resisc45")):
        for part, count in (("train", 3), ("test", 1)):
            pictures(root / "resisc45" / part / name, label, count)
    (root / "MNIST" / "raw").mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.random.default_rng(0).integers(0, 255, (count, 28, 28), dtype=np.uint8)
        files = {"images-idx3": struct.pack(">4i", 2051, count, 28, 28) + images.tobytes()}
        files["labels-idx1"] = struct.pack(">2i", 2049, count) + labels.tobytes()
        for kind, content in files.items():
            (root / "MNIST" / "raw" / f"{part}-{kind}-ubyte").write_bytes(content)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / f"{NAME}.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = load(NAME).model.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


@pytest.fixture(scope="module")
def command(data, weights):
    text = "clip --finetuning-steps 20 --finetuning-batch 16 --finetuning-lr 1e-2 --realignment-steps 1 --shots 1"
    text += " --images 60"
    text += " --conditions ideal --subsets 1 --blocks 2 --ablation-shots --reference 30 --quiet"
    return [
        *text.split(), "--model", NAME, "--pretrained", str(weights), "--data", str(data), "--tasks", *TASKS
    ]  # fmt: skip


@pytest.fixture(scope="module")
def own(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    path = main([*command, "--results", str(folder / "own.jsonl"), "--cache", str(folder / "cache")])
    return path, folder / "cache"


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_every_protection_of_the_real_setting(own):
    found = rows(own[0])
    whole = [row for row in found if row.get("tasks") == list(TASKS)]
    assert {row["protection"] for row in whole if row["condition"] == "ideal"} == set(PROTECTIONS)
    assert all(set(row["accuracy"]) == set(TASKS) for row in whole)
    (uplink,) = (row["uplink"] for row in found if "uplink" in row)
    assert all(0 < mse < 1 for mse in uplink["mse"])
    base, tuned = (
        next(row["accuracy"] for row in whole if row["condition"] == kind) for kind in ("base", "individual")
    )
    assert base != tuned


def test_from_published_checkpoints(own, command, weights, tmp_path):
    """Hugging Face folders of the very models that were fine-tuned here give the very same results."""
    base = load(NAME, weights).model.visual
    for file in own[1].glob("*/*.safetensors"):
        name = file.stem.removeprefix("seed-0-")
        tuned = TaskVector.load(file).apply_to({k: v.clone() for k, v in base.state_dict().items()})
        folder = tmp_path / "published" / name
        folder.mkdir(parents=True)
        save_file(to_hugging_face(tuned), folder / "model.safetensors")
    assert {folder.name for folder in (tmp_path / "published").iterdir()} == set(TASKS)
    options = ["--results", str(tmp_path / "theirs.jsonl"), "--cache", str(tmp_path / "cache")]
    path = main([*command, *options, "--finetuned", str(tmp_path / "published")])
    mine = {json.dumps(row["accuracy"]) for row in rows(own[0]) if row.get("condition") == "individual"}
    assert {json.dumps(row["accuracy"]) for row in rows(path) if row.get("condition") == "individual"} == mine
    same = sum(left == right for left, right in zip(rows(own[0]), rows(path), strict=True))
    assert same >= len(rows(path)) - 2  # base + (tuned - base) may round differently


def test_public_shots(command, data, tmp_path):
    public = tmp_path / "public"
    for label, name in enumerate(("a_cat", "a_dog")):
        pictures(public / name, label, 3)
    options = ["--results", str(tmp_path / "public.jsonl"), "--cache", str(tmp_path / "cache")]
    path = main([*command, *options, "--shots-from", str(public), "--ablation", "both"])
    assert any(row.get("protection") == "both" for row in rows(path))


def test_a_row_does_not_depend_on_what_was_drawn_before(command, own, data, weights, tmp_path):
    """Of its pictures the realignment sees random crops."""
    path, cache = own
    expected = next(row for row in rows(path) if row.get("protection") == "both" and len(row["tasks"]) == 3)
    parser = argparse.ArgumentParser()
    add_options(parser)
    skipped = {"clip", "--quiet"}
    arguments = [word for word in command if word not in skipped]
    del arguments[arguments.index("--data") : arguments.index("--data") + 2]
    protocol = from_options("clip", parser.parse_args(arguments))
    job = Job(0, "ideal", "both", 1, (0, 1, 2))
    states = []
    for drawn in range(2):
        sweep = Sweep(protocol, ClipWorld(protocol, cache, data))
        with torch.random.fork_rng():
            torch.manual_seed(drawn)
            states.append({key: tensor.clone() for key, tensor in sweep.model(job).state_dict().items()})
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert sweep.run(job) == expected


def test_what_a_folder_holds_is_part_of_the_results(command, data, weights, tmp_path):
    for name in ("a_cat", "a_dog"):
        pictures(tmp_path / "public" / name, 0, 3)
    (tmp_path / "theirs" / "mnist").mkdir(parents=True)
    (tmp_path / "theirs" / "mnist" / "model.safetensors").write_bytes(b"one")
    options = {"model": NAME, "pretrained": str(weights), "tasks": ("mnist", "eurosat")}
    own = ClipWorld(replace(CLIP, **options), tmp_path, data)
    assert own.identity() == ClipWorld(replace(CLIP, **options), tmp_path, data).identity()
    (tmp_path / "theirs" / "eurosat").mkdir()
    for change, touched in (
        ({"finetuned": str(tmp_path / "theirs")}, tmp_path / "theirs" / "mnist" / "model.safetensors"),
        ({"shots_from": str(tmp_path / "public")}, tmp_path / "public" / "a_cat" / "0.jpg"),
    ):
        protocol = replace(CLIP, **options, **change)
        before = ClipWorld(protocol, tmp_path, data)
        assert before.identity() == ClipWorld(protocol, tmp_path, data).identity() != own.identity()
        touched.write_bytes(touched.read_bytes() + b"more")
        after = ClipWorld(protocol, tmp_path, data)
        assert after.identity() != before.identity()
        assert after.origin() == before.origin() == own.origin()


def test_missing_sources_are_named_before_anything_is_made(command, tmp_path):
    options = ["--results", str(tmp_path / "none.jsonl"), "--cache", str(tmp_path / "cache")]
    for option in ("--shots-from", "--finetuned"):
        with pytest.raises(FileNotFoundError, match=option[2:].replace("-", "_")):
            main([*command, *options, option, str(tmp_path / "nowhere")])
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named(command, own, weights, tmp_path, capsys):
    options = ["--results", str(tmp_path / "none.jsonl"), "--cache", str(tmp_path / "cache")]
    with pytest.raises(FileNotFoundError, match=r"EuroSAT"):
        main([*command, *options, "--data", str(tmp_path)])
    (tmp_path / "theirs" / "mnist").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"finetuned: there is no folder 'eurosat'"):
        main([*command, *options, "--finetuned", str(tmp_path / "theirs"), "--results", str(tmp_path / "theirs.jsonl")])
    with pytest.raises(SystemExit):
        main([*command, *options, "--tasks", "mnist", "imagenet"])
    assert "tasks: unknown data set 'imagenet'; known are cars, dtd" in capsys.readouterr().err


def test_too_few_samples_of_a_class(command, own, tmp_path):
    options = ["--results", str(tmp_path / "few.jsonl"), "--cache", str(own[1]), "--shots", "50"]
    with pytest.raises(ValueError, match=r"shots"):
        main([*command, *options])


def test_another_base_model_is_refused(command, own, data, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state = load(NAME).model.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "other.safetensors")
    before = own[0].read_bytes()
    with pytest.raises(SystemExit, match=r"another protocol: .*base: expected"):
        main(
            [
                *command,
                "--results",
                str(own[0]),
                "--cache",
                str(own[1]),
                "--pretrained",
                str(tmp_path / "other.safetensors"),
            ]
        )
    assert own[0].read_bytes() == before


def test_the_ready_setting_is_the_papers():
    assert (CLIP.finetuning_steps, CLIP.finetuning_batch, CLIP.shots, CLIP.model) == (
        2000,
        128,
        10,
        "ViT-B-16-quickgelu",
    )
    assert max(CLIP.ablation_shots) * 196 <= 8144  # of cars' training images
    assert [len(class_names(name)) for name in CLIP.tasks] == [196, 47, 10, 43, 10, 45, 397, 10]
