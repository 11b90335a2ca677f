"""What a run does after training: the entries of ``evaluate``, once each, into its folder and its metrics."""

import json

import pytest

from harmonize.cli import main
from harmonize.comparison import read_run
from harmonize.config import compose, run_dir
from tests.training.test_run import images, overrides, rows, run  # noqa: F401

KNN, TOP1 = "evaluate/knn/top1 k=1, temperature=0.07", "evaluate/linear_probe/top1"
ENTRIES = 'evaluate=["knn eval.k=[1]", "linear_probe eval.feature.pool=cls"]'


def test_a_run_is_evaluated_once_and_further_when_asked(overrides, tmp_path, capsys):  # noqa: F811
    folder = tmp_path / "run"
    metrics = run(*overrides, "evaluate=[knn eval.k=[1]]".replace("knn eval.k=[1]", '"knn eval.k=[1]"'))
    results = folder / "evaluations" / "knn-eval.k-1" / "results.json"
    (top1,) = (row for row in json.loads(results.read_text()) if row["metric"] == "top1")
    assert metrics[KNN] == top1["value"] == rows(folder)[-1][KNN]
    assert TOP1 not in metrics
    assert not (folder / "evaluations" / "features").exists()
    assert "knn, top1 k=1" in capsys.readouterr().out

    before = results.read_bytes(), (folder / "checkpoints" / "last.ckpt").read_bytes()
    metrics = run(*overrides, ENTRIES)
    assert {KNN, TOP1} <= set(metrics)
    assert "This run is finished" not in capsys.readouterr().out
    assert (results.read_bytes(), (folder / "checkpoints" / "last.ckpt").read_bytes()) == before
    found = read_run(folder)
    assert found.metrics[TOP1] == metrics[TOP1]

    again = run(*overrides, ENTRIES)
    assert "This run is finished" in capsys.readouterr().out
    assert again == metrics


def test_curves_of_an_evaluation_are_part_of_the_run(overrides, tmp_path):  # noqa: F811
    run(*overrides, 'evaluate=["frequency_noise eval.modes=[matched] eval.num_frequencies=2"]')
    curve = read_run(tmp_path / "run").by_layer["evaluate/frequency_noise/top1 matched"]
    assert list(curve) == pytest.approx([0, 3.14159], abs=1e-4)


def test_what_is_evaluated_does_not_name_the_run():
    plain, more = compose([]), compose(["evaluate=[knn]", "scale.hidden_dim=4096"])
    assert run_dir(plain) == run_dir(more)
    assert run_dir(plain) != run_dir(compose(["scale.hidden_dim=512"]))


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("kn", "evaluate, 'kn': eval=kn: eval must be one of"),
        ("knn eval.memori=3", "evaluate, 'knn eval.memori=3': Unknown key eval.memori; did you mean eval.memory?"),
        ("fine_tune eval.epochs=0", "eval.epochs must be a whole number of at least 1, not 0"),
        ("knn 'eval.k=3", "No closing quotation"),
        ("", "evaluate must be a list of values, each a text"),
    ],
)
def test_mistakes_are_found_before_anything_starts(entry, sentence, tmp_path, capsys):
    quoted = entry.replace("'", "\\'")
    assert main(["train", f"evaluate=['{quoted}']", f"run.dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert sentence in error, error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()
