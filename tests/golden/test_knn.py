"""The accuracies that DINO's own weighted k-NN gave."""

import re

import pytest
import torch

from harmonize.functional.knn import knn_votes, topk_accuracy
from tests.golden.conftest import GOLDEN


def test_knn_is_dinos():
    official = torch.load(GOLDEN / "knn.pt", weights_only=True)
    num_classes = int(max(official["train_labels"].max(), official["test_labels"].max())) + 1
    assert official["top1_top5_percent"]
    for setting, percent in official["top1_top5_percent"].items():
        k, temperature = re.fullmatch(r"k=(\d+),T=([\d.]+)", setting).groups()
        votes = knn_votes(
            official["train_features"],
            official["train_labels"],
            official["test_features"],
            num_classes,
            (int(k),),
            float(temperature),
        )[int(k)]
        ours = [100 * topk_accuracy(votes, official["test_labels"], top) for top in (1, 5)]
        assert ours == pytest.approx(percent.tolist(), abs=1e-4), setting
