"""Choosing images: what is held out, and subsets in which the classes stay in proportion."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from harmonize.functional.seeding import mix
from harmonize.types import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self


def stratified_order(labels: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """An order in which every beginning holds all classes in proportion.

    The first images are one of each class; after that every class fills up at the same relative pace. A longer
    beginning contains the shorter ones.

    Args:
        labels: (n,) ints.
        keys: (n,) int64 numbers that belong to the images (a hash of the name): they decide within a class.

    Returns:
        (n,) positions.

    >>> stratified_order(np.array([0, 0, 0, 0, 1, 1]), np.array([3, 1, 2, 0, 8, 9])).tolist()
    [3, 4, 1, 2, 5, 0]
    """
    order = np.lexsort((keys, labels))
    by_class = labels[order]
    first = np.searchsorted(by_class, by_class, side="left")
    size = np.searchsorted(by_class, by_class, side="right") - first
    share = (np.arange(len(order)) - first) / size
    return order[np.lexsort((keys[order], share))]


class LabelledImages(ABC):
    """A split that is a selection of a larger list of images.

    Attributes:
        labels: (n,) int64, -1 where there is none.
        indices: (n,) positions in the whole list.
    """

    def __init__(self, labels: np.ndarray):
        self.labels = np.asarray(labels, np.int64)
        self.indices = np.arange(len(self.labels))

    def __len__(self) -> int:
        return len(self.indices)

    @abstractmethod
    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image and its label."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What a warning calls the image."""

    def _identity(self, index: int) -> int:
        """A number that belongs to the image and stays when others come and go."""
        return int(self.indices[index])

    def take(self, positions: np.ndarray) -> Self:
        """The images at some positions of this split."""
        chosen = copy.copy(self)
        chosen.labels, chosen.indices = self.labels[positions], self.indices[positions]
        return chosen

    def _order(self) -> np.ndarray:
        identities = torch.tensor([self._identity(index) for index in range(len(self))])
        return stratified_order(self.labels, mix(identities).numpy())

    def hold_out(self, share: float) -> tuple[Self, Self]:
        """(train, val): ``share`` of every class is val, at least one image, except of classes with only one."""
        order = self._order()
        _, inverse, size = np.unique(self.labels, return_inverse=True, return_counts=True)
        val = order[size[inverse[order]] > 1][: max(1, round(share * len(self)))]
        is_val = np.zeros(len(self), bool)
        is_val[val] = True
        return self.take(np.flatnonzero(~is_val)), self.take(np.flatnonzero(is_val))

    def subset(self, num: int | None, key: str) -> Self:
        """``num`` images with the classes in proportion (all: None); the same ones each time, and nested.

        Raises:
            ConfigError: There are fewer.
        """
        if num is None:
            return self
        if not 1 <= num <= len(self):
            raise ConfigError(f"{key}={num} is not possible: the split holds {len(self)} images (null: all of them)")
        return self.take(np.sort(self._order()[:num]))
