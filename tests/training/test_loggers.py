"""The run folder's own record, and W&B as a mirror that may fail."""

import json
import math
import os
import signal
import struct
import subprocess
import time
import warnings
from pathlib import Path

import pytest
from PIL import Image

from harmonize.files import read_rows, write_json
from harmonize.training.loggers import JsonLogger, Wandb, has_api_key, run_id


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    """Nobody is logged in to W&B here."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


# ---- JSON ------------------------------------------------------------------------------------------------------------


def test_rows_and_latest_values(tmp_path):
    logger = JsonLogger(tmp_path)
    logger.log_metrics({"train/loss": 2.0}, 1)
    logger.log_metrics({"val/knn_top1": 0.5}, 2)
    logger.log_metrics({"epoch/loss": 1.0, "train/loss": 1.5}, 2)
    logger.save()
    assert not (tmp_path / "metrics.json").exists()  # only at the end
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"step": 1, "train/loss": 2.0},
        {"step": 2, "val/knn_top1": 0.5},
        {"step": 2, "epoch/loss": 1.0, "train/loss": 1.5},
    ]
    latest = {"step": 2, "train/loss": 1.5, "val/knn_top1": 0.5, "epoch/loss": 1.0}
    assert logger.latest == latest
    assert logger.now == {"step": 2, "val/knn_top1": 0.5, "epoch/loss": 1.0, "train/loss": 1.5}


def test_what_json_cannot_hold(tmp_path):
    logger = JsonLogger(tmp_path)
    logger.log_metrics({"a": math.nan, "b": -math.inf, "c": 1}, 1)
    logger.complete(logger.latest)
    strict = {"parse_constant": lambda word: pytest.fail(f"{word} is not JSON")}
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), **strict) == {"step": 1, "a": None, "b": None, "c": 1.0}
    assert json.loads((tmp_path / "metrics.json").read_text(), **strict)["a"] is None
    write_json(tmp_path / "nested.json", {"x": [math.nan, {"y": math.inf}]})
    assert json.loads((tmp_path / "nested.json").read_text(), **strict) == {"x": [None, {"y": None}]}


def test_resuming_drops_what_lies_beyond_the_checkpoint(tmp_path):
    first = JsonLogger(tmp_path)
    for step in range(6):
        first.log_metrics({"x": step}, step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "x"')  # killed while writing
    second = JsonLogger(tmp_path, resume_step=3)
    second.log_metrics({"x": 40}, 4)
    assert [(row["step"], row["x"]) for row in read_rows(tmp_path / "metrics.jsonl")] == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]
    second.complete(second.latest)
    JsonLogger(tmp_path)  # no checkpoint: the run starts anew
    assert read_rows(tmp_path / "metrics.jsonl") == []
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_warning_and_training_goes_on(tmp_path):
    logger = JsonLogger(tmp_path)
    logger.log_metrics({"x": 1.0}, 1)
    logger.rows.rename(tmp_path / "rows")
    logger.rows.symlink_to("/dev/full")
    with pytest.warns(UserWarning, match="Metrics cannot be written .*No space left.*training goes on") as caught:
        logger.log_metrics({"x": 1.0}, 2)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger.log_metrics({"x": 1.0}, 3)
    (tmp_path / "rows").replace(logger.rows)
    with logger.rows.open("a") as file:
        file.write('{"step": 3')  # what a full disk may leave of a row
    for step in (4, 5):
        logger.log_metrics({"x": 1.0}, step)
    assert [row["step"] for row in read_rows(logger.rows)] == [1, 4, 5]
    assert logger.latest["step"] == 5


# ---- W&B -------------------------------------------------------------------------------------------------------------


def finished_records(path):
    """All records of a run that has finished: W&B's own process writes its file a moment after ``finish`` returns."""
    for _ in range(300):
        records = list(wandb_records(path))
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} has no exit record after 30 s")


def wandb_records(path):
    """The records of an offline W&B file: a LevelDB log (blocks of 32 KiB) of protobuf messages."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def test_the_offline_file_holds_metrics_and_configuration(tmp_path):
    folder = tmp_path / "hybrid-shapes"
    folder.mkdir()
    logger = Wandb(folder, config={"loss": {"lambda": 0.2}, "seed": 3})
    logger.start()
    assert logger.mode == "offline"
    for step in (1, 2):
        logger.log_metrics({"train/loss": 1 / step, "val/knn_top1": 0.25 * step}, step)
    logger.finish()
    assert not logger.failed
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    records = finished_records(path)
    history = [
        {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    shown = [{k: v for k, v in row.items() if not k.startswith("_")} for row in history]
    assert shown == [
        {"train/loss": 1.0, "val/knn_top1": 0.25, "trainer/global_step": 1},
        {"train/loss": 0.5, "val/knn_top1": 0.5, "trainer/global_step": 2},
    ]
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.run_id, run.project, run.display_name) == (run_id(folder), "harmonize", "hybrid-shapes")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (config["loss"], config["seed"]) == ({"lambda": 0.2}, 3)


def test_a_second_run_in_one_process_is_a_second_run(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        logger = Wandb(tmp_path / name)
        logger.start()
        logger.log_metrics({"x": 1.0}, 1)
        logger.finish()
    files = sorted(path.name for path in tmp_path.glob("*/wandb/offline-run-*/run-*.wandb"))
    assert files == sorted(f"run-{run_id(tmp_path / name)}.wandb" for name in ("one", "two"))


def test_a_service_that_has_died_is_started_again(tmp_path):
    """The runs of a sweep in one process share it: one fault must not cost all that follow."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first = Wandb(tmp_path / "one")
    first.start()
    first.finish()
    children = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True).stdout.split()
    services = [pid for pid in map(int, children) if "wandb" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert services
    for pid in services:
        os.kill(pid, signal.SIGKILL)
    second = Wandb(tmp_path / "two")
    second.start()
    second.log_metrics({"x": 1.0}, 1)
    second.finish()
    assert not second.failed
    (path,) = (tmp_path / "two").glob("wandb/offline-run-*/run-*.wandb")
    assert {"x": 1.0, "trainer/global_step": 1}.items() <= history(path)[0][0].items()


def test_where_credentials_are_looked_for(tmp_path, monkeypatch):
    assert not has_api_key()
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text("machine example.org\n  login user\n  password x\n")
    assert not has_api_key()
    (home / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    assert has_api_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.mine.org:8080")
    assert not has_api_key()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert has_api_key()


@pytest.mark.parametrize(("mode", "variable", "expected"), [("auto", None, "offline"), ("offline", "online", "online")])
def test_the_environment_wins(tmp_path, monkeypatch, mode, variable, expected):
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert Wandb(tmp_path, mode=mode).mode == expected


def test_no_server_means_offline(tmp_path, monkeypatch):
    import wandb

    modes = []
    real = wandb.init

    def init(**options):
        modes.append(options["mode"])
        if options["mode"] == "online":
            raise wandb.errors.CommError("no route to host")
        return real(**options)

    monkeypatch.setattr(wandb, "init", init)
    logger = Wandb(tmp_path, mode="online")
    with pytest.warns(UserWarning, match="cannot be reached .*no route to host.*offline"):
        logger.start()
    assert modes == ["online", "offline"]
    logger.log_metrics({"x": 1.0}, 1)
    logger.finish()
    assert not logger.failed


def test_a_service_that_does_not_come_back_means_offline(tmp_path, monkeypatch):
    """Whoever asked for online gets at least a file to upload later."""
    import wandb

    modes = []
    real = wandb.init

    def init(**options):
        modes.append(options["mode"])
        if options["mode"] == "online":
            raise ConnectionResetError("Connection lost")
        return real(**options)

    monkeypatch.setattr(wandb, "init", init)
    logger = Wandb(tmp_path, mode="online")
    with pytest.warns(UserWarning, match=r"cannot be reached \(Connection lost\); logging offline"):
        logger.start()
    assert modes == ["online", "online", "offline"]
    assert not logger.failed
    logger.finish()


def test_a_failure_is_one_warning_and_training_goes_on(tmp_path, monkeypatch):
    import wandb

    class Broken:
        def log(self, _):
            raise OSError("disk gone")

        def finish(self, exit_code=0):
            raise OSError("still gone")

    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    logger = Wandb(tmp_path)
    logger.start()
    with pytest.warns(UserWarning, match="disk gone.*training goes on"):
        logger.log_metrics({"x": 1.0}, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger.log_metrics({"x": 1.0}, 2)
    with pytest.warns(UserWarning, match="still gone"):
        logger.finish()


def test_an_offline_run_that_cannot_start_is_given_up(tmp_path, monkeypatch):
    import wandb

    calls = []

    def init(**_):
        calls.append(1)
        raise RuntimeError("no service")

    monkeypatch.setattr(wandb, "init", init)
    logger = Wandb(tmp_path)
    with pytest.warns(UserWarning, match="no service.*training goes on"):
        logger.start()
    assert hasattr(logger, "experiment")  # as lightning asks
    logger.log_metrics({"x": 1.0}, 1)
    assert len(calls) == 2  # the second with a new service
    logger.finish()


def history(path):
    """The rows of an offline W&B file, and its alerts, as (title, text)."""
    records = finished_records(path)
    nested = [record.history.item for record in records if record.HasField("history")]
    rows = [{(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items} for items in nested]
    return rows, [(record.alert.title, record.alert.text) for record in records if record.HasField("alert")]


def test_lines_pictures_and_alerts_reach_the_offline_file(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    Image.new("RGB", (6, 4), (255, 0, 0)).save(tmp_path / "red.png")
    logger = Wandb(folder)
    logger.start()
    logger.log_lines("depth/nmi", [[1, 2], [1, 2, 3]], [[0.5, 0.25], [1, 2, 4]], ["untrained", "epoch 1"], "NMI", 7)
    logger.log_images({"pictures/curves": tmp_path / "red.png"}, 8)
    logger.alert("9: attention collapse", "it is bad")
    logger.finish()
    assert not logger.failed
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    rows, alerts = history(path)
    assert alerts == [("9: attention collapse", "it is bad")]
    by_step = {}
    for row in rows:
        by_step.setdefault(row.get("trainer/global_step"), {}).update(row)
    (file,) = folder.glob("wandb/offline-run-*/files/media/table/**/*.json")
    table = json.loads(file.read_text())
    lines = {}
    for row in table["data"]:
        point = dict(zip(table["columns"], row, strict=True))
        lines.setdefault(point["lineKey"], []).append((point["step"], point["lineVal"]))
    assert lines == {"untrained": [(1, 0.5), (2, 0.25)], "epoch 1": [(1, 1), (2, 2), (3, 4)]}
    assert any(name.startswith("depth/nmi") for name in by_step[7])
    image = [by_step[8][f"pictures/curves/{key}"] for key in ("_type", "width", "height")]
    assert image == ["image-file", 6, 4]
    (copy,) = folder.glob("wandb/offline-run-*/files/media/images/**/*.png")
    assert Image.open(copy).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("what", ["log_lines", "log_images", "alert"])
def test_no_kind_of_failure_stops_a_run(tmp_path, monkeypatch, what):
    """One warning, and nothing is asked of W&B any more."""
    import wandb

    asked = []

    class Broken:
        def log(self, row):
            asked.append(row)
            raise RuntimeError("server on fire")

        def alert(self, title, text):
            self.log(title)

        def finish(self, exit_code=0):
            pass

    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    Image.new("RGB", (6, 4)).save(tmp_path / "black.png")
    logger = Wandb(tmp_path)
    logger.start()
    calls = {
        "log_lines": lambda: logger.log_lines("depth/nmi", [[1]], [[0.5]], ["epoch 1"], "NMI", 1),
        "log_images": lambda: logger.log_images({"pictures/curves": tmp_path / "black.png"}, 1),
        "alert": lambda: logger.alert("1: alarm", "text"),
    }
    with pytest.warns(UserWarning, match="W&B failed .*server on fire.*training goes on") as caught:
        calls[what]()
    assert len([w for w in caught if "W&B" in str(w.message)]) == 1
    assert logger.failed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in calls.values():
            call()
        logger.log_metrics({"x": 1.0}, 2)
    assert len(asked) == 1


def test_a_picture_that_is_not_there_is_a_failure_too(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("opened for nothing"))
    logger = Wandb(tmp_path)
    with pytest.warns(UserWarning, match="W&B failed .*missing.png"):
        logger.log_images({"pictures/curves": tmp_path / "missing.png"}, 1)
