"""Folders from others: names, links and things that are no files lead nowhere, neither for reading nor for writing."""

import json
import os
import shutil
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.readers import _make_adapter, sharded, state
from paper.results import Results, ResultsError
from rmtllmf.errors import InputError
from rmtllmf.taskvec import MaskedVectors, TaskVector, adapter_vector, fuse_files, low_rank
from rmtllmf.taskvec._checkpoint import Checkpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links and pipes of POSIX")

INDEX = "model.safetensors.index.json"


@pytest.fixture
def secret(tmp_path):
    """A model that is somebody else's."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    save_file(state(), folder / "secret.safetensors")
    (folder / "secret.json").write_text('{"password": "1234"}')
    return folder


def indexed(folder, shard, extra=None):
    folder.mkdir(exist_ok=True)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"fc.weight": shard, **(extra or {})}}))
    return folder


@pytest.mark.parametrize(
    "shard",
    [
        "../elsewhere/secret.safetensors",
        "{absolute}/secret.safetensors",
        "sub/../secret.safetensors",
        "./a.safetensors",
        "",
        "..",
        "x.bin",
        7,
        None,
        ["a.safetensors"],
        {"a": 1},
        "x" * 100_000,
    ],
    ids=str,
)
def test_an_index_names_files_beside_it_only(shard, tmp_path, secret):
    shard = shard.format(absolute=secret) if isinstance(shard, str) else shard
    with pytest.raises(
        InputError, match=r"base: the index names the shard .*expected the plain name of a file"
    ) as error:
        Checkpoint(indexed(tmp_path / "f", shard), "base")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("gone.safetensors", "the shard 'gone.safetensors' that the index names for 'fc.weight' is missing"),
        ("\0.safetensors", "is missing"),
        ("x" * 1000 + ".safetensors", "is missing"),
    ],
)
def test_shards_that_are_not_there(shard, message, tmp_path):
    with pytest.raises(FileNotFoundError, match=message):
        Checkpoint(indexed(tmp_path / "f", shard), "base")


def a_pipe(path):
    os.mkfifo(path)


def a_folder(path):
    path.mkdir()


def a_device(path):
    path.symlink_to("/dev/zero")


def a_circle(path):
    path.symlink_to(path)


def a_link(path):
    path.symlink_to(path.parent.parent / "elsewhere" / "secret.safetensors")


def a_link_by_way_of_another(path):
    (path.parent / "other").symlink_to(path.parent.parent / "elsewhere")
    path.symlink_to("other/secret.safetensors")


@pytest.mark.parametrize(
    ("planted", "error", "message"),
    [
        (a_pipe, InputError, "is no regular file"),
        (a_folder, InputError, "is no regular file"),
        (a_device, InputError, "is a link that leads out of its folder, to '/dev/zero'"),
        (a_circle, FileNotFoundError, "missing|no file"),
        (a_link, InputError, "is a link that leads out of its folder, to .*secret"),
        (a_link_by_way_of_another, InputError, "is a link that leads out of its folder, to .*secret"),
    ],
)
def test_what_is_planted_in_a_folder_is_not_read(planted, error, message, tmp_path, secret):
    """As the shard of an index, as the only file of a folder, as the weights and the configuration of an adapter."""
    folder = indexed(tmp_path / "shards", "a.safetensors")
    planted(folder / "a.safetensors")
    with pytest.raises(error, match=message):
        Checkpoint(folder, "base")
    folder = tmp_path / "single"
    folder.mkdir()
    planted(folder / "model.safetensors")
    with pytest.raises((error, FileNotFoundError), match=f"{message}|there is no"):
        Checkpoint(folder, "base")
    for part in ("adapter_model.safetensors", "adapter_config.json"):
        folder = tmp_path / part
        folder.mkdir()
        _make_adapter(folder)
        (folder / "adapter" / part).unlink()
        (folder / "elsewhere").symlink_to(secret)
        planted(folder / "adapter" / part)
        with pytest.raises((error, FileNotFoundError), match=f"{message}|holds no"):
            adapter_vector(folder / "adapter")


@pytest.mark.parametrize("read", [TaskVector.load, MaskedVectors.load, lambda path: TaskVector.between(state(), path)])
@pytest.mark.parametrize("planted", [a_pipe, a_folder])
def test_what_is_no_file_is_not_read(planted, read, tmp_path):
    """And is not waited for: a pipe without a writer blocks whoever opens it."""
    path = tmp_path / "x.safetensors"
    planted(path)
    with pytest.raises(InputError, match=rf"'{path}'(, found none| is no regular file)"):
        read(path)
    path = tmp_path / "device.safetensors"
    path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match="is no regular file"):
        read(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read(tmp_path / "gone.safetensors")
    with pytest.raises(InputError, match="is no path"):
        read(str(tmp_path / "a\0b.safetensors"))


def test_results_are_not_read_from_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(ResultsError, match="is no regular file"):
            Results(tmp_path / name, {}, key=str)


def test_a_file_that_was_asked_for_may_be_a_link(tmp_path, secret):
    link = tmp_path / "mine.safetensors"
    link.symlink_to(secret / "secret.safetensors")
    assert set(Checkpoint(link, "base").specs) == set(state())
    assert TaskVector.between(state(1), link)
    (tmp_path / "folder").symlink_to(secret)
    assert set(Checkpoint(tmp_path / "folder", "base").specs) == set(state())


def test_links_within_a_folder_and_into_the_hubs_cache(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    save_file(state(), folder / "weights-v1.safetensors")
    (folder / "model.safetensors").symlink_to("weights-v1.safetensors")
    assert set(Checkpoint(folder, "base").specs) == set(state())

    hub = tmp_path / "models--org--name"
    snapshot = hub / "snapshots" / "0123"
    (hub / "blobs").mkdir(parents=True)
    (snapshot / "adapter").mkdir(parents=True)
    save_file(state(), hub / "blobs" / "abc")
    (hub / "blobs" / "config").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    (snapshot / "config.json").symlink_to("../../blobs/config")
    fuse_files(snapshot, [snapshot], tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    _make_adapter(tmp_path)
    for part in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.move(tmp_path / "adapter" / part, hub / "blobs" / part)
        (snapshot / "adapter" / part).symlink_to(f"../../../blobs/{part}")
    assert set(adapter_vector(snapshot / "adapter")) == {"fc.weight"}
    # what only looks like one
    fake = tmp_path / "snapshots" / "0123"
    fake.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    shutil.copy(hub / "blobs" / "abc", tmp_path / "blobs" / "abc")
    (fake / "model.safetensors").symlink_to("../../blobs/abc")
    with pytest.raises(InputError, match="leads out of its folder"):
        Checkpoint(fake, "base")


def test_an_index_is_no_link_out_of_the_folder_either(tmp_path, secret):
    sharded(tmp_path / "f", state())
    shutil.move(tmp_path / "f" / INDEX, secret / INDEX)
    (tmp_path / "f" / INDEX).symlink_to(secret / INDEX)
    with pytest.raises(InputError, match="leads out of its folder"):
        Checkpoint(tmp_path / "f", "base")


def test_what_is_copied_beside_the_weights_is_the_folders_own(tmp_path, secret):
    """Else a folder could have a private file published with the fused model."""
    for name, seed in (("base", 0), ("tuned", 1)):
        sharded(tmp_path / name, state(seed))
    (tmp_path / "base" / "tokenizer.json").symlink_to(secret / "secret.json")
    with pytest.raises(InputError, match=r"base: .*tokenizer.json' is a link that leads out of its folder"):
        fuse_files(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "out", lambda vectors: pytest.fail("too late"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "elsewhere", "tuned"]
    (tmp_path / "base" / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "base" / "tokenizer.json")  # no file, and left where it is
    fuse_files(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.safetensors", "b.safetensors", "config.json", INDEX
    ]  # fmt: skip


@pytest.fixture
def pair(tmp_path):
    for seed in (0, 1):
        save_file(state(seed), tmp_path / f"{seed}.safetensors")
    return tmp_path / "0.safetensors", [tmp_path / "1.safetensors"]


VICTIM = "somebody's notes\n"


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_nothing_is_written_through_what_is_planted_beside_the_target(link, tmp_path, pair):
    victim = tmp_path / "victim"
    victim.write_text(VICTIM)
    out = tmp_path / "out.safetensors"
    link(victim, tmp_path / ".out.safetensors.part.journal")
    with pytest.raises(InputError, match=r"out: .*\.part\.journal' is (a link|no file of its own)"):
        fuse_files(*pair, out)
    assert victim.read_text() == VICTIM
    os.unlink(tmp_path / ".out.safetensors.part.journal")
    link(victim, tmp_path / ".out.safetensors.part")
    fuse_files(*pair, out)
    assert victim.read_text() == VICTIM
    assert set(load_file(out)) == set(state())
    assert not out.is_symlink()
    assert out.stat().st_nlink == 1


@pytest.mark.parametrize("planted", ["file", "folder"])
def test_a_run_does_not_go_on_in_what_was_put_in_place_of_its_parts(planted, tmp_path, pair, monkeypatch):
    """Even if the journal says that it is about this very run."""
    out = tmp_path / ("out.safetensors" if planted == "file" else "out")
    part = tmp_path / f".{out.name}.part"

    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rmtllmf.taskvec._checkpoint_writer.Files.done", stop)
        with pytest.raises(KeyboardInterrupt):
            fuse_files(*pair, out)
    moved = part.rename(tmp_path / "moved")
    part.symlink_to(moved)
    file = moved if planted == "file" else moved / "0.safetensors"
    before = file.read_bytes()
    os.utime(file, (1, 1))
    fuse_files(*pair, out)
    assert (file.read_bytes(), file.stat().st_mtime) == (before, 1)
    assert not out.is_symlink()


def test_a_pipe_in_place_of_the_journal_is_not_waited_for(tmp_path, pair):
    os.mkfifo(tmp_path / ".out.safetensors.part.journal")
    failed = []

    def run():
        try:
            fuse_files(*pair, tmp_path / "out.safetensors")
        except InputError as error:
            failed.append(str(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert len(failed) == 1
    assert "no file of its own" in failed[0]


@pytest.mark.parametrize("save", ["vector", "adapter"])
def test_a_target_that_is_a_link_is_replaced_or_refused_not_followed(save, tmp_path):
    victim = tmp_path / "victim"
    if save == "vector":
        victim.write_text(VICTIM)
        (tmp_path / "v.safetensors").symlink_to(victim)
        TaskVector({"w": torch.ones(2)}).save(tmp_path / "v.safetensors")
        assert not (tmp_path / "v.safetensors").is_symlink()
        assert victim.read_text() == VICTIM
    else:
        victim.mkdir()
        (tmp_path / "adapter").symlink_to(victim)
        with pytest.raises(FileExistsError, match="folder"):
            low_rank({"fc.weight": torch.ones(2, 2)}, 1).save_adapter(tmp_path / "adapter", overwrite=True)
        assert not list(victim.iterdir())
