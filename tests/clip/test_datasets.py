"""The eight data sets: labels, transforms and few shots, whatever the order of their lists of classes."""

import pickle
import shutil
from collections import Counter

import pytest
from torch.utils.data import DataLoader
from torchvision.transforms import ToTensor

from helpers.dataset_folders import SIZES, SPLIT, TEST, TRAIN, agrees, make_cars, make_dtd
from rmtllmf.clip import datasets as module
from rmtllmf.clip.datasets import DATASETS, fewest_per_class, load_dataset
from rmtllmf.clip.prompts import class_names, templates
from rmtllmf.errors import InputError
from rmtllmf.resilience import few_shot

pytestmark = pytest.mark.usefixtures("any_checksum")


@pytest.mark.parametrize("name", DATASETS)
def test_labels_mean_what_the_images_show(name, root):
    data = load_dataset(name, root)
    agrees(name, data)
    assert (len(data.train), len(data.test)) == SIZES[name]
    assert (data.name, data.templates, data.split) == (name, templates(name), SPLIT[name])
    if name in ("cars", "dtd", "gtsrb"):
        assert {image.size for image, _ in data.train} == {(TRAIN, TRAIN)}
        assert {image.size for image, _ in data.test} == {(TEST, TEST)}


@pytest.mark.parametrize("name", DATASETS)
def test_each_part_has_its_transform(name, root):
    seen = {}
    data = load_dataset(
        name,
        str(root),
        train_transform=lambda image: (seen.setdefault("train", image.mode), ToTensor()(image))[1],
        transform=lambda image: (seen.setdefault("test", image.mode), -ToTensor()(image))[1],
    )
    images, labels = next(iter(DataLoader(data.train, batch_size=2)))
    assert images.shape[:2] == (2, 3)
    assert labels.tolist() == data.train.targets[:2]
    assert images.min() >= 0
    assert data.test[-1][0].max() <= 0
    assert seen == {"train": "RGB", "test": "RGB"}
    assert len(pickle.dumps(load_dataset(name, root, transform=ToTensor()).test)) > 0  # as workers need it


@pytest.mark.parametrize("name", DATASETS)
def test_few_shot_without_loading_an_image(name, root, monkeypatch):
    shots = {"cars": 1, "dtd": 2, "eurosat": 8, "gtsrb": 2, "mnist": 3, "resisc45": 3, "sun397": 2, "svhn": 3}[name]
    data = load_dataset(name, root)
    assert fewest_per_class(data) == (data.classes[0], shots)
    with monkeypatch.context() as patch:
        patch.setattr(module.Images, "__getitem__", lambda self, index: pytest.fail("an image was loaded"))
        one = few_shot(data.train, 1, seed=1)
        again = few_shot(load_dataset(name, root).train, 1, seed=1)
        with pytest.raises(InputError, match=rf"shots: expected at least {shots + 1} samples .* class 0 has {shots}"):
            few_shot(data.train, shots + 1, seed=1)
    assert one.indices == again.indices
    assert sorted(label for _, label in one) == list(range(len(data.classes)))
    most = Counter(data.train.targets[index] for index in few_shot(data.train, shots, seed=0).indices)
    assert most == dict.fromkeys(range(len(data.classes)), shots)


def test_cars_by_their_names(tmp_path):
    """Whatever the order of the meta file, and with the one name that copies of it spell differently."""
    meta = [name.replace("C/V", "C-V") for name in class_names("cars")[::-1]]
    make_cars(tmp_path, meta)
    agrees("cars", load_dataset("cars", tmp_path))
    shutil.rmtree(tmp_path / "stanford_cars")
    make_cars(tmp_path, [*class_names("cars")[:-1]])
    with pytest.raises(InputError, match=r"the 196 classes in cars_meta.mat, but 'smartfortwoconvertible2012' missing"):
        load_dataset("cars", tmp_path)
    shutil.rmtree(tmp_path / "stanford_cars")
    make_cars(tmp_path, number=lambda label: label + 2)
    with pytest.raises(InputError, match=r"labels of 196 classes in cars_meta.mat, got 196 counted from 0"):
        load_dataset("cars", tmp_path)


def test_dtd_numbers_by_name_where_torchvision_would_shift(tmp_path):
    """Its labels are places among the classes of one list; a class less in one list moves all behind it."""
    make_dtd(tmp_path)
    listing = tmp_path / "dtd" / "dtd" / "labels" / "val1.txt"
    lines = listing.read_text().splitlines()
    listing.write_text("\n".join(line for line in lines if not line.startswith("banded/")))
    data = load_dataset("dtd", tmp_path)
    agrees("dtd", data)
    assert fewest_per_class(data) == ("banded", 1)
    listing.write_text("\n".join([*lines, "tartan/tartan_0001.jpg"]))
    with pytest.raises(InputError, match=r"labels/val1.txt names '.*tartan_0001.jpg', not found"):
        load_dataset("dtd", tmp_path)
    shutil.copytree(tmp_path / "dtd/dtd/images/woven", tmp_path / "dtd/dtd/images/tartan")
    listing.write_text("\n".join([*lines, "tartan/woven_val.jpg"]))
    with pytest.raises(InputError, match=r"the 47 known classes in labels/val1.txt, but 'tartan' unexpected"):
        load_dataset("dtd", tmp_path)


def test_wrong_arguments(tmp_path, root):
    with pytest.raises(InputError, match=r"name: expected one of 'cars', .*, got 'SVHN'; did you mean 'svhn'\?"):
        load_dataset("SVHN", root)
    with pytest.raises(TypeError, match="name: expected a string, got NoneType"):
        load_dataset(None, root)
    with pytest.raises(FileNotFoundError, match=r"root: there is no folder '.*nowhere'"):
        load_dataset("mnist", tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    for download in (False, True):
        with pytest.raises(InputError, match=r"root: expected a folder, got the file '.*file'"):
            load_dataset("mnist", tmp_path / "file", download=download)
    with pytest.raises(TypeError, match="root: expected a path, got int"):
        load_dataset("mnist", 3)
    for argument in ("train_transform", "transform"):
        with pytest.raises(TypeError, match=f"^{argument}: expected a function image -> tensor or None, got str"):
            load_dataset("mnist", root, **{argument: "ToTensor"})
    with pytest.raises(InputError, match="seed: expected a whole number of at least 0, got -1"):
        load_dataset("mnist", root, seed=-1)
    with pytest.raises(TypeError, match="dataset: expected a Dataset whose train has targets, got list"):
        fewest_per_class([])


def test_without_torchvision(root, monkeypatch):
    def fail(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(module, "import_module", fail)
    with pytest.raises(ImportError, match=r"needs a torchvision that fits torch .*nms does not exist.*pip install"):
        load_dataset("mnist", root)
