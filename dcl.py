"""DCL: Decoupled Contrastive Learning (Yeh, Hong, Hsu, Liu, Chen & LeCun, ECCV 2022).

Paper: https://arxiv.org/abs/2110.06848. The authors released no code. We had access to the abstract
and to equations and tables quoted by others; "recalled" marks what we know only from memory.
For an anchor, view k of image i in a batch of N images, with encoder f and projector g:

    z_ik = g(f(x_ik)) / |g(f(x_ik))|       # two views of each image: x [2N, 3, S, S] -> z [2N, d]
    s = <z_i1, z_i2>                       # the positive: the other view of the same image
    U = sum exp(<z_ik, z_jl> / tau)        # the negatives: both views of other images, 2 (N - 1)
    m = log U - s / tau                    # the margin of the negatives (m is our letter)

    InfoNCE = -log(P / (P + U))            # = softplus(m), with P = exp(s / tau); NT-Xent in SimCLR
    DCL     = -log(P / U)                  # = m: the positive leaves the denominator
    DCLW    = -w s / tau + log U           # w = 2 - exp(s / sigma) / mean exp(s / sigma)
    q_B     = U / (P + U)                  # = sigmoid(m): negative-positive coupling multiplier

As d softplus(m) = sigmoid(m) dm, the gradient of InfoNCE is that of DCL times q_B, for each anchor.
If the positive outweighs all negatives together, q_B is near 0: even the hardest of them hardly
moves. A small batch makes U and thus q_B small. DCL drops this factor. Its loss can be negative
and is not comparable to InfoNCE's. q_B is logged for every --loss. At temperature 0.5 it is near
1 for every batch size (our simulation), and the two losses hardly differ.

Our choices: a loss is the mean over the 2N anchors (the paper, as quoted: the sum); w has no
gradient (--dclw-backprop-weight adds it), its mean is over the global batch; both views are one
batch, so batch norm sees 2N images; kNN uses encoder features (paper: protocol unknown). The
ImageNet recipe is for the 65.9 %; 68.2 % needs tau 0.2, base lr 0.07 and BYOL's augmentation
(recalled). --queue works as MoCo v2's (arXiv:2003.04297), with this script's head and augmentation
and without MoCo's shuffled batch norm: queries are first views, keys are second views through a
momentum encoder, and the queue starts with random negatives.

    python dcl.py                                                 # built-in images, on any machine
    torchrun --nproc_per_node=8 dcl.py --data /data/imagenet      # ImageNet recipe, batch 256
    python dcl.py --data cifar10 --batch-size 32 --loss infonce   # small batches; or dcl, dclw
    python dcl.py --queue 256 --temperature 0.07 --out runs/queue  # negatives from a queue
    python dcl.py linear --init runs/dcl-demo/last.pt             # linear evaluation, same data
"""

import argparse
import collections
import copy
import dataclasses
import functools
import hashlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
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
    BLOCKS, LARS, all_gather, color_jitter, crop_boxes, demo_images, draws, effective_rank,
    feature_std, gather_with_grad, gaussian_blur, generator, grayscale, knn_accuracy, normalize,
    print0, rank, resized_crop, resnet, sync_batch_norm, to_device, world_size)

# ------------------------------------------------------------------------------------------ recipes

SCRIPT = "dcl"
ARCHS = tuple(f"resnet{depth}" for depth in BLOCKS)


@dataclasses.dataclass
class Pretrain:
    """The ImageNet recipe. Every field is also a flag: --temperature 0.2, --loss infonce. "quoted":
    from an article with the paper's tables; "recalled"; "unknown": our choice."""

    arch: Literal[ARCHS] = "resnet50"   # recalled
    width: float = 1.0                  # multiplies all channel counts
    small_images: bool = False          # 3x3 stem without pooling, for 32 px
    zero_init_residual: bool = False    # unknown: torchvision's default
    hidden_dim: int = 2048              # projector: two layers (recalled), width: ours
    dim: int = 128                      # d, of z (recalled)
    head_bn: bool = True                # batch norm in the hidden layer: unknown
    # the loss
    loss: Literal["infonce", "dcl", "dclw"] = "dcl"
    temperature: float = 0.1            # tau (recalled)
    sigma: float = 0.5                  # of w: lightly and others agree
    dclw_backprop_weight: bool = False  # as in lightly; paper: unknown
    negatives: Literal["global", "local"] = "global"  # of all processes, or of this one
    queue: int = 0                      # number of negatives from earlier batches: MoCo v2
    ema_momentum: float = 0.999         # of the queue's encoder: MoCo, arXiv:1911.05722
    # optimization: SGD
    epochs: int = 200                   # quoted
    batch_size: int = 256               # N, of all processes together (quoted)
    base_lr: float = 0.03               # lr = base_lr * batch_size / 256 (recalled, uncertain)
    warmup_epochs: int = 0              # unknown
    momentum: float = 0.9               # recalled, for CIFAR and STL-10
    weight_decay: float = 1e-4          # unknown. Also on BN and biases, as in lightly
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"  # auto: bf16 where native; ours
    # augmentation, the same for both views: SimCLR's, arXiv:2002.05709, App. A
    image_size: int = 224
    crop_min: float = 0.08              # smallest crop, as a fraction of the image's area
    jitter: tuple = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation, hue
    jitter_prob: float = 0.8
    gray_prob: float = 0.2
    blur_prob: float = 0.5
    mean: tuple = (0.485, 0.456, 0.406)  # of ImageNet: torchvision
    std: tuple = (0.229, 0.224, 0.225)
    knn_k: int = 200                    # of the kNN monitor: CLD's, see below
    knn_temperature: float = 0.1


@dataclasses.dataclass
class Linear:
    """Linear evaluation: ours. The paper uses OpenSelfSup's (recalled), settings unknown."""

    optimizer: Literal["larc", "sgd"] = "sgd"
    base_lr: float = 30.0
    epochs: int = 100
    batch_size: int = 256
    momentum: float = 0.9
    weight_decay: float = 0.0           # common.LARS is LARC only at 0
    crop_min: float = 0.08              # torchvision's default
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"


# The small data sets follow the benchmark of frank-xwang/CLD-UnsupervisedLearning (recalled), with
# its weight decay, augmentation, mean and std. ResNet-18: quoted. temperature, 3x3 stem: recalled.
CIFAR = Pretrain(
    arch="resnet18", small_images=True, hidden_dim=512, temperature=0.07, ema_momentum=0.99,
    weight_decay=5e-4, image_size=32, crop_min=0.2, jitter=(0.4, 0.4, 0.4, 0.4), jitter_prob=1.0,
    blur_prob=0.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
DEMO = dataclasses.replace(  # the CIFAR recipe, shrunk to run in a minute on two CPU cores: ours
    CIFAR, arch="resnet10", width=0.25, hidden_dim=256, temperature=0.1, epochs=3, batch_size=64,
    base_lr=0.5, crop_min=0.4, jitter=(0.4, 0.4, 0.4, 0.1), jitter_prob=0.8, std=(0.25, 0.25, 0.25))
RECIPES = {
    "pretrain": {"imagenet": Pretrain(), "imagenet100": Pretrain(), "cifar": CIFAR, "demo": DEMO,
                 "stl10": dataclasses.replace(CIFAR, image_size=96)},
    "linear": {"imagenet": Linear(), "imagenet100": Linear(), "cifar": Linear(crop_min=1),
               "stl10": Linear(crop_min=1), "demo": Linear(base_lr=3.0, epochs=30, crop_min=1)}}
ENCODER = ("arch", "width", "small_images", "zero_init_residual", "image_size", "mean", "std")

# ------------------------------------------------------------------------------------- augmentation

COLOR_DRAWS = 12  # uniform random numbers that augment takes for one view of one image


def augment(x: Tensor, u: Tensor, args) -> Tensor:
    """Color jitter, grayscale, blur and normalization (SimCLR's) of crops x [B, 3, S, S] in [0, 1],
    already flipped. u [B, COLOR_DRAWS]: uniform random numbers."""
    u_jitter, u_gray, u_blur = u.split([9, 1, 2], dim=1)
    x = color_jitter(x, u_jitter, args.jitter, args.jitter_prob)
    x = grayscale(x, u_gray[:, 0], args.gray_prob)
    x = gaussian_blur(x, u_blur, args.blur_prob, sigma=(0.1, 2.0))
    return normalize(x, args.mean, args.std)


# -------------------------------------------------------------------------------------------- model


def build_encoder(args) -> nn.Module:
    """The backbone, the part that is kept: images [B, 3, S, S] -> features [B, feature_dim]."""
    return resnet(int(args.arch.removeprefix("resnet")), args.width,
                  small_images=args.small_images, zero_init_residual=args.zero_init_residual)


class Contrast(nn.Module):
    """g(f(x)). queue > 0 adds a queue of this length and a momentum encoder for its keys."""

    def __init__(self, encoder: nn.Module, dim: int = 128, hidden_dim: int = 2048,
                 head_bn: bool = True, queue: int = 0):
        super().__init__()
        self.encoder = encoder
        norm = [nn.BatchNorm1d(hidden_dim)] if head_bn else []
        self.projector = nn.Sequential(nn.Linear(encoder.feature_dim, hidden_dim, bias=not norm),
                                       *norm, nn.ReLU(inplace=True), nn.Linear(hidden_dim, dim))
        self.register_buffer("queue", None)
        if queue:
            self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
            self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)
            self.queue = F.normalize(torch.randn(queue, dim), dim=1)
            self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both views of n images [2n, 3, S, S] -> z1, z2 [n, d], in one pass, so that batch norm
        sees both. With a queue: z of the first views and keys of the second ones."""
        if self.queue is None:
            return self.projector(self.encoder(x)).chunk(2)
        x1, x2 = x.chunk(2)
        with torch.no_grad():
            keys = self.key_projector(self.key_encoder(x2))
        return self.projector(self.encoder(x1)), keys

    @torch.no_grad()
    def enqueue(self, keys: Tensor, m: float) -> None:
        """Call after a step: update the momentum encoder (MoCo does so before the next keys, which
        gives the same keys), and replace the oldest keys in the queue by keys [n, d]."""
        update_ema([*self.key_encoder.parameters(), *self.key_projector.parameters()],
                   [*self.encoder.parameters(), *self.projector.parameters()], m)
        keys = all_gather(F.normalize(keys.to(self.queue.dtype), dim=1))
        place = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[place] = keys
        self.oldest.copy_((self.oldest + len(keys)) % len(self.queue))


def update_ema(target: list[Tensor], online: list[Tensor], m: float) -> None:
    """target = m * target + (1 - m) * online, in place, all tensors at once."""
    torch._foreach_lerp_(target, online, 1 - m)


# --------------------------------------------------------------------------------------------- loss


def margins(z1: Tensor, z2: Tensor, temperature: float,
            negatives: str = "global") -> tuple[Tensor, Tensor]:
    """m = log U - s / tau of the 2n anchors of this process, all first views first [2n],
    and the cosines s of its n pairs [n].

    z1, z2 [n, d]: embeddings of this process, not normalized; computed in float32 or better.
    negatives: "global", those of all processes (with gradient), or "local". The mean of m over
    processes is that of the global batch. Raises ValueError for one image, which has no negatives.
    """
    with torch.autocast(z1.device.type, enabled=False):  # bfloat16 would round the cosines
        z1, z2 = (F.normalize(z.float() if z.element_size() == 2 else z, dim=1, eps=1e-6)
                  for z in (z1, z2))
        first, second = (gather_with_grad(z) if negatives == "global" else z for z in (z1, z2))
        n, total = len(z1), len(first)
        if total < 2:
            raise ValueError("a batch of one image has no negatives")
        s = (z1 * z2).sum(dim=1)
        cosines = torch.cat([z1, z2]) @ torch.cat([first, second]).T  # [2n, 2N]
        # The anchor itself and its positive are not negatives, so their columns are masked.
        # Subtracting exp(1 / tau) from the sum instead would lose all precision.
        image = torch.arange(2 * n, device=s.device) % n + (rank() * n if total > n else 0)
        own = image[:, None] == torch.arange(2 * total, device=s.device) % total
        log_u = torch.logsumexp(cosines.masked_fill(own, -math.inf) / temperature, dim=1)
        return log_u - s.repeat(2) / temperature, s


def info_nce_loss(z1: Tensor, z2: Tensor, temperature: float, negatives: str = "global") -> Tensor:
    """InfoNCE (NT-Xent), softplus(m), averaged over the 2n anchors of this process. z1, z2 [n, d],
    not normalized -> []. It is log(2N - 1) if all z are equal."""
    return F.softplus(margins(z1, z2, temperature, negatives)[0]).mean()


def dcl_loss(z1: Tensor, z2: Tensor, temperature: float, negatives: str = "global") -> Tensor:
    """DCL, m: InfoNCE without the positive in the denominator. Same arguments as info_nce_loss. It
    can be negative, and is log(2N - 2) if all z are equal."""
    return margins(z1, z2, temperature, negatives)[0].mean()


def dclw_loss(z1: Tensor, z2: Tensor, temperature: float, sigma: float = 0.5,
              negatives: str = "global", backprop_weight: bool = False) -> Tensor:
    """DCLW: DCL with the weight w = 2 - exp(s / sigma) / mean exp(s / sigma) on each pair; the mean
    is over all processes. w is 1 on average, lower for easy pairs, and can be negative."""
    m, s = margins(z1, z2, temperature, negatives)
    pairs = gather_with_grad(s if backprop_weight else s.detach())
    w = 2 - len(pairs) * F.softmax(pairs / sigma, dim=0)
    w = w.unflatten(0, (-1, len(s)))[rank()]
    return (m + ((1 - w) * s / temperature).repeat(2)).mean()  # m already contains -s / tau


@torch.no_grad()
def npc_multiplier(z1: Tensor, z2: Tensor, temperature: float, negatives: str = "global") -> Tensor:
    """q_B = sigmoid(m) of the 2n anchors of this process, all first views first. z1, z2
    [n, d] -> [2n] in (0, 1)."""
    return margins(z1, z2, temperature, negatives)[0].sigmoid()


def queue_margins(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """m against a queue (MoCo v2): queries q [n, d], their keys k [n, d], and the queue [K, d]
    of unit vectors, the negatives -> [n]. Only q has a gradient."""
    with torch.autocast(q.device.type, enabled=False):
        q, k = (F.normalize(x.float() if x.element_size() == 2 else x, dim=1, eps=1e-6)
                for x in (q, k.detach()))
        cosines = q @ queue.detach().to(q.dtype).T
        return torch.logsumexp(cosines / temperature, dim=1) - (q * k).sum(dim=1) / temperature


# ----------------------------------------------------------------------------------------- training


def build_optimizer(model: Contrast, args) -> torch.optim.SGD:
    """SGD with weight decay on everything. (Adam or LARS would cancel the scale of q_B.)"""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0,
                           momentum=args.momentum, weight_decay=args.weight_decay,
                           fused=args.device.type in ("cpu", "cuda"))


def warmup_cosine(epoch: float, args) -> float:
    """Learning-rate factor: linear warm-up from 0, then half a cosine to 0, updated every step."""
    if epoch < args.warmup_epochs:
        return epoch / args.warmup_epochs
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return (1 + math.cos(math.pi * progress)) / 2


def loss_and_margins(z1: Tensor, z2: Tensor, queue: Tensor | None, args) -> tuple[Tensor, Tensor]:
    """The loss [] that --loss names, and the margins m [2n] (with a queue [n]), detached."""
    if args.loss == "dclw":
        with torch.no_grad():
            m, _ = margins(z1, z2, args.temperature, args.negatives)
        return dclw_loss(z1, z2, args.temperature, args.sigma, args.negatives,
                         args.dclw_backprop_weight), m
    if queue is None:
        m, _ = margins(z1, z2, args.temperature, args.negatives)
    else:
        m = queue_margins(z1, z2, queue, args.temperature)
    return (F.softplus(m) if args.loss == "infonce" else m).mean(), m.detach()


def train_step(model, optimizer, x: Tensor, epoch: float, args):
    """One step on both views x [2n, 3, S, S] -> loss [], z1 and z2 [n, d], and margins [2n] of this
    process, all detached. epoch may be fractional."""
    lr = args.base_lr * args.batch_size / 256  # linear scaling, of the global batch (recalled)
    for group in optimizer.param_groups:
        group["lr"] = lr * warmup_cosine(epoch, args)
    with autocast(args):
        z1, z2 = model(x)
    module = getattr(model, "module", model)  # unwrap DistributedDataParallel
    loss, m = loss_and_margins(z1, z2, module.queue, args)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if args.queue:
        module.enqueue(z2, args.ema_momentum)
    return loss.detach(), z1.detach(), z2.detach(), m


def coupling(m: Tensor) -> dict[str, float]:
    """Statistics of q_B and of both losses from margins m [steps, anchors] on the CPU: means over
    the steps. q_std and q_cv (the coefficient of variation) are taken within a step."""
    m = m.double()
    q = m.sigmoid()
    mean, std = q.mean(dim=1), q.std(dim=1, correction=0)
    found = {"q_mean": mean, "q_std": std, "q_cv": std / mean.clamp(min=1e-38),  # not 0 / 0
             "q_below_0.1": (q < 0.1).double(), "dcl": m, "infonce": F.softplus(m)}
    return {name: x.mean().item() for name, x in found.items()}


def pretrain(args) -> None:
    data = load_data(args)
    per_epoch = data.size // args.batch_size  # drops the last, incomplete batch
    total = args.epochs * per_epoch
    if args.queue % args.batch_size or args.queue >= per_epoch * args.batch_size:
        sys.exit(f"--queue {args.queue}: must be a multiple of --batch-size {args.batch_size}, and "
                 f"less than {per_epoch * args.batch_size}, or an image would be its own negative")
    if args.queue and args.loss == "dclw":
        sys.exit("--loss dclw does not support --queue: use infonce or dcl, or --queue 0")
    images = args.batch_size // (world_size() if args.negatives == "local" else 1)
    if images < 2:
        sys.exit("--negatives local needs at least two images per process: raise --batch-size")
    model = Contrast(load_encoder(args), args.dim, args.hidden_dim, args.head_bn, args.queue)
    net = distribute(model, args)
    optimizer = build_optimizer(model, args)
    negatives = args.queue or 2 * (images - 1)
    print0(f"{args.loss}: {negatives} negatives per anchor. Loss at chance: InfoNCE "
           f"{math.log(negatives + 1):.2f}, DCL {math.log(negatives):.2f}")
    # At these steps we log a histogram of q_B: 50 bins, about the last 4096 anchors. Ours.
    marks = {max(1, round(share * total)): share for share in (0.01, 0.1, 0.5, 1.0)}
    recent = collections.deque(maxlen=math.ceil(4096 / args.batch_size / (1 if args.queue else 2)))
    start, stop = resume(model, optimizer, total, args)
    if start == 0 and args.knn_every:
        log_knn(model.encoder, 0, 0, data, args)
    since, step, logged, began, saved = [], start, start, time.time(), time.time()
    for step, crops, _ in training_batches(data.train, start, stop, 2, args):
        u = draws(args.seed, "colour", step, args.batch_size, 2, COLOR_DRAWS)
        x = augment(crops, u.transpose(0, 1).flatten(0, 1), args)  # u [2b, 12]
        loss, z1, z2, m = train_step(net, optimizer, x, step / per_epoch, args)
        since.append(m)
        recent.append(m)
        step += 1
        if step == 1:
            save_views(torch.cat([view[:8] for view in x.chunk(2)]), data.train, args)
        if step in marks:
            q = all_gather(torch.cat([*recent])).float().sigmoid().cpu()
            log(args, epoch=step / per_epoch, step=step, share=marks[step],
                q_histogram=torch.histc(q, bins=50, min=0, max=1).int().tolist())
        epoch, left = divmod(step, per_epoch)
        if step in (1, stop) or 0 in (left, step % args.log_every) or STOP and world_size() == 1:
            loss, halt = agree(loss, model)  # only logged steps wait for the GPU
            z, seconds = all_gather(z1)[:512].cpu(), (time.time() - began) / (step - logged)
            std, dimensions = feature_std(z), effective_rank(z)
            found = coupling(all_gather(torch.stack(since, dim=1)).T.cpu())  # since the last line
            if args.loss == "dclw":
                s = all_gather(F.cosine_similarity(z1, z2))
                w = 2 - len(s) * F.softmax(s / args.sigma, dim=0)
                found |= {"w_min": w.min().item(), "w_mean": w.mean().item()}
            log(args, epoch=step / per_epoch, step=step, loss=loss,
                lr=optimizer.param_groups[0]["lr"], std=std, rank=dimensions, **found,
                images_per_s=args.batch_size / seconds, minutes_left=(stop - step) * seconds / 60)
            if left == 0 and args.knn_every and (epoch % args.knn_every == 0 or step == total):
                log_knn(model.encoder, epoch, step, data, args)
            if halt or step == stop or time.time() - saved > 60 * (args.save_every if left else 1):
                save(model, model.encoder, optimizer, step, args)
                saved = time.time()
            if halt:
                break
            since, logged, began = [], step, time.time()
    summarize(step, total, args)
    if step > start and args.batch_size > 8 and (std < 0.1 or dimensions < 2):  # thresholds: ours
        print0("The output has collapsed to nearly a point (std 0) or a line (rank 1).")


# -------------------------------------------------------------------------------- linear evaluation


def linear(args) -> None:
    """Train a linear classifier on the frozen encoder: crops, flips, cosine decay per epoch."""
    data = load_data(args)
    if data.val is None:
        sys.exit(f"linear needs labels: {args.data} has no train/ and val/ with a folder per class")
    encoder = load_encoder(args).requires_grad_(False).eval()
    fc = nn.Linear(encoder.feature_dim, data.num_classes)
    nn.init.normal_(fc.weight, std=0.01)  # SimSiam's and MoCo v3's code
    nn.init.zeros_(fc.bias)
    net = distribute(fc, args)
    lr = args.base_lr * args.batch_size / 256
    opt = torch.optim.SGD if args.optimizer == "sgd" else functools.partial(LARS, exclude_1d=False)
    optimizer = opt(fc.parameters(), lr=lr, momentum=args.momentum, weight_decay=args.weight_decay)
    per_epoch = data.size // args.batch_size
    total = args.epochs * per_epoch
    start, stop = resume(fc, optimizer, total, args)
    h, y = features(encoder, data.val, args)  # once, as the encoder is frozen
    step, logged, began, saved = start, start, time.time(), time.time()
    for step, crops, labels in training_batches(data.train, start, stop, 1, args):
        progress = step // per_epoch / args.epochs
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * progress)) / 2
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


STAGES = {"pretrain": pretrain, "linear": linear}

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
