"""A whole run: on 1, 2 and 4 processes, killed, stopped, resumed, and what it leaves behind."""

import functools
import json
import os
import pickle
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from conftest import (
    ROOT, TINY, assert_close_runs, assert_same_run, finish, losses, mistake, program, records,
    run, send, start, wait_for_step)
from helpers import settled

import simsiam

LONG = [*TINY, "--image-size", "32", "--batch-size", "8", "--epochs", "6", "--log-every", "1",
        "--save-every", "0.001"]  # 40 images: 5 steps an epoch; a checkpoint every 0.06 seconds
QUICK = [*TINY, "--image-size", "16", "--epochs", "3"]  # of 48 images: 3 steps an epoch
TIMES = ("images_per_s", "minutes_left")

main = program(simsiam)


def start_again(processes, *args):
    """The same command: in this process if it takes one, for that is quicker."""
    if processes:
        run("simsiam.py", *args, processes=processes)
    else:
        assert main(*args) == 0


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """The uninterrupted run, of 0 (plain python) or 2 processes."""
    @functools.cache
    def get(processes):
        out = tmp_path_factory.mktemp("whole")
        start_again(processes, "--data", photos, "--out", out, *LONG)
        return out
    return get


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_run_that_a_signal_ends_in_mid_epoch_continues_with_the_same_bits(
        name, processes, photos, whole, tmp_path):
    args = ["--data", photos, "--out", tmp_path, *LONG, "--workers", 2]
    args += ["--save-every", 100] * (name == "SIGTERM")
    running = start("simsiam.py", *args, processes=processes, fork=True)
    wait_for_step(tmp_path / "log.jsonl", 8, running)
    seen = records(tmp_path)[-1]["step"]
    send(running[-1:] if name == "SIGTERM" else running, getattr(signal, name))
    codes, output = finish(running)
    step = torch.load(tmp_path / "last.pt")["step"]
    assert 5 <= step < 30
    if name == "SIGTERM":  # to one rank alone: all save at the same logged step, and exit with 0
        assert set(codes) == {0} and f"step {step} of 30" in output, output
        assert step == records(tmp_path)[-1]["step"] and seen < step <= seen + 8
    start_again(processes, *args)
    assert len(records(tmp_path, "config")) == 2
    assert_same_run(whole(processes), tmp_path)


def test_sigterm_within_a_step_ends_the_run_with_that_step(photos, whole, tmp_path, monkeypatch):
    real, calls = simsiam.train_step, []

    def step(*args):
        calls.append(args)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(simsiam, "train_step", step)
    for done in (7, 30):
        assert main("--data", photos, "--out", tmp_path, *LONG, "--save-every", 100) == 0
        assert torch.load(tmp_path / "last.pt")["step"] == len(calls) == done
        simsiam.STOP.clear()
    assert_same_run(whole(0), tmp_path)


def test_a_pause_changes_nothing_and_cuts_the_log_back(photos, whole, tmp_path, capsys):
    args, log = ["--data", photos, "--out", tmp_path, *LONG], tmp_path / "log.jsonl"
    for steps in (5, 13, 7, 99):  # 5: at an epoch's end; 7: already behind
        assert main(*args, "--steps", steps) == 0
        if steps == 7:  # what a run writes that is killed later, in the midst of a line
            with open(log, "a") as file:
                file.write('{"epoch": 2.8, "step": 14, "loss": 1.0}\n{"epoch": 3.0, "st')
    said = capsys.readouterr().out
    assert "step 5 of 30" in said and "continuing from step 5" in said and "step 30 of 30" in said
    assert_same_run(whole(0), tmp_path)
    before = log.read_bytes()
    assert main(*args) == 0  # finished: only tells its result
    assert "step 30 of 30" in capsys.readouterr().out and log.read_bytes() == before


def test_other_numbers_of_processes_give_the_same_run_and_continue_it(photos, tmp_path):
    args = ["--data", photos, *LONG, "--precision", "fp64"]
    for out, processes, steps in (("one", 0, 12), ("four", 4, 12), ("both", 2, 8), ("both", 0, 12)):
        start_again(processes, *args, "--out", tmp_path / out, "--steps", steps)
    one = torch.load(tmp_path / "one/last.pt")["optimizer"]["state"]
    for out in (tmp_path / "four", tmp_path / "both"):
        assert_close_runs(tmp_path / "one", out, 12, "std", "rank")
        many = torch.load(out / "last.pt")["optimizer"]["state"]
        assert len(one) == len(many) > 30  # the momenta, which hold every gradient
        for i in one:
            torch.testing.assert_close(one[i], many[i], rtol=0, atol=1e-10)


def test_torchrun_and_two_nodes_on_one_host_give_the_first_loss_of_one_process(
        photos, tmp_path, monkeypatch):
    args = ["--data", str(photos), *TINY, "--image-size", "32", "--batch-size", "8", "--steps", "1"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    node = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}",
            "--rdzv_id=test", "--nproc_per_node=1"]
    running = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *launch, str(ROOT / "simsiam.py"), *args,
         "--out", str(tmp_path / name)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT) for name, launch in (
            ("one", ["--standalone", "--nproc_per_node=2"]), ("two", node), ("two", node))]
    main(*args, "--out", tmp_path / "none")
    codes, output = finish(running)
    assert set(codes) == {0}, output
    first = [records(tmp_path / name)[0]["loss"] for name in ("none", "one", "two")]
    assert max(first) - min(first) < 1e-5, first
    monkeypatch.setattr(simsiam, "world_size", lambda: 2)
    assert "--batch-size 7 is not a multiple of 2 processes" in mistake(
        simsiam, *args, "--batch-size", 7, "--out", tmp_path / "odd")


def test_the_knn_monitor_changes_no_bit_and_an_epoch_is_evaluated_once(classes, tmp_path, capsys):
    args = [*QUICK, "--data", classes, "--log-every", 1]
    assert main(*args, "--out", tmp_path / "without") == 0
    for steps in (6, 99):  # paused at the end of an epoch, after its evaluation
        assert main(*args, "--out", tmp_path / "with", "--knn-every", 1, "--steps", steps) == 0
    assert_same_run(tmp_path / "without", tmp_path / "with")
    knn, none = (records(tmp_path / name, "knn") for name in ("with", "without"))
    assert [x["epoch"] for x in knn] == [0, 1, 2, 3] and not none
    result = f"step 9 of 9, knn {knn[0]['knn']:.1%} -> {knn[-1]['knn']:.1%}\n"
    assert result in capsys.readouterr().out


def test_the_log_says_what_ran_and_its_speed_without_evaluation(classes, tmp_path, monkeypatch):
    seconds = []
    monkeypatch.setattr(simsiam.time, "time", lambda: sum(seconds, 0.0))
    for name, more in (("train_step", 2), ("log_knn", 1000)):
        monkeypatch.setattr(simsiam, name, lambda *args, real=getattr(simsiam, name), more=more: (
            seconds.append(more), real(*args))[1])
    assert main(*QUICK, "--data", classes, "--out", tmp_path, "--log-every", 2, "--knn-every",
                1) == 0
    first, *rest = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert first.keys() == {"config", "versions", "hardware", "command", "commit"}
    assert isinstance(first["command"], str) and first["versions"]["torch"] == torch.__version__
    assert first["config"]["base_lr"] == simsiam.DEMO.base_lr and first["config"]["images"] == 48
    lines = [line for line in rest if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 6, 8, 9]  # epochs end at 3, 6, 9
    assert all({*line} == {"epoch", "step", "loss", "lr", "std", "rank", *TIMES} for line in lines)
    assert {line["images_per_s"] for line in lines} == {16 / 2.0}
    assert [line["minutes_left"] * 60 for line in lines] == pytest.approx(
        [2.0 * (9 - line["step"]) for line in lines])
    assert sorted(os.listdir(tmp_path)) == ["encoder.json", "encoder.pt", "last.pt", "lock",
                                            "log.jsonl", "views.png"]
    picture = torchvision.io.decode_image(str(tmp_path / "views.png"))
    assert picture.shape[1] > 3 * 64 and picture.shape[2] > 8 * 64 and picture.float().std() > 10


def test_without_fcntl_and_affinity_as_on_windows_and_macos(classes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # import fcntl: ImportError
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(signal, "SIGCHLD", raising=False)
    assert main(*QUICK, "--data", classes, "--steps", 1, "--out", tmp_path) == 0


def test_the_loader_can_be_sent_to_a_spawned_worker(photos):
    args = settled(simsiam, *TINY, "--data", photos, dtype=torch.float32)
    simsiam.load_encoder(args)
    crops = simsiam.FileCrops(simsiam.load_data(args).train, args)
    again = pickle.loads(pickle.dumps((crops, simsiam.ignore_signals)))[0]
    key = (3, np.full((2, 23), 0.5))
    assert torch.equal(again[key][0], crops[key][0])


@pytest.mark.skipif(not (torch.cuda.is_available() or torch.backends.mps.is_available()),
                    reason="neither CUDA nor MPS here")
def test_a_run_on_an_accelerator_is_the_same_command(classes, tmp_path):
    assert main(*QUICK, "--data", classes, "--out", tmp_path, "--steps", 3, "--device",
                "cuda" if torch.cuda.is_available() else "mps", "--knn-every", 1) == 0
    assert len(losses(tmp_path)) == 2 and all(np.isfinite(losses(tmp_path)))
