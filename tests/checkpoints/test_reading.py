"""Files are read whole and without running anything, or refused in one sentence."""

import argparse
import collections
import errno
import json
import os
import pathlib
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from harmonize.checkpoints.reading import read_file
from harmonize.types import ConfigError

WEIGHTS = {"weight": torch.arange(6.0).view(2, 3)}


def sentence(path):
    with pytest.raises(ConfigError) as error:
        read_file(str(path))
    text = str(error.value)
    assert text.startswith(f"checkpoint={path}")
    assert text.endswith(".")
    assert not text.endswith("..")
    assert "\n" not in text
    return text


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["a.pth", "a.pth.tar", "a.ckpt", "a.bin", "a"])
def test_files_of_torch(tmp_path, name, zipped):
    path = tmp_path / name
    torch.save({"state_dict": WEIGHTS, "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
    file = read_file(str(path))
    assert (file.name, file.path) == (str(path), path)
    assert file.content["epoch"] == 3
    assert file.content["state_dict"]["weight"].equal(WEIGHTS["weight"])


def test_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(WEIGHTS, path, metadata={"format": "pt"})
    file = read_file(str(path))
    assert file.content["weight"].equal(WEIGHTS["weight"])
    assert file.metadata == {"format": "pt"}


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(WEIGHTS, tmp_path / "a.pth")
    assert read_file("~/a.pth").path == tmp_path / "a.pth"


# What official files hold beside tensors


@pytest.mark.parametrize("zipped", [True, False])
def test_what_training_files_hold(tmp_path, zipped):
    args = argparse.Namespace(
        lr=1e-3,
        output_dir=pathlib.Path("out"),
        accuracy=np.float64(1.5),
        count=np.int64(7),
        table=np.arange(3),
        device=torch.device("cpu"),
        crops=(0.4, 1.0),
        seen={1, 2},
    )
    state = collections.defaultdict(dict)
    state[0] = {"step": 3}
    content = {"model": collections.OrderedDict(WEIGHTS), "args": args, "optimizer": state}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    file = read_file(str(tmp_path / "a.pth"))
    assert file.content["model"]["weight"].equal(WEIGHTS["weight"])
    assert file.content["args"].lr == 1e-3
    assert file.content["optimizer"] == {0: {"step": 3}}
    assert file.stated(("args", "none"), ("args", "crops")) == ((0.4, 1.0), "args.crops")
    assert file.stated(("args", "lr", "deeper"), ("model", "none")) == (None, "")


def test_numpy_of_both_names(tmp_path):
    """numpy 1 calls its modules ``core``, numpy 2 ``_core``; files of either are read under either."""
    torch.save({"weight": WEIGHTS["weight"], "accuracy": np.float32(2)}, tmp_path / "new.pth", pickle_protocol=2)
    new = (tmp_path / "new.pth").read_bytes()
    assert b"numpy._core.multiarray" in new or b"numpy.core.multiarray" in new
    torch.save(WEIGHTS | {"accuracy": np.float32(2)}, tmp_path / "b.pth", _use_new_zipfile_serialization=False)
    text = (tmp_path / "b.pth").read_bytes()
    other = (
        text.replace(b"numpy._core", b"numpy.core") if b"numpy._core" in text else text.replace(b"numpy.c", b"numpy._c")
    )
    assert other != text
    (tmp_path / "b.pth").write_bytes(other)
    assert read_file(str(tmp_path / "b.pth")).content["weight"].equal(WEIGHTS["weight"])
    assert read_file(str(tmp_path / "new.pth")).content["weight"].equal(WEIGHTS["weight"])


@pytest.mark.parametrize("zipped", [True, False])
def test_the_configuration_of_yacs(tmp_path, monkeypatch, zipped):
    """SimMIM's files hold a CfgNode: a dict with attributes of its own. yacs itself is not needed to read it."""
    module = types.ModuleType("yacs.config")
    code = "class CfgNode(dict):\n    def __setattr__(self, name, value):\n        self.__dict__[name] = value\n"
    exec(code, module.__dict__)
    module.CfgNode.__module__ = "yacs.config"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        node = module.CfgNode(MODEL=module.CfgNode(VIT=module.CfgNode(NUM_HEADS=12)), TAG="a")
        node.__immutable__ = True
        torch.save({"config": node, "model": WEIGHTS}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    file = read_file(str(tmp_path / "a.pth"))
    assert file.content["config"] == {"MODEL": {"VIT": {"NUM_HEADS": 12}}, "TAG": "a"}
    assert file.stated(("config", "MODEL", "VIT", "NUM_HEADS"))[0] == 12


def test_json_files_beside(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 6}))
    for name, beside in (("pytorch_model.bin", {"config.json": {"num_attention_heads": 6}}), ("a.bin", {})):
        torch.save(WEIGHTS, tmp_path / name)
        assert read_file(str(tmp_path / name)).beside == beside


def test_nothing_stays_allowed(tmp_path):
    before = set(torch.serialization.get_safe_globals())  # torch keeps a set and lists it in any order
    torch.save(WEIGHTS, tmp_path / "a.pth")
    read_file(str(tmp_path / "a.pth"))
    assert set(torch.serialization.get_safe_globals()) == before


# Code


class Bomb:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "protocol 4"])
@pytest.mark.parametrize("place", ["args", "model"])
def test_code_in_a_file_is_not_run(tmp_path, kind, place):
    path, harm = tmp_path / "a.pth", tmp_path / "harm"
    content = {"model": dict(WEIGHTS), "args": argparse.Namespace()}
    bomb = Bomb(os.system, f"touch {harm}")
    if place == "args":
        content["args"].bomb = bomb
    else:
        content["model"]["bomb"] = bomb
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content | {"model": {"bomb": bomb}}, protocol=2))
    elif kind == "protocol 4":
        path.write_bytes(pickle.dumps({"bomb": bomb}, protocol=4))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    text = sentence(path)
    if kind == "protocol 4":  # torch's reader does not know that pickle's newer instructions
        assert "no file of torch.save" in text
    else:
        name = f"{os.system.__module__}.system"
        assert text == f"checkpoint={path} would run code when it is opened (it names {name}); it is refused."
    assert not harm.exists()
    pickle.loads(pickle.dumps(bomb))  # it would have
    assert harm.exists()


@pytest.mark.parametrize(
    ("bomb", "name"),
    [
        (Bomb(eval, "1"), "eval"),
        (Bomb(open, "/dev/null"), "io.open"),
        (Bomb(pathlib.Path.touch, pathlib.Path("never")), "getattr"),
        (Bomb(np.fromfile, "/dev/null"), "numpy.fromfile"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
)
def test_what_a_file_names_is_told(tmp_path, bomb, name):
    torch.save({"bomb": bomb}, tmp_path / "a.pth")
    assert f"(it names {name})" in sentence(tmp_path / "a.pth")


# Other files


def test_no_file(tmp_path):
    assert sentence("no_such_file.pth") == (
        "checkpoint=no_such_file.pth: there is no such file; models of timm are written timm:NAME."
    )
    assert sentence(tmp_path).endswith("is a folder, not a file.")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_empty_and_foreign_files(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"")
    assert sentence(path) == f"checkpoint={path} is an empty file."
    for content in (
        b"hello\n" * 100,
        b"PK\x03\x04 torn",
        bytes(range(256)) * 5,
        b"\x80",
        b"{}",
        b"version https://git-lfs",
    ):
        path.write_bytes(content)
        assert "is damaged or no" in sentence(path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_torn_files(tmp_path, kind):
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pth")
    weights = {"weight": torch.randn(100, 100)}
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for length in (1, 30, 200, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:length])
        assert "is damaged or no" in sentence(path), length


@pytest.mark.parametrize(("content", "kind"), [(torch.ones(3), "Tensor"), ([1], "list"), ({0: torch.ones(1)}, "dict")])
def test_no_weights_by_name(tmp_path, content, kind):
    torch.save(content, tmp_path / "a.pth")
    assert sentence(tmp_path / "a.pth").endswith(f"holds no weights by name, but a {kind}.")


def test_no_permission(tmp_path, monkeypatch):
    """Refused by hand, because root may read everything."""

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    torch.save(WEIGHTS, tmp_path / "a.pth")
    monkeypatch.setattr(Path, "open", refuse)
    assert "cannot be read (Permission denied)" in sentence(tmp_path / "a.pth")
