"""A whole run: on 1, 2 and 4 processes, killed, stopped, resumed, and what it leaves behind."""

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
    ROOT, TINY, assert_close_runs, assert_same_weights, finish, kill_at_step, losses, mistake,
    program, records, run, send, start, wait_for_step, weights)

import simsiam

LONG = [*TINY, "--image-size", "32", "--batch-size", "8", "--epochs", "6", "--log-every", "1",
        "--save-every", "0.001"]  # 40 images: 5 steps an epoch; a checkpoint every 0.06 seconds
TIMES = ("images_per_s", "minutes_left")

main = program(simsiam)


def curve(out):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in records(out)]


def assert_same_run(a, b):
    assert curve(a) == curve(b) and len(curve(a)) > 1  # so no step stands twice either
    assert_same_weights(a, b)


def start_again(processes, *args):
    """The same command: in this process if it takes one, for that is quicker."""
    if processes:
        run("simsiam.py", *args, processes=processes)
    else:
        assert main(*args) == 0


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """The uninterrupted run, of 0 (plain python) or 2 processes."""
    done = {}

    def get(processes):
        if processes not in done:
            done[processes] = tmp_path_factory.mktemp("whole") / "run"
            start_again(processes, "--data", photos, "--out", done[processes], *LONG)
        return done[processes]

    return get


# ------------------------------------------------------------------------------- kills and signals


@pytest.mark.parametrize("processes, workers", [(0, 2), (2, 2)])
def test_a_run_killed_in_mid_epoch_ends_with_the_same_bits(
        processes, workers, photos, whole, tmp_path):
    args = ["--data", photos, *LONG, "--workers", workers]
    step = kill_at_step(8, "simsiam.py", *args, out=tmp_path, processes=processes)
    assert 5 <= step < 30
    start_again(processes, *args, "--out", tmp_path)
    assert len(records(tmp_path, "config")) == 2
    assert_same_run(whole(processes), tmp_path)


@pytest.mark.parametrize("processes, workers", [(0, 2), (2, 2)])
def test_sigterm_saves_at_the_next_logged_step_exits_0_and_resumes(processes, workers, photos,
                                                                   whole, tmp_path):
    args = ["--data", photos, "--out", tmp_path, *LONG, "--workers", workers, "--save-every", 100]
    running = start("simsiam.py", *args, processes=processes, fork=True)
    wait_for_step(tmp_path / "log.jsonl", 8, running)
    seen = records(tmp_path)[-1]["step"]
    send(running[-1:], signal.SIGTERM)  # to one rank alone: all stop at the same step
    codes, output = finish(running)
    assert set(codes) == {0} and f"step {records(tmp_path)[-1]['step']} of 30" in output, output
    step = torch.load(tmp_path / "last.pt")["step"]
    assert step == records(tmp_path)[-1]["step"] and seen < step <= seen + 8 and step < 30
    start_again(processes, *args)
    assert_same_run(whole(processes), tmp_path)


def test_sigterm_within_a_step_ends_the_run_with_that_step(photos, whole, tmp_path, monkeypatch):
    real, calls = simsiam.train_step, []

    def step(*args):
        calls.append(args)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(simsiam, "train_step", step)
    for _ in range(2):
        assert main("--data", photos, "--out", tmp_path, *LONG, "--save-every", 100) == 0
        if len(calls) == 7:
            assert torch.load(tmp_path / "last.pt")["step"] == 7
        simsiam.STOP.clear()
    assert len(calls) == 30
    assert_same_run(whole(0), tmp_path)


def test_a_pause_changes_nothing(photos, whole, tmp_path, capsys):
    for steps in (5, 13, 7, 99):  # 5: at an epoch's end; 7: already behind
        assert main("--data", photos, "--out", tmp_path, *LONG, "--steps", steps) == 0
    said = capsys.readouterr().out
    assert "step 5 of 30" in said and "continuing from step 5" in said and "step 30 of 30" in said
    assert_same_run(whole(0), tmp_path)
    before = (tmp_path / "log.jsonl").read_bytes()
    assert main("--data", photos, "--out", tmp_path, *LONG) == 0  # finished: only tells its result
    assert "step 30 of 30" in capsys.readouterr().out
    assert (tmp_path / "log.jsonl").read_bytes() == before


# ------------------------------------------------------------------------------- several processes


def test_two_and_four_processes_are_the_same_run_as_one(photos, tmp_path):
    args = ["--data", photos, *TINY, "--image-size", "32", "--batch-size", "40", "--epochs", "12",
            "--steps", "12", "--log-every", "1", "--precision", "fp64"]
    for processes in (0, 2, 4):
        start_again(processes, *args, "--out", tmp_path / str(processes))
    for processes in (2, 4):
        one, many = tmp_path / "0", tmp_path / str(processes)
        assert_close_runs(one, many, 12, "std", "rank")
        a, b = (torch.load(out / "last.pt")["optimizer"]["state"] for out in (one, many))
        assert len(a) == len(b) > 30  # the momenta, which hold every gradient
        for i in a:
            torch.testing.assert_close(a[i], b[i], rtol=0, atol=1e-10)


def test_a_run_can_be_resumed_on_another_number_of_processes(photos, tmp_path):
    args = ["--data", photos, *LONG, "--precision", "fp64"]
    start_again(0, *args, "--out", tmp_path / "whole")
    start_again(2, *args, "--out", tmp_path / "parts", "--steps", 9)
    start_again(0, *args, "--out", tmp_path / "parts")
    assert_close_runs(tmp_path / "whole", tmp_path / "parts", 30)


def torchrun(*args, nproc=2):
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={nproc}", *args,
            str(ROOT / "simsiam.py")]


def test_torchrun_and_two_nodes_on_one_host_give_the_first_loss_of_one_process(photos, tmp_path):
    args = ["--data", str(photos), *TINY, "--image-size", "32", "--batch-size", "8", "--steps", "1"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    nodes = [torchrun("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}",
                      "--rdzv_id=test", nproc=1) for _ in range(2)]
    running = [subprocess.Popen([*launch, *args, "--out", str(tmp_path / name)], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
               for name, launch in (("one", torchrun("--standalone")), ("two", nodes[0]),
                                    ("two", nodes[1]))]
    odd = subprocess.run([*torchrun("--standalone"), *args, "--out", str(tmp_path / "odd"),
                          "--batch-size", "7"], text=True, capture_output=True)
    assert "--batch-size 7 is not a multiple of 2 processes" in odd.stderr and odd.returncode
    codes, output = finish(running)
    assert set(codes) == {0}, output
    main(*args, "--out", tmp_path / "none")
    first = [records(tmp_path / name)[0]["loss"] for name in ("none", "one", "two")]
    assert max(first) - min(first) < 1e-5, first


# --------------------------------------------------------------------------------- log and folder


def test_the_knn_monitor_changes_no_bit_and_an_epoch_is_evaluated_once(classes, tmp_path, capsys):
    args = [*TINY, "--data", classes, "--image-size", "16", "--log-every", "1", "--epochs", "3"]
    assert main(*args, "--out", tmp_path / "without") == 0
    for steps in (6, 99):  # paused at the end of an epoch, after its evaluation
        assert main(*args, "--out", tmp_path / "with", "--knn-every", 1, "--steps", steps) == 0
    assert_same_run(tmp_path / "without", tmp_path / "with")
    knn = records(tmp_path / "with", "knn")
    assert [x["epoch"] for x in knn] == [0, 1, 2, 3] and all(0 <= x["knn"] <= 1 for x in knn)
    assert records(tmp_path / "without", "knn") == []
    result = f"step 9 of 9, knn {knn[0]['knn']:.1%} -> {knn[-1]['knn']:.1%}\n"
    assert result in capsys.readouterr().out


def test_the_log_is_cut_back_to_the_checkpoint(photos, whole, tmp_path):
    args = ["--data", photos, "--out", tmp_path, *LONG]
    main(*args, "--steps", 7)
    log = tmp_path / "log.jsonl"
    lines = log.read_text()
    # What a run writes that is killed between two checkpoints, and in the midst of a line.
    log.write_text(lines + '{"epoch": 1.6, "step": 8, "loss": 1.0}\n{"epoch": 1.8, "st')
    assert main(*args) == 0
    assert_same_run(whole(0), tmp_path)


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_a_run_that_diverges_ends_and_keeps_its_last_good_checkpoint(what, photos, tmp_path,
                                                                     monkeypatch):
    args = ["--data", photos, "--out", tmp_path, *LONG]
    main(*args, "--steps", 6)
    if what == "loss":
        real = simsiam.simsiam_loss
        monkeypatch.setattr(simsiam, "simsiam_loss", lambda *a, **k: real(*a, **k) * float("nan"))
    else:  # the loss of this step is from before
        real = torch.optim.SGD.step

        def step(self, *args):
            real(self, *args)
            self.param_groups[0]["params"][0].data[0] = float("inf")

        monkeypatch.setattr(torch.optim.SGD, "step", step)
    assert "not finite: lower --base-lr" in mistake(simsiam, *args)
    assert torch.load(tmp_path / "last.pt")["step"] == 6
    assert all(x.isfinite().all() for x in weights(tmp_path).values())


def test_the_log_says_what_ran(classes, tmp_path, capsys):
    assert main(*TINY, "--data", classes, "--image-size", "16", "--out", tmp_path, "--epochs", 3,
                "--log-every", 2, "--knn-every", 1) == 0
    first, *rest = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert first.keys() == {"config", "versions", "hardware", "command", "commit"}
    assert isinstance(first["command"], str) and first["versions"]["torch"] == torch.__version__
    assert first["config"]["base_lr"] == simsiam.DEMO.base_lr and first["config"]["images"] == 48
    lines = [line for line in rest if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 6, 8, 9]  # epochs end at 3, 6, 9
    assert all(line.keys() == {"epoch", "step", "loss", "lr", "std", "rank", *TIMES}
               for line in lines)
    assert lines[-1]["minutes_left"] == 0 and "minutes_left" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["encoder.json", "encoder.pt", "last.pt", "lock",
                                            "log.jsonl", "views.png"]
    picture = torchvision.io.decode_image(str(tmp_path / "views.png"))
    assert picture.shape[1] > 2 * 64 and picture.shape[2] > 8 * 64 and picture.float().std() > 10
    for name in ("last.pt", "encoder.pt"):
        assert torch.load(tmp_path / name, weights_only=True)


def test_images_per_s_are_the_intervals_without_evaluation(classes, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(simsiam.time, "time", lambda: clock[0])
    real_step, real_knn = simsiam.train_step, simsiam.log_knn

    def step(*args):
        clock[0] += 2.0
        return real_step(*args)

    def evaluate(*args):
        clock[0] += 1000.0
        real_knn(*args)

    monkeypatch.setattr(simsiam, "train_step", step)
    monkeypatch.setattr(simsiam, "log_knn", evaluate)
    assert main(*TINY, "--data", classes, "--image-size", "16", "--out", tmp_path, "--epochs", 3,
                "--log-every", 2, "--knn-every", 1) == 0
    assert {line["images_per_s"] for line in records(tmp_path)} == {16 / 2.0}
    assert [line["minutes_left"] * 60 for line in records(tmp_path)] == pytest.approx(
        [2.0 * (9 - line["step"]) for line in records(tmp_path)])


# -------------------------------------------------------------------------------- other systems


def test_without_fcntl_and_affinity_as_on_windows_and_macos(classes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # import fcntl: ImportError
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(signal, "SIGCHLD", raising=False)
    args = [*TINY, "--data", classes, "--image-size", "16", "--steps", 1]
    assert main(*args, "--out", tmp_path) == 0


def test_the_loader_can_be_sent_to_a_spawned_worker(photos):
    args = simsiam.settle(simsiam.parse_args([*TINY, "--data", str(photos)]))
    args.device, args.dtype = torch.device("cpu"), torch.float32
    simsiam.load_encoder(args)
    crops = simsiam.FileCrops(simsiam.load_data(args).train, args)
    again = pickle.loads(pickle.dumps((crops, simsiam.ignore_signals)))[0]
    key = (3, np.full((2, 23), 0.5))
    assert torch.equal(again[key][0], crops[key][0])


def test_a_run_on_an_accelerator_is_the_same_command(classes, tmp_path):
    name = "cuda" if torch.cuda.is_available() else "mps"
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        pytest.skip("neither CUDA nor MPS here")
    assert main(*TINY, "--data", classes, "--image-size", "16", "--out", tmp_path, "--steps", 3,
                "--device", name, "--knn-every", 1) == 0
    assert len(losses(tmp_path)) == 2 and all(np.isfinite(losses(tmp_path)))
