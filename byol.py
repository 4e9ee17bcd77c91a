"""BYOL: Bootstrap Your Own Latent, A New Approach to Self-Supervised Learning (Grill et al., 2020).

Paper: https://arxiv.org/abs/2006.07733 (35-page version). Sec., Eq., Table and App. refer to
it. Authors' code: google-deepmind/deepmind-research at f5de0ed, folder byol (JAX); where the two
differ we follow the code. Algorithm 1:

    v1, v2 = t(x), t'(x)               # two views, from two distributions          [B, 3, S, S]
    z1, z2 = g(f(v1)), g(f(v2))        # online: encoder f, projector g; weights theta    [B, d]
    t1, t2 = g'(f'(v1)), g'(f'(v2))    # target (z' in the paper): weights xi             [B, d]
    L = |q(z1) - t2|^2 + |q(z2) - t1|^2    # Eq. (2), each vector scaled to length 1; q: predictor
    update theta by LARS on L          # xi is a constant here
    xi = tau * xi + (1 - tau) * theta  # with the new theta; tau rises to 1 (Sec. 3.3)

No negatives. The output collapses without the predictor (Table 5b), and with tau = 0 unless the
predictor learns faster than the rest (Table 21). With an optimal predictor the gradient reduces
the variance of z' given z, and a constant z should be unstable (Sec. 3.2). xi averages only
parameters: the target is in train mode, with its own running statistics.

Differences from the authors' code: bfloat16 where supported; online and target start equal;
torchvision's bilinear crops, color operations and ResNet-18, -34; solarization from level 128 of
255; convolutions padded symmetrically; PyTorch's initialization; incomplete batches are dropped;
one lr for later stages (paper: tuned); --seed selects the labeled images; fine-tuning synchronizes
batch norm; kNN instead of an online classifier; the demo has batch norm after the projector.

    python byol.py                                             # built-in images, on any machine
    torchrun --nproc_per_node=8 byol.py --data /data/imagenet  # 1000 epochs (paper: 74.3 %)
    python byol.py --predictor none --out runs/collapse        # Table 5b; also --target, --beta
    python byol.py linear --init runs/byol-demo/last.pt        # linear evaluation, same data
    python byol.py finetune --init runs/byol-demo/last.pt --labels 0.01  # --init none: from scratch
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as vision

from common import (
    BLOCKS, LARS, VITS, all_gather, color_jitter, crop_boxes, demo_images, draws, effective_rank,
    feature_std, gather_with_grad, gaussian_blur, generator, grayscale, knn_accuracy, normalize,
    print0, rank, resized_crop, resnet, solarize, sync_batch_norm, to_device, vit, world_size)

# ------------------------------------------------------------------------------------------ recipes

SCRIPT = "byol"
ARCHS = (*(f"resnet{depth}" for depth in BLOCKS), *(f"vit_{size}" for size in VITS))


@dataclasses.dataclass
class Pretrain:
    """The paper's ImageNet recipe, 1000 epochs. Every field is also a flag: --base-lr 0.3."""

    arch: Literal[ARCHS] = "resnet50"
    width: float = 1.0                  # of a ResNet: multiplies all channel counts, Table 1
    small_images: bool = False          # 3x3 stem without pooling, for 32 px
    zero_init_residual: bool = True     # authors' code, for bottlenecks. The paper used False
    patch_size: int = 16                # of a ViT, pixels: arXiv:2104.02057, Table 2
    heads: int = 0                      # 0: arXiv:2104.02057, Table 2, 12 in vit_small
    patch_projection: Literal["frozen", "learned"] = "frozen"  # arXiv:2104.02057, Sec. 4.2
    hidden_dim: int = 4096              # of projector and predictor, authors' code
    dim: int = 256                      # d, authors' code
    output_bn: bool = False             # batch norm after the projector: ours, for the demo
    # optimization
    optimizer: Literal["lars", "adamw", "sgd"] = "lars"  # sgd as in lightly: lr 0.12, decay 5e-4
    epochs: int = 1000                  # Sec. 3.3
    batch_size: int = 4096              # of all processes together, Sec. 3.3
    base_lr: float = 0.2                # lr = base_lr * batch_size / 256. 0.4 at batch 512, App. G
    warmup_epochs: float = 10.0         # Sec. 3.3
    momentum: float = 0.9               # of LARS and SGD
    weight_decay: float = 1.5e-6        # not on norms and biases with LARS. Table 15: unstable at 0
    base_tau: float = 0.996             # Sec. 3.3; for other batch sizes see scaled_tau()
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"  # auto: bf16 where native; ours
    # augmentation; a pair is for t and t': App. B, Table 6
    image_size: int = 224
    crop_min: float = 0.08              # smallest crop, as a fraction of the image's area
    jitter: tuple = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    jitter_prob: float = 0.8
    gray_prob: float = 0.2
    blur_prob: tuple = (1.0, 0.1)
    solarize_prob: tuple = (0.0, 0.2)
    mean: tuple = (0.485, 0.456, 0.406)  # of ImageNet, authors' code
    std: tuple = (0.229, 0.224, 0.225)
    # ablations
    predictor: Literal["mlp", "none"] = "mlp"  # Table 5b: 0.2 % with none
    predictor_lr_mult: float = 1.0      # lambda, Table 21. With tau 0: 5.5 % at 1, 66.6 % at 10
    tau_schedule: Literal["cosine", "constant"] = "cosine"  # to 1, Sec. 3.3. Constant for tau 0
    target: Literal["ema", "online"] = "ema"  # online: theta itself, with gradient, Table 5b
    beta: float = 0.0                   # weight of negatives, Table 5b
    alpha: float = 0.1                  # their temperature, Table 19
    knn_k: int = 200                    # of the kNN monitor: ours, as in lightly
    knn_temperature: float = 0.1


@dataclasses.dataclass
class Linear:
    """Linear evaluation on ImageNet: the authors' code. Fine-tuning has the same fields."""

    init_encoder: Literal["encoder", "target_encoder"] = "encoder"  # which one of --init
    labels: str = "1.0"                 # fraction of the labels, or a file that lists images
    base_lr: float = 0.2                # authors' code. App. C.1: 0.4, 0.3, 0.2, 0.1 or 0.05
    epochs: int = 80
    batch_size: int = 4096              # App. C.1: 1024
    momentum: float = 0.9               # Nesterov
    weight_decay: float = 0.0
    crop_min: float = 0.08
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"


IMAGENET_300 = Pretrain(  # Sec. 5, all ablations. 100 and 40 epochs: authors' code
    epochs=300, base_lr=0.3, weight_decay=1e-6, base_tau=0.99)
CIFAR = Pretrain(  # authors' code for Imagenette; no blur: solo-learn; stem: lightly
    arch="resnet18", small_images=True, zero_init_residual=False, patch_size=4, batch_size=256,
    base_lr=2.0, weight_decay=1e-6, image_size=32, blur_prob=(0.0, 0.0),
    mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
DEMO = dataclasses.replace(  # the CIFAR recipe, shrunk to run in a minute on two CPU cores: ours
    CIFAR, arch="resnet10", width=0.25, patch_size=8, hidden_dim=512, dim=128, output_bn=True,
    epochs=3, batch_size=32, base_lr=4.0, warmup_epochs=0.5, base_tau=0.9, crop_min=0.4,
    solarize_prob=(0.0, 0.0), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
PRETRAIN = {
    "imagenet": Pretrain(), "imagenet-300": IMAGENET_300,
    "imagenet-100": dataclasses.replace(IMAGENET_300, epochs=100, base_lr=0.45),
    "imagenet-40": dataclasses.replace(IMAGENET_300, epochs=40, base_lr=0.45, base_tau=0.97),
    "imagenet-vit": dataclasses.replace(  # lr, decay: arXiv:2104.02057, Sec. 4.2; the rest: ours
        IMAGENET_300, arch="vit_small", optimizer="adamw", base_lr=1e-4, warmup_epochs=40.0,
        weight_decay=0.03),
    "cifar": CIFAR, "demo": DEMO, "stl10": dataclasses.replace(CIFAR, image_size=96)}  # ours
# App. C.1 sweeps lr 0.005, 0.01, 0.02, 0.05, 0.1 (our base_lr) and 30, 50 epochs. We chose these.
FINETUNE = Linear(labels="0.01", base_lr=0.02, epochs=50, batch_size=1024)
CIFAR_FINETUNE = dataclasses.replace(FINETUNE, base_lr=0.1, batch_size=50)  # ours
RECIPES = {
    "pretrain": PRETRAIN,
    "linear": dict.fromkeys(PRETRAIN, Linear()) | {
        **dict.fromkeys(("cifar", "stl10"), Linear(batch_size=256, crop_min=1)),  # ours: no crops
        "demo": Linear(base_lr=3.0, epochs=10, batch_size=256, crop_min=1.0)},  # ours: no crops
    "finetune": dict.fromkeys(PRETRAIN, FINETUNE) | {
        "cifar": CIFAR_FINETUNE, "stl10": CIFAR_FINETUNE,
        "demo": dataclasses.replace(FINETUNE, base_lr=1.0, epochs=30, batch_size=16, crop_min=0.4)}}
ENCODER = ("arch", "width", "small_images", "zero_init_residual", "patch_size", "heads",
           "patch_projection", "image_size", "mean", "std")

# ------------------------------------------------------------------------------------- augmentation

COLOR_DRAWS = 13  # uniform random numbers that augment takes for one view of one image


def augment(x: Tensor, u: Tensor, args) -> Tensor:
    """Color jitter, grayscale, blur, solarization and normalization (App. B) of crops
    x [2 * B, 3, S, S] in [0, 1], already flipped: t for the first half, t' for the second.
    u [2 * B, COLOR_DRAWS]: uniform random numbers."""
    u_jitter, u_gray, u_blur, u_solarize = u.split([9, 1, 2, 1], dim=1)
    prob = torch.tensor([args.blur_prob, args.solarize_prob], dtype=u.dtype)  # of t and of t'
    blur_prob, solarize_prob = prob.repeat_interleave(len(u) // 2, dim=1)
    x = color_jitter(x, u_jitter, args.jitter, args.jitter_prob)
    x = grayscale(x, u_gray[:, 0], args.gray_prob)
    x = gaussian_blur(x, u_blur, blur_prob, sigma=(0.1, 2.0))
    x = solarize(x, u_solarize[:, 0], solarize_prob)
    return normalize(x, args.mean, args.std)


# -------------------------------------------------------------------------------------------- model


def build_encoder(args) -> nn.Module:
    """f, the part that is kept: images [B, 3, S, S] -> features [B, feature_dim]."""
    if args.arch.startswith("resnet"):
        return resnet(int(args.arch.removeprefix("resnet")), args.width,
                      small_images=args.small_images, zero_init_residual=args.zero_init_residual)
    encoder = vit(args.arch.removeprefix("vit_"), args.image_size, args.patch_size,
                  heads=args.heads, patch_projection=args.patch_projection)
    args.heads = encoder.heads  # for encoder.json: timm's vit_small has 6
    return encoder


def mlp(in_dim: int, hidden_dim: int, out_dim: int, output_bn: bool = False) -> nn.Sequential:
    """g and q: authors' code. (App. J.2 has a bias at the output, too.)"""
    layers = [nn.Linear(in_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True),
              nn.Linear(hidden_dim, out_dim, bias=False)]
    return nn.Sequential(*layers, *[nn.BatchNorm1d(out_dim)] * output_bn)


class BYOL(nn.Module):
    """Online network predictor(projector(encoder(x))); target target_projector(target_encoder(x)).
    encoder: images [B, 3, S, S] -> [B, encoder.feature_dim]. Table 5b: predictor="none", p is z;
    target="online", the online network is its own target, with gradient."""

    def __init__(self, encoder: nn.Module, dim: int = 256, hidden_dim: int = 4096,
                 output_bn: bool = False, predictor: str = "mlp", target: str = "ema"):
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(encoder.feature_dim, hidden_dim, dim, output_bn)
        self.predictor = mlp(dim, hidden_dim, dim) if predictor == "mlp" else nn.Identity()
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.target = target
        self.one_pass = "BatchNorm" not in repr(encoder)  # batch norm would mix the views

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Two views [B, 3, S, S] -> p1, p2, t1, t2, and z1 detached for the monitors; [B, d]."""
        views = [torch.cat([x1, x2])] if self.one_pass else [x1, x2]
        h1, h2 = torch.cat([self.encoder(x) for x in views]).chunk(2)
        z1, z2 = t1, t2 = self.projector(h1), self.projector(h2)
        if self.target == "ema":
            with torch.no_grad():
                h1, h2 = torch.cat([self.target_encoder(x) for x in views]).chunk(2)
                t1, t2 = self.target_projector(h1), self.target_projector(h2)
        return self.predictor(z1), self.predictor(z2), t1, t2, z1.detach()

    def averaged(self) -> tuple[list[Tensor], list[Tensor]]:
        """xi, and the part of theta that it averages: no predictor, no buffers."""
        return ([*self.target_encoder.parameters(), *self.target_projector.parameters()],
                [*self.encoder.parameters(), *self.projector.parameters()])

    @torch.no_grad()
    def target_distance(self) -> float:
        """|theta - xi| / |theta|: how far the online network is ahead of its target."""
        xi, theta = self.averaged()
        ahead = torch.stack(torch._foreach_norm(torch._foreach_sub(theta, xi))).norm()
        return (ahead / torch.stack(torch._foreach_norm(theta)).norm()).item()


def update_ema(target: list[Tensor], online: list[Tensor], m: float) -> None:
    """target = m * target + (1 - m) * online, in place, all tensors at once."""
    torch._foreach_lerp_(target, online, 1 - m)


# --------------------------------------------------------------------------------------------- loss


def unit(x: Tensor) -> Tensor:
    """Rows of x [B, d] scaled to length 1, in float32 at least."""
    return F.normalize(x.float() if x.element_size() == 2 else x, dim=1, eps=1e-6)


def byol_loss(p: Tensor, z: Tensor, *, stop_grad: bool = True) -> Tensor:
    """One direction of Eq. (2), |p / |p| - z / |z||^2 = 2 - 2 cos(p, z), averaged over this
    process's images. p: predictions, z: the target's projections of the other view, [B, d] -> [].
    The loss is the sum of both (Sec. 3.1), 0 to 8, 4 at random; not their mean (App. F.5)."""
    return 2 - 2 * (unit(p) * unit(z.detach() if stop_grad else z)).sum(dim=1).mean()


def negatives_loss(p: Tensor, z: Tensor, z_same: Tensor, alpha: float) -> Tensor:
    """The term of Table 5b that beta weights: 2 alpha log sum exp(cos(p, .) / alpha), averaged over
    this process's images. The sum is over all processes' targets: all of the other view z, and all
    of the same view except the image's own (App. F.5); with gradient, if they have one. [B, d] each
    -> []. byol_loss + negatives_loss is 2 alpha InfoNCE + 2 (Table 19)."""
    with torch.autocast(p.device.type, enabled=False):  # bfloat16 would round the products
        p, z, z_same = unit(p), gather_with_grad(unit(z)), gather_with_grad(unit(z_same))
        own = torch.arange(len(p), device=p.device) + rank() * len(p)
        itself = own[:, None] == torch.arange(len(z), device=p.device)
        same = (p @ z_same.T / alpha).masked_fill(itself, -math.inf)
        return 2 * alpha * torch.logsumexp(torch.cat([p @ z.T / alpha, same], 1), dim=1).mean()


# ----------------------------------------------------------------------------------------- training


def build_optimizer(model: BYOL, args) -> torch.optim.Optimizer:
    """LARS; norms and biases get no weight decay and no adaptation (authors' code). Groups: f and
    g; q, whose lr can be scaled (Table 21). The target is not optimized."""
    f = [p for p in [*model.encoder.parameters(), *model.projector.parameters()] if p.requires_grad]
    groups = [{"params": f, "lr_mult": 1.0},
              {"params": [*model.predictor.parameters()], "lr_mult": args.predictor_lr_mult}]
    how = {"lr": 0.0, "weight_decay": args.weight_decay}
    if args.optimizer == "lars":
        return LARS(groups, **how, momentum=args.momentum)
    how["fused"] = args.device.type in ("cpu", "cuda")
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, **how)
    return torch.optim.SGD(groups, **how, momentum=args.momentum)


def warmup_cosine(epoch: float, args) -> float:
    """Learning-rate factor: linear warm-up from 0, then half a cosine to 0, updated every step."""
    if epoch < args.warmup_epochs:
        return epoch / args.warmup_epochs
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return (1 + math.cos(math.pi * progress)) / 2


def ema_tau(step: int, total_steps: int, base_tau: float) -> float:
    """tau at a step, counted from 0 (Sec. 3.3). It rises from base_tau at step 0 to 1 at step
    total_steps: 1 - (1 - base_tau) (cos(pi k / K) + 1) / 2."""
    return 1 - (1 - base_tau) * (math.cos(math.pi * step / total_steps) + 1) / 2


def scaled_tau(args) -> float:
    """Initial tau: --base-tau if changed, else the recipe's tau ** (batch_size / its batch_size)
    (arXiv:2307.13813). This turns 0.996 at 4096 into App. G's 0.9995 at 512."""
    recipe = RECIPES["pretrain"][args.recipe]
    given = args.base_tau != recipe.base_tau
    return args.base_tau ** (1 if given else args.batch_size / recipe.batch_size)


def train_step(model, optimizer, x1: Tensor, x2: Tensor, epoch: float, tau: float, args):
    """One iteration of Algorithm 1 -> loss [] and z1 [B, d], detached. epoch may be fractional."""
    lr = args.base_lr * args.batch_size / 256  # Sec. 3.3
    for group in optimizer.param_groups:
        group["lr"] = lr * warmup_cosine(epoch, args) * group["lr_mult"]
    with autocast(args):
        p1, p2, t1, t2, z1 = model(x1, x2)
    stop_grad = args.target == "ema"
    loss = byol_loss(p1, t2, stop_grad=stop_grad) + byol_loss(p2, t1, stop_grad=stop_grad)
    if args.beta:
        negatives = negatives_loss(p1, t2, t1, args.alpha) + negatives_loss(p2, t1, t2, args.alpha)
        loss = loss + args.beta * negatives
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        update_ema(*getattr(model, "module", model).averaged(), tau)  # with the new weights
    return loss.detach(), z1


def pretrain(args) -> None:
    data = load_data(args)
    model = BYOL(load_encoder(args), args.dim, args.hidden_dim, args.output_bn, args.predictor,
                 args.target)
    net = distribute(model, args)
    optimizer = build_optimizer(model, args)
    per_epoch = data.size // args.batch_size  # drops the last, incomplete batch
    total = args.epochs * per_epoch
    start, stop = resume(model, optimizer, total, args)
    base_tau = scaled_tau(args)
    chance = 4 + 4 * args.beta * args.alpha * math.log(2 * args.batch_size - 1)  # all cosines 0
    print0(f"loss at random: about {chance:.3g}; initial tau: {base_tau:.6g}")
    if start == 0 and args.knn_every:
        log_knn(model.encoder, 0, 0, data, args)
    step, logged, began, saved = start, start, time.time(), time.time()
    for step, crops, _ in training_batches(data.train, start, stop, 2, args):
        u = draws(args.seed, "colour", step, args.batch_size, 2, COLOR_DRAWS)
        x1, x2 = augment(crops, u.transpose(0, 1).flatten(0, 1), args).chunk(2)  # u [2b, 13]
        tau = ema_tau(step, total, base_tau) if args.tau_schedule == "cosine" else base_tau
        loss, z = train_step(net, optimizer, x1, x2, step / per_epoch, tau, args)
        step += 1
        if step == 1:
            save_views(torch.cat([x1[:8], x2[:8]]), data.train, args)
        epoch, left = divmod(step, per_epoch)
        if step in (1, stop) or 0 in (left, step % args.log_every) or STOP and world_size() == 1:
            loss, halt = agree(loss, model)  # only logged steps wait for the GPU
            z, seconds = all_gather(z)[:512].cpu(), (time.time() - began) / (step - logged)
            std, dimensions = feature_std(z), effective_rank(z)
            target = {"tau": tau, "target_distance": model.target_distance()}
            log(args, epoch=step / per_epoch, step=step, loss=loss,
                lr=optimizer.param_groups[0]["lr"], std=std, rank=dimensions,
                z_norm=z.norm(dim=1).mean().item(), **(target if args.target == "ema" else {}),
                images_per_s=args.batch_size / seconds, minutes_left=(stop - step) * seconds / 60)
            if left == 0 and args.knn_every and (epoch % args.knn_every == 0 or step == total):
                log_knn(model.encoder, epoch, step, data, args)
            if halt or step == stop or time.time() - saved > 60 * (args.save_every if left else 1):
                save(model, model.encoder, optimizer, step, args)
                saved = time.time()
            if halt:
                break
            logged, began = step, time.time()
    summarize(step, total, args)
    if step > start and args.batch_size > 8 and (std < 0.1 or dimensions < 1.5):  # ours
        print0("The output has collapsed to nearly a point (std 0, Table 5b) or a line (rank 1).")


# -------------------------------------------------------------------------------- linear evaluation


def labeled(images: "Images", args) -> "Images":
    """The labeled subset: a class-balanced random fraction (drawn with --seed), or the images in
    the file --labels, one per line, by file name or class/name."""
    if re.fullmatch(r"[\d.]+", args.labels):
        fraction = float(args.labels)
        if not 0 < fraction <= 1:
            sys.exit(f"--labels {args.labels}: must be above 0 and at most 1")
        order = torch.randperm(len(images.labels), generator=generator(args.seed, "labels"))
        parts = [order[images.labels[order] == k] for k in range(int(images.labels.max()) + 1)]
        # One random order for all fractions: the 10 % contain the 1 %, as in SimCLR's lists.
        each, rest = divmod(max(len(parts), round(fraction * len(order))), len(parts))
        more = torch.randperm(len(parts), generator=generator(args.seed, "more")) < rest
        picked = torch.cat([part[:each + one] for part, one in zip(parts, more)]).sort()[0]
        if fraction == 1:
            return images
    else:
        places = {}  # file name or class/name -> indices of its images
        for i, path in enumerate(() if images.paths is None else map(Path, images.paths)):
            for name in (path.name, f"{path.parent.name}/{path.name}"):
                places.setdefault(name, []).append(i)
        lines = [x.strip() for x in Path(args.labels).read_text().splitlines() if x.strip()]
        wrong = [x for x in lines if len(places.get(x, ())) != 1]
        if wrong or not lines:
            sys.exit(f"--labels {args.labels}: {len(wrong)} of {len(lines)} lines do not match "
                     f"exactly one training image, for example {wrong[:1]}")
        picked = torch.tensor(sorted({places[x][0] for x in lines}))
    if args.batch_size > len(picked):
        sys.exit(f"--batch-size {args.batch_size} exceeds the {len(picked)} labeled images")
    args.config["labeled"] = hashlib.blake2b(picked.numpy().tobytes(), digest_size=8).hexdigest()
    return Images(*(x if x is None else x[picked] for x in vars(images).values()))


def linear(args) -> None:
    """Train a linear classifier on the frozen encoder: crops, flips, cosine decay per step."""
    data = load_data(args)
    if data.val is None:
        sys.exit(f"linear needs labels: {args.data} has no train/ and val/ with a folder per class")
    train = labeled(data.train, args)
    encoder = load_encoder(args).requires_grad_(False).eval()
    fc = nn.Linear(encoder.feature_dim, data.num_classes)
    nn.init.normal_(fc.weight, std=0.01)  # ours, as in simsiam.py; authors' code: fan_in ** -0.5
    nn.init.zeros_(fc.bias)
    net = distribute(fc, args)
    lr = args.base_lr * args.batch_size / 256
    optimizer = torch.optim.SGD(fc.parameters(), lr=lr, momentum=args.momentum,
                                weight_decay=args.weight_decay, nesterov=args.momentum > 0)
    per_epoch = len(train.labels) // args.batch_size
    total = args.epochs * per_epoch
    start, stop = resume(fc, optimizer, total, args)
    h, y = features(encoder, data.val, args)  # once, as the encoder is frozen
    step, logged, began, saved = start, start, time.time(), time.time()
    for step, crops, labels in training_batches(train, start, stop, 1, args):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / total)) / 2
        with torch.no_grad(), autocast(args):
            features_of_crops = encoder(normalize(crops, args.mean, args.std))
        loss = F.cross_entropy(net(features_of_crops.to(args.dtype)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        left = step % per_epoch
        if step in (1, stop) or 0 in (left, step % args.log_every) or STOP and world_size() == 1:
            loss, halt = agree(loss.detach(), fc)
            seconds = (time.time() - began) / (step - logged)
            top1 = (fc(h).argmax(dim=1) == y).sum().item() / len(y)
            log(args, epoch=step / per_epoch, step=step, loss=loss, top1=top1,
                lr=optimizer.param_groups[0]["lr"], images_per_s=args.batch_size / seconds,
                minutes_left=(stop - step) * seconds / 60)
            if halt or step == stop or time.time() - saved > 60 * (args.save_every if left else 1):
                save(fc, encoder, optimizer, step, args)
                saved = time.time()
            if halt:
                break
            logged, began = step, time.time()
    summarize(step, total, args)


def finetune(args) -> None:
    """Train encoder and linear classifier (App. C.1): crops, flips, cosine decay per step."""
    data = load_data(args)
    if data.val is None:
        sys.exit(f"finetune needs labels: {args.data} has no train/ and val/ of class folders")
    train = labeled(data.train, args)
    encoder = load_encoder(args)
    fc = nn.Linear(encoder.feature_dim, data.num_classes)
    nn.init.normal_(fc.weight, std=0.01)  # as in linear()
    nn.init.zeros_(fc.bias)
    model = nn.Sequential(OrderedDict(encoder=encoder, fc=fc))
    net = distribute(model, args)
    lr = args.base_lr * args.batch_size / 256
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=args.momentum,
                                weight_decay=args.weight_decay, nesterov=args.momentum > 0)
    per_epoch = len(train.labels) // args.batch_size
    total = args.epochs * per_epoch
    start, stop = resume(model, optimizer, total, args)
    step, logged, began, saved = start, start, time.time(), time.time()
    for step, crops, labels in training_batches(train, start, stop, 1, args):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / total)) / 2
        with autocast(args):
            logits = net(normalize(crops, args.mean, args.std))
        loss = F.cross_entropy(logits.to(args.dtype), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        epoch, left = divmod(step, per_epoch)
        if step in (1, stop) or 0 in (left, step % args.log_every) or STOP and world_size() == 1:
            loss, halt = agree(loss.detach(), model)
            seconds = (time.time() - began) / (step - logged)
            log(args, epoch=step / per_epoch, step=step, loss=loss,
                lr=optimizer.param_groups[0]["lr"], images_per_s=args.batch_size / seconds,
                minutes_left=(stop - step) * seconds / 60)
            if step == total or left == 0 and args.knn_every and epoch % args.knn_every == 0:
                h, y = features(encoder, data.val, args)
                top1 = (fc(h).argmax(dim=1) == y).sum().item() / len(y)
                log(args, epoch=epoch, step=step, top1=top1)
                encoder.train()
            if halt or step == stop or time.time() - saved > 60 * (args.save_every if left else 1):
                save(model, encoder, optimizer, step, args)
                saved = time.time()
            if halt:
                break
            logged, began = step, time.time()
    summarize(step, total, args)


STAGES = {"pretrain": pretrain, "linear": linear, "finetune": finetune}

# ---------------------------------------------------------------------------------------- plumbing
# Everything below is identical in all five scripts. First the command line.

DATA_RECIPES = {"demo": "demo", "cifar10": "cifar", "cifar100": "cifar", "stl10": "stl10"}
AT_LEAST = {"width": 0.125, "batch_size": 2, "patch_size": 1, **dict.fromkeys(
                ("crop_min", "temperature", "sigma", "knn_temperature"), 0.001), **dict.fromkeys(
                ("epochs", "steps", "log_every", "image_size", "knn_k", "dim"), 1)}
STOP = []  # set by SIGTERM (SLURM, spot machines) or Ctrl-C: save at the next logged step and exit


def recipe(stage: str, name: str) -> dict:
    """All settings of a recipe: those of the stage and those of its encoder."""
    encoder = {field: getattr(RECIPES["pretrain"][name], field) for field in ENCODER}
    return {**encoder, **vars(RECIPES[stage][name])}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse the command line. Reads no files: unset options stay None until settle() sets them."""
    stage, *argv = argv if argv and argv[0] in STAGES else ["pretrain", *argv]
    parser = argparse.ArgumentParser(
        usage=f"{SCRIPT}.py [{'|'.join(STAGES)}] [flags]", description=__doc__, allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 40, 100))
    add = parser.add_argument
    add("--data", help="demo (default), cifar10, cifar100, stl10, or a folder: train/ and val/ "
                       "with a folder per class, or any tree of images")
    add("--data-root", help="where torchvision stores its data sets (default: data)")
    add("--recipe", choices=RECIPES[stage], help="default: that of --init, or the one for --data")
    add("--out", help=f"run folder (default: runs/{SCRIPT}-<data>[-<stage>]); resumes a run in it")
    add("--teacher" if stage == "distill" else "--init", dest="init", default="none",
        required=stage != "pretrain", help="last.pt of a run (later stages also read data and "
        "recipe from it), encoder.pt, the authors' checkpoint, torchvision's weights, or none")
    add("--steps", type=int, default=sys.maxsize, help="stop at this step; raise it to continue")
    add("--seed", type=int, default=0, help="for weights, data order and augmentation (default: 0)")
    add("--device", choices=("cpu", "cuda", "mps"), help="default: cuda if available, else cpu")
    add("--workers", type=int, help="data-loading workers per process (default: cores / processes)")
    add("--log-every", type=int, default=50, metavar="STEPS", help="default: 50")
    add("--knn-every", type=int, default=1, metavar="EPOCHS", help="default: 1; 0: never")
    add("--save-every", type=float, default=10, metavar="MINUTES", help="10 (at an epoch's end: 1)")
    rows = {name: recipe(stage, name) for name in RECIPES[stage]}
    types = Pretrain.__annotations__ | type(RECIPES[stage]["imagenet"]).__annotations__
    group = parser.add_argument_group("recipe", "imagenet's value; other recipes' if different")
    for name, value in rows["imagenet"].items():
        kind = ({"action": argparse.BooleanOptionalAction} if type(value) is bool else
                {"type": float, "nargs": len(value), "metavar": "X"} if type(value) is tuple else
                {"type": type(value), "choices": get_args(types[name]) or None})
        text = [str(value), *(f"{x} {rows[x][name]}" for x in rows if rows[x][name] != value)]
        group.add_argument("--" + name.replace("_", "-"), help=", ".join(text), **kind)
    return parser.parse_args(argv, argparse.Namespace(stage=stage))


def settle(args) -> argparse.Namespace:
    """Set the unset options, from the --init file or else from the recipe."""
    file = args.initial = {} if args.init == "none" else read_checkpoint(
        args.init, "--init takes a run's last.pt or encoder.pt, or the weights of an encoder")
    beside = Path(args.init).with_suffix(".json")  # next to encoder.pt
    about = json.loads(beside.read_text()) if beside.exists() else file.get("config", {}) | file
    defaults = {"data_root": "data"} | ({"data": "demo"} if args.stage == "pretrain" else {
        x: about[x] for x in ("data", "data_root", "recipe", *ENCODER) if x in about})
    vars(args).update({x: defaults[x] for x in defaults if getattr(args, x) is None})
    if args.data is None:
        sys.exit(f"{args.init} does not name a data set: use --data")
    if args.data not in DATA_RECIPES and not os.path.isdir(args.data):
        sys.exit(f"--data {args.data}: not a folder, and not one of {', '.join(DATA_RECIPES)}")
    if args.recipe not in RECIPES[args.stage]:
        kind = DATA_RECIPES.get(args.data, "imagenet")  # its first recipe for a ResNet or a ViT
        args.recipe = next((x for x, fields in RECIPES["pretrain"].items() if x.startswith(kind)
                            and (args.arch or fields.arch).startswith(fields.arch[:3])), kind)
    settings = recipe(args.stage, args.recipe)
    vars(args).update({x: settings[x] for x in settings if getattr(args, x) is None})
    if args.arch not in ARCHS:
        sys.exit(f"{args.init} contains {args.arch}, which {SCRIPT}.py does not support")
    for name, value in vars(args).items():
        most = 1 if name.endswith(("_prob", "_min", "momentum", "tau")) else math.inf
        for x in value if type(value) in (list, tuple) else [value]:
            if type(x) in (int, float) and not (least := AT_LEAST.get(name, 0)) <= x <= most:
                sys.exit(f"--{name.replace('_', '-')} {x}: must be between {least} and {most}")
    if vars(args).get("warmup_epochs", 0) >= args.epochs:
        sys.exit(f"--warmup-epochs {args.warmup_epochs}: must be less than --epochs {args.epochs}")
    name = os.path.basename(os.path.abspath(args.data))
    weights = file.get("state_dict", file.get("model", file)).values()
    data = b"".join(x.float().numpy().tobytes() for x in weights if torch.is_tensor(x))
    args.config = {x: getattr(args, x) for x in ("stage", "seed", *settings)} | {
        "data": name, "init": hashlib.blake2b(data, digest_size=8).hexdigest() if file else "none"}
    args.out = args.out or f"runs/{SCRIPT}-{name}" + f"-{args.stage}" * (args.stage != "pretrain")
    return args


# ---------------------------------------------------------------------------------------- processes


def setup(args) -> None:
    """Set up the device, process group, seed and run folder."""
    torchrun = os.environ if "RANK" in os.environ else {}
    if torchrun and not {"WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= torchrun.keys():
        sys.exit("RANK is set, but not by torchrun: start with torchrun, or unset RANK")
    local_rank, gpus = int(torchrun.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    args.device = torch.device(args.device or ("cuda" if gpus else "cpu"))
    if args.device.type == "cuda":
        if local_rank >= gpus:
            sys.exit(f"this machine has {gpus} GPUs: start fewer processes, or use --device cpu")
        args.device = torch.device("cuda", local_rank)
        torch.cuda.set_device(args.device)
        torch.backends.cudnn.benchmark = True
    if torchrun:
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo")
    if args.batch_size % world_size():
        sys.exit(f"--batch-size {args.batch_size} is not a multiple of {world_size()} processes")
    if args.workers is None:  # cores available to this process, maybe not all
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        args.workers = max(1, cores // int(torchrun.get("LOCAL_WORLD_SIZE", 1)))
    args.dtype = torch.float64 if args.precision == "fp64" else torch.float32
    torch.manual_seed(args.seed)  # the same initial weights in all processes
    os.makedirs(args.out, exist_ok=True)
    if rank() == 0:
        try:
            import fcntl
            lock = os.open(os.path.join(args.out, "lock"), os.O_CREAT | os.O_WRONLY)
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until the process ends
        except BlockingIOError:
            sys.exit(f"{args.out} is in use by another run: choose another --out")
        except (ImportError, OSError):  # Windows, or a file system without locks
            pass


def distribute(model: nn.Module, args) -> nn.Module:
    """Move the model to the device. With several processes: wrap it in DDP, synchronize BN."""
    model.to(args.device, args.dtype)
    return model if world_size() == 1 else nn.parallel.DistributedDataParallel(
        sync_batch_norm(model), broadcast_buffers=False)


def autocast(args):
    """bfloat16 autocast for the forward pass. auto: where native, and on a CPU only for ResNets."""
    native = (torch.cuda.is_bf16_supported(False) if args.device.type == "cuda" else
              args.device.type == "cpu" and args.arch.startswith("resnet")
              and torch.cpu._is_avx512_bf16_supported())
    enabled = args.precision == "bf16" or args.precision == "auto" and native
    return torch.autocast(args.device.type, torch.bfloat16, enabled=enabled)


def agree(loss: Tensor, model: nn.Module) -> tuple[float, bool]:
    """Mean loss over processes, and whether any was signaled to stop. Exits on divergence."""
    finite = torch.stack(torch._foreach_norm([*model.parameters()])).isfinite().all()
    mine = torch.tensor([[loss.item() if finite else math.nan, bool(STOP)]], dtype=torch.float64)
    loss, told = all_gather(mine).mean(dim=0).tolist()
    if not math.isfinite(loss):
        sys.exit("loss or weights are not finite: lower --base-lr (last.pt, if any, is intact)")
    return loss, told > 0


# --------------------------------------------------------------------------------------------- data


@dataclasses.dataclass
class Images:
    labels: Tensor                    # [n], -1 if unknown
    pixels: Tensor | None = None      # uint8 [n, 3, H, W] on the device, if they are in memory
    paths: np.ndarray | None = None   # [n] files, decoded by DataLoader workers if pixels is None


def load_data(args) -> argparse.Namespace:
    """Returns train and its size and, if there are labels, bank (for kNN), val and num_classes."""
    if args.data == "demo":
        train, val = (Images(labels, pixels.to(args.device)) for pixels, labels in (
            demo_images(4000, seed=0), demo_images(1000, seed=1)))
        bank = train
    elif args.data in DATA_RECIPES:
        if rank() == 0:
            torchvision_images(args, "train", download=True)
        all_gather(torch.zeros(1))  # wait for the download
        bank, val = torchvision_images(args, "train"), torchvision_images(args, "test")
        unlabeled = args.data == "stl10" and args.stage == "pretrain"
        train = torchvision_images(args, "train+unlabeled") if unlabeled else bank
    else:
        train, bank, val = folder_images(args)
    n, classes = len(train.labels), int(train.labels.max()) + 1
    if args.batch_size > n:
        sys.exit(f"{args.data} has {n} images: --batch-size {args.batch_size} must not exceed that")
    print0(f"{args.data}: {n} images, {f'{classes} classes' if classes else 'unlabeled'}")
    files = filter(os.path.exists, () if train.paths is None else train.paths[::n // 64 + 1])
    args.config |= {"images": n, "file_sizes": [*map(os.path.getsize, files)]}
    return argparse.Namespace(train=train, bank=bank, val=val, size=n, num_classes=classes)


def torchvision_images(args, split: str, download: bool = False) -> Images:
    stl = args.data == "stl10"
    part = {"split": split} if stl else {"train": split == "train"}
    try:
        d = vars(torchvision.datasets)[args.data.upper()](args.data_root, **part, download=download)
    except (OSError, RuntimeError) as error:
        sys.exit(f"cannot download {args.data} to --data-root {args.data_root}: {error}")
    pixels = torch.from_numpy(d.data if stl else d.data.transpose(0, 3, 1, 2).copy())
    return Images(torch.tensor(d.labels if stl else d.targets).long(), pixels.to(args.device))


def image_files(root: str, args) -> dict[str, str]:
    """Sorted image paths under root, each with its top-level folder. Skips hidden files."""
    found, seen = {}, {os.path.realpath(args.out)}  # visit each folder once, skip the run folder
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = sorted(x for x in folders if x[0] != "." and real not in seen)
        for x in files if real not in seen else ():
            if x[0] != "." and x.lower().endswith((".jpg", ".jpeg", ".png", ".webp")):
                found[os.path.join(folder, x)] = folder[len(root):].strip(os.sep).split(os.sep)[0]
        seen.add(real)
    if not found:
        sys.exit(f"{root}: no JPEG, PNG or WebP image (.jpg, .jpeg, .png, .webp) found")
    return dict(sorted(found.items()))


def folder_images(args) -> tuple[Images, Images | None, Images | None]:
    """train, bank and val. The class is the first folder below train/ or val/."""
    splits = [os.path.join(args.data, split) for split in ("train", "val")]
    if not all(map(os.path.isdir, splits)):
        print0(f"{args.data}: no train/ and val/, using all images in it without labels")
        return in_memory(image_files(args.data, args), {}, args), None, None
    train, val = (image_files(split, args) for split in splits)
    classes = {name: i for i, name in enumerate(sorted({*train.values()} - {""}))}
    if len(classes) < 2:
        print0(f"{splits[0]}: fewer than two class folders, using all images without labels")
        return in_memory(train, {}, args), None, None
    for path, name in (train | val).items():
        if name not in classes:
            sys.exit(f"{path}: its folder is not one of the {len(classes)} classes in train/")
    train, val = (in_memory(files, classes, args) for files in (train, val))
    every = max(1, round(len(train.labels) / 128_000))  # a tenth of ImageNet is enough for kNN
    return train, Images(*(x if x is None else x[::every] for x in vars(train).values())), val


def in_memory(files: dict[str, str], classes: dict[str, int], args) -> Images:
    """Keep small images of equal size in memory, like CIFAR's. Other images are read when used."""
    labels = torch.tensor([classes.get(name, -1) for name in files.values()])
    images, held = Images(labels, paths=np.array([*files])), []
    for i in range(len(labels)):
        held.append(FileCrops(images, args).read(i))
        x = held[-1][0]
        if max(x.shape) > 96 or x.shape != held[0][0].shape or len(labels) * x.numel() > 2**31:
            return images
    pixels, labels = map(torch.stack, zip(*held))
    return Images(labels, pixels.to(args.device), images.paths)


@dataclasses.dataclass
class FileCrops(Dataset):
    """Decode, crop, resize and flip files, in the DataLoader workers. A key is (index, u); u is
    [views, 23], or None for the center crop. Returns uint8 [views, 3, S, S] and the label."""

    images: Images
    args: argparse.Namespace

    def __getitem__(self, key) -> tuple[Tensor, Tensor]:
        index, u = key
        x, label = self.read(index)
        size = self.args.image_size
        if u is None:
            margin = 1 if self.args.small_images else 8 / 7  # resize to 256, crop to 224
            x = vision.resize(x, [round(size * margin)], antialias=True)
            return vision.center_crop(x, [size, size])[None], label
        views = []
        for *box, flip in zip(*crop_boxes(torch.from_numpy(u), *x.shape[1:], self.args.crop_min)):
            view = vision.resized_crop(x, *map(int, box), [size, size], antialias=True)
            views.append(view.flip(2) if flip else view)
        return torch.stack(views), label

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Pixels [3, H, W] and label. Replaces an unreadable file by the next one."""
        for i in (index + np.arange(10)) % len(self.images.labels):
            path = str(self.images.paths[i])
            try:  # decode_image cannot open names that are not UTF-8
                x = torchvision.io.decode_image(torch.from_numpy(np.fromfile(path, "u1")), "RGB")
                x = x if x.dtype == torch.uint8 else (x.int() >> 8).byte()  # 16-bit PNG
                if x.ndim == 3:  # animations have a fourth dimension
                    return x, self.images.labels[i]
            except (OSError, RuntimeError):
                pass
            warnings.warn(f"cannot read {path!a}: using the next file")
        raise OSError(f"ten unreadable files in a row, the last one {path!a}")


def batches(images: Images, plan, args):
    """For each (indices [b], u [b, views, 23]) in plan: crops [views * b, 3, S, S] in [0, 1], all
    first views first, and labels [b], on the device. u is None: center crops."""
    if images.pixels is None:
        keys = ([(i, None if u is None else u[k].numpy()) for k, i in enumerate(index.tolist())]
                for index, u in plan)
        for x, labels in DataLoader(FileCrops(images, args), batch_sampler=keys,
                                    num_workers=args.workers, worker_init_fn=ignore_signals,
                                    pin_memory=args.device.type == "cuda"):
            x = to_device(x, args.device).transpose(0, 1).flatten(0, 1)
            yield x.to(args.dtype) / 255, to_device(labels, args.device)
        return
    height, width = images.pixels.shape[2:]
    side = round(min(height, width) / (1 if args.small_images else 8 / 7))
    center = ((height - side) // 2, (width - side) // 2, side, side, False)
    for index, u in plan:
        boxes = ([torch.tensor(value).expand(len(index)) for value in center] if u is None else
                 crop_boxes(u.transpose(0, 1).flatten(0, 1), height, width, args.crop_min))
        x = images.pixels[to_device(index.repeat(len(boxes[0]) // len(index)), args.device)]
        crops = resized_crop(x.to(args.dtype) / 255, boxes, args.image_size)
        yield crops, to_device(images.labels[index], args.device)


def ignore_signals(worker: int) -> None:  # the parent saves, then stops its workers
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def training_batches(images: Images, start: int, stop: int, views: int, args):
    """For each step: its number, and this process's crops [views * b, 3, S, S] and labels [b]."""
    def plan():
        n = len(images.labels)
        for step in range(start, stop):
            epoch, i = divmod(step, n // args.batch_size)
            if i == 0 or step == start:
                order = torch.randperm(n, generator=generator(args.seed, "order", epoch))
            u = draws(args.seed, "crop", step, args.batch_size, views, 23)
            yield order[i * args.batch_size:][:args.batch_size].chunk(world_size())[rank()], u
    return ((step, *x) for step, x in zip(range(start, stop), batches(images, plan(), args)))


@torch.no_grad()
def features(encoder: nn.Module, images: Images, args) -> tuple[Tensor, Tensor]:
    """Features [n, feature_dim] of all center crops, in eval mode, and labels [n]; on all ranks."""
    encoder.eval()
    n, h, y = len(images.labels), [], []
    mine = (torch.arange(math.ceil(n / world_size())) * world_size() + rank()) % n
    for x, labels in batches(images, ((index, None) for index in mine.split(256)), args):
        with autocast(args):
            h.append(encoder(normalize(x, args.mean, args.std)).to(args.dtype))
        y.append(labels)
    parts = (all_gather(torch.cat(part)).unflatten(0, (world_size(), -1)) for part in (h, y))
    return tuple(part.transpose(0, 1).flatten(0, 1)[:n] for part in parts)


def log_knn(encoder: nn.Module, epoch: int, step: int, data, args):
    """Log the kNN accuracy on the validation images, if there are labels. Returns features(val)."""
    if data.val is not None:
        bank, queries = (features(encoder, images, args) for images in (data.bank, data.val))
        accuracy = knn_accuracy(*bank, *queries, args.knn_k, args.knn_temperature)
        log(args, epoch=epoch, step=step, knn=accuracy)
        encoder.train()
        return queries


# --------------------------------------------------------------------------------------- run folder


def log(args, **record) -> None:
    """Append a line to log.jsonl, and print its numbers."""
    if rank() == 0:
        with open(os.path.join(args.out, "log.jsonl"), "a") as file:
            file.write(json.dumps(record) + "\n")
        numbers = [f"{name} {x:.4g}" for name, x in record.items() if type(x) in (int, float)]
        print("  ".join(numbers) or args.out, flush=True)


def save_views(x: Tensor, images: Images, args) -> None:
    """Save views.png: the first n images, each above its views (x [2n, 3, S, S], normalized)."""
    if rank() == 0:
        order = torch.randperm(len(images.labels), generator=generator(args.seed, "order", 0))
        shown, _ = next(batches(images, [(order[:len(x) // 2], None)], args))
        mean, std = (x.new_tensor(values)[:, None, None] for values in (args.mean, args.std))
        x = F.interpolate(torch.cat([shown, x * std + mean]).float(), max(96, x.shape[-1]))
        torchvision.utils.save_image(x, os.path.join(args.out, "views.png"), nrow=len(x) // 3)


def save(model: nn.Module, encoder: nn.Module, optimizer, step: int, args) -> None:
    """Save last.pt, encoder.pt (for torchvision or timm), and its description encoder.json."""
    if rank() > 0:
        return
    run = {"step": step, "config": args.config, "recipe": args.recipe, "model": model.state_dict(),
           "optimizer": optimizer.state_dict(), "data_root": os.path.abspath(args.data_root),
           "data": args.data if args.data in DATA_RECIPES else os.path.abspath(args.data)}
    weights = {name: x.cpu().contiguous() for name, x in encoder.state_dict().items()}
    for name, state in {"last.pt": run, "encoder.pt": weights}.items():
        path = os.path.join(args.out, name)
        try:
            with open(path + ".tmp", "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(path + ".tmp", path)  # a crash while saving leaves the old file intact
        except (OSError, RuntimeError) as error:  # torch.save wraps some OSErrors in RuntimeError
            Path(path + ".tmp").unlink(missing_ok=True)
            sys.exit(f"cannot write {path}: {error}; the last checkpoint is intact")
    Path(args.out, "encoder.json").write_text(json.dumps({x: getattr(args, x) for x in ENCODER}))


def read_checkpoint(path: str, advice: str) -> dict:
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises many kinds of errors
        sys.exit(f"{path} cannot be read ({type(error).__name__}): {advice}")


def resume(model: nn.Module, optimizer, total: int, args) -> tuple[int, int]:
    """Load last.pt, if there is one, and cut the log back to it. Returns first and last step."""
    last, path, step = os.path.join(args.out, "last.pt"), Path(args.out, "log.jsonl"), 0
    args.config = json.loads(json.dumps(args.config))  # tuples become lists
    if os.path.exists(last):
        checkpoint = read_checkpoint(last, "delete it to start over")
        old, step = checkpoint.get("config", {}), checkpoint.get("step", 0)
        if names := [x for x in {**old, **args.config} if old.get(x) != args.config.get(x)]:
            sys.exit(f"{args.out} has a run with different {', '.join(names[:4])}: change --out")
        print0(f"{args.out}: continuing from step {step}")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    stop = max(step, min(total, args.steps))
    if all_gather(torch.tensor([step])).unique().numel() > 1:
        sys.exit(f"--out {args.out} must be one folder that all machines share")
    if rank() == 0 and (step == 0 or step < stop):
        lines = path.read_text().splitlines(keepends=True) if step and path.exists() else []
        lines = [x for x in lines if x.endswith("\n")]  # a killed run may leave a partial line
        path.write_text("".join(x for x in lines if json.loads(x).get("step", 0) <= step))
        git = f'git -C "{Path(__file__).parent}" describe --always --dirty --exclude="*"'
        failed, commit = subprocess.getstatusoutput(git)
        device = (torch.cuda.get_device_name() if args.device.type == "cuda" else
                  f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}")
        versions = {x.__name__: x.__version__ for x in (torch, torchvision, np)}
        log(args, config=args.config, versions={"python": sys.version.split()[0], **versions},
            hardware=f"{device}, {world_size()} processes of {torch.get_num_threads()} threads",
            command=shlex.join(sys.argv), commit=None if failed else commit)
    return step, stop


def summarize(step: int, total: int, args) -> None:
    """Print the last line of a run: folder, step, and the first and last accuracy in the log."""
    if rank() == 0:
        lines = [json.loads(x) for x in Path(args.out, "log.jsonl").read_text().splitlines()]
        found = [(name, x[name]) for x in lines for name in ("knn", "top1") if name in x]
        result = f", {found[0][0]} {found[0][1]:.1%} -> {found[-1][1]:.1%}" if found[1:] else ""
        print(f"{args.out}: step {step} of {total}{result}", flush=True)


def load_encoder(args) -> nn.Module:
    """Build the encoder and load --init, which must match. Ignores a classifier (fc, head)."""
    print0(f"--init {args.init}: {args.arch}, {args.image_size} px, --recipe {args.recipe}")
    try:
        encoder = build_encoder(args)
    except ValueError as error:
        sys.exit(f"--arch {args.arch}: {error}")
    if file := vars(args).pop("initial"):
        weights, ours = file.get("state_dict", file.get("model", file)), encoder.state_dict()
        which, stem = vars(args).get("init_encoder", "").removesuffix("encoder"), next(iter(ours))
        prefix = min((name.removesuffix(stem) for name in weights if name.endswith(stem)
                      and which in name), key=len, default=which)
        heads = (prefix + "fc.", prefix + "head.")
        weights = {name.removeprefix(prefix): x for name, x in weights.items() if torch.is_tensor(x)
                   and name.startswith(prefix) and not name.startswith(heads)}
        if wrong := [name for name in {**ours, **weights} if "num_batches_tracked" not in name and
                     getattr(ours.get(name), "shape", 0) != getattr(weights.get(name), "shape", 0)]:
            sys.exit(f"--init {args.init} does not fit --arch {args.arch}, width {args.width:g}, "
                     f"small_images {args.small_images}: {', '.join(wrong[:3])} differ")
        encoder.load_state_dict(weights, strict=False)
    # MPS: batch norm in channels_last has wrong gradients (pytorch #175189).
    fast = torch.contiguous_format if args.device.type == "mps" else torch.channels_last
    return encoder.to(args.device, args.dtype, memory_format=fast)


def main(argv: list[str] | None = None) -> int:
    def stop_soon(number, frame):
        STOP.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C exits at once
    args = parse_args(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, stop_soon)
    signal.signal(signal.SIGINT, stop_soon)
    try:
        setup(settle(args))
        STAGES[args.stage](args)
        if dist.is_initialized():
            time.sleep(0.2)  # torch 2.6's Gloo may deadlock if destroyed right after a collective
            dist.destroy_process_group()
        return 0
    except (KeyboardInterrupt, OSError) as error:  # OSError: disk or network failure
        sys.exit(str(error).strip().split("\n")[-1] or "interrupted: rerun the command to continue")
    except RuntimeError as error:
        if "shared memory" not in f"{error} {error.__cause__}":
            raise
        sys.exit("/dev/shm is too small: use --workers 0, or docker's --shm-size")
    finally:
        signal.signal(getattr(signal, "SIGCHLD", signal.SIGTERM), signal.SIG_DFL)
        for worker in torch.multiprocessing.active_children():  # they ignore SIGTERM
            worker.kill()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for file names that are not UTF-8
    main()
