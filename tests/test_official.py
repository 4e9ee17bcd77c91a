"""Our training step against the authors' own, which tests/official/record_simsiam.py recorded."""

import functools
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

import simsiam

FOLDER = Path(__file__).resolve().parent / "official"
RECORDED = json.loads((FOLDER / "simsiam.json").read_text())
SPEC = importlib.util.spec_from_file_location("record_simsiam", FOLDER / "record_simsiam.py")
record = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(record)
TOLERANCE = 1e-9  # float64; on kernels for other processors 3e-12 was the most
FLAGS = ("--recipe imagenet --arch resnet18 --image-size 32 --dim 64 --predictor-dim 16 --epochs 4 "
         "--batch-size 16 --base-lr 0.8 --precision fp64 --predictor-lr")


@functools.cache
def our_steps(predictor_lr: str, mutant, steps: int) -> dict:
    """Runs our code on the recorded run's inputs; what it gives has the recording's layout.

    mutant(args, model, optimizer) puts a mistake in. Weights are compared only after all steps.
    """
    args = simsiam.settle(simsiam.parse_args([*FLAGS.split(), predictor_lr]))
    args.device, args.dtype = torch.device("cpu"), torch.float64
    assert {name: getattr(args, name) for name in record.SETTINGS} == record.SETTINGS
    model = simsiam.SimSiam(simsiam.build_encoder(args), args.dim, args.predictor_dim,
                            args.hidden_dim, args.projector_layers, args.bn, args.predictor)
    model.double().train()
    parameters = dict(model.named_parameters())
    values, views = record.inputs({name: p.shape for name, p in parameters.items()}, record.SEED)
    model.load_state_dict(values, strict=False)  # the buffers of the batch norms stay
    start = record.summary(model.state_dict())
    optimizer = simsiam.build_optimizer(model, args)
    if mutant:
        mutant(args, model, optimizer)
    losses, lrs, gradients = [], {"f": [], "h": []}, {}
    for step in range(steps):
        loss, _ = simsiam.train_step(model, optimizer, *views[step], step / record.PER_EPOCH, args)
        losses.append(loss.item())
        lrs["f"].append(optimizer.param_groups[0]["lr"])
        lrs["h"].append(optimizer.param_groups[1]["lr"])
        for name, p in parameters.items():
            if p.grad is not None:
                gradients.setdefault(name, []).append(p.grad.norm().item())
    ours = {"loss": {"loss": losses}, "lr": lrs, "gradients": gradients,
            "start": start, "frozen": [name for name, p in parameters.items() if p.grad is None]}
    return ours | (record.summary(model.state_dict()) if steps == record.STEPS else {})


def difference(ours: dict, theirs: dict, steps: int | None = None) -> float:
    """The largest |ours - theirs| / |theirs| of {name: numbers}, of the first steps if given.

    Where theirs is 0 but for rounding, as the mean that predictor.1 sees, |ours - theirs|."""
    if ours.keys() != theirs.keys():
        return math.inf
    a, b = (torch.tensor([x for name in theirs for x in side[name][:steps]], dtype=torch.float64)
            for side in (ours, theirs))
    return ((a - b).abs() / torch.where(b.abs() < 1e-12, 1.0, b.abs())).max().item()


def differences(ours: dict, theirs: dict) -> dict[str, float]:
    """The largest relative difference of every quantity that ours has."""
    steps = len(ours["loss"]["loss"])
    worst = {key: difference(ours[key], theirs[key], steps) for key in ("loss", "lr", "gradients")}
    for key in ("norms", "numbers"):
        worst[f"start {key}"] = difference(ours["start"][key], RECORDED["start"][key])
        if key in ours:
            worst[key] = difference(ours[key], theirs[key])
    return worst


@pytest.mark.parametrize("predictor_lr", ["constant", "decay"])
def test_five_steps_are_the_authors(predictor_lr):
    ours = our_steps(predictor_lr, None, record.STEPS)
    worst = differences(ours, RECORDED[predictor_lr])
    assert len(worst) == 7 and all(x < TOLERANCE for x in worst.values()), worst
    assert ours["frozen"] == RECORDED["frozen"] == ["projector.6.bias"]


def test_the_recording_is_what_it_says():
    constant, decay = RECORDED["constant"], RECORDED["decay"]
    assert RECORDED["commit"].startswith("a7bc177") and RECORDED["settings"] == record.SETTINGS
    assert constant["lr"]["h"] == [0.05] * 5 and constant["lr"]["f"] == decay["lr"]["f"]
    lr = [0.05 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in (0, 0, 1, 1, 2)]
    assert decay["lr"]["f"] == decay["lr"]["h"] == pytest.approx(lr, rel=1e-12)
    same = [a == b for a, b in zip(constant["loss"]["loss"], decay["loss"]["loss"], strict=True)]
    assert same == [True, True, True, False, False]  # the third step is the first with another lr
    for name, numbers in RECORDED["start"]["numbers"].items():
        assert (numbers == constant["numbers"][name]) == (name in RECORDED["frozen"]), name


def no_stop_gradient(args, model, optimizer):
    args.stop_grad = False


def no_last_bn(args, model, optimizer):
    model.projector[7].forward = lambda x: x


def no_decay_of_vectors(args, model, optimizer):  # biases, and scales and shifts of batch norms
    for group in [*optimizer.param_groups]:
        vectors = [p for p in group["params"] if p.ndim == 1]
        group["params"] = [p for p in group["params"] if p.ndim > 1]
        optimizer.add_param_group({**group, "params": vectors, "weight_decay": 0.0})


@pytest.mark.parametrize("predictor_lr, mutant, steps, found_in", [
    ("decay", None, record.STEPS, ("lr", "loss", "gradients", "norms", "numbers")),
    ("constant", no_stop_gradient, 1, ("gradients",)),
    ("constant", no_last_bn, 1, ("loss", "gradients")),
    ("constant", no_decay_of_vectors, 2, ("gradients",))],
    ids=["decaying predictor lr", "no stop-gradient", "no last BN", "no decay of vectors"])
def test_a_mistake_is_found(predictor_lr, mutant, steps, found_in):
    worst = differences(our_steps(predictor_lr, mutant, steps), RECORDED["constant"])
    assert all(worst[key] > 100 * TOLERANCE for key in found_in), worst
    assert max(worst["start norms"], worst["start numbers"]) < TOLERANCE  # the same inputs
