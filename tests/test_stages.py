"""Weights in and out: --init, encoder.pt, the linear evaluation, embed; and every ablation flag."""

import json
import shutil

import pytest
import torch
import torchvision
from conftest import TINY, write_images

import common
import simsiam


def main(*args):
    return simsiam.main([*map(str, args)])


def log(out, kind):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in line]


@pytest.fixture(scope="module")
def pretrained(classes, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained")
    assert main(*TINY, "--data", classes, "--image-size", 16, "--out", out, "--steps", 5) == 0
    return out


def test_encoder_pt_loads_into_torchvision_with_only_fc_missing(classes, tmp_path):
    assert main("--data", classes, "--recipe", "imagenet", "--image-size", 32, "--dim", 16,
                "--predictor-dim", 4, "--batch-size", 4, "--steps", 1, "--knn-every", 0, "--workers", 0,
                "--hidden-dim", 8, "--out", tmp_path) == 0
    model = torchvision.models.resnet50()
    answer = model.load_state_dict(torch.load(tmp_path / "encoder.pt"), strict=False)
    assert set(answer.missing_keys) == {"fc.weight", "fc.bias"} and answer.unexpected_keys == []
    model.fc = torch.nn.Identity()
    assert main("embed", "--init", tmp_path / "last.pt", "--data", classes, "--workers", 0, "--precision",
                "fp32", "--out", tmp_path / "e") == 0
    result = torch.load(tmp_path / "e" / "features.pt")
    x = torchvision.io.decode_image(result["paths"][0]).float()[None] / 255
    x = x[..., 1:15, 1:15]  # 7/8 of 16 px, from the middle: the ImageNet recipe's test view
    x = torch.nn.functional.interpolate(x, (32, 32), mode="bilinear", antialias=True)
    about = json.loads((tmp_path / "encoder.json").read_text())
    assert about["arch"] == "resnet50" and about["image_size"] == 32 and about["feature_dim"] == 2048
    x = simsiam.normalize(x, about["mean"], about["std"])
    with torch.no_grad():
        y = model.eval()(x)[0]
    torch.testing.assert_close(result["features"][0], y, rtol=1e-4, atol=1e-4 * y.abs().max().item())


def official(model):
    """Our names turned into the authors' (fact sheet, section 8)."""
    return {"module." + name.replace("projector.", "encoder.fc."): x
            for name, x in model.state_dict().items()}


def test_the_authors_checkpoints_load_strictly(classes, tmp_path, capsys):
    model = simsiam.SimSiam(common.resnet(50))
    state = official(model)
    assert len(state) == 343 and "module.encoder.fc.6.bias" in state
    assert not {"module.encoder.fc.7.weight", "module.predictor.1.extra"} & state.keys()
    torch.save({"epoch": 100, "arch": "resnet50", "state_dict": state, "optimizer": {}},
               tmp_path / "checkpoint_0099.pth.tar")
    args = ["--init", tmp_path / "checkpoint_0099.pth.tar", "--data", classes, "--image-size", 32,
            "--recipe", "imagenet", "--workers", 0]
    for stage in ("pretrain", "embed"):
        extra = ["--steps", 1, "--batch-size", 4, "--knn-every", 0] * (stage == "pretrain")
        assert main(stage, *args, *extra, "--out", tmp_path / stage) == 0
    model.eval()
    shown = torch.load(tmp_path / "embed" / "features.pt")["features"]
    assert shown.shape == (60, 2048) and shown.std() > 0
    del state["module.encoder.fc.4.running_mean"]  # a head's key: pre-training needs it
    torch.save({"arch": "resnet50", "state_dict": state}, tmp_path / "cut.pth.tar")
    assert main(*args[:1], tmp_path / "cut.pth.tar", *args[2:], "--batch-size", 4, "--out",
                tmp_path / "cut") == 2
    assert 'Missing key(s) in state_dict: "projector.4.running_mean"' in capsys.readouterr().err
    # Their linear checkpoints: torchvision's names behind "module.".
    plain = {"module." + name: x for name, x in torchvision.models.resnet50().state_dict().items()}
    torch.save({"arch": "resnet50", "state_dict": plain, "best_acc1": 68.1}, tmp_path / "linear.pth.tar")
    assert main("embed", *args[:1], tmp_path / "linear.pth.tar", *args[2:], "--out",
                tmp_path / "linear") == 0
    assert main("embed", *args, "--arch", "resnet18", "--out", tmp_path / "no") == 2
    assert "--arch resnet18, but" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer, base_lr", [("larc", 0.1), ("sgd", 3.0)])
def test_linear_evaluation_changes_not_one_bit_of_the_encoder(optimizer, base_lr, pretrained, classes,
                                                              tmp_path, capsys):
    assert main("linear", "--init", pretrained / "last.pt", "--data", classes, "--recipe", "demo",
                "--optimizer", optimizer, "--base-lr", base_lr, "--batch-size", 12, "--epochs", 3,
                "--workers", 0, "--out", tmp_path) == 0
    before, after = (torch.load(path / "last.pt")["model"] for path in (pretrained, tmp_path))
    names = [name for name in before if name.startswith("encoder.")]  # buffers included
    assert len(names) > 40 and all(torch.equal(before[name], after[name]) for name in names)
    assert after["fc.bias"].abs().sum() > 0  # LARC adapts the bias too, from a raw first step
    top1 = log(tmp_path, "top1")
    assert [line["epoch"] for line in top1] == [0, 1, 2, 3]
    assert "frozen encoder (eval mode)" in capsys.readouterr().out
    lr = [line["lr"] for line in log(tmp_path, "loss")]
    assert lr[0] == base_lr * 12 / 256 and lr[-1] == pytest.approx(lr[0] * 0.25)  # cos(2 pi / 3)


def test_larc_adapts_the_bias_too_and_decays_nothing(pretrained, classes, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(simsiam, "LARS", lambda params, **settings: (
        seen.append(settings), common.LARS(params, **settings))[1])
    assert main("linear", "--init", pretrained / "last.pt", "--data", classes, "--recipe", "imagenet",
                "--batch-size", 12, "--epochs", 1, "--workers", 0, "--out", tmp_path) == 0
    lr = 0.1 * 12 / 256  # fact sheet, section 4: released settings
    assert seen == [dict(lr=lr, momentum=0.9, weight_decay=0.0, exclude_1d=False)]


def test_top1_is_an_exact_count(pretrained, classes, tmp_path):
    assert main("linear", "--init", pretrained / "last.pt", "--data", classes, "--recipe", "demo",
                "--batch-size", 12, "--epochs", 2, "--workers", 0, "--precision", "fp64", "--out",
                tmp_path) == 0
    assert main("embed", "--init", pretrained / "last.pt", "--data", classes, "--workers", 0,
                "--precision", "fp64", "--out", tmp_path / "e") == 0
    e, state = torch.load(tmp_path / "e" / "features.pt"), torch.load(tmp_path / "last.pt")["model"]
    val = ["/val/" in path for path in e["paths"]]
    logits = e["features"][val] @ state["fc.weight"].T + state["fc.bias"]
    labels = torch.tensor(e["labels"])[val]
    right = sum(int(row.argmax() == label) for row, label in zip(logits, labels))
    assert len(labels) == 12 and log(tmp_path, "top1")[-1]["top1"] == right / 12
    assert [sorted(e["classes"]).index(path.split("/")[-2]) for path in e["paths"]] == e["labels"]


def test_accumulation_in_the_linear_evaluation_is_exact(pretrained, classes, tmp_path):
    weights = []
    for parts in (1, 3):
        out = tmp_path / str(parts)
        assert main("linear", "--init", pretrained / "last.pt", "--data", classes, "--recipe", "demo",
                    "--batch-size", 12, "--epochs", 1, "--workers", 0, "--precision", "fp64",
                    "--accumulate", parts, "--out", out) == 0
        weights.append(torch.load(out / "last.pt")["model"]["fc.weight"])
    torch.testing.assert_close(*weights, rtol=0, atol=1e-10)


def test_init_of_pretrain_takes_the_whole_model_or_the_encoder(pretrained, classes, tmp_path):
    before = torch.load(pretrained / "last.pt")["model"]
    for file, heads in (("last.pt", True), ("encoder.pt", False)):
        out = tmp_path / file
        assert main(*TINY, "--data", classes, "--image-size", 16, "--init", pretrained / file, "--steps",
                    1, "--base-lr", 1e-30, "--weight-decay", 0, "--out", out) == 0
        after = torch.load(out / "last.pt")["model"]
        assert torch.equal(after["encoder.conv1.weight"], before["encoder.conv1.weight"])
        assert torch.equal(after["projector.0.weight"], before["projector.0.weight"]) == heads


def test_embed_leaves_out_what_it_cannot_read(pretrained, tmp_path, capsys):
    write_images(tmp_path / "new" / "deep", 5)
    bad = tmp_path / "new" / "deep" / "00_002.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    assert main("embed", "--init", pretrained / "last.pt", "--data", tmp_path / "new", "--workers", 2,
                "--out", tmp_path / "out") == 0
    result = torch.load(tmp_path / "out" / "features.pt")
    assert [path[-10:] for path in result["paths"]] == [f"00_{i:03}.jpg" for i in (0, 1, 3, 4)]
    assert result["features"].shape == (4, 64) and result["labels"] is None
    assert "00_002.jpg" in capsys.readouterr().out


def test_embed_takes_a_val_folder_of_other_classes_without_labels(pretrained, classes, tmp_path):
    shutil.copytree(classes, tmp_path / "data")
    (tmp_path / "data" / "val" / "cat").rename(tmp_path / "data" / "val" / "dog")
    assert main("embed", "--init", pretrained / "last.pt", "--data", tmp_path / "data", "--out",
                tmp_path / "out") == 0
    result = torch.load(tmp_path / "out" / "features.pt")
    assert result["labels"] is None and len(result["paths"]) == 60


ABLATIONS = {  # flags: what in the model or the loss shows that they arrived
    "--no-stop-grad": lambda a: a.stop_grad is False,
    "--predictor none": lambda a: a.predictor == "none",
    "--predictor frozen": lambda a: a.predictor == "frozen",
    "--predictor-lr decay": lambda a: a.predictor_lr == "decay",
    "--bn none --warmup-epochs 1": lambda a: a.bn == "none",
    "--bn hidden": lambda a: a.bn == "hidden",
    "--bn all": lambda a: a.bn == "all",
    "--similarity cross-entropy": lambda a: a.similarity == "cross-entropy",
    "--no-symmetric": lambda a: a.symmetric is False,
}


@pytest.fixture(scope="module")
def healthy(classes, tmp_path_factory):
    out = tmp_path_factory.mktemp("healthy")
    main(*TINY, "--data", classes, "--image-size", 16, "--out", out, "--epochs", 2, "--log-every", 1)
    return out


@pytest.mark.parametrize("flags", ABLATIONS)
def test_every_ablation_runs_and_is_another_run(flags, healthy, classes, tmp_path, monkeypatch):
    seen = []
    real = simsiam.setup
    monkeypatch.setattr(simsiam, "setup", lambda args: (seen.append(args), real(args)))
    assert main(*TINY, "--data", classes, "--image-size", 16, "--out", tmp_path, "--epochs", 2,
                "--log-every", 1, *flags.split()) == 0
    assert ABLATIONS[flags](seen[0])
    ours, theirs = ([line["loss"] for line in log(out, "loss")] for out in (tmp_path, healthy))
    assert len(ours) == len(theirs) == 6 and ours != theirs
    state = torch.load(tmp_path / "last.pt")["model"]
    first = simsiam.SimSiam(common.resnet(10, 0.125, small_images=True), 16, 8, 0, 2)
    if flags == "--predictor frozen":  # at its initialisation, which the seed gives
        torch.manual_seed(0)
        first = simsiam.SimSiam(common.resnet(10, 0.125, small_images=True), 16, 8, 0, 2)
        assert torch.equal(state["predictor.0.weight"], first.predictor[0].weight)
    elif flags == "--predictor none":
        assert not [name for name in state if name.startswith("predictor")]
