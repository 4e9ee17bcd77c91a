"""A user's mistake ends the run with one sentence that names the thing, and costs nothing."""

import math
import os
import shutil
import signal
from unittest.mock import Mock

import pytest
import torch
import torchvision
from conftest import TINY, finish, mistake, program, send, start, wait_for_step, write_images

import simsiam

main = program(simsiam)
SMALL = [*TINY, "--image-size", "16"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, classes):
    """Folders and files to make mistakes with."""
    root = tmp_path_factory.mktemp("world")
    (root / "empty").mkdir()
    (root / "file").write_text("no folder")
    for name in ("large", "ruined"):
        write_images(root / name, 20)
    for path in sorted((root / "ruined").iterdir())[1:]:
        os.truncate(path, 100)
    assert main(*SMALL, "--data", classes, "--steps", 1, "--out", root / "run") == 0
    shutil.copytree(root / "run", root / "cut")
    os.truncate(root / "cut/last.pt", 2000)
    torch.save(os.abort, root / "evil.pt")  # a pickle may name any function
    torch.save([1, 2], root / "list.pt")
    torch.save({"arch": "vit_small", "state_dict": {"x": torch.zeros(1)}}, root / "vit.pt")
    return root


def contents(root):
    return {path: path.is_file() and path.read_bytes() for path in root.rglob("*")
            if path.name != "lock"}


# Flags of a command, with {w} for the world and {c} for a good folder, and what is said of them.
RANGES = {
    "--batch-size 1": "2 and inf", "--steps -1": "1 and inf", "--epochs 0": "1 and inf",
    "--base-lr nan": "0 and inf", "--weight-decay -1.0": "0 and inf", "--blur-prob 2.0": "0 and 1",
    "--crop-min 2.0": "0.001 and 1", "--width 0.01": "0.125 and inf"}
LOADS = "--init takes a run's last.pt or encoder.pt, or the weights of an encoder"
MISTAKES = {flags: f"{flags}: must be between {limits}" for flags, limits in RANGES.items()} | {
    "--lr 0.1": "unrecognized arguments: --lr 0.1",
    "linear --init none --blur-prob 0.1": "unrecognized arguments: --blur-prob 0.1",
    "--recipe imagnet": "--recipe: invalid choice: 'imagnet'",
    "linear --data {c}": "the following arguments are required: --init",
    "--data {c} --warmup-epochs 9 --epochs 9": "--warmup-epochs 9: must be less than --epochs 9",
    "--data {w}/nowhere": "--data {w}/nowhere: not a folder, and not one of demo, cifar10",
    "--data {w}/empty": "{w}/empty: no JPEG, PNG or WebP image",
    "--data {w}/ruined --workers 1": "ten unreadable files in a row, the last one '{w}/ruined/00_",
    "--data {c} --batch-size 64": "{c} has 48 images: --batch-size 64 must not exceed that",
    "linear --init {w}/run/encoder.pt": "encoder.pt does not name a data set: use --data",
    "linear --init {w}/run/last.pt --batch-size 8 --data {w}/large":
        "linear needs labels: {w}/large has no train/ and val/",
    "--init {w}/no.pt": "{w}/no.pt cannot be read (FileNotFoundError): " + LOADS,
    "linear --init {w}/evil.pt": "{w}/evil.pt cannot be read (UnpicklingError): " + LOADS,
    "linear --init {w}/list.pt": "{w}/list.pt cannot be read (TypeError): " + LOADS,
    "linear --data {c} --init {w}/vit.pt": "vit.pt contains vit_small, which simsiam.py does not",
    "linear --init {w}/run/last.pt --batch-size 8 --arch resnet18":
        "does not fit --arch resnet18, width 0.125, small_images True: layer1.1.conv1.weight,",
    "linear --init {w}/run/last.pt --batch-size 8 --width 0.5":
        "last.pt does not fit --arch resnet10, width 0.5, small_images True: conv1.weight, bn1",
    "--data {c} --out {w}/run --seed 7 --dim 8": "{w}/run has a run with different seed, dim: change",
    "--data {c} --out {w}/run --init {w}/run/last.pt": "/run has a run with different init: change",
    "--data {c} --out {w}/cut": "cut/last.pt cannot be read (RuntimeError): delete it to start",
    "--data {c} --out {w}/file/run": "Not a directory: '{w}/file/run'"}


@pytest.mark.filterwarnings("ignore:cannot read")
@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_gets_one_sentence_and_loses_nothing(command, world, classes, tmp_path, capsys):
    stage, *words = command.format(w=world, c=classes).split()
    words = [stage, "--workers", 0, *words] if stage == "linear" else [*SMALL, stage, *words]
    words += [] if "--out" in words else ["--out", tmp_path / "out"]
    before = contents(world)
    with pytest.raises(SystemExit) as end:
        main(*words)
    said = end.value.code if end.value.code != 2 else capsys.readouterr().err.splitlines()[-1]
    assert MISTAKES[command].format(w=world, c=classes) in said and len(said) < 400, said
    assert "\n" not in said and contents(world) == before
    assert {path.name for path in contents(tmp_path / "out")} <= {"log.jsonl"}


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", ""])
def test_processes_that_no_launcher_made_or_no_gpu_is_left_for(missing, tmp_path, monkeypatch):
    for name in {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}:
        monkeypatch.setenv(name, "5")
    monkeypatch.delenv(missing, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    assert mistake(simsiam, *SMALL, "--out", tmp_path / "out") == (
        "RANK is set, but not by torchrun: start with torchrun, or unset RANK" if missing else
        "this machine has 5 GPUs: start fewer processes, or use --device cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [OSError("<urlopen error no network>"), RuntimeError("broken")])
def test_a_data_set_that_cannot_be_downloaded(error, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Mock(side_effect=error))
    assert mistake(simsiam, "--data", "cifar10", "--data-root", tmp_path, "--out", tmp_path) == (
        f"cannot download cifar10 to --data-root {tmp_path}: {error}")


def test_a_folder_in_which_a_run_is_at_work(classes, tmp_path):
    command = [*SMALL, "--data", classes, "--epochs", 9999, "--log-every", 1, "--out", tmp_path]
    running = start("simsiam.py", *command, fork=True)
    try:
        wait_for_step(tmp_path / "log.jsonl", 1, running)
        said = mistake(simsiam, *command, "--steps", 1)
    finally:
        send(running, signal.SIGKILL)
        finish(running)
    assert said == f"{tmp_path} is in use by another run: choose another --out"
    assert main(*command, "--steps", 1) == 0  # free again


@pytest.mark.parametrize("stage", simsiam.STAGES)
@pytest.mark.parametrize("owner, name, fault, said", [
    (os, "fsync", Mock(side_effect=OSError(28, "No space left on device")),  # after all is written
     "cannot write {}/last.pt: [Errno 28] No space left on device; the last checkpoint is intact"),
    (torch.optim.SGD, "step", lambda sgd: sgd.param_groups[0]["params"][0].data.fill_(math.nan),
     "not finite: lower --base-lr (last.pt, if any, is intact)"),
    (simsiam, "agree", Mock(side_effect=KeyboardInterrupt),
     "interrupted: rerun the command to continue"),
    (simsiam, "agree", Mock(side_effect=RuntimeError("unable to open shared memory object </x>")),
     "/dev/shm is too small: use --workers 0, or docker")])
def test_what_fails_at_work_leaves_the_last_checkpoint_whole(stage, owner, name, fault, said, world,
                                                             classes, tmp_path, monkeypatch):
    linear = ["linear", "--init", world / "run/last.pt", "--workers", 0, "--batch-size", 16]
    words = [*(linear if stage == "linear" else [*SMALL, "--data", classes]), "--out", tmp_path]
    assert main(*words, "--steps", 2) == 0
    before = contents(tmp_path)
    monkeypatch.setattr(owner, name, fault)
    assert said.format(tmp_path) in mistake(simsiam, *words, "--steps", 3)
    after = contents(tmp_path)  # log.jsonl may have grown
    assert before.keys() == after.keys() and {
        path.name for path in after if after[path] != before[path]} <= {"log.jsonl"}
