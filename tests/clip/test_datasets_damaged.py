"""Data sets with classes, images or labels that are missing, unknown or damaged."""

import shutil

import pytest

from helpers.dataset_folders import MAKERS, NAMES, make_eurosat, make_gtsrb, make_mnist, make_sun397, make_svhn
from rmtllmf.clip.datasets import load_dataset
from rmtllmf.errors import InputError

pytestmark = pytest.mark.usefixtures("any_checksum")


@pytest.mark.parametrize(
    ("name", "folder", "one"),
    [
        ("eurosat", "eurosat/2750", "River"),
        ("gtsrb", "gtsrb/GTSRB/Training", "00007"),
        ("resisc45", "resisc45/NWPU-RESISC45", "sea_ice"),
        ("sun397", "SUN397", "j/jail_cell"),
    ],
)
def test_class_folders(name, folder, one, tmp_path):
    MAKERS[name](tmp_path)
    path = tmp_path / folder
    short = one.removeprefix("j/")
    shutil.copytree(path / one, path / f"{one}_2")
    with pytest.raises(
        InputError, match=rf"root: expected the {len(NAMES[name])} classes in .*, but '{short}_2' unexp"
    ):
        load_dataset(name, tmp_path)
    shutil.rmtree(path / one)
    with pytest.raises(InputError, match=rf"but '{short}' missing and '{short}_2' unexpected$"):
        load_dataset(name, tmp_path)
    shutil.rmtree(path / f"{one}_2")
    with pytest.raises(InputError, match=rf"{path.name}.*, but '{short}' missing$"):
        load_dataset(name, tmp_path)
    (path / one).mkdir()
    with pytest.raises(InputError, match=rf"root: .*{short}"):
        load_dataset(name, tmp_path)


def test_an_unexpected_class_in_the_list_of_sun397(tmp_path):
    make_sun397(tmp_path, 1)
    with (tmp_path / "SUN397" / "ClassName.txt").open("a") as file:
        file.write("/z/zoo\n")
    with pytest.raises(InputError, match=r"the 397 classes in .*ClassName.txt, but 'zoo' unexpected"):
        load_dataset("sun397", tmp_path)


def test_a_class_of_one_image_is_too_little_for_two_parts(tmp_path):
    make_eurosat(tmp_path, 1)
    with pytest.raises(
        InputError,
        match=r"images of all 10 classes in the training part of EuroSAT in .*, got none of 'AnnualCrop', 'Forest', "
        r"'HerbaceousVegetation' and 7 more",
    ):
        load_dataset("eurosat", tmp_path)


def test_an_empty_class_where_labels_are_in_files(tmp_path):
    make_mnist(tmp_path, digits=[0, 1, 2, 3, 4, 5, 6, 8, 9])
    with pytest.raises(InputError, match=r"all 10 classes in the training part of MNIST in .*, got none of '7'"):
        load_dataset("mnist", tmp_path)


def test_labels_out_of_range(tmp_path):
    make_mnist(tmp_path, digits=range(11))
    with pytest.raises(InputError, match=r"labels of 10 classes in MNIST/raw, got 10"):
        load_dataset("mnist", tmp_path)
    make_gtsrb(tmp_path)
    with (tmp_path / "gtsrb" / "GT-final_test.csv").open("a") as file:
        file.write("00000.ppm;12;12;1;1;11;11;43\n")
    with pytest.raises(InputError, match=r"labels of 43 classes in GTSRB's test part, got 43"):
        load_dataset("gtsrb", tmp_path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cars", "stanford_cars/cars_test/00003.jpg"),
        ("dtd", "dtd/dtd/images/woven/woven_val.jpg"),
        ("gtsrb", "gtsrb/GTSRB/Final_Test/Images/00009.ppm"),
    ],
)
def test_an_image_that_a_list_names_is_missing(name, file, tmp_path):
    MAKERS[name](tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(InputError, match=rf"root: .* names '.*{file.rpartition('/')[2]}', not found"):
        load_dataset(name, tmp_path)


@pytest.mark.parametrize("size", [0, 40, 150])
@pytest.mark.parametrize(
    ("name", "file"), [("mnist", "MNIST/raw/train-images-idx3-ubyte"), ("cars", "stanford_cars/devkit/cars_meta.mat")]
)
def test_damaged_files(name, file, size, tmp_path):
    MAKERS[name](tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:size])
    with pytest.raises(InputError, match=r"root: torchvision cannot read (MNIST|Stanford Cars) in '.*' \("):
        load_dataset(name, tmp_path)


def test_a_wrong_checksum(tmp_path, monkeypatch):
    make_svhn(tmp_path)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"root: torchvision cannot read SVHN in '.*' \(.*corrupted"):
        load_dataset("svhn", tmp_path)


def test_processed_mnist_is_not_loaded(tmp_path):
    make_mnist(tmp_path)
    (tmp_path / "MNIST" / "processed").mkdir()
    for file in ("training.pt", "test.pt"):
        (tmp_path / "MNIST" / "processed" / file).write_bytes(b"any pickle")
    with pytest.raises(InputError, match=r"root: expected no 'processed' in '.*MNIST'"):
        load_dataset("mnist", tmp_path)
