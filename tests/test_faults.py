"""Slow: kills at random moments, and a rank that dies under torchrun."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, assert_same_run, finish, records, run, send, start
from test_each_script import COMMON, FLAGS

LONG = [*TINY, "--image-size", "16", "--batch-size", "8", "--epochs", "5", "--log-every", "1"]
# 48 images: 6 steps an epoch, 30 in all.


def last_step(out) -> int:
    """The last step in the log, which may be in the midst of a line; -1 where there is none."""
    log = out / "log.jsonl"
    return int(([-1] + re.findall(r'"step": (\d+),', log.read_text() if log.exists() else ""))[-1])


def wait_until(true, *running, seconds: float = 300) -> None:
    end = time.time() + seconds
    while not true():
        assert all(process.poll() is None for process in running), "it ended before the kill"
        assert time.time() < end, "it takes minutes"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(classes, tmp_path_factory):
    """The undisturbed run of two processes."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run("simsiam.py", "--data", classes, *LONG, "--out", out, processes=2)
    return out


def process_of(rank: int, torchrun: int) -> int:
    """Its id, among the children of torchrun."""
    for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="looks for the ranks in /proc")
@pytest.mark.parametrize("dead", [0, 1])
def test_a_run_whose_rank_dies_under_torchrun_completes_by_itself(dead, classes, whole, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--max-restarts=3", str(ROOT / "simsiam.py"),
               *map(str, ["--data", classes, *LONG, "--save-every", 0.001, "--out", tmp_path])]
    with open(tmp_path / "output", "w+") as output:
        # torchrun's store outlives the ranks and holds the addresses of the dead (pytorch #135712).
        torchrun = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={
            **os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
        wait_until(lambda: last_step(tmp_path) >= 8, torchrun)
        os.kill(process_of(dead, torchrun.pid), signal.SIGKILL)
        code = torchrun.wait(timeout=600)
        said = output.seek(0) or output.read()
    assert code == 0 and "continuing from step" in said, said
    assert_same_run(whole, tmp_path)


KILLS = {script: (10, 50) if script == "simsiam.py" else (2, 20) for script in FLAGS}  # epochs


@pytest.mark.slow
@pytest.mark.parametrize("script", KILLS)
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(script, classes, tmp_path):
    kills, epochs = KILLS[script]
    args = [*COMMON.split(), *FLAGS[script].split(), "--epochs", epochs, "--save-every", 0.001]
    out = tmp_path / "killed"

    def begin(out):
        return start(script, "--data", classes, *args, "--out", out, fork=True)[0]

    began = time.time()
    codes, output = finish([begin(tmp_path / "whole")], timeout=600)
    assert codes == [0], output
    total = len(records(tmp_path / "whole"))
    training = sum(16 / line["images_per_s"] for line in records(tmp_path / "whole"))
    start_up, a_step = max(0.3, time.time() - began - training), training / total
    draw = random.Random(script).uniform
    moments = sorted(draw(0.05, 0.85) * total for _ in range(kills))
    for i, step in enumerate(moments):
        process = begin(out)
        if i % 3 == 2:  # while it starts: the checkpoint is being read, the log cut
            time.sleep(draw(0, start_up))
        else:
            wait_until(lambda: last_step(out) >= step, process)
            time.sleep(draw(0, 2 * a_step))  # within a step, or as it saves
        send([process], signal.SIGKILL)
        codes, output = finish([process])
        assert codes == [-signal.SIGKILL], f"kill {i} came too late: {output}"
    codes, output = finish([begin(out)], timeout=600)
    assert codes == [0] and "continuing from" in output, output
    assert len(records(out)) == total
    assert_same_run(tmp_path / "whole", out)
