"""Weights in and out: --init, encoder.pt, the linear evaluation, embed; and every ablation flag."""

import json
import shutil

import pytest
import torch
import torchvision
from conftest import TINY, losses, program, records, write_images

import common
import simsiam


main = program(simsiam)


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
    top1 = records(tmp_path, "top1")
    assert [line["epoch"] for line in top1] == [0, 1, 2, 3]
    assert "frozen encoder (eval mode)" in capsys.readouterr().out
    lr = [line["lr"] for line in records(tmp_path, "loss")]
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
    assert len(labels) == 12 and records(tmp_path, "top1")[-1]["top1"] == right / 12
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
    ours, theirs = (losses(out) for out in (tmp_path, healthy))
    assert len(ours) == len(theirs) == 6 and ours != theirs
    state = torch.load(tmp_path / "last.pt")["model"]
    first = simsiam.SimSiam(common.resnet(10, 0.125, small_images=True), 16, 8, 0, 2)
    if flags == "--predictor frozen":  # at its initialisation, which the seed gives
        torch.manual_seed(0)
        first = simsiam.SimSiam(common.resnet(10, 0.125, small_images=True), 16, 8, 0, 2)
        assert torch.equal(state["predictor.0.weight"], first.predictor[0].weight)
    elif flags == "--predictor none":
        assert not [name for name in state if name.startswith("predictor")]


# Flags that could else do nothing without a test that fails.


def recorded(monkeypatch, owner, name, what):
    """From now on what(*args, **kwargs) of every call of owner.name; the calls go through."""
    calls, real = [], getattr(owner, name)

    def call(*args, **kwargs):
        calls.append(what(*args, **kwargs))
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize("bn, fcs, last", [
    ("none", (0, 2, 4, 0, 2), ("projector.4.bias", "predictor.2.bias")),
    ("hidden", (0, 3, 6, 0, 3), ("projector.6.bias", "predictor.3.bias")),
    ("default", (0, 3, 6, 0, 3), ("projector.7.running_var", "predictor.3.bias")),
    ("all", (0, 3, 6, 0, 3), ("projector.7.running_var", "predictor.4.running_var"))])
def test_the_flags_of_the_heads_build_them(bn, fcs, last, classes, tmp_path):
    assert main(*TINY, "--data", classes, "--image-size", 16, "--steps", 1, "--out", tmp_path,
                "--projector-layers", 3, "--hidden-dim", 24, "--dim", 20, "--predictor-dim", 12,
                "--bn", bn) == 0
    state = torch.load(tmp_path / "last.pt")["model"]
    names = [f"{head}.{i}.weight" for head, i in zip(["projector"] * 3 + ["predictor"] * 2, fcs)]
    assert [[*state[name].shape] for name in names] == [
        [24, 64], [24, 24], [20, 24], [12, 20], [20, 12]]
    for head, name in zip(("projector", "predictor"), last):
        *_, end = [key for key in state if key.startswith(head) and "batches" not in key]
        assert end == name


@pytest.mark.parametrize("precision, native, dtype", [
    ("fp32", True, torch.float32), ("fp64", True, torch.float64), ("bf16", False, torch.bfloat16),
    ("auto", True, torch.bfloat16), ("auto", False, torch.float32)])
def test_precision_is_that_of_the_forward_pass_in_every_stage(precision, native, dtype, pretrained,
                                                              classes, tmp_path, monkeypatch):
    monkeypatch.setattr(simsiam, "bf16_is_native", lambda device: native)
    outputs = recorded(monkeypatch, simsiam, "simsiam_loss", lambda *o, **k: {x.dtype for x in o})
    flags = ["--data", classes, "--workers", 0, "--precision", precision, "--device", "cpu"]
    assert main(*TINY, "--image-size", 16, "--steps", 1, *flags, "--out", tmp_path / "p") == 0
    assert outputs == [{dtype}]
    logits = recorded(monkeypatch, simsiam.F, "cross_entropy", lambda logits, *a, **k: logits)
    init = ["--init", pretrained / "last.pt", "--recipe", "demo"]
    assert main("linear", *init, *flags, "--batch-size", 12, "--steps", 1, "--out",
                tmp_path / "l") == 0
    assert main("embed", *init, *flags, "--out", tmp_path / "e") == 0
    for x in (*logits, torch.load(tmp_path / "e" / "features.pt")["features"]):
        assert x.dtype == (torch.float64 if precision == "fp64" else torch.float32)
        assert torch.equal(x, x.bfloat16().to(x.dtype)) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("optimizer", ["larc", "sgd"])
def test_the_flags_of_the_linear_evaluation_reach_its_optimizer(optimizer, classes, tmp_path,
                                                                monkeypatch):
    larc, sgd = (recorded(monkeypatch, owner, name, lambda params, **settings: settings)
                 for owner, name in ((simsiam, "LARS"), (torch.optim, "SGD")))
    parts = recorded(monkeypatch, simsiam.LinearProbe, "forward", lambda self, x: len(x))
    assert main("linear", "--init", "none", "--data", classes, "--recipe", "demo", "--width", 0.125,
                "--optimizer", optimizer, "--base-lr", 2, "--momentum", 0.5, "--weight-decay", 0.01,
                "--batch-size", 12, "--accumulate", 3, "--steps", 1, "--workers", 0, "--out",
                tmp_path) == 0
    settings = dict(lr=2 * 12 / 256, momentum=0.5, weight_decay=0.01)
    assert larc == [{**settings, "exclude_1d": False}] * (optimizer == "larc")
    assert sgd == [settings] * (optimizer == "sgd")
    assert parts == [4, 4, 4]


@pytest.mark.parametrize("stage", ["pretrain", "linear"])
def test_crop_min_and_workers_reach_the_crops(stage, classes, pretrained, tmp_path, monkeypatch):
    loaders = recorded(monkeypatch, simsiam, "DataLoader", lambda *a, **k: k["num_workers"])
    shares = recorded(monkeypatch, simsiam, "crop_boxes", lambda u, h, w, crop_min, flip: crop_min)
    flags = [*TINY, "--image-size", 16] if stage == "pretrain" else [
        "linear", "--init", pretrained / "last.pt", "--recipe", "demo", "--batch-size", 12]
    flags += ["--data", classes, "--crop-min", 0.3, "--steps", 1, "--workers", 1]
    assert main(*flags, "--out", tmp_path / "memory") == 0
    assert loaders == [] and set(shares) == {0.3}
    monkeypatch.setattr(simsiam, "load_pixels", lambda images, args: images)
    stages = recorded(monkeypatch, simsiam, "Stage1", lambda images, size, crop_min, *a: crop_min)
    assert main(*flags, "--out", tmp_path / "disk") == 0
    assert 0.3 in stages and set(stages) <= {0.3, 1.0}  # 1.0: the test view, which is not cropped
    assert set(loaders) == {0, 1}  # 0: views.png


def test_the_knn_monitor_takes_its_k_and_temperature(classes, tmp_path, monkeypatch):
    asked = recorded(monkeypatch, simsiam, "knn_accuracy", lambda *a, k, temperature:
                     (k, temperature))
    assert main(*TINY, "--data", classes, "--image-size", 16, "--steps", 1, "--out", tmp_path,
                "--knn-every", 1, "--knn-k", 7, "--knn-temperature", 0.3) == 0
    assert asked == [(7, 0.3)]


def test_save_every_counts_minutes(classes, tmp_path, monkeypatch):
    saved = recorded(monkeypatch, simsiam.Run, "save", lambda *a, step, **k: step)
    for minutes, steps in ((1e-9, [1, 2, 3, 4, 4]), (100, [3, 4, 4])):  # 3 steps are an epoch
        assert main(*TINY, "--data", classes, "--image-size", 16, "--steps", 4, "--save-every",
                    minutes, "--out", tmp_path / str(minutes)) == 0
        assert saved == steps
        saved.clear()


def test_compile_compiles_the_model_once_and_only_when_asked(classes, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self)))
    for flags, expected in (([], []), (["--compile"], [simsiam.SimSiam])):
        assert main(*TINY, "--data", classes, "--image-size", 16, "--steps", 1, *flags, "--out",
                    tmp_path / str(len(flags))) == 0
        assert compiled == expected


def test_the_seed_is_that_of_the_initial_weights():
    for seed in (0, 3):
        simsiam.setup(simsiam.parse_args(["--seed", str(seed), "--device", "cpu"]))
        assert torch.initial_seed() == seed


def test_data_root_is_where_torchvision_looks(tmp_path, monkeypatch):
    roots = []

    class Nowhere:
        def __init__(self, root, **how):
            roots.append(root)
            raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Nowhere)
    assert main("--data", "cifar10", "--data-root", tmp_path / "sets", "--out", tmp_path) == 2
    assert roots == [str(tmp_path / "sets")]


def test_the_flags_make_up_for_what_a_bare_encoder_does_not_say(classes, tmp_path):
    flags = ["--arch", "resnet18", "--no-small-images", "--image-size", 24, "--mean", 0.1, 0.2, 0.3,
             "--std", 0.4, 0.5, 0.6]
    assert main(*TINY, "--data", classes, *flags, "--steps", 1, "--out", tmp_path / "run") == 0
    shutil.copy(tmp_path / "run" / "encoder.pt", tmp_path / "bare.pt")  # without encoder.json
    flags += ["--recipe", "demo", "--width", 0.125]
    found = []
    for init, more in (("run/last.pt", []), ("run/encoder.pt", []), ("bare.pt", flags),
                       ("bare.pt", [*flags, "--mean", 0.1, 0.2, 0.4]),
                       ("bare.pt", [*flags, "--std", 0.4, 0.5, 0.7]),
                       ("bare.pt", [*flags, "--image-size", 16])):
        assert main("embed", "--init", tmp_path / init, *more, "--data", classes, "--workers", 0,
                    "--precision", "fp32", "--out", tmp_path / "e") == 0
        found.append(torch.load(tmp_path / "e" / "features.pt")["features"])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not any(torch.allclose(found[0], other) for other in found[3:])


@pytest.mark.parametrize("error, sentence", [
    (torch.OutOfMemoryError("CUDA"), "the device is out of memory: lower --batch-size"),
    (KeyboardInterrupt(), "interrupted; what was saved is whole"),
    (simsiam.UserError("no such thing"), "no such thing")])
def test_what_ends_a_run_is_one_sentence_and_exit_code_2(error, sentence, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr(simsiam, "pretrain", fail)
    assert main("--device", "cpu") == 2
    assert capsys.readouterr().err == f"simsiam.py: {sentence}\n"


def test_the_linear_classifier_starts_near_nought():  # fact sheet, section 4: N(0, .01), bias 0
    torch.manual_seed(0)
    probe = simsiam.LinearProbe(common.resnet(10), 100)
    assert probe.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert probe.fc.bias.tolist() == [0] * 100
    assert not any(p.requires_grad for p in probe.encoder.parameters())
    assert probe.train().fc.training and not probe.encoder.training
