"""harmonize report: verdicts from run folders with planted numbers, the page in a browser, numbers that are kept."""

import csv
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from harmonize.cli import main
from harmonize.config import load_config, run_dir
from harmonize.reporting import of_runs, read_studies
from harmonize.reports.comparison import Cell
from harmonize.reports.interactive import library
from harmonize.reports.study import Finding, findings_markdown, groups_from_plain, groups_to_plain, study_page
from tests.reports.browser import told_by
from tests.test_comparison import SMALL, make, maker  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
STUDY = """
weights:
  question: Does the weight matter? & how <much>?
  runs: ["loss.lambda=0,1 seed=0,1,2 run.root={root}"]
  groups:
    MIM: {{loss.lambda: 0}}
    CL: {{loss.lambda: 1}}
  over: loss.lambda
  curves: [nmi]
  rows: [weights/rows.csv]
  axes: [planted]
  claims:
    - {{claim: CL probes better, source: Figure 1, quantity: val/linear_top1, more: CL, less: MIM}}
    - {{claim: MIM has more information, quantity: nmi, layers: late, more: MIM, less: CL}}
    - {{claim: They learn alike, quantity: val/knn_top1, more: MIM, less: MIM, remark: planted}}
    - claim: The planted rows rise
      quantity: planted
      more: {{group: CL, layers: last}}
      less: {{group: CL, layers: first}}
    - {{claim: Nobody measured it, quantity: val/nothing, more: CL, less: MIM}}
"""
VERDICTS = ["supported", "contradicted", "not supported", "supported", "not tested"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """CL's probe 0.3 above MIM's, its information 0.5 above; three seeds."""
    root = tmp_path_factory.mktemp("runs")
    run = maker(root)
    for weight in (0, 1):
        for seed in range(3):
            settings = [f"loss.lambda={weight}", f"seed={seed}", f"run.root={root}"]
            folder = run(
                f"{weight}-{seed}", 0.4 + 0.3 * weight + 0.01 * seed, *settings, shift=0.5 * weight + seed / 100
            )
            folder.rename(run_dir(load_config(folder / "config.yaml")))
    return root


@pytest.fixture
def studies(runs, tmp_path):
    """A file of studies beside runs of its own."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    text = STUDY.format(root=tmp_path).replace("seed=0,1,2", f"seed=0,1,2 data.batch_size=32 {' '.join(SMALL)}")
    (tmp_path / "studies.yaml").write_text(text)
    (tmp_path / "weights").mkdir()
    rows = ["group,seed,quantity,at,value"]
    rows += [f"CL,{seed},planted,{at},{at + seed / 10}" for seed in range(3) for at in (0, 1, 2, 9)]
    (tmp_path / "weights" / "rows.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "studies.yaml"


def report(path, *options):
    assert main(["report", str(path), *map(str, options)]) == 0


def table(folder):
    with (folder / "findings.csv").open() as file:
        return list(csv.DictReader(file))


def test_claims_are_judged_by_the_runs(studies, tmp_path, capsys):
    report(studies, "--out", tmp_path / "out")
    shown = capsys.readouterr().out
    assert "✓ supported" in shown
    assert "✗ contradicted" in shown
    found = table(tmp_path / "out")
    assert [row["verdict"] for row in found] == VERDICTS
    assert float(found[0]["difference"]) == pytest.approx(0.3)
    assert found[0]["more_values"].split() == ["0.8", "0.81", "0.82"]
    # Three seeds 0.01 apart on either side: t with 4 degrees of freedom is 2.776.
    assert float(found[0]["low"]) == pytest.approx(0.3 - 2.776445 * 0.01 * (2 / 3) ** 0.5, abs=1e-6)
    assert found[3]["more_values"].split() == ["9", "9.1", "9.2"]
    lines = (tmp_path / "out" / "FINDINGS.md").read_text().splitlines()
    assert lines[2].startswith(
        "| ✓ supported | CL probes better | Figure 1 | val/linear_top1: CL 0.810 ± 0.010; MIM 0.51"
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "5 claims: 2 supported, 1 contradicted, 1 not supported, 1 not tested." in page
    assert "Does the weight matter? &amp; how &lt;much&gt;?" in page


def test_numbers_are_kept_and_stand_in_for_the_runs(studies, tmp_path, capsys):
    report(studies, "--collect", "--out", tmp_path / "out")
    before = (tmp_path / "findings.csv").read_bytes()
    assert [row["verdict"] for row in table(tmp_path)] == VERDICTS
    for folder in tmp_path.glob("hybrid-*"):
        shutil.rmtree(folder)
    report(studies, "--collect", "--out", tmp_path / "again")
    assert "weights: from " in capsys.readouterr().out
    report(studies, "--kept", "--out", tmp_path / "kept")
    assert (tmp_path / "kept" / "findings.csv").read_bytes() == before
    assert (tmp_path / "findings.csv").read_bytes() == before
    plots = [
        re.findall(r'json">(.*?)</script>', (tmp_path / out / "report.html").read_text()) for out in ("out", "again")
    ]
    assert plots[0] == plots[1]
    (tmp_path / "weights" / "results.json").unlink()
    assert main(["report", str(studies)]) == 2
    assert "no runs are there yet; start them with: python train.py loss.lambda=0,1" in capsys.readouterr().err


def test_a_part_of_the_runs_does_not_take_the_place_of_all(studies, tmp_path, capsys):
    report(studies, "--collect", "--out", tmp_path / "out")
    before = (tmp_path / "weights" / "results.json").read_bytes()
    for folder in list(tmp_path.glob("hybrid-*"))[:2]:
        shutil.rmtree(folder)
    capsys.readouterr()
    report(studies, "--collect", "--out", tmp_path / "out")
    assert "results.json, which holds 6 runs." in capsys.readouterr().out
    assert (tmp_path / "weights" / "results.json").read_bytes() == before
    report(studies, "--out", tmp_path / "out")  # who only looks sees the runs that are here
    assert "results.json" not in capsys.readouterr().out


def test_groups_survive_being_written(make):  # noqa: F811
    groups = of_runs([make("a", 0.5, "loss.lambda=0.2"), make("b", 0.6, "loss.lambda=0.8")]).groups
    plain = groups_to_plain(groups)
    assert groups_to_plain(groups_from_plain(json.loads(json.dumps(plain)))) == plain
    assert {one.name for one in groups_from_plain(plain)} == {"lambda=0.2", "lambda=0.8"}


def test_the_published_findings_are_what_the_kept_numbers_say():
    studies = read_studies(ROOT / "experiments" / "findings.yaml", kept=True)
    assert studies
    assert (ROOT / "experiments" / "FINDINGS.md").read_text() == findings_markdown(studies)
    for study in studies:
        results = (ROOT / "experiments" / study.name / "RESULTS.md").read_text()
        assert findings_markdown([study]).strip() in results
        assert all(len(f.more_values.values) >= 3 for f in study.findings if f.verdict != "not tested")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("less: MIM}", "less: MIN}", "there is no group MIN; there are MIM, CL"),
        ("over: loss", "above: loss", "weights: unknown above; there is axes, claims"),
        ("MIM: {loss.lambda: 0}", "MIM: {seed: 0}", "group MIM: its runs differ in loss.lambda; say which are meant"),
        ("quantity: nmi, layers: late", "quantity: nmi", "a claim about it needs layers"),
    ],
)
def test_mistakes_get_a_sentence(studies, capsys, old, new, sentence):
    assert old in studies.read_text()
    studies.write_text(studies.read_text().replace(old, new))
    assert main(["report", str(studies)]) == 2
    error = capsys.readouterr().err
    assert sentence in error, error
    assert main(["report", str(studies), "--only", "nothing"]) == 2
    assert main(["report", str(studies), "--kept", "scale=gpu"]) == 2
    assert "--kept shows what has been kept" in capsys.readouterr().err


# ---- the page --------------------------------------------------------------------------------------------------------

TELL = """
onload = () => setTimeout(() => {
  const plots = [...document.querySelectorAll('.js-plot')];
  const ink = getComputedStyle(document.body).color;
  const texts = plots.map(plot => plot.querySelector('.xtitle')).filter(Boolean).map(t => getComputedStyle(t).fill);
  parent.postMessage([document.documentElement.scrollWidth, plots.length,
    plots.filter(plot => plot.querySelector('svg.main-svg .trace')).length,
    Math.max(...plots.map(plot => plot.querySelector('svg.main-svg').getBoundingClientRect().right)),
    texts.every(text => text === ink), ink].join(' | '), '*');
}, 1500);
"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not on PATH")
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")])
def test_in_a_browser(studies, tmp_path, width, scheme):
    """Every figure is drawn, within the screen, in the page's own colours, and nothing is loaded from elsewhere."""
    report(studies, "--out", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="https?:', page.replace(library(), ""))
    told = told_by(page, TELL, width, tmp_path, dark=scheme == "dark")
    page_width, plots, drawn, right, same_ink, ink = told.split(" | ")
    assert int(page_width) <= width
    assert float(right) <= width
    assert int(plots) == int(drawn) == 4  # trade-off, over the weight, information, planted rows
    assert same_ink == "true"
    bright = sum(map(int, re.findall(r"\d+", ink)[:3])) > 384
    assert bright == (scheme == "dark")


def test_a_page_says_what_is_missing_without_plotly(make, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main(["report", str(make("a", 0.5)), "--out", str(tmp_path / "out")]) == 2
    assert "A report needs plotly: pip install 'harmonize[report]'." in capsys.readouterr().err


def test_hostile_names_stay_text(make, tmp_path):  # noqa: F811
    study = of_runs([make("a", 0.5)])
    bad = '</script><script>alert("x")</script>'
    finding = Finding(bad, bad, "supported", bad, bad, bad, Cell([1.0]), Cell([2.0]), 1.0, 0.5, 1.5, 2.0, bad)
    groups = [replace(one, name=bad) for one in study.groups]
    page = study_page([replace(study, name=bad, groups=groups, findings=[finding])], bad, bad)
    assert "<script>alert" not in page


def test_runs_that_are_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "no run folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
