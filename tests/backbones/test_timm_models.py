"""timm's models as encoders: sizes, normalisation, layers, and what is refused. Nothing here goes to the network."""

import re
import socket

import pytest
import timm
import torch
from huggingface_hub import constants

from harmonize.backbones import timm_models
from harmonize.backbones.timm_models import TimmEncoder
from harmonize.types import IMAGE_MEAN, IMAGE_STD, AttentionView, ConfigError, EncoderSpec
from tests.helpers import tiny_encoder

CREATE = timm.create_model


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a test goes to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(timm_models, "getproxies", dict)


@pytest.fixture
def small(monkeypatch):
    """Every model is built with two narrow blocks."""
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: CREATE(*args, **SMALL | options))


SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
# Name -> image size, then patch size, grid, number of prefix tokens, whether one is a class token.
FAMILIES = {
    "vit_tiny_patch16_224": (32, 16, (2, 2), 1, True),
    "deit_tiny_distilled_patch16_224": (48, 16, (3, 3), 2, True),
    "vit_small_patch14_reg4_dinov2": (28, 14, (2, 2), 5, True),
    "vit_small_patch16_dinov3": (32, 16, (2, 2), 5, True),
    "eva02_tiny_patch14_224": (42, 14, (3, 3), 1, True),
    "beit_base_patch16_224": (32, 16, (2, 2), 1, True),
    "vit_little_patch16_reg4_gap_256": (32, 16, (2, 2), 4, False),
    "vit_relpos_small_patch16_224": (32, 16, (2, 2), 0, False),
    "deepseek_vit_412m_enc": (28, 14, (2, 2), 0, False),  # whose forward returns rows and columns
    "vit_tiny_r_s16_p8_224": (64, 32, (2, 2), 1, True),  # patches of a feature map: sides in px of the image
}


def images_for(encoder, n=2):
    return torch.randn(n, 3, *encoder.spec.image_size, generator=torch.Generator().manual_seed(1))


def by_hand(encoder, images):
    """The images as the model was trained to see them."""
    own, ours = encoder.model.pretrained_cfg, {"mean": IMAGE_MEAN, "std": IMAGE_STD}
    m, s = ([torch.tensor(source[key]).view(3, 1, 1) for source in (own, ours)] for key in ("mean", "std"))
    return ((images * s[1] + m[1]) - m[0]) / s[0]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_families(name, small):
    size, patch, grid, num_prefix, has_class = FAMILIES[name]
    encoder = TimmEncoder(name, pretrained=False, image_size=size).eval()
    spec = encoder.spec
    assert spec == EncoderSpec(48, 2, 3, (size, size), patch, grid, num_prefix, has_class)
    assert encoder.warning == ""
    images = images_for(encoder)
    tokens = encoder(images)
    assert tokens.shape == (2, num_prefix + spec.num_patches, 48)
    want = encoder.model.forward_features(by_hand(encoder, images)).flatten(1, -2)
    torch.testing.assert_close(tokens, want, rtol=1e-4, atol=1e-4)
    if encoder.model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5):  # far enough from ImageNet's to be seen
        assert (want - encoder.model.forward_features(images).flatten(1, -2)).abs().max() > 1e-3
    first, last = encoder.iter_blocks(images)
    assert torch.equal(encoder.final_norm(last), tokens)
    assert not torch.equal(first, last)
    views = []
    assert torch.equal(encoder.visit_layers(images, views.append), tokens)
    assert len(views) == 7
    assert torch.equal(views[3].tokens, first)
    maps = [view.weights() for view in views if isinstance(view, AttentionView)]
    assert [x.shape for x in maps] == 2 * [(2, 3, num_prefix + spec.num_patches, num_prefix + spec.num_patches)]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())


@torch.no_grad()
def test_images_are_normalised_as_the_model_wants_them():
    encoder = TimmEncoder("vit_tiny_patch16_224", pretrained=False, image_size=32).eval()
    assert encoder.model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    images, seen = images_for(encoder), []
    encoder.model.patch_embed.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    encoder(images)
    torch.testing.assert_close(seen[0], by_hand(encoder, images))
    black = (torch.zeros(3) - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)  # as our data set shows it
    encoder(black.view(1, 3, 1, 1).expand(1, 3, 32, 32))
    torch.testing.assert_close(seen[1], torch.full((1, 3, 32, 32), -1.0))


@torch.no_grad()
def test_images_stay_as_they_are_where_the_model_wants_imagenets_normalisation():
    encoder = TimmEncoder("deit_tiny_patch16_224", pretrained=False, image_size=32).eval()
    images, seen = images_for(encoder), []
    encoder.model.patch_embed.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    encoder(images)
    assert torch.equal(seen[0], images)
    assert not any(key in ("mean", "std") for key in encoder.state_dict())


def test_image_size():
    with torch.device("meta"):
        own = TimmEncoder("vit_tiny_patch16_224", pretrained=False)
        large = TimmEncoder("vit_tiny_patch16_224", pretrained=False, image_size=320)
    assert (own.spec.image_size, own.spec.grid) == ((224, 224), (14, 14))
    assert (large.spec.image_size, large.spec.grid) == ((320, 320), (20, 20))
    assert large.model.pos_embed.shape == (1, 401, 192)


# --- pre-trained weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k"])
@pytest.mark.parametrize("error", [OSError("no route to host.\nmore of it"), RuntimeError("")])
def test_without_weights_the_network_is_random_and_says_so(name, error, monkeypatch):
    tried = []

    def create(name, pretrained=False, **options):
        tried.append((name, pretrained, constants.HF_HUB_OFFLINE))
        if pretrained:
            raise error
        return CREATE(name, pretrained=False, **options)

    def unknown(*args, **kwargs):
        raise socket.gaierror("no such name")

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    torch.manual_seed(7)
    encoder = TimmEncoder(name, image_size=32)
    reason = "no route to host" if isinstance(error, OSError) else "RuntimeError"
    assert encoder.warning == (
        f"timm:{name}: no pre-trained weights could be loaded ({reason}); the weights are RANDOM."
    )
    # Without an address of the server its client looks into its cache alone, and afterwards as before.
    assert tried == [(name, True, True), ("vit_tiny_patch16_224", False, False)]
    torch.manual_seed(7)
    random = TimmEncoder("vit_tiny_patch16_224", pretrained=False, image_size=32).state_dict()
    assert all(torch.equal(value, random[key]) for key, value in encoder.state_dict().items())
    assert random["model.blocks.0.attn.qkv.weight"].std() > 0


def test_weights_that_can_be_loaded(monkeypatch):
    tried = []

    def create(name, pretrained=False, **options):
        tried.append((name, pretrained, constants.HF_HUB_OFFLINE))
        return CREATE(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    encoder = TimmEncoder("vit_tiny_patch16_224.augreg_in21k", image_size=32)
    assert tried == [("vit_tiny_patch16_224.augreg_in21k", True, False)]
    assert encoder.warning == ""


def test_a_network_without_blocks_is_refused_and_not_taken_for_a_failed_download(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [])
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: CREATE(name, num_classes=0))
    with pytest.raises(ConfigError, match="resnet18 is no Vision Transformer"):
        TimmEncoder("resnet18", pretrained=True)


# --- what is refused -------------------------------------------------------------------------------------------------

ANY_SIZE = "takes images of any size; diagnostics need a fixed grid of patches"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "is no Vision Transformer: it has no blocks with self-attention"),
        ("swin_tiny_patch4_window7_224", "is no Vision Transformer"),
        ("naflexvit_base_patch16_gap", ANY_SIZE),
        ("xcit_nano_12_p8_224", ANY_SIZE),
        ("samvit_base_patch16", "keeps its tokens in rows and columns"),
        ("vit_tiny_patch16_224.no_such_tag", "cannot be built"),
        ("vit_tiny_patch99_224", "timm has no such model; it has vit_tiny_patch16_224, "),
        ("frobnicate", "frobnicate: timm has no such model."),
    ],
)
def test_models_that_are_no_encoders(name, message):
    with torch.device("meta"), pytest.raises(ConfigError, match=re.escape(message)) as caught:
        TimmEncoder(name, pretrained=False)
    text = str(caught.value)
    assert text.startswith(f"checkpoint=timm:{name}")
    assert text.endswith(".")
    assert len(text.splitlines()) == 1


def test_an_image_size_that_a_model_does_not_have():
    with torch.device("meta"), pytest.raises(ConfigError, match=r"timm:resnet18 cannot be built: .*img_size"):
        TimmEncoder("resnet18", pretrained=False, image_size=32)


def test_patches_must_be_square(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda name, **options: CREATE(name, patch_size=(16, 8), **options))
    with torch.device("meta"), pytest.raises(ConfigError, match="has patches of 16 x 8 px; square ones are needed"):
        TimmEncoder("vit_tiny_patch16_224", pretrained=False)


@pytest.mark.parametrize("name", ["cait_xxs24_224", "convit_tiny"])
def test_models_whose_class_token_comes_late_are_refused_when_looked_at(name, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: CREATE(*args, depth=2, **options))
    encoder = TimmEncoder(name, pretrained=False, image_size=32).eval()
    with pytest.raises(ConfigError, match=r"takes \(2, 4, 192\), not a list of 5 tokens"):
        encoder.visit_layers(images_for(encoder), lambda view: None)


def test_it_offers_what_measuring_needs_of_an_encoder():
    for name in ("spec", "iter_blocks", "final_norm", "visit_layers"):
        assert hasattr(tiny_encoder(), name)
        assert name == "spec" or callable(getattr(TimmEncoder, name))
