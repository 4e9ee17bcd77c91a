"""SimCLR v2: Big Self-Supervised Models are Strong Semi-Supervised Learners (Chen et al., 2020).

Papers: https://arxiv.org/abs/2006.10029 ("v2") and https://arxiv.org/abs/2002.05709 ("v1", a recipe
of this script). "Authors' code": google-research/simclr at 383d414 (TensorFlow); "an author": in
its issues; "recalled": from memory, as we had no access to v2's appendices. Three stages:

    1. pretrain: x1, x2 = t(x), t'(x)    # two random views of N images              [N, 3, S, S]
       h = f(x); z = g(h)                # encoder f, head g; all 2N views in one pass    [2N, d]
       L_i = -log(exp(cos(z_i, z_j) / tau) / sum_k exp(cos(z_i, z_k) / tau))        # v1, Eq. (1)
                                         # j: the other view of i; k: all 2N views except i
    2. finetune: f_task(x) = W_task * ReLU(BN(W_1 * f(x)))     # W_1: g's first layer [N, classes]
                                         # cross-entropy, with 1 % or 10 % of the labels
    3. distill: L = -sum_y P_T(y | x) log P_S(y | x)           # P = softmax(f_task(x) / tau)
                                         # teacher T fixed, student S new; all images, no labels

--from-layer k puts the classifier on the head's k-th layer. k = 0 is the encoder's h, k = 1 the
output of the first linear layer, batch norm and ReLU, which fine-tuning also trains; the last is z.

z is gathered from all processes, with gradient, and batch norm is synchronized, also in the head:
all processes form one global batch. The loss is twice v1's mean, as in the authors' code. The
distillation loss is multiplied by tau^2 (their notebook; --no-tau-squared: not); with LARS this
affects norms and biases, but hardly the weights. v2's memory (--queue 65536) is off: the authors'
code lacks it. ResNet-50 reaches 71.7 % with it, 71.1 % without (an author). Our choices: both views
are queries and are enqueued, the momentum encoder is in train mode, the first queue is random.

Differences from the authors' code: bfloat16 where the hardware supports it; incomplete batches are
dropped (there: batches span epochs); He initialization (there: 1 / sqrt(fan_in)); torchvision's
crops and colors (there: bicubic, contrast around each channel's mean, saturation in HSV, one blur
sigma per batch; v1: brightness by an offset); symmetric padding of the max-pool; no projection in
the first shortcut of ResNet-18 and -34; fine-tuning uses a new classifier (their TensorFlow 2 code:
the online one, which has seen all labels) and trains the kept layer (TensorFlow 1 code: frozen).

    python simclr_v2.py                                             # built-in images, any machine
    torchrun --nproc_per_node=8 simclr_v2.py --data /data/imagenet --arch resnet152 --width 3 --sk
    torchrun --nproc_per_node=8 simclr_v2.py --data /data/imagenet --recipe imagenet-v1  # SimCLR v1
    python simclr_v2.py finetune --init runs/simclr_v2-demo/last.pt --labels 0.01        # stage 2
    python simclr_v2.py distill --teacher runs/simclr_v2-demo-finetune/last.pt           # stage 3
    python simclr_v2.py linear --init runs/simclr_v2-demo/last.pt   # linear evaluation, same data
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
    print0, rank, resized_crop, resnet, sync_batch_norm, to_device, vit, world_size)

# ------------------------------------------------------------------------------------------ recipes

SCRIPT = "simclr_v2"
ARCHS = (*(f"resnet{depth}" for depth in BLOCKS), *(f"vit_{size}" for size in VITS))


@dataclasses.dataclass
class Pretrain:
    """v2's ImageNet recipe. Every field is also a flag: --base-lr 0.1, --sk."""

    arch: Literal[ARCHS] = "resnet50"
    width: float = 1.0                  # of a ResNet, multiplies all channel counts. v2: 1 to 3
    sk: bool = False                    # selective kernels, ratio 0.0625: authors' code
    small_images: bool = False          # a ResNet's 3x3 stem without pooling, v1, App. B.9
    zero_init_residual: bool = True     # authors' code
    patch_size: int = 16                # of a ViT, pixels
    heads: int = 0                      # of a ViT. 0: arXiv:2104.02057, Table 2
    patch_projection: Literal["frozen", "learned"] = "frozen"  # of a ViT, arXiv:2104.02057, 4.2
    head_layers: int = 3                # v2, Sec. 3. 0: z is h
    dim: int = 128                      # d, authors' code
    # optimization
    temperature: float = 0.1            # tau, authors' code
    queue: int = 0                      # negatives from earlier batches. v2: 65536
    ema_momentum: float = 0.999         # of the queue's momentum encoder, v2, Sec. 3
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"  # v2, Sec. 3
    epochs: int = 800                   # v2, Sec. 3.1
    batch_size: int = 4096              # of all processes together, v2, Sec. 3.1
    lr_rule: Literal["sqrt", "linear"] = "sqrt"  # an author; see set_lr
    base_lr: float = 0.1                # an author
    warmup_epochs: float = 40.0         # 5 % of the epochs: an author
    momentum: float = 0.9               # of LARS and SGD, v2, Sec. 3
    weight_decay: float = 1e-4          # authors' code
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"  # auto: bf16 where native; ours
    # augmentation, the same for both views: v1, App. A
    image_size: int = 224
    crop_min: float = 0.08              # smallest crop, as a fraction of the image's area
    jitter: tuple = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation, hue: strength 1
    jitter_prob: float = 0.8
    gray_prob: float = 0.2
    blur_prob: float = 0.5
    mean: tuple = (0.0, 0.0, 0.0)       # pixels stay in [0, 1]: authors' code
    std: tuple = (1.0, 1.0, 1.0)
    knn_k: int = 200                    # of the kNN monitor: ours, as in lightly
    knn_temperature: float = 0.1


@dataclasses.dataclass
class Linear:
    """Linear evaluation on ImageNet: v1, App. B.5 and B.6."""

    labels: str = "1.0"                 # fraction of the labels, or a file that lists images
    from_layer: int = 0                 # of the head, see above
    optimizer: Literal["lars", "sgd", "adamw"] = "sgd"  # with Nesterov momentum
    lr_rule: Literal["sqrt", "linear"] = "linear"
    base_lr: float = 0.1                # lr 1.6 at batch 4096
    epochs: int = 90
    batch_size: int = 4096
    warmup_epochs: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 0.0           # authors' code: 1e-6; the paper: none
    crop_min: float = 0.08
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"


@dataclasses.dataclass
class Finetune(Linear):
    """Fine-tuning with 1 % of ImageNet's labels: v2, Sec. 3.1. For more labels and for larger
    networks published() changes epochs, from_layer and base_lr."""

    labels: str = "0.01"
    from_layer: int = 1
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"
    lr_rule: Literal["sqrt", "linear"] = "sqrt"
    base_lr: float = 0.005              # authors' code
    epochs: int = 60
    batch_size: int = 1024              # authors' code


@dataclasses.dataclass
class Distill:
    """Distillation on ImageNet: v2, Sec. 3.1. lr, warm-up, decay and batch as in stage 1: recalled.
    LARS: as in the authors' notebook (an author calls it "arbitrary")."""

    temperature: float = 1.0            # tau. For self-distillation: 0.1, see distill()
    tau_squared: bool = True            # loss times tau^2: authors' notebook; see above
    alpha: float = 1.0                  # weight of distillation; labels: 1 - alpha, recalled
    labels: str = ""                    # as in Linear, used if alpha < 1. "": the teacher's
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"
    lr_rule: Literal["sqrt", "linear"] = "sqrt"
    base_lr: float = 0.1
    epochs: int = 400
    batch_size: int = 4096
    warmup_epochs: float = 20.0         # 5 % of the epochs
    momentum: float = 0.9
    weight_decay: float = 1e-4
    crop_min: float = 0.08
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"


CIFAR = Pretrain(  # the command in the authors' code; jitter of strength 1/2, no blur: v1, App. B.9
    arch="resnet18", small_images=True, patch_size=4, temperature=0.5, epochs=1000, batch_size=512,
    lr_rule="linear", base_lr=1.0, warmup_epochs=10.0, image_size=32,
    jitter=(0.4, 0.4, 0.4, 0.1), blur_prob=0.0)
RECIPES = {  # entries without a source are our choice
    "pretrain": {
        "imagenet": Pretrain(),
        "imagenet-v1": Pretrain(  # v1, Sec. 6; temperature: recalled; base_lr for sqrt: 0.075
            head_layers=2, epochs=1000, lr_rule="linear", base_lr=0.3, warmup_epochs=10.0,
            weight_decay=1e-6),
        "imagenet-vit": Pretrain(  # lr and decay: MoCo v3's comparison, arXiv:2104.02057, Sec. 4.2
            arch="vit_small", optimizer="adamw", epochs=300, lr_rule="linear", base_lr=2e-4,
            weight_decay=0.1),
        "cifar": CIFAR, "stl10": dataclasses.replace(CIFAR, image_size=96),
        "demo": dataclasses.replace(  # shrunk to run in a minute on two CPU cores
            CIFAR, arch="resnet10", width=0.25, patch_size=8, temperature=0.1, epochs=3,
            batch_size=64, lr_rule="sqrt", base_lr=0.6, warmup_epochs=0.5, weight_decay=1e-6,
            crop_min=0.4, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))},
    "linear": {
        **dict.fromkeys(("imagenet", "imagenet-v1", "imagenet-vit"), Linear()),
        **dict.fromkeys(("cifar", "stl10"), Linear(epochs=100, batch_size=512)),  # authors' code
        "demo": Linear(base_lr=1.0, epochs=10, batch_size=250, crop_min=1.0)},  # whole shapes
    "finetune": {
        "imagenet": Finetune(),
        "imagenet-v1": Finetune("0.01", 0, "sgd", "linear", 0.05, 60, 4096),  # v1, App. B.5
        "imagenet-vit": Finetune("0.01", 0, "sgd", "linear", 0.05),
        **dict.fromkeys(("cifar", "stl10"), Finetune("0.01", 1, "sgd", "linear", 0.1, 60, 64)),
        "demo": Finetune(base_lr=0.01, batch_size=20, crop_min=1.0)},
    "distill": {
        "imagenet": Distill(),
        "imagenet-v1": Distill(lr_rule="linear", base_lr=0.3, weight_decay=1e-6),
        "imagenet-vit": Distill(
            optimizer="adamw", lr_rule="linear", base_lr=2e-4, epochs=300, weight_decay=0.1),
        **dict.fromkeys(("cifar", "stl10"), Distill(lr_rule="linear", base_lr=1.0, batch_size=512)),
        "demo": Distill(base_lr=0.2, epochs=5, batch_size=100, warmup_epochs=0.5,
                        weight_decay=1e-6, crop_min=1.0)}}
ENCODER = ("arch", "width", "sk", "small_images", "zero_init_residual", "patch_size", "heads",
           "patch_projection", "image_size", "mean", "std")

# ------------------------------------------------------------------------------------- augmentation

COLOR_DRAWS = 13  # uniform random numbers for one view of one image; augment uses the first 12


def augment(x: Tensor, u: Tensor, args) -> Tensor:
    """Color jitter, grayscale and blur (v1, App. A) of crops x [B, 3, S, S] in [0, 1], already
    flipped. u [B, COLOR_DRAWS]: uniform random numbers. Later stages only crop and flip."""
    u_jitter, u_gray, u_blur, _ = u.split([9, 1, 2, 1], dim=1)
    x = color_jitter(x, u_jitter, args.jitter, args.jitter_prob)
    x = grayscale(x, u_gray[:, 0], args.gray_prob)
    x = gaussian_blur(x, u_blur, args.blur_prob, sigma=(0.1, 2.0))
    return normalize(x, args.mean, args.std)


# -------------------------------------------------------------------------------------------- model


def build_encoder(args) -> nn.Module:
    """f, the part that is kept: images [B, 3, S, S] -> features h [B, feature_dim]."""
    if args.arch.startswith("resnet"):
        return resnet(int(args.arch.removeprefix("resnet")), args.width, 0.0625 * args.sk,
                      small_images=args.small_images, zero_init_residual=args.zero_init_residual)
    # A frozen patch projection stabilizes pre-training. Fine-tuning and distillation train it.
    projection = args.patch_projection if args.stage == "pretrain" else "learned"
    encoder = vit(args.arch.removeprefix("vit_"), args.image_size, args.patch_size,
                  heads=args.heads, patch_projection=projection)
    args.heads = encoder.heads  # for encoder.json: the number itself, not 0
    return encoder


def projection_head(in_dim: int, layers: int, dim: int) -> nn.Sequential:
    """g: h [B, in_dim] -> z [B, dim]. A layer is linear, batch norm, ReLU, as wide as its input.
    The last one has no ReLU, and its batch norm no bias (authors' code). 0 layers: z is h."""
    head = nn.Sequential()
    for layer in range(1, layers + 1):
        last = layer == layers
        out_dim = dim if last else in_dim
        linear, norm = nn.Linear(in_dim, out_dim, bias=False), nn.BatchNorm1d(out_dim)
        nn.init.normal_(linear.weight, std=0.01)  # authors' code
        norm.bias.requires_grad_(not last)
        head.append(nn.Sequential(linear, norm, *([] if last else [nn.ReLU(inplace=True)])))
    return head


class SimCLR(nn.Module):
    """g(f(x)). classes > 0 adds an online classifier on h, without gradient to the encoder.
    queue > 0 adds a momentum encoder and head, and a queue of that many of their keys (negatives).
    encoder: images [B, 3, S, S] -> h [B, encoder.feature_dim]."""

    def __init__(self, encoder: nn.Module, dim: int = 128, head_layers: int = 3, queue: int = 0,
                 classes: int = 0):
        super().__init__()
        self.encoder = encoder
        self.projector = projection_head(encoder.feature_dim, head_layers, dim)
        self.online = nn.Linear(encoder.feature_dim, classes) if classes else None
        if classes:
            nn.init.normal_(self.online.weight, std=0.01)  # authors' code
            nn.init.zeros_(self.online.bias)
        self.register_buffer("queue", None)
        if queue:
            self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
            self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)
            out_dim = dim if head_layers else encoder.feature_dim
            self.queue = F.normalize(torch.randn(queue, out_dim))
            self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor):
        """x [2N, 3, S, S], all first views first -> z1, z2 [N, d]; the momentum encoder's keys
        (k1, k2) of that shape, or None; the online logits [2N, classes], or None."""
        h = self.encoder(x)  # one pass: batch norm sees both views
        z1, z2 = self.projector(h).chunk(2)
        keys = None
        if self.queue is not None:
            with torch.no_grad():
                keys = self.key_projector(self.key_encoder(x)).chunk(2)
        return z1, z2, keys, None if self.online is None else self.online(h.detach())

    @torch.no_grad()
    def enqueue(self, keys: tuple[Tensor, Tensor], m: float) -> None:
        """Call after a step: update the momentum encoder and replace the oldest keys in the queue
        by those of both views of all processes."""
        torch._foreach_lerp_([*self.key_encoder.parameters(), *self.key_projector.parameters()],
                             [*self.encoder.parameters(), *self.projector.parameters()], 1 - m)
        keys = torch.cat([all_gather(F.normalize(k.to(self.queue), dim=1, eps=1e-6)) for k in keys])
        place = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[place] = keys
        self.oldest.copy_((self.oldest + len(keys)) % len(self.queue))


def task_network(encoder: nn.Module, kept: nn.Sequential, classes: int) -> nn.Sequential:
    """f_task (v2, Sec. 2): encoder, kept layers of the head, and a new linear classifier.
    Images [B, 3, S, S] -> logits [B, classes]."""
    fc = nn.Linear(kept[-1][0].out_features if len(kept) else encoder.feature_dim, classes)
    nn.init.zeros_(fc.weight)  # zero_init_logits_layer in the authors' commands
    nn.init.zeros_(fc.bias)
    return nn.Sequential(OrderedDict(encoder=encoder, projector=kept, fc=fc))


# --------------------------------------------------------------------------------------------- loss


def contrast_logits(z1: Tensor, z2: Tensor, temperature: float,
                    keys: tuple[Tensor, Tensor] | None = None,
                    queue: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cosines / tau of this process's anchors with all candidates, and each anchor's positive.

    z1, z2 [n, d] of one process -> logits [2n, 2N], positives [2n]. With z = (a, b) and N = 2:

               b1     b2     a1     a2        (): the positive, in column i + rank * n for image i
        a1   (a1b1)  a1b2    -inf   a1a2      -inf: an anchor is not a candidate for itself
        a2    a2b1  (a2b2)   a2a1   -inf
               a1     a2     b1     b2
        b1   (b1a1)  b1a2    -inf   b1b2
        b2    b2a1  (b2a2)   b2b1   -inf

    The columns are a and b of all processes, with gradient. If keys are given, they are the columns
    (without gradient), and queue [K, d] adds K negatives (our reading of v2's memory).
    """
    with torch.autocast(z1.device.type, enabled=False):  # bfloat16 would round the products
        z1, z2, *keys = (F.normalize(z.float() if z.element_size() == 2 else z, dim=1, eps=1e-6)
                         for z in (z1, z2, *(keys or ())))
        a, b = map(all_gather, keys) if keys else map(gather_with_grad, (z1, z2))
        logits = torch.cat([torch.cat([z1 @ b.T, z1 @ a.T], dim=1),
                            torch.cat([z2 @ a.T, z2 @ b.T], dim=1)])
        if queue is not None:
            logits = torch.cat([logits, torch.cat([z1, z2]) @ queue.detach().to(z1.dtype).T], dim=1)
        column = torch.arange(logits.shape[1], device=logits.device)
        positive = column[:len(z1)].repeat(2) + (rank() * len(z1) if len(a) > len(z1) else 0)
        itself = column == positive[:, None] + len(a)  # indexing would wait for the GPU
        return logits.masked_fill(itself, -math.inf) / temperature, positive


def nt_xent_loss(z1: Tensor, z2: Tensor, temperature: float,
                 keys: tuple[Tensor, Tensor] | None = None, queue: Tensor | None = None) -> Tensor:
    """NT-Xent (v1, Eq. 1, Alg. 1), averaged over 2n anchors. It is ln(2N - 1) if all z are equal.
    z1, z2 [n, d] of this process, not normalized -> [], in float32 or better. The mean over
    processes is the loss of the global batch. keys, queue: see contrast_logits."""
    return F.cross_entropy(*contrast_logits(z1, z2, temperature, keys, queue))


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """-sum_y P_T(y | x) log P_S(y | x) (v2, Sec. 2), averaged over the images. Logits [n, classes]
    -> [], in float32 at least. The teacher gets no gradient. The minimum is the teacher's entropy.
    The factor tau^2 is applied in distill_step."""
    student, teacher = (x.float() if x.element_size() == 2 else x
                        for x in (student_logits, teacher_logits.detach()))
    with torch.autocast(student.device.type, enabled=False):
        return F.cross_entropy(student / temperature, (teacher / temperature).softmax(dim=1))


# ----------------------------------------------------------------------------------------- training


def build_optimizer(model: nn.Module, args) -> torch.optim.Optimizer:
    """LARS with the lr inside the momentum. Norms and biases get no adaptation and no decay, a
    classifier's matrix no adaptation, except in distillation (authors' code and notebook). Nesterov
    SGD and AdamW decay everything but batch norms (authors' code)."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if args.optimizer == "lars":
        raw = [named.pop(name) for name in ("online.weight", "fc.weight")
               if name in named and args.stage != "distill"]
        groups = [{"params": [*named.values()]}]
        groups += [{"params": raw, "trust_coefficient": None}] if raw else []
        return LARS(groups, lr=0.0, weight_decay=args.weight_decay, momentum=args.momentum,
                    lr_in_momentum=True)
    norms = {p for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
             for p in module.parameters()}
    groups = [{"params": [p for p in named.values() if p not in norms]},
              {"params": [p for p in named.values() if p in norms], "weight_decay": 0.0}]
    how = dict(lr=0.0, weight_decay=args.weight_decay, fused=args.device.type in ("cpu", "cuda"))
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, **how)
    return torch.optim.SGD(groups, momentum=args.momentum, nesterov=args.momentum > 0, **how)


def warmup_cosine(epoch: float, args) -> float:
    """Learning-rate factor: linear warm-up from 0, then half a cosine to 0, updated every step."""
    if epoch < args.warmup_epochs:
        return epoch / args.warmup_epochs
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return (1 + math.cos(math.pi * progress)) / 2


def set_lr(optimizer, epoch: float, args) -> None:
    """Scale the lr by the number of images in the global batch, not of views (v1, App. B.1)."""
    scale = math.sqrt(args.batch_size) if args.lr_rule == "sqrt" else args.batch_size / 256
    for group in optimizer.param_groups:
        group["lr"] = args.base_lr * scale * warmup_cosine(epoch, args)


def train_step(model, optimizer, x: Tensor, labels: Tensor, epoch: float, args):
    """One step of stage 1. x: both views [2n, 3, S, S]; labels [n], -1 where unknown, for the
    online classifier; epoch may be fractional. Returns, detached, the loss [], z1 and z2 [n, d],
    and the online logits [2n, classes] or None."""
    module = getattr(model, "module", model)
    set_lr(optimizer, epoch, args)
    with autocast(args):
        z1, z2, keys, logits = model(x)
    # The authors' code adds the mean losses of the two views: a factor of 2. With LARS it affects
    # norms and biases, but the weights only through the balance with their decay.
    loss = 2 * nt_xent_loss(z1, z2, args.temperature, keys, module.queue)
    online = 0.0 if logits is None else F.cross_entropy(
        logits.to(args.dtype), labels.repeat(2), ignore_index=-1, reduction="sum") / len(logits)
    optimizer.zero_grad()
    (loss + online).backward()
    optimizer.step()
    if keys is not None:
        module.enqueue(keys, args.ema_momentum)
    return loss.detach(), z1.detach(), z2.detach(), None if logits is None else logits.detach()


def monitors(z1: Tensor, z2: Tensor, logits: Tensor | None, labels: Tensor) -> dict[str, float]:
    """Std and rank of z1; the fraction of anchors whose nearest candidate is their positive, and
    the online classifier's accuracy on labeled views. Over all processes."""
    guesses = [contrast_logits(z1, z2, 1.0)] + [(logits, labels.repeat(2))] * (logits is not None)
    counts = [[(x.argmax(dim=1) == y).sum().item(), (y >= 0).sum().item()] for x, y in guesses]
    right, known = all_gather(torch.tensor([counts], dtype=torch.float64)).sum(dim=0).T
    z = all_gather(z1)[:512].cpu()  # 512 images are enough for a monitor
    return {"std": feature_std(z), "rank": effective_rank(z), **dict(zip(
        ("contrast_top1", "online_train_top1"), (right / known.clamp(min=1)).tolist()))}


def pretrain(args) -> None:
    data = load_data(args)
    per_epoch = data.size // args.batch_size  # drops the last, incomplete batch
    if args.queue % (2 * args.batch_size) or 0 < 2 * per_epoch * args.batch_size <= args.queue:
        sys.exit(f"--queue {args.queue}: must be a multiple of {2 * args.batch_size} (the views "
                 "of a batch) and below an epoch's views, or an image would be its own negative")
    model = SimCLR(load_encoder(args), args.dim, args.head_layers, args.queue,
                   0 if data.val is None else data.num_classes)
    net = distribute(model, args)
    optimizer = build_optimizer(model, args)
    total = args.epochs * per_epoch
    start, stop = resume(model, optimizer, total, args)
    print0(f"loss {2 * math.log(2 * args.batch_size - 1 + args.queue):.2f} if all z are equal")
    if start == 0 and args.knn_every:
        log_knn(model.encoder, 0, 0, data, args)
    step, logged, began, saved = start, start, time.time(), time.time()
    for step, crops, labels in training_batches(data.train, start, stop, 2, args):
        u = draws(args.seed, "colour", step, args.batch_size, 2, COLOR_DRAWS)
        x = augment(crops, u.transpose(0, 1).flatten(0, 1), args)  # u [2b, 13]
        loss, *outputs = train_step(net, optimizer, x, labels, step / per_epoch, args)
        step += 1
        if step == 1:
            save_views(torch.cat([views[:8] for views in x.chunk(2)]), data.train, args)
        epoch, left = divmod(step, per_epoch)
        if step in (1, stop) or 0 in (left, step % args.log_every) or STOP and world_size() == 1:
            loss, halt = agree(loss, model)  # only logged steps wait for the GPU
            seen, seconds = monitors(*outputs, labels), (time.time() - began) / (step - logged)
            log(args, epoch=step / per_epoch, step=step, loss=loss,
                lr=optimizer.param_groups[0]["lr"], **seen,
                images_per_s=args.batch_size / seconds, minutes_left=(stop - step) * seconds / 60)
            if left == 0 and args.knn_every and (epoch % args.knn_every == 0 or step == total):
                if found := log_knn(model.encoder, epoch, step, data, args):
                    h, y = found
                    log(args, epoch=epoch, step=step, online_top1=accuracy(model.online(h), y))
            if halt or step == stop or time.time() - saved > 60 * (args.save_every if left else 1):
                save(model, model.encoder, optimizer, step, args)
                saved = time.time()
            if halt:
                break
            logged, began = step, time.time()
    summarize(step, total, args)
    if step > start and args.batch_size > 8 and (seen["std"] < 0.1 or seen["rank"] < 2):  # ours
        print0("The output has collapsed to nearly a point (std 0) or a line (rank 1).")


# ------------------------------------------------------------------------------- linear evaluation


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(dim=1) == labels).sum().item() / len(labels)


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


def load_network(args, classes: int) -> nn.Sequential:
    """task_network with the weights of --init, and the first --from-layer layers of its head."""
    file, k = args.initial, args.from_layer
    encoder = load_encoder(args)  # pops args.initial
    size = {x: file["config"][x] for x in ("head_layers", "dim") if x in file.get("config", {})}
    args.config |= size  # stage 3 rebuilds the head from this
    head = projection_head(encoder.feature_dim, size.get("head_layers", 0), size.get("dim", 1))[:k]
    names, weights = head.state_dict().keys(), file.get("model", {})
    if len(head) < k or not {"projector." + name for name in names} <= weights.keys():
        sys.exit(f"--from-layer {k}: {args.init} has fewer head layers")
    head.load_state_dict({name: weights["projector." + name] for name in names})
    return task_network(encoder, head, classes).to(args.device, args.dtype)


def linear(args) -> None:
    """Train a classifier on frozen features, of head layer --from-layer. Random crops and flips."""
    data = load_data(args)
    if data.val is None:
        sys.exit(f"linear needs labels: {args.data} has no train/ and val/ of class folders")
    train = labeled(data.train, args)
    model = load_network(args, data.num_classes).requires_grad_(False)
    frozen = model[:-1].eval()
    net = distribute(model.fc.requires_grad_(True), args)
    optimizer = build_optimizer(model, args)
    per_epoch = len(train.labels) // args.batch_size
    total = args.epochs * per_epoch
    start, stop = resume(model, optimizer, total, args)
    h, y = features(frozen, data.val, args)  # once, as it is frozen
    step, logged, began, saved = start, start, time.time(), time.time()
    for step, crops, labels in training_batches(train, start, stop, 1, args):
        set_lr(optimizer, step / per_epoch, args)
        with torch.no_grad(), autocast(args):
            features_of_crops = frozen(normalize(crops, args.mean, args.std))
        loss = F.cross_entropy(net(features_of_crops.to(args.dtype)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        left = step % per_epoch
        if step in (1, stop) or 0 in (left, step % args.log_every) or STOP and world_size() == 1:
            loss, halt = agree(loss.detach(), model.fc)
            seconds = (time.time() - began) / (step - logged)
            log(args, epoch=step / per_epoch, step=step, loss=loss, top1=accuracy(model.fc(h), y),
                lr=optimizer.param_groups[0]["lr"], images_per_s=args.batch_size / seconds,
                minutes_left=(stop - step) * seconds / 60)
            if halt or step == stop or time.time() - saved > 60 * (args.save_every if left else 1):
                save(model, model.encoder, optimizer, step, args)
                saved = time.time()
            if halt:
                break
            logged, began = step, time.time()
    summarize(step, total, args)


# ---------------------------------------------------------------------- fine-tuning, distillation


def unless_given(args, **values) -> None:
    """Set these, also in args.config, unless the command line changed them."""
    for name, value in values.items():
        if getattr(args, name) == getattr(RECIPES[args.stage][args.recipe], name):
            args.config[name] = value
            setattr(args, name, value)


def published(args, fraction: float) -> None:
    """Settings that depend on the fraction of labels (v2, Sec. 3.1): half the epochs for 10 % and
    100 %, from_layer 0 for 100 %. Other fractions use the nearest of 1, 10 and 100 %."""
    head_layers = args.initial.get("config", {}).get("head_layers")
    if fraction > 0.03:
        unless_given(args, epochs=args.epochs // 2)
    if fraction > 0.3 or not args.initial:
        unless_given(args, from_layer=0)
    elif head_layers is not None:  # the last layer's output, z, is a poor choice
        unless_given(args, from_layer=min(args.from_layer, max(0, head_layers - 1)))
    if args.recipe == "imagenet" and (args.width > 1 or args.sk):
        unless_given(args, base_lr=0.002)  # recalled: lr 0.064 instead of 0.16 at batch 1024


def finetune(args) -> None:
    """Stage 2: train all weights and a new classifier on labeled images. Random crops and flips."""
    data = load_data(args)
    if data.val is None:
        sys.exit(f"finetune needs labels: {args.data} has no train/ and val/ of class folders")
    train = labeled(data.train, args)
    published(args, len(train.labels) / data.size)
    model = load_network(args, data.num_classes)
    net = distribute(model, args)
    optimizer = build_optimizer(model, args)
    per_epoch = len(train.labels) // args.batch_size
    total = args.epochs * per_epoch
    start, stop = resume(model, optimizer, total, args)
    print0(f"{len(train.labels)} images, {args.epochs} epochs, head from layer {args.from_layer}")
    step, logged, began, saved = start, start, time.time(), time.time()
    for step, crops, labels in training_batches(train, start, stop, 1, args):
        set_lr(optimizer, step / per_epoch, args)
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
                log(args, epoch=epoch, step=step, top1=accuracy(*features(model, data.val, args)))
                model.train()
            if halt or step == stop or time.time() - saved > 60 * (args.save_every if left else 1):
                save(model, model.encoder, optimizer, step, args)
                saved = time.time()
            if halt:
                break
            logged, began = step, time.time()
    summarize(step, total, args)


def distill_step(student, teacher, optimizer, x: Tensor, labels: Tensor, epoch: float, args):
    """One step of stage 3 (v2, Sec. 2) on crops x [n, 3, S, S] -> loss [], logits of student and
    teacher [n, classes]. alpha < 1 adds a loss on labels [n], -1 if unknown (recalled)."""
    set_lr(optimizer, epoch, args)
    with autocast(args):
        s, t = student(x), teacher(x)
    s, t = s.to(args.dtype), t.detach().to(args.dtype)
    loss = distillation_loss(s, t, args.temperature)
    loss = loss * (args.temperature ** 2 if args.tau_squared else 1)
    if args.alpha < 1:
        known = F.cross_entropy(s, labels, ignore_index=-1, reduction="sum") / len(labels)
        loss = args.alpha * loss + (1 - args.alpha) * known
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), s.detach(), t


def known_labels(images: "Images", args) -> Tensor:
    """The labels [n] of the images that --labels gives, -1 for all others."""
    i = (images.labels >= 0).nonzero()[:, 0]  # STL-10 has unlabeled images; folders have none
    args = argparse.Namespace(**vars(args) | {"batch_size": 1})  # there may be fewer than a batch
    i = labeled(Images(images.labels[i], i, images.paths), args).pixels  # indices, not pixels
    return torch.full_like(images.labels, -1).index_copy(0, i, images.labels[i])


def distill(args) -> None:
    """Stage 3: a new network learns the teacher's outputs on all images. Random crops and flips."""
    path, file, args.init, args.initial = args.init, args.initial, "none", {}
    weights, config = file.get("model", {}), file.get("config", {})
    if "fc.weight" not in weights or not {*ENCODER} <= config.keys():
        sys.exit(f"--teacher {path}: not the last.pt of a finetune, distill or linear run")
    theirs = {x: config[x] for x in ENCODER}
    other = {x for x in ENCODER if json.dumps(getattr(args, x)) != json.dumps(theirs[x])}
    if wrong := other & {"image_size", "mean", "std", "small_images"}:
        sys.exit(f"student and teacher must have the same {', '.join(sorted(wrong))}")
    if not other & {"arch", "width", "sk"}:
        unless_given(args, temperature=0.1)  # self-distillation: v2, Sec. 3.1
    data = load_data(argparse.Namespace(**vars(args) | {"stage": "pretrain"}))  # also unlabeled
    classes = len(weights["fc.weight"])
    if data.val is not None and data.num_classes != classes:
        sys.exit(f"the teacher has {classes} classes, {args.data} has {data.num_classes}")
    args.config["labels"] = args.labels = args.labels or config.get("labels", "")
    if args.alpha != 1:
        if args.alpha > 1 or data.val is None or not args.labels:
            sys.exit(f"--alpha {args.alpha}: must be 1, or below 1 with --labels")
        data.train.labels = known_labels(data.train, args)
    teacher = load_network(argparse.Namespace(**vars(args) | theirs | {
        "init": path, "initial": file, "from_layer": config.get("from_layer", 0)}), classes)
    teacher.load_state_dict(weights)
    teacher.requires_grad_(False).eval()
    student = task_network(load_encoder(args), nn.Sequential(), classes)
    nn.init.normal_(student.fc.weight, std=0.01)  # authors' code; zeros are for fine-tuning
    net = distribute(student, args)
    optimizer = build_optimizer(student, args)
    per_epoch = data.size // args.batch_size
    total = args.epochs * per_epoch
    start, stop = resume(student, optimizer, total, args)
    print0(f"student: width {args.width:g}, sk {args.sk}; temperature {args.temperature:g}")
    if start == 0 and args.knn_every and data.val is not None:
        log(args, epoch=0, step=0, teacher_top1=accuracy(*features(teacher, data.val, args)))
    step, logged, began, saved = start, start, time.time(), time.time()
    for step, crops, labels in training_batches(data.train, start, stop, 1, args):
        x = normalize(crops, args.mean, args.std)
        loss, s, t = distill_step(net, teacher, optimizer, x, labels, step / per_epoch, args)
        step += 1
        epoch, left = divmod(step, per_epoch)
        if step in (1, stop) or 0 in (left, step % args.log_every) or STOP and world_size() == 1:
            loss, halt = agree(loss, student)
            seconds = (time.time() - began) / (step - logged)
            floor = args.alpha * distillation_loss(t, t, args.temperature)  # a lower bound
            floor = floor * (args.temperature ** 2 if args.tau_squared else 1)
            same_class = (s.argmax(dim=1) == t.argmax(dim=1)).to(t.dtype).mean()
            floor, same_class = all_gather(torch.stack([floor, same_class])[None]).mean(dim=0)
            log(args, epoch=step / per_epoch, step=step, loss=loss,
                lr=optimizer.param_groups[0]["lr"], floor=floor.item(), agree=same_class.item(),
                images_per_s=args.batch_size / seconds, minutes_left=(stop - step) * seconds / 60)
            if data.val is not None and (
                    step == total or left == 0 and args.knn_every and epoch % args.knn_every == 0):
                log(args, epoch=epoch, step=step, top1=accuracy(*features(student, data.val, args)))
                student.train()
            if halt or step == stop or time.time() - saved > 60 * (args.save_every if left else 1):
                save(student, student.encoder, optimizer, step, args)
                saved = time.time()
            if halt:
                break
            logged, began = step, time.time()
    summarize(step, total, args)


STAGES = {"pretrain": pretrain, "linear": linear, "finetune": finetune, "distill": distill}

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
