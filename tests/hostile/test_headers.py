"""Safetensors files whose headers lie, for all that read one: an error that names the file, and nothing worse."""

import json
import os
import struct
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from helpers.mutations import MANY
from helpers.readers import READERS, entry, layer, packed, state, unpacked
from rmtllmf._safetensors import LONGEST_HEADER, TensorFile
from rmtllmf.errors import InputError, NonFiniteError
from rmtllmf.taskvec import MaskedVectors, TaskVector, adapter_vector, fuse_files, load_routed
from rmtllmf.taskvec._checkpoint import Checkpoint

NOTE = {"rmtllmf": "task_vector", "version": "1", "tied": "{}"}
W = {"w": entry()}
EIGHT = bytes(8)

HOSTILE = {
    "empty": (b"", "0 bytes long"),
    "cut in the length": (b"abc", "3 bytes long"),
    "a length of 2**63": (struct.pack("<Q", 1 << 63) + b"{}", "header would be 9223372036854775808 bytes"),
    "a length of 2**64 - 1": (struct.pack("<Q", (1 << 64) - 1) + b"{}", "header would be 18446744073709551615 bytes"),
    "a length beyond the file": (packed(W, EIGHT, length=10**6), "header would be 1000000 bytes"),
    "no UTF-8": (packed(b"\xff\xfe{}"), r"cannot be read \('utf-8'"),
    "no JSON": (packed(b"{"), "cannot be read"),
    "lists without end": (packed(b"[" * MANY), "cannot be read.*recursion"),
    "mappings without end": (packed(b'{"a":' * MANY), "cannot be read.*recursion"),
    "a list": (packed(b"[]"), "header is no mapping"),
    "NaN": (packed(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,NaN]}}', EIGHT), "NaN is no number"),
    "infinity in what is not used": (packed(b'{"__metadata__":{"a":-Infinity}}'), "-Infinity is no number"),
    "an endless integer": (packed(b'{"w":' + b"1" * 5000 + b"}"), "cannot be read.*4300"),
    "a name twice": (packed(json.dumps(W)[:-1].encode() + b"," + json.dumps(W)[1:].encode(), EIGHT), "comes twice"),
    "half a character": (packed({"\ud800": entry()}, EIGHT), "cannot be read.*surrogates"),
    "a name without end": (packed({"x" * MANY: entry()}, EIGHT), "a name of 100000 characters"),
    "metadata that are a list": (packed({"__metadata__": [], **W}, EIGHT), "metadata is no mapping"),
    "metadata that are numbers": (packed({"__metadata__": {"a": 1}, **W}, EIGHT), "metadata is no mapping"),
    "an entry that is a number": (packed({"w": 3}, EIGHT), "makes no sense"),
    "an entry without a shape": (packed({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT), "makes no sense"),
    "three offsets": (packed({"w": entry(offsets=(0, 4, 8))}, EIGHT), "makes no sense"),
    "a negative dimension": (packed({"w": entry(shape=(-2,))}, EIGHT), r"shape \[-2\]"),
    "a dimension that is a float": (packed({"w": entry(shape=(2.0,))}, EIGHT), r"shape \[2.0\]"),
    "a dimension that is true": (packed({"w": entry(shape=(True, 2))}, EIGHT), r"shape \[True, 2\]"),
    "a shape in words": (packed({"w": entry() | {"shape": "22"}}, EIGHT), "shape '22'"),
    "a dimension of 2**63": (packed({"w": entry(shape=(2**63,), offsets=(0, 0))}), "shape"),
    "a product that overflows": (packed({"w": entry(shape=(2**40, 2**40), offsets=(0, 0))}), "cannot take 0 bytes"),
    "beside a dimension of 0": (packed({"w": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}), "cannot take 0 bytes"),
    "a product without end": (packed({"w": entry(shape=[2**62] * MANY)}, EIGHT), "has 100000 dimensions"),
    "dimensions without end": (packed({"w": entry(shape=[1] * MANY)}, EIGHT), "has 100000 dimensions"),
    "a shape that needs more": (packed({"w": entry(shape=(3,))}, EIGHT), "cannot take 8 bytes"),
    "negative offsets": (packed({"w": entry(offsets=(-8, 0))}, EIGHT), "offsets -8 to 0"),
    "offsets in the wrong order": (packed({"w": entry(offsets=(8, 0))}, EIGHT), "offsets 8 to 0"),
    "offsets beyond the file": (packed({"w": entry(offsets=(0, 2**62))}, EIGHT), "offsets 0 to 4611686018427387904"),
    "tensors that overlap": (packed({"v": entry(), "w": entry(offsets=(4, 12))}, bytes(12)), "overlap"),
    "one place for two": (packed({"v": entry(), "w": entry()}, EIGHT), "overlap"),
    "a gap": (packed({"v": entry(), "w": entry(offsets=(12, 20))}, bytes(20)), "leave a gap"),
    "bytes at the end": (packed(W, bytes(12)), "4 bytes at its end"),
    "an unknown dtype": (packed({"w": entry("F7")}, EIGHT), "of dtype 'F7'; known are F64"),
    "a dtype that is a list": (packed({"w": entry(["F32"])}, EIGHT), r"of dtype \['F32'\]"),
    "a dtype without end": (packed({"w": entry("F" * MANY)}, EIGHT), "of dtype 'FFFF"),
    "complex numbers": (packed({"w": entry("C64", (1,))}, EIGHT), "of dtype 'C64'"),
}  # fmt: skip


def _adapter(path):
    folder = path.parent / "adapter"
    folder.mkdir(exist_ok=True)
    path.rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    return adapter_vector(folder, prefix="")


def _fused(path):
    save_file({"w": torch.zeros(2)}, path.parent / "base.safetensors")
    fuse_files(path.parent / "base.safetensors", [path], path.parent / "out.safetensors")


OPENED_BY = {
    "between": lambda path: TaskVector.between({"w": torch.zeros(2)}, path),
    "load": TaskVector.load,
    "masked": MaskedVectors.load,
    "adapter": _adapter,
    "base of an adapter": lambda path: adapter_vector(torch.nn.Linear(1, 1), base=path),
    "routed": lambda path: load_routed(layer(), path),
    "fuse_files": _fused,
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_header_that_lies(content, message, tmp_path):
    for name, read in OPENED_BY.items():
        folder = tmp_path / name
        folder.mkdir()
        path = folder / "x.safetensors"
        path.write_bytes(content)
        start = time.monotonic()
        with pytest.raises(InputError, match=message) as error:
            read(path)
        assert str(folder) in str(error.value)
        assert len(str(error.value)) < 10_000
        assert time.monotonic() - start < 20  # of a second, on a machine that has nothing else to do


def test_what_is_unusual_and_right_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    for header, data in (
        ({"w": entry()}, EIGHT),
        (json.dumps({"w": entry()}).encode() + b"   ", EIGHT),  # tensors at addresses that are not aligned
        ({"__metadata__": {}, "w": entry()}, EIGHT),
    ):
        path.write_bytes(packed(header, data))
        assert TaskVector.between({"w": torch.ones(2)}, path)["w"].tolist() == [-1.0, -1.0]
    path.write_bytes(
        packed({"none": entry(shape=(0, 3), offsets=(0, 0)), "number": entry(shape=(), offsets=(0, 4))}, bytes(4))
    )
    file = TensorFile(path, "path")
    assert file["none"].shape == (0, 3)
    assert file["number"].shape == ()


def test_headers_of_a_hundred_megabytes_are_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", LONGEST_HEADER + 8))
        file.truncate(LONGEST_HEADER + 100)  # a hole, which takes no place
    with pytest.raises(InputError, match="header would be 100000008 bytes"):
        TaskVector.load(path)


@pytest.mark.skipif(sys.platform != "linux", reason="files with holes that are larger than memory")
def test_a_file_that_is_larger_than_memory(tmp_path):
    """Of holes, so that it takes no place: the allocation fails, or nothing is allocated."""
    size = 1 << 43
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed({"__metadata__": NOTE, "w": entry("U8", (size,), (0, size))}))
    try:
        os.truncate(path, path.stat().st_size + size)
    except OSError:
        pytest.skip("the file system has no files of that size")
    with pytest.raises(InputError, match=r"'w' has 8796093022208 bytes, too many to read"):
        TaskVector.load(path)
    path.write_bytes(packed({"w": entry("U8", (size,), (0, size))}))
    os.truncate(path, path.stat().st_size + size)
    with pytest.raises(InputError, match=r"'w' has 8796093022208 bytes, too many to read"):
        TaskVector.between({"w": torch.zeros(2)}, path)
    with pytest.raises(InputError, match=r"'w' has 8796093022208 bytes, too many to read"):
        Checkpoint(path, "base")["w"]


def test_numbers_that_are_none(tmp_path):
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        path = tmp_path / "x.safetensors"
        save_file({"w": torch.tensor([1.0, torch.nan]).to(dtype)}, path, NOTE)
        with pytest.raises(NonFiniteError, match=rf"path: '{path}'\['w'\] holds 1 non-finite"):
            TaskVector.load(path)
        save_file({"w": torch.tensor([1.0, torch.nan]).to(dtype)}, path)
        with pytest.raises(NonFiniteError, match=r"finetuned\['w'\] - base\['w'\] holds NaN"):
            TaskVector.between({"w": torch.zeros(2).to(dtype)}, path)


def test_booleans_that_are_neither(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed({"mask": entry("BOOL")} | {"mask": entry("BOOL", (2,), (0, 2))}, b"\1\2"))
    with pytest.raises(InputError, match="'mask' is of dtype BOOL, but holds 2"):
        TaskVector.between({"mask": torch.tensor([True, False])}, path)


@pytest.mark.parametrize("without_preadv", [False, True])
def test_a_file_that_is_cut_while_it_is_read(without_preadv, tmp_path, monkeypatch):
    if without_preadv:
        monkeypatch.delattr(os, "preadv", raising=False)
    path = tmp_path / "x.safetensors"
    save_file(state(), path)
    file = TensorFile(path, "base")
    assert torch.equal(file["fc.weight"], state()["fc.weight"])
    assert set(file) == set(state())
    os.truncate(path, path.stat().st_size - 20)
    with pytest.raises(InputError, match=rf"base: '{path}' was cut short while it was read"):
        dict(file)
    with pytest.raises(InputError, match="was changed while it was read"):
        file.check_unchanged()
    file.close()
    with pytest.raises(InputError, match="is closed"):
        file["fc.weight"]


def test_what_was_loaded_does_not_change_with_the_file(tmp_path):
    """Nothing is mapped: what was found to be finite stays so, whoever writes to the file."""
    path = tmp_path / "x.safetensors"
    TaskVector({"w": torch.ones(3)}).save(path)
    vector = TaskVector.load(path)
    header, _ = unpacked(path.read_bytes())
    with open(path, "r+b") as file:
        file.seek(-12, os.SEEK_END)
        file.write(struct.pack("<3f", *[float("nan")] * 3))
    assert vector["w"].tolist() == [1.0] * 3
    assert header["w"]["shape"] == [3]
    os.truncate(path, 8)
    assert vector["w"].sum() == 3


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors where Linux lists them")
def test_no_file_stays_open(tmp_path):
    for name, reader in READERS.items():
        folder = tmp_path / name
        folder.mkdir()
        reader.make(folder)
        reader.read(folder)  # what is opened once and for all (claims of results)
        before = len(os.listdir("/proc/self/fd"))
        for content in (None, b"", b"{", packed(W, EIGHT)):
            for path in sorted(folder.rglob("*.safetensors")) if content is not None else ():
                path.write_bytes(content)
            try:
                reader.read(folder)
            except (ValueError, FileNotFoundError) as error:
                error.__traceback__ = None
        assert len(os.listdir("/proc/self/fd")) <= before, name
