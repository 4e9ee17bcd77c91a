"""Records the settings of the authors of MoCo v3 and SimSiam, for tests/test_official.py.

    git clone https://github.com/facebookresearch/moco-v3 && git -C moco-v3 checkout c349e6e
    git clone https://github.com/facebookresearch/simsiam && git -C simsiam checkout a7bc177
    pip install --no-deps --target timm timm==0.4.9
    python tests/official/record_settings.py moco-v3 simsiam timm  # without .git: --commits A B

Every training command in their README.md and CONFIG.md goes through the parser of the program that
it starts, so defaults count, too. What comes out is written under our flags with our names. Their
code is CC BY-NC 4.0: only imported from the paths, nothing of it copied.
"""

import argparse
import functools
import importlib
import re
import shlex
import sys
import types
from pathlib import Path

import torch
import torchvision

import drawn

RECIPES = {("resnet50", 100): "imagenet-r50-100", ("resnet50", 300): "imagenet-r50-300",
           ("resnet50", 1000): "imagenet-r50-1000", ("vit_small", 300): "imagenet",
           ("vit_base", 300): "imagenet --arch vit_base"}


def modules(folder: Path, *names: str) -> list:
    """Of the authors' code in this folder."""
    sys.path.insert(0, str(folder.resolve()))
    found = [importlib.import_module(name) for name in names]
    sys.path.pop(0)
    del sys.modules["main_lincls"]  # both have one
    return found


def parsed(parser: argparse.ArgumentParser, folder: Path, script: str):
    """The settings of every command in the folder's documents that starts this script."""
    found = 0
    for file in ("README.md", "CONFIG.md"):
        text = (folder / file).read_text() if (folder / file).exists() else ""
        for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if script in line and not re.search(r"-a(rch)? \[", line):  # no form for all archs
                    # What is left to fill in, such as [your ...], becomes 0.
                    words = shlex.split(re.sub(r"\[[^]]*]", "0", line.split(script)[1]))
                    yield parser.parse_args(words)
                    found += 1
    assert found, script


def add(table: dict, flags: str, fields: dict) -> None:
    assert table.setdefault(flags, fields) == fields, flags  # where two commands are one recipe


def shared(theirs) -> dict:
    return {"arch": theirs.arch, "epochs": theirs.epochs, "batch_size": theirs.batch_size,
            "base_lr": theirs.lr, "momentum": theirs.momentum, "weight_decay": theirs.weight_decay}


def linears(head: torch.nn.Module) -> int:
    return sum(isinstance(module, torch.nn.Linear) for module in head)


def moco_v3(folder: Path) -> dict:
    vits, builder, main_moco, main_lincls = modules(
        folder, "vits", "moco.builder", "main_moco", "main_lincls")
    table = {}
    for theirs in parsed(main_moco.parser, folder, "main_moco.py"):
        flags = f"--recipe {RECIPES[theirs.arch, theirs.epochs]}"
        if theirs.batch_size != 4096:  # for fewer GPUs than the recipe's
            flags += f" --batch-size {theirs.batch_size}"
        heads = theirs.moco_dim, theirs.moco_mlp_dim, theirs.moco_t
        is_vit = theirs.arch.startswith("vit")
        if is_vit:
            model = builder.MoCo_ViT(functools.partial(
                getattr(vits, theirs.arch), stop_grad_conv1=theirs.stop_grad_conv1), *heads)
        else:
            model = builder.MoCo_ResNet(functools.partial(
                getattr(torchvision.models, theirs.arch), zero_init_residual=True), *heads)
        encoder = model.base_encoder
        add(table, flags, shared(theirs) | {
            "optimizer": theirs.optimizer, "warmup_epochs": theirs.warmup_epochs,
            "ema_momentum": theirs.moco_m,
            "ema_schedule": "cosine" if theirs.moco_m_cos else "constant",
            "temperature": theirs.moco_t, "dim": theirs.moco_dim, "hidden_dim": theirs.moco_mlp_dim,
            "crop_min": theirs.crop_min,
            "projector_layers": linears(encoder.head if is_vit else encoder.fc),
            "predictor_output_bn": isinstance(model.predictor[-1], torch.nn.BatchNorm1d)} | ({
                "patch_projection": "frozen" if theirs.stop_grad_conv1 else "learned",
                "patch_size": encoder.patch_embed.proj.kernel_size[0],
                "image_size": encoder.patch_embed.img_size[0]} if is_vit else {}))
    for theirs in parsed(main_lincls.parser, folder, "main_lincls.py"):
        vit = theirs.arch.startswith("vit")
        epochs = [300] if vit else [100, 300, 1000]  # one command for all ResNet-50
        for recipe in (RECIPES[theirs.arch, n] for n in epochs):
            add(table, f"linear --init none --data demo --recipe {recipe}", shared(theirs))
    return table


def simsiam(folder: Path) -> dict:
    main_simsiam, main_lincls = modules(folder, "main_simsiam", "main_lincls")
    table = {}
    for theirs in parsed(main_simsiam.parser, folder, "main_simsiam.py"):
        add(table, "--recipe imagenet", shared(theirs) | {
            "dim": theirs.dim, "predictor_dim": theirs.pred_dim,
            "predictor_lr": "constant" if theirs.fix_pred_lr else "decay"})
    for theirs in parsed(main_lincls.parser, folder, "main_lincls.py"):
        add(table, "linear --init none --data demo --recipe imagenet", shared(theirs) | {
            "optimizer": "larc" if theirs.lars else "sgd"})
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs=2, type=Path, help="the code of MoCo v3 and of SimSiam")
    parser.add_argument("timm", type=Path, help="the folder with timm 0.4.9")
    parser.add_argument("--commits", nargs=2, help="of both, where they have no .git")
    args = parser.parse_args()
    sys.path.insert(0, str(args.timm.resolve()))
    sys.modules["torch.utils.tensorboard"] = types.SimpleNamespace(SummaryWriter=None)  # not used
    commits = args.commits or [drawn.commit(path) for path in args.paths]
    cases = {"moco_v3": moco_v3(args.paths[0]), "simsiam": simsiam(args.paths[1])}
    versions = {x.__name__: x.__version__ for x in (torch, torchvision)}
    drawn.write("settings", commit=dict(zip(cases, commits)), versions=versions, cases=cases)
    for table in cases.values():
        for flags, fields in table.items():
            print(f"{len(fields):3} settings of {flags}")


if __name__ == "__main__":
    main()
