"""Records five steps of the MoCo v3 authors' own code in float64, for tests/test_official.py.

    git clone https://github.com/facebookresearch/moco-v3 && git -C moco-v3 checkout c349e6e
    pip install --no-deps --target timm timm==0.4.9  # the version that their README names
    python tests/official/record_moco_v3.py moco-v3 timm  # without moco-v3/.git: --commit c349e6e

Their ViT, their heads, loss, LARS and schedules run with torch's AdamW and torchvision's ResNet,
with the blocks of our ResNet-10. Parameters and views come from numpy's RandomState, so the test
makes the same ones without the authors' code. That code is CC BY-NC 4.0: only imported from the
path, nothing of it copied.
"""

import argparse
import functools
import importlib
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torchvision

import drawn

SHARED = {"image_size": 32, "dim": 32, "hidden_dim": 64, "epochs": 3, "warmup_epochs": 1.0,
          "batch_size": 16, "ema_momentum": 0.9}
VIT = SHARED | {"arch": "vit_mini", "patch_size": 8, "patch_projection": "frozen",
                "temperature": 0.2, "optimizer": "adamw", "base_lr": 0.16, "weight_decay": 0.1}
SETTINGS = {  # a case: our fields
    "frozen": VIT,
    "learned": VIT | {"patch_projection": "learned"},
    "conv": VIT | {"patch_size": 16, "patch_projection": "learned"},  # and the stem, see build()
    "resnet": SHARED | {"arch": "resnet10", "temperature": 1.0, "optimizer": "lars",
                        "base_lr": 4.8, "weight_decay": 1e-6, "momentum": 0.9}}
STEPS, PER_EPOCH, SEED = 5, 2, 0
MINI = {"embed_dim": 96, "depth": 3, "num_heads": 3}  # our vit_mini
NUMBERS = (  # tensors whose first numbers are recorded, where there are such; else only the norm
    "encoder.cls_token", "encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.0.weight",
    "encoder.patch_embed.proj.4.running_mean", "encoder.blocks.1.attn.qkv.weight",
    "encoder.norm.weight", "encoder.conv1.weight", "encoder.layer4.0.bn2.bias",
    "projector.0.weight", "projector.1.running_var", "projector.3.weight", "projector.6.weight",
    "predictor.0.weight", "predictor.1.bias", "predictor.3.weight",
    "momentum_encoder.layer4.0.bn2.running_mean", "momentum_projector.1.running_var")


def inputs(shapes: dict) -> tuple[dict, torch.Tensor]:
    """Parameters by our names, without f_k's, and views [STEPS, 2, B, 3, S, S]."""
    random = np.random.RandomState(SEED)
    views = drawn.views(random, STEPS, SHARED["batch_size"], 3, *[SHARED["image_size"]] * 2)
    return drawn.parameters(shapes, random), views


def online(named: dict) -> dict:
    """Those of f_q."""
    return {name: x for name, x in named.items() if not name.startswith("momentum_")}


def summary(state: dict, when: str) -> dict:
    """Of f_q's parameters and buffers and, afterwards, of f_k's buffers."""
    state = {name: x for name, x in state.items() if "num_batches" not in name and
             (not name.startswith("momentum_") or "running" in name and when == "after")}
    return drawn.summary(state, tuple(name for name in NUMBERS if name in state), when)


def empty(named: dict) -> dict:
    """{quantity: {name: a list for its numbers}}."""
    return {"loss": {"loss": []}, "lr": {"lr": []}, "m": {"m": []}, "gradients": {},
            "keys": {name: [] for name in ("k1", "k2", "k1[0]", "k2[0]")},
            "momentum encoder": {name: [] for name in named if name.startswith("momentum_")}}


def note_momentum_encoder(found: dict, named: dict) -> None:
    for name, norms in found["momentum encoder"].items():
        norms.append(named[name].norm().item())


def note_keys(found: dict, keys: list) -> None:
    """The norms of all keys of a view, nearly constant after a batch norm, and of the first key."""
    for name, k in zip(("k1", "k2"), keys):
        found["keys"][name].append(k.norm().item())
        found["keys"][name + "[0]"].append(k[0].norm().item())


def build(case: str, vits, builder) -> torch.nn.Module:
    settings = SETTINGS[case]
    heads = settings["dim"], settings["hidden_dim"], settings["temperature"]
    if case == "resnet":
        model = builder.MoCo_ResNet(functools.partial(
            torchvision.models.ResNet, torchvision.models.resnet.BasicBlock, [1, 1, 1, 1],
            zero_init_residual=True), *heads)
    else:
        conv = case == "conv"  # whose stem replaces a block
        size = MINI | {"depth": MINI["depth"] - conv}
        model = builder.MoCo_ViT(functools.partial(
            vits.VisionTransformerMoCo, img_size=settings["image_size"], mlp_ratio=4,
            patch_size=settings["patch_size"], qkv_bias=True, **size,
            norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
            stop_grad_conv1=settings["patch_projection"] == "frozen",
            **({"embed_layer": vits.ConvStem} if conv else {})), *heads)
    return model.double().train()


def our_name(name: str) -> str:
    for theirs, ours in (("base_encoder.", ""), ("momentum_encoder.", "momentum_")):
        if name.startswith(theirs):
            part, dot, rest = name.removeprefix(theirs).partition(".")
            return ours + (f"projector.{rest}" if part in ("fc", "head") else
                           f"encoder.{part}{dot}{rest}")
    return name


def record(case: str, vits, builder, optimizers, main_moco) -> dict:
    """What five steps gave: {quantity: {name: its numbers, one a step where it is of a step}}."""
    settings, model = SETTINGS[case], build(case, vits, builder)
    named = {our_name(name): p for name, p in model.named_parameters()}
    state = {our_name(name): x for name, x in model.state_dict().items()}  # shares its memory
    values, views = inputs({name: p.shape for name, p in online(named).items()})
    found = {} if case == "resnet" else {  # before it is drawn, too
        "position": {"token 3": state["encoder.pos_embed"][0, 3].tolist()}}
    for name, p in named.items():
        p.data.copy_(values[name.removeprefix("momentum_")])  # both encoders start alike
    found |= summary(state, "before") | empty(named)
    args = SimpleNamespace(
        lr=settings["base_lr"] * settings["batch_size"] / 256, epochs=settings["epochs"],
        warmup_epochs=settings["warmup_epochs"], moco_m=settings["ema_momentum"])
    if settings["optimizer"] == "lars":
        optimizer = optimizers.LARS(model.parameters(), args.lr, momentum=settings["momentum"],
                                    weight_decay=settings["weight_decay"])
    else:
        optimizer = torch.optim.AdamW(model.parameters(), args.lr,
                                      weight_decay=settings["weight_decay"])
    keys = []
    model.momentum_encoder.register_forward_hook(lambda module, x, k: keys.append(k))
    for step, (x1, x2) in enumerate(views):
        epoch = step // PER_EPOCH + step % PER_EPOCH / PER_EPOCH
        lr = main_moco.adjust_learning_rate(optimizer, epoch, args)
        m = main_moco.adjust_moco_momentum(epoch, args)
        loss = model(x1, x2, m)  # which first updates f_k with m
        note_momentum_encoder(found, named)
        note_keys(found, keys[-2:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for quantity, value in (("loss", loss.item()), ("lr", lr), ("m", m)):
            found[quantity][quantity].append(value)
        for name, p in named.items():
            if p.grad is not None:
                found["gradients"].setdefault(name, []).append(p.grad.norm().item())
    # Our last step has made the update of f_k with which their next one would begin.
    model._update_momentum_encoder(main_moco.adjust_moco_momentum(STEPS / PER_EPOCH, args))
    note_momentum_encoder(found, named)
    return found | summary(state, "after")


def rounded(found):
    """To 12 digits, which keeps the file small."""
    if isinstance(found, dict):
        return {name: rounded(x) for name, x in found.items()}
    return [float(f"{x:.12g}") for x in found]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path, help="the authors' code")
    parser.add_argument("timm", type=Path, help="the folder with timm 0.4.9")
    parser.add_argument("--commit", help="of the authors' code, where PATH has no .git")
    args = parser.parse_args()
    sys.path[:0] = [str(args.path.resolve()), str(args.timm.resolve())]
    sys.modules["torch.utils.tensorboard"] = types.SimpleNamespace(SummaryWriter=None)  # not used
    theirs = [importlib.import_module(name)
              for name in ("vits", "moco.builder", "moco.optimizer", "main_moco")]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with mock.patch.object(torch.Tensor, "cuda", lambda x, *rest: x):
        cases = {case: rounded(record(case, *theirs)) for case in SETTINGS}
    dist.destroy_process_group()
    import timm
    versions = {x.__name__: x.__version__ for x in (torch, torchvision, np, timm)}
    drawn.write("moco_v3", commit=args.commit or drawn.commit(args.path), versions=versions,
                settings=SETTINGS, cases=cases)


if __name__ == "__main__":
    main()
