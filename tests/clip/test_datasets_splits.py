"""Which images train and which test: random by class, by official lists, or by folders."""

import importlib
import shutil
from collections import Counter

import pytest
import torch

from helpers.dataset_folders import SPLIT, TEST, agrees, files, make_eurosat, make_resisc45, make_sun397, picture
from rmtllmf.clip.datasets import load_dataset
from rmtllmf.clip.prompts import folders
from rmtllmf.errors import InputError

pytestmark = pytest.mark.usefixtures("any_checksum")


@pytest.mark.parametrize("name", ["eurosat", "resisc45", "sun397"])
def test_random_splits(name, root, monkeypatch):
    data = load_dataset(name, root)
    train, test = files(data)
    assert not {*train} & {*test}
    assert len({*train}) == len(train)
    assert (train, test) == (sorted(train), sorted(test))
    for part in (data.train, data.test):
        assert len(set(Counter(part.targets).values())) == 1
    torch.manual_seed(5)
    assert files(load_dataset(name, root)) == [train, test]
    other = load_dataset(name, root, seed=1)
    agrees(name, other)
    assert files(other) != [train, test]
    assert other.split.endswith("seed 1")
    if name == "sun397":  # torchvision lists them as the file system does
        sun397 = importlib.import_module("torchvision.datasets.sun397")
        glob = sun397.Path.rglob
        monkeypatch.setattr(sun397.Path, "rglob", lambda self, pattern: sorted(glob(self, pattern), reverse=True))
        backwards = load_dataset(name, root)
        assert backwards.train.source._image_files != data.train.source._image_files
        assert files(backwards) == [train, test]


def test_a_random_split_of_a_class_knows_nothing_of_the_others(tmp_path):
    make_eurosat(tmp_path)
    before = files(load_dataset("eurosat", tmp_path))
    for index in range(10, 30):
        picture("eurosat", "forest", tmp_path / "eurosat" / "2750" / "Forest" / f"Forest_{index + 1}.jpg")
    data = load_dataset("eurosat", tmp_path)
    assert (Counter(data.train.targets)[1], Counter(data.test.targets)[1]) == (24, 3)
    for old, new in zip(before, files(data), strict=True):
        assert [path for path in old if "Forest" not in path] == [path for path in new if "Forest" not in path]


def test_sizes_of_the_real_random_splits():
    """27,000 images of EuroSAT, 31,500 of RESISC45 and 108,754 of SUN397 make the parts of the literature."""
    check = importlib.import_module("rmtllmf.clip._data_check")
    readers = importlib.import_module("rmtllmf.clip._data_readers")
    eurosat = [3000, 3000, 3000, 2500, 2500, 2000, 2500, 3000, 2500, 3000]
    for sizes, counts, expected in (
        (readers.eurosat_sizes, eurosat, (21600, 2700)),
        (readers.resisc45_sizes, [700] * 45, (18900, 6300)),
        (readers.sun397_sizes, [100] * 200 + [2361] * 197, (19850, 19850)),
    ):
        targets = [label for label, count in enumerate(counts) for _ in range(count)]
        names = [f"{label}/{index}" for index, label in enumerate(targets)]
        train, test = check.by_class(targets, names, sizes, 0)
        assert (len(train), len(test)) == expected
        assert not {*train} & {*test}


def test_sun397_by_its_official_lists(tmp_path):
    make_sun397(tmp_path, order=-1)
    home = tmp_path / "SUN397"
    lists = {
        part: [f"/{folder[0]}/{folder}/sun_{index:016d}.jpg" for folder in folders("sun397") for index in numbers]
        for part, numbers in (("Training", (3, 0)), ("Testing", (1,)))
    }
    agrees("sun397", load_dataset("sun397", tmp_path))  # by the names, though ClassName.txt is in another order
    (home / "Training_01.txt").write_text("\n".join(lists["Training"]))
    with pytest.raises(InputError, match=r"root: a split in two lists names '.*Testing_01.txt', not found"):
        load_dataset("sun397", tmp_path)
    (home / "Testing_01.txt").write_text("\n".join(lists["Testing"]) + "\n")
    data = load_dataset("sun397", tmp_path)
    agrees("sun397", data)
    assert data.split == "official partition 1: Training_01.txt and Testing_01.txt"
    for found, part in zip(files(data), lists.values(), strict=True):
        assert found == [str(home) + file for file in part]
    (home / "Testing_01.txt").write_text("\n".join(lists["Testing"][:-1] + lists["Training"][:1]))
    with pytest.raises(InputError, match=r"every image at most once in .*Training_01.txt and .*Testing_01.txt"):
        load_dataset("sun397", tmp_path)
    (home / "Testing_01.txt").write_text("\n".join(["/a/abbey/sun_none.jpg", *lists["Testing"]]))
    with pytest.raises(InputError, match=r"Testing_01.txt names 'a/abbey/sun_none.jpg', not found"):
        load_dataset("sun397", tmp_path)
    (home / "Testing_01.txt").write_text("\n".join(lists["Testing"][1:]))
    with pytest.raises(
        InputError, match=r"images of all 397 classes in the test part of SUN397 .* got none of 'abbey'"
    ):
        load_dataset("sun397", tmp_path)


def test_resisc45_by_folders_and_by_lists(tmp_path):
    make_resisc45(tmp_path)
    agrees("resisc45", load_dataset("resisc45", tmp_path))
    stems = folders("resisc45")
    for part, numbers in (("train", (1, 5)), ("test", (3,))):
        lines = [f"{stem}_{number:03d}.jpg" for stem in stems for number in numbers]
        (tmp_path / "resisc45" / f"resisc45-{part}.txt").write_text("\n".join(lines) + "\n")
    data = load_dataset("resisc45", tmp_path)
    agrees("resisc45", data)
    assert data.split == "lists resisc45-train.txt and resisc45-test.txt"
    assert {path[-7:] for path in files(data)[0]} == {"001.jpg", "005.jpg"}
    assert {path[-7:] for path in files(data)[1]} == {"003.jpg"}
    make_resisc45(tmp_path, "train", 2)
    agrees("resisc45", load_dataset("resisc45", tmp_path))
    assert load_dataset("resisc45", tmp_path).split.startswith("lists")  # a training folder alone is no split
    make_resisc45(tmp_path, "test", 1, TEST)
    data = load_dataset("resisc45", tmp_path)
    agrees("resisc45", data)
    assert (len(data.train), len(data.test), data.split) == (90, 45, "folders train and test")
    assert data.test[0][0].size == (TEST, TEST)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "resisc45" / "NWPU-RESISC45", tmp_path / "elsewhere")
    data = load_dataset("resisc45", tmp_path / "elsewhere")
    agrees("resisc45", data)
    assert data.split == SPLIT["resisc45"]
