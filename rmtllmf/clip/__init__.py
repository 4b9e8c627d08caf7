"""open_clip models as image classifiers, and the paper's eight data sets and published models to run them on.

The only part of the library that knows open_clip and torchvision. Both are imported when a function that needs them
is called, so that ``import rmtllmf.clip`` works without them.
"""

from .models import ImageClassifier, OpenClip, ZeroShotHead, evaluate, image_classifier, load, zero_shot_head

__all__ = [
    "ImageClassifier",
    "OpenClip",
    "ZeroShotHead",
    "evaluate",
    "image_classifier",
    "load",
    "zero_shot_head",
]
