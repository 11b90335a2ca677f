"""Do tokens gather by image and by class? The t-SNE of Figure E.2 of arXiv:2305.00729."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from harmonize.diagnostics.base import Diagnostic, Images
from harmonize.types import EncoderSpec, Findings, Picture, Quantity, TokensView

TSNE = Quantity(
    "Tokens in the plane (t-SNE)",
    "",
    "t-SNE of the patch tokens of 18 images, 6 of each of 3 classes, one colour per class: perplexity 20, 1,000 "
    "iterations, random start. Distances between groups mean nothing.",
    "arXiv:2305.00729, Figure E.2; cl-vs-mim representation_analysis.ipynb",
    "Figure E.2",
)
NUM_CLASSES, IMAGES_PER_CLASS = 3, 6


class TokenTSNE(Diagnostic):
    """t-SNE of the last block's patch tokens of all images that it sees; needs scikit-learn."""

    sees = (Images, TokensView)

    def prepare(self, spec: EncoderSpec) -> None:
        """Declare the rows."""
        self.declare("label", 1)
        self.declare("tokens", 1)

    def update(self, view: Images | TokensView, index: Tensor) -> None:
        """Keep labels and the last block's tokens."""
        if isinstance(view, Images):
            self.add("label", 0, view.label, index)
        elif view.stage == "mlp" and view.layer == self.spec.depth:
            self.add("tokens", 0, view.tokens[:, self.spec.num_prefix_tokens :].float(), index)

    def describe(self, rows: dict[str, Tensor]) -> Findings:
        """Picture ``token_tsne``."""
        import sklearn.manifold

        tokens = rows["tokens"][:, 0].flatten(0, 1).nan_to_num(0.0, 0.0, 0.0).cpu()  # a picture; t-SNE would raise
        perplexity = min(20.0, (len(tokens) - 1) / 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tsne = sklearn.manifold.TSNE(2, perplexity=perplexity, learning_rate="auto", init="random", random_state=0)
            points = torch.from_numpy(tsne.fit_transform(tokens.numpy()))
        arrays = {
            "points": points[None],
            "label": rows["label"][:, 0].cpu().repeat_interleave(self.spec.num_patches),
            "layers": torch.tensor([self.spec.depth]),
        }
        return Findings(pictures={"token_tsne": Picture(TSNE, "token_scatter", arrays)})
