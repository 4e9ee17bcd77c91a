"""Puts the scripts on the path, and offers what several test files need."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # as in the processes that start() makes, so that results agree to the bit

# A network of a few thousand parameters that trains in milliseconds a step; in float32, so that
# results do not depend on what the processor has.
TINY = ["--recipe", "demo", "--width", "0.125", "--dim", "16", "--predictor-dim", "8",
        "--batch-size", "16", "--knn-every", "0", "--workers", "0", "--precision", "fp32"]


def write_images(folder: Path, n: int, seed: int = 0, size=None, kind: str = "jpg") -> None:
    """n pictures with some structure; without a size each has its own."""
    from torchvision.io import write_jpeg, write_png
    folder.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(seed)
    for i in range(n):
        h, w = size or (130 + int(torch.randint(40, (), generator=g)), 140 + i % 7)
        coarse = torch.rand(1, 3, 5, 5, generator=g)
        x = torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear")[0]
        write = write_jpeg if kind == "jpg" else write_png
        write((x * 255).to(torch.uint8), str(folder / f"{seed:02}_{i:03}.{kind}"))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_configure(config):
    # torchvision 0.29 announces that its decoders will move to another package some day.
    config.addinivalue_line("filterwarnings", "ignore:The image decoding:DeprecationWarning")
    config.addinivalue_line("markers", "slow: takes minutes, or a compiler; runs with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: pytest tests --slow"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """40 images of many sizes, nested, without labels: they go through the loader's processes."""
    root = tmp_path_factory.mktemp("photos")
    write_images(root / "a", 20, seed=1)
    write_images(root / "b" / "c", 20, seed=2)
    return root


@pytest.fixture(scope="session")
def classes(tmp_path_factory) -> Path:
    """train/ and val/ with three classes of 16 px images: they live in memory."""
    root = tmp_path_factory.mktemp("classes")
    for split, n in (("train", 16), ("val", 4)):
        for k, name in enumerate(("ant", "bee", "cat")):
            write_images(root / split / name, n, seed=10 * k + len(split), size=(16, 16), kind="png")
    return root


class Forked:
    """A child of this very process, which has torch loaded already, in place of a new one that would
    take seconds to load it; with as much of subprocess.Popen as is needed here."""

    def __init__(self, script: str, args: list[str], env: dict[str, str]):
        self.output, self.returncode = tempfile.TemporaryFile("w+"), None
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.dup2(self.output.fileno(), 1)
                os.dup2(self.output.fileno(), 2)
                sys.stdout = open(1, "w", buffering=1, closefd=False)
                sys.stderr = open(2, "w", buffering=1, closefd=False)
                os.environ.update(env)
                sys.argv = [str(ROOT / script), *args]
                code = importlib.import_module(script.removesuffix(".py")).main(args)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, None]:
        end = time.time() + timeout
        while self.poll() is None:
            if time.time() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"process {self.pid}: more than {timeout} seconds")
            time.sleep(0.02)
        self.output.seek(0)
        return self.output.read(), None


def start(script: str, *args, processes: int = 0, **env) -> list:
    """Starts a script: plain (processes=0), as a reader does, or as so many ranks, with what
    torchrun would tell them."""
    env = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **env}
    args = [*map(str, args)]
    if not processes:
        return [subprocess.Popen([sys.executable, str(ROOT / script), *args],
                                 env={**os.environ, **env}, stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, text=True)]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    return [Forked(script, args, {**env, "RANK": str(r), "LOCAL_RANK": str(r),
                                  "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
            for r in range(processes)]


def finish(running: list, timeout: float = 180) -> tuple[list[int], str]:
    """Waits for all; their exit codes and all that they printed."""
    outputs = [process.communicate(timeout=timeout)[0] for process in running]
    return [process.returncode for process in running], "".join(outputs)


def run(script: str, *args, processes: int = 0, **env) -> str:
    codes, output = finish(start(script, *args, processes=processes, **env))
    assert set(codes) == {0}, output
    return output


def wait_for_step(log: Path, step: int, running: list) -> None:
    """Until log.jsonl has a training line of this step or a later one."""
    for _ in range(1200):
        if log.exists() and any(f'"step": {s},' in log.read_text() for s in range(step, step + 9)):
            return
        assert all(process.poll() is None for process in running), finish(running)[1]
        time.sleep(0.05)
    raise AssertionError(f"{log} never reached step {step}")


def records(out: Path, kind: str = "loss") -> list[dict]:
    """The lines of a run's log that hold this key."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in line]


def weights(out: Path, name: str = "last.pt") -> dict:
    return torch.load(out / name)["model"]


def saved_step(out: Path) -> int:
    """The step that a killed run will go on from; it may have died between two renames."""
    last = out / "last.pt"
    return torch.load(last if last.exists() else out / "previous.pt")["step"]


def send(running: list, number: signal.Signals) -> None:
    for process in running:
        process.send_signal(number)
