"""Records MoCo v2's own steps and lightly's losses in float64, for tests/test_official.py.

    git clone https://github.com/facebookresearch/moco && git -C moco checkout a419ef2
    pip install --no-deps --target lightly lightly==1.6.0
    python tests/official/record_dcl.py moco lightly   # without moco/.git: --commit a419ef2

The authors of DCL have released no code. "queue": MoCo v2's builder and learning rate schedule
with a ResNet-10, torch's SGD and InfoNCE. "infonce", "dcl", "dclw": lightly's losses on drawn
embeddings. MoCo's code is CC BY-NC 4.0: only imported from the path, nothing of it copied.
"""

import argparse
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

SETTINGS = {"arch": "resnet10", "image_size": 32, "dim": 16, "hidden_dim": 512, "queue": 32,
            "ema_momentum": 0.9, "temperature": 0.07, "epochs": 4, "batch_size": 8, "base_lr": 3.2,
            "momentum": 0.9, "weight_decay": 1e-4}
STEPS, PER_EPOCH, SEED = 5, 2, 0
NUMBERS = (  # tensors whose first numbers are recorded; of the others only the norm
    "encoder.conv1.weight", "encoder.bn1.running_mean", "encoder.layer4.0.bn2.weight",
    "projector.0.weight", "projector.0.bias", "projector.2.weight", "projector.2.bias", "queue")
LOSSES = {"infonce": 0.1, "dcl": 0.1, "dclw": 0.1, "dcl hot": 0.5, "dclw hot": 0.5}  # temperatures


def inputs(shapes: dict) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Parameters by our names, views [STEPS, 2, B, 3, S, S], and the queue's first keys [K, d]."""
    random = np.random.RandomState(SEED)
    views = drawn.views(random, STEPS, SETTINGS["batch_size"], 3, *[SETTINGS["image_size"]] * 2)
    queue = random.standard_normal((SETTINGS["queue"], SETTINGS["dim"]))
    queue /= np.linalg.norm(queue, axis=1, keepdims=True)
    return drawn.parameters(shapes, random), views, torch.from_numpy(queue)


def embeddings() -> list[torch.Tensor]:
    """Two views of 12 images in 8 dimensions, of any length, that require gradients."""
    random = np.random.RandomState(SEED)
    x = random.standard_normal((1, 12, 8))
    x = (x + 0.7 * random.standard_normal((2, 12, 8))) * np.exp(random.standard_normal((2, 12, 1)))
    return [torch.from_numpy(z).requires_grad_() for z in x]


def of_embeddings(loss: torch.Tensor, z: list[torch.Tensor]) -> dict:
    """What is recorded of a loss: its value, its gradients' norms a row, some of their numbers."""
    gradients = torch.autograd.grad(loss, z)
    return {"loss": {"loss": [loss.item()]},
            "gradients": {f"z{i}": g.norm(dim=1).tolist() for i, g in enumerate(gradients)},
            "numbers": {f"z{i}": g.flatten()[:16].tolist() for i, g in enumerate(gradients)}}


def our_name(name: str) -> str:
    for theirs, ours in (("encoder_q.", ""), ("encoder_k.", "key_")):
        if name.startswith(theirs):
            name = name.removeprefix(theirs)
            return ours + (f"projector{name[2:]}" if name.startswith("fc.") else f"encoder.{name}")
    return name


def record_queue(builder, main_moco) -> dict:
    """What five steps of MoCo v2 gave: {quantity: {name: its numbers, one a step}}."""
    def resnet10(num_classes):
        return torchvision.models.ResNet(
            torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes)

    model = builder.MoCo(resnet10, SETTINGS["dim"], SETTINGS["queue"], SETTINGS["ema_momentum"],
                         SETTINGS["temperature"], mlp=True).double().train()
    named = {our_name(name): p for name, p in model.named_parameters()}
    online = {name: p for name, p in named.items() if not name.startswith("key_")}
    values, views, queue = inputs({name: p.shape for name, p in online.items()})
    for name, p in named.items():
        p.data.copy_(values[name.removeprefix("key_")])  # both encoders start alike
    model.queue.copy_(queue.T)
    lr = SETTINGS["base_lr"] * SETTINGS["batch_size"] / 256
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=SETTINGS["momentum"],
                                weight_decay=SETTINGS["weight_decay"])

    def state():
        kept = {our_name(name): x for name, x in model.state_dict().items() if "ptr" not in name}
        return {name: x for name, x in kept.items() if not name.startswith("key_")} | {
            "queue": model.queue.T}

    found = drawn.summary(state(), NUMBERS, "before") | {
        "loss": {"loss": []}, "lr": {"lr": []}, "gradients": {name: [] for name in online},
        "key encoder": {name: [] for name in named if name.startswith("key_")},
        "queue": {"sum": [], "oldest": []}}
    for step, (x1, x2) in enumerate(views):
        main_moco.adjust_learning_rate(optimizer, step / PER_EPOCH, SimpleNamespace(
            lr=lr, cos=True, epochs=SETTINGS["epochs"]))
        logits, labels = model(x1, x2)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        for name, norms in found["key encoder"].items():  # as they made the keys
            norms.append(named[name].norm().item())
        optimizer.step()
        found["loss"]["loss"].append(loss.item())
        found["lr"]["lr"].append(optimizer.param_groups[0]["lr"])
        for name, norms in found["gradients"].items():
            norms.append(online[name].grad.norm().item())
        found["queue"]["sum"].append(model.queue.sum().item())
        found["queue"]["oldest"].append(model.queue_ptr.item())
    return found | drawn.summary(state(), NUMBERS, "after")


def package(name: str, folder: Path) -> None:
    """Makes folder importable as this package, without what its __init__.py would import."""
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(folder)]


def record_losses(folder: Path) -> dict:
    for name in ("lightly", "lightly.loss", "lightly.utils"):
        package(name, folder / name.replace(".", "/"))
    dcl = importlib.import_module("lightly.loss.dcl_loss")
    nt_xent = importlib.import_module("lightly.loss.ntx_ent_loss")
    theirs = {"infonce": nt_xent.NTXentLoss, "dcl": dcl.DCLLoss, "dclw": dcl.DCLWLoss}
    cases = {}
    for name, temperature in LOSSES.items():
        z = embeddings()
        cases[name] = of_embeddings(theirs[name.split()[0]](temperature=temperature)(*z), z)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("moco", type=Path, help="MoCo's code")
    parser.add_argument("lightly", type=Path, help="the folder with the package lightly")
    parser.add_argument("--commit", help="of MoCo's code, where the path has no .git")
    args = parser.parse_args()
    cases = record_losses(args.lightly)
    for name in ("deeplearning", "deeplearning.cross_image_ssl"):  # where the authors have it
        package(name, args.moco)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with mock.patch.object(torch.Tensor, "cuda", lambda x: x):
        cases["queue"] = record_queue(*(
            importlib.import_module(f"deeplearning.cross_image_ssl.{name}")
            for name in ("moco.builder", "main_moco")))
    dist.destroy_process_group()
    versions = {x.__name__: x.__version__ for x in (torch, torchvision, np)} | {"lightly": "1.6.0"}
    drawn.write("dcl", commit=args.commit or drawn.commit(args.moco), versions=versions,
                settings=SETTINGS, cases=cases)


if __name__ == "__main__":
    main()
