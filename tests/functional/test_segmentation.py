"""Intersection over union against a naive loop over pixels."""

import math

import pytest
import torch

from harmonize.functional.segmentation import intersection_over_union, mean_iou, pixel_accuracy, pixel_counts


def images(num=6, num_classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for i in range(num):
        size = (7 + i, 9)
        truth = torch.randint(num_classes - 1, size, generator=generator)  # the last class never occurs
        guess = torch.where(torch.rand(size, generator=generator) < 0.6, truth, torch.randint(num_classes, size))
        truth[torch.rand(size, generator=generator) < 0.2] = 255
        yield guess, truth


def test_against_a_naive_loop():
    pairs = list(images())
    counts = sum(pixel_counts(*pair, 5) for pair in pairs)
    ious, right, total = [], 0, 0
    for c in range(5):
        intersection = union = truth_pixels = 0
        for guess, truth in pairs:
            for g, t in zip(guess.flatten().tolist(), truth.flatten().tolist(), strict=True):
                if t == 255:
                    continue
                intersection += g == c and t == c
                union += g == c or t == c
                truth_pixels += t == c
        if truth_pixels:
            ious.append(intersection / union)
            right += intersection
            total += truth_pixels
    assert len(ious) == 4
    assert intersection_over_union(counts).tolist()[:4] == pytest.approx(ious)
    assert math.isnan(intersection_over_union(counts)[4])
    assert mean_iou(counts).item() == pytest.approx(sum(ious) / 4)
    assert pixel_accuracy(counts).item() == pytest.approx(right / total)


def test_several_sums_at_a_time():
    counts = torch.stack([pixel_counts(*pair, 5) for pair in images()])
    assert mean_iou(counts).tolist() == [mean_iou(one).item() for one in counts]
    assert pixel_accuracy(counts).tolist() == [pixel_accuracy(one).item() for one in counts]


def test_nothing_but_ignored_pixels():
    counts = pixel_counts(torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 255), 3)
    assert not counts.any()
    assert counts.shape == (3, 3)
