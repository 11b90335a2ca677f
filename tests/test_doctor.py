"""``harmonize doctor``: every bad case, made for real or by a program that stands for the real one."""

from __future__ import annotations

import http.server
import os
import re
import resource
import shutil
import socket
import stat
import threading
import time
import types
from functools import cache
from pathlib import Path

import pytest
import torch
import torchvision.ops
from PIL import Image
from rich.console import Console

from harmonize import cli, doctor
from harmonize.checks import disks, hardware, images, packages, processes, slurm, speed, tracking
from harmonize.checks.findings import GIB, Patient, ok, problem, warning
from harmonize.config import compose, launcher_of
from harmonize.data import datasets
from harmonize.doctor import CHECKS, Check, examine, main, show, within
from harmonize.types import ConfigError

TINY = ["backbone.width=24", "backbone.depth=2", "backbone.num_heads=3", "data.image_size=16", "data.patch_size=4"]
TINY += ["loss.contrastive.hidden_dim=32", "loss.contrastive.out_dim=16", "data.batch_size=8", "logger=csv"]
TINY += [
    "data.num_train=64",
    "data.num_val=16",
    "data.num_workers=0",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
]


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch) -> Path:
    """A working folder, and a machine without SLURM, W&B or a launcher."""
    for variable in list(os.environ):
        if variable.startswith(("SLURM_", "WANDB_", "CUDA_VISIBLE", "GLOO_SOCKET", "RANK", "HARMONIZE_CACHE")):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HARMONIZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@cache
def composed(*settings: str):
    launcher = launcher_of([*TINY, *settings]) if any("launcher" in setting for setting in settings) else {}
    return compose([*TINY, *settings]), launcher


def patient(*settings: str, build: bool = False) -> Patient:
    one = Patient(*composed(*settings))
    if build:
        assert levels(images.run(one)) == ["ok"]
    return one


def folder_of_images(root: Path, counts: dict[str, int], damaged: int = 0) -> str:
    """A folder with so many images of each class, the first ones of each damaged."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            path = root / name / f"{index:03}.png"
            Image.new("RGB", (24, 24), (index, 100, 50)).save(path)
            if index < damaged:
                path.write_bytes(path.read_bytes()[:40])
    return f"data.root={root}"


FOLDER = ["data=folder", "data.num_train=null", "data.num_val=null", "data.max_pixels=10000"]


def program(folder: Path, name: str, prints: str = "", fails: bool = False) -> None:
    """A program that prints something, for PATH."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{prints}\nEND\nexit {int(fails)}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Puts programs on a PATH that has no others but the shell's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "cat"):
        (folder / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(folder))
    return lambda name, prints="", fails=False: program(folder, name, prints, fails)


def found(findings) -> list:
    """All findings, each held to what the table needs: plain sentences in one line."""
    findings = list(findings)
    for finding in findings:
        assert finding.level in ("ok", "warning", "problem")
        assert finding.found.endswith(".")
        assert "\n" not in finding.found + finding.advice
        assert "Traceback" not in finding.found
        assert finding.level == "ok" or finding.advice or "must be" in finding.found or "data." in finding.found
    return findings


def levels(findings) -> list[str]:
    return [finding.level for finding in found(findings)]


def the(level: str, findings) -> str:
    """The words of the only finding of a level."""
    (finding,) = [f for f in found(findings) if f.level == level]
    return f"{finding.found} {finding.advice}"


# ---- the frame -------------------------------------------------------------------------------------------------------


def test_a_check_that_raises_is_a_finding_and_what_came_before_it_stays():
    def look(_):
        yield ok("Fine.")
        raise RuntimeError("two\nlines")

    first, second = within(Check("x", look), patient())
    assert first == ok("Fine.")
    assert second == problem("The check failed: RuntimeError: two.")


def test_mistakes_that_a_check_meets_are_problems_one_per_sentence():
    def look(_):
        raise ConfigError("One.\nTwo.")
        yield

    assert within(Check("x", look), patient()) == [problem("One."), problem("Two.")]


def test_a_check_that_hangs_is_left_behind():
    over = threading.Event()

    def look(_):
        yield ok("Fine.")
        over.wait(30)

    start = time.monotonic()
    first, second = within(Check("x", look, seconds=0.2), patient())
    over.set()
    assert time.monotonic() - start < 10
    assert first == ok("Fine.")
    assert second.level == "problem"
    assert "no answer" in second.found


def with_checks(monkeypatch, *findings) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (Check("x", lambda _: iter(findings)),))


@pytest.mark.parametrize(
    ("findings", "code", "count"),
    [
        ([ok("A.")], 0, "1 ok, 0 warnings, 0 problems"),
        ([ok("A."), warning("B.", "C.")], 0, "1 ok, 1 warning, 0 problems"),
        ([problem("A.", "B."), problem("C.")], 1, "0 ok, 0 warnings, 2 problems"),
    ],
)
def test_exit_code_and_table(monkeypatch, capsys, findings, code, count):
    with_checks(monkeypatch, *findings)
    assert main(TINY) == code
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == count
    for finding in findings:
        assert finding.level in printed
        assert f"{finding.found} {finding.advice}".strip() in printed


def test_brackets_are_words_not_colours(capsys):
    show([("x", warning("A.", "pip install 'harmonize[slurm]'"))], Console(width=100))
    assert "harmonize[slurm]" in capsys.readouterr().out


def test_a_sentence_is_said_once(monkeypatch):
    monkeypatch.setattr(
        doctor, "CHECKS", (Check("x", lambda _: iter([ok("A.")])), Check("y", lambda _: iter([ok("A.")])))
    )
    assert examine(patient(), False, Console()) == [("x", ok("A."))]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.batch_sise=3"], "did you mean data.batch_size?"),
        (["loss.lambda=2"], "loss.lambda must be"),
        (["--quik"], "settings are written key=value"),
        (["word"], "key=value"),
    ],
)
def test_mistakes_of_the_user(arguments, words, capsys, monkeypatch):
    with_checks(monkeypatch)
    with pytest.raises(ConfigError, match=words.replace("?", r"\?").replace(".", r"\.")):
        main(arguments)
    assert cli.main(["doctor", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "usage: harmonize doctor" in capsys.readouterr().out


def test_one_process_of_several_looks(monkeypatch, capsys):
    with_checks(monkeypatch, ok("A."))
    for variables in ({"RANK": "1"}, {"SLURM_PROCID": "3", "SLURM_STEP_ID": "0"}):
        with monkeypatch.context() as context:
            for name, value in variables.items():
                context.setenv(name, value)
            assert main(TINY) == 0
            assert capsys.readouterr().out == ""
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert main(TINY) == 0
    assert "A." in capsys.readouterr().out


def test_quick_leaves_out_the_speed_alone():
    assert [check.name for check in CHECKS if not check.quick] == ["speed"]


def test_where_jobs_are_submitted_the_machine_is_another_one(monkeypatch):
    looked: list[str] = []

    def noting(name):
        return lambda _: iter(looked.append(name) or ())

    checks = [Check(check.name, noting(check.name), of_machine=check.of_machine) for check in CHECKS]
    monkeypatch.setattr(doctor, "CHECKS", checks)
    ((name, finding),) = examine(patient("hydra/launcher=slurm"), False, Console())
    assert (name, finding.level) == ("machine", "ok")
    assert set(looked).isdisjoint({"GPU", "cores", "limits", "speed"})
    assert {"packages", "SLURM", "images", "disk"} <= set(looked)
    looked.clear()
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert examine(patient("hydra/launcher=slurm"), False, Console()) == []
    assert len(looked) == len(CHECKS)


# ---- packages --------------------------------------------------------------------------------------------------------


def test_packages_of_this_environment():
    (finding,) = found(packages.packages(patient()))
    assert finding.level == "ok"


@pytest.mark.parametrize(
    ("name", "version", "level", "words"),
    [
        ("lightning", "2.6.3", "problem", "malicious"),
        ("torch", "2.5.1", "problem", "torch 2.5.1 is outside of its range (>=2.6)"),
        ("omegaconf", "2.4.0", "problem", "outside"),
        ("einops", None, "problem", "einops is not installed. pip install 'einops>=0.8'"),
        ("submitit", "1.4.0", "warning", "submitit 1.4.0 is outside"),
    ],
)
def test_packages_out_of_range(monkeypatch, name, version, level, words):
    real = packages.installed
    monkeypatch.setattr(packages, "installed", lambda package: version if package == name else real(package))
    assert words in the(level, packages.packages(patient()))


def test_python_out_of_range(monkeypatch):
    monkeypatch.setattr(packages.sys, "version_info", (3, 14, 0))
    assert "Python 3.14.0 is not supported" in the("problem", packages.packages(patient()))


def test_torch_and_torchvision_that_do_not_fit(monkeypatch):
    def nms(*_):
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    assert levels(packages.torch_loading(patient())) == ["ok"]
    monkeypatch.setattr(torchvision.ops, "nms", nms)
    words = the("problem", packages.torch_loading(patient()))
    assert "operator torchvision::nms does not exist." in words
    assert "pip install --force-reinstall torch torchvision" in words
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(doctor, "CHECKS", [check for check in CHECKS if check.name in ("torch", "run", "SLURM")])
    assert [(name, finding.level) for name, finding in examine(patient(), False, Console())] == [
        ("torch", "problem"),
        ("SLURM", "ok"),
        ("run", "warning"),
    ]


# ---- hardware --------------------------------------------------------------------------------------------------------

SMI = "| NVIDIA-SMI 470.57  Driver Version: 470.57  CUDA Version: 11.4 |"


@pytest.fixture
def no_gpu_seen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def nvidia_smi(tmp_path) -> None:
    """Prints a list of GPUs when it is asked for one, and the head of its table otherwise."""
    path = tmp_path / "bin" / "nvidia-smi"
    path.write_text(f'#!/bin/sh\nif [ "$1" ]; then echo "Tesla, V100, 470.57"; else echo "{SMI}"; fi\n')
    path.chmod(0o755)


def test_no_gpu(no_gpu_seen, programs, monkeypatch):
    monkeypatch.setattr(hardware, "find_driver", lambda: None)
    assert levels(hardware.gpus(patient("trainer.accelerator=auto"))) == ["ok"]
    assert "There is no GPU here" in the("problem", hardware.gpus(patient("trainer.accelerator=gpu")))


@pytest.mark.parametrize(
    ("cuda", "visible", "words"),
    [
        (None, None, "built without CUDA"),
        ("12.8", None, "driver 470.57 supports CUDA 11.4, torch is built for 12.8"),
        ("11.8", "-1", "CUDA_VISIBLE_DEVICES='-1' hides it"),
        ("11.8", "", "CUDA_VISIBLE_DEVICES='' hides it"),
        ("11.8", None, "does not say why"),
    ],
)
def test_a_gpu_that_torch_does_not_see(no_gpu_seen, programs, tmp_path, monkeypatch, cuda, visible, words):
    nvidia_smi(tmp_path)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    said = the("problem", hardware.gpus(patient("trainer.accelerator=auto")))
    assert words in said
    assert "Tesla, V100" in said
    assert levels(hardware.gpus(patient("trainer.accelerator=cpu"))) == ["ok"]


def test_what_torch_warns_of_is_the_reason(programs, tmp_path, monkeypatch):
    def is_available():
        import warnings

        warnings.warn("CUDA initialization: the driver is too old. (Triggered internally at x.cpp)", stacklevel=1)
        return False

    nvidia_smi(tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "11.8")
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert "CUDA initialization: the driver is too old. Look" in the(
        "problem", hardware.gpus(patient("trainer.accelerator=auto"))
    )


def test_a_gpu_without_nvidia_smi(programs, tmp_path):
    assert hardware.find_driver(tmp_path) is None
    (tmp_path / "nvidiactl").touch()
    (tmp_path / "nvidia0").touch()
    assert hardware.find_driver(tmp_path) == hardware.Driver(["nvidia0"])


@pytest.fixture
def fake_gpus(monkeypatch):
    """Two GPUs of 40 GiB, of which the second one is taken."""
    real = torch.ones
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_name": lambda index=0: f"Fake {index}",
        "mem_get_info": lambda index=0: ((39 if index == 0 else 3) * GIB, 40 * GIB),
        "get_arch_list": lambda: ["sm_90"],
        "is_bf16_supported": lambda including_emulation=True: including_emulation,
    }
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch, "ones", lambda *size, device=None: real(*size))
    monkeypatch.setattr("harmonize.training.compilation.shutil.which", lambda _: None)
    return monkeypatch


def test_gpus_that_are_there(fake_gpus):
    findings = found(hardware.gpus(patient("trainer.accelerator=auto", "trainer.devices=1")))
    texts = [f"{f.level}: {f.found} {f.advice}" for f in findings]
    assert texts[0].startswith("ok: GPU 0 (Fake 0) computes and has 39.0 of 40.0 GiB free")
    assert texts[1].startswith("warning: GPU 1 (Fake 1) has 3.0 of 40.0 GiB free: another process")
    assert "uses 1 of 2 GPUs" in texts[2]
    assert "cannot be compiled" in texts[3]
    findings = found(hardware.gpus(patient("trainer.accelerator=gpu", "trainer.devices=4", "trainer.precision=bf16")))
    assert "trainer.devices=4, but torch sees 2 GPUs" in findings[0].found
    assert any("only emulates bf16" in finding.found for finding in findings)
    assert levels(hardware.gpus(patient("trainer.accelerator=cpu"))) == ["ok"]


def test_a_gpu_that_cannot_compute(fake_gpus):
    def ones(*_, device=None):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    fake_gpus.setattr(torch, "ones", ones)
    first, *_ = found(hardware.gpus(patient("trainer.accelerator=auto")))
    assert first.level == "problem"
    assert "no kernel image is available" in first.found
    assert "sm_90" in first.advice


def test_bf16_is_recommended_where_it_is_fast(fake_gpus):
    fake_gpus.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    findings = found(hardware.gpus(patient("trainer.accelerator=auto")))
    assert any("trainer.precision=bf16" in finding.advice for finding in findings)


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(hardware, "cpu_quota", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    return monkeypatch


def test_too_many_workers(four_cores):
    assert levels(hardware.cores(patient("data.num_workers=4"))) == ["ok"]
    words = the("warning", hardware.cores(patient("data.num_workers=6")))
    assert words == "data.num_workers=6, but the CPU affinity allows 4 cores. Set data.num_workers=4."
    four_cores.setattr(torch, "get_num_threads", lambda: 2)
    words = the("warning", hardware.cores(patient("data.num_workers=3", "trainer.devices=2")))
    assert "allows 2 cores for each of the devices. Set data.num_workers=2." in words


def test_slurm_gives_fewer_cores_than_the_workers_need(four_cores):
    four_cores.setenv("SLURM_JOB_ID", "1")
    four_cores.setenv("SLURM_CPUS_PER_TASK", "2")
    four_cores.setattr(torch, "get_num_threads", lambda: 2)
    words = the("warning", hardware.cores(patient("data.num_workers=3")))
    assert "SLURM_CPUS_PER_TASK allows 2 cores" in words
    assert "--cpus-per-task=4" in words


def test_cores_of_one_task_of_several(four_cores):
    """Within srun the affinity is that of this task alone; outside, that of all."""
    assert hardware.cores_per_device(2) == (2, "the CPU affinity")
    four_cores.setenv("SLURM_NTASKS", "2")
    four_cores.setenv("SLURM_STEP_ID", "0")
    assert hardware.cores_per_device(2) == (4, "the CPU affinity")


def test_a_quota_of_the_container(four_cores):
    four_cores.setattr(hardware, "cpu_quota", lambda: 1.5)
    assert hardware.cores_per_device(1) == (1.5, "the cgroup's CPU quota")
    findings = found(hardware.cores(patient("data.num_workers=2")))
    assert [f.level for f in findings] == ["warning", "warning"]
    assert findings[1].found == "torch starts 4 threads on 1.5 cores per process."
    assert findings[1].advice == "Set OMP_NUM_THREADS=1."


def test_threads_that_leave_cores_idle(four_cores):
    four_cores.setenv("OMP_NUM_THREADS", "1")
    four_cores.setattr(torch, "get_num_threads", lambda: 1)
    assert "OMP_NUM_THREADS allows 1 of 4 cores" in the("warning", hardware.cores(patient()))


def test_more_processes_than_cores(four_cores):
    assert "but there are 8 cores" in the(
        "problem", hardware.cores(patient("trainer.devices=16", "data.batch_size=32"))
    )


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"}, 2.5),
        ("0::/", {"cpu.max": "50000 100000"}, 0.5),
        ("0::/a", {"a/cpu.max": "max 100000"}, None),
        (
            "3:cpuset:/\n2:cpu,cpuacct:/job",
            {"cpu,cpuacct/job/cpu.cfs_quota_us": "300000", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"},
            3.0,
        ),
        ("2:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("", {}, None),
    ],
)
def test_quotas_of_both_kinds_of_cgroups(tmp_path, own, files, quota):
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    (tmp_path / "own").write_text(f"{own}\n" if own else "")
    assert hardware.cpu_quota(tmp_path / "groups", tmp_path / "own") == quota


# ---- processes -------------------------------------------------------------------------------------------------------


def disk_of(monkeypatch, free: int, only: str | None = None) -> None:
    """Every disk, or that of one folder, has so many bytes free."""
    real = shutil.disk_usage

    def usage(path):
        return real(path)._replace(free=free) if only is None or str(path) == only else real(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)


def test_shared_memory_of_a_container(monkeypatch):
    one = patient("data.num_workers=4", "data.batch_size=64", "data.num_train=64", "data.image_size=128")
    assert processes.batch_bytes(one) == 64 * 3 * 3 * 128 * 128 * 4
    disk_of(monkeypatch, 64 * 2**20, "/dev/shm")
    words = the("problem", processes.limits(one))
    assert "/dev/shm has 64 MiB free, and 4 workers may hold 288 MiB of images" in words
    assert "--shm-size" in words
    assert levels(processes.limits(patient())) == ["ok"]  # no workers
    disk_of(monkeypatch, 8 * GIB, "/dev/shm")
    assert levels(processes.limits(one)) == ["ok"]


def test_an_estimate_of_a_batch_is_no_less_than_the_batch():
    one = patient(build=True)
    loader = speed.measured_data(one).train_loader()
    batch = next(iter(loader))
    batch = batch if not hasattr(batch, "augment") else batch.augment()
    size = sum(view.numel() * view.element_size() for views in batch.views.values() for view in views)
    assert size == processes.batch_bytes(one)


def test_open_files(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 512))
    words = the("warning", processes.limits(patient("data.num_workers=4")))
    assert "256 files may be open at once; 4 workers need up to 512. ulimit -n 512" in words
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 300))
    assert "hard limit is 300" in the("warning", processes.limits(patient("data.num_workers=4")))


def test_an_interface_that_is_not_there(monkeypatch):
    """For real: two processes of which none finds its way."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    words = the("problem", processes.process_groups(patient("trainer.devices=2")))
    assert "nosuch0" in words
    assert "is no network interface here: unset it, or choose one of lo" in words


def test_processes_that_never_meet(monkeypatch):
    monkeypatch.setattr(processes, "PROCESS_SECONDS", 0.5)
    monkeypatch.setattr(processes, "_RANK", "import time; time.sleep(60)")
    words = the("warning", processes.process_groups(patient()))
    assert "no answer after 0 seconds" in words or "no answer after 1 seconds" in words
    assert "GLOO_SOCKET_IFNAME" in words


def test_one_process_that_fails_ends_the_wait(monkeypatch):
    monkeypatch.setattr(processes, "_RANK", "import sys, time\nif sys.argv[1] == '0': sys.exit(3)\ntime.sleep(60)")
    start = time.monotonic()
    assert "exit codes" in processes.all_reduce("gloo")
    assert time.monotonic() - start < 30


def test_nccl(fake_gpus):
    fake_gpus.setattr(processes, "all_reduce", lambda backend: "unhandled system error" if backend == "nccl" else None)
    fake_gpus.setattr(torch.distributed, "is_nccl_available", lambda: False)
    one = patient("trainer.accelerator=auto", "trainer.devices=2")
    assert "has no NCCL" in the("problem", processes.process_groups(one))
    fake_gpus.setattr(torch.distributed, "is_nccl_available", lambda: True)
    fake_gpus.setattr(torch.cuda, "nccl", types.SimpleNamespace(version=lambda: (2, 27, 3)))
    words = the("problem", processes.process_groups(one))
    assert "NCCL 2.27.3: unhandled system error" in words
    assert "NCCL_DEBUG=INFO" in words


# ---- SLURM -----------------------------------------------------------------------------------------------------------

SINFO = "cpu*|1-00:00:00|(null)|4|up\ngpu|2-00:00:00|gpu:a100:4|2|up\nold|infinite|(null)|1|drain"
ALL = ("sbatch", "srun", "scontrol", "squeue", "sacct")


def test_no_slurm(programs):
    assert levels(slurm.slurm(patient())) == ["ok"]
    assert "needs sbatch and srun" in the("problem", slurm.slurm(patient("hydra/launcher=slurm")))


def test_all_of_slurm(programs):
    for name in ALL:
        programs(name)
    programs("sinfo", SINFO)
    first, second = found(slurm.slurm(patient()))
    assert first == ok("Commands of SLURM on PATH: sbatch, srun, scontrol, squeue, sacct.")
    assert second.found == (
        "Partitions: cpu* (4 nodes, up to 1-00:00:00); gpu (2 nodes, gpu:a100:4, up to 2-00:00:00); * is the default."
    )


@pytest.mark.parametrize(
    ("absent", "words"), [("scontrol", "not handed in again"), ("squeue", "run folders alone"), ("srun", "per device")]
)
def test_a_command_that_is_missing(programs, absent, words):
    for name in set(ALL) - {absent}:
        programs(name)
    said = the("warning", slurm.slurm(patient()))
    assert said.startswith(f"{absent} is not on PATH: ")
    assert words in said


def test_the_extra_is_missing(programs, monkeypatch):
    for name in ALL:
        programs(name)
    monkeypatch.setattr(slurm, "installed", lambda _: None)
    assert "pip install 'harmonize[slurm]'" in the("warning", slurm.slurm(patient()))
    assert "submitit" in the("problem", slurm.slurm(patient("hydra/launcher=slurm")))


def test_a_controller_that_does_not_answer(programs):
    for name in ALL:
        programs(name)
    programs("sinfo", "error", fails=True)
    assert "sinfo does not list any partition" in the("warning", slurm.slurm(patient()))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["hydra.launcher.partition=none"],
            "There is no partition none. Set hydra.launcher.partition to one of cpu, gpu",
        ),
        (["hydra.launcher.partition=cpu", "hydra.launcher.timeout_min=2000"], "ends after 1440 minutes"),
        (["hydra.launcher.partition=cpu", "trainer.accelerator=gpu"], "partition cpu has no GPU"),
    ],
)
def test_what_a_job_asks_for(programs, settings, words):
    for name in ALL:
        programs(name)
    programs("sinfo", SINFO)
    assert words in the("problem", slurm.slurm(patient("hydra/launcher=slurm", *settings)))
    fits = patient("hydra/launcher=slurm", "hydra.launcher.partition=gpu", "trainer.accelerator=gpu")
    assert set(levels(slurm.slurm(fits))) == {"ok"}


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NNODES": "1", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4"},
            "SLURM_NTASKS=4, but trainer.devices x trainer.num_nodes = 2 x 1 = 2.",
        ),
        ({"SLURM_NTASKS": "1"}, "SLURM_NTASKS=1, but"),
        (
            {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2"},
            "--ntasks-per-node=1, but trainer.devices=2",
        ),
        ({"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2"}, "The job has 2 nodes, but"),
        ({"SLURM_NTASKS": "2"}, "submitted with --ntasks=2, which lightning refuses"),
    ],
)
def test_a_job_of_another_shape_than_the_run(programs, monkeypatch, variables, words):
    for name, value in (JOB | variables).items():
        monkeypatch.setenv(name, value)
    for name in ALL:
        programs(name)
    said = the("problem", slurm.slurm(patient("trainer.devices=2")))
    assert words in said
    assert "--nodes=1 --ntasks-per-node=2" in said


def test_lightning_refuses_the_same_jobs(monkeypatch):
    """The rules are lightning's; when it changes them, they change here."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    for name, value in (JOB | {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="ntasks-per-node"):
        SLURMEnvironment().validate_settings(2, 1)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    monkeypatch.setenv("SLURM_NNODES", "2")
    with pytest.raises(ValueError, match="nodes"):
        SLURMEnvironment().validate_settings(2, 1)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(RuntimeError, match="ntasks"):
        SLURMEnvironment._validate_srun_variables()
    assert SLURMEnvironment.detect()
    monkeypatch.delenv("SLURM_NTASKS")
    assert not SLURMEnvironment.detect()


def test_a_job_that_fits(programs, monkeypatch):
    for name, value in (JOB | {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "3"}).items():
        monkeypatch.setenv(name, value)
    for name in ALL:
        programs(name)
    findings = found(slurm.slurm(patient("trainer.devices=2")))
    assert {finding.level for finding in findings} == {"ok"}
    assert "cpus per task: 3." in findings[-1].found
    monkeypatch.delenv("SLURM_STEP_ID")
    findings = found(slurm.slurm(patient("trainer.devices=2")))
    assert {finding.level for finding in findings} == {"ok"}
    assert any("Start the run with srun" in finding.advice for finding in findings)


@pytest.mark.parametrize("variables", [{}, {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "interactive"}])
def test_a_job_in_which_the_run_starts_its_processes_itself(programs, monkeypatch, variables):
    for name, value in (JOB | variables).items():
        monkeypatch.setenv(name, value)
    for name in ALL:
        programs(name)
    findings = found(slurm.slurm(patient("trainer.devices=2")))
    assert {finding.level for finding in findings} == {"ok"}
    assert "the run starts its 2 processes itself" in findings[-1].found


# ---- Weights & Biases ------------------------------------------------------------------------------------------------


def test_without_wandb():
    assert "W&B is not used" in the("ok", tracking.wandb(patient()))


def test_wandb_without_a_key():
    words = the("warning", tracking.wandb(patient("logger=wandb")))
    assert "no API key" in words
    assert "nothing is lost" in words
    assert "wandb login" in words


def test_wandb_offline(monkeypatch):
    assert "harmonize sync uploads it" in the("ok", tracking.wandb(patient("logger=wandb", "logger.mode=offline")))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert "W&B is disabled: metrics.jsonl has every value." in the("ok", tracking.wandb(patient("logger=wandb")))


def test_wandb_that_cannot_be_reached(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    words = the("warning", tracking.wandb(patient("logger=wandb")))
    assert "does not answer" in words
    assert "refused" in words
    assert "nothing is lost" in words


def test_wandb_that_answers(monkeypatch):
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(403)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert "answers" in the("ok", tracking.wandb(patient("logger=wandb")))
        server.shutdown()


# ---- the run and its images ------------------------------------------------------------------------------------------


def test_a_run_that_can_be_built():
    one = patient()
    words = the("ok", images.run(one))
    assert "on the CPU in 32; 16 steps, 8 an epoch." in words
    assert one.setup is not None


def test_a_component_that_does_not_exist():
    (finding,) = within(Check("run", images.run), patient("+loss.typo=1"))
    assert finding.level == "problem"
    assert "loss.typo" in finding.found


def test_a_data_set_that_is_not_there(tmp_path):
    """Said once, although the run and the check of the images both miss it."""
    one = patient(*FOLDER, f"data.root={tmp_path / 'nowhere'}")
    checks = [Check("run", images.run), Check("images", images.images)]
    (first,), (second,) = (within(check, one) for check in checks)
    assert first == second
    assert first.level == "problem"
    assert "nowhere does not exist: give the folder" in first.found
    assert levels(disks.disks(one)) == ["ok"]  # the other checks go on


def test_nothing_is_downloaded(tmp_path, monkeypatch):
    def download(*_, **__):
        raise AssertionError

    monkeypatch.setattr(datasets.CIFAR10, "_fetch", download)
    settings = ["data=cifar10", f"data.root={tmp_path}", "data.patch_size=4", "data.image_size=16"]
    one = patient(*settings, "data.download=true")
    assert "the run downloads it first" in the("warning", images.run(one))
    assert levels(images.images(one)) == []
    (finding,) = within(Check("run", images.run), patient(*settings))
    assert finding.level == "problem"


def test_a_batch_larger_than_the_data_set(tmp_path):
    root = folder_of_images(tmp_path / "images", {"a": 4, "b": 4})
    one = patient(*FOLDER, root, "data.batch_size=16")
    (finding,) = within(Check("run", images.run), one)
    assert "data.batch_size=16 is too large: the training split has 7 images" in finding.found
    assert "7 images to train on, 1 for validation, 2 classes." in [f.found for f in images.images(one)]


def test_a_data_set_in_order(tmp_path):
    root = folder_of_images(tmp_path / "images", {"a": 60, "b": 40})
    findings = found(images.images(patient(*FOLDER, root, build=True)))
    assert {finding.level for finding in findings} == {"ok"}
    texts = [finding.found for finding in findings]
    assert texts[0] == "90 images to train on, 10 for validation, 2 classes."
    assert texts[1] == "Images per class: 36 (b) to 54 (a)."
    assert texts[2].startswith("32 sampled images of train can be read (")


def test_images_that_cannot_be_read(tmp_path):
    root = folder_of_images(tmp_path / "images", {"a": 50, "b": 50}, damaged=10)
    findings = found(images.images(patient(*FOLDER, root)))
    (said,) = [f for f in findings if f.level == "warning" and "of train" in f.found]
    number = int(said.found.split()[0])
    assert 3 <= number <= 10
    assert "of 32 sampled images of train cannot be read, first" in said.found
    assert ".png" in said.found


def test_a_data_set_of_which_nothing_can_be_read(tmp_path):
    root = folder_of_images(tmp_path / "images", {"a": 20, "b": 20}, damaged=20)
    texts = [f.found for f in found(images.images(patient(*FOLDER, root))) if f.level == "problem"]
    assert [text.partition(" cannot")[0] for text in texts] == [
        "32 of 32 sampled images of train",
        "4 of 4 sampled images of val",
    ]


def test_odd_data_sets(tmp_path):
    root = folder_of_images(tmp_path / "images", {"a": 90, "b": 3})
    Image.new("RGB", (24, 24)).save(tmp_path / "images" / "loose.png")
    one = patient(*FOLDER, root, "data.batch_size=32")
    findings = found([*images.run(one), *images.images(one)])  # the first one lists the folder
    texts = " ".join(f"{f.found} {f.advice}" for f in findings if f.level == "warning")
    assert "1 images in" in texts
    assert "Images per class: 2 (b) to 82 (a)." in texts or "Images per class: 2 (b) to 81 (a)." in texts
    assert "An epoch has 2 steps of 32 images" in texts


def test_a_data_set_without_labels(tmp_path):
    root = folder_of_images(tmp_path / "images", {"a": 90})
    assert "no labels: probes are off" in found(images.images(patient(*FOLDER, root)))[0].found


def test_no_cache_is_built_for_a_look(tmp_path):
    root = folder_of_images(tmp_path / "images", {"a": 60, "b": 40})
    for settings in ([*FOLDER, root, "data.cache=true"], []):
        one = patient(*settings, build=True)
        assert {"ok"} == set(levels(images.images(one)))
        assert set(levels(disks.disks(one))) == {"ok"}
    assert not (tmp_path / "cache").exists()


# ---- disks -----------------------------------------------------------------------------------------------------------


def test_a_disk_without_room(monkeypatch, tmp_path):
    one = patient("backbone.width=192", "backbone.depth=4", build=True)
    needed = disks.COPIES * disks.checkpoint_bytes(one.setup.module)
    assert needed > 16 * 2**20
    disk_of(monkeypatch, 10 * 2**20)
    words = the("problem", disks.disks(one))
    assert f"run.root={tmp_path / 'outputs'} has 10 MiB free, but the checkpoints take" in words
    disk_of(monkeypatch, needed)
    assert levels(disks.disks(one)) == ["ok", "ok"]


def test_no_room_for_the_cache(monkeypatch):
    one = patient("data.num_train=100000", build=True)
    disk_of(monkeypatch, 2**20)
    words = the("warning", (f for f in disks.disks(one) if f.found.startswith("HARMONIZE_CACHE")))
    assert "has 1 MiB free, but the images take 73 MiB" in words


def test_the_size_of_a_checkpoint(tmp_path):
    """As estimated, and as written after a step."""
    one = patient("backbone.width=96", build=True)
    module = one.setup.module
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    module.optimization.optimizer.step()
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": module.state_dict(), "optimizer": module.optimization.optimizer.state_dict()}, path)
    assert disks.checkpoint_bytes(module) == pytest.approx(path.stat().st_size, rel=0.1)
    assert disks.checkpoint_bytes(module) <= path.stat().st_size


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    words = the("problem", disks.disks(patient(f"run.root={tmp_path / 'file' / 'runs'}", "data.cache=false")))
    assert "cannot be written: Not a directory." in words


def test_a_look_at_a_disk_leaves_nothing(tmp_path):
    before = sorted(tmp_path.rglob("*"))
    list(disks.disks(patient()))
    assert sorted(tmp_path.rglob("*")) == before


def test_file_systems_without_links_or_fsync(monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "fsync", refuse)
    texts = [f.found for f in found(disks.disks(patient("data.cache=false"))) if f.level == "warning"]
    assert any("fsync" in text for text in texts)
    assert any("no hard links" in text for text in texts)


def test_which_file_system_a_path_is_on(tmp_path):
    mounts = tmp_path / "mounts"
    place = os.path.realpath(tmp_path)
    mounts.write_text(
        f"/dev/a / ext4 rw 0 0\nhost:/x {place}/my\\040disk nfs4 rw 0 0\nhost:/y {place}/other lustre rw 0 0\n"
    )
    assert disks.file_system(tmp_path / "my disk" / "runs", mounts) == ("nfs4", f"{place}/my disk")
    assert disks.file_system(tmp_path / "other", mounts)[0] == "lustre"
    assert disks.file_system(tmp_path / "my", mounts) == ("ext4", "/")
    assert disks.file_system(tmp_path, tmp_path / "none") == ("", "")


@pytest.mark.parametrize(
    ("kind", "level", "words"),
    [
        ("nfs4", "ok", "run.root lies on a network file system (nfs4)"),
        ("nfs4", "warning", "the cache is read in random order"),
        ("tmpfs", "warning", "it is gone after a restart"),
    ],
)
def test_kinds_of_disks(monkeypatch, kind, level, words):
    monkeypatch.setattr(disks, "file_system", lambda path: (kind, "/"))
    assert any(words in f.found and f.level == level for f in found(disks.disks(patient(build=True))))


# ---- speed -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fast(monkeypatch):
    """Short measurements."""
    monkeypatch.setattr(speed.time_loader, "__defaults__", (0.5,))
    monkeypatch.setattr(speed.time_step, "__defaults__", (0.5,))
    monkeypatch.setattr(speed, "cores_per_device", lambda devices: (8, "the machine"))
    return monkeypatch


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_slower_than_the_step(fast, tmp_path, workers):
    def load(self, index, real=datasets.ImageFiles.load):
        time.sleep(0.1)
        return real(self, index)

    fast.setattr(datasets.ImageFiles, "load", load)
    fast.setattr(speed, "_step", lambda *_: time.sleep(0.02))
    root = folder_of_images(tmp_path / "images", {"a": 60, "b": 40})
    words = the("warning", speed.speed(patient(*FOLDER, root, f"data.num_workers={workers}", build=True)))
    loader, step = map(float, re.findall(r"(?:brings|takes) ([\d.]+)", words))
    assert loader <= 12 * max(1, workers) < step
    share = 1 - loader / step if workers else step / (loader + step)  # without workers they take turns
    assert int(re.search(r"for data (\d+)%", words)[1]) == pytest.approx(100 * share, abs=3)
    assert "data.num_workers=8" in words
    assert "data.cache=true" in words


def test_a_loader_faster_than_the_step(fast, tmp_path):
    fast.setattr(speed, "_step", lambda *_: time.sleep(0.4))
    words = the("ok", speed.speed(patient(build=True)))
    assert re.search(r"it waits for data [0-9]% of the time\.", words)
    assert not (tmp_path / "cache").exists()


def test_a_batch_too_large_for_the_memory(fast):
    def step(setup, batch):
        if len(batch) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    fast.setattr(speed, "_step", step)
    words = the("problem", speed.speed(patient(build=True)))
    assert "A micro-batch of 8 images does not fit into the GPU's memory, 4 do." in words
    assert "trainer.images_at_once=4" in words


def test_the_time_of_a_step_is_that_of_training(fast):
    """On all images of a micro-batch, with gradients and an optimiser that moves the weights."""
    one = patient(build=True)
    before = {name: value.clone() for name, value in one.setup.module.state_dict().items()}
    loader = speed.time_loader(speed.measured_data(one))
    measured = speed.time_step(one.setup, loader.batch, 8, 20.0)
    assert (measured.images, measured.full, measured.out_of_memory) == (8, 8, False)
    assert measured.rate > 0
    moved = [name for name, value in one.setup.module.state_dict().items() if not value.equal(before[name])]
    assert any(name.startswith("encoder.blocks") for name in moved)


def test_measuring_does_not_change_the_data_module(fast):
    one = patient("data.num_workers=3", build=True)
    data = one.setup.data
    speed.time_loader(data)
    assert (data.num_workers, data.micro_batch) == (3, 8)


# ---- everything ------------------------------------------------------------------------------------------------------


def test_all_of_it_for_real(fast, tmp_path, capsys):
    """On this machine, with two processes and a training step; nothing is left of it."""
    fast.setenv("COLUMNS", "200")
    code = cli.main(["doctor", *TINY])
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "The check failed" not in printed.out
    assert "Two processes added up a tensor (gloo)." in printed.out
    assert "images per second" in printed.out
    assert code == int("problem" in printed.out.replace("0 problems", ""))
    assert not (tmp_path / "outputs").exists()
    assert not (tmp_path / "cache").exists()
