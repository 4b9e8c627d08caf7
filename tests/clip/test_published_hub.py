"""Published checkpoints by their names on the hub: folders first, and every way that a download fails."""

import sys

import huggingface_hub
import pytest
from huggingface_hub.utils import LocalEntryNotFoundError, RepositoryNotFoundError, filter_repo_objects

from helpers.published_tower import same, tuned, written
from rmtllmf.clip.published import PUBLISHED, load_finetuned
from rmtllmf.errors import InputError

HUB = "owner/clip-tuned"


def test_a_name_on_the_hub(tmp_path, base, monkeypatch):
    expected = tuned(base)
    folder = written(tmp_path / "snapshot", expected)
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same(load_finetuned(HUB, base, cache_dir=tmp_path / "cache", revision="v1"), expected)
    assert same(load_finetuned(PUBLISHED["cars"].name, base), expected)
    assert [name for name, _ in asked] == [HUB, "tanganke/clip-vit-base-patch16_stanford-cars"]
    assert [options["revision"] for _, options in asked] == ["v1", None]
    assert [options["cache_dir"] for _, options in asked] == [str(tmp_path / "cache"), None]
    patterns = {key: value for key, value in asked[0][1].items() if key.endswith("_patterns")}
    there = [
        "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "README.md", "preprocessor_config.json",
        "onnx/model.safetensors", "onnx/config.json", "run.py", "model.safetensors.pkl",
    ]  # fmt: skip
    assert list(filter_repo_objects(there, **patterns)) == there[:4]


def test_a_folder_goes_before_the_hub(tmp_path, base, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    expected = tuned(base)
    written(tmp_path / HUB, expected)
    assert same(load_finetuned(HUB, base), expected)
    with pytest.raises(InputError, match=rf"revision: '{HUB}' is a local path"):
        load_finetuned(HUB, base, revision="main")


def failing(monkeypatch, error):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def test_a_hub_that_cannot_be_reached(tmp_path, base, monkeypatch):
    for error in (LocalEntryNotFoundError("no connection"), ConnectionError("offline")):
        failing(monkeypatch, error)
        with pytest.raises(FileNotFoundError, match=rf"'{HUB}' is no local path.*cannot be reached.*hf download {HUB}"):
            load_finetuned(HUB, base)


def test_the_real_hub_package_without_a_network(tmp_path, base, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"not in the cache, and the Hugging Face hub cannot be reached"):
        load_finetuned(HUB, base, cache_dir=tmp_path)
    with pytest.raises(InputError, match=r"where: 'owner/a--b' is neither a local path nor a name on the hub"):
        load_finetuned("owner/a--b", base, cache_dir=tmp_path)
    # a cache as the hub's package fills it
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--owner--clip-tuned"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots").mkdir()
    expected = tuned(base)
    written(folder / "snapshots" / commit, expected)
    assert same(load_finetuned(HUB, base, cache_dir=tmp_path), expected)
    (folder / "snapshots" / commit / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .safetensors file on the hub \(or, without a connection"):
        load_finetuned(HUB, base, cache_dir=tmp_path)


def test_a_model_that_the_hub_does_not_have(base, monkeypatch):
    failing(monkeypatch, RepositoryNotFoundError.__new__(RepositoryNotFoundError))
    with pytest.raises(FileNotFoundError, match=rf"neither a local path nor a model on the hub: '{HUB}'$"):
        load_finetuned(HUB, base)
    with pytest.raises(FileNotFoundError, match=rf"'{HUB}' with the revision 'v9'$"):
        load_finetuned(HUB, base, revision="v9")


def test_other_errors_of_a_download_are_left_alone(base, monkeypatch):
    failing(monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        load_finetuned(HUB, base)


def test_without_the_hub_package(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"no folder 'owner/clip-tuned'.*pip install huggingface_hub"):
        load_finetuned(HUB, base)


def test_what_is_neither_a_path_nor_a_name(tmp_path, base):
    for bad in ("nothing", tmp_path / "nothing", "a/b/c", "owner/model.safetensors", "./owner/x", "owner/", "ö/x"):
        with pytest.raises(FileNotFoundError, match=r"where: there is no file or folder .*owner/name"):
            load_finetuned(bad, base)
    for bad in (3, None, b"owner/name", base):
        with pytest.raises(TypeError, match="where: expected a path or a name owner/name on the hub, got"):
            load_finetuned(bad, base)
    for bad in ("", "a\0b"):
        with pytest.raises(InputError, match="where: expected a path or a name"):
            load_finetuned(bad, base)
