"""What the tests of diagnostics share: all of them, a network with an opinion, a player of given views, comparisons."""

import torch
from torch import nn

from harmonize.diagnostics.alignment import AlignmentUniformity
from harmonize.diagnostics.attention_distance import AttentionDistance
from harmonize.diagnostics.attention_information import AttentionEntropy, MutualInformation
from harmonize.diagnostics.cka import CKA
from harmonize.diagnostics.fourier import Fourier
from harmonize.diagnostics.head_diversity import HeadDiversity, HeadSimilarity
from harmonize.diagnostics.pictures import AttentionPictures, TokenColors
from harmonize.diagnostics.singular_values import ImageSpectrum, TokenSpectrum
from harmonize.diagnostics.token_similarity import DepthSimilarity, TokenSimilarity
from harmonize.diagnostics.token_translation import TokenMoves, TokenTranslation
from harmonize.types import AttentionView, Batch, EncoderSpec, TokensView
from tests.helpers import tiny_encoder

KINDS = {
    "attention_distance": AttentionDistance,
    "mutual_information": MutualInformation,
    "attention_entropy": AttentionEntropy,
    "head_diversity": HeadDiversity,
    "head_similarity": HeadSimilarity,
    "depth_similarity": DepthSimilarity,
    "token_similarity": TokenSimilarity,
    "token_translation": TokenTranslation,
    "token_spectrum": TokenSpectrum,
    "image_spectrum": ImageSpectrum,
    "fourier": Fourier,
    "cka": CKA,
    "alignment": AlignmentUniformity,
    "attention_maps": AttentionPictures,
    "token_colors": TokenColors,
    "token_moves": TokenMoves,
}
PREFIXES = {0: {"class_token": False}, 1: {}, 3: {"num_registers": 2}}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def all_diagnostics(spec, **bounds):
    """Every kind; ``bounds`` by name are the number of images that it looks at."""
    return {name: kind(spec, num_images=bounds.get(name)) for name, kind in KINDS.items()}


def opinionated(num_prefix=1, **options):
    """A network on a grid that is not square, whose attention is far from uniform, in eval mode."""
    options = {"image_size": (16, 24), "depth": 3} | PREFIXES[num_prefix] | options
    encoder = tiny_encoder(**options).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return encoder


def clean_batch(spec, num_images=8, seed=0, first=0):
    """Images that differ in their mean as well, with positions from ``first`` on."""
    image = randn(num_images, 3, *spec.image_size, seed=seed) + randn(num_images, 3, 1, 1, seed=seed + 1)
    index = first + torch.arange(num_images)
    return Batch(views={}, label=index % 3, index=index, seed=index.clone(), image=image)


def part(batch, rows):
    rows = torch.as_tensor(rows, dtype=torch.int64)
    return Batch({}, batch.label[rows], batch.index[rows], batch.seed[rows], batch.image[rows])


class Player(nn.Module):
    """An encoder that shows given views: ``play(images, call)`` makes them, ``call`` counts the forward passes."""

    def __init__(self, play, depth=2, num_heads=2, grid=(4, 6), width=24, num_prefix=0):
        super().__init__()
        image_size = (grid[0] * 4, grid[1] * 4)
        self.spec = EncoderSpec(width, depth, num_heads, image_size, 4, grid, num_prefix, num_prefix > 0)
        self.play, self.calls = play, 0
        self.eval()

    def visit_layers(self, images, visit):
        for view in self.play(images, self.calls):
            visit(view)
        self.calls += 1


def maps_view(layer, maps, output=None):
    """The view of a block whose attention is ``maps`` (B, H, S, S)."""
    size = maps.shape[-1]
    key = torch.eye(size).expand(*maps.shape[:2], size, size)
    query = maps.clamp_min(1e-30).log()  # softmax gives them back
    return AttentionView(layer, query, key, query if output is None else output, None, 1.0)


def stream(places):
    """Views of the residual stream from its tokens: the embedding, then after attention and MLP of each block."""
    yield TokensView(0, "embedding", places[0])
    for layer in range(1, (len(places) + 1) // 2):
        before = places[2 * layer - 2]
        yield TokensView(layer, "attention", places[2 * layer - 1], before)
        yield TokensView(layer, "mlp", places[2 * layer], before)


def numbers(found):
    """Everything that was found, as fp64 tensors by name."""
    out = {"num_images": torch.tensor(float(found.num_images))}
    for kind in ("curves", "surfaces"):
        for name, x in getattr(found, kind).items():
            for key in ("value", "error", "heads", "head_errors", "uniform"):
                if getattr(x, key, None) is not None:
                    out[f"{kind} {name} {key}"] = torch.tensor(getattr(x, key), dtype=torch.float64)
    for name, picture in found.pictures.items():
        for key, array in picture.arrays.items():
            out[f"picture {name} {key}"] = array.double()
    return out


def assert_same(found, other, tolerance):
    """The same numbers, up to ``tolerance`` times the largest of each kind; NaN where the other has it."""
    ours, theirs = numbers(found), numbers(other)
    assert list(ours) == list(theirs)
    for name, x in ours.items():
        y = theirs[name]
        scale = y.nan_to_num(0.0).abs().max().item() if y.numel() else 0.0
        torch.testing.assert_close(
            x, y, rtol=tolerance, atol=tolerance * scale, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
