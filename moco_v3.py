"""MoCo v3: An Empirical Study of Training Self-Supervised Vision Transformers (Chen et al., 2021).

Paper: https://arxiv.org/abs/2104.02057. Sec., Alg., Fig., Table and App. refer to it; where it is
silent or differs we follow the authors' code, facebookresearch/moco-v3 at c349e6e, which produced
the published checkpoints. Algorithm 1:

    x1, x2 = aug(x), aug(x)              # two random views of a batch                  [N, 3, S, S]
    q1, q2 = f_q(x1), f_q(x2)            # queries: backbone, projector, predictor      [N, C]
    k1, k2 = f_k(x1), f_k(x2)            # keys: backbone, projector; no gradient       [N, C]
    L = ctr(q1, k2) + ctr(q2, k1)        # ctr(q, k) = 2 tau CE(q k^T / tau, 0 .. N-1)
    update f_q by AdamW (ViT) or LARS (ResNet) on L
    f_k = m * f_k + (1 - m) * f_q        # momentum encoder, from f_q's new weights

The negatives of a query are the keys of the other images, of all processes; there is no queue. Each
view has its own batch norm statistics (App. A), in f_k too. f_k is in train mode: its running
statistics come from its own batches, and only --init-encoder momentum_encoder uses them.

Algorithm 1 updates f_k after a step; the authors' code does so before the step's keys, with its m.
f_k starts as a copy of f_q, so both give the same keys if the update after step t uses the m of
step t + 1, as it does here. Their code does not have our last update (m = 1 by the cosine).

The code differs from the paper: m rises to 1 for ViTs too; ResNets have heads and recipes of their
own; linear evaluation has batch 1024 and one lr (paper: 4096, lr swept). This file differs from the
code: bfloat16 where the hardware supports it, not float16; a sampled blur kernel, not PIL's; colors
not rounded to 8 bits; a ViT takes both views in one pass; kNN. Our choices: ViT-BN's batch norms,
what LAMB excludes, Fig. 4's norms (absolute L2, the largest since the last line of the log).

    python moco_v3.py                                             # built-in images, on any machine
    torchrun --nproc_per_node=8 moco_v3.py --data /data/imagenet --batch-size 1024  # ViT-S
    torchrun --nproc_per_node=8 moco_v3.py --data /data/imagenet --arch resnet50    # 100 epochs
    python moco_v3.py --patch-projection learned --base-lr 0.03 --out runs/unstable  # Sec. 4
    python moco_v3.py linear --init runs/moco_v3-demo/last.pt     # linear evaluation, same data
    python moco_v3.py linear --init vit-s-300ep.pth.tar --data /data/imagenet  # authors' checkpoint
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
    BLOCKS, LARS, VITS, ViT, all_gather, color_jitter, crop_boxes, demo_images, draws,
    effective_rank, feature_std, gaussian_blur, generator, grayscale, knn_accuracy, normalize,
    print0, rank, resized_crop, resnet, solarize, sync_batch_norm, to_device, vit, world_size)

# ------------------------------------------------------------------------------------------ recipes

SCRIPT = "moco_v3"
ARCHS = (*(f"vit_{size}" for size in VITS), "vit_conv_small", "vit_conv_base",
         *(f"resnet{depth}" for depth in BLOCKS))


@dataclasses.dataclass
class Pretrain:
    """The ImageNet recipe of a ViT (authors' code). Every field is also a flag: --base-lr 1e-4."""

    arch: Literal[ARCHS] = "vit_small"  # vit_conv_*: convolutional stem, arXiv:2106.14881
    width: float = 1.0                  # of a ResNet: multiplies all channel counts
    small_images: bool = False          # a ResNet's 3x3 stem; test images are not cropped
    zero_init_residual: bool = True     # of a ResNet: authors' code
    patch_size: int = 16                # pixels, Table 2. vit_huge: 14. Sec. 6.3: 7
    heads: int = 0                      # 0: Table 2's. vit_small has 12 (timm's and DeiT's: 6)
    mlp_norm: Literal["layer", "batch"] = "layer"  # batch: ViT-BN, Sec. 6.3
    position: Literal["sincos", "learned", "none"] = "sincos"  # Sec. 6.2
    pooling: Literal["class", "mean", "mean-no-norm"] = "class"  # Sec. 6.2
    patch_projection: Literal["frozen", "learned", "batchnorm", "weightnorm"] = "frozen"  # Sec. 4.2
    projector_layers: int = 3
    hidden_dim: int = 4096              # of both heads
    dim: int = 256                      # C
    predictor: Literal["mlp", "none"] = "mlp"  # Sec. 6.2: none 75.5 %, mlp 76.5 %
    predictor_output_bn: bool = True
    bn: Literal["none", "default"] = "default"  # in the heads. Sec. 6.2: none 74.4 %, batch 2048
    # optimization
    optimizer: Literal["adamw", "lars", "lamb"] = "adamw"  # Sec. 4.1: lamb, lr 5e-4, decay 1e-3
    epochs: int = 300
    batch_size: int = 4096              # of all processes together
    base_lr: float = 1.5e-4             # lr = base_lr * batch_size / 256
    warmup_epochs: float = 40.0
    momentum: float = 0.9               # of LARS
    weight_decay: float = 0.1           # AdamW: also on norms and biases
    temperature: float = 0.2            # tau
    ema_momentum: float = 0.99          # m at the start. Sec. 6.2: 0, 0.9, 0.999
    ema_schedule: Literal["cosine", "constant"] = "cosine"  # to 1 at the end
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"  # auto: bf16 where native; ours
    grad_checkpoint: bool = False       # of a ViT: less memory, every block is computed twice
    clip_patch_grad: float = 0.0        # Sec. 4.2: limit on the patch projection's gradient. 0: off
    # augmentation; a pair is for the first and the second view: App. A, authors' code
    image_size: int = 224
    crop_min: float = 0.08              # smallest crop, as a fraction of the image's area
    jitter: tuple = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    jitter_prob: float = 0.8
    gray_prob: float = 0.2
    blur_prob: tuple = (1.0, 0.1)
    solarize_prob: tuple = (0.0, 0.2)
    mean: tuple = (0.485, 0.456, 0.406)  # of ImageNet
    std: tuple = (0.229, 0.224, 0.225)
    # monitors
    knn_every_steps: int = 50           # kNN within epochs. App. A: tens of iterations; 0: never
    knn_k: int = 200                    # and knn_temperature: arXiv:1805.01978, cited in App. A
    knn_temperature: float = 0.07


@dataclasses.dataclass
class Linear:
    """Linear evaluation on ImageNet of a ViT: the authors' code."""

    optimizer: Literal["sgd", "larc"] = "sgd"  # larc: SimSiam's
    base_lr: float = 3.0
    epochs: int = 90
    batch_size: int = 1024
    momentum: float = 0.9
    weight_decay: float = 0.0
    crop_min: float = 0.08              # torchvision's default
    init_encoder: Literal["encoder", "momentum_encoder"] = "encoder"  # which one of --init
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"


R50 = dataclasses.replace(  # authors' code. The heads differ from a ViT's
    Pretrain(), arch="resnet50", projector_layers=2, predictor_output_bn=False, optimizer="lars",
    epochs=100, base_lr=0.6, warmup_epochs=10.0, weight_decay=1e-6, temperature=1.0, crop_min=0.2)
SMALL = dict(  # 32 px: paper and code have no recipe; values from solo-learn, or ours
    small_images=True, image_size=32, crop_min=0.2, blur_prob=(0.0, 0.0),
    mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), knn_every_steps=20)
CIFAR = dataclasses.replace(  # ours
    Pretrain(), arch="vit_tiny", patch_size=4, epochs=800, batch_size=512, base_lr=5e-4, **SMALL)
CIFAR_RESNET = dataclasses.replace(  # solo-learn's; its lr is 0.3 at LARS trust coefficient 0.02
    R50, arch="resnet18", epochs=1000, batch_size=256, base_lr=6.0, temperature=0.2, **SMALL)
DEMO = dataclasses.replace(  # shrunk to run in a minute on two CPU cores: ours
    CIFAR, arch="vit_mini", patch_size=8, hidden_dim=512, dim=128, epochs=6, batch_size=96,
    base_lr=1e-2, warmup_epochs=0.9, ema_momentum=0.5, crop_min=0.75, solarize_prob=(0.0, 0.0),
    mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
CIFAR_LINEAR = Linear("sgd", 3.0, 100, 256, crop_min=1)  # ours: no crops
RECIPES = {
    "pretrain": {
        "imagenet": Pretrain(),  # vit_base too; for vit_large and vit_huge: our choice
        "imagenet-r50-100": R50,
        "imagenet-r50-300": dataclasses.replace(R50, epochs=300, base_lr=0.3),
        "imagenet-r50-1000": dataclasses.replace(
            R50, epochs=1000, base_lr=0.3, weight_decay=1.5e-6, ema_momentum=0.996),
        "cifar": CIFAR, "cifar-resnet": CIFAR_RESNET, "demo": DEMO,
        "stl10": dataclasses.replace(CIFAR, image_size=96),  # ours, both
        "stl10-resnet": dataclasses.replace(CIFAR_RESNET, image_size=96)},
    "linear": {
        "imagenet": Linear(), "demo": Linear(epochs=30, batch_size=256, crop_min=1.0),
        **{f"imagenet-r50-{epochs}": Linear(base_lr=0.1) for epochs in (100, 300, 1000)},
        **dict.fromkeys(("cifar", "stl10"), CIFAR_LINEAR),
        **{f"{x}-resnet": Linear("sgd", 0.1, 100, 256, crop_min=1) for x in ("cifar", "stl10")}}}
ENCODER = ("arch", "width", "small_images", "zero_init_residual", "patch_size", "heads", "mlp_norm",
           "position", "pooling", "patch_projection", "image_size", "mean", "std")

# ------------------------------------------------------------------------------------- augmentation

COLOR_DRAWS = 13  # uniform random numbers that augment takes for one view of one image


def augment(x: Tensor, u: Tensor, args) -> Tensor:
    """Color jitter, grayscale, blur, solarization, normalization (App. A) of crops x [2b, 3, S, S]
    in [0, 1], already flipped, first views first. u [2b, COLOR_DRAWS]: uniform random numbers."""
    u_jitter, u_gray, u_blur, u_solarize = u.split([9, 1, 2, 1], dim=1)
    blur, solar = (torch.tensor(pair, dtype=u.dtype).repeat_interleave(len(x) // 2)
                   for pair in (args.blur_prob, args.solarize_prob))  # [2b], on the CPU like u
    x = color_jitter(x, u_jitter, args.jitter, args.jitter_prob)
    x = grayscale(x, u_gray[:, 0], args.gray_prob)
    x = gaussian_blur(x, u_blur, blur, sigma=(0.1, 2.0))
    x = solarize(x, u_solarize[:, 0], solar)
    return normalize(x, args.mean, args.std)


# -------------------------------------------------------------------------------------------- model


def build_encoder(args) -> nn.Module:
    """The backbone, the part that is kept: images [N, 3, S, S] -> features [N, feature_dim]."""
    if args.arch.startswith("resnet"):
        return resnet(int(args.arch.removeprefix("resnet")), args.width,
                      small_images=args.small_images, zero_init_residual=args.zero_init_residual)
    *conv, size = args.arch.removeprefix("vit_").split("_")
    projection = "learned" if conv else args.patch_projection  # a conv stem is never frozen
    encoder = vit(size, args.image_size, args.patch_size, heads=args.heads,
                  stem="conv" if conv else "patch", mlp_norm=args.mlp_norm, position=args.position,
                  pooling=args.pooling, grad_checkpoint=getattr(args, "grad_checkpoint", False),
                  patch_projection="frozen" if projection == "frozen" else "learned")
    if projection == "batchnorm":  # Sec. 4.2: neither of the two helps
        encoder.patch_embed.norm = nn.BatchNorm2d(encoder.feature_dim)
    elif projection == "weightnorm":
        nn.utils.parametrizations.weight_norm(encoder.patch_embed.proj)
    args.heads = encoder.heads  # for encoder.json: timm's vit_small has 6
    return encoder


def head(layers: int, in_dim: int, hidden_dim: int, out_dim: int, bn: bool, output_bn: bool):
    """Linear (no bias), BN, ReLU, repeated. BN at the output has no scale and no shift."""
    modules = []
    for _ in range(layers - 1):
        norm = [nn.BatchNorm1d(hidden_dim)] if bn else []
        modules += [nn.Linear(in_dim, hidden_dim, bias=False), *norm, nn.ReLU(inplace=True)]
        in_dim = hidden_dim
    norm = [nn.BatchNorm1d(out_dim, affine=False)] if bn and output_bn else []
    return nn.Sequential(*modules, nn.Linear(in_dim, out_dim, bias=False), *norm)


class MoCoV3(nn.Module):
    """f_q = predictor(projector(encoder(x))), f_k = momentum_projector(momentum_encoder(x)). The
    defaults are a ViT's; a ResNet takes projector_layers=2, predictor_output_bn=False."""

    def __init__(self, encoder: nn.Module, dim: int = 256, hidden_dim: int = 4096,
                 projector_layers: int = 3, predictor: str = "mlp",
                 predictor_output_bn: bool = True, bn: str = "default"):
        super().__init__()
        bn = bn == "default"
        self.encoder = encoder
        self.projector = head(projector_layers, encoder.feature_dim, hidden_dim, dim, bn, True)
        self.predictor = nn.Identity()
        if predictor == "mlp":
            self.predictor = head(2, dim, hidden_dim, dim, bn, predictor_output_bn)
        self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.one_pass = "BatchNorm" not in repr(encoder)  # batch norm would mix the views

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Two views [N, 3, S, S] -> q1, q2, k1, k2 [N, C], and the features of x1, for the kNN."""
        views = [torch.cat([x1, x2])] if self.one_pass else [x1, x2]
        h1, h2 = torch.cat([self.encoder(x) for x in views]).chunk(2)
        q1, q2 = self.predictor(self.projector(h1)), self.predictor(self.projector(h2))
        with torch.no_grad():
            g1, g2 = torch.cat([self.momentum_encoder(x) for x in views]).chunk(2)
            k1, k2 = self.momentum_projector(g1), self.momentum_projector(g2)
        return q1, q2, k1, k2, h1.detach()

    @torch.no_grad()
    def update_momentum_encoder(self, m: float) -> None:
        """f_k = m * f_k + (1 - m) * f_q: all parameters of encoder and projector, no buffers."""
        update_ema([*self.momentum_encoder.parameters(), *self.momentum_projector.parameters()],
                   [*self.encoder.parameters(), *self.projector.parameters()], m)


def update_ema(target: list[Tensor], online: list[Tensor], m: float) -> None:
    """target = m * target + (1 - m) * online, in place, all tensors at once."""
    torch._foreach_lerp_(target, online, 1 - m)


# --------------------------------------------------------------------------------------------- loss


def contrastive_loss(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """ctr(q, k) of Alg. 1, InfoNCE: classify which of all processes' keys belongs to each query.
    q, k [N, C], row i is image i of this process -> [], averaged over its queries, in float32 or
    better. The mean over processes is the global batch's loss. Keys get no gradient. With 2 tau
    the gradient's scale is similar for different tau (Alg. 1)."""
    q, k = (x.float() if x.element_size() == 2 else x for x in (q, k))  # not in half precision
    with torch.autocast(q.device.type, enabled=False):  # bfloat16 would round the products
        q, k = F.normalize(q, dim=1), all_gather(F.normalize(k.detach(), dim=1))
        logits = q @ k.T / temperature  # [N, processes * N]
        labels = torch.arange(len(q), device=q.device) + rank() * len(q)  # this process's keys
        return 2 * temperature * F.cross_entropy(logits, labels)


def chance_and_floor(n: int, temperature: float) -> tuple[float, float]:
    """L if all n > 1 keys are equal, and its minimum, reached if positives have cosine 1 and
    negatives -1 / (n - 1) (Jensen's inequality). Not in the paper."""
    floor = math.log1p((n - 1) * math.exp(-n / (n - 1) / temperature))
    return 4 * temperature * math.log(n), 4 * temperature * floor


# ----------------------------------------------------------------------------------------- training


class LAMB(torch.optim.Optimizer):
    """Layer-wise adaptive Adam (You et al., arXiv:1904.00962, Alg. 2). At the t-th step of w:

        a = b1 * a + (1 - b1) * g;   b = b2 * b + (1 - b2) * g^2          # g: the gradient
        u = (a / (1 - b1^t)) / (sqrt(b / (1 - b2^t)) + eps) + weight_decay * w
        w = w - lr * (|w| / |u|) * u                          # the ratio is 1 if either norm is 0

    Biases and norms (1-D parameters) are neither decayed nor adapted, as in LARS: our choice.
    """

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-6, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for w in group["params"]:
                if w.grad is None:
                    continue
                state, g = self.state[w], w.grad
                if not state:
                    state.update(t=0, a=torch.zeros_like(w), b=torch.zeros_like(w))
                state["t"] += 1
                a = state["a"].lerp_(g, 1 - b1)
                b = state["b"].mul_(b2).addcmul_(g, g, value=1 - b2)
                u = a / (1 - b1 ** state["t"])
                u /= (b / (1 - b2 ** state["t"])).sqrt() + group["eps"]
                if w.ndim > 1:
                    u.add_(w, alpha=group["weight_decay"])
                    w_norm, u_norm = w.norm(), u.norm()
                    u *= torch.where((w_norm > 0) & (u_norm > 0), w_norm / u_norm, 1.0)
                w.add_(u, alpha=-group["lr"])
        return loss


def build_optimizer(model: MoCoV3, args) -> torch.optim.Optimizer:
    """AdamW for a ViT, with weight decay on everything; LARS for a ResNet."""
    params = [p for p in model.parameters() if p.requires_grad]  # without f_k and frozen layers
    fused = args.device.type in ("cpu", "cuda")
    kind = {"adamw": functools.partial(torch.optim.AdamW, fused=fused), "lamb": LAMB,
            "lars": functools.partial(LARS, momentum=args.momentum)}[args.optimizer]
    return kind(params, lr=0.0, weight_decay=args.weight_decay)


def warmup_cosine(epoch: float, args) -> float:
    """Learning-rate factor: linear warm-up from 0, then half a cosine to 0, updated every step."""
    if epoch < args.warmup_epochs:
        return epoch / args.warmup_epochs
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return (1 + math.cos(math.pi * progress)) / 2


def momentum_schedule(epoch: float, args) -> float:
    """m: half a cosine from its start to 1 over the whole run (authors' code), or constant."""
    if args.ema_schedule == "constant":
        return args.ema_momentum
    return 1 - (1 - args.ema_momentum) * (1 + math.cos(math.pi * epoch / args.epochs)) / 2


def first_and_last_layer(encoder: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters whose gradient norms are logged (Fig. 4): a ViT's patch projection (if frozen, the
    first block's qkv) and last block; a ResNet's first convolution and last block."""
    if not isinstance(encoder, ViT):
        return [encoder.conv1.weight], [*encoder.layer4[-1].parameters()]
    first = [p for p in encoder.patch_embed.parameters() if p.requires_grad]
    return first or [*encoder.blocks[0].attn.qkv.parameters()], [*encoder.blocks[-1].parameters()]


def train_step(model, optimizer, x1: Tensor, x2: Tensor, epoch: float, m: float, args):
    """One iteration of Algorithm 1; epoch may be fractional -> loss [], q1 [N, C], features of x1
    [N, feature_dim], gradient norms of first and last layer [2], all detached."""
    module = getattr(model, "module", model)
    lr = args.base_lr * args.batch_size / 256  # linear scaling
    for group in optimizer.param_groups:
        group["lr"] = lr * warmup_cosine(epoch, args)
    with autocast(args):
        q1, q2, k1, k2, h1 = model(x1, x2)
    loss = (contrastive_loss(q1, k2, args.temperature)  # crossed: query and key of different views
            + contrastive_loss(q2, k1, args.temperature))
    optimizer.zero_grad()
    loss.backward()
    norms = torch.stack([torch.stack(torch._foreach_norm([p.grad for p in layer])).norm()
                         for layer in first_and_last_layer(module.encoder)])
    if args.clip_patch_grad and isinstance(module.encoder, ViT):  # Sec. 4.2: helps if small enough
        nn.utils.clip_grad_norm_(module.encoder.patch_embed.parameters(), args.clip_patch_grad)
    optimizer.step()
    module.update_momentum_encoder(m)
    return loss.detach(), q1.detach(), h1, norms


def pretrain(args) -> None:
    data = load_data(args)
    model = MoCoV3(load_encoder(args), args.dim, args.hidden_dim, args.projector_layers,
                   args.predictor, args.predictor_output_bn, args.bn)
    net = distribute(model, args)
    optimizer = build_optimizer(model, args)
    per_epoch = data.size // args.batch_size  # drops the last, incomplete batch
    total = args.epochs * per_epoch
    start, stop = resume(model, optimizer, total, args)
    if start == 0 and args.knn_every:
        log_knn(model.encoder, 0, 0, data, args)
    chance, floor = chance_and_floor(args.batch_size, args.temperature)
    largest = torch.zeros(2, device=args.device, dtype=args.dtype)
    knn_every = args.knn_every_steps if args.knn_every and data.val is not None else 0
    queue = collections.deque(maxlen=max(1, per_epoch // 10) if knn_every else 0)
    step, logged, began, saved = start, start, time.time(), time.time()
    for step, crops, labels in training_batches(data.train, start, stop, 2, args):
        u = draws(args.seed, "colour", step, args.batch_size, 2, COLOR_DRAWS)
        x1, x2 = augment(crops, u.transpose(0, 1).flatten(0, 1), args).chunk(2)  # u [2b, 13]
        m = momentum_schedule((step + 1) / per_epoch, args)  # of the next step: see the docstring
        loss, q, h, norms = train_step(net, optimizer, x1, x2, step / per_epoch, m, args)
        torch.maximum(largest, norms, out=largest)  # since the last log line, so no spike is missed
        step += 1
        if step == 1:
            save_views(torch.cat([x1[:8], x2[:8]]), data.train, args)
        queue.append((h, labels))
        if knn_every and step % knn_every == 0 and len(queue) == queue.maxlen:
            log_queue_knn(model.encoder, queue, step / per_epoch, step, data.val, args)
        epoch, left = divmod(step, per_epoch)
        if step in (1, stop) or 0 in (left, step % args.log_every) or STOP and world_size() == 1:
            loss, halt = agree(loss, model)  # only logged steps wait for the GPU
            q, seconds = all_gather(q)[:512].cpu(), (time.time() - began) / (step - logged)
            std, dimensions, (first, last) = feature_std(q), effective_rank(q), largest.tolist()
            log(args, epoch=step / per_epoch, step=step, loss=loss,
                lr=optimizer.param_groups[0]["lr"], std=std, rank=dimensions, chance=chance,
                floor=floor, grad_first=first, grad_last=last, m=m,
                images_per_s=args.batch_size / seconds, minutes_left=(stop - step) * seconds / 60)
            largest.zero_()
            if left == 0 and args.knn_every and (epoch % args.knn_every == 0 or step == total):
                log_knn(model.encoder, epoch, step, data, args)
            if halt or step == stop or time.time() - saved > 60 * (args.save_every if left else 1):
                save(model, model.encoder, optimizer, step, args)
                saved = time.time()
            if halt:
                break
            logged, began = step, time.time()
    summarize(step, total, args)
    report_dip(args)
    if step > start and args.batch_size > 8 and (std < 0.1 or dimensions < 2):  # thresholds: ours
        print0("The output has collapsed to nearly a point (std 0) or a line (rank 1).")


@torch.no_grad()
def log_queue_knn(encoder: nn.Module, queue, epoch: float, step: int, val, args) -> None:
    """The paper's kNN monitor within epochs (App. A). Its bank is a queue of the features [b,
    feature_dim] and labels [b] of the latest training batches, a tenth of the training set."""
    bank, labels = (all_gather(torch.cat(part)) for part in zip(*queue))
    bank, labels = bank[labels >= 0], labels[labels >= 0]  # STL-10 has unlabeled images
    every = math.ceil(len(val.labels) / 1000)  # at most 1,000 queries: ours, for speed
    val = Images(*(x if x is None else x[::every] for x in vars(val).values()))
    queries = features(encoder, val, args)
    encoder.train()
    k = min(args.knn_k, max(1, len(bank) // 20))  # ours, for a short queue
    accuracy = knn_accuracy(bank, labels, *queries, k, args.knn_temperature)
    log(args, epoch=epoch, step=step, knn_queue=accuracy)


def report_dip(args) -> None:
    """Print the largest drop of the kNN curve below its running maximum. A drop above the noise
    shows instability that the final accuracy hides (Sec. 4.1)."""
    lines = Path(args.out, "log.jsonl").read_text().splitlines() if rank() == 0 else []
    curve = [(x["step"], x["knn_queue"]) for x in map(json.loads, lines) if "knn_queue" in x]
    if curve:  # noise: three standard errors of 1,000 queries
        steps, knn = np.array(curve).T
        falls = np.maximum.accumulate(knn) - knn
        where = steps[falls.argmax()]
        print(f"largest drop of knn_queue: {falls.max():.1%}, at step {where:.0f}; noise: 4.7%")


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
