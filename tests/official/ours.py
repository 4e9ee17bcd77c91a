"""Our own steps on the recorders' inputs, for tests/test_official.py.

A function returns what its recorder recorded of this case: {quantity: {name: numbers}}, with fewer
numbers where it ran fewer steps.
"""

import importlib
from unittest import mock

import torch
from helpers import count, settled

import byol
import common
import dcl
import drawn
import moco_v3
import simclr_v2
import simsiam


def recorder(method: str):
    """The module record_<method>.py: its settings and inputs."""
    return importlib.import_module(f"record_{method}")


def gradient_norms(model, norms: dict[str, list]) -> None:
    """Appends the norm of every gradient to its list."""
    for name, p in model.named_parameters():
        if p.grad is not None:
            norms.setdefault(name, []).append(p.grad.norm().item())


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


# ------------------------------------------------------------------------------------------ SimCLR


def simclr_encoder(args) -> torch.nn.Module:
    """Ours; ResNet-18 and -34 with the projection in the first shortcut that only theirs have."""
    encoder = simclr_v2.build_encoder(args)
    if args.arch in ("resnet18", "resnet34"):
        dim = encoder.bn1.num_features
        encoder.layer1[0].downsample = torch.nn.Sequential(
            common.conv(dim, dim, 1), torch.nn.BatchNorm2d(dim))
    return encoder


def simclr_networks(record) -> dict:
    found = {}
    for depth, width, sk in record.NETWORKS:
        args = settled(simclr_v2, f"--recipe imagenet --arch resnet{depth} --width {width}",
                       "--sk" if sk else "--no-sk")
        with torch.device("meta"):
            encoder = simclr_encoder(args)
            head = simclr_v2.projection_head(encoder.feature_dim, args.head_layers, args.dim)
        found[f"{depth} {width} {sk}"] = [
            encoder.feature_dim, count(encoder, True), count(head, True)]
    return {"networks": found}


def simclr_schedules(record) -> dict:
    found = {"steps": {}, "lr": {}}
    for flags, (images, *_) in record.SCHEDULES.items():
        args = settled(simclr_v2, flags, "--init none --data cifar10")
        warmup = int(args.warmup_epochs * images // args.batch_size)
        total = images * args.epochs // args.batch_size + 1
        # Ours drops the rest of each epoch. The schedule is compared over their number of steps.
        args.epochs, args.warmup_epochs = total, warmup
        optimizer, rates = torch.optim.SGD([torch.zeros(1)]), []
        for step in record.lr_steps(total, warmup):
            simclr_v2.set_lr(optimizer, step, args)
            rates.append(optimizer.param_groups[0]["lr"])
        found["steps"][flags], found["lr"][flags] = [total, warmup], rates
    return found


def simclr_losses(record, case: str) -> dict:
    losses = {}
    for t in record.TEMPERATURES[case]:
        x1, x2 = record.vectors()
        if case == "loss":
            x = torch.cat([x1, x2]).requires_grad_()
            loss = 2 * simclr_v2.nt_xent_loss(*x.chunk(2), t)
            loss.backward()
        else:
            x, args = x1.requires_grad_(), settled(
                simclr_v2, "distill --teacher none --data cifar10 --recipe imagenet",
                f"--temperature {t}")
            loss, *_ = simclr_v2.distill_step(
                lambda x: x1, lambda x: x2, torch.optim.SGD([x1]), None, None, 0.0, args)
        losses[t] = loss.detach(), x.grad
    return record.of_vectors(losses)


def simclr_steps(case: str, steps: int = 5) -> dict:
    record = recorder("simclr")
    if case not in record.SETTINGS:
        return (simclr_networks(record) if case == "networks" else simclr_schedules(record)
                if case == "schedules" else simclr_losses(record, case))
    flags = {name.replace("_", "-"): value for name, value in record.SETTINGS[case].items()}
    args = settled(simclr_v2, "--recipe cifar", *(
        f"--{'' if value else 'no-'}{name}" if type(value) is bool else f"--{name} {value}"
        for name, value in flags.items()))
    depth = int(args.arch.removeprefix("resnet"))
    with mock.patch.dict(common.BLOCKS, {depth: (common.BLOCKS[depth][0], record.BLOCKS[case])}):
        model = simclr_v2.SimCLR(simclr_encoder(args), args.dim, args.head_layers, args.queue)
    model.double().train()
    values, views = record.inputs(
        case, {name: p.shape for name, p in model.named_parameters() if p.requires_grad})
    model.load_state_dict(values, strict=False)  # the buffers of the batch norms stay
    ours = record.summary(model.state_dict(), "before") | {
        "loss": {"loss": []}, "lr": {"lr": []}, "z": {"z": []}, "gradients": {}}
    optimizer = simclr_v2.build_optimizer(model, args)
    for step, x in enumerate(views[:steps]):
        loss, *z, _ = simclr_v2.train_step(model, optimizer, x, None, step / record.PER_EPOCH, args)
        ours["loss"]["loss"].append(loss.item())
        ours["lr"]["lr"].append(optimizer.param_groups[0]["lr"])
        ours["z"]["z"] += torch.cat(z)[::5].norm(dim=1).tolist()  # of some views
        gradient_norms(model, ours["gradients"])
    return ours | (record.summary(model.state_dict(), "after") if steps == record.STEPS else {})


OURS = {"simsiam": simsiam_steps, "dcl": dcl_steps, "moco_v3": moco_v3_steps, "byol": byol_steps,
        "simclr": simclr_steps}
