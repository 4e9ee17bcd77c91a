"""Our training steps against the authors' own, which tests/official/record_*.py recorded.

A recording has cases, and a case {quantity: {name: numbers}}. Our steps return the same layout, with
fewer numbers where they ran fewer steps. Weights and views are drawn here and there by numpy.
"""

import functools
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

import simsiam
from helpers import settled

FOLDER = Path(__file__).resolve().parent / "official"
TOLERANCE = 1e-9  # float64; on kernels for other processors 3e-12 was the most


@functools.cache
def recorder(method: str):
    """The module record_<method>.py: its settings and inputs."""
    spec = importlib.util.spec_from_file_location(f"record_{method}", FOLDER / f"record_{method}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


@functools.cache
def simsiam_steps(case: str, mutant=None, steps: int = 5) -> dict:
    """mutant(args, model, optimizer) makes a mistake."""
    record = recorder("simsiam")
    args = settled(simsiam, "--recipe imagenet --arch resnet18 --image-size 32 --dim 64 "
                   "--predictor-dim 16 --epochs 4 --batch-size 16 --base-lr 0.8 "
                   f"--predictor-lr {case}")
    assert {name: getattr(args, name) for name in record.SETTINGS} == record.SETTINGS
    model = simsiam.SimSiam(simsiam.build_encoder(args), args.dim, args.predictor_dim,
                            args.hidden_dim, args.projector_layers, args.bn, args.predictor)
    model.double().train()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    values, views = record.inputs(shapes, record.SEED)
    model.load_state_dict(values, strict=False)  # the buffers of the batch norms stay
    ours = {"loss": {"loss": []}, "lr": {"f": [], "h": []}, "gradients": {}}
    ours |= record.summary(model.state_dict(), "before")
    optimizer = simsiam.build_optimizer(model, args)
    if mutant:
        mutant(args, model, optimizer)
    for step in range(steps):
        loss, _ = simsiam.train_step(model, optimizer, *views[step], step / record.PER_EPOCH, args)
        ours["loss"]["loss"].append(loss.item())
        ours["lr"]["f"].append(optimizer.param_groups[0]["lr"])
        ours["lr"]["h"].append(optimizer.param_groups[1]["lr"])
        gradient_norms(model, ours["gradients"])
    return ours | (record.summary(model.state_dict(), "after") if steps == record.STEPS else {})


def no_stop_gradient(args, model, optimizer):
    args.stop_grad = False


def no_last_bn(args, model, optimizer):
    model.projector[7].forward = lambda x: x


def no_decay_of_vectors(args, model, optimizer):  # biases, and scales and shifts of batch norms
    for group in [*optimizer.param_groups]:
        vectors = [p for p in group["params"] if p.ndim == 1]
        group["params"] = [p for p in group["params"] if p.ndim > 1]
        optimizer.add_param_group({**group, "params": vectors, "weight_decay": 0.0})


# ------------------------------------------------------------------------------------- comparisons

OURS = {"simsiam": simsiam_steps}
COMMITS = {"simsiam": "a7bc177"}
MUTANTS = {  # name: method, case, mutant, steps, where the difference must show
    "no stop-gradient": ("simsiam", "constant", no_stop_gradient, 1, "gradients"),
    "no last BN": ("simsiam", "constant", no_last_bn, 1, "loss, gradients"),
    "no decay of vectors": ("simsiam", "constant", no_decay_of_vectors, 2, "gradients"),
}


@pytest.mark.parametrize("method, case", [
    (method, case) for method in OURS for case in recording(method)["cases"]])
def test_five_steps_are_the_authors(method, case):
    ours, theirs = OURS[method](case), recording(method)["cases"][case]
    assert ours.keys() == theirs.keys() and recording(method)["commit"].startswith(COMMITS[method])
    worst = {key: difference(ours[key], theirs[key]) for key in theirs}
    print(method, case, worst)  # pytest -s shows it
    assert all(x < TOLERANCE for x in worst.values()), worst
    for key in ("lr", "loss"):  # the steps crossed changes, and the comparison can fail
        assert all(len({*numbers}) > 1 for name, numbers in theirs[key].items() if name != "h")
    moved = {name for name, x in theirs["numbers before"].items()
             if x != theirs["numbers after"][name]}
    assert len(moved) >= len(theirs["numbers before"]) / 2


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_is_found(mutant):
    method, case, change, steps, found_in = MUTANTS[mutant]
    ours, theirs = OURS[method](case, change, steps), recording(method)["cases"][case]
    worst = {key: difference(ours[key], theirs[key]) for key in ours}
    assert all(worst[key] > 100 * TOLERANCE for key in found_in.split(", ")), worst
    assert max(worst["norms before"], worst["numbers before"]) < TOLERANCE  # the same inputs


def test_a_predictors_decaying_rate_is_found():
    cases = recording("simsiam")["cases"]
    ours = simsiam_steps("decay")
    for key in ("lr", "loss", "gradients", "norms after", "numbers after"):
        assert difference(ours[key], cases["constant"][key]) > 100 * TOLERANCE, key
