"""Where the eight data sets come from, where torchvision expects them, and how it fetches those that it can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple


class Home(NamedTuple):
    """Of one data set.

    Each of `layouts` is a set of paths below the root that is enough; `files` is what to get from the page `url`.
    """

    title: str
    url: str
    files: str
    layouts: tuple[tuple[str, ...], ...]
    fetch: Callable[[ModuleType, Path], None] | None

    def is_at(self, root: Path) -> bool:
        """Whether all of one layout is there."""
        return any(all((root / path).exists() for path in layout) for layout in self.layouts)

    def absence(self, root: Path) -> str:
        """What is not there."""
        missing = [str(root / path) for path in self.layouts[0] if not (root / path).exists()]
        return f"found no {self.title}, for there is no {', no '.join(missing)}"

    def advice(self, root: Path) -> str:
        """What to get from where, and where else than at the places of the first layout it may be."""
        others = "".join(f", or at {' and '.join(str(root / path) for path in other)}" for other in self.layouts[1:])
        return f"get {self.files} from {self.url} and unpack it there{others}"


def _fetch(kind: str, *options: dict[str, str]) -> Callable[[ModuleType, Path], None]:
    def fetch(torchvision: ModuleType, root: Path) -> None:
        for option in options or ({},):
            getattr(torchvision.datasets, kind)(root, download=True, **option)

    return fetch


_BOTH = ({"split": "train"}, {"split": "test"})

HOMES = {
    "cars": Home(
        "Stanford Cars",
        "https://ai.stanford.edu/~jkrause/cars/car_dataset.html (gone; look for a mirror)",
        "car_devkit.tgz, cars_train.tgz, cars_test.tgz and cars_test_annos_withlabels.mat",
        (
            (
                "stanford_cars/devkit/cars_meta.mat",
                "stanford_cars/devkit/cars_train_annos.mat",
                "stanford_cars/cars_train",
                "stanford_cars/cars_test",
                "stanford_cars/cars_test_annos_withlabels.mat",
            ),
        ),
        None,
    ),
    "dtd": Home(
        "DTD",
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        "dtd-r1.0.1.tar.gz",
        (("dtd/dtd/images", *(f"dtd/dtd/labels/{split}1.txt" for split in ("train", "val", "test"))),),
        _fetch("DTD"),
    ),
    "eurosat": Home(
        "EuroSAT", "https://github.com/phelber/EuroSAT", "EuroSAT.zip (RGB)", (("eurosat/2750",),), _fetch("EuroSAT")
    ),
    "gtsrb": Home(
        "GTSRB",
        "https://benchmark.ini.rub.de/",
        "GTSRB-Training_fixed.zip, GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip",
        (("gtsrb/GTSRB/Training", "gtsrb/GTSRB/Final_Test/Images", "gtsrb/GT-final_test.csv"),),
        _fetch("GTSRB", *_BOTH),
    ),
    "mnist": Home(
        "MNIST",
        "https://yann.lecun.com/exdb/mnist/",
        "its four .gz files",
        (
            tuple(
                f"MNIST/raw/{split}-{kind}-ubyte"
                for split in ("train", "t10k")
                for kind in ("images-idx3", "labels-idx1")
            ),
        ),
        _fetch("MNIST"),
    ),
    "resisc45": Home(
        "RESISC45",
        "https://gcheng-nwpu.github.io/",
        "NWPU-RESISC45.rar",
        (("resisc45/NWPU-RESISC45",), ("NWPU-RESISC45",), ("resisc45/train", "resisc45/test")),
        None,
    ),
    "sun397": Home(
        "SUN397",
        "https://vision.princeton.edu/projects/2010/SUN/",
        "SUN397.tar.gz",
        (("SUN397/ClassName.txt",),),
        _fetch("SUN397"),
    ),
    "svhn": Home(
        "SVHN",
        "http://ufldl.stanford.edu/housenumbers/",
        "train_32x32.mat and test_32x32.mat",
        (("train_32x32.mat", "test_32x32.mat"),),
        _fetch("SVHN", *_BOTH),
    ),
}
