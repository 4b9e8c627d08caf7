"""The eight data sets as small files in their own formats, whose colours say what the classes are called.

That code goes by the sorted names, so an error in the numbering of labels cannot hide in it.
"""

import struct

import numpy as np
from PIL import Image
from scipy.io import savemat

from rmtllmf.clip.datasets import DATASETS, Dataset
from rmtllmf.clip.prompts import class_names, folders

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


def files(data):
    """The files of both parts."""
    source = data.train.source
    paths = getattr(source, "_image_files", None) or [path for path, _ in source.samples]
    return [[str(paths[index]) for index in part.indices] for part in (data.train, data.test)]
