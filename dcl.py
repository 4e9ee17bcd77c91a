"""DCL: Decoupled Contrastive Learning (Yeh, Hong, Hsu, Liu, Chen & LeCun, ECCV 2022).

Paper: https://arxiv.org/abs/2110.06848. We found no official code, and of the paper's body had the
equations and tables as others quote them; what is marked "recalled" stands on memory alone. Two
views of N images, z = g(f(x)) / |g(f(x))| (encoder f, projection head g), temperature tau; for an
anchor, say image i in view k:

    s = cos(z_i1, z_i2)                      # its positive: the other view of the same image
    U = sum exp(cos(z_ik, z_jl) / tau)       # its negatives: both views of all others, 2 (N - 1)
    m = log U - s / tau                      # the margin by which they win (m, our letter)
    InfoNCE = -log (P / (P + U)) = softplus(m)    # P = exp(s / tau); NT-Xent, SimCLR's loss
    DCL     = -log (P / U)       = m              # the positive leaves the denominator
    DCLW    = -w s / tau + log U                  # w = 2 - exp(s / sigma) / mean exp(s / sigma)
    q_B     = U / (P + U)        = sigmoid(m)     # negative-positive coupling (NPC) multiplier

As d softplus(m) = sigmoid(m) dm, InfoNCE's gradient is DCL's times q_B, anchor by anchor: an
anchor whose positive is easy (q_B near 0) hardly moves its negatives, however hard they are, and
few negatives (small N) make U, and with it q_B, small. DCL drops the factor; its value may be
negative, and does not compare with InfoNCE's. q_B is logged whatever is trained: at temperature
0.5 it is near 1 for every batch size (by our simulation), and the losses hardly differ.

Departures and readings (more in the table of recipes): a loss is the mean over the 2N anchors (the
paper's, as quoted: the sum); DCLW's weight is a constant (--dclw-backprop-weight: it is not), its
mean the global batch's; both views pass together, so that batch norm sees 2N images, for every
loss; kNN is by the backbone's features (the paper's protocol: unknown); ImageNet's recipe aims at
65.9 % (seed), not at the abstract's 68.2 % (recalled: tau 0.2, base lr 0.07, BYOL's augmentation);
bfloat16 forward pass on hardware that has it. The queue (with tau 0.07, recalled) works as MoCo
v2's (arXiv:2003.04297), with the recipe's own head and augmentation: one direction, queries of the
first views, keys of the second ones from a momentum encoder, negatives random until it is full.
MoCo shuffles the batch over the GPUs, lest a query tell its key by the batch norm statistics that
they share; here both see the global batch, and nothing prevents it.

    python dcl.py                                              # built-in images, a minute or two
    python dcl.py --loss infonce --out runs/infonce            # the same with InfoNCE, or dclw
    python dcl.py --data cifar10 --batch-size 32               # small batches; lr follows
    torchrun --nproc_per_node=8 dcl.py --data /data/imagenet   # batch 256
    torchrun --nproc_per_node=8 dcl.py --data /data/imagenet --queue 256 --temperature 0.07
    python dcl.py linear --init runs/dcl-demo/last.pt          # linear evaluation
    python dcl.py embed --init runs/dcl-demo/last.pt --data FOLDER   # features of a folder
"""

import argparse
import collections
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

from common import BLOCKS, LARS, AllReduceSum, demo_images, resnet, synchronize_batch_norm

# ----------------------------------------------------------------------------------------- recipes

# Every field is also a flag (--temperature 0.1). "seed": an article that reports the paper's
# tables; "recalled": from memory; CLD: frank-xwang/CLD-UnsupervisedLearning, whose benchmark the
# paper's small data sets follow (recalled); "unknown": not in what we had, so ours, as the rest is.
RECIPE_NAMES = ("imagenet", "imagenet100", "stl10", "cifar", "demo")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's
PRETRAIN = {
    # ---------------- imagenet -- imagenet100 -- stl10 -- cifar -- demo
    "arch": ("resnet50", "resnet50", "resnet18", "resnet18", "resnet10"),  # ResNet-18: seed; -50:
    #                    recalled; on imagenet100 inferred, for its 80.7 % is beyond a ResNet-18
    "width":              (1.0, 1.0, 1.0, 1.0, 0.25),
    "small_images":       (False, False, True, True, True),  # a 3x3 stem: recalled for cifar, ours
    #                    for stl10; and no margin in the test view
    "zero_init_residual": (False,) * 5,        # unknown: torchvision's default
    "hidden_dim":         (2048, 2048, 512, 512, 256),  # two layers: recalled; their width: ours
    "dim":                (128,) * 5,          # of z. recalled
    "head_bn":            (True,) * 5,         # batch norm in the hidden layer: unknown, ours
    # ---------------- the losses
    "loss":               ("dcl",) * 5,        # infonce, dclw
    "temperature":        (0.1, 0.1, 0.07, 0.07, 0.1),  # tau. recalled (imagenet100: weakly)
    "sigma":              (0.5,) * 5,          # of DCLW's weight: lightly and others agree on it
    "dclw_backprop_weight": (False,) * 5,      # ours, as lightly; the paper, it says, names neither
    "negatives":          ("global",) * 5,     # of all processes; local: of this one
    "queue":              (0,) * 5,            # that many negatives from earlier batches, MoCo v2's
    "ema_momentum":       (0.999, 0.999, 0.99, 0.99, 0.99),  # of the queue's encoder: MoCo,
    #                    arXiv:1911.05722; its authors' demo on CIFAR has 0.99
    # ---------------- optimisation: SGD
    "epochs":             (200, 200, 200, 200, 3),  # seed
    "batch_size":         (256, 256, 256, 256, 64),  # of all processes together. seed
    "base_lr":            (0.03, 0.03, 0.03, 0.03, 0.5),  # lr: this * batch_size / 256, cosine.
    #                    recalled, imagenet's weakly; imagenet100's is unknown
    "warmup_epochs":      (0, 0, 0, 0, 0),     # unknown; CLD's: 5
    "momentum":           (0.9,) * 5,          # recalled for stl10 and cifar
    "weight_decay":       (1e-4, 1e-4, 5e-4, 5e-4, 5e-4),  # unknown; 5e-4: CLD's default, not its
    #                    scripts' 7e-4. Of biases and batch norms too, as lightly: unknown
    "precision":          ("auto",) * 5,       # auto: bf16 where native, else fp32: ours
    # ---------------- augmentation, the same for both views. SimCLR's; stl10 and cifar: CLD's, but
    #                    for cifar's mean and std, ours
    "image_size":         (224, 224, 96, 32, 32),  # pixels
    "crop_min":           (0.08, 0.08, 0.2, 0.2, 0.4),  # least share of the area
    "jitter":             ((0.8, 0.8, 0.8, 0.2),) * 2 + ((0.4, 0.4, 0.4, 0.4),) * 2
                          + ((0.4, 0.4, 0.4, 0.1),),  # brightness, contrast, saturation, hue
    "jitter_prob":        (0.8, 0.8, 1.0, 1.0, 0.8),
    "gray_prob":          (0.2,) * 5,
    "blur_prob":          (0.5, 0.5, 0.0, 0.0, 0.0),
    "mean":               (IMAGENET_MEAN,) * 2 + ((0.5, 0.5, 0.5),) * 3,
    "std":                (IMAGENET_STD,) * 2 + ((0.5, 0.5, 0.5),) * 2 + ((0.25, 0.25, 0.25),),
    # ---------------- kNN monitor: CLD's k and temperature, on the backbone as lightly's
    "knn_k":              (200,) * 5,
    "knn_temperature":    (0.1,) * 5,
}
LINEAR = {  # the paper's is OpenSelfSup's (recalled), whose numbers we do not have: our choice
    # ---------------- imagenet -- imagenet100 -- stl10 -- cifar -- demo
    "optimizer":          ("sgd",) * 5,
    "base_lr":            (30.0, 30.0, 30.0, 30.0, 3.0),
    "epochs":             (100, 100, 100, 100, 30),
    "batch_size":         (256,) * 5,
    "momentum":           (0.9,) * 5,
    "weight_decay":       (0.0,) * 5,
    "crop_min":           (0.08, 0.08, 0.08, 0.08, 0.4),
    "precision":          ("auto",) * 5,
}
TABLES = {"pretrain": PRETRAIN, "linear": LINEAR, "embed": {"precision": ("auto",) * 5}}
CHOICES = {
    "arch": tuple(f"resnet{depth}" for depth in BLOCKS),
    "loss": ("infonce", "dcl", "dclw"),
    "negatives": ("global", "local"),
    "optimizer": ("sgd", "larc"),
    "precision": ("auto", "bf16", "fp32", "fp64"),
}
ENCODER = ("arch", "width", "small_images", "zero_init_residual", "image_size", "mean", "std")
SCRIPT = "dcl"

# ------------------------------------------------------------------------------------ augmentation


def augment(x: Tensor, u: Tensor, args) -> Tensor:
    """Second stage of a view, on the device: colours, blur, normalisation (SimCLR's).

    x [B, 3, S, S] in [0, 1]: random crops, flipped with probability 0.5 (the first stage: `Stage1`
    and `resized_crop` below). u [B, COLOUR_DRAWS]: uniform random numbers, each image's own.
    """
    x = color_jitter(x, u[:, 0:9], args.jitter, args.jitter_prob)
    x = grayscale(x, u[:, 9], args.gray_prob)
    x = gaussian_blur(x, u[:, 10:12], args.blur_prob, sigma=(0.1, 2.0))  # SimCLR, App. A
    return normalize(x, args.mean, args.std)


# ------------------------------------------------------------------------------------------- model


def build_encoder(args) -> nn.Module:
    """Images [B, 3, S, S] -> features [B, feature_dim]: f, what one keeps."""
    return resnet(int(args.arch.removeprefix("resnet")), args.width,
                  small_images=args.small_images, zero_init_residual=args.zero_init_residual)


class Contrast(nn.Module):
    """g(f(.)); with a queue also the momentum encoder and the negatives that it made earlier.

    encoder maps images [B, 3, S, S] to [B, encoder.feature_dim]. queue: negatives kept, 0 for none.
    """

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
        """Both views of N images [2N, 3, S, S] -> z1, z2 [N, d], in one pass, for one batch norm
        over all; with a queue in two: the first views' z and the second views' keys."""
        if self.queue is None:
            return self.projector(self.encoder(x)).chunk(2)
        x1, x2 = x.chunk(2)
        with torch.no_grad():
            keys = self.key_projector(self.key_encoder(x2))
        return self.projector(self.encoder(x1)), keys

    @torch.no_grad()
    def enqueue(self, keys: Tensor, m: float) -> None:
        """After a step: the momentum encoder follows the updated weights (MoCo: before the next
        keys, which are the same), and the keys take the oldest ones' places."""
        update_ema([*self.key_encoder.parameters(), *self.key_projector.parameters()],
                   [*self.encoder.parameters(), *self.projector.parameters()], m)
        keys = all_gather(F.normalize(keys.to(self.queue.dtype), dim=1))
        place = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[place] = keys
        self.oldest.copy_((self.oldest + len(keys)) % len(self.queue))


# same as moco_v3.py
def update_ema(target: list[Tensor], online: list[Tensor], m: float) -> None:
    """target = m * target + (1 - m) * online, in place, all tensors at once."""
    torch._foreach_lerp_(target, online, 1 - m)


# -------------------------------------------------------------------------------------------- loss


# same as byol.py
def unit(x: Tensor) -> Tensor:
    """Rows of x [B, d] at length 1, in float32 at least."""
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return F.normalize(x, dim=1, eps=1e-6)  # BYOL's code: 1e-12, of the square


def margins(z1: Tensor, z2: Tensor, temperature: float,
            negatives: str = "global") -> tuple[Tensor, Tensor]:
    """m = log U - s / tau of this process's 2n anchors, first views before second, [2n], and the
    cosines s of the n positive pairs [n].

    z1, z2 [n, d] of one process, of any length. negatives "global": those of all processes, with
    gradient; the mean over processes of a mean of m, and DDP's mean of its gradient, are then those
    of the global batch. Fewer than two images leave no negative: an error.
    """
    z1, z2 = unit(z1), unit(z2)
    first, second = (gather_with_gradient(z) if negatives == "global" else z for z in (z1, z2))
    if len(first) < 2:
        raise ValueError("a batch of one image has no negatives")
    with torch.autocast(z1.device.type, enabled=False):  # which would round the products
        s = (z1 * z2).sum(dim=1)
        cosines = torch.cat([z1, z2]) @ torch.cat([first, second]).T
    # -inf before the logsumexp: a sum from which exp(1 / tau) is subtracted loses all its digits.
    row = torch.arange(2 * len(z1), device=z1.device)
    own = row % len(z1) + (rank() * len(z1) if len(first) > len(z1) else 0)
    cosines[row, own] = cosines[row, own + len(first)] = -math.inf  # the anchor, and its positive
    return torch.logsumexp(cosines / temperature, dim=1) - s.repeat(2) / temperature, s


def info_nce_loss(z1: Tensor, z2: Tensor, temperature: float, negatives: str = "global") -> Tensor:
    """InfoNCE (NT-Xent), softplus(m): the mean over the 2N anchors. [n, d] of one process -> []."""
    return F.softplus(margins(z1, z2, temperature, negatives)[0]).mean()


def dcl_loss(z1: Tensor, z2: Tensor, temperature: float, negatives: str = "global") -> Tensor:
    """DCL, m: InfoNCE without the positive in the denominator; it has no lower bound of 0."""
    return margins(z1, z2, temperature, negatives)[0].mean()


def pair_weights(s: Tensor, sigma: float = 0.5, backprop: bool = False) -> Tensor:
    """DCLW's w = 2 - exp(s / sigma) / mean exp(s / sigma) of this process's positives, [n] -> [n];
    the mean is the global batch's. w is 1 on average, less for easy pairs, and may be negative."""
    pairs = gather_with_gradient(s if backprop else s.detach())
    weights = 2 - len(pairs) * F.softmax(pairs / sigma, dim=0)
    return weights.unflatten(0, (-1, len(s)))[rank() if world_size() > 1 else 0]


def dclw_loss(z1: Tensor, z2: Tensor, temperature: float, sigma: float = 0.5,
              negatives: str = "global", backprop_weight: bool = False) -> Tensor:
    """DCLW: DCL with pair_weights on the positives."""
    m, s = margins(z1, z2, temperature, negatives)
    return weighted(m, s, pair_weights(s, sigma, backprop_weight), temperature).mean()


def weighted(m: Tensor, s: Tensor, w: Tensor, temperature: float) -> Tensor:
    """-w s / tau + log U of the anchors [2n]; m holds -s / tau already, and here comes the rest."""
    return m + ((1 - w) * s / temperature).repeat(2)


@torch.no_grad()
def npc_multiplier(z1: Tensor, z2: Tensor, temperature: float, negatives: str = "global") -> Tensor:
    """q_B = sigmoid(m) of this process's 2n anchors, first views before second. [n, d] -> [2n]."""
    return margins(z1, z2, temperature, negatives)[0].sigmoid()


def queue_margins(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """m against a queue (MoCo v2's setting): queries q [n, d], their keys k [n, d], negatives queue
    [K, d] of length 1 -> [n]. Neither keys nor queue have a gradient."""
    q, k = unit(q), unit(k.detach())
    with torch.autocast(q.device.type, enabled=False):
        cosines = q @ queue.detach().to(q.dtype).T
    return torch.logsumexp(cosines / temperature, dim=1) - (q * k).sum(dim=1) / temperature


# ---------------------------------------------------------------------------------------- training


def build_optimizer(model: Contrast, args) -> torch.optim.SGD:
    """SGD on everything that has a gradient: with Adam or LARS the mean of q_B would cancel."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0,
                           momentum=args.momentum, weight_decay=args.weight_decay,
                           fused=args.device.type in ("cpu", "cuda"))


# same as moco_v3.py
def warmup_cosine(epoch: float, args) -> float:
    """The lr as a share of its peak: linear from 0 over the warm-up, then half a cosine to 0, step
    by step (MoCo v3's code). With a warm-up the first step of all has lr 0."""
    if epoch < args.warmup_epochs:
        return epoch / args.warmup_epochs
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return (1 + math.cos(math.pi * progress)) / 2


def loss_and_margins(z1: Tensor, z2: Tensor, queue: Tensor | None, args) -> tuple[Tensor, ...]:
    """The loss [] that --loss names, and without gradient the margins m [2n] (with a queue [n]) and
    DCLW's weights [n] (else none: [0])."""
    if queue is None:
        m, s = margins(z1, z2, args.temperature, args.negatives)
    else:
        m = queue_margins(z1, z2, queue, args.temperature)
    w, terms = m[:0], F.softplus(m) if args.loss == "infonce" else m
    if args.loss == "dclw":
        w = pair_weights(s, args.sigma, args.dclw_backprop_weight)
        terms = weighted(m, s, w, args.temperature)
    return terms.mean(), m.detach(), w.detach()


def train_step(model, optimizer, x: Tensor, epoch: float, args):
    """One step. x: both views [2n, 3, S, S]; epoch: passes over the data so far, a fraction within
    one. Returns, all detached, the loss [], z1 [n, d], margins and weights of this process."""
    module = getattr(model, "module", model)
    lr = args.base_lr * args.batch_size / 256  # linear scaling, of the global batch (recalled)
    for group in optimizer.param_groups:
        group["lr"] = lr * warmup_cosine(epoch, args)
    with autocast(args):
        z1, z2 = model(x)
    loss, m, w = loss_and_margins(z1, z2, module.queue, args)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if args.queue:
        module.enqueue(z2, args.ema_momentum)
    return loss.detach(), z1.detach(), m, w


class CouplingMonitor:
    """Statistics of q_B = sigmoid(m) and of both losses, over the anchors of all processes.

    window: steps that a histogram covers, for one step of a small batch has too few anchors."""

    def __init__(self, window: int = 1):
        self.sums, self.recent = [], collections.deque(maxlen=window)

    def add(self, m: Tensor) -> None:
        self.recent.append(m)
        m = m.double() if m.device.type != "mps" else m.float()
        q = m.sigmoid()
        self.sums.append(torch.stack([torch.ones_like(q), q, q.square(), (q < 0.1).to(q), m,
                                      F.softplus(m)]).sum(dim=1))

    def read(self) -> dict[str, float]:
        """Means over the steps since the last reading; std and q_cv are taken within a step."""
        n, *sums = sum_over_processes(torch.stack(self.sums)).unbind(dim=1)
        self.sums = []
        mean, square, small, dcl, infonce = (part / n for part in sums)
        std = (square - mean.square()).clamp(min=0).sqrt()
        found = {"q_mean": mean, "q_std": std, "q_cv": std / mean.clamp(min=1e-38),  # not 0 / 0
                 "q_below_0.1": small, "dcl": dcl, "infonce": infonce}
        return {name: value.mean().item() for name, value in found.items()}

    def histogram(self) -> list[int]:
        """Anchors of the last `window` steps, or of those since the start, in 50 bins of [0, 1]."""
        q = torch.cat([*self.recent]).float().sigmoid().cpu()
        return sum_over_processes(torch.histc(q, bins=50, min=0, max=1)).int().tolist()

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
    """What the flags and --init make together must be buildable."""
    flag = {name: f"--{name.replace('_', '-')} {getattr(args, name)}" for name in args.fields}
    if 64 * args.width < 8:  # with 4 to 7 channels oneDNN corrupts memory on AVX2 (torch 2.15)
        raise UserError(f"--width {args.width} leaves the stem fewer than 8 channels: 0.125 is the "
                        "least")
    if args.stage != "pretrain":
        return
    if args.hidden_dim == 0:
        raise UserError("--hidden-dim 0 leaves the head without a hidden layer: 1 at least")
    if args.queue % args.batch_size:
        raise UserError(f"{flag['queue']} takes whole batches: a multiple of --batch-size "
                        f"{args.batch_size}")
    if args.queue and args.loss == "dclw":
        raise UserError("--loss dclw has no form for a queue: give infonce or dcl, or --queue 0")
    images = args.batch_size // (world_size() if args.negatives == "local" else 1)
    if not args.queue and images < 2:
        raise UserError(f"{flag['negatives']} leaves a process one image, which has no negatives: "
                        "give a larger --batch-size, or --negatives global")
    unused = {"sigma": args.loss != "dclw", "dclw_backprop_weight": args.loss != "dclw",
              "negatives": args.queue, "ema_momentum": not args.queue}
    for name in unused.keys() & args.given.keys():
        if unused[name]:
            raise UserError(f"{flag[name]} would change nothing here")


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


# same as byol.py
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

CROP_DRAWS, COLOUR_DRAWS = 23, 12  # uniform numbers that one view of one image takes


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
    raise UserError("this is another method's official checkpoint, and we know none of DCL's: "
                    "--init takes last.pt or encoder.pt of a run")


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
    """Training over the whole data, with its monitors."""
    data = load_data(args)
    per_epoch = len(data.train) // args.batch_size
    if args.queue >= per_epoch * args.batch_size:
        raise UserError(f"--queue {args.queue} is no less than an epoch: an image's own key of the "
                        f"epoch before would be among its negatives; {args.data} has "
                        f"{len(data.train)} images")
    model = Contrast(build_encoder(args), args.dim, args.hidden_dim, args.head_bn, args.queue)
    net = prepare(model, args)
    if args.queue and args.initial and all(n.startswith("encoder.") for n in args.initial.state):
        # An encoder alone: the momentum encoder starts as its copy.
        model.key_encoder.load_state_dict(model.encoder.state_dict())
    optimizer = build_optimizer(model, args)
    run = Run(args, data)
    images = args.batch_size // (world_size() if args.negatives == "local" else 1)
    negatives = args.queue or 2 * (images - 1)
    say(f"{args.loss}: {negatives} negatives an anchor, batch {args.batch_size}; InfoNCE by chance "
        f"{math.log(negatives + 1):.2f}, DCL {math.log(negatives):.2f}, which has no least value")
    # Histograms of q_B at these shares of the run, of at least 4096 anchors, for 50 bins: ours.
    steps = args.epochs * per_epoch
    marks = {max(1, round(share * steps)): share for share in (0.01, 0.1, 0.5, 1.0)}
    coupling = CouplingMonitor(window=-(-4096 // (args.batch_size * (1 if args.queue else 2))))

    def step(batch, epoch):
        x = augment(batch.crops, batch.colours, args)
        loss, z, m, w = train_step(net, optimizer, x, epoch, args)
        coupling.add(m)
        number = round(epoch * per_epoch) + 1
        if number in marks:
            run.log(epoch=round(number / per_epoch, 4), step=number, share=marks[number],
                    q_histogram=coupling.histogram())
        return loss, (z, w)

    def monitor(seen):
        z, w = map(all_gather, seen)
        z = z[:512].cpu()  # 512 images are enough for a monitor: our choice, for speed
        weight = {"w_min": w.min().item(), "w_mean": w.mean().item()} if len(w) else {}
        return {"std": feature_std(z), "rank": effective_rank(z), **coupling.read(), **weight}

    run.save_views(data.train, 2, lambda batch: augment(batch.crops, batch.colours, args))
    fit(args, run, data, model, optimizer, step, monitor, views=2,
        evaluate=lambda epoch: knn_monitor(model.encoder, data, epoch, args))


# same as simsiam.py
class LinearProbe(nn.Module):
    """A linear classifier on the frozen encoder, whose batch norms stay in eval mode."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.fc = nn.Linear(encoder.feature_dim, classes)
        nn.init.normal_(self.fc.weight, std=0.01)  # MoCo, arXiv:1911.05722, code; SimSiam's too
        nn.init.zeros_(self.fc.bias)

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.encoder(x)
        return self.fc(h)


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


# same as simsiam.py
def linear(args) -> None:
    """Linear evaluation: crops and flips, cross-entropy, cosine decay per epoch."""
    data = load_data(args, labels=True)
    model = LinearProbe(build_encoder(args), len(data.classes))
    net = prepare(model, args)
    lr = args.base_lr * args.batch_size / 256
    larc = functools.partial(LARS, exclude_1d=False)
    optimizer = (larc if args.optimizer == "larc" else torch.optim.SGD)(
        model.fc.parameters(), lr=lr, momentum=args.momentum, weight_decay=args.weight_decay)
    run = Run(args, data)
    say(f"protocol: linear classifier on the frozen encoder (eval mode), {args.optimizer}, lr "
        f"{args.base_lr:g} x {args.batch_size} / 256 = {lr:g}, {args.epochs} epochs, crops and "
        f"flips; top-1 of the last epoch on {len(data.val)} val images")
    run.save_views(data.train, 1, lambda batch: normalize(batch.crops, args.mean, args.std))
    h, shown = features(model.encoder, data.val, args)  # once, for the encoder does not change
    val_labels = data.val.labels[shown.cpu()].to(args.device)

    def step(batch, epoch):
        cosine = math.cos(math.pi * int(epoch) / args.epochs)
        optimizer.param_groups[0]["lr"] = lr * (1 + cosine) / 2
        return classify_batch(net, optimizer, batch, data.train, args), None

    @torch.no_grad()
    def evaluate(epoch):
        return {"top1": (model.fc(h).argmax(dim=1) == val_labels).sum().item() / len(h)}

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
        {"pretrain": pretrain, "linear": linear, "embed": embed}[args.stage](args)
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
