"""Which spatial frequencies the tokens hold, after every self-attention and every MLP: Figures 8, 9 and 11."""

from __future__ import annotations

from torch import Tensor

from harmonize.diagnostics.base import Diagnostic, curve
from harmonize.functional.fourier import (
    dc_log_amplitude,
    diagonal,
    diagonal_frequencies,
    log_amplitude,
    radial,
    radial_frequencies,
)
from harmonize.functional.statistics import mean_and_error
from harmonize.types import EncoderSpec, Findings, Quantity, Surface, TokensView

OFFICIAL = (
    "arXiv:2305.00729, Figure 8; how-do-vits-work fourier_analysis.ipynb, cl-vs-mim representation_analysis.ipynb"
)
PLACES = {"": "after the block", "_attention": "after the block's self-attention"}
VARIANTS = {
    "fourier": (
        "Relative log amplitude of the highest frequency",
        "Log amplitude of the token map's Fourier transform at the highest frequency on the diagonal, minus that of "
        "the mean (DC); mean over channels and images",
        OFFICIAL,
    ),
    "fourier_mean_free": (
        "Relative log amplitude of the highest frequency, channel means removed",
        "The same after each channel's mean over all images and tokens has been subtracted: a constant offset of a "
        "channel, which says nothing about an image, dominates the official value",
        "our definition",
    ),
    "fourier_radial": (
        "Relative log amplitude of the highest frequency, over all directions",
        "As the official one, at the ring of frequency pi instead of one direction",
        "our definition",
    ),
    "fourier_radial_mean_free": (
        "Relative log amplitude of the highest frequency, over all directions, channel means removed",
        "Both changes together",
        "our definition",
    ),
}


class Fourier(Diagnostic):
    """Relative log amplitudes: the official diagonal and a radial variant, with and without the channels' means."""

    sees = (TokensView,)

    def prepare(self, spec: EncoderSpec) -> None:
        """Declare the rows."""
        for name in ("diagonal", "radial", "mean"):
            self.declare(name, 2 * spec.depth + 1)

    def update(self, view: TokensView, index: Tensor) -> None:
        """Add the tokens at one place for some images."""
        place = 2 * view.layer - (view.stage == "attention")
        tokens = view.tokens[:, self.spec.num_prefix_tokens :].float()
        spectrum = log_amplitude(tokens, self.spec.grid)
        self.add("diagonal", place, diagonal(spectrum, self.spec.grid), index)
        self.add("radial", place, radial(spectrum, self.spec.grid), index)
        self.add("mean", place, tokens.mean(dim=1), index)

    def describe(self, rows: dict[str, Tensor]) -> Findings:
        """Curves ``fourier[_radial][_mean_free][_attention]``, and the whole spectra as surfaces of these names."""
        means = rows["mean"].double()
        mean_free = dc_log_amplitude(means - means.mean(dim=0), self.spec.num_patches)  # (images, places)
        found = Findings()
        for cut, frequencies in (
            ("diagonal", diagonal_frequencies(self.spec.grid)),
            ("radial", radial_frequencies(self.spec.grid)),
        ):
            for suffix, dc in (("", rows["diagonal"][..., 0].double()), ("_mean_free", mean_free)):
                relative = rows[cut].double() - dc[..., None]
                relative[..., 0] = 0.0
                name = f"fourier{'_radial' if cut == 'radial' else ''}{suffix}"
                title, definition, source = VARIANTS[name]
                for places, where in PLACES.items():
                    text = f"{definition}; {where}. High: fine detail, low: smooth maps."
                    quantity = Quantity(title, "", text, source, "Figure 8")
                    every = slice(0, None, 2) if places == "" else slice(1, None, 2)
                    layers = [0, *self.blocks] if places == "" else self.blocks
                    found.curves[name + places] = curve(quantity, layers, relative[:, every, -1])
                value, error = mean_and_error(relative)
                quantity = Quantity(
                    title.replace("of the highest frequency", "over frequency"),
                    "",
                    f"{definition}, at every frequency; half numbers are after a self-attention.",
                    source,
                    "Figure 8",
                )
                steps = [place / 2 for place in range(2 * self.spec.depth + 1)]
                found.surfaces[name] = Surface(
                    quantity, steps, "frequency / pi", frequencies, value.tolist(), error.tolist()
                )
        return found
