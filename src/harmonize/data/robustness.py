"""Images of the training classes under other conditions: ImageNet-C, -R, -A, -Sketch, Stylized-ImageNet and their like.

One folder, one set; which layout it has is found out:

- ``root/CORRUPTION/SEVERITY/CLASS/image``, also ``root/GROUP/CORRUPTION/SEVERITY/CLASS/image`` (ImageNet-C),
- ``root/CLASS/image`` (ImageNet-R, ImageNet-A, ImageNet-Sketch),
- ``root/val/CLASS/image``, beside ``root/train`` or not (Stylized-ImageNet).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harmonize.data.datasets import ImageFiles
from harmonize.data.images import MAX_PIXELS, existing_folder, has_image, subfolders, walk_images
from harmonize.types import ConfigError

CORRUPTIONS = {
    "noise": ["gaussian_noise", "shot_noise", "impulse_noise"],
    "blur": ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur"],
    "weather": ["snow", "frost", "fog", "brightness"],
    "digital": ["contrast", "elastic_transform", "pixelate", "jpeg_compression"],
    "extra": ["speckle_noise", "spatter", "gaussian_blur", "saturate"],
}
"""The corruptions of ImageNet-C by group; the mean corruption error is over the first four groups, 15 corruptions.

Source: Hendrycks and Dietterich 2019 (arXiv:1903.12261), github.com/hendrycks/robustness.
"""

_GROUP_OF = {name: group for group, names in CORRUPTIONS.items() for name in names}
_LAYOUTS = (
    "ROOT/CORRUPTION/SEVERITY/CLASS/image (ImageNet-C), ROOT/CLASS/image (ImageNet-R, -A, -Sketch) or "
    "ROOT/val/CLASS/image (Stylized-ImageNet)"
)
_KEY = "eval.root"


@dataclass(frozen=True)
class Condition:
    """The images of one corruption and severity, or of a whole set.

    Attributes:
        name: Of the corruption; of the folder where there are none.
        group: What the corruption belongs to (``noise``, ``blur``, ...); empty where there is none.
        severity: 1 (mild) to 5; None where there are none.
        folder: Where its class folders are.
        labels: Class folder -> position in the classes of the head.
        max_pixels: Larger images are skipped with a warning.
    """

    name: str
    group: str
    severity: int | None
    folder: Path
    labels: Mapping[str, int]
    max_pixels: int

    @property
    def split(self) -> ImageFiles:
        """The images, listed anew at each access: ImageNet-C has 75 times 50,000.

        Raises:
            ConfigError: There is none.
        """
        files: list[str] = []
        labels: list[int] = []
        for name, label in self.labels.items():
            found = sorted(os.path.join(name, path) for path in walk_images(self.folder / name))
            files += found
            labels += [label] * len(found)
        if not files:
            raise ConfigError(f"{_KEY} holds no image in the class folders of {self.folder}: {_LAYOUTS} is needed")
        return ImageFiles(self.folder, files, np.array(labels), self.max_pixels, cache_side=None)


class Robustness:
    """A robustness set.

    Args:
        root: The folder (``eval.root``).
        classes: Names of the classes that the head knows, in its order; the class folders bear the same names.
        max_pixels: Larger images are skipped with a warning.

    Attributes:
        conditions: Sorted by name and severity.
        present: Positions in ``classes`` of those that occur. ImageNet-R and -A have 200 of the 1,000: their accuracies
            are among these alone, so the logits of the others are to be left out.
        corrupted: Whether the layout is that of ImageNet-C, whose images are centre crops of 224 px already: they are
            to be seen whole (``DataModule.loader_of(..., eval_crop=1.0)``).

    Raises:
        ConfigError: The folder is missing or in none of the layouts, or holds classes that the head does not know.
    """

    def __init__(self, root: str | None, classes: Sequence[str], max_pixels: int = MAX_PIXELS):
        self.root = existing_folder(root, f"give the folder of a robustness set, as {_LAYOUTS}", _KEY)
        self._labels = {name: label for label, name in enumerate(classes)}
        try:
            places = self._places()
            self.corrupted = any(severity is not None for *_, severity in places)
            self.conditions = [
                Condition(name, group, severity, folder, self._class_folders(folder), max_pixels)
                for folder, name, group, severity in places
            ]
            found = {name for condition in self.conditions for name in condition.labels}
            self.present = sorted(
                self._labels[name] for name in found if any(has_image(c.folder / name) for c in self.conditions)
            )
        except OSError as error:
            raise ConfigError(f"{_KEY}={root} cannot be read: {error}") from error

    def _places(self) -> list[tuple[Path, str, str, int | None]]:
        """(folder of class folders, name, group, severity) of every condition."""
        folders = subfolders(self.root)
        # A folder named like a class decides: ImageNet-R's classes must not be taken for corruptions, nor the reverse.
        if not any(name in self._labels for name in folders):
            corruptions = [(self.root / name, _GROUP_OF.get(name, "")) for name in folders]
            inner = [(self.root / group / name, group) for group in folders for name in subfolders(self.root / group)]
            for found in (corruptions, inner):
                places = [
                    (folder / severity, folder.name, group, int(severity))
                    for folder, group in found
                    for severity in subfolders(folder)
                    if severity.isdecimal() and subfolders(folder / severity)
                ]
                if places:
                    return sorted(places, key=lambda place: place[1:])
            if "val" in folders:
                return [(self.root / "val", self.root.name, "", None)]
        return [(self.root, self.root.name, "", None)]

    def _class_folders(self, folder: Path) -> dict[str, int]:
        names = subfolders(folder)
        if not names:
            raise ConfigError(f"{_KEY}={self.root} has no class folders in {folder}: {_LAYOUTS} is needed")
        unknown = [name for name in names if name not in self._labels]
        if unknown:
            raise ConfigError(
                f"{_KEY}={self.root} has {len(unknown)} folders in {folder} that are not among the "
                f"{len(self._labels)} classes of the head, such as {unknown[0]}: a class folder is named like the "
                f"class (a WNID for ImageNet), and {_LAYOUTS} is needed"
            )
        return {name: self._labels[name] for name in names}
