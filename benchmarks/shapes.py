"""How fast the data set `shapes` renders on one thread, and a contact sheet of it.

Commands: OMP_NUM_THREADS=1 python benchmarks/shapes.py
          python benchmarks/shapes.py --sheet docs/shapes.png
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from PIL import Image

from harmonize.data.shapes import NUM_KINDS, Shapes, ShapesSplit


def images_per_second(image_size: int, num_images: int = 200, repeats: int = 40) -> float:
    """Images per second of processor time of ``Split.load``, the best of many repeats: others may share the core."""
    split = Shapes(num_train=num_images, image_size=image_size).split("train")
    split.load(0)
    best = 0.0
    for _ in range(repeats):
        start = time.process_time()
        for index in range(num_images):
            split.load(index)
        best = max(best, num_images / (time.process_time() - start))
    return best


def contact_sheet(path: Path) -> None:
    """One column per shape: four rows of training images, the masks of the fourth, two rows of the conflict split."""

    def rows(split: ShapesSplit, num: int) -> list[list[int]]:
        by_shape = np.argsort(split.shapes, kind="stable").reshape(NUM_KINDS, -1)
        return by_shape[:, :num].T.tolist()

    def paste(row: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=255) for image in row], 1)

    shapes = Shapes(num_train=50 * NUM_KINDS, num_val=50 * NUM_KINDS)
    train, conflict = shapes.split("train"), shapes.split("conflict")
    sheet = [paste([np.asarray(train.load(i)[0]) for i in row]) for row in rows(train, 4)]
    masks = [(train.mask(i) > 0).numpy() for i in rows(train, 4)[-1]]
    sheet.append(paste([np.repeat(mask[..., None] * np.uint8(255), 3, 2) for mask in masks]))
    sheet += [paste([np.asarray(conflict.load(i)[0]) for i in row]) for row in rows(conflict, 2)]
    Image.fromarray(np.concatenate(sheet)).quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", type=Path, help="write a contact sheet instead, a PNG")
    args = parser.parse_args()
    if args.sheet:
        contact_sheet(args.sheet)
    else:
        for image_size in (32, 64, 96):
            print(f"{image_size:3d} px  {images_per_second(image_size):6.0f} images/s")
