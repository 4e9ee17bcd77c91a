"""Weights in and out: --init, encoder.pt, linear evaluation; and every flag reaches its place."""

import functools
import json
import math
import os
from unittest.mock import Mock

import pytest
import torch
import torchvision
from conftest import TINY, losses, program, records, weights
from helpers import same, settled

import common
import simsiam

main, ready = program(simsiam), functools.partial(settled, simsiam)
SMALL = [*TINY, "--image-size", 16]
LINEAR = ["linear", "--batch-size", 12, "--workers", 0]


def watched(monkeypatch, owner, name):
    """From now on calls of owner.name go through this mock, which remembers them."""
    watch = Mock(wraps=getattr(owner, name))
    monkeypatch.setattr(owner, name, watch)
    return watch


@pytest.fixture(scope="module")
def pretrained(classes, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained")
    assert main(*SMALL, "--data", os.path.relpath(classes), "--data-root", "sets", "--steps", 5,
                "--mean", 0.4, 0.5, 0.6, "--out", out) == 0
    (out / "bare.pt").write_bytes((out / "encoder.pt").read_bytes())  # without a bare.json
    return out


@pytest.fixture(params=simsiam.STAGES)
def command(request, pretrained, classes):
    """The start of a quick command of either stage; three steps an epoch."""
    linear = [*LINEAR, "--init", pretrained / "last.pt", "--batch-size", 16]
    return linear if request.param == "linear" else [*SMALL, "--data", classes]


@pytest.mark.parametrize("file, flags, changed", [
    ("last.pt", "", {}), ("last.pt", "--data demo", {"data": "demo"}),
    ("last.pt", "--recipe cifar", {"recipe": "cifar", "base_lr": 30.0, "epochs": 100}),
    ("last.pt", "--data-root /x --image-size 24", {"data_root": "/x", "image_size": 24}),
    ("last.pt", "--mean 1 2 3 --std 4 5 6", {"mean": [1, 2, 3], "std": [4, 5, 6]}),
    ("encoder.pt", "--data demo", {"data": "demo", "data_root": "data"}),
    ("bare.pt", "--data demo --width 0.125 --image-size 16 --mean 0.4 0.5 0.6",
     {"data": "demo", "data_root": "data"})])
def test_linear_takes_from_init_what_no_flag_says(file, flags, changed, pretrained, classes):
    kept = dict(data=str(classes), data_root=os.path.abspath("sets"), recipe="demo", base_lr=3.0,
                epochs=30, arch="resnet10", width=0.125, small_images=True, image_size=16,
                zero_init_residual=False, mean=[0.4, 0.5, 0.6], std=[0.25] * 3)
    args = ready("linear --init", pretrained / file, flags)
    assert json.loads(json.dumps({name: getattr(args, name) for name in kept})) == kept | changed
    simsiam.load_encoder(args)


@pytest.mark.parametrize("key, prefix, head", [
    ("model", "encoder.", "projector.0.weight"), ("", "", ""), ("", "", "fc.weight"),  # torchvision
    ("state_dict", "module.encoder.", "module.encoder.fc.0.weight"),  # the authors' two
    ("state_dict", "module.", "module.fc.weight"),
    ("state_dict", "backbone.", "projection_head.0.weight")])  # Lightning's
def test_init_reads_the_usual_layouts(key, prefix, head, pretrained, classes, tmp_path):
    given = {name: x for name, x in torch.load(pretrained / "encoder.pt").items()
             if "num_batches_tracked" not in name or not head}  # old files have none
    state = {prefix + name: x for name, x in given.items()}
    state |= {head: torch.ones(2)} if head else {}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "file.pt")
    init = ["--init", tmp_path / "file.pt", "--data", classes]
    encoder = simsiam.load_encoder(ready("linear --recipe demo --width 0.125", *init))
    assert all(torch.equal(encoder.state_dict()[name], given[name]) for name in given)
    assert main(*SMALL, *init, "--base-lr", 0, "--steps", 1, "--out", tmp_path / "out") == 0
    after = torch.load(tmp_path / "out" / "encoder.pt")
    kept = [x for x in given if "running" not in x and "num" not in x]
    assert same([after[x] for x in kept], [given[x] for x in kept]) and len(kept) > 20


def test_the_authors_resnet_becomes_torchvisions_and_a_classifier_starts_small(classes, tmp_path):
    model, file = simsiam.SimSiam(common.resnet(50)), tmp_path / "checkpoint_0099.pth.tar"
    model(*torch.randn(2, 4, 3, 32, 32))  # gives batch norm statistics
    state = {"module." + name.replace("projector.", "encoder.fc."): x
             for name, x in model.state_dict().items()}
    assert len(state) == 343 and "module.encoder.fc.6.bias" in state  # as in theirs
    torch.save({"epoch": 100, "arch": "resnet50", "state_dict": state, "optimizer": {}}, file)
    flags = [*LINEAR, "--init", file, "--data", classes, "--image-size", 32]
    assert main(*flags, "--steps", 1, "--base-lr", 0, "--out", tmp_path) == 0
    args, about = ready(*flags), json.loads((tmp_path / "encoder.json").read_text())
    assert about == json.loads(json.dumps({name: getattr(args, name) for name in simsiam.ENCODER}))
    resnet, given = torchvision.models.resnet50(), model.encoder.state_dict()
    resnet.fc = torch.nn.Identity()
    resnet.load_state_dict(torch.load(tmp_path / "encoder.pt"))  # it has these names and no other
    assert all(torch.equal(x, given[name]) for name, x in resnet.state_dict().items())
    fc = weights(tmp_path)
    assert fc["weight"].shape == (3, 2048) and fc["bias"].tolist() == [0, 0, 0]
    assert fc["weight"].std().item() == pytest.approx(0.01, rel=0.05)  # N(0, 0.01)


@pytest.mark.parametrize("optimizer, owner, name, more", [
    ("larc", simsiam, "LARS", {"exclude_1d": False}), ("sgd", torch.optim, "SGD", {})])
def test_linear_trains_the_classifier_alone_and_counts_exactly(optimizer, owner, name, more,
                                                               pretrained, tmp_path, monkeypatch):
    watch = watched(monkeypatch, owner, name)
    flags = [*LINEAR, "--init", pretrained / "last.pt", "--optimizer", optimizer, "--base-lr", 2,
             "--momentum", 0.5, "--weight-decay", 0.01, "--epochs", 3]
    assert main(*flags, "--precision", "fp64", "--out", tmp_path) == 0
    lr = 2 * 12 / 256
    assert watch.call_args.kwargs == dict(lr=lr, momentum=0.5, weight_decay=0.01, **more)
    before, after = (torch.load(out / "encoder.pt") for out in (pretrained, tmp_path))
    assert len(before) > 40 and before.keys() == after.keys()  # buffers included
    assert all(torch.equal(before[name], after[name]) for name in before)
    lines, args, fc = records(tmp_path, "top1"), ready(*flags), weights(tmp_path)
    assert [line["epoch"] for line in lines] == [0.25, 1, 2, 3]
    assert [line["lr"] for line in lines] == pytest.approx(
        [lr * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in (0, 0, 1, 2)])
    assert fc["bias"].abs().sum() > 0  # LARC adapts it too
    h, y = simsiam.features(simsiam.load_encoder(args), simsiam.load_data(args).val, args)
    right = sum(int((fc["weight"] @ x + fc["bias"]).argmax() == label) for x, label in zip(h, y))
    assert len(y) == 12 and lines[-1]["top1"] == right / 12


def test_every_ablation_runs_and_is_another_run(classes, tmp_path):
    curves = {}
    for flags in ("", "--no-stop-grad", "--predictor none", "--predictor frozen", "--bn none",
                  "--predictor-lr decay", "--bn hidden", "--bn all", "--no-symmetric",
                  "--similarity cross-entropy"):
        assert main(*SMALL, "--data", classes, "--out", tmp_path / flags, "--epochs", 2,
                    "--log-every", 1, *flags.split()) == 0
        curves[tuple(losses(tmp_path / flags))] = flags
    assert len(curves) == 10 and {len(curve) for curve in curves} == {6}


def test_flags_reach_heads_monitor_seed_and_loader(classes, tmp_path, monkeypatch):
    knn, loader = (watched(monkeypatch, simsiam, x) for x in ("knn_accuracy", "DataLoader"))
    monkeypatch.setattr(simsiam, "in_memory", lambda files, classes, args: simsiam.Images(
        torch.tensor([classes[name] for name in files.values()]), paths=[*files]))
    assert main(*SMALL, "--data", classes, "--steps", 1, "--out", tmp_path, "--projector-layers", 3,
                "--hidden-dim", 24, "--dim", 20, "--predictor-dim", 12, "--knn-every", 1, "--knn-k",
                7, "--knn-temperature", 0.3, "--seed", 7, "--workers", 1) == 0
    shapes = [[*x.shape] for x in weights(tmp_path).values() if x.ndim == 2]  # of the two heads
    assert shapes == [[24, 64], [24, 24], [20, 24], [12, 20], [20, 12]]
    assert knn.call_args.args[4:] == (7, 0.3) and torch.initial_seed() == 7
    assert loader.call_args.kwargs["num_workers"] == 1


@pytest.mark.parametrize("precision, native, dtype", [
    ("fp32", True, torch.float32), ("fp64", True, torch.float64), ("bf16", False, torch.bfloat16),
    ("auto", True, torch.bfloat16), ("auto", False, torch.float32)])
def test_precision_is_that_of_every_forward_pass(precision, native, dtype, command, tmp_path,
                                                 monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    seen, real = [], common.ResNet.forward
    monkeypatch.setattr(common.ResNet, "forward", lambda self, x: (
        seen.append(real(self, x)), seen[-1])[1])
    assert main(*command, "--steps", 1, "--knn-every", 1, "--precision", precision, "--device",
                "cpu", "--out", tmp_path) == 0
    assert {y.dtype for y in seen} == {dtype} and len({len(y) for y in seen}) > 1  # and evaluation


@pytest.mark.parametrize("minutes, steps", [  # at an epoch's end already after one minute
    (10, [3, 6, 9]), (1, [2, 4, 6, 8, 9])])
def test_save_every_counts_minutes(minutes, steps, command, tmp_path, monkeypatch):
    save, agree = (watched(monkeypatch, simsiam, name) for name in ("save", "agree"))
    monkeypatch.setattr(simsiam.time, "time", lambda: 40.0 * agree.call_count)  # 40 s a step
    assert main(*command, "--epochs", 3, "--log-every", 1, "--save-every", minutes, "--out",
                tmp_path) == 0
    assert [call.args[3] for call in save.call_args_list] == steps
