"""The eight data sets from small files in their own formats, whose colours say what the classes are called.

That code goes by the sorted names, so an error in the numbering of labels cannot hide in it.
"""

import importlib
import pickle
import shutil
import struct
from collections import Counter
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.utils.data import DataLoader
from torchvision.transforms import ToTensor

from rmtllmf.clip import datasets as module
from rmtllmf.clip.datasets import DATASETS, Dataset, fewest_per_class, load_dataset
from rmtllmf.clip.prompts import class_names, folders, templates
from rmtllmf.errors import InputError
from rmtllmf.resilience import few_shot

NAMES = {name: sorted(class_names(name)) for name in DATASETS}
TRAIN, TEST = 8, 12  # pixels: the size of an image says which official part it is in
EUROSAT = {
    "SeaLake": "lake or sea",
    "River": "river",
    "Residential": "residential buildings or homes or apartments",
    "PermanentCrop": "permanent crop land",
    "Pasture": "pasture land",
    "Industrial": "industrial buildings or commercial buildings",
    "Highway": "highway or road",
    "HerbaceousVegetation": "brushland or shrubland",
    "Forest": "forest",
    "AnnualCrop": "annual crop land",
}


def picture(name, of, path, size=TRAIN):
    """A square in the colour of the class `of`: three digits to base 8, far enough apart for JPEG."""
    code = NAMES[name].index(of)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), tuple(32 * (code // 8**power % 8) + 16 for power in range(3))).save(path)


def told(name, image):
    """The class that the colour of an image means."""
    assert image.mode == "RGB"
    pixel = image.getpixel((0, 0))
    if name == "mnist":
        assert len(set(pixel)) == 1
        return str(pixel[0] // 25)
    return NAMES[name][sum(channel // 32 * 8**power for power, channel in enumerate(pixel))]


def make_cars(root, meta=None, number=lambda label: label + 1):
    home, meta = root / "stanford_cars", list(meta or class_names("cars"))
    (home / "devkit").mkdir(parents=True)
    savemat(home / "devkit" / "cars_meta.mat", {"class_names": np.array(meta, dtype=object)})
    fields = [(field, object) for field in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for part, size, file in (
        ("train", TRAIN, "devkit/cars_train_annos.mat"),
        ("test", TEST, "cars_test_annos_withlabels.mat"),
    ):
        rows = []
        for label, name in enumerate(meta):
            rows.append((1, 1, size, size, np.uint8(number(label)), f"{label:05d}.jpg"))
            picture("cars", name.replace("C-V", "C/V"), home / f"cars_{part}" / f"{label:05d}.jpg", size)
        savemat(home / file, {"annotations": np.array(rows, dtype=fields)})


def make_dtd(root):
    labels = root / "dtd" / "dtd" / "labels"
    labels.mkdir(parents=True)
    for split, size in (("train", TRAIN), ("val", TRAIN), ("test", TEST)):
        files = [f"{name}/{name}_{split}.jpg" for name in class_names("dtd")]
        (labels / f"{split}1.txt").write_text("\n".join(files[::-1]) + "\n")
        for file in files:
            picture("dtd", file.partition("/")[0], labels.parent / "images" / file, size)


def make_eurosat(root, count=10):
    for folder, name in EUROSAT.items():
        for index in range(count):
            picture("eurosat", name, root / "eurosat" / "2750" / folder / f"{folder}_{index + 1}.jpg")


def make_gtsrb(root, count=2):
    home = root / "gtsrb"
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for label, name in enumerate(class_names("gtsrb")):
        for index in range(count):
            picture("gtsrb", name, home / "GTSRB" / "Training" / f"{label:05d}" / f"00000_{index:05d}.ppm")
        place = (label * 5) % 43  # the test images are in no order
        picture("gtsrb", name, home / "GTSRB" / "Final_Test" / "Images" / f"{place:05d}.ppm", TEST)
        rows.append(f"{place:05d}.ppm;12;12;1;1;11;11;{label}")
    (home / "GT-final_test.csv").write_text("\n".join(rows) + "\n")


def make_mnist(root, digits=range(10)):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 3), ("t10k", 2)):
        labels = np.repeat(np.array(digits, dtype=np.uint8), count)
        images = np.broadcast_to(labels[:, None, None] * 25, (len(labels), 28, 28)).astype(np.uint8)
        header = struct.pack(">4i", 0x803, len(labels), 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, len(labels)) + labels.tobytes())


def make_resisc45(root, folder="NWPU-RESISC45", count=5, size=TRAIN):
    for name in class_names("resisc45"):
        for index in range(count):
            stem = name.replace(" ", "_")
            picture("resisc45", name, root / "resisc45" / folder / stem / f"{stem}_{index + 1:03d}.jpg", size)


def make_sun397(root, count=4, order=1):
    home = root / "SUN397"
    for folder in folders("sun397"):
        for index in range(count):
            name = folder.replace("/", " ").replace("_", " ")
            picture("sun397", name, home / folder[0] / folder / f"sun_{index:016d}.jpg")
    (home / "ClassName.txt").write_text("".join(f"/{folder[0]}/{folder}\n" for folder in folders("sun397")[::order]))


def make_svhn(root):
    for part, count in (("train", 3), ("test", 2)):
        labels = np.repeat(np.arange(1, 11, dtype=np.uint8), count)  # 10 is the digit 0
        colour = (labels % 10)[:, None] // 8 ** np.arange(3) % 8 * 32 + 16
        savemat(
            root / f"{part}_32x32.mat",
            {"X": np.broadcast_to(colour.T, (32, 32, 3, len(labels))).astype(np.uint8), "y": labels[:, None]},
        )


MAKERS = {name: globals()[f"make_{name}"] for name in DATASETS}
SIZES = {
    "cars": (196, 196),
    "dtd": (94, 47),
    "eurosat": (80, 10),
    "gtsrb": (86, 43),
    "mnist": (30, 20),
    "resisc45": (135, 45),
    "sun397": (794, 794),
    "svhn": (30, 20),
}
SPLIT = {
    **dict.fromkeys(("cars", "gtsrb", "mnist", "svhn"), "official train and test"),
    "dtd": "official no. 1: train and val / test",
    "eurosat": "random by class: 80 % / 10 %, seed 0",
    "resisc45": "random by class: 60 % / 20 %, seed 0",
    "sun397": "random by class: 50 / 50 images, seed 0",
}


@pytest.fixture(autouse=True)
def _any_checksum(monkeypatch):
    """SVHN's files are checked against the real ones' MD5."""
    svhn = importlib.import_module("torchvision.datasets.svhn")
    monkeypatch.setattr(svhn, "check_integrity", lambda path, md5: True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for make in MAKERS.values():
        make(folder)
    return folder


def agrees(name, data):
    """Whether every label of both parts means what the image shows; the samples looked at."""
    assert isinstance(data, Dataset)
    assert data.classes == class_names(name)
    for part in (data.train, data.test):
        samples = list(part)
        assert len(samples) == len(part)
        assert [label for _, label in samples] == part.targets
        assert {type(label) for _, label in samples} == {int}
        assert [data.classes[label] for _, label in samples] == [told(name, image) for image, _ in samples]
        assert set(part.targets) == set(range(len(data.classes)))


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


def files(data):
    """The files of both parts."""
    source = data.train.source
    paths = getattr(source, "_image_files", None) or [path for path, _ in source.samples]
    return [[str(paths[index]) for index in part.indices] for part in (data.train, data.test)]


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
