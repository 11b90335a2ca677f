"""The table and the curves of this experiment, from the run folders' own files.

Command: python experiments/first_run/report.py outputs/first_run/{hybrid,contrastive,mim}
"""

import argparse
import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
COLOURS = {"hybrid": "tab:purple", "contrastive": "tab:blue", "mim": "tab:orange"}


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path, key: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[key]) for row in rows(run) if key in row]
    return [step for step, _ in found], [value for _, value in found]


def last(run: Path, key: str) -> float | None:
    values = curve(run, key)[1]
    return values[-1] if values else None


def percent(run: Path, key: str) -> str:
    value, error = last(run, key), last(run, f"{key}_se")
    return "" if value is None else f"{100 * value:.1f} ± {100 * error:.1f}"


def table(runs: list[Path]) -> str:
    lines = [
        "| run | steps | contrastive loss (chance) | MIM loss (mean colour) | k-NN before | k-NN after | probe before "
        "| probe after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        losses = []
        for name in ("contrastive", "mim"):
            value, chance = last(run, f"epoch/loss_{name}"), last(run, f"train/chance_{name}")
            losses.append("" if value is None else f"{value:.3f} ({chance:.3f})")
        accuracies = [
            percent(run, f"{stage}/{probe}_top1") for probe in ("knn", "linear") for stage in ("untrained", "val")
        ]
        lines.append(f"| {run.name} | {rows(run)[-1]['step']} | {' | '.join(losses + accuracies)} |")
    return "\n".join(lines)


def figure(runs: list[Path], path: Path) -> None:
    panels = [
        ("train/loss_contrastive", "contrastive loss"),
        ("train/loss_mim", "MIM loss"),
        ("val/knn_top1", "k-NN top-1 (%)"),
        ("val/linear_top1", "linear probe top-1 (%)"),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4), layout="constrained")
    for axis, (key, title) in zip(axes, panels, strict=True):
        for run in runs:
            steps, values = curve(run, key)
            total = rows(run)[-1]["step"]
            if key.startswith("val/"):
                before = last(run, key.replace("val/", "untrained/"))
                steps, values = [0, *steps], [before, *values]
                values = [100 * value for value in values]
            if values:
                axis.plot(
                    [100 * step / total for step in steps],
                    values,
                    label=run.name,
                    color=COLOURS[run.name],
                    marker="o" if key.startswith("val/") else None,
                    markersize=3,
                )
            chance = last(run, key.replace("train/loss_", "train/chance_"))
            if key.startswith("train/") and chance is not None:
                axis.axhline(chance, color="grey", linestyle=":", linewidth=1)
        axis.set_title(title)
        axis.set_xlabel("share of the run (%)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].axhline(100 * last(runs[0], "val/chance_top1"), color="grey", linestyle=":", linewidth=1)
    axes[3].axhline(100 * last(runs[0], "val/chance_top1"), color="grey", linestyle=":", linewidth=1)
    axes[3].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    runs = parser.parse_args().runs
    print(table(runs))
    figure(runs, HERE / "curves.png")
    for run in runs:
        if run.parent.resolve() != (HERE / "runs").resolve():
            (HERE / "runs" / run.name).mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "config.yaml", "versions.json"):
                shutil.copy(run / name, HERE / "runs" / run.name / name)


if __name__ == "__main__":
    main()
