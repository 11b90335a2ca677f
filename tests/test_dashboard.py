"""harmonize dashboard: the real client of W&B against a stand-in of its server, and the keys of real runs."""

import io
import re
import sys

import pytest
import wandb
from omegaconf import OmegaConf
from PIL import Image

from harmonize.cli import main
from harmonize.config import compose, save_config
from harmonize.dashboard import GROUPS, STEP, parts
from harmonize.diagnostics.base import Diagnostic, curve
from harmonize.types import Findings, Quantity, TokensView
from tests.training.test_loggers import finished_records
from tests.training.test_run import TINY
from tests.training.wandb_server import WandbServer

SECTIONS = ["Losses", "Probes", "Diagnostics by depth", "Gradients", "Health", "System"]
# Standard errors, costs, what W&B keeps itself, the same curves over depth instead of steps, further evaluations, and a
# supervised network's only term, which is its loss.
NOT_SHOWN = re.compile(
    r"\w+/\w+_se|untrained/chance_top1|diagnostics/seconds|depth/.*|_\w+|trainer/global_step|evaluate/.*|"
    r"\w+/(loss|grad_norm)_supervised"
)
ON_A_GPU = {"train/gpu_memory_gib"}
TINY_RUN = [
    *(o for o in TINY if not o.startswith(("diagnostics=", "logger=", "trainer.max_epochs="))),
    "data=shapes",
    "data.num_train=32",
    "data.num_val=32",
    "trainer.max_steps=1",
    "logger=wandb",
]
EVALUATIONS = "evaluate=[knn,linear_probe,'fine_tune eval.epochs=1 eval.warmup_epochs=0 eval.batch_size=8']"


@pytest.fixture
def online(monkeypatch):
    """online(server): where the client of this process finds it."""

    def set_up(server):
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)

    for variable in ("WANDB_MODE", "WANDB_SERVICE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", "nothing")
    monkeypatch.setenv("HOME", "nothing")
    wandb.teardown()  # what an earlier test has set up
    yield set_up
    wandb.teardown()


def dashboard(online, *arguments):
    """The workspace's and the report's spec, as the server got them, and the server."""
    with WandbServer() as server:
        online(server)
        assert main(["dashboard", *arguments]) == 0
    return server, *(view["spec"] for view in server.views)


def sections_of(workspace):
    return workspace["section"]["panelBankConfig"]["sections"]


def keys_of(panels):
    """All metrics and pictures that panels of W&B show."""
    return {key for panel in panels for name in ("metrics", "mediaKeys") for key in panel["config"].get(name, ())}


# ---- what is plotted is what is logged -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The keys that W&B keeps of a hybrid and of a supervised run of one step, and of their machine, with a folder."""
    root = tmp_path_factory.mktemp("runs")
    supervised = [o for o in TINY_RUN if not o.startswith("loss.")] + ["loss=supervised", "diagnostics=none"]
    Image.new("L", (1, 1)).save(dot := io.BytesIO(), "PNG")  # pictures that take no time
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "0.5")
        patch.setattr("harmonize.training.callbacks.diagnostics.to_png", lambda *_, **__: dot.getvalue())
        wandb.teardown()
        assert main(["train", *TINY_RUN, EVALUATIONS, f"run.dir={root / 'hybrid'}"]) == 0
        assert main(["train", *supervised, f"run.dir={root / 'supervised'}"]) == 0
        wandb.teardown()
    paths = root.glob("*/wandb/offline-run-*/run-*.wandb")
    records = [record for path in paths for record in finished_records(path)]
    history = {item.key or item.nested_key[0] for record in records for item in record.history.item}
    return history, {item.key for record in records for item in record.stats.item}, root / "hybrid"


def test_every_panel_shows_what_a_run_logs_and_all_of_it(logged, online):
    history, system, folder = logged
    _, workspace, report = dashboard(online, "--run", str(folder))
    *training, machine = sections_of(workspace)
    shown = keys_of(panel for section in training for panel in section["panels"])
    assert sorted(shown - history) == sorted(ON_A_GPU)
    assert [key for key in sorted(history - shown) if not NOT_SHOWN.fullmatch(key)] == []
    assert {key for key in keys_of(machine["panels"]) if "/gpu." not in key} <= {f"system/{key}" for key in system}
    grids = [block["metadata"]["panelBankSectionConfig"] for block in report["blocks"] if block["type"] == "panel-grid"]
    assert [keys_of(grid["panels"]) for grid in grids] == [keys_of(s["panels"]) for s in sections_of(workspace)]


# ---- what the server gets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [6, 12])
def test_the_workspace(online, capsys, depth):
    server, workspace, _ = dashboard(online, "--depth", str(depth), "--project", "mine", "--name", "Overview")
    shown = capsys.readouterr()
    assert re.fullmatch(
        rf"Workspace: {server.url}/somebody/mine\?nw=\w+\nReport: {server.url}/somebody/mine/reports/Overview--\w+\n",
        shown.out,
    )
    assert "View saved" not in shown.err
    assert server.projects == ["mine"]
    view = server.views[0]
    assert (view["type"], view["projectName"], view["displayName"]) == ("project-view", "mine", "Overview")
    sections = sections_of(workspace)
    assert [section["name"] for section in sections] == SECTIONS
    panels = {panel["config"]["chartTitle"]: panel["config"] for section in sections for panel in section["panels"]}
    assert len(panels) == sum(len(section["panels"]) for section in sections)  # no title twice
    nmi = panels["Normalised mutual information of attention (nmi)"]
    assert nmi["metrics"] == [f"diagnostics/nmi/layer_{layer:02d}" for layer in range(1, depth + 1)]
    ratio = panels["Gradient norm of L_CL over that of L_MIM (gradient_ratio)"]
    assert ratio["metrics"] == [f"diagnostics/gradient_ratio/layer_{layer:02d}" for layer in range(depth + 1)]
    assert nmi["xAxis"] == panels["Loss"]["xAxis"] == workspace["section"]["settings"]["xAxis"] == STEP
    assert panels["CPU"]["xAxis"] == "_runtime"
    assert nmi["smoothingType"] == panels["Linear probe, top-1"]["smoothingType"] == "none"
    assert panels["Loss"]["smoothingWeight"] > 0
    assert panels["Loss"]["showOriginalAfterSmoothing"]
    (runs,) = workspace["section"]["runSets"]
    assert [key["name"].replace(".value.", ".") for key in runs["grouping"]] == list(GROUPS)
    assert all(OmegaConf.select(compose(["loss=hybrid"]), key) is not None for key in GROUPS)


def test_the_report_says_how_to_read_each_panel(online):
    server, _, report = dashboard(online, "--entity", "team")
    assert {view["entityName"] for view in server.views} == {"team"}
    assert server.views[1]["type"] == "runs"
    headings = [block["children"][0]["text"] for block in report["blocks"] if block["type"] == "heading"]
    assert headings == SECTIONS
    grids = [block["metadata"] for block in report["blocks"] if block["type"] == "panel-grid"]
    lists = [block["children"] for block in report["blocks"] if block["type"] == "list"]
    for grid, words in zip(grids, lists, strict=True):
        assert grid["runSets"][0]["project"]["name"] == "harmonize"
        assert len(grid["runSets"][0]["grouping"]) == len(GROUPS)
        assert len(words) == len(grid["panelBankSectionConfig"]["panels"])
    assert "arXiv:2305.00729, Figure 4" in str(lists[2])


def test_the_workspace_alone(online, capsys):
    server, _ = dashboard(online, "--no-report")
    assert len(server.views) == 1
    assert "Report" not in capsys.readouterr().out


NORM = Quantity("Token norm", "", "Norm of patch tokens after the block.", "ours")


class TokenNorm(Diagnostic):
    """The example of docs/diagnostics.md."""

    sees = (TokensView,)

    def prepare(self, spec):
        self.declare("norm", spec.depth + 1)

    def update(self, view, index):
        if view.stage != "attention":
            self.add("norm", view.layer, view.tokens[:, self.spec.num_prefix_tokens :].norm(dim=-1).mean(dim=-1), index)

    def describe(self, rows):
        return Findings(curves={"token_norm": curve(NORM, [0, *self.blocks], rows["norm"])})


def test_a_new_diagnostic_is_a_panel(tmp_path):
    """And one that is left out is none; the project is the run's."""
    cfg = compose(["backbone.depth=3", "diagnostics.cka=null", "logger.project=mine"])
    OmegaConf.set_struct(cfg, False)
    cfg.diagnostics.mine = {"_target_": f"{__name__}.TokenNorm"}
    save_config(cfg, tmp_path / "config.yaml")
    panels = {panel.title: panel for part in parts(OmegaConf.load(tmp_path / "config.yaml")) for panel in part.panels}
    assert panels["Token norm (token_norm)"].keys == [f"diagnostics/token_norm/layer_{i:02d}" for i in range(4)]
    assert panels["Token norm (token_norm)"].text == "Norm of patch tokens after the block. (ours)"
    assert not any("(cka)" in title for title in panels)


def test_without_diagnostics():
    sections = parts(compose(["diagnostics=none", "callbacks.gradient_norms=null"]))
    assert [section.name for section in sections] == [name for name in SECTIONS if name != "Diagnostics by depth"]


# ---- mistakes ------------------------------------------------------------------------------------------------------


def answer(capsys, *arguments):
    code = main(["dashboard", *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    return code, line


def test_no_key(online, capsys):
    code, line = answer(capsys)
    assert code == 2
    assert "run wandb login, or set WANDB_API_KEY" in line


def test_no_package(online, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    code, line = answer(capsys)
    assert code == 2
    assert "pip install 'harmonize[dashboard]'" in line


def test_a_server_that_refuses(online, capsys):
    with WandbServer(refuses="permission denied") as server:
        online(server)
        code, line = answer(capsys)
    assert code == 1
    assert "W&B does not take it" in line
    assert "permission denied" in line
    assert server.views == []


def test_a_server_that_is_not_there(online, capsys, monkeypatch):
    monkeypatch.setattr(wandb.Api, "_HTTP_TIMEOUT", 2)
    server = WandbServer()
    server.server_close()
    online(server)
    code, line = answer(capsys)
    assert code == 1
    assert "check key, entity and network" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run", "nowhere"], "nowhere: no run folder with config.yaml"),
        (["--depth", "0"], "backbone.depth"),
        (["--depth", "6", "--run", "nowhere"], "not allowed with argument"),
        (["--dept", "x"], "--dept"),
    ],
)
def test_a_wrong_option(online, capsys, monkeypatch, arguments, words):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    code, line = answer(capsys, *arguments)
    assert code == 2
    assert words in line
