import pytest
import torch

from harmonize.objectives.contrastive import Contrastive
from harmonize.objectives.heads import mlp_head
from harmonize.types import Progress
from tests.helpers import random_batch, tiny_encoder

HEADS = {"hidden_dim": 16, "out_dim": 8}


def test_heads_are_moco_v3s():
    projector, predictor = mlp_head(24, 16, 8, 3), mlp_head(8, 16, 8, 2)
    assert [type(m).__name__ for m in projector] == ["Linear", "BatchNorm", "ReLU"] * 2 + ["Linear", "BatchNorm"]
    assert [type(m).__name__ for m in predictor] == ["Linear", "BatchNorm", "ReLU", "Linear", "BatchNorm"]
    for head in (projector, predictor):
        assert all(m.bias is None for m in head if isinstance(m, torch.nn.Linear))
        assert [m.affine for m in head if hasattr(m, "affine")][-1] is False


def test_momentum_network_follows_and_gets_no_gradient():
    encoder = tiny_encoder(drop_path=0.5)
    objective = Contrastive(encoder, momentum=0.9, **HEADS)
    start = {k: v.clone() for k, v in objective.momentum_encoder.named_parameters()}
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 1.0
    objective.before_step(encoder, Progress(0, 10))
    for name, parameter in objective.momentum_encoder.named_parameters():
        torch.testing.assert_close(parameter, start[name] + 0.1)
    objective(encoder, random_batch(), Progress(0, 10)).loss.backward()
    assert all(p.grad is None for p in objective.momentum_encoder.parameters())
    assert all(p.grad is None for p in objective.momentum_projector.parameters())
    assert all(p.grad is not None for p in objective.predictor.parameters())


def test_momentum_network_has_no_drop_path_in_training():
    encoder = tiny_encoder(drop_path=0.9, depth=4).train()
    objective = Contrastive(encoder, **HEADS).train()
    x = random_batch().image
    assert torch.equal(objective.momentum_encoder(x), objective.momentum_encoder(x))
    assert not torch.equal(encoder(x), encoder(x))


def test_momentum_stays_fp32_under_autocast_and_the_loss_is_fp32():
    encoder = tiny_encoder()
    objective = Contrastive(encoder, **HEADS)
    with torch.autocast("cpu", torch.bfloat16):
        objective.before_step(encoder, Progress(1, 10))
        output = objective(encoder, random_batch(), Progress(1, 10))
    assert output.loss.dtype == torch.float32
    assert {p.dtype for p in objective.momentum_encoder.parameters()} == {torch.float32}


def test_momentum_schedule():
    objective = Contrastive(tiny_encoder(), momentum=0.99, **HEADS)
    assert objective.momentum_at(Progress(0, 10)) == pytest.approx(0.99)
    assert objective.momentum_at(Progress(5, 10)) == pytest.approx(0.995)
    assert objective.momentum_at(Progress(10, 10)) == 1.0


def test_views_are_symmetric():
    """Swapping the views swaps the two directions and changes nothing."""
    encoder = tiny_encoder()
    objective = Contrastive(encoder, **HEADS)
    batch, swapped = random_batch(), random_batch()
    swapped.views["contrastive"] = swapped.views["contrastive"][::-1]
    torch.testing.assert_close(
        objective(encoder, batch, Progress(0, 1)).loss, objective(encoder, swapped, Progress(0, 1)).loss
    )


def test_a_collapsed_network_is_at_the_chance_level_and_shows_it():
    encoder = tiny_encoder()
    objective = Contrastive(encoder, **HEADS).eval()
    with torch.no_grad():
        objective.momentum_projector[-1].running_mean.fill_(1e4)  # all keys point the same way
    output = objective(encoder, random_batch(), Progress(0, 1))
    assert output.loss.item() == pytest.approx(output.stats["chance_contrastive"], rel=1e-3)
    assert output.stats["key_std"] < 0.01


def test_patch_mean_serves_encoders_without_class_token():
    encoder = tiny_encoder(class_token=False)
    with pytest.raises(ValueError, match=r"^pool=cls needs backbone\.class_token=true"):
        Contrastive(encoder, **HEADS)
    objective = Contrastive(encoder, pool="patch_mean", **HEADS)
    assert torch.isfinite(objective(encoder, random_batch(), Progress(0, 1)).loss)


@pytest.mark.parametrize(
    ("key", "value"), [("temperature", 0), ("momentum", 1.5), ("pool", "max"), ("momentum_schedule", "x")]
)
def test_bad_values_are_named(key, value):
    with pytest.raises(ValueError, match=rf"^{key}={value}"):
        Contrastive(tiny_encoder(), **{key: value}, **HEADS)
