"""What goes wrong on real machines at random moments: kills, and ranks that die under torchrun.

The rest of the matrix: test_run.py (full disk, corrupt checkpoint, a loss that is not finite, two runs in
one folder) and test_bad_input.py (a malicious pickle).
"""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch.distributed as dist
from conftest import ROOT, TINY, assert_same_weights, finish, records, run, send, start

import simsiam

LONG = [*TINY, "--image-size", "16", "--batch-size", "8", "--epochs", "5", "--log-every", "1"]
# 48 images: 6 steps an epoch, 30 in all, and a checkpoint at each epoch's end.


def assert_same_run(a, b):
    assert [(x["step"], x["loss"]) for x in records(a)] == [(x["step"], x["loss"]) for x in records(b)]
    assert_same_weights(a, b)


def last_step(out) -> int:
    """The last step in the log, which may be in the midst of a line; -1 where there is none."""
    log = out / "log.jsonl"
    return int(([-1] + re.findall(r'"step": (\d+),', log.read_text() if log.exists() else ""))[-1])


def wait_until(true, *running, seconds: float = 300) -> None:
    end = time.time() + seconds
    while not true():
        assert all(process.poll() is None for process in running), "one ended before it could be killed"
        assert time.time() < end, "it takes minutes"
        time.sleep(0.002)


# ---------------------------------------------------------------------------- ranks under torchrun


@pytest.fixture(scope="module")
def whole(classes, tmp_path_factory):
    """The undisturbed run of two processes."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run("simsiam.py", "--data", classes, *LONG, "--out", out, processes=2)
    return out


@pytest.fixture
def store_port():
    """Of a store as torchrun's agent has it, in a process of its own: one of ours would be destroyed in
    forked children, too, which then wait for its thread."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(writing, b"%5d" % store.port)
            signal.pause()
        finally:
            os._exit(1)
    yield int(os.read(reading, 5))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("dead, fresh", [(1, []), (0, ["--fresh"])], ids=["again", "fresh"])
def test_ranks_that_torchrun_starts_again_meet_each_other_and_not_the_dead(
        dead, fresh, classes, whole, store_port, tmp_path):
    """torchrun's store outlives the ranks and holds the addresses of the dead. TORCHELASTIC_RESTART_COUNT
    stays 0 on a host whose ranks are started again because another host's died."""
    def rank(r):
        return start("simsiam.py", "--data", classes, *LONG, *fresh, "--out", tmp_path, fork=True,
                     RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                     MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store_port),
                     TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")[0]

    running = [rank(0), rank(1)]
    wait_until(lambda: last_step(tmp_path) >= 8, *running)
    send([running[dead]], signal.SIGKILL)
    send([running[1 - dead]], signal.SIGTERM)  # as torchrun does: it must not wait for the dead
    codes, output = finish(running)
    assert codes[dead] == -signal.SIGKILL, output
    again = [rank(1 - dead)]
    time.sleep(1)  # it has looked around before the other is there
    again.append(rank(dead))
    codes, output = finish(again)
    assert codes == [0, 0], output
    assert len(records(tmp_path, "resumed")) == 1
    assert_same_run(whole, tmp_path)


def ranks_of(torchrun: int) -> dict[int, int]:
    """Rank -> process id of the children of this process."""
    with open(f"/proc/{torchrun}/task/{torchrun}/children") as file:
        children, found = file.read().split(), {}
    for child in children:
        with open(f"/proc/{child}/environ") as file:
            if rank := re.search(r"(?:^|\0)RANK=(\d+)", file.read()):
                found[int(rank[1])] = int(child)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="looks for the ranks in /proc")
@pytest.mark.parametrize("dead, fresh", [(1, []), (0, ["--fresh"])], ids=["again", "fresh"])
def test_a_run_whose_rank_dies_under_torchrun_completes_by_itself(dead, fresh, classes, whole, tmp_path):
    args = [*map(str, ["--data", classes, *LONG, "--out", tmp_path])]
    if fresh:  # an older run lies there, which has to go: it went another way by a rounding
        assert simsiam.main([*args, "--steps", "7"]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--max-restarts=3", str(ROOT / "simsiam.py"), *args, *fresh]
    with open(tmp_path / "output", "w+") as output:
        torchrun = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT,
                                    env={**os.environ, "OMP_NUM_THREADS": "1"})
        wait_until(lambda: last_step(tmp_path) >= 8, torchrun)
        os.kill(ranks_of(torchrun.pid)[dead], signal.SIGKILL)
        code = torchrun.wait(timeout=600)
        said = output.seek(0) or output.read()
    assert code == 0 and "connectFullMesh failed" not in said, said  # and one restart was enough
    assert len(records(tmp_path, "resumed")) == 1
    assert_same_run(whole, tmp_path)


# ------------------------------------------------------------------------- kills at random moments

COMMON = ["--recipe", "demo", "--dim", "16", "--batch-size", "8", "--knn-every", "0", "--workers", "0",
          "--precision", "fp32", "--image-size", "16", "--log-every", "1", "--save-every", "0.001"]
RESNET = [*COMMON, "--width", "0.125"]
KILLS = {  # script: how often, and the rest of its command
    "simsiam.py": (10, [*RESNET, "--predictor-dim", "8", "--epochs", "50"]),
    "moco_v3.py": (2, [*COMMON, "--hidden-dim", "32", "--epochs", "20"]),
    "byol.py": (2, [*RESNET, "--hidden-dim", "32", "--epochs", "20"]),
    "dcl.py": (2, [*RESNET, "--hidden-dim", "32", "--queue", "32", "--epochs", "20"]),
    "simclr_v2.py": (2, [*RESNET, "--queue", "32", "--epochs", "20"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", KILLS)
def test_killed_at_random_moments_and_started_again_ends_with_the_same_bits(script, classes, tmp_path):
    kills, args = KILLS[script]
    out = tmp_path / "killed"

    def begin(out):
        return start(script, "--data", classes, *args, "--out", out, fork=True)[0]

    began = time.time()
    codes, output = finish([begin(tmp_path / "whole")], timeout=600)
    assert codes == [0], output
    last = records(tmp_path / "whole")[-1]
    total, a_step = last["step"] + 1, last["seconds"] / (last["step"] + 1)
    start_up = time.time() - began - last["seconds"]
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
    assert codes == [0] and "going on from step" in output, output
    assert len(records(out)) == total
    assert_same_run(tmp_path / "whole", out)
