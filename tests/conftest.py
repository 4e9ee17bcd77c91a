"""Puts the scripts on the path, and offers what several test files need."""

import datetime
import functools
import importlib
import json
import os
import shutil
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
import torch.distributed as dist

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


CAN_FAKE_A_GPU = bool(
    sys.platform == "linux" and torch.version.cuda and shutil.which("cc") and shutil.which("nm")
    and Path(torch.__file__).with_name("lib").joinpath("libcaffe2_nvrtc.so").exists()
    and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14))


@pytest.fixture(scope="session", autouse=True)
def fake_gpu(request):
    """tests/fake_gpu.py takes a minute. So it starts before all tests, and runs beside them."""
    if not (CAN_FAKE_A_GPU and any("runs" in item.fixturenames and item.path.name == "test_gpu.py"
                                   for item in request.session.items)):
        yield None
        return
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, str(ROOT / "tests/fake_gpu.py")], env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.fixture(autouse=True)
def as_it_was():
    """main() takes over signals; a test that ran it within this process gives them back."""
    names = ("SIGTERM", "SIGINT", "SIGCHLD")  # the last one is not on Windows
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = [(number, signal.getsignal(number)) for number in numbers]
    yield
    for number, handler in before:
        signal.signal(number, handler)
    for name in ("simsiam", "dcl", "byol", "moco_v3", "simclr_v2"):
        getattr(sys.modules.get(name), "STOP", []).clear()


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
            seed = 10 * k + len(split)
            write_images(root / split / name, n, seed=seed, size=(16, 16), kind="png")
    return root


class Forked:
    """A child of this process, which has loaded torch already (a new one would take seconds), with
    as much of subprocess.Popen as is needed here."""

    def __init__(self, work, env: dict[str, str]):
        """work(): what the child does; it gives the exit code."""
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
                code = work()
            except SystemExit as end:  # a sentence, or a number
                print(*[end.code] * isinstance(end.code, str), sep="")
                code = 1 if isinstance(end.code, str) else end.code or 0
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


def start(script: str, *args, processes: int = 0, fork: bool = False, **env) -> list:
    """Starts a script: plain (processes=0), as a reader does or, sooner, in a child of this
    process; or as so many ranks, with what torchrun would tell them."""
    env = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **env}
    args = [*map(str, args)]
    if not processes and not fork:
        return [subprocess.Popen([sys.executable, str(ROOT / script), *args],
                                 env={**os.environ, **env}, stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, text=True)]

    def work():
        sys.argv = [str(ROOT / script), *args]
        return importlib.import_module(script.removesuffix(".py")).main(args)

    if not processes:
        return [Forked(work, env)]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    return [Forked(work, {**env, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(processes),
                          "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                          "MASTER_PORT": port}) for r in range(processes)]


def finish(running: list, timeout: float = 180) -> tuple[list[int], str]:
    """Waits for all; their exit codes and all that they printed."""
    outputs = [process.communicate(timeout=timeout)[0] for process in running]
    return [process.returncode for process in running], "".join(outputs)


def run(script: str, *args, processes: int = 0, **env) -> str:
    codes, output = finish(start(script, *args, processes=processes, **env))
    assert set(codes) == {0}, output
    return output


def on_ranks(compute, folder: Path, worlds=(4, 2, 1)) -> list[dict]:
    """compute(rank, world) of real gloo processes, which start once and are one of 4, of 2, and
    alone in turn: for each process what it gave, by world."""
    def work(rank):
        results = {}
        for world in worlds:
            if rank < world:
                store = dist.FileStore(f"{folder}/store{world}", world)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=world,
                                        timeout=datetime.timedelta(seconds=60))
                results[world] = compute(rank, world)
                dist.barrier()
                time.sleep(0.5)  # else torch 2.6's Gloo may deadlock: see main() in simsiam.py
                dist.destroy_process_group()
        torch.save(results, folder / f"rank{rank}.pt")
        return 0

    codes, output = finish([Forked(functools.partial(work, rank), {})
                            for rank in range(max(worlds))])
    assert set(codes) == {0}, output
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(max(worlds))]


def wait_for_step(log: Path, step: int, running: list) -> None:
    """Until log.jsonl has a training line of this step or a later one."""
    end = time.time() + 60
    while time.time() < end:
        if log.exists() and any(f'"step": {s},' in log.read_text() for s in range(step, step + 9)):
            return
        assert all(process.poll() is None for process in running), finish(running)[1]
        time.sleep(0.005)  # short runs are over soon
    raise AssertionError(f"{log} never reached step {step}")


def kill_at_step(step: int, script: str, *args, out: Path, **how) -> int:
    """A run, killed at this step of its log or soon after: the step that it will go on from."""
    running = start(script, *args, "--out", out, **how)
    wait_for_step(out / "log.jsonl", step, running)
    send(running, signal.SIGKILL)
    finish(running)
    return torch.load(out / "last.pt")["step"]


def program(method):
    """A script's main() as a function of words and numbers."""
    return lambda *args: method.main([*map(str, args)])


def mistake(method, *args) -> str:
    """The one sentence that a script ends with, by SystemExit, and not with exit code 0."""
    with pytest.raises(SystemExit) as end:
        method.main([*map(str, args)])
    assert isinstance(end.value.code, str) and "\n" not in end.value.code, end.value.code
    return end.value.code


def records(out: Path, kind: str = "loss") -> list[dict]:
    """The lines of a run's log that hold this key."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in line]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in records(out)]


def weights(out: Path, name: str = "last.pt") -> dict:
    return torch.load(out / name)["model"]


def assert_same_run(a: Path, b: Path) -> None:
    """To the bit: what was logged, but for times, every step once, and weights and buffers."""
    one, two = ([{k: v for k, v in line.items() if k not in ("images_per_s", "minutes_left")}
                 for line in records(out)] for out in (a, b))
    assert one == two and len(one) > 1
    for (name, x), y in zip(weights(a).items(), weights(b).values(), strict=True):
        assert torch.equal(x, y), name


def assert_close_runs(a: Path, b: Path, steps: int, *names: str) -> None:
    """What two runs in float64 log, the loss and these, and their weights, up to rounding."""
    for name in ("loss", *names):
        one, two = ([line[name] for line in records(out)] for out in (a, b))
        assert len(one) == steps and one == pytest.approx(two, rel=0, abs=1e-10), name
    torch.testing.assert_close(weights(a), weights(b), rtol=1e-12, atol=1e-10)


def send(running: list, number: signal.Signals) -> None:
    for process in running:
        process.send_signal(number)
