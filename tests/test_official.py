"""Our training steps against the authors' own, which tests/official/record_*.py recorded.

A recording has cases, and a case {quantity: {name: numbers}}. Our steps return the same layout,
with fewer numbers where they ran fewer steps. Weights and views are drawn here and there by numpy.
"""

import functools
import importlib
import inspect
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_fields, settled

import byol
import common
import dcl
import moco_v3
import simsiam

FOLDER = Path(__file__).resolve().parent / "official"
sys.path.insert(0, str(FOLDER))

import drawn  # noqa: E402

# In float64. On kernels for other processors 3e-12 was the most, but for MoCo v3's last layer norm:
# the gradient of its bias is rounding noise, which Adam divides by 1e-8 (4e-11).
TOLERANCE = 1e-9
TOLERANCES = {"position": 1e-6}  # the table of sines: theirs is computed in float32


def recorder(method: str):
    """The module record_<method>.py: its settings and inputs."""
    return importlib.import_module(f"record_{method}")


@functools.cache
def recording(method: str) -> dict:
    return json.loads((FOLDER / f"{method}.json").read_text())


def gradient_norms(model, norms: dict[str, list]) -> None:
    """Appends the norm of every gradient to its list."""
    for name, p in model.named_parameters():
        if p.grad is not None:
            norms.setdefault(name, []).append(p.grad.norm().item())


def difference(ours: dict, theirs: dict) -> float:
    """The largest |ours - theirs| / |theirs| of {name: numbers}, over as many numbers as ours has.

    Where theirs is 0 but for rounding, |ours - theirs|."""
    if ours.keys() != theirs.keys() or not all(ours.values()):
        return math.inf
    a, b = (torch.tensor([x for name in ours for x in side[name][:len(ours[name])]],
                         dtype=torch.float64) for side in (ours, theirs))
    return ((a - b).abs() / torch.where(b.abs() < 1e-12, 1.0, b.abs())).max().item()


# ----------------------------------------------------------------------------------------- SimSiam


def simsiam_steps(case: str, steps: int = 5) -> dict:
    record = recorder("simsiam")
    args = settled(simsiam, "--recipe imagenet --arch resnet18 --image-size 32 --dim 64 "
                   "--predictor-dim 16 --epochs 4 --batch-size 16 --base-lr 0.8 "
                   f"--predictor-lr {case}")
    assert {name: getattr(args, name) for name in record.SETTINGS} == record.SETTINGS
    model = simsiam.SimSiam(simsiam.build_encoder(args), args.dim, args.predictor_dim,
                            args.hidden_dim, args.projector_layers, args.bn, args.predictor)
    model.double().train()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    values, views = record.inputs(shapes)
    model.load_state_dict(values, strict=False)  # the buffers of the batch norms stay
    ours = {"loss": {"loss": []}, "lr": {"f": [], "h": []}, "gradients": {}}
    ours |= drawn.summary(model.state_dict(), record.NUMBERS, "before")
    optimizer = simsiam.build_optimizer(model, args)
    for step, (x1, x2) in enumerate(views[:steps]):
        loss, _ = simsiam.train_step(model, optimizer, x1, x2, step / record.PER_EPOCH, args)
        ours["loss"]["loss"].append(loss.item())
        ours["lr"]["f"].append(optimizer.param_groups[0]["lr"])
        ours["lr"]["h"].append(optimizer.param_groups[1]["lr"])
        gradient_norms(model, ours["gradients"])
    return ours | (drawn.summary(model.state_dict(), record.NUMBERS, "after")
                   if steps == record.STEPS else {})


# --------------------------------------------------------------------------------------------- DCL


def dcl_steps(case: str, steps: int = 5) -> dict:
    record = recorder("dcl")
    if case != "queue":
        loss = {"infonce": dcl.info_nce_loss, "dcl": dcl.dcl_loss, "dclw": dcl.dclw_loss}
        z = record.embeddings()
        return record.of_embeddings(loss[case.split()[0]](*z, record.LOSSES[case]), z)
    args = settled(dcl, "--recipe imagenet --arch resnet10 --image-size 32 --dim 16 --queue 32",
                   "--hidden-dim 512 --no-head-bn --loss infonce --temperature 0.07 --epochs 4",
                   "--ema-momentum 0.9 --batch-size 8 --base-lr 3.2")
    assert {name: getattr(args, name) for name in record.SETTINGS} == record.SETTINGS
    model = dcl.Contrast(dcl.build_encoder(args), args.dim, args.hidden_dim, args.head_bn,
                         args.queue).double().train()
    keys = {name: p for name, p in model.named_parameters() if name.startswith("key_")}
    online = {name: p.shape for name, p in model.named_parameters() if name not in keys}
    values, views, queue = record.inputs(online)
    model.load_state_dict(values | {name: values[name[4:]] for name in keys} | {"queue": queue},
                          strict=False)

    def state():
        return {name: x for name, x in model.state_dict().items()
                if not name.startswith("key_") and name != "oldest"}

    ours = drawn.summary(state(), record.NUMBERS, "before") | {
        "loss": {"loss": []}, "lr": {"lr": []}, "gradients": {}, "queue": {"sum": [], "oldest": []},
        "key encoder": {name: [] for name in keys}}
    optimizer = dcl.build_optimizer(model, args)
    for step, x in enumerate(views[:steps]):
        for name, norms in ours["key encoder"].items():  # as they make the keys
            norms.append(keys[name].norm().item())
        loss, *_ = dcl.train_step(model, optimizer, x.flatten(0, 1), step / record.PER_EPOCH, args)
        ours["loss"]["loss"].append(loss.item())
        ours["lr"]["lr"].append(optimizer.param_groups[0]["lr"])
        gradient_norms(model, ours["gradients"])
        ours["queue"]["sum"].append(model.queue.sum().item())
        ours["queue"]["oldest"].append(model.oldest.item())
    return ours | (drawn.summary(state(), record.NUMBERS, "after") if steps == record.STEPS else {})


# ----------------------------------------------------------------------------------------- MoCo v3


def moco_v3_steps(case: str, steps: int = 5) -> dict:
    record = recorder("moco_v3")
    recipe = "imagenet-r50-100" if case == "resnet" else "imagenet"
    args = settled(moco_v3, "--recipe", recipe, *(
        f"--{name.replace('_', '-')} {value}" for name, value in record.SETTINGS[case].items()))
    if case == "conv":
        args.arch = "vit_conv_mini"  # which the command line does not offer
    model = moco_v3.MoCoV3(moco_v3.build_encoder(args), args.dim, args.hidden_dim,
                           args.projector_layers, args.predictor, args.predictor_output_bn, args.bn)
    model.double().train()
    named = dict(model.named_parameters())
    values, views = record.inputs({name: p.shape for name, p in record.online(named).items()})
    ours = {} if case == "resnet" else {
        "position": {"token 3": named["encoder.pos_embed"][0, 3].tolist()}}
    model.load_state_dict(values | {f"momentum_{name}": x for name, x in values.items()
                                    if f"momentum_{name}" in named}, strict=False)
    ours |= record.summary(model.state_dict(), "before") | record.empty(named)
    optimizer, keys = moco_v3.build_optimizer(model, args), []
    model.momentum_projector.register_forward_hook(lambda module, x, k: keys.append(k))
    record.note_momentum_encoder(ours, named)
    for step, (x1, x2) in enumerate(views[:steps]):
        # Theirs takes a step's m before the keys, ours the next step's m after them.
        ours["m"]["m"].append(moco_v3.momentum_schedule(step / record.PER_EPOCH, args))
        m = moco_v3.momentum_schedule((step + 1) / record.PER_EPOCH, args)
        loss, *_ = moco_v3.train_step(model, optimizer, x1, x2, step / record.PER_EPOCH, m, args)
        ours["loss"]["loss"].append(loss.item())
        ours["lr"]["lr"].append(optimizer.param_groups[0]["lr"])
        record.note_keys(ours, keys[-2:])
        gradient_norms(model, ours["gradients"])
        record.note_momentum_encoder(ours, named)
    return ours | (record.summary(model.state_dict(), "after") if steps == record.STEPS else {})


# -------------------------------------------------------------------------------------------- BYOL


def byol_recipe(epochs: str) -> dict:
    """Settings and schedules. An epoch of theirs has 1281167 / 4096 steps, not a whole number, and
    run and warm-up are rounded down to whole steps; ours has 312. The schedules are compared at
    their steps, as if an epoch was one step."""
    record = recorder("byol")
    args = settled(byol, "--recipe", "imagenet" if epochs == "1000" else f"imagenet-{epochs}")
    total, warmup = (int(x * record.IMAGES / args.batch_size)
                     for x in (args.epochs, args.warmup_epochs))
    found = {"settings": {name: [getattr(args, name)] for name in (
        "base_lr", "base_tau", "dim", "hidden_dim", "width", "momentum", "weight_decay")}}
    found["settings"] |= {"total": [total], "warmup": [warmup],
                          "depth": [int(args.arch.removeprefix("resnet"))]}
    args.epochs, args.warmup_epochs, lr = total, warmup, args.base_lr * args.batch_size / 256
    steps = record.points(total, warmup)
    return found | {
        "lr": {str(step): [lr * byol.warmup_cosine(step, args)] for step in steps},
        "tau": {str(step): [byol.ema_tau(step, total, byol.scaled_tau(args))] for step in steps}}


def byol_steps(case: str, steps: int = 5) -> dict:
    if case != "steps":
        return byol_recipe(case.removeprefix("recipe "))
    record = recorder("byol")
    args = settled(byol, "--recipe imagenet-300 --width 0.25 --image-size 33 --dim 16 --epochs 3",
                   "--hidden-dim 64 --warmup-epochs 1 --batch-size 16 --base-lr 32",
                   "--weight-decay 0.01 --base-tau 0.9")
    assert {name: getattr(args, name) for name in record.SETTINGS} == record.SETTINGS
    encoder = common.ResNet(common.Bottleneck, record.BLOCKS, args.width, 0.0, args.small_images)
    model = byol.BYOL(encoder, args.dim, args.hidden_dim, args.output_bn, args.predictor,
                      args.target).double().train()
    parameters = dict(model.named_parameters())
    values, views = record.inputs({name: p.shape for name, p in parameters.items()})
    model.load_state_dict(values, strict=False)  # the buffers of the batch norms stay

    def state():  # theirs of the variances are biased
        return {name: x for name, x in model.state_dict().items()
                if not name.endswith(("running_var", "num_batches_tracked"))}

    ours = drawn.summary(state(), record.NUMBERS, "before") | {
        "adapted": {}, "loss": {"loss": []}, "lr": {"lr": []}, "tau": {"tau": []}, "gradients": {},
        "target": {name: [] for name in parameters if name.startswith("target_")}}
    optimizer = byol.build_optimizer(model, args)
    for step, x in enumerate(views[:steps]):
        tau = byol.ema_tau(step, args.epochs * record.PER_EPOCH, byol.scaled_tau(args))
        x1, x2 = (byol.normalize(view, args.mean, args.std) for view in x)
        loss, _ = byol.train_step(model, optimizer, x1, x2, step / record.PER_EPOCH, tau, args)
        if step == 0:  # where LARS does not adapt, its momentum starts as the gradient
            ours["adapted"] = {name: [float(not torch.equal(
                optimizer.state[p]["momentum_buffer"], p.grad))]
                for name, p in parameters.items() if p.grad is not None}
        ours["loss"]["loss"].append(loss.item())
        ours["lr"]["lr"].append(optimizer.param_groups[0]["lr"])
        ours["tau"]["tau"].append(tau)
        gradient_norms(model, ours["gradients"])
        for name, norms in ours["target"].items():
            norms.append(parameters[name].norm().item())
    return ours | (drawn.summary(state(), record.NUMBERS, "after") if steps == record.STEPS else {})


# ---------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("script, flags", [
    (script, flags) for script, table in recording("settings")["cases"].items() for flags in table])
def test_our_recipes_are_the_authors_commands(script, flags):
    found = recording("settings")
    assert_fields(settled(sys.modules[script], flags), found["cases"][script][flags])
    assert found["commit"][script].startswith(COMMITS[script])


# ------------------------------------------------------------------------------------- comparisons

OURS = {"simsiam": simsiam_steps, "dcl": dcl_steps, "moco_v3": moco_v3_steps, "byol": byol_steps}
SCRIPTS = {"simsiam": "simsiam", "dcl": "dcl", "moco_v3": "moco_v3", "byol": "byol"}
COMMITS = {"simsiam": "a7bc177", "dcl": "a419ef2", "moco_v3": "c349e6e", "byol": "f5de0ed"}


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
PASS = "t1 = self.target_projector(self.target_encoder(x1))"
VIEWS = "self.projector(self.encoder(x1)), self.projector(self.encoder(x2))"
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
        "byol", "steps", "BYOL", f"z1, z2 = t1, t2 = {VIEWS}",
        "z1, z2 = t1, t2 = self.projector(self.encoder(torch.cat([x1, x2]))).chunk(2)",
        1, "loss, gradients"),
    "warm-up counted in the cosine": (
        "byol", "recipe 300", "warmup_cosine",
        "(epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)",
        "epoch / args.epochs", 5, "lr"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_is_found(mutant, monkeypatch):
    method, case, function, text, mistake, steps, found_in = MUTANTS[mutant]
    script = sys.modules[SCRIPTS[method]]
    source = inspect.getsource(getattr(script, function))
    assert source.count(text) == 1
    monkeypatch.setattr(script, function, None)  # which puts the original back
    exec(source.replace(text, mistake), vars(script))
    ours, theirs = OURS[method](case, steps), recording(method)["cases"][case]
    worst = {key: difference(ours[key], theirs[key]) for key in ours}
    assert all(worst[key] > 100 * TOLERANCE for key in found_in.split(", ")), worst
    assert all(worst[key] < TOLERANCE for key in worst if "before" in key)  # the same inputs
