"""What every script promises, tried on each: ranks, kills, pauses, later stages, bare torchrun."""

import importlib

import pytest
import torch
from conftest import (
    assert_close_runs, assert_same_run, kill_at_step, losses, program, records, run)
from test_copies import SCRIPTS

COMMON = ("--recipe demo --image-size 16 --batch-size 16 --workers 0 --precision fp32 --epochs 6 "
          "--knn-every 0 --log-every 1 --device cpu")  # 48 images: 3 steps an epoch
FLAGS = {
    "simsiam.py": "--width 0.125 --dim 16 --predictor-dim 8",
    "dcl.py": "--width 0.125 --dim 16 --hidden-dim 32 --loss infonce --queue 32",
    "byol.py": "--width 0.125 --dim 16 --hidden-dim 32 --beta 0.5",
    "moco_v3.py": "--dim 16 --hidden-dim 32",
    "simclr_v2.py": "--width 0.125 --dim 16 --queue 32 --base-lr 0.2",  # rounding grows slowly
}
LATER = [(script, stage) for script in SCRIPTS
         for stage in importlib.import_module(script[:-3]).STAGES if stage != "pretrain"]


def main(script, *words):
    assert program(importlib.import_module(script[:-3]))(*words) == 0


@pytest.fixture(scope="module")
def whole(classes, tmp_path_factory):
    """The uninterrupted pre-training of a script."""
    done = {}

    def get(script):
        if script not in done:
            done[script] = tmp_path_factory.mktemp("whole") / "run"
            main(script, "--data", classes, *COMMON.split(), *FLAGS[script].split(), "--out",
                 done[script])
        return done[script]

    return get


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_are_the_same_run_as_one(script, classes, tmp_path):
    words = ["--data", classes, *COMMON.split(), *FLAGS[script].split(), "--precision", "fp64",
             "--steps", 12]
    main(script, *words, "--out", tmp_path / "one")
    run(script, *words, "--out", tmp_path / "two", processes=2)
    assert_close_runs(tmp_path / "one", tmp_path / "two", 12, "std", "rank")
    one, two = (torch.load(tmp_path / name / "last.pt")["optimizer"]["state"]
                for name in ("one", "two"))
    assert len(one) == len(two) > 20  # the momenta, which hold every gradient
    for i in one:
        torch.testing.assert_close(one[i], two[i], rtol=0, atol=1e-10)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_killed_run_ends_with_the_same_bits(script, classes, whole, tmp_path):
    words = ["--data", classes, *COMMON.split(), *FLAGS[script].split(), "--save-every", 0.001]
    assert 0 < kill_at_step(8, script, *words, out=tmp_path, fork=True) < 18
    main(script, *words, "--out", tmp_path)
    assert len(records(tmp_path, "config")) == 2
    assert_same_run(whole(script), tmp_path)


@pytest.mark.parametrize("script, stage", LATER)
def test_a_later_stage_knows_what_it_continues_and_can_be_paused(script, stage, classes, whole,
                                                                 tmp_path):
    init = whole(script) / "last.pt"
    words = ["--batch-size", 8, "--epochs", 3, "--workers", 0, "--log-every", 1]
    if stage in ("finetune", "distill"):
        words += ["--labels", 1]
    if stage == "distill":  # of a fine-tuned network
        main(script, "finetune", "--init", init, *words, "--out", tmp_path / "teacher")
        init = tmp_path / "teacher/last.pt"
    words = [stage, "--teacher" if stage == "distill" else "--init", init, *words]
    main(script, *words, "--out", tmp_path / "whole")
    for steps in (5, 6, 99):  # 6 steps an epoch
        main(script, *words, "--steps", steps, "--out", tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    config = records(tmp_path / "whole", "config")[0]["config"]
    assert (config["images"], config["data"], config["image_size"]) == (48, classes.name, 16)
    assert len(losses(tmp_path / "whole")) == 18
    top1 = [line["top1"] for line in records(tmp_path / "whole", "top1")]
    assert top1 and all(x * 12 == pytest.approx(round(x * 12)) for x in top1)  # of 12 images
    assert (tmp_path / "whole/encoder.pt").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_eight_processes_work_with_no_flag_but_steps(script, tmp_path):
    run(script, "--steps", 2, "--out", tmp_path, processes=8)
    assert len(losses(tmp_path)) == 2 and records(tmp_path, "knn")
