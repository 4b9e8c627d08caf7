"""The same few samples of every class for the same seed, from any kind of dataset, without loading images."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.datasets import FakeData, ImageFolder

from rmtllmf.errors import InputError
from rmtllmf.resilience import few_shot


def table(labels):
    return TensorDataset(torch.arange(len(labels)), torch.as_tensor(labels))


class NotToBeLoaded(Dataset):
    """Knows its labels, and breaks when a sample is loaded."""

    def __init__(self, labels, name="targets", transform=None):
        setattr(self, name, labels)
        self.size = len(labels)
        self.target_transform = transform

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        raise AssertionError("an image was loaded")


@given(
    labels=st.lists(st.integers(-2, 3), min_size=1, max_size=40),
    shots=st.integers(1, 3),
    seed=st.integers(0, 2**63),
)
def test_exactly_shots_of_every_class(labels, shots, seed):
    counts = Counter(labels)
    if min(counts.values()) < shots:
        with pytest.raises(InputError, match="shots"):
            few_shot(table(labels), shots, seed=seed)
        return
    chosen = few_shot(table(labels), shots, seed=seed)
    assert isinstance(chosen, Subset)
    assert len(set(chosen.indices)) == len(chosen.indices)
    assert Counter(labels[index] for index in chosen.indices) == dict.fromkeys(counts, shots)
    assert chosen.indices == few_shot(table(labels), shots, seed=seed).indices


def test_another_seed_draws_others_and_every_sample_is_drawn_sometimes():
    data = table([0, 1] * 10)
    draws = [tuple(few_shot(data, 2, seed=seed).indices) for seed in range(200)]
    assert len(set(draws)) > 150
    # each of 20 samples is drawn with probability .2: 200 draws miss one with probability 20 * .8^200 < 1e-17
    assert set().union(*draws) == set(range(20))
    counts = Counter(index for draw in draws for index in draw)
    # binomial(200, .2): mean 40, sd 5.7; six standard deviations
    assert all(abs(count - 40) < 34 for count in counts.values())


def test_another_class_does_not_change_the_choice():
    labels = [index % 3 for index in range(30)]
    few = [index for index in few_shot(table(labels), 3, seed=4).indices if labels[index] != 2]
    more = labels + [7] * 5
    again = [index for index in few_shot(table(more), 3, seed=4).indices if more[index] in (0, 1)]
    assert few == again


def test_a_generator_advances_and_the_global_one_does_not():
    data, generator = table([0] * 50), torch.Generator().manual_seed(1)
    state = torch.random.get_rng_state()
    first, second = (few_shot(data, 5, seed=generator).indices for _ in range(2))
    assert first != second
    assert few_shot(data, 5, seed=torch.Generator().manual_seed(1)).indices == first
    assert torch.equal(torch.random.get_rng_state(), state)


LABELS = [0, 1, 2] * 4
EXPECTED = few_shot(table(LABELS), 2, seed=9).indices


@pytest.mark.parametrize(
    "dataset",
    [
        NotToBeLoaded(LABELS),
        NotToBeLoaded(LABELS, "labels"),
        NotToBeLoaded(np.array(LABELS)),
        NotToBeLoaded(torch.tensor(LABELS, dtype=torch.uint8), "labels"),
        Subset(NotToBeLoaded([5, *LABELS]), range(1, 13)),
        ConcatDataset([NotToBeLoaded(LABELS[:5]), table(LABELS[5:7]), NotToBeLoaded(LABELS[7:], "labels")]),
        Subset(ConcatDataset([NotToBeLoaded([9]), NotToBeLoaded(LABELS)]), list(range(1, 13))),
        NotToBeLoaded([label + 1 for label in LABELS], transform=lambda label: label - 1),
        list(zip("abcdefghijkl", LABELS, strict=True)),
        [("x", torch.tensor(label)) for label in LABELS],
    ],
    ids=["targets", "labels", "numpy", "tensor", "Subset", "Concat", "Subset of Concat", "transform", "list", "0-d"],
)
def test_labels_are_found_everywhere_without_loading(dataset):
    assert few_shot(dataset, 2, seed=9).indices == EXPECTED


def test_labels_of_another_length_are_something_else():
    class Named(NotToBeLoaded):
        labels = ("cat", "dog", "horse")

        def __getitem__(self, index):
            return "x", LABELS[index]

    assert few_shot(Named(LABELS, "unused"), 2, seed=9).indices == EXPECTED


def test_only_the_subsets_own_samples_are_loaded():
    loaded = []

    class Slow(Dataset):
        def __len__(self):
            return 100

        def __getitem__(self, index):
            loaded.append(index)
            return "x", index % 2

    few_shot(Subset(Slow(), [10, 11, 12, 13]), 1, seed=0)
    assert set(loaded) == {10, 11, 12, 13}


def test_strings_are_classes():
    data = [("x", name) for name in ["cat", "dog"] * 3]
    assert Counter(label for _, label in few_shot(data, 2, seed=0)) == {"cat": 2, "dog": 2}


def test_torchvision(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"{index}.png")

    def broken(path):
        raise AssertionError("an image was loaded")

    folder = ImageFolder(tmp_path, loader=broken)
    chosen = few_shot(folder, 2, seed=0)
    assert Counter(folder.targets[index] for index in chosen.indices) == {0: 2, 1: 2}
    fake = few_shot(FakeData(40, (3, 4, 4), num_classes=2), 2, seed=0)
    assert Counter(int(label) for _, label in fake) == {0: 2, 1: 2}
