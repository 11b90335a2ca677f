import pytest
import torch

from harmonize.objectives.mim import MaskedAutoencoder, MaskedImageModeling
from harmonize.types import Progress
from tests.helpers import random_batch, tiny_encoder

VIT = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


def simmim(encoder, **options):
    return MaskedImageModeling(encoder, **({"decoder": "linear"} | options))


def mae(encoder, **options):
    return MaskedAutoencoder(encoder, **(VIT | options))


@pytest.mark.parametrize("make", [simmim, mae, lambda e: simmim(e, decoder="vit", **VIT)])
@pytest.mark.parametrize(
    "encoder_options", [{}, {"num_registers": 2}, {"class_token": False}, {"relative_position": "shared"}]
)
def test_only_hidden_pixels_count_and_all_parameters_learn(make, encoder_options):
    encoder = tiny_encoder(**encoder_options)
    objective = make(encoder)
    output = objective(encoder, random_batch(), Progress(0, 1))
    output.loss.backward()
    for module in (encoder, objective):
        unused = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
        assert not unused
    mask = objective.mask(random_batch().seed)
    target = objective.target(random_batch().views["mim"][0])
    prediction = torch.zeros_like(target)
    loss = objective.error(prediction, target, mask)
    prediction[~mask] = 100.0
    assert objective.error(prediction, target, mask) == loss


@pytest.mark.parametrize("make", [simmim, mae])
def test_masks_belong_to_the_image_not_to_the_batch(make):
    objective = make(tiny_encoder())
    seed = random_batch(6).seed
    assert torch.equal(objective.mask(seed)[2:4], objective.mask(seed[2:4]))
    assert not torch.equal(objective.mask(seed), objective.mask(seed + 1))


def test_n_batches_are_one_batch():
    encoder = tiny_encoder()
    objective = simmim(encoder)
    x, seed = random_batch(6).views["mim"][0], random_batch(6).seed
    whole = objective.reconstruct(encoder, x, objective.mask(seed))
    parts = [objective.reconstruct(encoder, x[i : i + 2], objective.mask(seed[i : i + 2])) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_learning_one_image_beats_the_chance_level():
    torch.manual_seed(0)
    encoder = tiny_encoder()
    objective = simmim(encoder)
    batch = random_batch(2)
    parameters = [*encoder.parameters(), *objective.parameters()]
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], 3e-3)
    for _ in range(150):
        output = objective(encoder, batch, Progress(0, 1))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.loss < 0.5 * output.stats["chance_mim"]


@pytest.mark.parametrize("ratio", [0, 1, 1.2, -0.5])
@pytest.mark.parametrize("make", [simmim, mae])
def test_mask_ratio_outside_its_range(make, ratio):
    with pytest.raises(ValueError, match=rf"^mask_ratio={ratio} must lie between 0 and 1"):
        make(tiny_encoder(), mask_ratio=ratio)


@pytest.mark.parametrize("unit", [6, 12, 32])
def test_mask_units_that_do_not_fit(unit):
    with pytest.raises(ValueError, match=rf"^mask_unit={unit} must be a multiple of backbone\.patch_size=4"):
        simmim(tiny_encoder(), mask_unit=unit)
