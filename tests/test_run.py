"""A run as a whole: on 1 and 2 processes, killed, stopped, resumed, and what it leaves behind."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
import torchvision
from conftest import (
    ROOT, TINY, assert_same_weights, finish, kill_at_step, losses, program, records, run, send,
    start, wait_for_step, weights)

import simsiam

LONG = [*TINY, "--image-size", "32", "--batch-size", "8", "--epochs", "6", "--log-every", "1",
        "--save-every", "0.001"]  # 40 images: 5 steps an epoch; a checkpoint every 0.06 seconds
TIMES = ("images_per_s", "data_wait", "seconds", "memory_gb")


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


@pytest.mark.parametrize("processes, workers", [(0, 0), (0, 2), (2, 0), (2, 2)])
def test_a_run_killed_in_mid_epoch_ends_with_the_same_bits(
        processes, workers, photos, whole, tmp_path):
    args = ["--data", photos, *LONG, "--workers", workers]
    step = kill_at_step(8, "simsiam.py", *args, out=tmp_path, processes=processes)
    assert 5 <= step < 30
    start_again(processes, *args, "--out", tmp_path)
    assert [line["resumed"] for line in records(tmp_path, "resumed")] == [step]
    assert_same_run(whole(processes), tmp_path)


@pytest.mark.parametrize("processes, workers", [(0, 2), (2, 2)])
def test_sigterm_saves_at_the_next_step_exits_0_and_resumes(processes, workers, photos, whole,
                                                            tmp_path):
    args = ["--data", photos, "--out", tmp_path, *LONG, "--workers", workers, "--save-every", 100]
    running = start("simsiam.py", *args, processes=processes, fork=True)
    wait_for_step(tmp_path / "log.jsonl", 8, running)
    seen = records(tmp_path)[-1]["step"]
    # To one rank alone: the others hear of it and stop at the same step.
    send(running[-1:], signal.SIGTERM)
    codes, output = finish(running)
    assert set(codes) == {0} and output.count("stopped and saved") == 1, output
    step = torch.load(tmp_path / "last.pt")["step"]
    assert step == records(tmp_path)[-1]["step"] + 1 and seen < step <= seen + 8 and step < 30
    start_again(processes, *args)
    assert_same_run(whole(processes), tmp_path)


def test_a_second_run_on_the_same_folder_is_refused(photos, tmp_path):
    command = ["simsiam.py", "--data", photos, "--out", tmp_path, *LONG, "--epochs", "5000"]
    first = start(*command, fork=True)
    wait_for_step(tmp_path / "log.jsonl", 1, first)
    codes, output = finish(start(*command, fork=True))
    assert codes == [2] and "another run is at work" in output
    send(first, signal.SIGTERM)
    assert finish(first)[0] == [0]


@pytest.mark.parametrize("data", ["demo", "photos"])
def test_two_processes_are_the_same_run_as_one(data, photos, tmp_path):
    args = ["--data", photos if data == "photos" else data, *TINY, "--image-size", "32",
            "--batch-size", "40", "--epochs", "20", "--steps", "20", "--log-every", "1",
            "--precision", "fp64", "--keep-every", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    start_again(0, *args, "--out", one)
    start_again(2, *args, "--out", two)
    a, b = losses(one), losses(two)
    assert len(a) == 20
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    # The momentum holds every gradient: after the first step (40 photos are one epoch, whose end is
    # kept) it is the gradient plus the weight decay, after the last all of them.
    for name in ("step1.pt", "last.pt") if data == "photos" else ("last.pt",):
        a, b = (torch.load(out / name)["optimizer"]["state"] for out in (one, two))
        assert len(a) == len(b) > 30
        for i in a:
            torch.testing.assert_close(a[i], b[i], rtol=0, atol=1e-10)
    torch.testing.assert_close(weights(one), weights(two), rtol=0, atol=1e-10)


def test_the_first_loss_on_the_demo_agrees_in_float32(tmp_path):
    for processes in (0, 2):
        start_again(processes, "--data", "demo", *TINY, "--batch-size", "40", "--steps", "1", "--out",
                    tmp_path / str(processes))
    a, b = (records(tmp_path / name)[0]["loss"] for name in ("0", "2"))
    assert abs(a - b) < 1e-5


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
    # Under torchrun a mistake is one sentence, too, and the exit code of every rank is 2.
    done = subprocess.run([*torchrun("--standalone"), *args, "--out", str(tmp_path / "odd"),
                           "--batch-size", "7"], text=True, capture_output=True)
    assert done.stderr.count("simsiam.py: --batch-size 7 is the global batch") == 1
    assert done.returncode and "exitcode  : 2" in done.stderr
    codes, output = finish(running)
    assert set(codes) == {0}, output
    main(*args, "--out", tmp_path / "none")
    first = [records(tmp_path / name)[0]["loss"] for name in ("none", "one", "two")]
    assert max(first) - min(first) < 1e-5, first


# What follows runs in this process.


def test_a_run_can_be_resumed_on_another_number_of_processes(photos, tmp_path):
    args = ["--data", photos, *LONG, "--precision", "fp64"]  # float32 drifts: see design.md
    start_again(0, *args, "--out", tmp_path / "whole")
    start_again(2, *args, "--out", tmp_path / "parts", "--steps", 9)
    start_again(0, *args, "--out", tmp_path / "parts")
    a, b = (losses(tmp_path / name) for name in ("whole", "parts"))
    assert len(a) == len(b) == 30
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


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
    assert len(calls) == 30
    assert_same_run(whole(0), tmp_path)


def test_a_pause_changes_nothing(photos, whole, tmp_path, capsys):
    for steps in (5, 13, 7, 0):  # 5: at an epoch's end; 7: already behind
        assert main("--data", photos, "--out", tmp_path, *LONG, "--steps", steps) == 0
    said = capsys.readouterr().out
    assert "paused at step 5 of 30" in said and "finished" in said
    assert_same_run(whole(0), tmp_path)
    before = (tmp_path / "log.jsonl").read_bytes()
    assert main("--data", photos, "--out", tmp_path, *LONG) == 0
    assert "is finished" in capsys.readouterr().out
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_the_knn_monitor_changes_no_bit_and_an_epoch_is_evaluated_once(classes, tmp_path):
    args = [*TINY, "--data", classes, "--image-size", "16", "--log-every", "1", "--epochs", "3"]
    assert main(*args, "--out", tmp_path / "without") == 0
    for steps in (6, 0):  # paused at the end of an epoch, after its evaluation
        assert main(*args, "--out", tmp_path / "with", "--knn-every", 1, "--steps", steps) == 0
    assert_same_run(tmp_path / "without", tmp_path / "with")
    assert [x["epoch"] for x in records(tmp_path / "with", "knn")] == [0, 1, 2, 3]
    assert all(0 <= x["knn"] <= 1 for x in records(tmp_path / "with", "knn"))
    assert records(tmp_path / "without", "knn") == []


def test_a_corrupt_checkpoint_is_named_and_the_one_before_taken(photos, whole, tmp_path, capsys):
    args = ["--data", photos, "--out", tmp_path, *LONG]
    main(*args, "--steps", 9)
    before = torch.load(tmp_path / "previous.pt")["step"]
    os.truncate(tmp_path / "last.pt", 3000)
    main(*args, "--steps", before + 1, "--save-every", 100)  # one save: the good one is still there
    assert torch.load(tmp_path / "previous.pt")["step"] == before
    assert (tmp_path / "corrupt.pt").stat().st_size == 3000
    assert main(*args) == 0
    said = capsys.readouterr().out
    assert "last.pt is corrupt: taking" in said and f"going on from step {before}" in said
    assert "previous.pt" in said
    assert [x["step"] for x in curve(tmp_path)] == list(range(30))
    for name in ("last.pt", "previous.pt"):
        os.truncate(tmp_path / name, 3000)
    assert main(*args) == 2  # nothing is overwritten without being asked to
    assert "--fresh starts over" in capsys.readouterr().err


def test_a_log_that_others_cut_is_not_filled_up_with_noughts(photos, tmp_path):
    args = ["--data", photos, "--out", tmp_path, *LONG]
    main(*args, "--steps", 7)
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes().splitlines(keepends=True)[0])
    assert main(*args, "--steps", 9) == 0
    assert [x["step"] for x in curve(tmp_path)] == [7, 8]


def test_a_full_disk_leaves_the_last_checkpoint_whole(photos, tmp_path, capsys, monkeypatch):
    args = ["--data", photos, "--out", tmp_path, *LONG]
    main(*args, "--steps", 7)
    good = (tmp_path / "last.pt").read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert main(*args) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert (tmp_path / "last.pt").read_bytes() == good
    assert not list(tmp_path.glob("*.tmp"))


def test_fresh_starts_over_but_not_when_torchrun_restarts_a_worker(photos, tmp_path, monkeypatch,
                                                                   capsys):
    args = ["--data", photos, "--out", tmp_path, *LONG]
    main(*args, "--steps", 6)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    main(*args, "--steps", 7, "--fresh")
    assert "going on from step 6" in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    main(*args, "--steps", 2, "--fresh")
    assert [x["step"] for x in curve(tmp_path)] == [0, 1]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
        photos, tmp_path, capsys, monkeypatch):
    args = ["--data", photos, "--out", tmp_path, *LONG]
    main(*args, "--steps", 6)
    real = simsiam.simsiam_loss
    monkeypatch.setattr(simsiam, "simsiam_loss", lambda *a, **k: real(*a, **k) * float("nan"))
    assert main(*args) == 2
    assert "stopped being finite in the steps 6 to 6" in capsys.readouterr().err
    assert torch.load(tmp_path / "last.pt")["step"] == 6
    assert all(x.isfinite().all() for x in weights(tmp_path).values())


def test_the_log_says_what_ran(classes, tmp_path):
    main(*TINY, "--data", classes, "--image-size", "16", "--out", tmp_path, "--steps", 2,
         "--log-every", 1, "--knn-every", 1)
    first, *rest = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"config", "versions", "hardware", "command", "commit"} <= first.keys()
    assert first["config"]["base_lr"] == simsiam.PRETRAIN["base_lr"][2]
    for line in rest:
        assert {"epoch", "step", "knn"} <= line.keys() or {
            "epoch", "step", "loss", "lr", "std", "rank", *TIMES} <= line.keys()
    assert sorted(os.listdir(tmp_path)) == ["encoder.json", "encoder.pt", "last.pt", "lock",
                                            "log.jsonl", "views.png"]
    picture = torchvision.io.decode_image(str(tmp_path / "views.png"))
    assert picture.shape == (3, 3 * 18 + 2, 8 * 18 + 2) and picture.float().std() > 10


def test_every_file_that_a_run_writes_loads_with_torchs_safe_default(photos, tmp_path):
    main("--data", photos, "--out", tmp_path, *LONG, "--steps", 11, "--keep-every", 1)
    for name in ("last.pt", "previous.pt", "encoder.pt"):
        assert torch.load(tmp_path / name, weights_only=True)
    assert sorted(path.name for path in tmp_path.glob("step*.pt")) == ["step10.pt", "step5.pt"]
    assert torch.load(tmp_path / "step5.pt")["step"] == 5


def test_tensorboard_is_optional_and_says_so(classes, tmp_path, monkeypatch, capsys):
    args = [*TINY, "--data", classes, "--image-size", "16", "--out", tmp_path, "--steps", 1]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(*args, "--tensorboard") == 2
    assert "pip install tensorboard" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    assert main(*args, "--tensorboard", "--fresh") == 0
    assert list(tmp_path.glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_compile_trains_the_same_and_keeps_the_names(classes, tmp_path):
    args = [*TINY, "--data", classes, "--image-size", "16", "--steps", 2, "--log-every", 1]
    main(*args, "--out", tmp_path / "plain")
    main(*args, "--out", tmp_path / "compiled", "--compile")
    a, b = (tmp_path / name for name in ("plain", "compiled"))
    assert weights(a).keys() == weights(b).keys()
    torch.testing.assert_close(records(a)[1]["loss"], records(b)[1]["loss"], rtol=0, atol=1e-3)


def test_a_run_on_an_accelerator_is_the_same_command(classes, tmp_path):
    name = "cuda" if torch.cuda.is_available() else "mps"
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        pytest.skip("neither CUDA nor MPS here")
    assert main(*TINY, "--data", classes, "--image-size", "16", "--out", tmp_path, "--steps", 3,
                "--device", name, "--knn-every", 1) == 0
    assert torch.load(tmp_path / "encoder.pt")["conv1.weight"].device.type == "cpu"
