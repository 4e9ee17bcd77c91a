"""Records five steps of the SimSiam authors' own code in float64, for tests/test_official.py.

    git clone https://github.com/facebookresearch/simsiam && git -C simsiam checkout a7bc177
    python tests/official/record_simsiam.py simsiam   # without simsiam/.git: --commit a7bc177

Their ResNet-18 and learning rate schedule run with torch's SGD and cosine similarity, once with
--fix-pred-lr ("constant") and once without ("decay"). Parameters and views come from numpy's
RandomState, so the test makes the same ones without the authors' code. That code is CC BY-NC 4.0:
only imported from the path, nothing of it copied.
"""

import argparse
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torchvision

import drawn

SETTINGS = {"arch": "resnet18", "image_size": 32, "dim": 64, "predictor_dim": 16, "epochs": 4,
            "batch_size": 16, "base_lr": 0.8, "momentum": 0.9, "weight_decay": 1e-4}
STEPS, PER_EPOCH, SEED = 5, 2, 0
NUMBERS = (  # tensors whose first numbers are recorded; of the others only the norm
    "encoder.conv1.weight", "encoder.bn1.running_mean", "encoder.layer4.1.bn2.weight",
    "encoder.layer4.1.bn2.bias", "projector.0.weight", "projector.4.bias", "projector.6.weight",
    "projector.6.bias", "projector.7.running_var", "predictor.0.weight",
    "predictor.1.running_mean", "predictor.3.weight", "predictor.3.bias")


def inputs(shapes: dict) -> tuple[dict, torch.Tensor]:
    """Parameters by our names, and views [STEPS, 2, B, 3, S, S]."""
    random = np.random.RandomState(SEED)
    views = drawn.views(random, STEPS, SETTINGS["batch_size"], 3, *[SETTINGS["image_size"]] * 2)
    return drawn.parameters(shapes, random), views


def our_name(name: str) -> str:
    return name.replace("encoder.fc.", "projector.")  # in place of the encoder's classifier


def record(builder, main_simsiam, fix_pred_lr: bool) -> dict:
    """What five steps gave: {quantity: {name: its numbers, one a step where it is of a step}}."""
    model = builder.SimSiam(torchvision.models.resnet18, SETTINGS["dim"], SETTINGS["predictor_dim"])
    model.double().train()
    parameters = {our_name(name): p for name, p in model.named_parameters()}
    values, views = inputs({name: p.shape for name, p in parameters.items()})
    for name, p in parameters.items():
        p.data.copy_(values[name])
    state = {our_name(name): x for name, x in model.state_dict().items()}  # shares its memory
    start = drawn.summary(state, NUMBERS, "before")
    groups = [{"params": model.encoder.parameters(), "fix_lr": False},
              {"params": model.predictor.parameters(), "fix_lr": True}]
    lr = SETTINGS["base_lr"] * SETTINGS["batch_size"] / 256
    optimizer = torch.optim.SGD(
        groups if fix_pred_lr else model.parameters(), lr, momentum=SETTINGS["momentum"],
        weight_decay=SETTINGS["weight_decay"])
    cosine = torch.nn.CosineSimilarity(dim=1)
    steps = {"loss": {"loss": []}, "lr": {"f": [], "h": []},
             "gradients": {name: [] for name, p in parameters.items() if p.requires_grad}}
    for step, (x1, x2) in enumerate(views):
        main_simsiam.adjust_learning_rate(optimizer, lr, step // PER_EPOCH,
                                          SimpleNamespace(epochs=SETTINGS["epochs"]))
        p1, p2, z1, z2 = model(x1=x1, x2=x2)
        loss = (cosine(p1, z2) + cosine(p2, z1)).mean() / -2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps["loss"]["loss"].append(loss.item())
        steps["lr"]["f"].append(optimizer.param_groups[0]["lr"])
        steps["lr"]["h"].append(optimizer.param_groups[-1]["lr"])
        for name, norms in steps["gradients"].items():
            norms.append(parameters[name].grad.norm().item())
    return start | steps | drawn.summary(state, NUMBERS, "after")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path, help="the authors' code")
    parser.add_argument("--commit", help="of that code, where PATH has no .git")
    args = parser.parse_args()
    sys.path.insert(0, str(args.path.resolve()))  # their package is called simsiam, as our script
    theirs = importlib.import_module("simsiam.builder"), importlib.import_module("main_simsiam")
    cases = {name: record(*theirs, name == "constant") for name in ("constant", "decay")}
    versions = {x.__name__: x.__version__ for x in (torch, torchvision, np)}
    drawn.write("simsiam", commit=args.commit or drawn.commit(args.path), versions=versions,
                settings=SETTINGS, cases=cases)


if __name__ == "__main__":
    main()
