"""Speed, as ratios measured in one run on one machine: python tests/benchmark.py [--photos FOLDER]

Both sides of a ratio run in turn, a few times; the medians count. Without --photos (a tree of
photographs, such as a few hundred from ImageNet) the loader reads generated 500 x 375 JPEGs.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
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
    args = script.parse_args([*argv])
    args.device, args.dtype, args.initial = torch.device(args.device or "cpu"), torch.float32, None
    args.workers = args.workers or 0
    return args


def pil_pipeline(size: int, crop_min: float, blur: bool):
    """The usual two views of MoCo v2's recipe (App. A of SimSiam), with PIL, in float at the end."""
    view = transforms.Compose([
        transforms.RandomResizedCrop(size, scale=(crop_min, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        *([transforms.RandomApply([transforms.GaussianBlur(23, (0.1, 2.0))], p=0.5)] if blur else []),
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
    images = simsiam.Images(torch.arange(4096).numpy(), pixels=pixels)
    pil = PilImages(pixels, pil_pipeline(32, 0.2, blur=False))

    def ours():
        began, n = time.perf_counter(), 0
        for batch in simsiam.batches(args, images, 0, 16, views=2):
            n += len(simsiam.augment(batch.crops, batch.colours, args))
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


def folder_loader(photos: str) -> None:
    """One core each: what a loader process does, and then what is left for the device."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    args = arguments("--recipe", "imagenet", "--batch-size", "32", "--data", photos)
    images = simsiam.find_images(photos)
    stage1 = simsiam.Stage1(images, 224, 0.2, 8 / 7)
    draws = simsiam.uniform((len(images), 2, simsiam.CROP_DRAWS), "benchmark").numpy()
    pil = pil_pipeline(224, 0.2, blur=True)
    load = datasets.folder.default_loader

    def first_stage():
        began = time.perf_counter()
        for i in range(len(images)):
            stage1[i, draws[i]]
        return len(images) / (time.perf_counter() - began)

    def theirs():
        began = time.perf_counter()
        for i in range(len(images)):
            pil(load(images.path(i)))
        return len(images) / (time.perf_counter() - began)

    compare(f"folder loader, 224 px, two views, one core, {len(images)} photos", "images/s",
            decode_and_crop=first_stage, pil_all=theirs)
    torch.set_num_threads(threads)
    x = torch.rand(64, 3, 224, 224)
    u = simsiam.uniform((64, simsiam.COLOUR_DRAWS), "benchmark")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        y = x.to(device)

        def second_stage(y=y):
            simsiam.augment(y, u, args)
            if y.is_cuda:
                torch.cuda.synchronize()

        print(f"second stage, 224 px, on {device}: {rate(second_stage, 64):.4g} views/s", flush=True)


def step_rate(args, batch: int, repeats: int) -> float:
    """images/s of the bare training step on random tensors."""
    torch.manual_seed(0)
    model = simsiam.SimSiam(simsiam.build_encoder(args), args.dim, args.predictor_dim,
                            args.hidden_dim, args.projector_layers)
    net = simsiam.prepare(model, args)
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
    flags = simsiam.cpu_info("flags").split()
    kind = "AMX" if "amx_bf16" in flags else "AVX512-BF16" if "avx512_bf16" in flags else "no bf16"
    compare(f"step, ResNet-18, width 1, batch 64, {kind}", "images/s", repeats=2, **rates)


def loop_against_bare_step() -> None:
    flags = ["--recipe", "cifar", "--width", "0.25", "--batch-size", "128"]
    args = arguments(*flags)

    def loop():
        with tempfile.TemporaryDirectory() as out:
            with contextlib.redirect_stdout(io.StringIO()):
                assert simsiam.main([*flags, "--data", "demo", "--knn-every", "0", "--steps", "23",
                                     "--log-every", "2", "--device", "cpu", "--epochs", "50",
                                     "--out", out]) == 0
            lines = [json.loads(line) for line in open(os.path.join(out, "log.jsonl"))]
        # Steps 3 to 22, of which every second computes the monitors and is logged.
        return 20 / sum(2 / line["images_per_s"] for line in lines if line.get("step", 0) > 3)

    compare("loop against bare step, ResNet-18, width 0.25, batch 128", "images/s", repeats=5,
            loop=loop, bare_step=lambda: step_rate(args, 128, 20))


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


class LoopLAMB(torch.optim.Optimizer):
    """moco_v3.LAMB's arithmetic, parameter by parameter."""

    def __init__(self, params, lr, weight_decay, betas=(0.9, 0.999), eps=1e-6):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, a=torch.zeros_like(p), b=torch.zeros_like(p))
                state["step"] += 1
                a = state["a"].lerp_(p.grad, 1 - b1)
                b = state["b"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                update = (a / (1 - b1**state["step"])) / (
                    (b / (1 - b2**state["step"])).sqrt() + group["eps"])
                if p.ndim > 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    w, u = p.norm(), update.norm()
                    update = update * torch.where((w > 0) & (u > 0), w / u, 1.0)
                p.add_(update, alpha=-group["lr"])


def lamb_and_ema() -> None:
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        def wait(function):
            function()
            if device == "cuda":
                torch.cuda.synchronize()

        rates = {}
        for name, kind in (("foreach", moco_v3.LAMB), ("loop", LoopLAMB)):
            model = common.vit("small").to(device)
            params = [p for p in model.parameters() if p.requires_grad]
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer = kind(params, lr=1e-4, weight_decay=1e-3)
            rates[name] = lambda step=optimizer.step: rate(lambda: wait(step), 1, seconds=2)
        compare(f"LAMB on ViT-S's {len(params)} tensors, {device}", "steps/s", **rates)

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


def vit_small_step() -> None:
    """MoCo v3's whole training step on random tensors: ViT-S/16 at 224 px, heads of the paper."""
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        batch, repeats = (8, 2) if device == "cpu" else (256, 20)
        args = arguments("--recipe", "imagenet", "--batch-size", str(batch), "--device", device,
                         script=moco_v3)
        model = moco_v3.MoCoV3(moco_v3.build_encoder(args))
        net = moco_v3.prepare(model, args)
        optimizer = moco_v3.build_optimizer(model, args)
        x1, x2 = torch.randn(2, batch, 3, 224, 224, device=device)
        for i in range(repeats + 1):
            if i == 1:  # the first one warms up
                began = time.perf_counter()
            moco_v3.train_step(net, optimizer, x1, x2, 0.5, 0.99, args)[0].item()
        print(f"MoCo v3 step, ViT-S/16, 224 px, batch {batch}, {device}: "
              f"{batch * repeats / (time.perf_counter() - began):.4g} images/s", flush=True)


def main() -> None:
    torch.set_num_threads(os.cpu_count())  # conftest.py takes one
    parts = {function.__name__: function for function in (
        augmentation_at_32_px, folder_loader, loop_against_bare_step, lars, lamb_and_ema, precision,
        vit_small_step)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", help="a tree of photographs")
    parser.add_argument("--only", nargs="+", choices=parts, default=[*parts], help="default: all")
    args = parser.parse_args()
    print(f"{simsiam.cpu_info('model name')}, {os.cpu_count()} cores, {torch.get_num_threads()} "
          f"threads, torch {torch.__version__}", flush=True)
    for name in args.only:
        if name == "folder_loader":
            with tempfile.TemporaryDirectory() as folder:
                if args.photos is None:
                    write_images(Path(folder), 60, size=(375, 500))
                folder_loader(args.photos or folder)
        else:
            parts[name]()


if __name__ == "__main__":
    main()
