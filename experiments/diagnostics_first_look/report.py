"""The table of README.md, from the ``diagnostics.json`` of the analysis: values with standard errors at three depths.

With the last epoch's file of the hybrid's run also ``figures/gradient_cosine.png``, which only training measures.

Command: python experiments/diagnostics_first_look/report.py experiments/diagnostics_first_look/diagnostics.json
         [outputs/diagnostics_first_look/hybrid/diagnostics/epoch_0004.json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from harmonize.reports.figures import depth_figure
from harmonize.reports.files import from_plain
from harmonize.reports.style import to_png

ROWS = {
    "attention_distance_normalized": "attention distance / uniform",
    "nmi": "mutual information",
    "attention_entropy": "attention entropy / log N",
    "head_map_similarity": "similarity of the heads' attention",
    "head_similarity": "similarity across heads",
    "token_similarity": "similarity across tokens",
    "depth_similarity_attention": "similarity before / after self-attention",
    "translation_share": "common translation by self-attention",
    "token_effective_rank": "effective rank, tokens of an image",
    "image_effective_rank": "effective rank, images",
    "fourier": "relative log amplitude",
    "fourier_mean_free": "the same, channel means removed",
    "layer_probe_linear": "linear probe",
    "layer_probe_knn": "k-NN",
}


def main(path: str) -> None:
    """Print the table as Markdown."""
    networks = json.loads(Path(path).read_text())["networks"]
    depth = networks[0]["encoder"]["depth"]
    columns = [(n["name"], n["curves"]) for n in networks] + [("untrained", networks[0]["untrained"]["curves"])]
    print("| | block | " + " | ".join(name for name, _ in columns) + " |")
    print("|---|---|" + "---|" * len(columns))
    for key, label in ROWS.items():
        for block in (1, depth // 2, depth):
            cells = []
            for _, curves in columns:
                at = curves[key]["layer"].index(block)
                cells.append(f"{curves[key]['value'][at]:.3g} ± {curves[key]['standard_error'][at]:.1g}")
            print(f"| {label if block == 1 else ''} | {block} | " + " | ".join(cells) + " |")


def draw_gradients(path: str) -> None:
    """Draw the cosine between the two losses' gradients on every block."""
    findings = from_plain(json.loads(Path(path).read_text()))
    file = Path(__file__).parent / "figures" / "gradient_cosine.png"
    file.write_bytes(to_png(depth_figure("gradient_cosine", {"hybrid": findings})))


if __name__ == "__main__":
    main(sys.argv[1])
    for path in sys.argv[2:]:
        draw_gradients(path)
