"""Names and prompts of the eight data sets, against spot checks of OpenAI's lists and against another library's."""

import importlib

import pytest

from rmtllmf.clip.prompts import DATASETS, class_names, folders, templates
from rmtllmf.errors import InputError

COUNTS = {"cars": 196, "dtd": 47, "eurosat": 10, "gtsrb": 43, "mnist": 10, "resisc45": 45, "sun397": 397, "svhn": 10}
PROMPTS = {"cars": 8, "dtd": 8, "eurosat": 3, "gtsrb": 3, "mnist": 1, "resisc45": 18, "sun397": 2, "svhn": 1}
# label -> (folder or torchvision's name, OpenAI's name), typed from the sources
PLACES = {
    "cars": {0: ("AM General Hummer SUV 2000",) * 2, 173: ("Ram C/V Cargo Van Minivan 2012",) * 2},
    "dtd": {0: ("banded", "banded"), 30: ("polka-dotted", "polka-dotted"), 46: ("zigzagged", "zigzagged")},
    "eurosat": {2: ("HerbaceousVegetation", "brushland or shrubland"), 9: ("SeaLake", "lake or sea")},
    "gtsrb": {14: ("00014", "stop"), 17: ("00017", "red circle with white horizonal stripe no entry")},
    "mnist": {0: ("0", "0"), 9: ("9", "9")},
    "resisc45": {29: ("railway", "railway"), 30: ("railway_station", "railway station")},
    "sun397": {
        8: ("apartment_building/outdoor", "apartment building outdoor"),
        206: ("jail/indoor", "jail indoor"),
        207: ("jail_cell", "jail cell"),
        396: ("youth_hostel", "youth hostel"),
    },
    "svhn": {0: ("0", "0"), 9: ("9", "9")},
}
PROMPT = {
    "cars": "i love my X!",
    "dtd": "a photo of the X object.",
    "eurosat": "a centered satellite photo of X.",
    "gtsrb": 'a zoomed in photo of a "X" traffic sign.',
    "mnist": 'a photo of the number: "X".',
    "resisc45": "aerial view of the X.",
    "sun397": "a photo of the X.",
    "svhn": 'a photo of the number: "X".',
}


def test_the_eight():
    assert DATASETS == ("cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "sun397", "svhn")


@pytest.mark.parametrize("name", DATASETS)
def test_names_and_prompts(name):
    names, prompts = class_names(name), templates(name)
    assert isinstance(names, tuple)
    assert isinstance(prompts, tuple)
    assert (len(names), len(prompts)) == (COUNTS[name], PROMPTS[name])
    assert len(set(names)) == len(names)
    assert len(set(folders(name))) == len(folders(name)) == len(names)
    assert all(text == " ".join(text.split()) for text in names + prompts)
    assert all(prompt.count("{}") == 1 for prompt in prompts)
    assert PROMPT[name] in {prompt.format("X") for prompt in prompts}
    for label, expected in PLACES[name].items():
        assert (folders(name)[label], names[label]) == expected


@pytest.mark.parametrize("name", sorted({*DATASETS} - {"cars"}))
def test_folders_are_in_sorted_order(name):
    """As ImageFolder, DTD, GTSRB and SUN397's ClassName.txt number them."""
    assert list(folders(name)) == sorted(folders(name))


def test_each_euro_sat_folder_has_the_name_that_means_the_same():
    """OpenAI lists them in another order, so each is told by a word."""
    words = {
        "AnnualCrop": "annual crop",
        "Forest": "forest",
        "HerbaceousVegetation": "shrubland",
        "Highway": "highway",
        "Industrial": "industrial",
        "Pasture": "pasture",
        "PermanentCrop": "permanent crop",
        "Residential": "residential",
        "River": "river",
        "SeaLake": "lake",
    }
    pairs = dict(zip(folders("eurosat"), class_names("eurosat"), strict=True))
    assert pairs.keys() == words.keys()
    assert all(word in pairs[folder] for folder, word in words.items())


def test_names_of_cars_stay_apart_without_punctuation():
    assert len({"".join(filter(str.isalnum, name)).lower() for name in class_names("cars")}) == 196


@pytest.mark.parametrize("name", DATASETS)
def test_the_lists_of_fusion_bench(name):
    theirs = {"cars": "stanford_cars"}.get(name, name)
    pytest.importorskip("fusion_bench")
    peer = importlib.import_module(f"fusion_bench.tasks.clip_classification.{theirs}")
    assert sorted(class_names(name)) == sorted(peer.classnames)
    assert sorted(templates(name)) == sorted(template("{}") for template in peer.templates)
    if name != "sun397":  # theirs sorts "jail cell" before "jail indoor", the data set's own list after "jail/indoor"
        assert list(class_names(name)) == peer.classnames


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("SUN397", "sun397"), ("stanford_cars", "cars"), ("mnsit", "mnist"), ("resisc", "resisc45"), ("gtrsb", "gtsrb")],
)
def test_an_unknown_name_with_its_nearest(asked, meant):
    for function in (class_names, templates):
        with pytest.raises(
            InputError, match=rf"name: expected one of .*'svhn', got '{asked}'; did you mean '{meant}'\?"
        ):
            function(asked)


def test_a_name_like_no_other_and_no_name():
    with pytest.raises(InputError, match=r"'cars', 'dtd', 'eurosat', .* got 'imagenet'$"):
        class_names("imagenet")
    with pytest.raises(TypeError, match="name: expected a string, got int"):
        templates(5)
