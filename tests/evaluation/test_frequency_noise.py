"""Accuracy against the frequency of noise: which noise, of which images, and that only what is read is harmed."""

import math

import numpy as np
import pytest
import torch

from harmonize.config import compose, instantiate
from harmonize.evaluation import frequency_noise
from harmonize.evaluation.classifier import linear_head
from harmonize.evaluation.frequency_noise import FrequencyNoise
from harmonize.evaluation.linear_probe import ConvergedProbe
from harmonize.functional.frequency_noise import band_noise, random_signs
from harmonize.functional.seeding import mix
from harmonize.types import ConfigError, FeatureSpec
from tests.evaluation.benches import Memory, Reader, make_bench, on_ranks, patterns

SIZE = 32
FREQUENCIES = [math.pi * i / 10 for i in range(11)]


def wave(cycles, size=SIZE):
    """A wave of so many cycles over the width of an image, (size, size)."""
    return np.tile(np.cos(2 * np.pi * cycles * np.arange(size) / size), (size, 1))


def waves(cycles, num=40):
    """Two classes: a faint wave, or its negative."""
    labels = np.arange(num) % 2
    pixels = 128 + 8 * (2 * labels - 1)[:, None, None] * wave(cycles)
    images = np.repeat(pixels[..., None], 3, axis=3).round().astype(np.uint8)
    return Memory((images, labels), (images, labels), ["minus", "plus"])


def reader_of(cycles):
    """Encoder and head that know of nothing but that wave."""
    pattern = torch.from_numpy(wave(cycles)).float()
    encoder = Reader(lambda images: (images[:, 0] * pattern).mean(dim=(1, 2))[:, None], 1, SIZE)
    head = linear_head(encoder.spec, [FeatureSpec(1, "patch_mean")], torch.tensor([[-1.0], [1.0]]), torch.zeros(2))
    return encoder, head


def in_ring(cycles, frequency, bandwidth):
    """Whether a ring of the spectrum holds the wave, whose two peaks lie at +cycles and -cycles."""
    outer, inner = (max(0, math.floor((frequency + s * bandwidth) * SIZE / (2 * math.pi))) for s in (1, -1))
    return any(-outer <= peak < outer and not -inner <= peak < inner for peak in (cycles, -cycles))


@pytest.mark.parametrize("cycles", [2, 6, 13])
@pytest.mark.parametrize("mode", ["faithful", "matched"])
def test_noise_of_other_frequencies_does_not_matter(tmp_path, cycles, mode):
    encoder, head = reader_of(cycles)
    bench = make_bench(tmp_path, waves(cycles), encoder, head=head)
    results = FrequencyNoise(modes=[mode], epsilon=20.0, rms=5.0).run(bench)
    assert results[0].value == 1.0
    drops = [row for row in results if row.metric == "accuracy_drop"]
    inside = [in_ring(cycles, f, 0.2) for f in FREQUENCIES]
    assert [row.at for row in drops] == pytest.approx(FREQUENCIES)
    assert sum(inside) in (1, 2)
    for row, harmed in zip(drops, inside, strict=True):
        assert (row.value > 0.2) if harmed else (row.value == 0 and row.error == 0), (row.at, row.value)


def test_rows_and_their_errors_are_those_of_a_plain_loop(tmp_path):
    bench = make_bench(tmp_path, patterns(40, 25, visible=0.6), seed=5)
    protocol = FrequencyNoise(head="probe", epsilon=3.0, rms=1.5, bandwidth=0.5, num_frequencies=4)
    results = protocol.run(bench)
    head = frequency_noise.classifier(bench, "probe", [FeatureSpec(2, "cls_patch_mean")], 1e-3)
    settings = [(mode, math.pi * i / 3) for mode in ("faithful", "matched") for i in range(4)]
    clean, noisy = [], []
    for i in range(25):
        (batch,) = bench.data.feature_loader("val", [i], 1)
        signs = random_signs(mix(5, torch.tensor([i])), (3, 16, 16))
        clean.append(float(head.logits(bench.encoder, batch.image).argmax() == batch.label))
        right = []
        for mode, frequency in settings:
            noise = band_noise(3.0 * signs, frequency, 0.5, 1.5 if mode == "matched" else None)
            right.append(float(head.logits(bench.encoder, batch.image + noise).argmax() == batch.label))
        noisy.append(right)
    clean, noisy = np.array(clean), np.array(noisy)
    assert [row.metric for row in results] == ["top1"] * 9 + ["accuracy_drop"] * 8
    assert (results[0].series, results[0].axis, results[0].value) == ("clean", "", clean.mean())
    assert len({*noisy.mean(0)}) > 2
    for k, (mode, frequency) in enumerate(settings):
        accuracy, drop = results[1 + k], results[9 + k]
        for row, images in ((accuracy, noisy[:, k]), (drop, clean - noisy[:, k])):
            assert (row.series, row.axis, row.at) == (mode, "frequency", frequency)
            assert row.value == pytest.approx(images.mean(), abs=1e-12)
            assert row.error == pytest.approx(images.std(ddof=1) / 5)
            assert row.num_images == 25
            assert row.note == "linear probe on 40 training images"


def test_without_noise_it_is_the_accuracy_of_the_probe(tmp_path):
    bench = make_bench(tmp_path)
    results = FrequencyNoise(epsilon=1e-12, rms=1e-12, num_frequencies=3).run(bench)
    (plain,) = ConvergedProbe().run(bench)
    assert results[0].value == plain.value
    assert {row.value for row in results if row.metric == "top1"} == {plain.value}
    assert {(row.value, row.error) for row in results if row.metric == "accuracy_drop"} == {(0.0, 0.0)}
    assert results[0].feature == plain.feature


@pytest.fixture
def noises(monkeypatch):
    """All noise that is made: (frequency, rms asked for, noise)."""
    made = []

    def noted(noise, frequency, bandwidth, rms):
        made.append((frequency, rms, band_noise(noise, frequency, bandwidth, rms)))
        return made[-1][2]

    monkeypatch.setattr(frequency_noise, "band_noise", noted)
    return made


def test_matched_noise_has_the_size_that_is_asked_for(tmp_path, noises):
    encoder, head = reader_of(3)
    FrequencyNoise(rms=0.7, epsilon=1.0).run(make_bench(tmp_path, waves(3), encoder, head=head))
    matched = [noise for _, rms, noise in noises if rms is not None]
    assert len(matched) == 3 * 11  # batches of 16 of 40 images
    for noise in matched:
        torch.testing.assert_close(noise.square().mean(dim=(-2, -1)).sqrt(), torch.full(noise.shape[:2], 0.7))
    by_frequency = {}
    for frequency, rms, noise in noises:
        if rms is None:
            by_frequency.setdefault(frequency, []).append(noise.square().mean())
    sizes = [torch.stack(found).mean().sqrt().item() for found in by_frequency.values()]
    assert sizes[0] < sizes[5] < sizes[9]  # faithful: wider rings hold more


def test_noise_is_a_function_of_seed_and_image(tmp_path, noises):
    encoder, head = reader_of(3)

    def made(batch_size, seed=0, **options):
        noises.clear()
        bench = make_bench(tmp_path, waves(3, 11), encoder, head=head, batch_size=batch_size, seed=seed, **options)
        results = FrequencyNoise(modes=["faithful"], num_frequencies=2, epsilon=9.0).run(bench)
        last = [noise for frequency, _, noise in noises if frequency > 0]
        return torch.cat(last), results

    noise, results = made(11)
    for batch_size in (1, 4):
        other, again = made(batch_size)
        torch.testing.assert_close(other, noise)
        assert again == results
    assert not torch.allclose(made(11, seed=1)[0], noise)
    some, _ = made(11, num_val=3)  # images 0, 3 and 7
    torch.testing.assert_close(some, noise[[0, 3, 7]])
    assert len(torch.unique(noise.flatten(1), dim=0)) == 11


def test_two_ranks_give_what_one_gives(tmp_path):
    def run(name):
        return FrequencyNoise(num_frequencies=3, epsilon=3.0).run(make_bench(tmp_path / name, patterns(20, 13)))

    ranks = on_ranks(tmp_path / "ranks", lambda: run("two"))
    assert ranks == [run("one")] * 2


def test_images_without_a_label_take_no_part(tmp_path):
    whole = patterns(40, 20)
    hidden = whole.relabelled("val", lambda labels: np.where(np.arange(20) < 12, labels, -1))
    protocol = FrequencyNoise(num_frequencies=2)
    found = protocol.run(make_bench(tmp_path / "a", hidden))
    assert found == protocol.run(make_bench(tmp_path / "b", whole.only("val", slice(12))))
    assert {row.num_images for row in found} == {12}


@pytest.mark.parametrize("modes", [[], ["matched", "loud"]])
def test_unknown_modes_are_a_sentence(tmp_path, modes):
    with pytest.raises(ConfigError, match=r"eval\.modes=.* must be some of faithful, matched"):
        FrequencyNoise(modes=modes).run(make_bench(tmp_path))


def test_the_preset():
    found = instantiate(compose(["eval=frequency_noise", "checkpoint=x"], "evaluate").eval)
    assert (found.bandwidth, found.num_frequencies, list(found.modes)) == (0.2, 11, ["faithful", "matched"])
