"""Findings with values such as real networks give, made without a network."""

import math

import torch

from harmonize.types import Curve, EncoderSpec, Findings, Picture, Quantity, Surface

# name -> title, unit, figure, value at the first block, value at the last, value of uniform attention
CURVES = {
    "attention_distance": ("Attention distance", "px", "Figure 3", 70, 110, 116.49),
    "attention_distance_normalized": ("Attention distance, normalised", "", "Figure 3", 0.6, 0.95, 1.0),
    "nmi": ("Normalised mutual information", "", "Figure 4", 0.3, 0.01, 0.0),
    "attention_entropy": ("Attention entropy", "nat", "", 4.0, 5.1, 5.278),
    "prefix_attention": ("Attention to prefix tokens", "", "", 0.02, 0.3, 1 / 197),
    "head_divergence": ("Divergence between heads", "nat", "", 0.9, 0.1, 0.0),
    "head_map_similarity": ("Similarity of the heads' maps", "", "Figure 5", 0.4, 0.9, 1.0),
    "head_similarity": ("Similarity of heads", "", "Figure 5", 0.1, 0.5, None),
    "depth_similarity_block": ("Similarity with the block before", "", "Figure 5", 0.6, 0.95, None),
    "depth_similarity_attention": ("Similarity before and after self-attention", "", "Figure 5", 0.7, 0.9, None),
    "token_similarity": ("Similarity of tokens", "", "Figure 5", 0.2, 0.8, None),
    "fourier": ("Relative log amplitude at 0.86 π", "Δ log", "Figure 8", -2.9, -2.4, None),
    "fourier_attention": ("Relative log amplitude at 0.86 π", "Δ log", "Figure 8", -3.0, -2.5, None),
    "fourier_mean_free": ("Relative log amplitude, mean removed", "Δ log", "Figure 8", 0.1, -0.4, None),
    "fourier_mean_free_attention": ("Relative log amplitude, mean removed", "Δ log", "Figure 8", 0, -0.5, None),
    "fourier_radial": ("Relative log amplitude, radial", "Δ log", "Figure 8", -2.5, -2.2, None),
    "fourier_radial_attention": ("Relative log amplitude, radial", "Δ log", "Figure 8", -2.6, -2.3, None),
    "translation_share": ("Share of translation in self-attention", "", "Figure 6", 0.2, 0.8, None),
    "token_effective_rank": ("Effective rank of the tokens", "", "Figure 7", 90, 40, None),
    "image_effective_rank": ("Effective rank of the images", "", "Figure 7", 20, 60, None),
    "image_alpha": ("Decay of the image spectrum", "", "", 1.6, 1.0, None),
    "cka": ("CKA with the block before", "", "", 0.7, 0.95, None),
    "uniformity": ("Uniformity", "", "", -1.0, -2.5, None),
    "alignment": ("Alignment", "", "", 0.9, 0.3, None),
    "layer_probe_linear": ("Linear probe", "fraction correct", "Figure 10", 0.1, 0.68, None),
    "layer_probe_knn": ("k-NN probe", "fraction correct", "Figure 10", 0.08, 0.55, None),
}
WITH_HEADS = {"attention_distance", "attention_distance_normalized", "nmi", "attention_entropy", "prefix_attention"}


def spec(image_size: int = 224, patch_size: int = 16, depth: int = 12) -> EncoderSpec:
    side = image_size // patch_size
    return EncoderSpec(768, depth, 12, (image_size, image_size), patch_size, (side, side), 1, True)


def quantity(title: str, unit: str = "", figure: str = "") -> Quantity:
    definition = f"{title}, computed from the tokens of every image & averaged; x < y stays x < y."
    return Quantity(title, unit, definition, "arXiv:2305.00729; our definition", figure)


def findings(
    depth: int = 12, num_heads: int = 12, shift: float = 0.0, seed: int = 0, pictures: bool = True
) -> Findings:
    """``shift`` moves every curve by that share of its range."""
    noise = torch.Generator().manual_seed(seed)

    def jitter(scale: float) -> float:
        return scale * float(torch.randn((), generator=noise))

    found = Findings(num_images=256)
    for name, (title, unit, figure, first, last, uniform) in CURVES.items():
        layers = list(range(0 if name in {"fourier", "fourier_mean_free", "fourier_radial"} else 1, depth + 1))
        size = abs(last - first)
        values = []
        for layer in layers:
            share = layer / depth
            bend = 0.25 * math.sin(3 * math.pi * share)
            values.append(first + (last - first) * (share + bend * (1 - share) - shift) + jitter(0.03 * size))
        heads = None
        if name in WITH_HEADS:
            heads = [[value + jitter(0.12 * size) for _ in range(num_heads)] for value in values]
        found.curves[name] = Curve(
            quantity=quantity(title, unit, figure),
            layer=layers,
            value=values,
            error=[0.03 * size] * len(layers),
            heads=heads,
            head_errors=[[0.05 * size] * num_heads for _ in layers] if heads else None,
            uniform=None if uniform is None else [uniform] * len(layers),
        )
    for name in ("depth_similarity_block", "cka"):
        found.curves[name].value[0] = math.nan
    found.surfaces = surfaces(depth, shift)
    if pictures:
        found.pictures = make_pictures(depth)
    return found


def surfaces(depth: int, shift: float) -> dict[str, Surface]:
    halves = [layer / 2 for layer in range(2 * depth + 1)]
    wholes = [float(layer) for layer in range(1, depth + 1)]
    frequency = [i / 7 for i in range(7)]
    rank = [float(i) for i in range(1, 65)]

    def spectrum(layers: list[float], columns: list[float], drop: float) -> list[list[float]]:
        return [[-drop * math.log1p(5 * c / columns[-1]) * (1.4 + shift - y / depth) for c in columns] for y in layers]

    def errors(value: list[list[float]]) -> list[list[float]]:
        return [[0.03 * abs(number) for number in row] for row in value]

    fourier, tokens, images = spectrum(halves, frequency, 1.5), spectrum(wholes, rank, 3), spectrum(wholes, rank, 4)
    similar = [[math.exp(-abs(a - b) / (4 + 4 * shift)) for b in [0.0, *wholes]] for a in [0.0, *wholes]]
    amplitude, singular = quantity("Relative log amplitude", "Δ log", "Figure 8"), "Relative log singular value"
    return {
        "fourier_spectrum": Surface(amplitude, halves, "frequency / pi", frequency, fourier, errors(fourier)),
        "token_spectrum": Surface(quantity(f"{singular}, tokens", "", "Figure 7"), wholes, "rank", rank, tokens),
        "image_spectrum": Surface(quantity(f"{singular}, images", "", "Figure 7"), wholes, "rank", rank, images),
        "cka": Surface(quantity("CKA"), [0.0, *wholes], "layer", [0.0, *wholes], similar),
    }


def photo(side: int = 224, seed: int = 0) -> torch.Tensor:
    """A smooth coloured image (side, side, 3) in [0, 1] with a disc in it."""
    noise = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    image = torch.nn.functional.interpolate(noise, size=(side, side), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    return torch.where(((x - 0.2) ** 2 + y**2 < 0.2)[..., None], 0.3 * image + 0.6, image)


def make_pictures(depth: int = 12, rows: int = 14, cols: int = 14) -> dict[str, Picture]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    layers = torch.arange(1, depth + 1)
    queries = torch.tensor([[2, 3], [7, 8]])
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    maps = torch.empty(depth, 2, rows, cols)
    for i in range(depth):
        for q, (row, col) in enumerate(queries.tolist()):
            near = torch.exp(-((y - row) ** 2 + (x - col) ** 2) / (2 * (1 + i) ** 2))
            maps[i, q] = (near * (1 + 0.2 * normal(rows, cols).abs())) / near.sum()
    tiles = torch.nn.functional.interpolate(normal(3 * depth, 3, 4, 4), size=(rows, cols), mode="bicubic").sigmoid()
    image = torch.arange(3).repeat_interleave(60)
    before = normal(depth, 180, 2) + 3 * torch.stack([image.cos(), image.sin()], 1)
    after = before + layers[:, None, None] * 0.3 * torch.tensor([1.0, 0.5]) + 0.2 * normal(depth, 180, 2)
    some = torch.tensor([1, 6, 12]).clamp(max=depth)
    label = torch.arange(3).repeat_interleave(300)
    points = normal(3, 900, 2) * 2 + some[:, None, None] * 0.5 * torch.stack([(2 * label).cos(), (2 * label).sin()], 1)
    return {
        "attention_maps": Picture(
            quantity("Attention maps", "", "Figure 2"),
            "attention_maps",
            {"image": photo(), "maps": maps, "queries": queries, "layers": layers},
        ),
        "token_colors": Picture(
            quantity("Tokens as colours"),
            "token_colors",
            {
                "images": torch.stack([photo(seed=i) for i in range(3)]),
                "colors": tiles.reshape(3, depth, 3, rows, cols).permute(0, 1, 3, 4, 2),
                "layers": layers,
            },
        ),
        "token_moves": Picture(
            quantity("Tokens before and after self-attention", "", "Figure 6"),
            "token_moves",
            {"before": before, "after": after, "image": image, "layers": layers},
        ),
        "token_scatter": Picture(
            quantity("t-SNE of tokens", "", "Figure E.2"),
            "token_scatter",
            {"points": points, "label": label, "layers": some},
        ),
    }
