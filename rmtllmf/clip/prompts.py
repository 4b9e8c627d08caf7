"""What CLIP is told about the paper's eight data sets: the names of their classes, and sentences to put them in.

Names and sentences are those of OpenAI's CLIP, spelling mistakes included, because published accuracies depend on them.
Their order is that of torchvision's labels, which for EuroSAT and SUN397 is not OpenAI's.
"""

from __future__ import annotations

from difflib import get_close_matches

from ..errors import InputError
from ._names_cars import CLASSES as _CARS
from ._names_sun397 import FOLDERS as _SUN397

__all__ = ["DATASETS", "class_names", "templates"]

DATASETS = ("cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "sun397", "svhn")
"""The names of the paper's eight data sets."""


def class_names(name: str) -> tuple[str, ...]:
    """The names of the classes of a data set: what fills its `templates`.

    Args:
        name: one of `DATASETS`.

    Returns:
        K names; the k-th is that of label k, as `rmtllmf.clip.load_dataset` and torchvision number them.

    Raises:
        InputError: an unknown name. TypeError: `name` is no string.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, and the
    file data/prompts.md of https://github.com/openai/CLIP.

    Example:
        >>> class_names("eurosat")[:3]
        ('annual crop land', 'forest', 'brushland or shrubland')
        >>> {name: len(class_names(name)) for name in ("cars", "dtd", "gtsrb", "resisc45", "sun397")}
        {'cars': 196, 'dtd': 47, 'gtsrb': 43, 'resisc45': 45, 'sun397': 397}
    """
    return _CLASSES[known(name)]


def templates(name: str) -> tuple[str, ...]:
    """The prompt templates of a data set, over which `rmtllmf.clip.zero_shot_head` averages.

    Args:
        name: one of `DATASETS`.

    Returns:
        Sentences with one ``{}`` each, for the name of a class.

    Raises:
        InputError: an unknown name. TypeError: `name` is no string.

    Source: Radford et al., ICML 2021, section 3.1.4, and the file data/prompts.md of https://github.com/openai/CLIP.

    Example:
        >>> templates("svhn")
        ('a photo of the number: "{}".',)
        >>> templates("dtd")[0].format(class_names("dtd")[0])
        'a photo of a banded texture.'
    """
    return _TEMPLATES[known(name)]


def folders(name: str) -> tuple[str, ...]:
    """What torchvision, or the data set's own folders, call the classes, in the order of `class_names`."""
    return _FOLDERS.get(known(name)) or _CLASSES[name]


def known(name: str) -> str:
    """`name` if it is one of the eight; else an error with the nearest that is."""
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {type(name).__name__}")
    if name in DATASETS:
        return name
    asked = name.lower()
    near = [data for data in DATASETS if data in asked] or get_close_matches(asked, DATASETS, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"name: expected one of {', '.join(map(repr, DATASETS))}, got {name!r}{meant}")


_DIGITS = tuple("0123456789")

_DTD_WORDS = """
banded blotchy braided bubbly bumpy chequered cobwebbed cracked crosshatched crystalline dotted fibrous flecked
freckled frilly gauzy grid grooved honeycombed interlaced knitted lacelike lined marbled matted meshed paisley
perforated pitted pleated polka-dotted porous potholed scaly smeared spiralled sprinkled stained stratified striped
studded swirly veined waffled woven wrinkled zigzagged
"""

_DTD = tuple(_DTD_WORDS.split())

_EUROSAT = {
    "AnnualCrop": "annual crop land",
    "Forest": "forest",
    "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "highway or road",
    "Industrial": "industrial buildings or commercial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings or homes or apartments",
    "River": "river",
    "SeaLake": "lake or sea",
}

_GTSRB = (
    "red and white circle 20 kph speed limit",
    "red and white circle 30 kph speed limit",
    "red and white circle 50 kph speed limit",
    "red and white circle 60 kph speed limit",
    "red and white circle 70 kph speed limit",
    "red and white circle 80 kph speed limit",
    "end / de-restriction of 80 kph speed limit",
    "red and white circle 100 kph speed limit",
    "red and white circle 120 kph speed limit",
    "red and white circle red car and black car no passing",
    "red and white circle red truck and black car no passing",
    "red and white triangle road intersection warning",
    "white and yellow diamond priority road",
    "red and white upside down triangle yield right-of-way",
    "stop",
    "empty red and white circle",
    "red and white circle no truck entry",
    "red circle with white horizonal stripe no entry",
    "red and white triangle with exclamation mark warning",
    "red and white triangle with black left curve approaching warning",
    "red and white triangle with black right curve approaching warning",
    "red and white triangle with black double curve approaching warning",
    "red and white triangle rough / bumpy road warning",
    "red and white triangle car skidding / slipping warning",
    "red and white triangle with merging / narrow lanes warning",
    "red and white triangle with person digging / construction / road work warning",
    "red and white triangle with traffic light approaching warning",
    "red and white triangle with person walking warning",
    "red and white triangle with child and person walking warning",
    "red and white triangle with bicyle warning",
    "red and white triangle with snowflake / ice warning",
    "red and white triangle with deer warning",
    "white circle with gray strike bar no speed limit",
    "blue circle with white right turn arrow mandatory",
    "blue circle with white left turn arrow mandatory",
    "blue circle with white forward arrow mandatory",
    "blue circle with white forward or right turn arrow mandatory",
    "blue circle with white forward or left turn arrow mandatory",
    "blue circle with white keep right arrow mandatory",
    "blue circle with white keep left arrow mandatory",
    "blue circle with white arrows indicating a traffic circle",
    "white circle with gray strike bar indicating no passing for cars has ended",
    "white circle with gray strike bar indicating no passing for trucks has ended",
)

_RESISC45_WORDS = """
airplane airport baseball_diamond basketball_court beach bridge chaparral church circular_farmland cloud
commercial_area dense_residential desert forest freeway golf_course ground_track_field harbor industrial_area
intersection island lake meadow medium_residential mobile_home_park mountain overpass palace parking_lot railway
railway_station rectangular_farmland river roundabout runway sea_ice ship snowberg sparse_residential stadium
storage_tank tennis_court terrace thermal_power_station wetland
"""

_RESISC45 = tuple(_RESISC45_WORDS.split())

_CLASSES: dict[str, tuple[str, ...]] = {
    "cars": _CARS,
    "dtd": _DTD,
    "eurosat": tuple(_EUROSAT.values()),
    "gtsrb": _GTSRB,
    "mnist": _DIGITS,
    "resisc45": tuple(folder.replace("_", " ") for folder in _RESISC45),
    "sun397": tuple(folder.replace("_", " ").replace("/", " ") for folder in _SUN397),
    "svhn": _DIGITS,
}

_FOLDERS: dict[str, tuple[str, ...]] = {
    "eurosat": tuple(_EUROSAT),
    "gtsrb": tuple(f"{label:05d}" for label in range(len(_GTSRB))),
    "resisc45": _RESISC45,
    "sun397": _SUN397,
}

_TEMPLATES: dict[str, tuple[str, ...]] = {
    "cars": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a photo of my {}.",
        "i love my {}!",
        "a photo of my dirty {}.",
        "a photo of my clean {}.",
        "a photo of my new {}.",
        "a photo of my old {}.",
    ),
    "dtd": tuple(
        f"a photo of {article} {{}} {thing}."
        for article in ("a", "the")
        for thing in ("texture", "pattern", "thing", "object")
    ),
    "eurosat": tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")),
    "gtsrb": tuple(f'a {kind} photo of a "{{}}" traffic sign.' for kind in ("zoomed in", "centered", "close up")),
    "mnist": ('a photo of the number: "{}".',),
    "resisc45": tuple(
        f"{view} {kind} of {article}{{}}."
        for article in ("", "a ", "the ")
        for kind in ("imagery", "photo", "view")
        for view in ("satellite", "aerial")
    ),
    "sun397": ("a photo of a {}.", "a photo of the {}."),
    "svhn": ('a photo of the number: "{}".',),
}
