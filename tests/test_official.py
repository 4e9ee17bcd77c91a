"""Our training steps against the authors' own, which tests/official/record_*.py recorded.

A recording has cases, and a case {quantity: {name: numbers}}; official/ours.py returns the same of
our steps. Recorder and test draw equal weights and views with numpy.
"""

import functools
import inspect
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_fields, settled

import byol
import dcl
import moco_v3
import simclr_v2
import simsiam

FOLDER = Path(__file__).resolve().parent / "official"
sys.path.insert(0, str(FOLDER))

from ours import OURS  # noqa: E402

# In float64. On kernels for other processors 3e-12 was the most, but for MoCo v3's last layer norm:
# the gradient of its bias is rounding noise, which Adam divides by 1e-8 (4e-11).
TOLERANCE = 1e-9
TOLERANCES = {"position": 1e-6}  # the table of sines: theirs is computed in float32


@functools.cache
def recording(method: str) -> dict:
    return json.loads((FOLDER / f"{method}.json").read_text())


def difference(ours: dict, theirs: dict) -> float:
    """The largest |ours - theirs| / |theirs| of {name: numbers}, over as many numbers as ours has.

    Where theirs is 0 but for rounding, |ours - theirs|."""
    if ours.keys() != theirs.keys() or not all(ours.values()):
        return math.inf
    a, b = (torch.tensor([x for name in ours for x in side[name][:len(ours[name])]],
                         dtype=torch.float64) for side in (ours, theirs))
    return ((a - b).abs() / torch.where(b.abs() < 1e-12, 1.0, b.abs())).max().item()


# ---------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("script, flags", [
    (script, flags) for script, table in recording("settings")["cases"].items() for flags in table])
def test_our_recipes_are_the_authors_commands(script, flags):
    found = recording("settings")
    assert_fields(settled(SCRIPTS[script], flags), found["cases"][script][flags])
    assert found["commit"][script].startswith(COMMITS[script])


# ------------------------------------------------------------------------------------- comparisons

SCRIPTS = dict(zip(OURS, (simsiam, dcl, moco_v3, byol, simclr_v2)))
COMMITS = {"simsiam": "a7bc177", "dcl": "a419ef2", "moco_v3": "c349e6e", "byol": "f5de0ed",
           "simclr": "383d414"}


@pytest.mark.parametrize("method, case", [
    (method, case) for method in OURS for case in recording(method)["cases"]])
def test_our_steps_are_the_authors(method, case):
    ours, theirs = OURS[method](case), recording(method)["cases"][case]
    assert ours.keys() == theirs.keys() and recording(method)["commit"].startswith(COMMITS[method])
    worst = {key: difference(ours[key], theirs[key]) for key in theirs}
    print(f"{method} {case}:", *(f"{key} {x:.0e}" for key, x in worst.items()), sep="  ")
    assert all(x < TOLERANCES.get(key, TOLERANCE) for key, x in worst.items()), worst
    if "norms before" in theirs:  # the steps did something
        same = [x == theirs["numbers after"][name] for name, x in theirs["numbers before"].items()]
        assert sum(same) < len(same) / 2 and len({*theirs["loss"]["loss"]}) == 5


VECTORS = """groups = [{**group, "params": [p for p in group["params"] if (p.ndim > 1) == large],
               "weight_decay": large * args.weight_decay} for group in groups for large in (0, 1)]
    return torch.optim.SGD(groups,"""
EMA = """with torch.no_grad():
        update_ema(*getattr(model, "module", model).averaged(), tau)"""
PASS = "h1, h2 = torch.cat([self.target_encoder(x) for x in views]).chunk(2)"
M = "margins(z1, z2, temperature, negatives)[0]"
MUTANTS = {  # name: method, case, function; its text, the mistake; steps, where it must show
    "no stop-gradient": ("simsiam", "constant", "simsiam_loss",
                         "if stop_grad", "if not stop_grad", 1, "gradients"),
    "no last BN": ("simsiam", "constant", "SimSiam",
                   "z1, z2 = self.projector(", "z1, z2 = self.projector[:-1](", 1, "loss"),
    "vectors without decay": ("simsiam", "constant", "build_optimizer",
                              "return torch.optim.SGD(groups,", VECTORS, 2, "gradients"),
    "predictor's lr decays": ("simsiam", "constant", "build_optimizer",
                              'args.predictor_lr == "decay"', "True", 3, "lr"),
    "positive in the denominator": ("dcl", "dcl", "dcl_loss",
                                    M, f"F.softplus({M})", 1, "loss, gradients"),
    "other view among the negatives": (
        "dcl", "dclw", "margins",
        "image[:, None] == torch.arange(2 * total, device=s.device) % total",
        "torch.eye(2 * n, dtype=torch.bool)", 1, "loss, gradients"),
    "keys enqueued before the loss": (
        "dcl", "queue", "train_step", "    loss, m =",
        "    module.enqueue(z2, args.ema_momentum)\n    loss, m =", 1, "loss, gradients"),
    "no factor 2 tau": ("moco_v3", "frozen", "contrastive_loss", "2 * temperature * F", "F",
                        1, "loss, gradients"),
    "positive of another image": ("moco_v3", "frozen", "contrastive_loss",
                                   "+ rank() * len(q)", ".roll(1)", 1, "loss, gradients"),
    "m stays": ("moco_v3", "learned", "momentum_schedule", 'args.ema_schedule == "constant"',
                "True", 3, "m, momentum encoder, keys, loss"),
    "keys of the same view": ("moco_v3", "conv", "train_step",
                              "loss(q2, k1", "loss(q2, k2", 1, "loss, gradients"),
    "f_k updated before f_q": (
        "moco_v3", "conv", "train_step", "optimizer.step()\n    module.update_momentum_encoder(m)",
        "module.update_momentum_encoder(m)\n    optimizer.step()", 3, "momentum encoder, keys"),
    "f_k in eval mode": ("moco_v3", "frozen", "MoCoV3", "        with torch.no_grad():",
                         "        self.momentum_projector.eval()\n        with torch.no_grad():",
                         1, "loss, keys"),
    "LARS adapts vectors": ("moco_v3", "resnet", "LARS", "exclude_1d: bool = True",
                            "exclude_1d: bool = False", 2, "momentum encoder"),
    "target follows before the step": (
        "byol", "steps", "train_step",
        f"optimizer.step()\n    {EMA}", f"{EMA}\n    optimizer.step()", 2, "target"),
    "target in eval mode": (
        "byol", "steps", "BYOL",
        PASS, f"self.target_encoder.eval(), self.target_projector.eval()\n                {PASS}",
        1, "loss, gradients"),
    "decay and adaptation of vectors": (
        "byol", "steps", "LARS", "exclude_1d: bool = True", "exclude_1d: bool = False",
        3, "adapted, loss, target"),
    "decay of vectors": (
        "byol", "steps", "LARS", "u, n = [p.grad for p in params]",
        'u, n = [p.grad + (p.ndim < 2) * group["weight_decay"] * p for p in params]',
        3, "adapted, loss, target"),
    "both views in one pass": (
        "byol", "steps", "BYOL", "if self.one_pass else [x1, x2]", "", 1, "loss, gradients"),
    "warm-up counted in the cosine": (
        "byol", "recipe 300", "warmup_cosine",
        "(epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)",
        "epoch / args.epochs", 5, "lr"),
    "lr outside the momentum": ("simclr", "sk", "build_optimizer", "lr_in_momentum=True",
                                "lr_in_momentum=False", 3, "loss, z, gradients"),
    "negatives of one view only": (
        "simclr", "cifar", "contrast_logits", "column == positive[:, None] + len(a)",
        "column >= len(a)", 1, "loss, gradients"),
    "head without its last BN": (
        "simclr", "cifar", "SimCLR", "z1, z2 = self.projector(h)",
        "z1, z2 = self.projector[-1][0](self.projector[:-1](h))", 1, "loss, z"),
    "a pass for each view": (
        "simclr", "sk", "SimCLR", "h = self.encoder(x)",
        "h = torch.cat([self.encoder(view) for view in x.chunk(2)])", 1, "loss, z, gradients"),
    "the mean of both views": ("simclr", "cifar", "train_step", "2 * nt_xent", "nt_xent",
                               1, "loss, gradients"),
    "no factor tau^2": ("simclr", "distillation", "distill_step", "args.temperature ** 2", "1",
                        1, "loss, gradients"),
    "no weight decay": ("simclr", "cifar", "build_optimizer",
                        "weight_decay=args.weight_decay, momentum", "weight_decay=0, momentum",
                        5, "gradients, norms after, numbers after"),
    "warm-up from the first lr": ("simclr", "schedules", "warmup_cosine",
                                  "epoch / args", "(epoch + 1) / args", 1, "lr"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_is_found(mutant, monkeypatch):
    method, case, function, text, mistake, steps, found_in = MUTANTS[mutant]
    script = SCRIPTS[method]
    source = inspect.getsource(getattr(script, function))
    assert source.count(text) == 1
    monkeypatch.setattr(script, function, None)  # which puts the original back
    exec(source.replace(text, mistake), vars(script))
    ours, theirs = OURS[method](case, steps), recording(method)["cases"][case]
    worst = {key: difference(ours[key], theirs[key]) for key in ours}
    assert all(worst[key] > 100 * TOLERANCE for key in found_in.split(", ")), worst
    assert all(worst[key] < TOLERANCE for key in worst if "before" in key)  # the same inputs
