"""open_clip models as image classifiers, and the paper's eight data sets and published models to run them on.

The only part of the library that knows open_clip and torchvision. Both are imported when a function that needs them
is called, so that ``import rmtllmf.clip`` works without them.
"""

from .datasets import DATASETS, Dataset, fewest_per_class, load_dataset
from .hugging_face import from_hugging_face, to_hugging_face
from .models import ImageClassifier, OpenClip, ZeroShotHead, evaluate, image_classifier, load, zero_shot_head
from .prompts import class_names, templates
from .published import PUBLISHED, PublishedModel, load_finetuned

__all__ = [  # noqa: RUF022
    "DATASETS",
    "Dataset",
    "ImageClassifier",
    "OpenClip",
    "PUBLISHED",
    "PublishedModel",
    "ZeroShotHead",
    "class_names",
    "evaluate",
    "fewest_per_class",
    "from_hugging_face",
    "image_classifier",
    "load",
    "load_dataset",
    "load_finetuned",
    "templates",
    "to_hugging_face",
    "zero_shot_head",
]
