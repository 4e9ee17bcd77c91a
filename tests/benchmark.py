"""Speed, as ratios measured in one run on one machine: python tests/benchmark.py [--photos FOLDER]

Both sides of a ratio run in turn, a few times; the medians count. Without --photos (a tree of
photographs, such as a few hundred from ImageNet) the loader reads generated 500 x 375 JPEGs.

The part `peer` needs lightly (`pip install lightly`), which the project does not. `side_by_side` is
the table of all five scripts; `--cifar FOLDER` gives it CIFAR-10 as a folder, with train/ and val/,
in place of the built-in images.
"""

import argparse
import collections
import contextlib
import copy
import importlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import common  # noqa: E402
import moco_v3  # noqa: E402
import simsiam  # noqa: E402
from conftest import write_images  # noqa: E402


def compare(title: str, unit: str, repeats: int = 3, **sides) -> None:
    """sides: name=function() -> rate. The ratio is the first's over the second's."""
    rates = {name: [] for name in sides}
    for _ in range(repeats):
        for name, function in sides.items():
            rates[name].append(function())
    (a, x), (b, y) = ((name, statistics.median(rate)) for name, rate in rates.items())
    print(f"{title}: {a} {x:.4g} {unit}, {b} {y:.4g} {unit}, ratio {x / y:.2f}", flush=True)


def rate(function, amount: float, seconds: float = 4.0) -> float:
    """amount per call, times calls per second, after one call to warm up."""
    function()
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        function()
        calls += 1
    return amount * calls / (time.perf_counter() - began)


def arguments(*argv, script=simsiam) -> argparse.Namespace:
    args = script.settle(script.parse_args([*argv]))
    args.device, args.dtype = torch.device(args.device or "cpu"), torch.float32
    args.workers = args.workers or 0
    return args


def new_encoder(script, args):
    args.initial = {}  # load_encoder takes it away
    with contextlib.redirect_stdout(io.StringIO()):
        return script.load_encoder(args)


def cpu_model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        return next((x.split(":")[1].strip() for x in file if x.startswith("model name")), "CPU")
    return "CPU"


def uniform(*shape: int) -> torch.Tensor:
    return common.draws(0, "benchmark", 0, *shape)


def pil_pipeline(size: int, crop_min: float, blur: bool):
    """The usual two views of MoCo v2's recipe (App. A of SimSiam), with PIL."""
    view = transforms.Compose([
        transforms.RandomResizedCrop(size, scale=(crop_min, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        *[transforms.RandomApply([transforms.GaussianBlur(23, (0.1, 2.0))], p=0.5)] * blur,
        transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize((0.5,) * 3, (0.25,) * 3)])
    return lambda image: (view(image), view(image))


class PilImages(Dataset):
    def __init__(self, pixels, transform):
        self.images = [transforms.functional.to_pil_image(x) for x in pixels]
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i])


def augmentation_at_32_px() -> None:
    pixels, _ = common.demo_images(4096, 0)
    args = arguments("--recipe", "cifar", "--batch-size", "256")
    images = simsiam.Images(torch.arange(4096), pixels)
    pil = PilImages(pixels, pil_pipeline(32, 0.2, blur=False))

    def ours():
        began, n = time.perf_counter(), 0
        for step, crops, _ in simsiam.training_batches(images, 0, 16, 2, args):
            u = common.draws(args.seed, "colour", step, 512, simsiam.COLOR_DRAWS)
            n += len(simsiam.augment(crops, u, args))
        return n / (time.perf_counter() - began)

    def theirs():
        began, n = None, 0
        for x1, x2 in DataLoader(pil, 256, shuffle=True, num_workers=2):
            if began is None:  # the first batch pays for starting the workers
                began = time.perf_counter()
            else:
                n += len(x1) + len(x2)
        return n / (time.perf_counter() - began)

    compare("augmentation, 32 px, two cores", "views/s", ours=ours, pil_two_workers=theirs)


def folder_loader(options) -> None:
    """One core each: what a loader process does, and then what is left for the device."""
    with tempfile.TemporaryDirectory() as folder:
        if options.photos is None:
            write_images(Path(folder), 60, size=(375, 500))
        compare_loaders(options.photos or folder)


def compare_loaders(photos: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    args = arguments("--recipe", "imagenet", "--batch-size", "32", "--data", photos)
    paths = np.array([*simsiam.image_files(photos, args)])
    stage1 = simsiam.FileCrops(simsiam.Images(torch.zeros(len(paths)), paths=paths), args)
    draws = uniform(len(paths), 2, 23).numpy()
    pil = pil_pipeline(224, 0.2, blur=True)
    load = datasets.folder.default_loader

    def first_stage():
        began = time.perf_counter()
        for i in range(len(paths)):
            stage1[i, draws[i]]
        return len(paths) / (time.perf_counter() - began)

    def theirs():
        began = time.perf_counter()
        for path in paths:
            pil(load(path))
        return len(paths) / (time.perf_counter() - began)

    compare(f"folder loader, 224 px, two views, one core, {len(paths)} photos", "images/s",
            decode_and_crop=first_stage, pil_all=theirs)
    torch.set_num_threads(threads)
    x = torch.rand(64, 3, 224, 224)
    u = uniform(64, simsiam.COLOR_DRAWS)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        y = x.to(device)

        def second_stage(y=y):
            simsiam.augment(y, u, args)
            if y.is_cuda:
                torch.cuda.synchronize()

        found = rate(second_stage, 64)
        print(f"second stage, 224 px, on {device}: {found:.4g} views/s", flush=True)


def step_rate(args, batch: int, repeats: int) -> float:
    """images/s of the bare training step on random tensors."""
    torch.manual_seed(0)
    encoder = new_encoder(simsiam, args)
    model = simsiam.SimSiam(encoder, args.dim, args.predictor_dim, args.hidden_dim,
                            args.projector_layers)
    net = simsiam.distribute(model, args)
    optimizer = simsiam.build_optimizer(model, args)
    x = torch.randn(2, batch, 3, args.image_size, args.image_size, device=args.device)
    x1, x2 = (v.contiguous(memory_format=torch.channels_last) for v in x)
    for i in range(repeats + 3):
        if i == 3:  # the first ones warm up
            began = time.perf_counter()
        loss, _ = simsiam.train_step(net, optimizer, x1, x2, 0.0, args)
        loss.item()
    return batch * repeats / (time.perf_counter() - began)


def precision() -> None:
    rates = {}
    for name in ("bf16", "fp32"):
        args = arguments("--recipe", "cifar", "--precision", name, "--batch-size", "64")
        rates[name] = lambda args=args: step_rate(args, 64, 3)
    kind = ("AMX" if torch.cpu._is_amx_tile_supported() else
            "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else "no bf16")
    compare(f"step, ResNet-18, width 1, batch 64, {kind}", "images/s", repeats=2, **rates)


class Watch:
    """One training run of a script, or, if it is to be split, a clock around each part of it.

    Counts from the entry into the step `SKIP` to that into the last one, whole iterations. The last
    call of train_step is kept, to be repeated as the bare step: same network, same tensors.
    """

    SKIP = 3  # steps that warm up

    def __init__(self, script, flags: list[str], split: bool = False):
        self.script, self.device = script, torch.device("cpu")
        self.seconds, self.calls, self.undo = collections.Counter(), 0, []
        if split:
            for name, part in (("augment", "augment"), ("update_ema", "EMA")):
                if hasattr(script, name):
                    self.patch(script, name, self.clock(part, getattr(script, name)))
            self.patch(torch.Tensor, "backward", self.clock("backward", torch.Tensor.backward))
            self.patch(script, "distribute", self.inner(script.distribute, "forward", "forward"))
            self.patch(script, "build_optimizer",
                       self.inner(script.build_optimizer, "step", "optimizer"))
            self.patch(script, "training_batches", self.timed_batches(script.training_batches))
        self.patch(script, "train_step", self.watched(script.train_step))
        try:
            with tempfile.TemporaryDirectory() as out:
                with contextlib.redirect_stdout(io.StringIO()) as said:
                    assert script.main([*flags, "--out", out]) == 0, said.getvalue()
                self.log = [json.loads(line) for line in open(os.path.join(out, "log.jsonl"))]
        finally:
            for target, name, value in reversed(self.undo):
                setattr(target, name, value)

    def patch(self, target, name, value):
        self.undo.append((target, name, getattr(target, name)))
        setattr(target, name, value)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def clock(self, part, function):
        def timed(*args, **kwargs):
            began = self.now()
            result = function(*args, **kwargs)
            self.seconds[part] += self.now() - began
            return result
        return timed

    def inner(self, build, name, part):
        """What `build` returns, with a clock around its method `name`."""
        def built(*args, **kwargs):
            result = build(*args, **kwargs)
            setattr(result, name, self.clock(part, getattr(result, name)))
            return result
        return built

    def timed_batches(self, batches):
        def stream(*args, **kwargs):
            source = batches(*args, **kwargs)
            yield from iter(self.clock("data", lambda: next(source, None)), None)
        return stream

    def watched(self, train_step):
        timed = self.clock("step", train_step)

        def watching(*args, **kwargs):
            self.device = args[2].device
            if self.calls == self.SKIP:
                self.seconds.clear()
                self.began = self.now()
            self.calls += 1
            self.total, self.split = self.now() - getattr(self, "began", 0), dict(self.seconds)
            self.bare = lambda: train_step(*args, **kwargs)
            return timed(*args, **kwargs)
        return watching

    def steps(self) -> int:
        return self.calls - 1 - self.SKIP

    def bare_seconds(self, steps: int = 15) -> float:
        self.bare()
        began = self.now()
        for _ in range(steps):
            self.bare()
        return (self.now() - began) / steps


SCRIPTS = ("simsiam", "moco_v3", "byol", "dcl", "simclr_v2")
COLUMNS = ("images/s", "of bare step", "data", "augment", "forward", "backward", "optimizer", "EMA",
           "rest of step", "rest of loop", "GB")


def side_by_side_row(name: str, width: float, batch: int, data: str, device: str) -> dict:
    """One row of the table, in a process of its own, so that its memory is its own."""
    flags = ["--data", data, "--recipe", "cifar", "--arch", "resnet18", "--width", str(width),
             "--batch-size", str(batch), "--knn-every", "0", "--steps", "31", "--log-every", "25",
             "--device", device]
    flags[3] = "cifar-resnet" if name == "moco_v3" else "cifar"
    script, loops, bares = importlib.import_module(name), [], []
    for _ in range(3):
        run = Watch(script, flags)
        loops.append(run.total / run.steps())
        bares.append(run.bare_seconds())
    unit = 1 if sys.platform == "darwin" else 1024
    memory = (torch.cuda.max_memory_allocated() if device == "cuda" else
              unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e9
    loop, bare = statistics.median(loops), statistics.median(bares)
    run = Watch(script, flags, split=True)
    ms = {part: 1000 * seconds / run.steps() for part, seconds in run.split.items()}
    step, total = ms.pop("step"), 1000 * run.total / run.steps()
    inside = sum(ms.get(part, 0) for part in ("forward", "backward", "optimizer", "EMA"))
    return {"images/s": round(batch / loop, 1), "of bare step": round(bare / loop, 3),
            **{part: round(x, 1) for part, x in ms.items()},
            "rest of step": round(step - inside, 1),
            "rest of loop": round(total - step - ms["data"] - ms["augment"], 1),
            "GB": round(memory, 2)}


def side_by_side(options) -> None:
    """All five scripts with the same network, images and batch, each with its own recipe."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        width, batch = (0.25, 128) if device == "cpu" else (1.0, 512 if options.cifar else 128)
        width, batch = options.width or width, options.batch or batch
        print(f"ResNet-18, width {width:g}, batch {batch}, 32 px, {device}; ms a step, one step in "
              "27 logged\n| script | " + " | ".join(COLUMNS) + " |\n"
              + "|---" * (len(COLUMNS) + 1) + "|")
        for name in SCRIPTS:
            row = json.loads(subprocess.run(
                [sys.executable, __file__, "--row", name, str(width), str(batch),
                 options.cifar or "demo", device], check=True, capture_output=True,
                text=True).stdout.splitlines()[-1])
            print(f"| {name}.py | " + " | ".join(str(row.get(c, "")) for c in COLUMNS) + " |",
                  flush=True)


# The peer's settings: lightly's docs/source/getting_started/benchmarks/cifar10_benchmark.py (batch
# 128: lr 0.06, SGD, momentum 0.9, weight decay 5e-4, SimCLR's crops and colors without blur, PIL,
# float32), as flags of ours. Its BYOL loss is a quarter of the paper's sum, so that lr is too.
PEER_FLAGS = ["--recipe", "cifar", "--batch-size", "128", "--base-lr", "0.12", "--momentum", "0.9",
              "--weight-decay", "5e-4", "--warmup-epochs", "0", "--crop-min", "0.08", "--jitter",
              "0.4", "0.4", "0.4", "0.1", "--jitter-prob", "0.8", "--gray-prob", "0.2",
              "--no-zero-init-residual", "--knn-every", "0", "--device", "cpu"]
CONTRAST = ["--hidden-dim", "512", "--dim", "128"]
PEERS = {
    "SimSiam": ("simsiam", ["--predictor-lr", "decay"]),
    "BYOL": ("byol", ["--optimizer", "sgd", "--base-lr", "0.03", "--hidden-dim", "1024",
                      "--base-tau", "0.99", "--tau-schedule", "constant", "--blur-prob", "0", "0",
                      "--solarize-prob", "0", "0"]),
    "SimCLR": ("dcl", ["--loss", "infonce", "--temperature", "0.5", *CONTRAST]),
    "DCL": ("dcl", ["--loss", "dcl", "--temperature", "0.1", *CONTRAST]),
}


class Peer(torch.nn.Module):
    """One of lightly's methods from its own modules, losses and transforms, in a plain loop (its
    benchmark has PyTorch Lightning around it, which costs it a little more)."""

    def __init__(self, method: str, width: float):
        super().__init__()
        from lightly import loss, models
        from lightly.models.modules import heads
        nn = torch.nn
        resnet = models.ResNetGenerator("resnet-18", width=width)
        self.backbone = nn.Sequential(*[*resnet.children()][:-1], nn.AdaptiveAvgPool2d(1),
                                      nn.Flatten())
        dim, self.method, self.target = int(512 * width), method, None
        self.head, self.predictor = heads.SimCLRProjectionHead(dim, 512, 128), nn.Identity()
        self.criterion = {"SimCLR": loss.NTXentLoss, "DCL": loss.DCLLoss}.get(
            method, loss.NegativeCosineSimilarity)()
        if method == "SimSiam":
            self.head = heads.ProjectionHead([(dim, 2048, nn.BatchNorm1d(2048), nn.ReLU(True)),
                                              (2048, 2048, nn.BatchNorm1d(2048), None)])
            self.predictor = heads.SimSiamPredictionHead(2048, 512, 2048)
        if method == "BYOL":
            self.head = heads.BYOLProjectionHead(dim, 1024, 256)
            self.predictor = heads.BYOLPredictionHead(256, 1024, 256)
            self.target = copy.deepcopy(nn.Sequential(self.backbone, self.head))
            self.target.requires_grad_(False)

    def step(self, optimizer, views) -> None:
        from lightly.models.utils import update_momentum
        z = [self.head(self.backbone(x)) for x in views]
        p = [self.predictor(x) for x in z]
        if self.target is not None:
            update_momentum(self.backbone, self.target[0], m=0.99)
            update_momentum(self.head, self.target[1], m=0.99)
            z = [self.target(x) for x in views]
        if self.method in ("SimSiam", "BYOL"):
            loss = 0.5 * (self.criterion(p[0], z[1].detach()) + self.criterion(p[1], z[0].detach()))
        else:
            loss = self.criterion(*z)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def peer_training(method: str, width: float, images: Dataset, steps: int):
    """Trains lightly's method for so many steps of 128; returns it and images/s after the third."""
    torch.manual_seed(0)
    model = Peer(method, width)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.06,
                                momentum=0.9, weight_decay=5e-4)
    per_epoch = len(images) // 128
    epochs = -(-steps // per_epoch)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    loader = DataLoader(images, 128, shuffle=True, drop_last=True, num_workers=2,
                        persistent_workers=True)
    done, began = 0, time.perf_counter()
    for _ in range(epochs):
        for views in loader:
            model.step(optimizer, views[:2])
            done += 1
            if done == min(3, steps):
                warm = time.perf_counter()
            if done == steps:
                end = time.perf_counter()
                return model, 128 * (steps - 3) / max(1e-9, end - warm), end - began
        scheduler.step()


def peer_images(options) -> Dataset:
    """The images in memory as PIL's, which spares the peer its decoding, with its transform."""
    from lightly.transforms import SimCLRTransform
    transform = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)
    if options.cifar:
        args = arguments("--data", options.cifar)
        files = simsiam.image_files(os.path.join(options.cifar, "train"), args)
        return PilImages(simsiam.in_memory(files, {}, args).pixels, transform)
    return PilImages(common.demo_images(4000, 0)[0], transform)


def peer(options) -> None:
    """images/s of both loops, in turn: the same network, images, batch and settings."""
    width, images = options.width or 1.0, peer_images(options)
    for method in options.methods:
        name, extra = PEERS[method]
        flags = [*PEER_FLAGS, *extra, "--width", str(width), "--data", options.cifar or "demo",
                 "--steps", "13", "--log-every", "10"]

        def ours():
            run = Watch(importlib.import_module(name), flags)
            return 128 * run.steps() / run.total

        def lightly():
            return peer_training(method, width, images, 12)[1]

        compare(f"{method}, ResNet-18, width {width:g}, batch 128", "images/s", options.repeats,
                ours=ours, lightly=lightly)


class LoopLARS(torch.optim.Optimizer):
    """The same arithmetic parameter by parameter, as most codes have it."""

    def __init__(self, params, lr, weight_decay, momentum=0.9, trust_coefficient=0.001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum,
                                      trust_coefficient=trust_coefficient))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if p.ndim > 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    w, u = p.norm(), update.norm()
                    ratio = torch.where((w > 0) & (u > 0), group["trust_coefficient"] * w / u, 1.0)
                    update = update * ratio
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(update)
                p.add_(buffer, alpha=-group["lr"])


def lars() -> None:
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        rates = {}
        for name, kind in (("foreach", common.LARS), ("loop", LoopLARS)):
            model = common.resnet(50).to(device)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer = kind(model.parameters(), lr=0.1, weight_decay=1e-4)

            def step(optimizer=optimizer):
                optimizer.step()
                if device == "cuda":
                    torch.cuda.synchronize()

            rates[name] = lambda step=step: rate(step, 1, seconds=2)
        compare(f"LARS on ResNet-50's 161 tensors, {device}", "steps/s", **rates)


def ema() -> None:
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        def wait(function):
            function()
            if device == "cuda":
                torch.cuda.synchronize()

        online, target = ([*common.vit("small").to(device).parameters()] for _ in range(2))

        @torch.no_grad()
        def foreach():
            moco_v3.update_ema(target, online, 0.99)

        @torch.no_grad()
        def loop():
            for t, o in zip(target, online):
                t.mul_(0.99).add_(o, alpha=0.01)

        compare(f"EMA on ViT-S's {len(target)} tensors, {device}", "updates/s",
                foreach=lambda: rate(lambda: wait(foreach), 1, seconds=2),
                loop=lambda: rate(lambda: wait(loop), 1, seconds=2))


def big_networks() -> None:
    """Whole training steps on random tensors at 224 px, with the papers' heads: images/s, and the
    arithmetic (FlopCounterMode: matrix products and convolutions) as a share of what one large
    product of matrices in bfloat16 reaches on the same device."""
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        batch, repeats, n = (8, 2, 2048) if device == "cpu" else (256, 20, 8192)
        a = torch.randn(n, n, device=device, dtype=torch.bfloat16)

        def wait(function):
            function()
            if device == "cuda":
                torch.cuda.synchronize()

        peak = rate(lambda: wait(lambda: a @ a), 2 * n**3)
        for title, script in (("SimSiam, ResNet-50", simsiam), ("MoCo v3, ViT-S/16", moco_v3)):
            args = arguments("--recipe", "imagenet", "--batch-size", str(batch), "--device", device,
                             script=script)
            encoder = new_encoder(script, args)
            model = (simsiam.SimSiam if script is simsiam else moco_v3.MoCoV3)(encoder)
            net, optimizer = script.distribute(model, args), script.build_optimizer(model, args)
            views, more = torch.randn(2, batch, 3, 224, 224, device=device), ()
            if script is moco_v3:
                more = (0.99,)  # the momentum of the update

            def step():
                script.train_step(net, optimizer, *views, 0.5, *more, args)[0].item()

            with FlopCounterMode(display=False) as counter:  # warms up, too
                step()
            began = time.perf_counter()
            for _ in range(repeats):
                step()
            seconds = (time.perf_counter() - began) / repeats
            print(f"{title}, 224 px, batch {batch}, {device}: {batch / seconds:.4g} images/s, "
                  f"{counter.get_total_flops() / seconds / peak:.2f} of the {peak / 1e12:.3g} "
                  f"TFLOP/s of a product of {n}", flush=True)


def main() -> None:
    torch.set_num_threads(os.cpu_count())  # conftest.py takes one
    plain = (augmentation_at_32_px, lars, ema, precision, big_networks)
    with_options = (side_by_side, folder_loader, peer)
    parts = {function.__name__: function for function in (*with_options, *plain)}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="a tree of photographs")
    parser.add_argument("--cifar", help="CIFAR-10 as train/ and val/ with a folder per class")
    parser.add_argument("--width", type=float, help="of side_by_side's ResNet-18")
    parser.add_argument("--batch", type=int, help="of side_by_side")
    parser.add_argument("--repeats", type=int, default=2, help="of peer")
    parser.add_argument("--methods", nargs="+", choices=PEERS, default=[*PEERS], help="of the peer")
    parser.add_argument("--only", nargs="+", choices=parts, help="default: what needs no more",
                        default=["side_by_side", "folder_loader", *(f.__name__ for f in plain)])
    parser.add_argument("--row", nargs=5, help=argparse.SUPPRESS)  # side_by_side calls itself
    options = parser.parse_args()
    if options.row:
        name, width, batch, data, device = options.row
        print(json.dumps(side_by_side_row(name, float(width), int(batch), data, device)))
        return
    print(f"{cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} "
          f"threads, torch {torch.__version__}", flush=True)
    for name in options.only:
        parts[name](*[options] * (parts[name] in with_options))


if __name__ == "__main__":
    main()
