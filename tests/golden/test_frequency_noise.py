"""Noise by frequency against how-do-vits-work."""

import torch

from harmonize.functional.frequency_noise import band_noise
from tests.golden.conftest import GOLDEN, assert_equal


def test_perturbed_images():
    fixture = torch.load(GOLDEN / "frequency_noise.pt", weights_only=True)
    config = fixture["config"]
    for frequency, perturbed in zip(fixture["frequencies_rad"].tolist(), fixture["perturbed"], strict=True):
        noise = band_noise(config["epsilon"] * fixture["noise_sign"], frequency, config["bandwidth"])
        assert_equal(fixture["image"] + noise, perturbed, f"frequency {frequency}")
