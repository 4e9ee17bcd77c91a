"""BYOL: Bootstrap Your Own Latent, A New Approach to Self-Supervised Learning (Grill et al., 2020).

Paper: https://arxiv.org/abs/2006.07733. "Sec.", "Eq.", "Alg.", "Table" and "App." point into its
version of 35 pages; "authors' code" is google-deepmind/deepmind-research at f5de0ed, folder byol
(JAX), of which we know the settings (this file is written from the paper). Algorithm 1, in the
paper's letters:

    v1, v2 = t(x), t'(x)               # views, from two distributions (v, v')       [B, 3, S, S]
    z1, z2 = g(f(v1)), g(f(v2))        # online: encoder f, projector g; weights theta     [B, d]
    t1, t2 = g'(f'(v1)), g'(f'(v2))    # target (z'): the same networks with weights xi    [B, d]
    L = |q(z1) - t2|^2 + |q(z2) - t1|^2    # Eq. (2), all scaled to length 1: 2 - 2 cos each;
                                       # only the online network has a predictor, q
    update theta by LARS on L          # xi counts as a constant
    xi = tau * xi + (1 - tau) * theta  # by the updated theta; tau rises to 1 (Sec. 3.3)

No negatives: with an optimal predictor the online network descends the variance of z' that z
leaves unexplained, which no constant z makes small (Sec. 3.2). Without the predictor the output
collapses (Table 5b); so it does with tau = 0, unless the predictor learns faster (Table 21).

Each view passes alone, through either network in train mode: four forward passes, each with its own
batch norm statistics. xi is an average of parameters; the target's running statistics are of its
own batches, and serve --init-encoder target_encoder alone. One keeps the online encoder.

Where paper and authors' code differ, the code's settings are used: last layers of the heads without
bias, bottlenecks' last batch norms at zero (not so for the paper's numbers, says its README).

Departures (in brackets: the authors'): bfloat16 forward pass on hardware that has it; both networks
start equal (from two seeds: no notable difference); crops of ten tries as torchvision's (one),
resized bilinearly (bicubic), torchvision's colour operations (brightness by an offset, contrast
around each channel's mean, saturation in HSV), solarisation from level 128 of 255 on (1/2);
symmetric padding of strided layers (TensorFlow's), no projection in the first shortcut of ResNet-18
and -34 (one), convolutions initialised after He, heads as PyTorch does (truncated normal, 1 /
sqrt(fan_in), biases 0; the scale does not matter, Sec. 5), running variances unbiased (biased);
what is left over of an epoch is dropped (batches run across epochs); few labels drawn by the seed
(lists, which --labels takes), lr and epochs of linear evaluation and fine-tuning fixed (paper:
chosen on images held out); in fine-tuning batch norm over all processes (each one's own); no linear
classifier beside the loss, but kNN; a batch norm at the projector's output in the demo, and only
there. Official checkpoints, pickles of JAX arrays that want the authors' package, are not read.

    python byol.py                                             # built-in images, a minute or two
    torchrun --nproc_per_node=8 byol.py --data /data/imagenet  # 1000 epochs; --recipe imagenet-300
    torchrun --nproc_per_node=8 byol.py --data /data/imagenet --arch vit_small  # MoCo v3's Table 4
    torchrun --nproc_per_node=8 byol.py --data /data/imagenet --batch-size 512  # tau 0.996 ** (1/8)
    python byol.py --predictor none --out runs/collapse        # Table 5b; see README for the others
    python byol.py --base-tau 0 --tau-schedule constant --predictor-lr-mult 10 --out runs/table21
    python byol.py finetune --init runs/byol-demo/last.pt --labels 0.01  # --init none: from scratch
    python byol.py linear --init runs/byol-demo/last.pt        # linear evaluation
    python byol.py embed --init runs/byol-demo/last.pt --data FOLDER   # features of a folder
"""

import argparse
import contextlib
import copy
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import resource
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as vision

from common import (BLOCKS, LARS, VITS, AllReduceSum, demo_images, resnet, synchronize_batch_norm,
                    vit)

# ----------------------------------------------------------------------------------------- recipes

# Every field is also a flag (--base-lr 0.2). Columns: ImageNet with 1000 (the paper's main result),
# 300 (all its ablations), 100 and 40 epochs, from the authors' code; ViT, compared in MoCo v3's
# paper (arXiv:2104.02057): lr and decay of its Sec. 4.2, which are ViT-B's for 100 epochs, heads as
# BYOL's, the rest as in moco_v3.py; CIFAR, for which the paper has no recipe: the authors' code's
# for Imagenette (ResNet-18, one GPU); the demo's: our choice.
RECIPE_NAMES = ("imagenet", "imagenet-300", "imagenet-100", "imagenet-40", "imagenet-vit", "cifar",
                "demo")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # authors' code
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # CIFAR-10's own
PRETRAIN = {
    # ---------------- imagenet: 1000, 300, 100, 40 epochs --- vit ------ cifar ------- demo
    "arch":               ("resnet50",) * 4 + ("vit_small", "resnet18", "resnet10"),
    "width":              (1.0,) * 6 + (0.25,),  # of a ResNet. Table 1: 1 to 4
    "small_images":       (False,) * 5 + (True,) * 2,  # community, lightly: 3x3 stem; no test crop
    "zero_init_residual": (True,) * 7,         # of bottlenecks, not of basic blocks: authors' code
    "patch_size":         (16,) * 5 + (4, 8),  # of a ViT, pixels. arXiv:2104.02057, Table 2; ours
    "heads":              (0,) * 7,            # 0: arXiv:2104.02057, Table 2's, 12 for vit_small
    "patch_projection":   ("frozen",) * 7,     # of a ViT. arXiv:2104.02057, Sec. 4.2
    "hidden_dim":         (4096,) * 6 + (512,),  # of both heads: authors' code
    "dim":                (256,) * 6 + (128,),   # of z: authors' code
    "output_bn":          (False,) * 6 + (True,),  # batch norm at the projector's output: neither
    #                    paper nor code has one; in the demo our choice, or the minute is too short
    # ---------------- optimisation
    "optimizer":          ("lars",) * 4 + ("adamw", "lars", "lars"),  # sgd: community, lightly
    "epochs":             (1000, 300, 100, 40, 300, 1000, 3),
    "batch_size":         (4096,) * 5 + (256, 100),  # of all processes together
    "base_lr":            (0.2, 0.3, 0.45, 0.45, 1e-4, 2.0, 2.0),  # lr: this * batch_size / 256.
    #                    At 1000 epochs with batch 512 the paper takes 0.4 (App. G)
    "warmup_epochs":      (10.0, 10.0, 10.0, 10.0, 40.0, 10.0, 1.0),
    "momentum":           (0.9,) * 7,          # of LARS and SGD
    "weight_decay":       (1.5e-6, 1e-6, 1e-6, 1e-6, 0.03, 1e-6, 1e-6),
    "base_tau":           (0.996, 0.99, 0.99, 0.97, 0.99, 0.996, 0.9),  # at first. Of a batch B:
    #                    tau ** (B / batch_size), App. G's at 512. Rule: arXiv:2307.13813 (recalled)
    "precision":          ("auto",) * 7,       # auto: bf16 where native, else fp32: ours
    # ---------------- augmentation, a pair for the views v and v' (App. B, Table 6)
    "image_size":         (224,) * 5 + (32, 32),  # pixels
    "crop_min":           (0.08,) * 6 + (0.4,),   # least share of the area
    "flip_prob":          (0.5,) * 7,
    "jitter":             ((0.4, 0.4, 0.2, 0.1),) * 7,  # brightness, contrast, saturation, hue
    "jitter_prob":        (0.8,) * 7,
    "gray_prob":          (0.2,) * 7,
    "blur_prob":          ((1.0, 0.1),) * 5 + ((0.0, 0.0),) * 2,  # community: solo-learn, no blur
    "solarize_prob":      ((0.0, 0.2),) * 6 + ((0.0, 0.0),),
    "mean":               (IMAGENET_MEAN,) * 5 + (CIFAR_MEAN, (0.5, 0.5, 0.5)),
    "std":                (IMAGENET_STD,) * 5 + (CIFAR_STD, (0.25, 0.25, 0.25)),
    # ---------------- ablations
    "predictor":          ("mlp",) * 7,        # none: Table 5b
    "predictor_lr_mult":  (1.0,) * 7,          # lambda, Table 21
    "tau_schedule":       ("cosine",) * 7,     # to 1 at the end; constant: base_tau stays
    "target":             ("ema",) * 7,        # online: the online network, with gradient; Table 5b
    "beta":               (0.0,) * 7,          # weight of negatives, Table 5b
    "alpha":              (0.1,) * 7,          # their temperature, Table 19
    # ---------------- kNN monitor. community: lightly
    "knn_k":              (200,) * 7,
    "knn_temperature":    (0.1,) * 7,
}
LINEAR = {  # authors' code. ViT, CIFAR and demo: our choice
    # ---------------- imagenet: 1000, 300, 100, 40 epochs --- vit ------ cifar ------- demo
    "init_encoder":       ("encoder",) * 7,    # or target_encoder, of --init
    "labels":             ("1.0",) * 7,        # share of the labels, or a file that lists images
    "base_lr":            (0.2,) * 6 + (3.0,),  # paper: best of .4 .3 .2 .1 .05 on images held out
    "epochs":             (80,) * 5 + (80, 10),
    "batch_size":         (4096,) * 5 + (256, 250),  # paper: 1024
    "momentum":           (0.9,) * 7,          # Nesterov's
    "weight_decay":       (0.0,) * 7,
    "crop_min":           (0.08,) * 6 + (1.0,),  # in the demo the crops' features differ too much
    "precision":          ("auto",) * 7,
}
FINETUNE = {**LINEAR,  # batch 1024: App. C.1, which takes the best of 30, 50 epochs and of lr .005
            # .01 .02 .05 .1 (before or after the factor batch_size / 256 it does not say) on images
            # held out. Which of these: our choice; ViT, CIFAR and demo: our choice throughout
            "labels": ("0.01",) * 7,
            "base_lr": (0.02,) * 5 + (0.1, 0.5),
            "epochs": (50,) * 5 + (50, 30),
            "batch_size": (1024,) * 5 + (50, 20),
            "crop_min": PRETRAIN["crop_min"]}
TABLES = {"pretrain": PRETRAIN, "linear": LINEAR, "finetune": FINETUNE,
          "embed": {name: LINEAR[name] for name in ("init_encoder", "precision")}}
CHOICES = {
    "arch": (*(f"resnet{depth}" for depth in BLOCKS), *(f"vit_{size}" for size in VITS)),
    "patch_projection": ("frozen", "learned"),
    "optimizer": ("lars", "adamw", "sgd"),
    "predictor": ("mlp", "none"),
    "tau_schedule": ("cosine", "constant"),
    "target": ("ema", "online"),
    "init_encoder": ("encoder", "target_encoder"),
    "precision": ("auto", "bf16", "fp32", "fp64"),
}
ENCODER = ("arch", "width", "small_images", "zero_init_residual", "patch_size", "heads",
           "patch_projection", "image_size", "mean", "std")
SCRIPT = "byol"

# ------------------------------------------------------------------------------------ augmentation


def augment(x: Tensor, u: Tensor, args, view: int) -> Tensor:
    """Second stage of view 0 or 1, on the device (App. B): colours, blur, solarise, normalisation.

    x [B, 3, S, S] in [0, 1]: random crops, flipped or not (the first stage: `Stage1` and
    `resized_crop` below). u [B, COLOUR_DRAWS]: uniform random numbers, each image's own.
    """
    x = color_jitter(x, u[:, 0:9], args.jitter, args.jitter_prob)
    x = grayscale(x, u[:, 9], args.gray_prob)
    x = gaussian_blur(x, u[:, 10:12], args.blur_prob[view], sigma=(0.1, 2.0))  # App. B
    x = solarize(x, u[:, 12], args.solarize_prob[view])
    return normalize(x, args.mean, args.std)


# same as moco_v3.py
def two_views(batch, args) -> tuple[Tensor, Tensor]:
    crops, draws = batch.crops.chunk(2), batch.colours.chunk(2)
    return augment(crops[0], draws[0], args, view=0), augment(crops[1], draws[1], args, view=1)


# ------------------------------------------------------------------------------------------- model


def build_encoder(args) -> nn.Module:
    """Images [B, 3, S, S] -> features [B, feature_dim]: f, what one keeps."""
    if args.arch.startswith("resnet"):
        return resnet(int(args.arch.removeprefix("resnet")), args.width,
                      small_images=args.small_images, zero_init_residual=args.zero_init_residual)
    return vit(args.arch.removeprefix("vit_"), args.image_size, args.patch_size, heads=args.heads,
               patch_projection=args.patch_projection)


def mlp(in_dim: int, hidden_dim: int, out_dim: int, output_bn: bool = False) -> nn.Sequential:
    """g and q (authors' code; App. J.2 has a bias at the output too, the code has none)."""
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.BatchNorm1d(hidden_dim),
                         nn.ReLU(inplace=True), nn.Linear(hidden_dim, out_dim, bias=False),
                         *([nn.BatchNorm1d(out_dim)] if output_bn else []))


class BYOL(nn.Module):
    """Online network predictor(projector(encoder(.))), target target_projector(target_encoder(.)).

    encoder maps images [B, 3, S, S] to [B, encoder.feature_dim]. predictor "none": p is z; target
    "online": the online network is its own target, with gradient (both Table 5b).
    """

    def __init__(self, encoder: nn.Module, dim: int = 256, hidden_dim: int = 4096,
                 output_bn: bool = False, predictor: str = "mlp", target: str = "ema"):
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(encoder.feature_dim, hidden_dim, dim, output_bn)
        self.predictor = mlp(dim, hidden_dim, dim) if predictor == "mlp" else nn.Identity()
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.target = target

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Two views [B, 3, S, S] -> predictions p1, p2, target projections t1, t2, and the online
        projection z1, for the monitors; each [B, d]."""
        z1, z2 = self.projector(self.encoder(x1)), self.projector(self.encoder(x2))
        t1, t2 = z1, z2
        if self.target == "ema":
            with torch.no_grad():
                t1 = self.target_projector(self.target_encoder(x1))
                t2 = self.target_projector(self.target_encoder(x2))
        return self.predictor(z1), self.predictor(z2), t1, t2, z1.detach()

    def averaged(self) -> tuple[list[Tensor], list[Tensor]]:
        """xi, and the parameters of theta that it follows: not the predictor's, and no buffers."""
        return ([*self.target_encoder.parameters(), *self.target_projector.parameters()],
                [*self.encoder.parameters(), *self.projector.parameters()])

    @torch.no_grad()
    def update_target(self, tau: float) -> None:
        """xi = tau * xi + (1 - tau) * theta (Alg. 1)."""
        update_ema(*self.averaged(), tau)

    @torch.no_grad()
    def target_distance(self) -> float:
        """|theta - xi| / |theta|: how far the online network has run ahead of its target."""
        xi, theta = self.averaged()
        ahead = torch.stack(torch._foreach_norm(torch._foreach_sub(theta, xi))).norm()
        return (ahead / torch.stack(torch._foreach_norm(theta)).norm()).item()


# same as moco_v3.py
def update_ema(target: list[Tensor], online: list[Tensor], m: float) -> None:
    """target = m * target + (1 - m) * online, in place, all tensors at once."""
    torch._foreach_lerp_(target, online, 1 - m)


# -------------------------------------------------------------------------------------------- loss


def unit(x: Tensor) -> Tensor:
    """Rows of x [B, d] at length 1, in float32 at least."""
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return F.normalize(x, dim=1, eps=1e-6)  # BYOL's code: 1e-12, of the square


def byol_loss(p: Tensor, z: Tensor, *, stop_grad: bool = True) -> Tensor:
    """One direction of Eq. (2), |p / |p| - z / |z||^2 = 2 - 2 cos(p, z): the mean over the images.

    Predictions p and the target's projections z (z' in the paper) of the other view, [B, d] of one
    process -> [], in float32 at least. The whole loss is the *sum* of two directions (Sec. 3.1): in
    [0, 8], about 4 at random. The mean over processes is the global batch's.
    """
    return 2 - 2 * (unit(p) * unit(z.detach() if stop_grad else z)).sum(dim=1).mean()


def negatives_loss(p: Tensor, z: Tensor, z_same: Tensor, alpha: float) -> Tensor:
    """What beta weights in Table 5b: 2 alpha log sum exp(cos(p, .) / alpha), over all targets z of
    the other view and those of the own view, z_same, but the own image's. The mean over the images.

    p, z, z_same [B, d] of one process -> []; the targets are those of all processes, with gradient
    where they have one. At beta 1, byol_loss + beta * this is InfoNCE times 2 alpha, plus 2
    (Tables 5b, 19; that views of the own kind count among the negatives: App. F.5, recalled).
    """
    with torch.autocast(p.device.type, enabled=False):  # which would round the products
        other, same = (unit(p) @ gather_with_gradient(unit(t)).T / alpha for t in (z, z_same))
        mine = torch.arange(len(p), device=p.device)
        same[mine, mine + rank() * len(p)] = -math.inf  # an image is no negative of itself
        return 2 * alpha * torch.logsumexp(torch.cat([other, same], dim=1), dim=1).mean()


# ---------------------------------------------------------------------------------------- training


def build_optimizer(model: BYOL, args) -> torch.optim.Optimizer:
    """LARS: norms and biases neither decayed nor adapted (authors' code). The predictor stands
    apart, as its lr may have a factor (Table 21). The target is in no group."""
    f = [p for p in [*model.encoder.parameters(), *model.projector.parameters()] if p.requires_grad]
    groups = [{"params": f, "lr_mult": 1.0}]
    if args.predictor == "mlp":
        groups.append({"params": [*model.predictor.parameters()],
                       "lr_mult": args.predictor_lr_mult})
    fused = args.device.type in ("cpu", "cuda")
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=args.weight_decay, fused=fused)
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=args.momentum,
                               weight_decay=args.weight_decay, fused=fused)
    return LARS(groups, lr=0.0, weight_decay=args.weight_decay, momentum=args.momentum)


# same as moco_v3.py
def warmup_cosine(epoch: float, args) -> float:
    """The lr as a share of its peak: linear from 0 over the warm-up, then half a cosine to 0, step
    by step (MoCo v3's code). With a warm-up the first step of all has lr 0."""
    if epoch < args.warmup_epochs:
        return epoch / args.warmup_epochs
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return (1 + math.cos(math.pi * progress)) / 2


def ema_tau(step: int, total_steps: int, base_tau: float) -> float:
    """tau of a step (Sec. 3.3): 1 - (1 - base_tau) (cos(pi k / K) + 1) / 2.

    k: optimiser steps done before it, K: those of the whole run. base_tau at k = 0, 1 at k = K.
    """
    return 1 - (1 - base_tau) * (math.cos(math.pi * step / total_steps) + 1) / 2


def train_step(model, optimizer, x1: Tensor, x2: Tensor, epoch: float, tau: float, args):
    """One iteration of Algorithm 1. x1, x2 [B, 3, S, S]; epoch: passes over the data so far, a
    fraction within one; tau: of the update. Returns the loss [] and the online projections of x1
    [B, d] for the monitors, both detached."""
    lr = args.base_lr * args.batch_size / 256  # linear scaling, of the global batch (Sec. 3.3)
    for group in optimizer.param_groups:
        group["lr"] = lr * warmup_cosine(epoch, args) * group["lr_mult"]
    with autocast(args):
        p1, p2, t1, t2, z1 = model(x1, x2)
    stop_grad = args.target == "ema"
    loss = byol_loss(p1, t2, stop_grad=stop_grad) + byol_loss(p2, t1, stop_grad=stop_grad)
    if args.beta:
        loss = loss + args.beta * (negatives_loss(p1, t2, t1, args.alpha)
                                   + negatives_loss(p2, t1, t2, args.alpha))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    getattr(model, "module", model).update_target(tau)  # by the weights just updated
    return loss.detach(), z1

# ==================================================================================================
# Here the method ends. What follows is the machinery that all five scripts share, kept equal to the
# letter by tests/test_copies.py: command line, processes, data, kNN, run folder, loop; and, at the
# end, the stages, which call what stands above.
# ==================================================================================================

# ------------------------------------------------------------------------------------ command line


# same as simsiam.py
class UserError(Exception):
    """A mistake of the user's: ends the program with one sentence and exit code 2."""


# same as simsiam.py
class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


# same as simsiam.py
ABOVE_ZERO = {"width", "dim", "projector_layers", "predictor_dim", "patch_size", "image_size",
              "std", "epochs", "batch_size", "base_lr", "accumulate", "log_every", "crop_min",
              "sigma", "temperature", "alpha", "knn_k", "knn_temperature"}


# same as simsiam.py
def recipes(kind: str, arch: str | None) -> list[str]:
    """The recipes of a kind ("imagenet"); of these the ones of arch's family, if there are such."""
    names = [name for name in RECIPE_NAMES if name.split("-")[0] == kind]
    same = [name for name in names
            if arch and arch[:3] == PRETRAIN["arch"][RECIPE_NAMES.index(name)][:3]]
    return same or names


# same as simsiam.py
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags over recipe: every field of the stage's table, and what is not about the method."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    add = parser.add_argument
    add("stage", nargs="?", default="pretrain", choices=TABLES)
    add("--data", default="demo", metavar="NAME|FOLDER",
        help="demo (built in), cifar10, cifar100, stl10, or a folder: train/ and val/ with a "
             "folder per class, or any tree of images without labels")
    add("--data-root", default="data", help="where torchvision keeps its sets (default: data)")
    add("--recipe", choices=RECIPE_NAMES, help="default: the one that fits --data")
    add("--out", help="run folder (default: runs/<script>-<data>)")
    add("--init", help="weights: a run's last.pt or encoder.pt, an official checkpoint, or none")
    add("--fresh", action="store_true", help="start over, though --out holds a run")
    add("--seed", type=int, default=0)
    add("--device", choices=("cpu", "cuda", "mps"), help="default: the best there is")
    add("--workers", type=int, help="loader processes (default: this process's share of the cores)")
    add("--steps", type=int, default=0, help="pause at this step; the same command goes on")
    add("--accumulate", type=int, default=1, help="split each batch into so many parts")
    add("--log-every", type=int, default=50, help="steps (default: 50)")
    add("--knn-every", type=int, default=1, help="epochs (default: 1); 0: never")
    add("--save-every", type=float, default=10, help="minutes (default: 10) and every epoch's end")
    add("--keep-every", type=int, default=0, help="epochs between checkpoints kept (default: none)")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--tensorboard", action="store_true", help="write event files too")
    group = parser.add_argument_group("recipe: one flag a field; see the tables in the script")
    names = [*dict.fromkeys(name for table in TABLES.values() for name in table)]
    for name in names:
        values = next(table[name] for table in TABLES.values() if name in table)
        how = {"type": type(values[0]), "choices": CHOICES.get(name)}
        if isinstance(values[0], bool):
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(values[0], tuple):
            how = {"type": float, "nargs": len(values[0]), "metavar": "X"}
        group.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, **how,
                           help=", ".join(map("{}: {}".format, RECIPE_NAMES, values)))
    args = parser.parse_args(argv)

    for name, value in vars(args).items():
        least = "above 0" if name in ABOVE_ZERO else "0 or more"
        share = name.endswith(("_prob", "momentum", "tau")) or name == "crop_min"
        most = 1 if share else 1e18  # below what 64 bits hold
        for x in value if isinstance(value, list) else [value]:
            if type(x) in (int, float) and not (0 < x <= most or x == 0 and name not in ABOVE_ZERO):
                raise UserError(f"--{name.replace('_', '-')} {x} makes no sense: it is {least}, at "
                                f"most {most:g}")
    kinds = {"demo": "demo", "cifar10": "cifar", "cifar100": "cifar",
             "stl10": "stl10" if "stl10" in RECIPE_NAMES else "cifar"}
    args.given = {name: value for name, value in vars(args).items() if name in names}
    asked, fitting = args.recipe, recipes(kinds.get(args.data, "imagenet"), args.given.get("arch"))
    args.recipe = asked or fitting[0]
    column = RECIPE_NAMES.index(args.recipe)
    fields = {name: PRETRAIN[name][column] for name in ENCODER}
    fields |= {name: values[column] for name, values in TABLES[args.stage].items()}
    if args.data == "stl10":
        fields["image_size"] = 96  # its size
    for name in args.given.keys() - fields.keys():
        raise UserError(f"--{name.replace('_', '-')} is no setting of the stage {args.stage}")
    args.fields = sorted(fields)
    vars(args).update(fields | args.given)
    args.given |= {"recipe": asked} if asked else {}

    if args.stage not in ("pretrain", "distill") and not args.init:
        raise UserError(f"{args.stage} needs --init: a run's last.pt, its encoder.pt, an official "
                        "checkpoint, or none for random weights")
    args.init = None if args.init == "none" else args.init
    if args.stage in ("pretrain", "finetune", "distill") and args.accumulate > 1:
        raise UserError("--accumulate would change the method, whose batch norm sees the whole "
                        "batch: take a smaller --batch-size or more processes")
    name = f"{SCRIPT}-{os.path.basename(args.data.rstrip('/'))}"
    args.out = args.out or os.path.join(
        "runs", name + ("" if args.stage == "pretrain" else f"-{args.stage}"))
    return args


def check(args) -> None:
    """What the flags and --init make together must be buildable; and tau for this batch size."""
    flag = {name: f"--{name.replace('_', '-')} {getattr(args, name)}" for name in args.fields}
    if 64 * args.width < 8:  # with 4 to 7 channels oneDNN corrupts memory on AVX2 (torch 2.15)
        raise UserError(f"--width {args.width} leaves the stem fewer than 8 channels: 0.125 is the "
                        "least")
    given, vit = args.given.keys(), args.arch.startswith("vit")
    for name in given & ({"width", "zero_init_residual"} if vit
                         else {"patch_size", "heads", "patch_projection"}):
        raise UserError(f"{flag[name]} is for a {'ResNet' if vit else 'ViT'}, and --arch is "
                        f"{args.arch}")
    if args.arch in ("resnet10", "resnet18", "resnet34") and not (
            "zero_init_residual" in given or getattr(args, "initial", None)):
        args.zero_init_residual = False  # authors' code: in bottlenecks alone
    if not args.init and "init_encoder" in given:
        raise UserError(f"{flag['init_encoder']} would change nothing here: --init is none")
    if args.stage == "pretrain":
        column = RECIPE_NAMES.index(args.recipe)
        if args.optimizer != PRETRAIN["optimizer"][column] and not (
                {"base_lr", "weight_decay"} <= given):
            raise UserError(f"{flag['optimizer']} takes a --base-lr and a --weight-decay of its "
                            "own: about 0.2 and 1e-6 for lars, 1e-4 and 0.03 for adamw, 0.1 and "
                            "5e-4 for sgd")
        if vit and args.optimizer == "lars" and "optimizer" not in given:
            raise UserError(f"the recipe {args.recipe} is made for {PRETRAIN['arch'][column]}, not "
                            f"for {args.arch}: give --optimizer adamw --base-lr 1e-4 "
                            "--weight-decay 0.03, as --recipe imagenet-vit has it")
        if args.hidden_dim == 0:
            raise UserError("--hidden-dim 0 leaves the heads without a hidden layer: 1 at least")
        for name in given & {"momentum", "predictor_lr_mult", "alpha", "base_tau", "tau_schedule"}:
            if {"momentum": args.optimizer == "adamw", "alpha": not args.beta,
                "predictor_lr_mult": args.predictor == "none"}.get(name, args.target == "online"):
                raise UserError(f"{flag[name]} would change nothing here")
        args.recipe_batch = PRETRAIN["batch_size"][column]
        if "base_tau" not in given:  # gives App. G's 0.9995 at 512, of 0.996 at 4096; see PRETRAIN
            args.base_tau **= args.batch_size / args.recipe_batch
    if vit:
        args.heads = args.heads or VITS[args.arch.removeprefix("vit_")][2]
        try:
            with torch.device("meta"):  # without memory and time
                build_encoder(args)
        except ValueError as error:
            raise UserError(f"--arch {args.arch}: {error}") from None


# --------------------------------------------------------------------------------------- processes


# same as simsiam.py
def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


# same as simsiam.py
def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


# same as simsiam.py
def join_processes(backend: str) -> bool:
    """dist.init_process_group; on rank 0, whether torchrun has started this run before.

    Its store outlives the processes (torch 2.14) and holds the addresses of dead ones, which
    new ones would call: so each asks rank 0 by a fresh name and is told this start's prefix.
    """
    store, me, world = next(dist.rendezvous("env://"))
    name = start = os.urandom(16).hex()
    if me:
        store.set(f"asks{me}", name)
        start = store.get(name).decode()  # waits until it is there
        store.set(f"{start}{me}", "heard")
    else:
        again = store.add("starts", 1) > 1
        for _ in range(36_000):  # half an hour, as torch waits; then the group's own error
            if all([store.check([f"{start}{r}"]) for r in range(1, world)]):
                break
            for asks in (f"asks{r}" for r in range(1, world)):
                if store.check([asks]):  # perhaps a dead one's question: so until all have heard
                    store.set(store.get(asks).decode(), start)
            time.sleep(0.05)
    mine = dist.PrefixStore(start, store)
    dist.init_process_group(backend, store=mine, rank=me, world_size=world)
    return me == 0 and again


# same as simsiam.py
def setup(args) -> None:
    """Picks the device, joins torchrun's process group, seeds, reads --init."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    args.device = args.device or next(name for name, there in available.items() if there)
    if not available[args.device]:
        raise UserError(f"--device {args.device}: torch sees none here; leave the flag out")
    args.device = torch.device(args.device)
    if args.device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node: here are but {torch.cuda.device_count()} GPUs")
        args.device = torch.device("cuda", local)
        torch.cuda.set_device(args.device)
        torch.backends.cudnn.benchmark = True
    if "RANK" in os.environ:
        # Tensors on the GPU go through NCCL; those on the CPU, and Python objects, through Gloo.
        try:
            again = join_processes("cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo")
        except ValueError as error:  # a RANK that no launcher has set
            raise UserError(f"{error}: start with torchrun, or unset RANK") from None
        args.fresh = args.fresh and not again  # what is there is this run's own
    if args.device.type == "mps" and (world_size() > 1 or args.precision == "fp64"):
        raise UserError("--device mps takes one process and no fp64; give --device cpu")
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        args.workers = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    args.dtype = torch.float64 if args.precision == "fp64" else torch.float32
    args.initial = everywhere(lambda: read_init(args)) if args.init else None
    if args.recipe not in (fitting := recipes(args.recipe.split("-")[0], args.arch)):
        if "recipe" in args.given:
            raise UserError(f"the recipe {args.recipe} is not made for {args.arch}: give --recipe "
                            + " or ".join(fitting))
        args.recipe = fitting[0]  # --init brought another kind of network
        vars(args).update((name, values[RECIPE_NAMES.index(args.recipe)]) for name, values
                          in TABLES[args.stage].items() if name not in {*ENCODER, *args.given})
    if getattr(args, "warmup_epochs", 0) >= getattr(args, "epochs", math.inf):
        raise UserError(f"--warmup-epochs {args.warmup_epochs} leaves none of {args.epochs} epochs")
    if getattr(args, "batch_size", 0) % world_size():
        raise UserError(f"--batch-size {args.batch_size} is the global batch, and must be a "
                        f"multiple of the {world_size()} processes")
    if args.stage in ("pretrain", "finetune", "distill") and args.batch_size < 2:
        raise UserError("--batch-size 1 leaves batch norm nothing to average: 2 at least")
    check(args)
    torch.manual_seed(args.seed)  # the same initial weights in every process


# same as simsiam.py
def cpu_info(key: str) -> str:
    """What Linux says of the processor: "flags" for its instruction sets, "model name"."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":")[1].strip() for line in file if line.startswith(key)), "")
    except OSError:
        return ""


# same as simsiam.py
@functools.cache
def bf16_is_native(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = cpu_info("flags").split()
    return device == "cpu" and ("amx_bf16" in flags or "avx512_bf16" in flags)


# same as simsiam.py
def autocast(args):
    """bfloat16 for what tolerates it, if --precision says so; weights and losses stay float32."""
    pays = args.device.type == "cuda" or args.arch.startswith("resnet")  # ViTs on AMX: half as fast
    wanted = args.precision == "bf16" or (args.precision == "auto" and pays
                                          and bf16_is_native(args.device.type))
    return torch.autocast(args.device.type, torch.bfloat16, enabled=wanted)


# same as simsiam.py
@torch.no_grad()
def all_gather(x: Tensor) -> Tensor:
    """x [b, ...] of each process -> [world_size * b, ...], rank 0 first; without gradient."""
    if world_size() == 1:
        return x
    out = x.new_empty(world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous())
    return out


def gather_with_gradient(x: Tensor) -> Tensor:
    """x [b, ...] of each process -> [world_size * b, ...], rank 0 first. A process's gradient is
    that of the sum of all processes' losses, which DDP's mean turns into the global batch's."""
    if world_size() == 1:
        return x
    places = x.new_zeros(world_size(), *x.shape)
    places[rank()] = x
    return AllReduceSum.apply(places).flatten(0, 1)


# same as simsiam.py
def sum_over_processes(x: Tensor) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(x)
    return x


# same as simsiam.py
def of_all(x) -> list:
    """Each process's x, a small Python object, rank 0's first."""
    found = [x] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, x)
    return found


# same as simsiam.py
def everywhere(function):
    """function() in every process: its result, or in all of them the UserError of the first whose
    function, or whose disk, had one. The function itself must not wait for other processes."""
    result = mistake = None
    try:
        result = function()
    except (UserError, OSError) as error:
        mistake = str(error)
    for mistake in filter(None, of_all(mistake)):
        raise UserError(mistake)
    return result


# same as simsiam.py
def on_rank_0(function):
    """function() on rank 0; every process gets its result, or its UserError."""
    return of_all(everywhere(lambda: function() if rank() == 0 else None))[0]


# same as simsiam.py
def say(message: str) -> None:
    if rank() == 0:  # file names may hold what cannot be printed
        print(message.encode(errors="backslashreplace").decode(), flush=True)


# same as simsiam.py
def prepare(model: nn.Module, args) -> nn.Module:
    """Loads --init into the model, moves it to the device, and returns what to call in its place:
    over several processes it averages gradients, and its batch norms see the global batch."""
    if args.initial:
        load_initial(model, args)
    model.to(args.device, args.dtype, memory_format=torch.channels_last)
    net = model
    if world_size() > 1:
        cuda = args.device.type == "cuda"  # torch's SyncBatchNorm refuses CPU tensors
        (nn.SyncBatchNorm.convert_sync_batchnorm if cuda else synchronize_batch_norm)(model)
        net = DistributedDataParallel(model, device_ids=[args.device] if cuda else None,
                                      gradient_as_bucket_view=True)
        net.broadcast_buffers = False  # they are batch norm's, and equal in all processes anyway
    if args.compile:
        net.compile()  # in place: the names in the state dict stay
    return net


# -------------------------------------------------------------------------------------- randomness

CROP_DRAWS, COLOUR_DRAWS = 23, 13  # uniform numbers that one view of one image takes


# same as simsiam.py
def generator(*key) -> torch.Generator:
    """A random stream that depends on nothing but its key, such as (seed, "crop", epoch, step)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


# same as simsiam.py
def uniform(shape: tuple, *key) -> Tensor:
    return torch.rand(shape, generator=generator(*key), dtype=torch.float64)


# same as simsiam.py
@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, "order", epoch))


# same as simsiam.py
def draw_step(args, n: int, step: int, views: int) -> tuple[Tensor, Tensor, Tensor]:
    """What step `step` sees, a function of seed and step alone, and of it this process's share.

    Returns indices [b], crop draws [b, views, CROP_DRAWS], colour draws [b, views, COLOUR_DRAWS].
    The draws are made for the global batch, so that they do not depend on the number of processes.
    """
    epoch, i = divmod(step, n // args.batch_size)
    b = args.batch_size // world_size()
    mine = slice(rank() * b, rank() * b + b)
    index = epoch_order(args.seed, epoch, n)[i * args.batch_size:][mine]
    crop = uniform((args.batch_size, views, CROP_DRAWS), args.seed, "crop", step)[mine]
    colour = uniform((args.batch_size, views, COLOUR_DRAWS), args.seed, "colour", step)[mine]
    return index, crop, colour


# ------------------------------------------------------------------------- augmentation, operations


# same as simsiam.py
def crop_boxes(u: Tensor, height: int, width: int, crop_min: float,
               flip_prob: float = 0.5) -> tuple[Tensor, ...]:
    """torchvision's RandomResizedCrop for many images at once: shares of the area from crop_min to
    1, aspect ratios 3/4 to 4/3, ten tries, else the centre. u [B, CROP_DRAWS] -> top, left, height,
    width, flipped or not; [B] each."""
    area = height * width * (crop_min + (1 - crop_min) * u[:, 0:10])
    ratio = torch.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * u[:, 10:20])
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w <= width) & (h <= height) & (w > 0) & (h > 0)
    first, found = fits.int().argmax(dim=1, keepdim=True), fits.any(dim=1)
    w = torch.where(found, w.gather(1, first)[:, 0], min(width, round(height * 4 / 3))).long()
    h = torch.where(found, h.gather(1, first)[:, 0], min(height, round(width / (3 / 4)))).long()
    top = torch.where(found, u[:, 20] * (height - h + 1), (height - h) // 2).long()
    left = torch.where(found, u[:, 21] * (width - w + 1), (width - w) // 2).long()
    return top, left, h, w, u[:, 22] < flip_prob


# same as simsiam.py
def resample(start: Tensor, length: Tensor, in_size: int, out_size: int,
             flip: Tensor | None = None) -> Tensor:
    """Matrices [B, out_size, in_size] that resize pixels start .. start + length - 1 to out_size:
    bilinear and antialiased, as torchvision's. flip [B]: mirrored where true."""
    start, length = start[:, None, None], length[:, None, None]
    out = torch.arange(out_size, device=start.device)[:, None]
    if flip is not None:
        out = torch.where(flip[:, None, None], out_size - 1 - out, out)
    pixel = torch.arange(in_size, device=start.device)
    scale = length / out_size
    offset = start + (out + 0.5) * scale - (pixel + 0.5)
    weight = (1 - offset.abs() / scale.clamp(min=1)).clamp(min=0)
    weight = weight * ((pixel >= start) & (pixel < start + length))
    return weight / weight.sum(dim=2, keepdim=True)


# same as simsiam.py
def resized_crop(x: Tensor, boxes: tuple[Tensor, ...], size: int) -> Tensor:
    """Crops x [B, 3, H, W] to boxes, resized to [B, 3, size, size]: two matrix products."""
    top, left, height, width = (box.to(x, non_blocking=True) for box in boxes[:4])
    rows = resample(top, height, x.shape[2], size)
    columns = resample(left, width, x.shape[3], size, boxes[4].to(x.device, non_blocking=True))
    return rows[:, None] @ x @ columns[:, None].mT


# same as simsiam.py
def gray(x: Tensor) -> Tensor:
    return 0.2989 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]  # torchvision's weights


# same as simsiam.py
def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue by a share of the circle, through HSV. x [B, 3, S, S], shift [B, 1, 1, 1].

    Without torch.where and %, which cost a CPU much of the augmentation at 32 px: sorting the
    channels by minima and maxima tells the hue's sector from two comparisons.
    """
    r, g, b = x.unbind(dim=1)
    sector, low, high = -6 * (g < b).to(x), torch.minimum(g, b), torch.maximum(g, b)
    sector = sector - (2 + 2 * sector) * (r < high).to(x)
    value, middle = torch.maximum(r, high), torch.minimum(r, high)
    chroma = value - torch.minimum(middle, low)
    hue = (sector + (middle - low) / chroma.clamp(min=1e-12)).abs()  # in sixths of the circle
    hue = (hue + 6 * shift[:, 0])[:, None]
    k = hue + hue.new_tensor([5.0, 3.0, 1.0])[:, None, None]
    k = k - 6 * (k / 6).floor()
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


# same as simsiam.py
COLOUR_OPERATIONS = (  # (x, factor) -> x: brightness, contrast, saturation, hue
    lambda x, f: (f * x).clamp(0, 1),
    lambda x, f: (f * x + (1 - f) * gray(x).mean(dim=(1, 2, 3), keepdim=True)).clamp(0, 1),
    lambda x, f: (f * x + (1 - f) * gray(x)).clamp(0, 1),
    lambda x, f: shift_hue(x, f - 1),
)


# same as simsiam.py
def chosen(mask: Tensor, x: Tensor) -> Tensor:
    """Indices of the true places of mask, found on the CPU so that no GPU has to be waited for."""
    return mask.nonzero()[:, 0].to(x.device, non_blocking=True)


# same as simsiam.py
def color_jitter(x: Tensor, u: Tensor, strength: tuple, prob: float) -> Tensor:
    """torchvision's ColorJitter with probability prob, its four operations in random order, every
    image with its own. x [B, 3, S, S] in [0, 1]; u [B, 9]: whether, how much (4), order (4)."""
    factor = 1 + (2 * u[:, 1:5] - 1) * torch.tensor(strength, dtype=u.dtype)
    factor = factor.clamp(min=0).to(x)[:, :, None, None, None]
    order = u[:, 5:9].argsort(dim=1)
    x = x.clone()
    for place in range(4):
        for k, operation in enumerate(COLOUR_OPERATIONS):
            i = chosen((u[:, 0] < prob) & (order[:, place] == k), x)
            x.index_copy_(0, i, operation(x.index_select(0, i), factor[i, k]))
    return x


# same as simsiam.py
def grayscale(x: Tensor, u: Tensor, prob: float) -> Tensor:
    """Takes the colour from each image with probability prob. x [B, 3, S, S], u [B]."""
    i = chosen(u < prob, x)
    return x.index_copy(0, i, gray(x.index_select(0, i)).expand(-1, 3, -1, -1))


# same as simsiam.py
def gaussian_blur(x: Tensor, u: Tensor, prob: float, sigma: tuple[float, float]) -> Tensor:
    """Blurs each image with probability prob and its own sigma, in pixels, uniform in the range.

    x [B, 3, S, S]; u [B, 2]: whether, how much. The kernel spans a tenth of the side (SimCLR,
    arXiv:2002.05709, App. A; at 224 px: 23 taps), reflected at the border.
    """
    i = chosen(u[:, 0] < prob, x)
    if len(i) == 0:
        return x
    half = x.shape[-1] // 20
    s = (sigma[0] + (sigma[1] - sigma[0]) * u[:, 1]).to(x)[i]
    taps = torch.arange(-half, half + 1, device=x.device, dtype=x.dtype)
    kernel = torch.softmax(-0.5 * (taps / s[:, None]) ** 2, dim=1).repeat_interleave(3, dim=0)
    y = x[i].flatten(0, 1)[None]  # every image and colour is a channel with a kernel of its own
    y = F.pad(y, (half, half, half, half), mode="reflect")
    y = F.conv2d(y, kernel[:, None, None, :], groups=len(kernel))
    y = F.conv2d(y, kernel[:, None, :, None], groups=len(kernel))
    x = x.clone()
    x[i] = y[0].unflatten(0, (-1, 3))
    return x


# same as moco_v3.py
def solarize(x: Tensor, u: Tensor, prob: float) -> Tensor:
    """Inverts the light pixels of each image with probability prob. x [B, 3, S, S], u [B]."""
    i = chosen(u < prob, x)
    x = x.clone()
    x[i] = torch.where(x[i] >= 128 / 255, 1 - x[i], x[i])  # PIL's threshold of 128
    return x


# same as simsiam.py
def normalize(x: Tensor, mean: tuple, std: tuple) -> Tensor:
    mean, std = (x.new_tensor(values)[:, None, None] for values in (mean, std))
    return (x - mean) / std


# -------------------------------------------------------------------------------------------- data


# same as simsiam.py
@dataclass
class Images:
    """n images: their names, their labels if known, and their pixels if they fit in memory."""

    names: np.ndarray  # [n], paths relative to root
    labels: Tensor | None = None  # [n] int64
    pixels: Tensor | None = None  # [n, 3, H, W] uint8, on the device
    root: str = ""
    total: int = 0  # n, of the whole where this is a part
    unreadable: set[str] = field(default_factory=set)  # paths, shared by the parts

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[i]))

    def read(self, i: int) -> tuple[Tensor, int]:
        """Image i as uint8 [3, H, W], and i; for an unreadable one a substitute and its index."""
        # The substitutes are a function of i, so that every run and every process takes the same.
        substitutes = torch.randint(len(self), [9], generator=generator("substitute", i)).tolist()
        for j in (i, *substitutes):
            try:  # read as bytes, for torchvision takes no file name that is not UTF-8
                file = torch.from_numpy(np.fromfile(os.fsencode(self.path(j)), dtype=np.uint8))
                x = torchvision.io.decode_image(file, torchvision.io.ImageReadMode.RGB)
            except (RuntimeError, OSError):
                continue
            if x.ndim == 3:  # an animation has four dimensions
                return x if x.dtype == torch.uint8 else (x.int() >> 8).byte(), j  # 16-bit PNG
        return torch.zeros(3, 8, 8, dtype=torch.uint8), -1  # report_unreadable will end the run


# same as simsiam.py
def load_data(args, labels: bool = False) -> SimpleNamespace:
    """--data as train, bank and val (Images; the last two None without labels), classes, and a
    digest that tells data sets apart. labels: whether the stage needs them."""
    if args.data == "demo":
        train, val = (
            Images(np.array([f"{name}/{i}" for i in range(n)]), labels, pixels.to(args.device))
            for name, n, seed in (("train", 4000, 0), ("val", 1000, 1))
            for pixels, labels in [demo_images(n, seed)])
        bank, classes = train, [*"0123456789"]
    else:
        load = torchvision_data if args.data in ("cifar10", "cifar100", "stl10") else folder_data
        if load is torchvision_data:  # rank 0 downloads what is missing
            on_rank_0(lambda: load(args, download=True) and None)
        train, bank, val, classes = everywhere(lambda: load(args))
        if load is folder_data:
            train, val = (images and load_pixels(images, args) for images in (train, val))
            bank = val and (train if train.pixels is not None else bank)
    if labels and val is None:
        raise UserError(f"{args.stage} needs labels: {args.data} has no train/ and val/ with a "
                        "folder per class")
    if getattr(args, "batch_size", 0) > len(train):
        raise UserError(f"--batch-size {args.batch_size} is more than the {len(train)} images of "
                        f"{args.data}")
    names = "\n".join(os.fsdecode(name) for name in train.names)
    say(f"{args.data}: {len(train)} images, "
        + ("on disk" if train.pixels is None else f"in memory on {args.device.type}")
        + (f", {len(classes)} classes" if val else ", no labels: kNN off"))
    return SimpleNamespace(train=train, bank=bank, val=val, classes=classes, digest=(
        f"{len(train)}-{hashlib.sha256(names.encode(errors='replace')).hexdigest()[:8]}"))


# same as simsiam.py
def torchvision_data(args, download: bool = False):
    """CIFAR-10, CIFAR-100 or STL-10."""
    stl = args.data == "stl10"
    parts = []
    whole = stl and args.stage in ("pretrain", "distill")
    for split in ("train", "test", *["train+unlabeled"] * whole):
        how = {"split": split} if stl else {"train": split == "train"}
        try:
            data = getattr(torchvision.datasets, args.data.upper())(
                args.data_root, download=download, **how)
        except (RuntimeError, OSError) as error:  # no network, a broken archive, no right to write
            raise UserError(f"could not get {args.data} under --data-root {args.data_root}: "
                            f"{str(error).splitlines()[0]}") from None
        pixels = torch.from_numpy(data.data if stl else data.data.transpose(0, 3, 1, 2).copy())
        names = np.array([f"{args.data}/{split}/{i}" for i in range(len(pixels))])
        labels = torch.tensor(data.labels if stl else data.targets).long()
        parts.append(Images(names, labels, pixels if download else pixels.to(args.device)))
    return parts[-1] if len(parts) > 2 else parts[0], parts[0], parts[1], data.classes


# same as simsiam.py
def folder_data(args):
    """train/ and val/ with a folder per class, or else every image in the tree, without labels."""
    if not os.path.isdir(args.data):
        raise UserError(f"--data {args.data}: no such folder, nor one of demo, cifar10, cifar100, "
                        "stl10")
    folders = [os.path.join(args.data, name) for name in ("train", "val")]
    if not all(map(os.path.isdir, folders)):
        return find_images(args.data), None, None, None
    classes = sorted(entry.name for entry in os.scandir(folders[0]) if entry.is_dir())
    if len(classes) < 2:
        raise UserError(f"{folders[0]} has {len(classes)} class folders, and labels take two or "
                        f"more; for images without labels give --data {folders[0]}")
    train, val = map(find_images, folders)
    for folder, images in zip(folders, (train, val)):
        names = [os.fsdecode(name).split(os.sep)[0] for name in images.names]
        strange = sorted(set(names) - set(classes))
        if strange and args.stage == "embed":
            return find_images(args.data), None, None, None
        if strange:
            raise UserError(f"{os.path.join(folder, strange[0])} is in none of the class folders "
                            f"of {folders[0]}; for images without labels give --data {folder}")
        images.labels = torch.from_numpy(np.searchsorted(classes, names))
    # A bank of at most about 128,000, a tenth of ImageNet, if read from disk: ours, for speed.
    some = slice(None, None, max(1, round(len(train) / 128_000)))
    return train, replace(train, names=train.names[some], labels=train.labels[some]), val, classes


# same as simsiam.py
def find_images(root: str) -> Images:
    """Every JPEG, PNG and WebP file under root, at any depth, in the order of their names."""
    names = sorted(os.path.relpath(os.path.join(folder, name), root)
                   for folder, _, files in os.walk(root, followlinks=True) for name in files
                   if name.lower().endswith((".jpg", ".jpeg", ".png", ".webp")))
    if not names:
        raise UserError(f"no JPEG, PNG or WebP image under {root}")
    # Bytes in one array: a list of a million strings would be copied into every loader process.
    return Images(np.array([os.fsencode(name) for name in names]), root=root, total=len(names))


# same as simsiam.py
def load_pixels(images: Images, args) -> Images:
    """Takes the images into memory if they have one size of at most 128 px and fit into 2 GB."""
    n, (x, _) = len(images), images.read(0)
    if max(x.shape) > 128 or n * x.numel() > 2e9:
        return images
    pixels, shown = torch.empty(n, *x.shape, dtype=torch.uint8), torch.arange(n)
    with ThreadPoolExecutor(args.workers or 1) as pool:
        for part in shown.clone().split(1024):
            for i, (x, j) in zip(part, pool.map(images.read, part.tolist())):
                if x.shape != pixels.shape[1:]:
                    return images
                pixels[i], shown[i] = x, j
    report_unreadable(images, torch.arange(n), shown)
    labels = None if images.labels is None else images.labels[shown]
    return replace(images, pixels=pixels.to(args.device), labels=labels)


# same as simsiam.py
class Stage1(Dataset):
    """The first stage of the augmentation, in the loader's processes: decode, crop, resize, flip.

    A key is (index, crop draws [views, CROP_DRAWS]), or (index, None) for the test view: resized so
    that the shorter side is margin times S, centre. Gives uint8 [views, 3, S, S] and the index
    shown.
    """

    def __init__(self, images: Images, size: int, crop_min: float, margin: float,
                 flip_prob: float = 0.5):
        self.images, self.size, self.margin = images, size, margin
        self.crop_min, self.flip_prob = crop_min, flip_prob

    def __getitem__(self, key) -> tuple[Tensor, int]:
        x, shown = self.images.read(key[0])
        if key[1] is None:
            x = vision.resize(x, [round(self.size * self.margin)], antialias=True)
            return vision.center_crop(x, [self.size, self.size])[None], shown
        boxes = crop_boxes(torch.from_numpy(key[1]), *x.shape[1:], self.crop_min, self.flip_prob)
        views = []
        for *box, flip in zip(*(box.tolist() for box in boxes)):
            view = vision.resized_crop(x, *box, [self.size, self.size], antialias=True)
            views.append(view.flip(2) if flip else view)
        return torch.stack(views), shown


# same as simsiam.py
def ignore_signals(worker: int) -> None:
    """Loader processes are ended by their parent, not by the signal that asks it to save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# same as simsiam.py
def load(args, images: Images, wanted, crop_min: float = 1.0):
    """The first stage for wanted, an iterable of (indices [b], crop draws [b, views, CROP_DRAWS] or
    None for the test view). Yields crops [views * b, 3, S, S] in [0, 1] on the device, all images'
    first view before the second, and the indices shown [b]: others than wanted where unreadable."""
    size = args.image_size
    margin = 1 if args.small_images else 8 / 7  # 256 for 224 px: authors' code; nothing at 32 px
    flip_prob = getattr(args, "flip_prob", 0.5)  # where it is no field of the recipe, half of them
    if images.pixels is None:
        keys = ([*zip(index.tolist(), [None] * len(index) if crop is None else crop.numpy())]
                for index, crop in wanted)
        for x, shown in DataLoader(Stage1(images, size, crop_min, margin, flip_prob),
                                   batch_sampler=keys, num_workers=args.workers,
                                   worker_init_fn=ignore_signals,
                                   pin_memory=args.device.type == "cuda"):
            x = x.to(args.device, non_blocking=True).transpose(0, 1).flatten(0, 1)
            yield x.to(args.dtype) / 255, shown
        return
    height, width = images.pixels.shape[2:]
    side = round(min(height, width) / margin)
    centre = ((height - side) // 2, (width - side) // 2, side, side, False)
    for index, crop in wanted:
        x = images.pixels[index.to(args.device)].to(args.dtype) / 255
        boxes = [[torch.tensor([value]).expand(len(x)) for value in centre]] if crop is None else [
            crop_boxes(u, height, width, crop_min, flip_prob) for u in crop.unbind(1)]
        yield torch.cat([resized_crop(x, box, size) for box in boxes]), index


# same as simsiam.py
def batches(args, images: Images, start: int, stop: int, views: int):
    """What the steps start .. stop - 1 need: crops and indices as from load(), and with them the
    colour draws [views * b, COLOUR_DRAWS] for the second stage."""
    drawn, again = itertools.tee(draw_step(args, len(images), step, views)
                                 for step in range(start, stop))
    crops = load(args, images, ((index, crop) for index, crop, _ in again), args.crop_min)
    for (x, shown), (index, _, colour) in zip(crops, drawn):
        yield SimpleNamespace(crops=x, colours=colour.transpose(0, 1).flatten(0, 1), wanted=index,
                              shown=shown)


# same as simsiam.py
def report_unreadable(images: Images, wanted: Tensor, shown: Tensor) -> None:
    """Names each image that could not be read, once. Every process must call it."""
    for i in sorted({*itertools.chain(*of_all(wanted[wanted != shown].tolist()))}):
        if images.path(i) not in images.unreadable:
            images.unreadable.add(images.path(i))
            say(f"unreadable, another image stands in for it: {images.path(i)}")
    count = len(images.unreadable)
    if count > max(1, images.total / 100) or count >= max(1, images.total):
        raise UserError(f"{count} images under {images.root} are unreadable, more "
                        "than 1 %: mend or remove the files named above")


# ----------------------------------------------------------------------------------------- monitors


# same as simsiam.py
@torch.no_grad()
def feature_std(z: Tensor) -> float:
    """Std over the batch of z / |z|, mean over channels, times sqrt(d): SimSiam's Fig. 2. [B, d].

    Near 1 for a healthy model, 0 when all images map to one point. Its blind spot: behind the
    output BN it stays near 1 when all images map to one *line*; effective_rank sees that.
    """
    return F.normalize(z.float(), dim=1).std(dim=0).mean().item() * z.shape[1] ** 0.5


# same as simsiam.py
@torch.no_grad()
def effective_rank(z: Tensor) -> float:
    """exp(entropy) of the variance shares of z's principal directions. [B, d] -> in [1, min(B, d)].

    The collapse monitor: 1 when all images lie on one line, whatever the BN does to its scale.
    (Roy & Vetterli, EUSIPCO 2007, on the spectrum of the covariance; ours, not the paper's.)
    """
    z = z.double() - z.double().mean(dim=0)
    gram = z @ z.T if len(z) < z.shape[1] else z.T @ z  # both have the same non-zero spectrum
    share = torch.linalg.eigvalsh(gram).clamp(min=0)
    share = share / share.sum().clamp(min=1e-300)
    return torch.special.entr(share).sum().exp().item()


# same as simsiam.py
@torch.no_grad()
def features(encoder: nn.Module, images: Images, args) -> tuple[Tensor, Tensor]:
    """The encoder's output, in eval mode, for the test view of each image -> [n, feature_dim] and
    the indices of the images shown [n], the same in every process."""
    training = encoder.training
    encoder.eval()
    n = len(images)
    # Every world_size-th image, the first ones again at the end where the others have one more.
    mine = (torch.arange(-(-n // world_size())) * world_size() + rank()) % n
    rows, shown = [], []
    for x, index in load(args, images, ((part, None) for part in mine.split(256))):
        x = normalize(x, args.mean, args.std).contiguous(memory_format=torch.channels_last)
        with autocast(args):
            rows.append(encoder(x).to(args.dtype))
        shown.append(index)
    encoder.train(training)
    rows, shown = torch.cat(rows), torch.cat(shown)
    report_unreadable(images, mine, shown)
    parts = (all_gather(part).unflatten(0, (world_size(), -1)) for part in (rows, shown))
    return tuple(part.transpose(0, 1).flatten(0, 1)[:n] for part in parts)


# same as simsiam.py
def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int,
                 temperature: float) -> float:
    """Share of queries whose class wins the vote of their k nearest in the bank, each neighbour's
    vote weighted by exp(cosine / temperature) (Wu et al., arXiv:1805.01978, Sec. 3.4).

    bank [n, d], bank_labels [n], queries [m, d], labels [m] -> in [0, 1].
    """
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    right = 0
    for query, label in zip(queries.split(1024), labels.split(1024)):
        cosine, nearest = (query @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(query), int(bank_labels.max()) + 1, device=query.device)
        weight = torch.exp((cosine - cosine[:, :1]) / temperature)  # the largest is 1: no overflow
        votes.scatter_add_(1, bank_labels[nearest], weight)
        right += (votes.argmax(dim=1) == label).sum().item()
    return right / len(labels)


# same as simsiam.py
def knn_monitor(encoder: nn.Module, data, epoch: int, args) -> dict[str, float]:
    """kNN accuracy of the encoder's features: bank of training images, queries from val."""
    if data.val is None or not args.knn_every or epoch % args.knn_every and epoch < args.epochs:
        return {}
    (bank, i), (queries, j) = (features(encoder, images, args) for images in (data.bank, data.val))
    labels = [images.labels[k.cpu()].to(args.device)
              for images, k in ((data.bank, i), (data.val, j))]
    vote = functools.partial(knn_accuracy, k=args.knn_k, temperature=args.knn_temperature)
    result = {"knn": vote(bank, labels[0], queries, labels[1])}
    if epoch == 0:
        say(f"kNN: k {args.knn_k}, temperature {args.knn_temperature}, bank {len(bank)} training "
            f"images, {len(queries)} queries")
        if args.data == "demo":  # what the pixels give away without any network
            bank, queries = (images.pixels.flatten(1) / 255 - 0.5
                             for images in (data.bank, data.val))
            result["knn_pixels"] = vote(bank, labels[0], queries, labels[1])
    return result


# -------------------------------------------------------------------------------------- run folder


# same as simsiam.py
class Run:
    """The run folder: lock, log.jsonl, views.png, last.pt, previous.pt, encoder.pt.

    Opening it finds the checkpoint to go on from (state; None at the start) and refuses a folder
    that another run uses, or that holds a run with other settings. Rank 0 alone writes.
    """

    def __init__(self, args, data):
        self.args, self.board = args, None
        self.config = {"stage": args.stage, "data": args.data, "images": data.digest,
                       "recipe": args.recipe, "seed": args.seed,
                       "init": args.initial and args.initial.digest,
                       **{name: getattr(args, name) for name in args.fields}}
        found = on_rank_0(self.claim)
        self.state = everywhere(lambda: load_file(found)) if found else None
        self.start = self.saved = self.state["step"] if self.state else 0  # the step to do next
        on_rank_0(self.open_log)

    def path(self, name: str) -> str:
        return os.path.join(self.args.out, name)

    def claim(self) -> str | None:
        """Locks the folder and looks for a checkpoint of this very run."""
        try:
            os.makedirs(self.args.out, exist_ok=True)
            self.lock = open(self.path("lock"), "w")
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes when the process goes
        except BlockingIOError:
            raise UserError(f"another run is at work in {self.args.out}: wait for it, or give "
                            "another --out") from None
        if self.args.fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            for name in ("last.pt", "previous.pt", "corrupt.pt", "log.jsonl"):
                if os.path.exists(self.path(name)):
                    os.remove(self.path(name))
        last, previous = self.path("last.pt"), self.path("previous.pt")
        there = [*filter(os.path.exists, (last, previous))]
        for path in there:
            try:
                config = load_file(path)["config"]
            except (UserError, KeyError, TypeError):
                say(f"{path} is corrupt" + f": taking {previous} in its place" * (path == last))
                continue
            self.compare(config)
            if path != there[0]:  # lest it become previous.pt
                os.replace(last, self.path("corrupt.pt"))
            return path
        if there:
            raise UserError(f"no checkpoint in {self.args.out} can be read: --fresh starts over")
        log = self.path("log.jsonl")  # of a run that ended before its first checkpoint?
        if os.path.exists(log) and (os.path.isdir(log) or os.path.getsize(log)):
            try:
                with open(log) as file:
                    self.compare(json.loads(file.readline())["config"])
            except (ValueError, KeyError, TypeError, AttributeError, OSError):
                raise UserError(f"{log} is none of ours: give another --out") from None
        return None

    def compare(self, theirs: dict) -> None:
        theirs, ours = (json.loads(json.dumps(config)) for config in (theirs, self.config))
        differ = [f"{name} {theirs.get(name)} (now {ours.get(name)})" for name in {**ours, **theirs}
                  if theirs.get(name) != ours.get(name) and name not in (
                      "data", "labels", "teacher", "recipe", "grad_checkpoint", "knn_every_steps")]
        if differ:  # "images" tells data, labels and teachers apart; the last two change no number
            raise UserError(f"{self.args.out} holds another run, with {', '.join(differ)}: give "
                            "another --out, or --fresh to start over")

    def open_log(self) -> None:
        """Cuts the log back to the checkpoint, so that no step stands in it twice."""
        if self.state and self.state["finished"]:
            return
        if self.args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard: pip install tensorboard first") from None
            self.board = SummaryWriter(self.args.out, purge_step=self.start)
        resumed = self.state and os.path.exists(self.path("log.jsonl"))
        self.file = open(self.path("log.jsonl"), "r+b" if resumed else "wb")
        if resumed:
            size = self.file.seek(0, os.SEEK_END)  # a log that was cut by others is not filled up
            self.file.seek(self.file.truncate(min(size, self.state["log_bytes"])))
            say(f"{self.args.out}: going on from step {self.start}")
        git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always",
               "--dirty", "--exclude=*"]
        try:
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
        except OSError:  # no git here
            commit = None
        cuda = self.args.device.type == "cuda"
        self.log(
            **{"resumed": self.start} if resumed else {"config": self.config},
            versions={"python": platform.python_version(), "torch": torch.__version__,
                      "torchvision": torchvision.__version__, "numpy": np.__version__},
            hardware=(f"{torch.cuda.get_device_name() if cuda else cpu_info('model name')}, "
                      f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, "
                      f"{world_size()} processes"),
            command=shlex.join(sys.argv), commit=commit)

    def log(self, **record) -> None:
        """One JSON object a line; with --tensorboard its numbers are scalars too."""
        if rank() == 0:
            try:
                self.file.write(json.dumps(record).encode() + b"\n")
                self.file.flush()
            except OSError as error:
                raise UserError(f"could not write {self.path('log.jsonl')}: {error}; what was "
                                "saved is whole, and the same command goes on from it") from None
            if self.board and "step" in record:
                for name in record.keys() - {"step", "epoch", "q_histogram"}:
                    self.board.add_scalar(name, record[name], record["step"])
                self.board.flush()

    def save(self, model: nn.Module, optimizer, keep: bool, **state) -> None:
        """On rank 0: last.pt becomes previous.pt, the new state last.pt; if it fails, both stay."""
        state |= {"config": self.config, "log_bytes": self.file.tell(),
                  "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        os.fsync(self.file.fileno())
        last, new = self.path("last.pt"), self.path("new.pt")
        write_file(new, lambda file: torch.save(state, file))
        if os.path.exists(last) and self.saved != state["step"]:  # else it is the same once more
            os.replace(last, self.path("previous.pt"))
        os.replace(new, last)
        self.saved = state["step"]
        if keep:
            write_file(self.path(f"step{self.saved}.pt"), lambda file: torch.save(state, file))
        write_encoder(model.encoder, self.args)

    def save_views(self, images: Images, views: int, augmented) -> None:
        """views.png: eight images in the test view, then their views as training sees them."""
        args = argparse.Namespace(**vars(self.args))
        args.workers, args.batch_size = 0, min(8, args.batch_size // world_size()) * world_size()

        def draw():
            batch = next(batches(args, images, 0, 1, views))
            rows, _ = next(load(args, images, [(batch.wanted, None)]))
            mean, std = (rows.new_tensor(values)[:, None, None] for values in (args.mean, args.std))
            rows = torch.cat([rows, augmented(batch) * std + mean]).clamp(0, 1).float().cpu()
            picture = torchvision.utils.make_grid(rows, nrow=len(batch.wanted))
            png = torchvision.io.encode_png((picture * 255).round().byte())
            write_file(self.path("views.png"), lambda file: file.write(png.numpy().tobytes()))
            if self.board:
                self.board.add_image("views", picture)

        on_rank_0(draw)


# same as simsiam.py
def write_file(path: str, write) -> None:
    """write(file), waits for the disk, then renames: the file at path is never half written."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".tmp", "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:  # torch.save makes some of these of those
        raise UserError(f"could not write {path}: {error}; what was saved is whole, and the same "
                        "command goes on from it") from None
    finally:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")


# same as simsiam.py
def write_encoder(encoder: nn.Module, args) -> None:
    """encoder.pt, the weights with torchvision's or timm's names; beside it what they are for."""
    weights = {name: x.cpu().contiguous() for name, x in encoder.state_dict().items()}
    about = {**{name: getattr(args, name) for name in ENCODER}, "feature_dim": encoder.feature_dim}
    path = os.path.join(args.out, "encoder")
    write_file(path + ".pt", lambda file: torch.save(weights, file))
    write_file(path + ".json", lambda file: file.write(json.dumps(about).encode()))


# same as simsiam.py
def load_file(path: str):
    """torch.load, of tensors and plain containers alone: a pickle that runs code is refused."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path} (all hosts must see one disk)") from None
    except Exception as error:  # torch.load has no error class of its own
        raise UserError(f"{path} cannot be loaded: it is truncated, or more than tensors and plain "
                        f"values ({type(error).__name__})") from None


def read_official(file: dict) -> tuple[dict, dict]:
    raise UserError("this is another method's official checkpoint; BYOL's are pickles of JAX "
                    "arrays, which are not read: --init takes last.pt or encoder.pt of a run")


# same as simsiam.py
def read_init(args) -> SimpleNamespace:
    """--init as a state dict with our names, of the whole model or the encoder, and its digest.

    Reads a run's last.pt, which brings architecture and preprocessing along; its encoder.pt, for
    which encoder.json does if it lies beside; and the authors' checkpoints (pre-training, linear).
    """
    file, settings = load_file(args.init), {}
    try:
        if "config" in file:
            state, settings = file["model"], file["config"]
        elif "arch" in file:
            state, settings = read_official(file)
        else:
            state = {f"encoder.{name}": x for name, x in file.items()}
            if os.path.exists(about := os.path.splitext(args.init)[0] + ".json"):
                try:
                    with open(about) as text:
                        settings = {**json.load(text)}
                except (OSError, ValueError, TypeError):
                    raise UserError(f"{about}, beside --init, is no encoder.json of ours") from None
        settings = {name: settings[name] for name in ENCODER if name in settings}
        digest = hashlib.sha256()
        for name in sorted(state):
            digest.update(name.encode() + state[name].float().cpu().numpy().tobytes())
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"--init {args.init} is none of a run's last.pt, its encoder.pt, and an "
                        "official checkpoint") from None
    if settings.get("arch", args.arch) not in CHOICES["arch"]:
        raise UserError(f"--init {args.init} holds a {settings['arch']}, which {SCRIPT}.py does "
                        "not build")
    for name, value in settings.items():
        given = args.given.get(name, value)
        if json.dumps(given) != json.dumps(value):  # to which a list and a tuple are one
            raise UserError(f"--{name.replace('_', '-')} {given}, but {args.init} has {value}: "
                            "leave the flag out")
        setattr(args, name, value)
    return SimpleNamespace(state=state, digest=digest.hexdigest()[:12])


# same as simsiam.py
def load_initial(model: nn.Module, args) -> None:
    """Loads --init strictly: all of it if the stage is pretrain and the file has heads."""
    state = args.initial.state
    if args.stage != "pretrain" or all(name.startswith("encoder.") for name in state):
        model, prefix = model.encoder, getattr(args, "init_encoder", "encoder") + "."
        state = {name.removeprefix(prefix): x for name, x in state.items()
                 if name.startswith(prefix)}
        if not state:
            raise UserError(f"--init {args.init} holds no {prefix[:-1]}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # which names what is missing, unknown, or of another shape
        wrong = textwrap.shorten(str(error).partition("\n")[2], 220)
        raise UserError(f"--init {args.init} does not fit --arch {args.arch} --width "
                        f"{args.width:g} and the rest: {wrong}") from None


# -------------------------------------------------------------------------------------------- loop

# same as simsiam.py
STOP = threading.Event()  # set by SIGTERM (SLURM, spot machines) and Ctrl-C: save and end


# same as simsiam.py
@contextlib.contextmanager
def signals_caught():
    """Within, SIGTERM and the first Ctrl-C set STOP; a second Ctrl-C means it."""
    def catch(number, frame):
        STOP.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    STOP.clear()
    before = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# same as simsiam.py
@signals_caught()
def fit(args, run: Run, data, model: nn.Module, optimizer, step_function, monitor, evaluate,
        views: int) -> bool:
    """The loop of every stage that trains; returns whether the run came to its end now.

    step_function(batch, epoch) -> loss [] and what the monitor wants; monitor(that) and
    evaluate(epoch) -> numbers for the log, the latter before the first and after each epoch. Steps
    count from 0 over the whole run.
    """
    per_epoch = len(data.train) // args.batch_size  # what is left over in an epoch is dropped
    total = args.epochs * per_epoch
    stop = max(run.start, min(total, args.steps or total))
    evaluated = False
    if run.state:
        model.load_state_dict(run.state["model"])
        optimizer.load_state_dict(run.state["optimizer"])
        if run.state["finished"]:
            say(f"{args.out} is finished; --fresh starts over")
            return False
        evaluated, run.state = run.state["evaluated"], None  # frees the memory
    model.train()
    began = saved = mark = time.time()  # mark: when the interval since the last log line began
    waited, first, losses = 0.0, run.start, torch.zeros((), device=args.device)

    def save(step, evaluated=False):
        keep = args.keep_every and step % (args.keep_every * per_epoch) == 0
        on_rank_0(lambda: run.save(model, optimizer, keep, step=step, evaluated=evaluated,
                                   finished=evaluated and step == total))

    def evaluate_at(step):
        if record := evaluate(step // per_epoch):
            run.log(epoch=step // per_epoch, step=step, **record)
            say(f"epoch {step // per_epoch}/{args.epochs}  "
                + "  ".join(f"{name} {100 * value:.1f} %" for name, value in record.items()))

    if run.start % per_epoch == 0 and not evaluated:
        evaluate_at(run.start)
        mark = time.time()
    stream = batches(args, data.train, run.start, stop, views)
    for step in range(run.start, stop):
        now = time.time()
        batch = next(stream)
        waited += time.time() - now
        loss, seen = step_function(batch, step / per_epoch)
        losses += loss
        # On the CPU, so that no GPU is waited for; summed, so that all processes take one turn.
        stopping, bad, saving = sum_over_processes(torch.tensor(
            [STOP.is_set(), (batch.wanted != batch.shown).sum(),
             rank() == 0 and time.time() - saved > 60 * args.save_every])).tolist()
        if bad:
            report_unreadable(data.train, batch.wanted, batch.shown)
        ended = (step + 1) % per_epoch == 0
        saving = saving or stopping or ended or step + 1 == stop
        if saving or step % args.log_every == 0:
            loss, losses = sum_over_processes(torch.stack([loss, losses])) / world_size()
            norms = torch.stack(torch._foreach_norm([*model.parameters()]))
            if not (losses.isfinite() and norms.isfinite().all()):
                raise UserError(f"loss or weights stopped being finite in the steps {first} to "
                                f"{step}: try a lower --base-lr, or --precision fp32; a last.pt in "
                                f"{args.out} is from before")
            count, seconds = step + 1 - first, time.time() - mark
            record = dict(
                epoch=round(step / per_epoch, 4), step=step, loss=loss.item(),
                lr=optimizer.param_groups[0]["lr"], **monitor(seen),
                images_per_s=round(count * args.batch_size / seconds, 1),
                data_wait=round(waited / seconds, 4), memory_gb=round(peak_memory(args.device), 3),
                seconds=round(time.time() - began, 1))
            run.log(**record)
            left = int((total - step - 1) * seconds / count)
            say("  ".join(f"{name} {value:.4g}" for name, value in record.items())
                + f"  left {left // 3600}:{left // 60 % 60:02}:{left % 60:02}")
            if ended and waited > 0.3 * seconds and data.train.pixels is None:
                say("a third of the time went by waiting for images: give more --workers")
            waited, first, losses, mark = 0.0, step + 1, torch.zeros_like(loss), time.time()
        if saving:
            save(step + 1)
            saved = time.time()
        if stopping:
            say(f"stopped and saved after step {step}; the same command goes on")
            return False
        if ended:
            evaluate_at(step + 1)
            mark = time.time()
    save(stop, evaluated=stop % per_epoch == 0)
    say(f"finished: {args.out}" if stop == total else f"paused at step {stop} of {total}")
    return stop == total


# same as simsiam.py
def peak_memory(device: torch.device) -> float:
    """In GB: the GPU's, or else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ------------------------------------------------------------------------------------------- stages


def pretrain(args) -> None:
    """Algorithm 1 over the whole data, with its monitors."""
    data = load_data(args)
    model = BYOL(build_encoder(args), args.dim, args.hidden_dim, args.output_bn, args.predictor,
                 args.target)
    net = prepare(model, args)
    if args.initial and all(name.startswith("encoder.") for name in args.initial.state):
        # --init held an encoder alone: the target starts as a copy of it, as always.
        model.target_encoder.load_state_dict(model.encoder.state_dict())
    optimizer = build_optimizer(model, args)
    run = Run(args, data)
    per_epoch = len(data.train) // args.batch_size
    steps = args.epochs * per_epoch
    chance = 4 + 4 * args.beta * args.alpha * math.log(2 * args.batch_size - 1)  # all cosines 0
    say(f"loss: about {chance:.3g} by chance" + ("" if args.beta else ", 0 at the least"))
    if args.target == "ema":
        scaled = args.batch_size != args.recipe_batch and "base_tau" not in args.given
        say(f"tau: {args.base_tau:.6g}"
            + f" (the recipe's to the power of {args.batch_size} / {args.recipe_batch})" * scaled
            + (f", to 1 over {steps} steps" if args.tau_schedule == "cosine" else ", constant"))

    def step(batch, epoch):
        tau = args.base_tau
        if args.tau_schedule == "cosine":
            tau = ema_tau(round(epoch * per_epoch), steps, args.base_tau)
        loss, z = train_step(net, optimizer, *two_views(batch, args), epoch, tau, args)
        return loss, (z, tau)

    def monitor(seen):
        z, tau = seen
        z = all_gather(z)[:512].cpu()  # 512 images are enough for a monitor: our choice, for speed
        target = {} if args.target == "online" else {
            "tau": tau, "target_distance": model.target_distance()}
        return {"std": feature_std(z), "rank": effective_rank(z),
                "z_norm": z.norm(dim=1).mean().item(), **target}

    run.save_views(data.train, 2, lambda batch: torch.cat(two_views(batch, args)))
    fit(args, run, data, model, optimizer, step, monitor, views=2,
        evaluate=lambda epoch: knn_monitor(model.encoder, data, epoch, args))


def labelled(images: Images, args) -> Images:
    """The images whose labels --labels gives away: as many of each class, or one more, drawn by the
    seed, or those a file lists, a line each, by file name (as SimCLR's lists do) or class/name."""
    try:
        share = float(args.labels)
    except ValueError:
        share = None
    if share is not None and not 0 < share <= 1:
        raise UserError(f"--labels {args.labels} makes no sense: a share above 0, at most 1")
    if share == 1:
        return images
    if share:
        order = torch.randperm(len(images), generator=generator(args.seed, "labels"))
        parts = [order[images.labels[order] == k] for k in range(int(images.labels.max()) + 1)]
        # The first of one order, so that 1 % is a part of 10 %, as in SimCLR's lists.
        wanted = max(len(parts), round(share * sum(map(len, parts))))
        each, rest = divmod(wanted, len(parts))
        more = torch.randperm(len(parts), generator=generator(args.seed, "more")) < rest
        picked = torch.cat([part[:each + one] for part, one in zip(parts, more)])
        picked = picked.sort()[0]
    else:
        try:
            with open(args.labels, "rb") as file:
                lines = [os.fsdecode(line) for line in map(bytes.strip, file) if line]
        except (OSError, ValueError):
            raise UserError(f"--labels {args.labels} is neither a share such as 0.01 nor a file "
                            "that lists images") from None
        places = {}  # of a name, and of a name without its folders: those of all such images
        for i, name in enumerate(map(os.fsdecode, images.names)):
            for known in {name, os.path.basename(name)}:
                places.setdefault(known, []).append(i)
        wrong = [f"{line}, which is {'not' if line not in places else 'more than once'} among the "
                 "training images" for line in lines if len(places.get(line, ())) != 1]
        if wrong or not lines:
            raise UserError(f"--labels {args.labels} lists "
                            + (f"{wrong[0]} ({len(wrong)} such lines)" if wrong else "no image"))
        picked = torch.tensor([*dict.fromkeys(places[line][0] for line in lines)])
    if args.batch_size > len(picked):
        raise UserError(f"--batch-size {args.batch_size} is more than the {len(picked)} images of "
                        f"--labels {args.labels}")
    pixels = None if images.pixels is None else images.pixels[picked.to(images.pixels.device)]
    return replace(images, names=images.names[picked.numpy()], labels=images.labels[picked],
                   pixels=pixels, total=len(picked))


def write_labels(run: Run, images: Images) -> None:
    """labels.txt: the images whose labels were used, as --labels reads them."""
    lines = b"".join(os.fsencode(name) + b"\n" for name in images.names)
    write_file(run.path("labels.txt"), lambda file: file.write(lines))


# same as simsiam.py
def classify_batch(net: nn.Module, optimizer, batch, images: Images, args) -> Tensor:
    """One step on labelled images: cross-entropy on a crop of each, in --accumulate parts -> []."""
    x = normalize(batch.crops, args.mean, args.std).contiguous(memory_format=torch.channels_last)
    labels = images.labels[batch.shown].to(args.device)
    optimizer.zero_grad()
    loss = torch.zeros((), device=args.device, dtype=args.dtype)
    for x, label in zip(x.chunk(args.accumulate), labels.chunk(args.accumulate)):
        with autocast(args):
            logits = net(x)
        part = F.cross_entropy(logits.to(args.dtype), label, reduction="sum") / len(labels)
        part.backward()
        loss += part.detach()
    optimizer.step()
    return loss


class Classifier(nn.Module):
    """A linear classifier on the encoder, which is trained along (but for what build_encoder froze:
    a ViT's position table and patch projection), or frozen and in eval mode."""

    def __init__(self, encoder: nn.Module, classes: int, frozen: bool):
        super().__init__()
        self.encoder, self.frozen = encoder, frozen
        if frozen:
            encoder.requires_grad_(False)
        self.fc = nn.Linear(encoder.feature_dim, classes)
        nn.init.normal_(self.fc.weight, std=0.01)  # as in simsiam.py: MoCo; BYOL: fan_in ** -0.5
        nn.init.zeros_(self.fc.bias)

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            y = self.encoder(x)
        return self.fc(y)


def classify(args) -> None:
    """Linear evaluation, and fine-tuning of the whole network, with some or all labels (App. C.1):
    crops and flips, cross-entropy, SGD with Nesterov's momentum; authors' code: cosine decay per
    step."""
    data = load_data(args, labels=True)
    data.train = everywhere(lambda: labelled(data.train, args))
    names = b" ".join(map(os.fsencode, data.train.names))
    data.digest += f"-{hashlib.sha256(names).hexdigest()[:8]}"
    frozen = args.stage == "linear"
    model = Classifier(build_encoder(args), len(data.classes), frozen)
    net = prepare(model, args)
    lr = args.base_lr * args.batch_size / 256
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr,
                                momentum=args.momentum, nesterov=args.momentum > 0,
                                weight_decay=args.weight_decay)
    run = Run(args, data)
    on_rank_0(lambda: write_labels(run, data.train))
    say("protocol: " + ("linear classifier on the frozen encoder (eval mode)" if frozen else
                        "classifier and whole encoder, evaluated every --knn-every epochs")
        + f", SGD, Nesterov momentum {args.momentum:g}, lr {args.base_lr:g} x {args.batch_size} / "
        f"256 = {lr:g}, {args.epochs} epochs of {len(data.train)} labelled images, crops and "
        f"flips; top-1 of the last epoch on {len(data.val)} val images")
    run.save_views(data.train, 1, lambda batch: normalize(batch.crops, args.mean, args.std))
    fixed = []  # a frozen encoder's features of the val images: taken once

    def step(batch, epoch):
        done = epoch / args.epochs
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * done)) / 2
        return classify_batch(net, optimizer, batch, data.train, args), None

    @torch.no_grad()
    def evaluate(epoch):
        if epoch < args.epochs and not frozen and (not args.knn_every or epoch % args.knn_every):
            return {}
        y, shown = fixed or features(model.encoder, data.val, args)
        if frozen:
            fixed[:] = y, shown
        right = model.fc(y).argmax(dim=1) == data.val.labels[shown.cpu()].to(args.device)
        return {"top1": right.sum().item() / len(y)}

    fit(args, run, data, model, optimizer, step, lambda seen: {}, evaluate, views=1)


# same as simsiam.py
def embed(args) -> None:
    """features.pt: features [n, feature_dim], paths, labels (or None), classes, of every image."""
    data = load_data(args)
    model = nn.Module()
    model.encoder = build_encoder(args)
    prepare(model, args)
    rows, paths, labels = [], [], []
    for images in filter(None, (data.train, data.val)):
        h, _ = features(model.encoder, images, args)
        good = [i for i in range(len(images)) if images.path(i) not in images.unreadable]
        rows.append(h[good].cpu())
        paths += [images.path(i) for i in good]
        labels += images.labels[good].tolist() if data.val else []
    result = {"features": torch.cat(rows), "paths": paths, "labels": labels or None,
              "classes": data.classes}
    path = os.path.join(args.out, "features.pt")
    on_rank_0(lambda: write_file(path, lambda file: torch.save(result, file)))
    say(f"{path}: features {[*result['features'].shape]}")


# -------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> int:
    """Runs one stage; returns the exit code: 0, or 2 after one sentence about a user's mistake."""
    try:
        args = parse_args(argv)
        setup(args)
        {"pretrain": pretrain, "linear": classify, "finetune": classify,
         "embed": embed}[args.stage](args)
        return 0
    except (UserError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        known = {torch.OutOfMemoryError: "the device is out of memory: lower --batch-size",
                 KeyboardInterrupt: "interrupted; what was saved is whole"}
        if rank() == 0:
            print(f"{SCRIPT}.py: {known.get(type(error), error)}", file=sys.stderr, flush=True)
        else:  # torchrun ends all processes when one ends: let rank 0 speak first
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(3)
        return 2
    finally:
        if dist.is_initialized():
            # Gloo's thread lets go of the last collective's tensor, which takes the interpreter's
            # lock, and destroying holds that lock while it waits for the thread: give it the time.
            # Without this, one of five runs of two processes hung at its end (torch 2.6).
            time.sleep(0.2)
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
