"""What goes wrong on real machines, at random moments: kills, and a rank that dies under torchrun.

Slow: python -m pytest tests/test_faults.py --slow. (Full disk, corrupt checkpoint, a loss that is not
finite, two runs in one folder: test_run.py; a malicious pickle: test_bad_input.py.)
"""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, finish, records, run, send, start, weights

pytestmark = pytest.mark.slow
COMMON = ["--recipe", "demo", "--width", "0.125", "--dim", "16", "--knn-every", "0", "--workers", "0",
          "--precision", "fp32", "--log-every", "1", "--save-every", "0.001", "--batch-size", "16",
          "--image-size", "16"]
KILLS = {  # script: how often, and what makes the run small and about ten seconds long
    "simsiam.py": (10, [*COMMON, "--epochs", "120", "--predictor-dim", "8"]),
    "moco_v3.py": (2, [*COMMON[4:], "--recipe", "demo", "--epochs", "60", "--hidden-dim", "32"]),
    "byol.py": (2, [*COMMON, "--epochs", "60", "--hidden-dim", "32"]),
    "dcl.py": (2, [*COMMON, "--epochs", "80", "--hidden-dim", "32", "--queue", "32"]),
    "simclr_v2.py": (2, [*COMMON, "--epochs", "80", "--queue", "64"]),
}


def assert_same_run(a, b):
    assert [line["loss"] for line in records(a)] == [line["loss"] for line in records(b)]
    for (name, x), y in zip(weights(a).items(), weights(b).values(), strict=True):
        assert torch.equal(x, y), name


def finished(out) -> bool:
    return (out / "last.pt").exists() and torch.load(out / "last.pt")["finished"]


@pytest.mark.parametrize("script", KILLS)
def test_killed_at_random_moments_and_started_again_ends_with_the_same_bits(script, classes, tmp_path):
    kills, args = KILLS[script]
    args = ["--data", classes, *args]
    began = time.time()
    run(script, *args, "--out", tmp_path / "whole")
    lasted = time.time() - began
    moments = random.Random(0)
    for _ in range(kills):
        running = start(script, *args, "--out", tmp_path / "killed")
        time.sleep(moments.uniform(0.05, 1.2) * lasted / kills + 2)  # seconds to import torch in
        assert not finished(tmp_path / "killed"), "the run is too short for so many kills"
        send(running, signal.SIGKILL)
        finish(running)
    run(script, *args, "--out", tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="looks for the ranks in /proc")
@pytest.mark.parametrize("fresh", [[], ["--fresh"]], ids=["again", "fresh"])
def test_a_rank_that_dies_under_torchrun_is_restarted_and_the_run_ends_by_itself(fresh, classes, tmp_path):
    args = ["--data", classes, *COMMON, "--epochs", 60, "--predictor-dim", 8, "--save-every", 0.005]
    run("simsiam.py", *args, "--out", tmp_path / "whole", processes=2)
    out = tmp_path / "died"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--max-restarts=3", ROOT / "simsiam.py", *args, *fresh, "--out", out]
    torchrun = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (out / "previous.pt").exists():
        assert torchrun.poll() is None, torchrun.communicate()[0]
        time.sleep(0.1)
    before = len(records(out))
    os.kill(children(torchrun.pid)[-1], signal.SIGKILL)
    output = torchrun.communicate(timeout=300)[0]
    assert torchrun.returncode == 0, output
    assert before < 180 and "going on from step" in output
    assert_same_run(tmp_path / "whole", out)
