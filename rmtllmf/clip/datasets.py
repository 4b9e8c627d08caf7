"""The paper's eight data sets, read through torchvision from where it keeps them, with CLIP's names and prompts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch.utils.data import Dataset as TorchDataset

from .._state import whole_number
from ..errors import InputError
from ._data_check import no_empty_class
from ._data_homes import HOMES
from ._data_readers import READERS, Part
from .prompts import DATASETS, class_names, folders, known, templates

__all__ = ["DATASETS", "Dataset", "fewest_per_class", "load_dataset"]

Samples: TypeAlias = TorchDataset[tuple[Any, int]]
Transform: TypeAlias = Callable[[Any], Any]


@dataclass(frozen=True)
class Dataset:
    """An image classification data set for CLIP; see `load_dataset`.

    Attributes:
        name: one of `DATASETS`.
        classes: K names; the k-th is that of label k.
        templates: sentences with ``{}`` for the name of a class.
        train: a map-style dataset of (RGB image after the transform, int label). Its ``targets``, a list of all labels,
            spares `rmtllmf.resilience.few_shot` from loading images.
        test: the same for the test images.
        split: where the split into the two comes from, for the records of an experiment.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> none = TensorDataset(torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64))
        >>> Dataset("svhn", class_names("svhn"), templates("svhn"), none, none, "by hand").classes[7]
        '7'
    """

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    train: Samples
    test: Samples
    split: str


def load_dataset(
    name: str,
    root: str | os.PathLike[str],
    *,
    train_transform: Transform | None = None,
    transform: Transform | None = None,
    download: bool = False,
    seed: int = 0,
) -> Dataset:
    """One of the paper's eight data sets, from the files that its authors publish.

    ========== ============================================= ===================================================
    name       below `root`, as torchvision has it           split
    ========== ============================================= ===================================================
    cars       stanford_cars/{devkit,cars_train,cars_test}   official (8,144 / 8,041)
    dtd        dtd/dtd/{images,labels}                       official no. 1, train and val / test (3,760 / 1,880)
    eurosat    eurosat/2750                                  random, 80 / 10 % of every class (21,600 / 2,700)
    gtsrb      gtsrb/GTSRB, gtsrb/GT-final_test.csv          official (26,640 / 12,630)
    mnist      MNIST/raw                                     official (60,000 / 10,000)
    resisc45   resisc45/{train,test}                         as the folders say
    resisc45   resisc45/NWPU-RESISC45 or NWPU-RESISC45       lists, or 60 / 20 % of every class (18,900 / 6,300)
    sun397     SUN397                                        lists, or 50 / 50 images of every class (19,850 each)
    svhn       train_32x32.mat, test_32x32.mat               official (73,257 / 26,032)
    ========== ============================================= ===================================================

    The lists are ``Training_01.txt`` and ``Testing_01.txt`` in ``SUN397`` (its official partition 1, in Partitions.zip
    on its page), and ``resisc45-train.txt`` and ``resisc45-test.txt`` beside ``NWPU-RESISC45`` (those of Neumann et
    al., 2019). Without them, and always for EuroSAT, the split is drawn from `seed` and the names of the files; its
    sizes are those of the task arithmetic literature, its images are others. Those in neither part (10 % of EuroSAT,
    20 % of RESISC45) are left for validation. ``Dataset.split`` says which split it is.

    Args:
        name: one of `DATASETS`.
        root: the folder of all data sets.
        train_transform, transform: PIL image in RGB -> tensor, for training and for evaluation, such as those of
            `rmtllmf.clip.load`; None: the images as they are.
        download: have torchvision fetch what is missing. It cannot fetch Stanford Cars, whose server is gone, nor
            RESISC45.
        seed: of a random split, at least 0.

    Returns:
        A `Dataset`, its labels in the order of `rmtllmf.clip.class_names`.

    Raises:
        InputError: an unknown name; a `root` that is no folder; classes that are missing, unexpected or empty; files
            that are damaged, or named in a list but not there; lists that overlap.
        FileNotFoundError: the data set is not there; the message says where it comes from and where it goes.
        OSError: a download that failed.
        ImportError: torchvision cannot be imported.
        TypeError: a transform that cannot be called, or another argument of a wrong kind.

    Source: Krause et al., 2013 (Stanford Cars); Cimpoi et al., CVPR 2014 (DTD); Helber et al., 2019 (EuroSAT);
    Stallkamp et al., 2011 (GTSRB); LeCun et al., 1998 (MNIST); Cheng et al., 2017 (RESISC45); Xiao et al., CVPR 2010
    (SUN397); Netzer et al., 2011 (SVHN). Their use for task arithmetic: Ilharco et al., ICLR 2023.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for part in ("train", "test"):
        ...         for name in class_names("resisc45"):
        ...             folder = Path(root, "resisc45", part, name.replace(" ", "_"))
        ...             folder.mkdir(parents=True)
        ...             Image.new("RGB", (8, 8)).save(folder / "1.jpg")
        ...     data = load_dataset("resisc45", root)
        ...     image, label = data.train[44]
        >>> image.mode, data.classes[label], data.split
        ('RGB', 'wetland', 'folders train and test')
    """
    home, read = HOMES[known(name)], READERS[name]
    for argument, value in (("train_transform", train_transform), ("transform", transform)):
        if value is not None and not callable(value):
            raise TypeError(f"{argument}: expected a function image -> tensor or None, got {type(value).__name__}")
    seed = whole_number(seed, "seed", at_least=0)
    folder = _root(root, download)
    torchvision = _torchvision()
    if not home.is_at(folder) and download and home.fetch:
        try:
            home.fetch(torchvision, folder)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"download: torchvision could not fetch {home.title} ({error}); {home.advice(folder)}"
            ) from error
    if not home.is_at(folder):
        refused = "torchvision cannot download it; " if download and not home.fetch else ""
        hint = "" if download or not home.fetch else ", or pass download=True"
        raise FileNotFoundError(f"root: {home.absence(folder)}; {refused}{home.advice(folder)}{hint}")
    try:
        train, test, split = read(torchvision.datasets, folder, seed)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # of damaged files, torchvision and scipy complain in ways without a common base
        raise InputError(f"root: torchvision cannot read {home.title} in {str(folder)!r} ({error})") from error
    classes = class_names(name)
    for part, label in ((train, "training"), (test, "test")):
        no_empty_class(part.targets, folders(name), f"the {label} part of {home.title} in {str(folder)!r}")
    return Dataset(name, classes, templates(name), Images(train, train_transform), Images(test, transform), split)


def fewest_per_class(dataset: Dataset) -> tuple[str, int]:
    """The class with the fewest training images, and their number: the most shots that `few_shot` can draw.

    Args:
        dataset: of `load_dataset`, or with a ``train`` that has ``targets``.

    Returns:
        Name and number; of equals the first.

    Raises:
        TypeError: no `Dataset` whose labels are known.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> train = TensorDataset(torch.zeros(5, 3, 8, 8))
        >>> train.targets = [0, 1, 1, 2, 2]
        >>> fewest_per_class(Dataset("pets", ("cat", "dog", "hare"), ("a {}",), train, train, "by hand"))
        ('cat', 1)
    """
    targets = getattr(dataset.train, "targets", None) if isinstance(dataset, Dataset) else None
    if targets is None:
        raise TypeError(f"dataset: expected a Dataset whose train has targets, got {type(dataset).__name__}")
    counts = Counter(int(label) for label in targets)
    fewest = min(range(len(dataset.classes)), key=lambda label: counts[label])
    return dataset.classes[fewest], counts[fewest]


class Images(TorchDataset[tuple[Any, int]]):
    """A part in RGB, transformed; `targets` are the labels of all images."""

    def __init__(self, part: Part, transform: Transform | None) -> None:
        self.source, self.indices, self.targets = part
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.source[self.indices[index]][0].convert("RGB")
        return image if self.transform is None else self.transform(image), self.targets[index]


def _torchvision() -> ModuleType:
    try:
        import_module("torchvision.datasets")
        return import_module("torchvision")
    except Exception as error:  # a torchvision built for another torch raises RuntimeError
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ImportError(
            f"rmtllmf.clip.load_dataset needs a torchvision that fits torch {torch.__version__}, but importing it "
            f"failed ({reason}); install a matching set: pip install -U torch torchvision"
        ) from error


def _root(root: str | os.PathLike[str], download: bool) -> Path:
    if not isinstance(root, str | os.PathLike):
        raise TypeError(f"root: expected a path, got {type(root).__name__}")
    folder = Path(root).expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"root: expected a folder, got the file {str(folder)!r}")
    if not folder.exists() and not download:
        raise FileNotFoundError(f"root: there is no folder {str(folder)!r}")
    return folder
