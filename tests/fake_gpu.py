"""Runs the scripts on a CUDA device that does not exist, and tells what the host does for it.

    python tests/fake_gpu.py             # a line for each run: waits and launches of a steady step
    python tests/fake_gpu.py simsiam     # of the runs with these titles

Tensors on "cuda" are FakeTensors: shapes, dtypes and devices, no numbers. Tensors on the CPU are
real. So main() of a script runs as it would on a GPU, and Watch sees every operator that it calls.
Mixed devices and results whose size depends on values raise an error; values that the host reads
and copies that block are waits. A launch is an operator, which may be several kernels.

Needs Linux, a CUDA build of torch 2.14 or newer, a C compiler and nm, but no GPU.
"""

import collections
import contextlib
import ctypes
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
# The batch is large enough to show copies of more than 64 KB, see why_wait().
CIFAR = "--data demo --recipe cifar --batch-size 512 --epochs 1"
SHORT = f"{CIFAR} --steps 3 --knn-every 0"
LINEAR = f"linear --init none {SHORT}"
FINETUNE = f"finetune --init none {SHORT} --labels 0.5"
NO_WARMUP = "--warmup-epochs 0"
PHOTOS = "--data PHOTOS --recipe imagenet --batch-size 8 --epochs 1 --workers 0"  # PHOTOS: a folder
RUNS = {  # title: script, flags. "of N processes": as rank 0 of N, whose collectives do nothing
    "simsiam": ("simsiam", CIFAR),  # a whole epoch, with kNN before and after it
    "simsiam photos": ("simsiam", PHOTOS),
    "simsiam of 4 processes": ("simsiam", SHORT),
    "simsiam linear": ("simsiam", LINEAR),
    "simsiam linear larc": ("simsiam", f"{LINEAR} --optimizer larc"),
    "simsiam planted": ("simsiam", SHORT),  # with waits, to see that they are told
    "byol": ("byol", f"{SHORT} {NO_WARMUP} --beta 1"),
    "byol linear": ("byol", LINEAR),
    "byol finetune": ("byol", FINETUNE),
    "moco_v3": ("moco_v3", f"{SHORT} {NO_WARMUP}"),  # ViT-tiny
    "moco_v3 learned, clipped":
        ("moco_v3", f"{SHORT} {NO_WARMUP} --patch-projection learned --clip-patch-grad 1"),
    "moco_v3 ResNet": ("moco_v3", f"{SHORT} {NO_WARMUP} --recipe cifar-resnet"),
    "moco_v3 linear": ("moco_v3", LINEAR),
    "simclr_v2": ("simclr_v2", f"{SHORT} {NO_WARMUP}"),
    "simclr_v2 queue": ("simclr_v2", f"{SHORT} {NO_WARMUP} --queue 2048"),
    "simclr_v2 linear": ("simclr_v2", LINEAR),
    "simclr_v2 finetune": ("simclr_v2", FINETUNE),
    "simclr_v2 distill": (
        "simclr_v2", f"distill --teacher TEACHER {SHORT} {NO_WARMUP} --alpha 0.5 --labels 0.5"),
    "dcl": ("dcl", SHORT),
    "dcl queue": ("dcl", f"{SHORT} --queue 512 --loss infonce"),
}
STEADY = 1  # the step, counted from 0, that is told; the first and the last one log
SHIM = "FAKE_GPU_SHIM"  # environment variable: the shim's folder


def run_again_with_shim() -> int:
    """With a libcuda that does nothing and a c10::cuda::device_count() that tells what we like."""
    import torch
    nvrtc = Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"  # links against libcuda
    wanted = subprocess.check_output(["nm", "-D", "--undefined-only", nvrtc], text=True)
    names = {*re.findall(r"\bcu[A-Z]\w+", wanted)} - {"cuDevicePrimaryCtxGetState"}
    cuda = "int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *a) { return *f = *a = 0; }\n"
    cuda += "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names))
    count = ("int fake_cuda_devices = 0;\n"
             "signed char _ZN3c104cuda12device_countEv(void) { return fake_cuda_devices; }\n")
    with tempfile.TemporaryDirectory() as folder:
        for code, name in ((cuda, "libcuda.so.1"), (count, "libcount.so")):
            subprocess.run(["cc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o",
                            f"{folder}/{name}", "-x", "c", "-"], input=code, text=True, check=True)
        env = {SHIM: folder, "LD_PRELOAD": f"{folder}/libcount.so",
               "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
        return subprocess.run([sys.executable, *sys.argv], env=os.environ | env).returncode


if __name__ == "__main__" and SHIM not in os.environ:
    sys.exit(run_again_with_shim())

import torch  # noqa: E402
from torch._subclasses.fake_tensor import (  # noqa: E402
    FakeTensor, FakeTensorMode, unset_fake_temporarily)
from torch.optim.optimizer import (  # noqa: E402
    register_optimizer_step_post_hook, register_optimizer_step_pre_hook)
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

COUNT = ctypes.c_int.in_dll(ctypes.CDLL(f"{os.environ[SHIM]}/libcount.so"), "fake_cuda_devices")


@contextlib.contextmanager
def device_count(n: int):
    """Lets c10::cuda::device_count() tell n."""
    before, COUNT.value = COUNT.value, n
    try:
        yield
    finally:
        COUNT.value = before


class Fake(FakeTensorMode):
    avoid_device_init = True  # though torch.cuda.is_available() is made to say yes


class Watch(TorchDispatchMode):
    """Real on the CPU, fake on the GPU; counts the waits and launches of the steady step."""

    def __init__(self):
        super().__init__()
        self.fake = Fake(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        self.step, self.phases, self.pinned = -1, ["forward, loss"], {}
        self.waits, self.launches = collections.Counter(), collections.Counter()

    @device_count(0)  # operators would look for a real one
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        target = torch.device(kwargs.get("device") or "cpu")
        on_gpu = any(device.type == "cuda" for device in (target, *(x.device for x in tensors)))
        if not on_gpu and not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():
                if name != "_pin_memory":
                    return func(*args, **kwargs)
                x = args[0].clone()
                return self.pinned.setdefault(x.data_ptr(), x)  # kept, so no other has its place
        if on_gpu and self.step == STEADY:
            if reason := why_wait(name, args, kwargs, self.pinned):
                self.waits[f"{place()} {reason}"] += 1
            phase = "collectives" if name.startswith("c10d::") else self.phases[-1]
            self.launches[phase] += launches(name, func, args)
        if name == "_local_scalar_dense":
            return True if args[0].dtype == torch.bool else 1.0
        if name.startswith("_fused_"):  # an optimizer's, without fake version and without result
            return None

        def to_fake(x):
            real = isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)
            return self.fake.from_tensor(x, static_shapes=True) if real else x
        with self.fake:
            return func(*tree_map(to_fake, args), **tree_map(to_fake, kwargs))

    @contextlib.contextmanager
    def during(self, phase: str):
        """Lets launches count for this phase."""
        self.phases.append(phase)
        try:
            yield
        finally:
            self.phases.pop()

    def counted(self, batches):
        """training_batches(). A step is what is done with a batch, and getting the next one."""
        def call(*args, **kwargs):
            stream = batches(*args, **kwargs)
            advance = self.during("data")(lambda: next(stream, None))
            for self.step, batch in enumerate(iter(advance, None)):
                yield batch
        return call


def why_wait(name: str, args, kwargs, pinned: dict) -> str:
    """Why the host waits for the GPU in this operator; "" if it does not."""
    if name == "_local_scalar_dense":
        return "reads a value"
    if name in ("_to_copy", "copy_"):
        to, x = args[:2] if name == "copy_" else (args[0], args[0])
        target = torch.device(kwargs.get("device") or to.device).type
        if (x.device.type, target) == ("cuda", "cpu"):
            return "copies to the host"
        if (x.device.type, target) == ("cpu", "cuda"):
            if not (kwargs.get("non_blocking") or any(args[2:])):
                return "copies to the GPU, blocking"
            # CUDA Programming Guide, "Concurrent Execution between Host and Device": from memory
            # that is not pinned only copies of at most 64 KB do not block.
            if x.nbytes > 2**16 and (isinstance(x, FakeTensor) or x.data_ptr() not in pinned):
                return f"copies {x.nbytes} bytes that are not pinned"
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        if any(x is not None and x.device.type == "cpu" for x in (*args[1], *args[2:3])):
            return f"{name} with an index or a value on the host"
    return ""


def place() -> str:
    """The innermost two lines of the scripts that are being executed."""
    lines = [f"{Path(x.filename).name}:{x.lineno}" for x in traceback.extract_stack()
             if Path(x.filename).parent == ROOT]
    return " > ".join(lines[-2:]) or "the backward pass"


def launches(name: str, func, args) -> int:
    if name.startswith("_foreach_"):  # one launch if all lists have the same shapes; or a loop
        first, *others = (x for x in args if isinstance(x, (list, tuple))
                          and isinstance(x[0], torch.Tensor))
        if any(x.shape != y.shape for other in others for x, y in zip(first, other)):
            return len(first)
    return not (func.is_view or "empty" in name or name in ("_unsafe_view", "prim::device"))


def planted(step):
    """train_step() with a read, a blocking copy, a large copy, and an index on the host."""
    def call(*args):
        loss, *rest = step(*args)
        loss.item()
        torch.zeros(1).to(loss.device)
        torch.zeros(2**15).to(loss.device, non_blocking=True)
        loss[None][torch.tensor([0])]
        return loss, *rest
    return call


def run(title: str, module, argv: list[str]) -> dict:
    """module.main(argv) on the fake device -> what its steady step did."""
    watch, move, read = Watch(), torch.nn.Module._apply, torch.load
    backward = device_count(8)(torch.Tensor.backward)  # autograd asks for each device's stream

    def move_once(module, *how):  # a parameter that is fake already cannot be swapped
        own = (*module._parameters.values(), *module._buffers.values())
        return module if any(isinstance(x, FakeTensor) for x in own) else move(module, *how)

    def load(*args, **kwargs):  # on the CPU, with numbers
        with torch.utils._python_dispatch._disable_current_modes():
            return read(*args, **kwargs)

    def attention(*qkv):  # as on a GPU; without one torch would choose the formula: eight launches
        return torch.ops.aten._scaled_dot_product_flash_attention(*qkv)[0]

    with contextlib.ExitStack() as stack:
        def change(owner, **values):
            stack.enter_context(mock.patch.multiple(owner, **values))
        change(torch.cuda, is_available=lambda: True, device_count=lambda: 1,
               set_device=lambda d: None, current_device=lambda: 0, _lazy_init=lambda: None,
               get_device_name=lambda *a: "fake", get_device_capability=lambda *a: (9, 0),
               is_bf16_supported=lambda *a: True, is_current_stream_capturing=lambda: False)
        change(torch, save=lambda state, file: file.write(b"fake"), load=load)
        change(torch.nn.functional, scaled_dot_product_attention=attention)
        change(torch.nn.Module, _apply=move_once)
        change(torch.Tensor, backward=watch.during("backward")(backward))
        change(module, augment=watch.during("augment")(module.augment),
               training_batches=watch.counted(module.training_batches))
        change(module.torchvision.utils, save_image=lambda *a, **k: None)
        before, after = watch.phases.append, watch.phases.pop
        stack.callback(register_optimizer_step_pre_hook(lambda *a: before("optimizer")).remove)
        stack.callback(register_optimizer_step_post_hook(lambda *a: after()).remove)
        if "planted" in title:
            change(module, train_step=planted(module.train_step))
        if "processes" in title:
            join, n = torch.distributed.init_process_group, title.split()[-2]
            group = dict(store=FakeStore(), rank=0, world_size=int(n))
            change(torch.distributed, init_process_group=lambda *a: join("fake", **group))
            # DDP asks for real numbers when it is built. So its all-reduce is not counted.
            change(torch.nn.parallel, DistributedDataParallel=lambda model, **how: model)
            stack.enter_context(mock.patch.dict(
                os.environ, RANK="0", WORLD_SIZE=n, MASTER_ADDR="localhost", MASTER_PORT="1"))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        with watch.fake, watch:
            module.main(argv)
    return {"waits": watch.waits, "launches": watch.launches}


def main(titles: list[str]) -> None:
    from conftest import write_images  # and the path to the scripts
    with Fake():  # autograd makes its threads, one a device, at the first backward pass of all
        loss = torch.ones(1, device="cuda", requires_grad=True).sum()
        device_count(8)(loss.backward)()
    with tempfile.TemporaryDirectory() as folder:
        for part in ("train/a", "train/b", "val/a", "val/b"):
            write_images(Path(folder, "photos", part), 12)
        import simclr_v2
        args = simclr_v2.settle(simclr_v2.parse_args("--data demo --recipe cifar".split()))
        encoder = simclr_v2.build_encoder(args)
        teacher = simclr_v2.task_network(encoder, torch.nn.Sequential(), 10).state_dict()
        torch.save({"config": args.config, "model": teacher}, f"{folder}/teacher")
        for title in titles:
            script, flags = RUNS[title]
            flags = flags.replace("PHOTOS", f"{folder}/photos")
            flags = flags.replace("TEACHER", f"{folder}/teacher")
            argv = [*flags.split(), "--device", "cuda", "--out", f"{folder}/{title}"]
            found = run(title, importlib.import_module(script), argv)
            print(f"{title}: {json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or [*RUNS])
