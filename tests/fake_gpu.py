"""Runs the scripts on a CUDA device that is not there, and counts what a GPU would wait for.

    python tests/fake_gpu.py             # a line for each run: host waits and launches a step

Tensors on "cuda" are FakeTensors: shapes, dtypes and devices, no numbers. Tensors on the CPU are
real. main() of a script runs as it would on a GPU, and Watch sees every operator that it calls:
mixed devices raise, copies that block and values that the host reads are waits, the others are
launches. Needs Linux, a CUDA build of torch and a C compiler: a shim makes autograd believe in the
device. It sees operators, not kernels, memory or time.
"""

import collections
import contextlib
import ctypes
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CIFAR = "--data demo --recipe cifar --batch-size 64 --epochs 1 --steps 4 --knn-every 0 --workers 0"
PHOTOS = "--data PHOTOS --recipe imagenet --batch-size 8 --steps 4 --knn-every 0 --workers 0"
WHOLE = "--data demo --recipe cifar --batch-size 2000 --epochs 1 --workers 0"  # with evaluation
RUNS = {  # title: script and flags; "of 4 processes" stands for rank 0 of four
    "simsiam": f"simsiam.py {CIFAR}",
    "simsiam, photos": f"simsiam.py {PHOTOS}",
    "simsiam of 4 processes": f"simsiam.py {CIFAR}",
    "simsiam linear": f"simsiam.py linear --init none {CIFAR} --optimizer larc",
    "simsiam linear of 4 processes": f"simsiam.py linear --init none {CIFAR}",
    "simsiam, evaluated and saved": f"simsiam.py {WHOLE}",
}
SHIM = "FAKE_GPU_SHIM"  # environment variable: the shim's folder


def start_again_with_shim() -> None:
    """Puts a libcuda without a GPU and a c10::cuda::device_count() of ours before torch's."""
    import torch
    folder = tempfile.mkdtemp()
    library = Path(torch.__file__).parent / "lib/libcaffe2_nvrtc.so"
    wanted = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True)
    names = {line.split()[-1].split("@")[0] for line in wanted.stdout.splitlines()}
    cuda = "".join(f"int {n}(void) {{ return 0; }}\n" for n in sorted(names)
                   if n[:2] == "cu" and n[2].isupper() and n != "cuDevicePrimaryCtxGetState")
    cuda += "int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *a) { *f = *a = 0; return 0; }\n"
    count = ("int fake_cuda_devices = 0;\n"
             "signed char _ZN3c104cuda12device_countEv(void) { return fake_cuda_devices; }\n")
    for code, name in ((cuda, "libcuda.so.1"), (count, "libcount.so")):
        subprocess.run(["gcc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o",
                        f"{folder}/{name}", "-x", "c", "-"], input=code, text=True, check=True)
    env = {**os.environ, SHIM: folder, "LD_PRELOAD": f"{folder}/libcount.so",
           "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    os.execve(sys.executable, [sys.executable, *sys.argv], env)


if __name__ == "__main__" and SHIM not in os.environ:
    start_again_with_shim()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch._subclasses.fake_tensor import (  # noqa: E402
    FakeTensor, FakeTensorMode, unset_fake_temporarily)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

FREE = {  # no kernel: views, metadata, allocations
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice",
    "select", "unbind", "split", "split_with_sizes", "detach", "alias", "as_strided", "chunk",
    "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "unfold",
    "diagonal", "view_as", "reshape", "_reshape_alias", "lift", "detach_", "set_"}
READ = {  # the host must know a value or a size
    "nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "unique_dim", "equal",
    "is_nonzero", "bincount", "argwhere"}


class Fake(FakeTensorMode):
    avoid_device_init = True  # though torch.cuda.is_available() is made to say yes


class Watch(TorchDispatchMode):
    """Real on the CPU, fake on the GPU; notes launches and waits by step and phase."""

    def __init__(self, devices: ctypes.c_int):
        super().__init__()
        self.fake = Fake(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        self.devices = devices  # how many the shim says there are
        self.step, self.phase = -1, ["other"]
        self.waits, self.launches = collections.Counter(), collections.Counter()

    def wait(self, operator: str) -> None:
        frame = sys._getframe(3)
        while frame and not frame.f_code.co_filename.startswith(f"{ROOT}{os.sep}"):
            frame = frame.f_back
        place = frame and f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        self.waits[self.step, f"{operator} at {place or 'the backward pass'}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        count, self.devices.value = self.devices.value, 0  # operators ask whether it is there
        try:
            return self.dispatch(func, args, kwargs or {})
        finally:
            self.devices.value = count

    def dispatch(self, func, args, kwargs):
        name = func._schema.name.removeprefix("aten::")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        to_gpu = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if name.startswith("prim::"):  # .device of a fake tensor
            return func(*args, **kwargs)
        if name == "_pin_memory":
            return args[0]
        if not to_gpu and not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        on_gpu = any(x.device.type == "cuda" for x in tensors)
        if name == "_local_scalar_dense":
            self.wait("reads a value")
            return True if args[0].dtype == torch.bool else 1.0
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            target = args[0].device if name == "copy_" else torch.device(
                kwargs.get("device") or source.device)
            blocks = not (kwargs.get("non_blocking") or name == "copy_" and any(args[2:]))
            if source.device.type == "cuda" and target.type == "cpu":
                self.wait("copies to the host")
            elif source.device.type == "cpu" and target.type == "cuda" and blocks:
                self.wait("copies to the GPU, blocking")
        elif on_gpu and name in READ:
            self.wait(name)
            if name == "nonzero":
                return args[0].new_zeros([args[0].shape[0], args[0].ndim], dtype=torch.int64)
        elif on_gpu and name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [i for i in args[1] if i is not None]
            if any(i.dtype == torch.bool or i.device.type == "cpu" for i in indices) or (
                    name != "index" and args[2].device.type == "cpu"):
                self.wait(f"{name} with a mask, or with an index or a value on the host")
        if name.startswith("_fused_"):  # has no fake version
            self.launches[self.step, self.phase[-1]] += 1
            return None
        if name not in FREE:
            lists = [x for x in args if isinstance(x, (list, tuple)) and x
                     and isinstance(x[0], torch.Tensor)]
            # torch._foreach_* is one launch where all shapes agree, else a loop.
            loop = name.startswith("_foreach") and any(
                a.shape != b.shape for other in lists[1:] for a, b in zip(lists[0], other))
            self.launches[self.step, self.phase[-1]] += len(lists[0]) if loop else 1

        def faked(x):
            real = isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)
            return self.fake.from_tensor(x, static_shapes=True) if real else x

        args, kwargs = tree_map(faked, (args, kwargs))
        with self.fake:
            return func(*args, **kwargs)

    def named(self, phase: str, function):
        """function, whose launches count for this phase."""
        def call(*args, **kwargs):
            self.phase.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.phase.pop()
        return call

    def counted(self, batches):
        """training_batches(), whose each next() begins a step."""
        def call(*args, **kwargs):
            stream = batches(*args, **kwargs)
            advance = self.named("data", lambda: next(stream, None))
            while True:
                self.step += 1
                batch = advance()
                if batch is None:
                    self.step = -2
                    return
                yield batch
        return call


def run(module, argv: list[str], processes: int, plant, devices) -> Watch:
    """module.main(argv) on the fake device, as rank 0 of so many processes."""
    watch = Watch(devices)
    changes = []

    def change(owner, name, value):
        changes.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    backward, to = torch.Tensor.backward, torch.nn.Module.to

    def with_devices(*args, **kwargs):
        devices.value = 8  # autograd asks for each device's stream
        try:
            return backward(*args, **kwargs)
        finally:
            devices.value = 0

    def leaves_to(self, *args, **kwargs):  # a fake parameter can be moved only once
        for part in self.modules():
            tensors = [*part.parameters(), *part.buffers()]
            if not [*part.children()] and any(x.device.type == "cpu" for x in tensors):
                to(part, *args, **kwargs)
        return self

    def really(function):
        def call(*args, **kwargs):
            with _disable_current_modes():
                return function(*args, **kwargs)
        return call

    class Plain(torch.nn.Module):  # DDP asks for real numbers when it is built
        def __init__(self, model, **how):
            super().__init__()
            self.module = model

        def forward(self, *inputs):
            return self.module(*inputs)

    for name, value in (("is_available", lambda: True), ("device_count", lambda: 1),
                        ("set_device", lambda d: None), ("current_device", lambda: 0),
                        ("get_device_name", lambda *a: "fake"), ("_lazy_init", lambda: None),
                        ("get_device_capability", lambda *a: (9, 0)),
                        ("is_bf16_supported", lambda *a: True),
                        ("is_current_stream_capturing", lambda: False)):
        change(torch.cuda, name, value)
    change(torch, "load", really(torch.load))
    change(torch, "save", lambda state, file: file.write(b"fake"))
    change(torch.nn.Module, "to", leaves_to)
    change(torch.Tensor, "backward", watch.named("backward", with_devices))
    change(torch.optim.Optimizer, "zero_grad",
           watch.named("optimizer", torch.optim.Optimizer.zero_grad))
    for kind in (torch.optim.SGD, torch.optim.AdamW, module.LARS):
        change(kind, "step", watch.named("optimizer", kind.step))
    change(module, "save_views", lambda *a: None)
    change(module, "augment", watch.named("augment", module.augment))
    change(module, "train_step", watch.named("forward, loss", plant(module.train_step)))
    change(module, "training_batches", watch.counted(module.training_batches))
    if processes > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore
        init = dist.init_process_group
        change(dist, "init_process_group", lambda *a: init("fake", store=FakeStore(), rank=0,
                                                           world_size=processes))
        change(torch.nn.parallel, "DistributedDataParallel", Plain)
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(processes),
                          MASTER_ADDR="localhost", MASTER_PORT="1")
    try:
        with watch.fake, watch:
            module.main(argv)
    finally:
        for owner, name, value in reversed(changes):
            setattr(owner, name, value)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    return watch


def planted(step):
    """A training step with a mistake: the host reads the loss."""
    def call(*args):
        loss, *rest = step(*args)
        loss.item()
        return loss, *rest
    return call


def main(plant: bool) -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from conftest import write_images
    folder = Path(tempfile.mkdtemp())
    for part in ("train", "val"):
        for name in "ab":
            write_images(folder / "photos" / part / name, 20)
    devices = ctypes.c_int.in_dll(ctypes.CDLL(os.environ[SHIM] + "/libcount.so"),
                                  "fake_cuda_devices")
    with Fake():  # autograd makes its threads, one a device, at the first backward pass of all
        x = torch.ones(1, device="cuda", requires_grad=True)
        devices.value = 8
        x.sum().backward()
        devices.value = 0
    for number, (title, command) in enumerate(RUNS.items()):
        script, *flags = command.replace("PHOTOS", str(folder / "photos")).split()
        module = importlib.import_module(script.removesuffix(".py"))
        argv = [*flags, "--device", "cuda", "--out", str(folder / str(number))]
        with contextlib.redirect_stdout(io.StringIO()):
            watch = run(module, argv, 4 if "4 processes" in title else 1,
                        planted if plant else lambda step: step, devices)
        second = 1  # the first step logs
        print(json.dumps({
            "run": title, "waits": {place: n for (step, place), n in watch.waits.items()
                                    if step == second},
            "launches": sum(n for (step, _), n in watch.launches.items() if step == second),
            "by phase": {phase: n for (step, phase), n in watch.launches.items()
                         if step == second}}), flush=True)
        if plant:
            return


if __name__ == "__main__":
    main("--plant" in sys.argv)
