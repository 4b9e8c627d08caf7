"""Data sets that are not there: what the error says, and what is downloaded."""

import importlib
from urllib.error import URLError

import pytest

from helpers.dataset_folders import MAKERS, SIZES, agrees, make_cars, make_svhn
from rmtllmf.clip.datasets import DATASETS, load_dataset

pytestmark = pytest.mark.usefixtures("any_checksum")

# name -> a path that is missing first, the page
ABSENT = {
    "cars": ("stanford_cars/devkit/cars_meta.mat", "https://ai.stanford.edu/~jkrause/cars/car_dataset.html"),
    "dtd": ("dtd/dtd/images", "https://www.robots.ox.ac.uk/~vgg/data/dtd/"),
    "eurosat": ("eurosat/2750", "https://github.com/phelber/EuroSAT"),
    "gtsrb": ("gtsrb/GTSRB/Training", "https://benchmark.ini.rub.de/"),
    "mnist": ("MNIST/raw/train-images-idx3-ubyte", "https://yann.lecun.com/exdb/mnist/"),
    "resisc45": ("resisc45/NWPU-RESISC45", "https://gcheng-nwpu.github.io/"),
    "sun397": ("SUN397/ClassName.txt", "https://vision.princeton.edu/projects/2010/SUN/"),
    "svhn": ("train_32x32.mat", "http://ufldl.stanford.edu/housenumbers/"),
}


@pytest.mark.parametrize("name", DATASETS)
def test_absent(name, tmp_path):
    path, page = ABSENT[name]
    with pytest.raises(FileNotFoundError) as caught:
        load_dataset(name, tmp_path)
    message = str(caught.value)
    assert message.startswith("root: found no ")
    assert f"there is no {tmp_path / path}" in message
    assert page in message
    assert ("download=True" in message) == (name not in ("cars", "resisc45"))


@pytest.mark.parametrize("name", ["cars", "resisc45"])
def test_torchvision_cannot_fetch_it(name, tmp_path, root):
    with pytest.raises(FileNotFoundError, match=r"torchvision cannot download it; get .* from https"):
        load_dataset(name, tmp_path, download=True)
    assert len(load_dataset(name, root, download=True).train) == SIZES[name][0]


@pytest.mark.parametrize("missing", ["cars_test", "cars_test_annos_withlabels.mat", "devkit/cars_train_annos.mat"])
def test_a_part_is_absent(missing, tmp_path):
    make_cars(tmp_path)
    path = tmp_path / "stanford_cars" / missing
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(FileNotFoundError, match=rf"for there is no [^,]*stanford_cars/{missing}; get"):
        load_dataset("cars", tmp_path)


def test_download(tmp_path, monkeypatch):
    fetched = []

    def fetch(url, download_root, md5, **kwargs):
        fetched.append(url.rpartition("/")[2])
        if len(fetched) in (1, 2):
            MAKERS["eurosat" if "EuroSAT" in url else "gtsrb"](tmp_path / "new")

    for name in ("eurosat", "gtsrb"):
        tv = importlib.import_module(f"torchvision.datasets.{name}")
        monkeypatch.setattr(tv, "download_and_extract_archive", fetch)
        for _ in range(2):
            agrees(name, load_dataset(name, tmp_path / "new", download=True))
    assert fetched == ["EuroSAT.zip", "GTSRB-Training_fixed.zip"]  # the second made the test part as well


def test_download_fetches_both_parts(tmp_path, monkeypatch):
    fetched = []

    def fetch(url, root, filename, md5):
        fetched.append(filename)
        make_svhn(tmp_path)

    monkeypatch.setattr(importlib.import_module("torchvision.datasets.svhn"), "download_url", fetch)
    agrees("svhn", load_dataset("svhn", tmp_path, download=True))
    assert fetched == ["train_32x32.mat", "test_32x32.mat"]


def test_a_download_that_fails(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr(importlib.import_module("torchvision.datasets.dtd"), "download_and_extract_archive", fail)
    with pytest.raises(OSError, match=r"download: torchvision could not fetch DTD \(.*no route.*\); get dtd-r1.0.1"):
        load_dataset("dtd", tmp_path, download=True)
