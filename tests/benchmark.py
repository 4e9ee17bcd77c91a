"""Speed, as ratios measured in one run on one machine: python tests/benchmark.py [--only PART ...]

Both sides of a ratio run in turn, a few times; the medians count. The parts:

    loop          the training loops of the five scripts against their bare steps
    peer          our loops against lightly's (pip install lightly), same network and batch
    loader        what a loader process does against PIL, on photographs; one core each
    augmentation  our views against PIL's, without decoding; one core each
    lars_and_ema  torch's foreach against loops over parameters
    precision     a step in bfloat16 against float32
    share         training steps of ResNet-18 against a product of matrices, in FLOP/s
    big           the same for ResNet-50 and ViT-S/16 at 224 px
    profile       where the time of a training step goes
    sync_bn       batch norm over processes against torch's
"""

import argparse
import contextlib
import copy
import importlib.util
import io
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageFilter
from torch import multiprocessing, nn
from torch.utils import flop_counter
from torch.utils.data import DataLoader, RandomSampler, default_collate
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import moco_v3  # noqa: E402
import simsiam  # noqa: E402

QUICK = "--quick" in sys.argv
SECONDS, REPEATS = (0.02, 1) if QUICK else (4.0, 3)  # of one measurement; ours
WARM_UP = 2 if QUICK else 3  # steps; ours
BATCH, WIDTH = (16, 0.125) if QUICK else (128, 1.0)  # of ResNet-18, as in lightly's benchmark
SCRIPTS = ("simsiam", "moco_v3", "byol", "dcl", "simclr_v2")
LIGHTLY = importlib.util.find_spec("lightly") is not None


def now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def rate(function, amount: float = 1.0) -> float:
    """amount per second, if one call of function does that much."""
    function()  # warms up
    began, calls = now(), 0
    while calls == 0 or time.perf_counter() < began + SECONDS:  # does not wait for a GPU
        function()
        calls += 1
    return amount * calls / (now() - began)


def compare(title: str, unit: str, **sides) -> None:
    """Run all sides (functions that return a rate) in turn; print medians, ratios to the last."""
    runs = [{name: function() for name, function in sides.items()} for _ in range(REPEATS)]
    *ours, (last, base) = ((x, statistics.median(run[x] for run in runs)) for x in sides)
    text = [f"{name} {x:.4g} {unit} (ratio {x / base:.2f})" for name, x in ours]
    print(f"{title}: " + ", ".join([*text, f"{last} {base:.4g} {unit}"]), flush=True)


def precisions(device: str) -> list[str]:
    """bf16 only where it is native, as in the scripts' --precision auto."""
    native = (torch.cuda.is_bf16_supported(False) if device == "cuda" else
              torch.cpu._is_avx512_bf16_supported())
    return ["bf16", "fp32"] if native else ["fp32"]


def settings(*argv: str) -> argparse.Namespace:  # of simsiam.py, without loader processes
    args = simsiam.settle(simsiam.parse_args([*argv]))
    args.device, args.dtype, args.workers = torch.device("cpu"), torch.float32, 0
    return args


def resnet18(script: str, width: float, batch: int, device: str, kind: str = "auto") -> list[str]:
    """Flags for ResNet-18 at 32 px, with the method's own recipe. kind: the precision."""
    recipe = "cifar-resnet" if script == "moco_v3" else "cifar"
    return (f"--recipe {recipe} --width {width} --batch-size {batch} --device {device} "
            f"--precision {kind}").split()


def watch(name: str, flags: list[str], steps: int = WARM_UP + 2):
    """Train with a script, without evaluation. Returns seconds per iteration, from the entry into a
    step after the warm-up to the entry into the last step, and the last calls of train_step and
    augment, to be repeated: the bare step, with the same network and tensors."""
    script, times, last = importlib.import_module(name), {}, {}

    def watched(part: str):
        function, calls = getattr(script, part), itertools.count(1)

        def call(*inputs):
            n = next(calls)
            if n in (WARM_UP, steps):
                times[part, n] = now()
            if n == steps:
                last[part] = partial(function, *inputs)
            return function(*inputs)
        return call

    patches = {part: watched(part) for part in ("augment", "train_step")}
    with (tempfile.TemporaryDirectory() as out, mock.patch.multiple(script, **patches),
          contextlib.redirect_stdout(io.StringIO())):
        script.main(["--data", "demo", "--knn-every", "0", "--log-every", "25", *flags,
                     "--steps", str(steps), "--out", out])
    seconds = (times["train_step", steps] - times["train_step", WARM_UP]) / (steps - WARM_UP)
    return seconds, last["train_step"], last["augment"]


def loop(options) -> None:
    """Each script in a process of its own. One iteration in 28 is logged. The goal is ours."""
    for device, name in itertools.product(options.devices, SCRIPTS):
        multiprocessing.spawn(loop_of, args=(name, options, device))


def loop_of(_, name: str, options, device: str) -> None:
    global REPEATS
    REPEATS, width = options.repeats, options.width
    steps, bare = 6 if QUICK else 31, None  # 31: an epoch of the built-in images

    def whole() -> float:
        nonlocal bare
        seconds, bare, _ = watch(name, resnet18(name, width, BATCH, device), steps)
        return BATCH / seconds

    compare(f"loop (goal: 0.92): {name}.py, ResNet-18, width {width:g}, batch {BATCH}, {device}",
            "images/s", loop=whole, bare_step=lambda: rate(bare, BATCH))


# The peer's settings: lightly's docs/source/getting_started/benchmarks/cifar10_benchmark.py (batch
# 128: lr 0.06, SGD, momentum 0.9, weight decay 5e-4, SimCLR's crops and colors without blur, PIL,
# float32), as flags of ours. Its BYOL loss is a quarter of the paper's sum, so that lr is too.
PEER_FLAGS = ("--recipe cifar --base-lr 0.12 --momentum 0.9 --weight-decay 5e-4 --warmup-epochs 0 "
              "--crop-min 0.08 --jitter 0.4 0.4 0.4 0.1 --jitter-prob 0.8 --gray-prob 0.2 "
              "--no-zero-init-residual --device cpu --workers 2")
PEERS = {
    "SimSiam": ("simsiam", "--predictor-lr decay"),
    "BYOL": ("byol", "--optimizer sgd --base-lr 0.03 --hidden-dim 1024 --base-tau 0.99 "
                     "--tau-schedule constant --blur-prob 0 0 --solarize-prob 0 0"),
    "SimCLR": ("dcl", "--loss infonce --temperature 0.5 --hidden-dim 512 --dim 128"),
    "DCL": ("dcl", "--loss dcl --temperature 0.1 --hidden-dim 512 --dim 128"),
}


class Peer(nn.Module):
    """One of lightly's methods from its own modules and losses, without PyTorch Lightning, which
    would make it a little slower. The numbers are those of lightly's benchmark, as above."""

    def __init__(self, method: str, width: float):
        super().__init__()
        from lightly import loss, models
        from lightly.models.modules import heads
        resnet = models.ResNetGenerator("resnet-18", width=width)
        self.backbone = nn.Sequential(*[*resnet.children()][:-1], nn.AdaptiveAvgPool2d(1),
                                      nn.Flatten())
        dim, self.contrast, self.target = int(512 * width), method in ("SimCLR", "DCL"), None
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
        self.optimizer = torch.optim.SGD(self.parameters(), 0.06, 0.9, weight_decay=5e-4)

    def step(self, views) -> None:
        from lightly.models.utils import update_momentum
        z = [self.head(self.backbone(x)) for x in views]
        p = [self.predictor(x) for x in z]
        if self.target is not None:
            update_momentum(self.backbone, self.target[0], m=0.99)
            update_momentum(self.head, self.target[1], m=0.99)
            z = [self.target(x) for x in views]
        loss = self.criterion(p[0], z[1] if self.contrast else z[1].detach())
        if not self.contrast:
            loss = (loss + self.criterion(p[1], z[0].detach())) / 2
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def pil_loader(pixels, transform, batch: int, steps: int, workers: int = 0) -> DataLoader:
    images = [transforms.functional.to_pil_image(x) for x in pixels]
    return DataLoader(images, batch, sampler=RandomSampler(images, num_samples=batch * steps),
                      collate_fn=lambda images: default_collate([transform(x) for x in images]),
                      num_workers=workers)


def peer(options) -> None:
    """images/s of both loops. The images are in memory, so that the peer does not decode them."""
    if not LIGHTLY:
        print("peer: skipped, lightly is not installed")
        return
    from lightly.transforms import SimCLRTransform
    transform = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)  # as above
    steps = 5 if QUICK else 13  # ours
    data = ["--data", options.cifar or "demo", "--batch-size", str(BATCH)]
    pixels = simsiam.load_data(settings(*data)).train.pixels
    for method in options.methods:
        name, flags = PEERS[method]
        flags = [*f"{PEER_FLAGS} {flags} --width {options.width}".split(), *data, "--precision"]
        sides = {f"ours_{x}": lambda x=x: BATCH / watch(name, [*flags, x], steps)[0]
                 for x in options.precision or precisions("cpu")}

        def lightly() -> float:  # over the same steps as ours
            model = Peer(method, options.width)
            loader = pil_loader(pixels, transform, BATCH, steps, workers=2)
            for step, views in enumerate(loader, 1):
                if step == WARM_UP:
                    began = now()
                if step == steps:
                    return BATCH * (steps - WARM_UP) / (now() - began)
                model.step(views[:2])

        compare(f"peer: {method}, ResNet-18, width {options.width:g}, batch {BATCH}", "images/s",
                **sides, lightly=lightly)


def pil_views(args, torchvision_blur: bool = False):
    """The usual two views with PIL, with the settings of one of our recipes. The blur is PIL's, as
    in SimSiam's and MoCo's code, or torchvision's, whose 23 x 23 kernel (SimCLR's) is slower."""
    blur = transforms.GaussianBlur(23, (0.1, 2.0)) if torchvision_blur else (
        lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))
    view = transforms.Compose([
        transforms.RandomResizedCrop(args.image_size, scale=(args.crop_min, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(*args.jitter)], p=args.jitter_prob),
        transforms.RandomGrayscale(p=args.gray_prob),
        transforms.RandomApply([blur], p=args.blur_prob),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(args.mean, args.std)])
    return lambda image: (view(image), view(image))


def photographs(n: int) -> torch.Tensor:
    """Generated ones of ImageNet's usual size, 500 x 375: uint8 [n, 3, 375, 500]."""
    coarse = torch.rand(n, 3, 5, 5)  # as in conftest.py
    return (nn.functional.interpolate(coarse, (375, 500), mode="bilinear") * 255).byte()


def loader(options) -> None:
    """One core each, two views per image."""
    n = 4 if QUICK else 200  # at most; ours
    with tempfile.TemporaryDirectory() as folder:
        if options.photos is None:
            for i, x in enumerate(photographs(n)):
                torchvision.io.write_jpeg(x, os.path.join(folder, f"{i}.jpg"))
        args = settings("--recipe", "imagenet", "--data", options.photos or folder)
        paths = [*simsiam.image_files(args.data, args)][:n]
        crops = simsiam.FileCrops(simsiam.Images(torch.zeros(n), paths=paths), args)
        u = common.draws(0, "crop", 0, len(paths), 2, 23).numpy()

        def theirs(views) -> float:
            return rate(lambda: [views(Image.open(path).convert("RGB")) for path in paths],
                        len(paths))

        compare(f"loader: decode, crop, flip, 224 px, one core, {len(paths)} "
                + ("photographs" if options.photos else "generated JPEGs"), "images/s",
                ours=lambda: rate(lambda: [crops[key] for key in enumerate(u)], len(paths)),
                pil_with_colors=lambda: theirs(pil_views(args)),
                torchvision_with_colors=lambda: theirs(pil_views(args, True)))


@mock.patch.object(simsiam.FileCrops, "read", lambda crops, i: (crops.images.paths[i], 0))  # pixels
def augmentation(options) -> None:
    """One core each, from uint8 arrays and from PIL images in memory to normalized batches."""
    for recipe, batch, n in (("cifar", 2 * BATCH, 4 * BATCH), ("imagenet", BATCH // 4, BATCH // 2)):
        args = settings("--recipe", recipe, "--batch-size", str(batch))
        pixels = common.demo_images(n, 0)[0] if recipe == "cifar" else photographs(n)
        images = simsiam.Images(torch.zeros(n), pixels if recipe == "cifar" else None, pixels)
        pil, tv = (pil_loader(pixels, pil_views(args, x), batch, 2) for x in (False, True))

        def ours() -> None:
            for step, x, _ in simsiam.training_batches(images, 0, 2, 2, args):
                u = common.draws(0, "colour", step, 2 * batch, simsiam.COLOR_DRAWS)
                simsiam.augment(x, u, args)

        compare(f"augmentation: {args.image_size} px, one core", "views/s",
                ours=lambda: rate(ours, 2 * n), pil=lambda: rate(lambda: [*pil], 2 * n),
                torchvision=lambda: rate(lambda: [*tv], 2 * n))
    crops, u = simsiam.FileCrops(images, args), torch.rand(2 * batch, simsiam.COLOR_DRAWS)
    keys = [*enumerate(common.draws(0, "crop", 0, batch, 2, 23).numpy())]
    x = torch.cat([crops[key][0] for key in keys])
    found = rate(lambda: [crops[key] for key in keys], 2 * batch)
    print(f"augmentation: 224 px, in the loader process (crop, flip): {found:.4g} views/s")
    for y in map(x.to, options.devices):
        found = rate(lambda: simsiam.augment(y.float() / 255, u, args), 2 * batch)
        print(f"augmentation: 224 px, on the device (colors, blur, normalization), "
              f"{y.device}: {found:.4g} views/s", flush=True)


@torch.no_grad()
def lars_and_ema(options) -> None:
    """The loops do the same arithmetic parameter by parameter."""
    depth, size = (10, "mini") if QUICK else (50, "small")
    lr, decay, trust, m = 0.1, 1e-4, 0.001, 0.9  # ours
    for device in options.devices:
        params = [*common.resnet(depth).to(device).parameters()]
        for p in params:
            p.grad = torch.randn_like(p)
        lars, buffers = common.LARS(params, lr, decay), [torch.zeros_like(p) for p in params]

        def lars_loop() -> None:
            for p, b in zip(params, buffers):
                u = p.grad
                if p.ndim > 1:
                    u = u.add(p, alpha=decay)
                    w_norm, u_norm = p.norm(), u.norm()
                    u = u * torch.where((w_norm > 0) & (u_norm > 0), trust * w_norm / u_norm, 1.0)
                b.mul_(m).add_(u)
                p.add_(b, alpha=-lr)

        compare(f"lars: {len(params)} tensors of ResNet-{depth}, {device}", "steps/s",
                foreach=lambda: rate(lars.step), loop=lambda: rate(lars_loop))
        target, online = ([*common.vit(size).to(device).parameters()] for _ in range(2))
        compare(f"ema: {len(target)} tensors of ViT-{size}, {device}", "updates/s",
                foreach=lambda: rate(lambda: moco_v3.update_ema(target, online, m)),
                loop=lambda: rate(lambda: [t.mul_(m).add_(o, alpha=1 - m)
                                           for t, o in zip(target, online)]))


def precision(options) -> None:
    batch = BATCH // 2
    for device in options.devices:
        steps = {x: watch("simsiam", resnet18("simsiam", WIDTH, batch, device, x))[1]
                 for x in precisions(device)}
        compare(f"precision: step of simsiam.py, ResNet-18, width {WIDTH:g}, batch {batch}, "
                f"{device}", "images/s", **{x: partial(rate, steps[x], batch) for x in steps})


def share_of_product(title: str, step, batch: int, device: str, kind: str) -> None:
    """The arithmetic of a step (FlopCounterMode: matrix products and convolutions) per second, as
    a share of what one large product of matrices reaches."""
    n = 256 if QUICK else 2048 if device == "cpu" else 8192  # ours
    a = torch.randn(n, n, device=device, dtype={"bf16": torch.bfloat16}.get(kind))
    known, name = flop_counter.flop_registry, "_scaled_dot_product_flash_attention"
    for x in ("", "_backward"):  # torch 2.14 does not count attention on a CPU
        known[getattr(torch.ops.aten, f"{name}_for_cpu{x}")] = known[
            getattr(torch.ops.aten, f"{name}{x}")]
    with flop_counter.FlopCounterMode(display=False) as counter:
        step()
    flops = counter.get_total_flops()

    def product() -> float:
        # TF32 on a GPU, as in cuDNN's convolutions by default
        torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
        found = rate(lambda: a @ a, 2 * n**3 / 1e12)
        torch.set_float32_matmul_precision("highest")
        return found

    compare(f"{title}, batch {batch}, {flops / batch / 1e9:.4g} GFLOP per image, {device}",
            "TFLOP/s", step=lambda: rate(step, flops / 1e12),
            **{f"{kind}_product_of_{n}": product})


def share(options) -> None:
    for device in options.devices:
        for kind, name in itertools.product(precisions(device), SCRIPTS):
            step = watch(name, resnet18(name, WIDTH, BATCH, device, kind))[1]
            share_of_product(f"share: {name}.py, ResNet-18, width {WIDTH:g}, {kind}", step, BATCH,
                             device, kind)
        for method in PEERS if LIGHTLY else ():
            views = torch.randn(2, BATCH, 3, 32, 32, device=device)
            step = partial(Peer(method, WIDTH).to(device).step, views)
            share_of_product(f"share: lightly's {method}, fp32", step, BATCH, device, "fp32")


def big(options) -> None:
    """Recipe imagenet, --precision auto, as a share of the device's best rate."""
    archs = {"simsiam": ("resnet50", "resnet10"), "moco_v3": ("vit_small", "vit_mini")}
    for device, (name, arch) in itertools.product(options.devices, archs.items()):
        batch = 4 if QUICK else 8 if device == "cpu" else 256  # ours
        flags = (f"--recipe imagenet --batch-size {batch} --device {device} --arch {arch[QUICK]} "
                 f"--image-size {32 if QUICK else 224}").split()
        share_of_product(f"big: {name}.py, {arch[QUICK]}", watch(name, flags)[1], batch, device,
                         precisions(device)[0])


def profile(options) -> None:
    """Shares of the time of augmentation and training step. parts: time of the host; the backward
    pass is autograd::engine; forward, loss and EMA are the rest of train_step. Then operators."""
    vit = "--recipe cifar" + " --arch vit_mini --patch-size 8" * QUICK
    runs = [*((name, "") for name in SCRIPTS), ("moco_v3", vit)]
    for device, (name, extra) in itertools.product(options.devices, runs):
        _, step, augment = watch(name, [*resnet18(name, 0.25, BATCH, device), *extra.split()])
        with torch.profiler.profile() as profiler:
            began = now()
            for part, function in (("augment", augment), ("train_step", step)) * REPEATS:
                with torch.profiler.record_function(part):
                    function()
            micro = 1e6 * (now() - began)
        found = [x for x in profiler.key_averages() if "CPU" in str(x.device_type)]
        own = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
        shares = {x.key: getattr(x, own) / micro for x in found}
        products = {x for x in shares if any(y in x.lower() for y in ("conv", "mm", "attention"))}
        print(f"profile: {name}.py {extra or 'ResNet-18'}, {device}: convolutions and "
              f"matrix products {sum(shares[x] for x in products):.1%}")
        parts = {part: sum(x.cpu_time_total for x in found if x.key.startswith(part)) / micro
                 for part in ("augment", "train_step", "autograd::engine", "Optimizer.step")}
        print("    parts: " + ", ".join(f"{part} {x:.1%}" for part, x in parts.items()))
        shares["outside of operators"] = 1 - sum(shares.values())
        for x in sorted(shares.keys() - products, key=shares.get, reverse=True):
            if shares[x] >= 0.01:  # ours
                print(f"    {shares[x]:6.1%}  {x}", flush=True)


def sync_bn(options) -> None:
    """One process, in bfloat16 and channels_last. torch's SyncBatchNorm rejects CPU tensors."""
    for device in options.devices:
        shape = (16, 8, 8, 8) if QUICK or device == "cpu" else (256, 64, 56, 56)  # ResNet-50's
        x, dy = (torch.randn(shape, device=device).to(
            dtype=torch.bfloat16, memory_format=torch.channels_last) for _ in range(2))
        norms = {"ours": common.sync_batch_norm(nn.BatchNorm2d(shape[1])),
                 **({"torch_sync": nn.SyncBatchNorm(shape[1])} if device == "cuda" else {}),
                 "batch_norm": nn.BatchNorm2d(shape[1])}

        def run(name):
            norm = norms[name].to(device)
            with torch.autocast(device, torch.bfloat16):
                y = norm(x.requires_grad_())
            return [y, *torch.autograd.grad(y, [x, norm.weight, norm.bias], dy)]

        dist.init_process_group("gloo" if device == "cpu" else "nccl", store=dist.HashStore(),
                                rank=0, world_size=1)
        # A number of processes that is 1 but compares like more, so that batch norm synchronizes.
        several = type("Several", (int,), {"__gt__": lambda *x: True, "__eq__": lambda *x: False})
        with mock.patch.object(dist, "get_world_size", lambda *group: several(1)):
            *others, expected = map(run, norms)
            for name, found in zip(norms, others):
                errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(found, expected)]
                print(f"sync_bn: {name} and batch_norm, {device}, largest relative difference: "
                      "y {:.1e}, dx {:.1e}, dweight {:.1e}, dbias {:.1e}".format(*errors))
            compare(f"sync_bn: {[*shape]}, {device}", "calls/s",
                    **{name: partial(rate, partial(run, name)) for name in norms})
        dist.destroy_process_group()


def main() -> None:
    global REPEATS
    parts = {function.__name__: function for function in (
        loop, peer, loader, augmentation, lars_and_ema, precision, share, big, profile, sync_bn)}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=parts, default=[*parts], metavar="PART", help="default: all")
    add("--quick", action="store_true", help="tiny sizes, to check that everything runs")
    add("--width", type=float, default=0.25, help="of ResNet-18 in loop and peer (default: 0.25)")
    add("--devices", nargs="+", choices=("cpu", "cuda"), help="default: all that are there",
        default=["cpu", "cuda"][:1 + torch.cuda.is_available()])
    add("--photos", help="of loader: a tree of photographs (default: generated)")
    add("--cifar", help="of peer: CIFAR-10 as train/ and val/ with a folder per class")
    add("--methods", nargs="+", choices=PEERS, default=[*PEERS], help="of peer")
    add("--precision", nargs="+", choices=("bf16", "fp32"), help="of our side in peer")
    add("--repeats", type=int, default=REPEATS, help=f"medians of so many (default: {REPEATS})")
    options = parser.parse_args()
    REPEATS = options.repeats
    cpu, threads = "CPU", torch.get_num_threads()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        cpu = next(x.split(":")[1].strip() for x in file if x.startswith("model name"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    commit = subprocess.getoutput(f'git -C "{ROOT}" describe --always --dirty --exclude="*"')
    print("quick: not for comparison\n" * QUICK +
          f"{cpu}, {os.cpu_count()} cores, {threads} threads, {gpu}, torch {torch.__version__}, "
          f"torchvision {torchvision.__version__}, commit {commit}, {time.strftime('%Y-%m-%d')}",
          flush=True)
    for name in options.only:
        torch.set_num_threads(1 if name in ("loader", "augmentation") else threads)
        parts[name](options)


if __name__ == "__main__":
    main()
