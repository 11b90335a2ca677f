"""The accuracies that DINO's own weighted k-NN gave."""

import re

import pytest
import torch

from harmonize.functional.knn import knn_correct
from tests.golden.conftest import GOLDEN


@pytest.mark.parametrize("max_bytes", [2**28, 2**17])  # all at once; a few queries and a part of the bank
def test_knn_is_dinos(max_bytes):
    official = torch.load(GOLDEN / "knn.pt", weights_only=True)
    train_labels, test_labels = official["train_labels"], official["test_labels"]
    settings = {}
    for setting, percent in official["top1_top5_percent"].items():
        k, temperature = re.fullmatch(r"k=(\d+),T=([\d.]+)", setting).groups()
        settings[int(k), float(temperature)] = percent.tolist()
    assert settings
    ks, temperatures = (sorted(set(column)) for column in zip(*settings, strict=True))
    correct = knn_correct(
        official["train_features"],
        train_labels,
        official["test_features"],
        test_labels,
        int(max(train_labels.max(), test_labels.max())) + 1,
        ks,
        temperatures,
        (1, 5),
        max_bytes,
    )
    ours = {setting: [100 * row.sum().item() / len(row) for row in correct[setting]] for setting in settings}
    assert ours == {setting: pytest.approx(percent, abs=1e-4) for setting, percent in settings.items()}
