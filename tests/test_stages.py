"""Weights in and out: --init, encoder.pt, linear evaluation; and every flag reaches its place."""

import json
import math
import os

import pytest
import torch
import torchvision
from conftest import TINY, assert_same_weights, losses, program, records, weights

import common
import simsiam

main = program(simsiam)
SMALL = [*TINY, "--image-size", 16]
LINEAR = ["linear", "--batch-size", 12, "--workers", 0]


def settled(*words, dtype=torch.float32):
    args = simsiam.settle(simsiam.parse_args([*map(str, words)]))
    args.device, args.dtype = torch.device("cpu"), dtype
    return args


def recorded(monkeypatch, owner, name, what):
    """From now on what(*args, **kwargs) of every call of owner.name; the calls go through."""
    calls, real = [], getattr(owner, name)

    def call(*args, **kwargs):
        calls.append(what(*args, **kwargs))
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


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


# ------------------------------------------------------------------------------ weights in and out


@pytest.mark.parametrize("file, flags, changed", [
    ("last.pt", "", {}), ("last.pt", "--data demo", {"data": "demo"}),
    ("last.pt", "--recipe cifar", {"recipe": "cifar", "base_lr": 30.0, "epochs": 100}),
    ("last.pt", "--data-root /x --image-size 24", {"data_root": "/x", "image_size": 24}),
    ("last.pt", "--mean 1 2 3 --std 4 5 6", {"mean": [1, 2, 3], "std": [4, 5, 6]}),
    ("encoder.pt", "--data demo", {"data": "demo", "data_root": "data"}),
    ("bare.pt", "--data demo --width 0.125 --image-size 16 --mean 0.4 0.5 0.6",
     {"data": "demo", "data_root": "data"})])
def test_linear_takes_from_init_what_no_flag_says(file, flags, changed, pretrained, classes,
                                                  capsys):
    kept = dict(data=str(classes), data_root=os.path.abspath("sets"), recipe="demo", base_lr=3.0,
                epochs=30, arch="resnet10", width=0.125, small_images=True, image_size=16,
                zero_init_residual=False, mean=[0.4, 0.5, 0.6], std=[0.25] * 3)
    args = settled("linear", "--init", pretrained / file, *flags.split())
    assert json.loads(json.dumps({name: getattr(args, name) for name in kept})) == kept | changed
    simsiam.load_encoder(args)
    said = capsys.readouterr().out
    assert all(x in said for x in (f"--init {args.init}", "resnet10", f"{args.image_size} px",
                                   args.recipe))


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
    encoder = simsiam.load_encoder(settled("linear", *init, "--recipe", "demo", "--width", 0.125))
    assert all(torch.equal(encoder.state_dict()[name], given[name]) for name in given)
    assert main(*SMALL, *init, "--base-lr", 0, "--steps", 1, "--out", tmp_path / "out") == 0
    after = torch.load(tmp_path / "out" / "encoder.pt")
    same = [torch.equal(after[x], given[x]) for x in given if "running" not in x and "num" not in x]
    assert all(same) and len(same) > 20  # batch norm's statistics alone are new


def test_the_authors_checkpoint_becomes_torchvisions_resnet(classes, tmp_path):
    model = simsiam.SimSiam(common.resnet(50))
    model(*torch.randn(2, 4, 3, 32, 32))  # gives batch norm statistics
    state = {"module." + name.replace("projector.", "encoder.fc."): x
             for name, x in model.state_dict().items()}
    assert len(state) == 343 and "module.encoder.fc.6.bias" in state  # as in theirs
    torch.save({"epoch": 100, "arch": "resnet50", "state_dict": state, "optimizer": {}},
               tmp_path / "checkpoint_0099.pth.tar")
    flags = [*LINEAR, "--init", tmp_path / "checkpoint_0099.pth.tar", "--data", classes,
             "--image-size", 32, "--precision", "fp32", "--device", "cpu"]
    assert main(*flags, "--steps", 1, "--out", tmp_path) == 0
    about = json.loads((tmp_path / "encoder.json").read_text())
    resnet, args = torchvision.models.resnet50(), settled(*flags)
    answer = resnet.load_state_dict(torch.load(tmp_path / "encoder.pt"), strict=False)
    assert {*answer.missing_keys} == {"fc.weight", "fc.bias"} and not answer.unexpected_keys
    resnet.fc = torch.nn.Identity()
    assert about == json.loads(json.dumps({name: getattr(args, name) for name in simsiam.ENCODER}))
    images = simsiam.load_data(args).val
    x = torch.nn.functional.interpolate(  # 7/8 of 16 px, from the middle
        images.pixels[..., 1:15, 1:15] / 255, (32, 32), mode="bilinear", antialias=True)
    with torch.no_grad():
        y = resnet.eval()(simsiam.normalize(x, about["mean"], about["std"]))
    h = simsiam.features(simsiam.load_encoder(args), images, args)[0]
    assert len(h) == 12 and y.std(dim=0).mean() > 0
    torch.testing.assert_close(h, y, rtol=1e-4, atol=1e-4 * y.abs().max().item())


# ------------------------------------------------------------------------------- linear evaluation


@pytest.mark.parametrize("optimizer, owner, name, more", [
    ("larc", simsiam, "LARS", {"exclude_1d": False}), ("sgd", torch.optim, "SGD", {})])
def test_linear_trains_the_classifier_alone(optimizer, owner, name, more, pretrained, tmp_path,
                                            monkeypatch, capsys):
    seen = recorded(monkeypatch, owner, name, lambda params, **settings: settings)
    flags = [*LINEAR, "--init", pretrained / "last.pt", "--optimizer", optimizer, "--base-lr", 2,
             "--momentum", 0.5, "--weight-decay", 0.01, "--epochs", 3, "--out", tmp_path]
    assert main(*flags) == 0
    lr = 2 * 12 / 256
    assert seen == [dict(lr=lr, momentum=0.5, weight_decay=0.01, **more)]
    before, after = (torch.load(out / "encoder.pt") for out in (pretrained, tmp_path))
    assert len(before) > 40 and before.keys() == after.keys()  # buffers included
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert weights(tmp_path)["bias"].abs().sum() > 0  # LARC adapts it too
    lines = records(tmp_path, "top1")
    assert [line["epoch"] for line in lines] == [0.25, 1, 2, 3]
    assert [line["lr"] for line in lines] == pytest.approx(
        [lr * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in (0, 0, 1, 2)])
    capsys.readouterr()
    assert main(*flags) == 0  # finished: only tells its result
    result = f"step 12 of 12, top1 {lines[0]['top1']:.1%} -> {lines[-1]['top1']:.1%}\n"
    assert capsys.readouterr().out.endswith(f"{tmp_path}: {result}")
    assert records(tmp_path, "top1") == lines


def test_top1_is_an_exact_count_and_a_pause_changes_nothing(pretrained, tmp_path):
    flags = [*LINEAR, "--init", pretrained / "last.pt", "--epochs", 2, "--precision", "fp64"]
    for out, steps in (("whole", 8), ("parts", 3), ("parts", 8)):
        assert main(*flags, "--steps", steps, "--out", tmp_path / out) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    args, fc = settled(*flags, dtype=torch.float64), weights(tmp_path / "parts")
    h, y = simsiam.features(simsiam.load_encoder(args), simsiam.load_data(args).val, args)
    right = sum(int((fc["weight"] @ x + fc["bias"]).argmax() == label) for x, label in zip(h, y))
    for out in ("whole", "parts"):
        assert len(y) == 12 and records(tmp_path / out, "top1")[-1]["top1"] == right / 12


def test_the_linear_classifier_starts_near_zero(pretrained, tmp_path):  # N(0, 0.01), bias 0
    assert main(*LINEAR, "--init", pretrained / "last.pt", "--base-lr", 0, "--steps", 1, "--out",
                tmp_path) == 0
    fc = weights(tmp_path)
    assert fc["weight"].shape == (3, 64) and fc["bias"].tolist() == [0, 0, 0]
    assert fc["weight"].std().item() == pytest.approx(0.01, rel=0.15)


# ---------------------------------------------------- flags that could do nothing and none notice


def test_every_ablation_runs_and_is_another_run(classes, tmp_path):
    curves = {}
    for flags in ("", "--no-stop-grad", "--predictor none", "--predictor frozen", "--bn none",
                  "--predictor-lr decay", "--bn hidden", "--bn all", "--no-symmetric",
                  "--similarity cross-entropy"):
        assert main(*SMALL, "--data", classes, "--out", tmp_path / flags, "--epochs", 2,
                    "--log-every", 1, *flags.split()) == 0
        curves[tuple(losses(tmp_path / flags))] = flags
    assert len(curves) == 10 and {len(curve) for curve in curves} == {6}


@pytest.mark.parametrize("bn, fcs, ends", [  # of the last layers of projector and predictor
    ("none", (0, 2, 4, 0, 2), "4.bias 2.bias"), ("hidden", (0, 3, 6, 0, 3), "6.bias 3.bias"),
    ("default", (0, 3, 6, 0, 3), "7.running_var 3.bias"),
    ("all", (0, 3, 6, 0, 3), "7.running_var 4.running_var")])
def test_the_flags_of_the_heads_build_them(bn, fcs, ends, classes, tmp_path):
    assert main(*SMALL, "--data", classes, "--steps", 1, "--out", tmp_path, "--projector-layers", 3,
                "--hidden-dim", 24, "--dim", 20, "--predictor-dim", 12, "--bn", bn) == 0
    state, heads = weights(tmp_path), ("projector.", "predictor.")
    shapes = [[24, 64], [24, 24], [20, 24], [12, 20], [20, 12]]
    for head, fc, shape in zip((*heads[:1] * 3, *heads[1:] * 2), fcs, shapes):
        assert [*state[f"{head}{fc}.weight"].shape] == shape
    for head, end in zip(heads, ends.split()):
        assert [key for key in state if head in key and "batches" not in key][-1] == head + end


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


def test_crop_min_and_workers_reach_the_crops(command, tmp_path, monkeypatch):
    shares = recorded(monkeypatch, simsiam, "crop_boxes", lambda u, h, w, crop_min: crop_min)
    workers, real = [], simsiam.DataLoader
    monkeypatch.setattr(simsiam, "DataLoader", lambda *args, num_workers, **how: (
        workers.append(num_workers), real(*args, num_workers=0, **how))[1])
    flags = [*command, "--crop-min", 0.3, "--steps", 1, "--workers", 3]
    assert main(*flags, "--out", tmp_path / "memory") == 0
    assert not workers and {*shares} == {0.3}
    monkeypatch.setattr(simsiam, "in_memory", lambda files, classes, args: simsiam.Images(
        torch.tensor([classes[name] for name in files.values()]), paths=[*files]))
    shares.clear()
    assert main(*flags, "--out", tmp_path / "disk") == 0
    assert {*workers} == {3} and {*shares} == {0.3}


def test_the_knn_monitor_takes_its_k_and_temperature(classes, tmp_path, monkeypatch):
    asked = recorded(monkeypatch, simsiam, "knn_accuracy", lambda h, y, g, z, *asked: asked)
    assert main(*SMALL, "--data", classes, "--steps", 1, "--out", tmp_path, "--knn-every", 1,
                "--knn-k", 7, "--knn-temperature", 0.3) == 0
    assert asked == [(7, 0.3)]


@pytest.mark.parametrize("minutes, steps", [(10, [3, 6, 9]), (1, [2, 4, 6, 8, 9])])
def test_save_every_counts_minutes(minutes, steps, command, tmp_path, monkeypatch):
    saved = recorded(monkeypatch, simsiam, "save", lambda *args: args[3])  # the step
    ticks = recorded(monkeypatch, simsiam, "agree", lambda *args: 40)  # seconds a step
    monkeypatch.setattr(simsiam.time, "time", lambda: float(sum(ticks)))
    assert main(*command, "--epochs", 3, "--log-every", 1, "--save-every", minutes, "--out",
                tmp_path) == 0
    assert saved == steps  # at an epoch's end already after one minute


def test_the_seed_is_that_of_weights_order_and_augmentation(classes, tmp_path, monkeypatch):
    colors, orders = (recorded(monkeypatch, simsiam, name, lambda *key: key[:2])
                      for name in ("draws", "generator"))
    assert main(*SMALL, "--data", classes, "--seed", 7, "--steps", 1, "--out", tmp_path) == 0
    assert torch.initial_seed() == 7 and orders == [(7, "order")]
    assert {*colors} == {(7, "crop"), (7, "colour")}
