"""moco_v3.py as a program, in short: ranks, kill and resume, monitors, stages, mistakes."""

import json

import pytest
import torch
from conftest import (
    assert_close_runs, assert_one_sentence, assert_same_weights, kill_at_step, losses, program,
    records, run, weights)

import common
import moco_v3

SMALL = ["--dim", "16", "--hidden-dim", "32", "--batch-size", "16", "--workers", "0", "--image-size",
         "16", "--knn-every", "0", "--precision", "fp32", "--log-every", "1"]
RESNET = ["--recipe", "cifar-resnet", "--arch", "resnet10", "--width", "0.125"]
main = program(moco_v3)


@pytest.fixture(scope="module")
def trained(classes, tmp_path_factory):
    """Two epochs of one step on 48 images of three classes, 16 px."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main("--data", classes, "--recipe", "demo", *SMALL, "--batch-size", 40, "--epochs", 2,
                "--warmup-epochs", 0.5, "--knn-every", 1, "--knn-every-steps", 1, "--out", out) == 0
    return out


@pytest.mark.parametrize("flags", [["--recipe", "demo"], RESNET], ids=["vit", "resnet"])
def test_two_processes_are_the_same_run_as_one(flags, classes, tmp_path):
    args = ["--data", classes, *flags, *SMALL, "--precision", "fp64", "--steps", "4",
            "--warmup-epochs", "0.5"]
    assert main(*args, "--out", tmp_path / "one") == 0
    run("moco_v3.py", *args, "--out", tmp_path / "two", processes=2)
    assert_close_runs(tmp_path / "one", tmp_path / "two", 4)


def test_a_killed_run_ends_with_the_same_bits(classes, tmp_path):
    args = ["--data", classes, "--recipe", "demo", *SMALL, "--epochs", "12"]
    assert 0 < kill_at_step(10, "moco_v3.py", *args, out=tmp_path / "killed", fork=True) < 36
    for name in ("killed", "whole"):
        assert main(*args, "--out", tmp_path / name) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 36
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")


def test_the_momentum_encoder_is_in_the_checkpoint_and_not_in_the_optimizer(trained):
    checkpoint = torch.load(trained / "last.pt")
    names = {name.split(".")[0] for name in checkpoint["model"]}
    assert names == {"encoder", "projector", "predictor", "momentum_encoder", "momentum_projector"}
    trainable = sum(p.requires_grad for p in moco_v3.MoCoV3(
        moco_v3.vit("mini", 16, 8, patch_projection="frozen"), 16, 32).parameters())
    assert len(checkpoint["optimizer"]["state"]) == trainable


def test_the_log_has_chance_and_floor_beside_the_loss(trained):
    line = records(trained)[-1]
    assert (line["chance"], line["floor"]) == moco_v3.chance_and_floor(40, 0.2)
    assert line["floor"] < line["loss"] and line["m"] == 1.0  # of the update after the last step


def test_the_queue_curve_stands_beside_the_exact_knn(trained):
    queue, exact = records(trained, "knn_queue"), records(trained, "knn")
    assert [line["step"] for line in queue] == [1, 2] and [line["epoch"] for line in exact] == [0, 1, 2]
    assert all(0 <= line["knn_queue"] <= 1 for line in queue)


def test_the_queue_holds_the_last_tenth_of_an_epoch_and_is_asked_on_time(tmp_path):
    args = [*"--recipe demo --batch-size 100 --knn-every-steps 2 --knn-k 5".split()]
    settings = moco_v3.parse_args(args)
    settings.device, settings.dtype = torch.device("cpu"), torch.float32
    images = moco_v3.load_data(settings)
    monitor = moco_v3.QueueMonitor(images, settings)
    assert monitor.steps == 4
    # An encoder that gives the class: features of the queries, and of the queue, are one-hot.
    encoder = torch.nn.Module()
    encoder.forward = lambda x: torch.eye(10)[torch.arange(len(x)) % 10]
    found = []
    for step in range(1, 11):
        shown = torch.arange(100)  # the demo's image i is of class i % 10
        right = step != 4  # step 4's features are those of the next class
        found.append(monitor(encoder, torch.eye(10)[(shown + (not right)) % 10], shown, step))
    # Full from step 4 on; step 4's are outvoted 3 to 1 while they last, and gone at step 8.
    assert [bool(record) for record in found] == [s in (4, 6, 8, 10) for s in range(1, 11)]
    assert [len(monitor.queue), len(monitor.pixels)] == [4, 1000]
    assert found[7]["knn_queue"] == found[9]["knn_queue"] == 1.0


def test_images_without_a_label_have_no_vote_in_the_queue(classes, tmp_path):  # STL-10's are -1
    settings = moco_v3.parse_args([*"--recipe demo --batch-size 100 --knn-every-steps 1".split()])
    settings.device, settings.dtype = torch.device("cpu"), torch.float32
    images = moco_v3.load_data(settings)
    images.train.labels = images.train.labels.clone()
    images.train.labels[::2] = -1
    monitor, encoder = moco_v3.QueueMonitor(images, settings), torch.nn.Module()
    encoder.forward = lambda x: torch.eye(10)[torch.arange(len(x)) % 10]
    for step in range(1, 5):
        record = monitor(encoder, torch.eye(10)[torch.arange(100) % 10], torch.arange(100), step)
    assert record["knn_queue"] == 0.5  # the even classes have no neighbour left
    images.train.labels[:] = -1
    monitor.queue = []
    for step in range(1, 5):
        assert monitor(encoder, torch.eye(10)[torch.arange(100) % 10], torch.arange(100), step) == {}


def test_gradient_norms_are_the_largest_since_the_last_line(photos, tmp_path):
    args = ["--data", photos, "--recipe", "demo", *SMALL, "--batch-size", 2, "--steps", 7]
    assert main(*args, "--out", tmp_path / "each") == 0
    assert main(*args, "--log-every", 3, "--out", tmp_path / "third") == 0
    for name in ("grad_first", "grad_last"):
        each = [line[name] for line in records(tmp_path / "each")]
        third = [line[name] for line in records(tmp_path / "third")]
        assert third == [each[0], max(each[1:4]), max(each[4:7])]
        assert max(each[1:4]) != each[3] or max(each[4:7]) != each[6]  # so that the test tells


def test_monitors_change_nothing(classes, tmp_path):
    args = ["--data", classes, "--recipe", "demo", *SMALL, "--steps", 4, "--warmup-epochs", 0.5]
    assert main(*args, "--knn-every", 1, "--knn-every-steps", 1, "--out", tmp_path / "with") == 0
    assert main(*args, "--knn-every-steps", 1, "--out", tmp_path / "without") == 0  # --knn-every 0
    assert records(tmp_path / "with", "knn_queue") and not records(tmp_path / "without", "knn_queue")
    assert_same_weights(tmp_path / "with", tmp_path / "without")


def test_the_largest_fall_of_the_knn_curve_is_reported(trained, tmp_path, capsys):
    lines = [{"config": 1}, *({"step": s, "knn_queue": v} for s, v in
                              ((0, .2), (10, .5), (20, .45), (30, .6), (40, .3), (50, .55), (60, .7)))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    logged = {}
    moco_v3.report_dips(type("Run", (), {"path": lambda self, name: tmp_path / name,
                                         "log": lambda self, **record: logged.update(record)})(), 9999)
    assert logged["dip"] == pytest.approx(0.3) and logged["dip_step"] == 40
    said = capsys.readouterr().out  # best 0.6 before: 3 * sqrt(0.7 * 0.3 / 1000)
    assert "at step 40, by 30.0 points; noise is up to 4.3" in said
    assert len(records(trained, "dip")) == 1  # a run that ends reports it, once


def test_later_stages_take_the_runs_architecture(trained, classes, photos, tmp_path):
    assert main("linear", "--init", trained / "last.pt", "--data", classes, "--batch-size", 24,
                "--epochs", 1, "--workers", 0, "--out", tmp_path / "linear") == 0
    assert records(tmp_path / "linear", "top1")
    assert records(tmp_path / "linear", "config")[0]["config"]["patch_size"] == 8
    assert main("embed", "--init", trained / "encoder.pt", "--data", photos, "--workers", 0, "--out",
                tmp_path / "embed") == 0
    assert torch.load(tmp_path / "embed" / "features.pt")["features"].shape == (40, 96)
    assert json.loads((trained / "encoder.json").read_text())["heads"] == 3


def test_the_recipe_follows_the_network_that_init_brings(classes, tmp_path):
    assert main("--data", classes, *RESNET, *SMALL, "--steps", 1, "--out", tmp_path / "run") == 0
    assert main("linear", "--init", tmp_path / "run" / "last.pt", "--data", "demo", "--workers", 0,
                "--steps", 1, "--knn-every", 0, "--out", tmp_path / "demo") == 0  # has none for it
    args = ["linear", "--init", tmp_path / "run" / "last.pt", "--data", classes, "--batch-size", 16,
            "--steps", 1, "--workers", 0]
    assert main(*args, "--out", tmp_path / "linear") == 0
    config = records(tmp_path / "linear", "config")[0]["config"]
    assert (config["recipe"], config["base_lr"]) == ("imagenet-r50-100", 0.1)
    assert (config["width"], config["image_size"]) == (0.125, 16)  # the file's
    assert main(*args, "--recipe", "imagenet", "--out", tmp_path / "refused") == 2


def test_what_changes_no_number_may_change_on_resume(classes, tmp_path):
    args = ["--data", classes, "--recipe", "demo", *SMALL, "--out", tmp_path]
    assert main(*args, "--steps", 1) == 0
    assert main(*args, "--steps", 2, "--grad-checkpoint", "--knn-every-steps", 7) == 0
    assert len(losses(tmp_path)) == 2


def test_init_encoder_takes_the_momentum_encoder(trained, tmp_path):
    for which in ("encoder", "momentum_encoder"):
        assert main("export", "--init", trained / "last.pt", "--init-encoder", which, "--out",
                    tmp_path / which) == 0
        expected = {name.removeprefix(which + "."): x for name, x in weights(trained).items()
                    if name.startswith(which + ".")}
        torch.testing.assert_close(torch.load(tmp_path / which / "encoder.pt"), expected, rtol=0, atol=0)
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(torch.load(tmp_path / "encoder" / "encoder.pt")[name],
                           torch.load(tmp_path / "momentum_encoder" / "encoder.pt")[name])


def test_pretraining_from_an_encoder_alone_starts_the_momentum_encoder_as_its_copy(
        trained, classes, tmp_path):
    args = ["--data", classes, "--recipe", "demo", *SMALL, "--steps", 1]
    assert main(*args, "--init", trained / "encoder.pt", "--out", tmp_path) == 0
    start_of = weights(trained)
    after = weights(tmp_path)  # the first step has lr 0: nothing has moved
    for name, x in after.items():
        if name.startswith("momentum_encoder.") and x.is_floating_point():
            assert torch.equal(x, start_of[name.removeprefix("momentum_")]), name


def test_a_vit_takes_other_patches_positions_and_pooling(classes, tmp_path):
    for i, flags in enumerate((["--position", "learned", "--pooling", "mean"],
                               ["--position", "none", "--pooling", "mean-no-norm", "--bn", "none"],
                               ["--predictor", "none", "--mlp-norm", "batch", "--patch-size", 16],
                               ["--optimizer", "lamb", "--base-lr", 1e-3, "--grad-checkpoint"],
                               ["--ema-momentum", 0, "--ema-schedule", "constant"])):
        out = tmp_path / str(i)
        assert main("--data", classes, "--recipe", "demo", *SMALL, *flags, "--steps", 2, "--out",
                    out) == 0
        assert len(losses(out)) == 2 and json.loads((out / "encoder.json").read_text())["patch_size"] \
            == (16 if i == 2 else 8)


# Every flag of a stage with a value other than the recipe's; behind "|", what it needs beside it.
FLAGS = {
    "arch": "vit_tiny", "patch_size": "16", "heads": "6", "mlp_norm": "batch", "position": "none",
    "stem": "conv | --patch-size 16 --patch-projection learned", "pooling": "mean",
    "patch_projection": "learned", "projector_layers": "2", "hidden_dim": "24", "dim": "8",
    "predictor": "none", "predictor_output_bn": "no", "bn": "none",
    "optimizer": "lars | --base-lr 0.01", "epochs": "5", "batch_size": "12", "base_lr": "0.02",
    "warmup_epochs": "0.25", "weight_decay": "0", "temperature": "0.5", "ema_momentum": "0.9",
    "ema_schedule": "constant", "precision": "fp64", "image_size": "8", "crop_min": "0.2",
    "jitter": "0.1 0.4 0.2 0.1 | --jitter-prob 1", "jitter_prob": "0", "gray_prob": "1",
    "blur_prob": "0 1 | --image-size 24", "solarize_prob": "0 1", "mean": "0.4 0.4 0.4",
    "std": "0.5 0.5 0.5",
    "clip_patch_grad": "1e-9 | --patch-projection learned --optimizer lars --base-lr 9",
    **{name: f"{value} | {' '.join(RESNET)}" for name, value in (
        ("width", "0.25"), ("small_images", "no"), ("zero_init_residual", "no"), ("momentum", "0.1"))},
}
NO_NUMBER = {"grad_checkpoint", "knn_every_steps", "knn_k", "knn_temperature"}  # tests of their own
LINEAR_FLAGS = {
    "init_encoder": "momentum_encoder", "base_lr": "0.02", "epochs": "5 | --batch-size 48",
    "batch_size": "12", "momentum": "0.1", "weight_decay": "0.1", "crop_min": "0.2",
    "precision": "fp64",
}


@pytest.fixture(scope="module")
def outcome(classes, tmp_path_factory):
    """Of three steps: what was logged, and the weights' sums. Every command runs once."""
    done = {}

    def get(*args):
        if args not in done:
            out = tmp_path_factory.mktemp("outcome")
            assert main(*args, "--data", classes, "--workers", 0, "--steps", 3, "--log-every", 1,
                        "--knn-every", 0, "--out", out) == 0
            done[args] = [*losses(out), *(x.sum().item() for x in weights(out).values())]
        return done[args]

    return get


def with_and_without(name, value, *args):
    """The command without a flag and with it."""
    value, _, beside = value.partition(" | ")
    args, flag = [*args, *beside.split()], name.replace("_", "-")
    return args, [*args, *([f"--no-{flag}"] if value == "no" else [f"--{flag}", *value.split()])]


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_of_the_recipe_makes_another_run(name, outcome):
    small = [*map(str, SMALL), "--recipe", "demo", "--warmup-epochs", "0.5"]
    without, with_it = with_and_without(name, FLAGS[name], *small)
    assert outcome(*without) != outcome(*with_it)


@pytest.mark.parametrize("name", LINEAR_FLAGS)
def test_every_flag_of_the_linear_evaluation_makes_another_run(name, trained, outcome):
    args = ["linear", "--init", trained / "last.pt", "--recipe", "demo", "--batch-size", "16"]
    without, with_it = with_and_without(name, LINEAR_FLAGS[name], *args)
    assert outcome(*without) != outcome(*with_it)


def test_no_flag_is_without_a_test():
    assert {*FLAGS} | NO_NUMBER == {*moco_v3.PRETRAIN}
    assert {*LINEAR_FLAGS, "optimizer"} == {*moco_v3.LINEAR}  # which has one choice
    assert {*moco_v3.EMBED} == {"init_encoder", "precision"}


def test_knn_flags_reach_both_curves(classes, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(moco_v3, "knn_accuracy", lambda bank, there, queries, here, k, temperature:
                        seen.append((k, temperature)) or 0.5)
    assert main("--data", classes, "--recipe", "demo", *SMALL, "--batch-size", 40, "--steps", 4,
                "--knn-every", 1, "--knn-every-steps", 2, "--knn-k", 1, "--knn-temperature", 0.3,
                "--out", tmp_path) == 0
    assert [line["step"] for line in records(tmp_path, "knn_queue")] == [2, 4]
    assert len(seen) == 5 + 2 and {*seen} == {(1, 0.3)}  # epochs 0 to 4; of a queue of 40, k <= 2


def test_grad_checkpoint_computes_each_block_twice(monkeypatch, photos, tmp_path):
    passes = []
    forward = common.Block.forward
    monkeypatch.setattr(common.Block, "forward", lambda *args: passes.append(1) or forward(*args))
    for flag, count in (("--no-grad-checkpoint", 12), ("--grad-checkpoint", 18)):
        passes.clear()
        assert main("--data", photos, "--recipe", "demo", *SMALL, flag, "--steps", 1, "--out",
                    tmp_path / flag) == 0
        assert len(passes) == count  # 3 blocks, 2 views, 2 encoders; f_q's once more


@pytest.mark.parametrize("stage, file", [("embed", "features.pt"), ("export", "encoder.pt")])
def test_embed_and_export_heed_their_two_flags(stage, file, trained, classes, tmp_path):
    found = []
    for i, flags in enumerate(([], ["--init-encoder", "momentum_encoder"], ["--precision", "fp64"])):
        data = ["--data", classes, "--workers", 0] if stage == "embed" else []
        assert main(stage, "--init", trained / "last.pt", *data, *flags, "--out",
                    tmp_path / str(i)) == 0
        result = torch.load(tmp_path / str(i) / file)
        found.append(result["features"] if stage == "embed" else result["blocks.0.attn.qkv.weight"])
    assert not torch.equal(found[0], found[1]) and found[0].dtype == torch.float32
    assert found[2].dtype == torch.float64


def test_with_a_constant_momentum_of_0_the_momentum_encoder_is_the_encoder(classes, tmp_path):
    assert main("--data", classes, "--recipe", "demo", *SMALL, "--ema-momentum", 0, "--ema-schedule",
                "constant", "--steps", 3, "--warmup-epochs", 0.5, "--out", tmp_path) == 0
    state = weights(tmp_path)
    parameters = dict(moco_v3.MoCoV3(moco_v3.vit("mini", 32, 8), 16, 32).named_parameters())
    assert all(torch.equal(x, state[name.removeprefix("momentum_")]) for name, x in state.items()
               if name.startswith("momentum_") and name in parameters)
    assert [line["m"] for line in records(tmp_path)] == [0, 0, 0]


def test_what_timm_cannot_build_is_said(capsys):
    for flags, there in (("", True), ("--position none", False), ("--pooling mean", False),
                         ("--mlp-norm batch", False), ("--patch-projection weightnorm", False),
                         ("--stem conv --patch-projection learned", False)):
        args = moco_v3.parse_args(["--recipe", "imagenet", *flags.split()])
        moco_v3.check(args)
        moco_v3.timm_note(args)
        said = capsys.readouterr().out
        assert ("timm has no such ViT" in said) != there and ("num_heads=12" in said) == there


def test_vit_huge_has_patches_of_14():  # Table 2
    for flags, patch in ((["vit_huge"], 14), (["vit_huge", "--patch-size", "28"], 28), (["vit_large"], 16)):
        args = moco_v3.parse_args(["--recipe", "imagenet", "--arch", *flags])
        moco_v3.check(args)
        assert args.patch_size == patch


MISTAKES = {
    "image of no whole patches": ("--recipe demo --patch-size 5", "no whole number of patches of 5"),
    "heads that share nothing": ("--recipe demo --heads 5", "5 heads do not share 96 channels"),
    "width of a vit": ("--recipe demo --width 0.5", "take a smaller --arch"),
    "patches of a resnet": ("--recipe cifar-resnet --patch-size 4", "--patch-size 4 is for a ViT"),
    "frozen conv stem": ("--arch vit_small --stem conv --recipe imagenet",
                         "--stem conv has no patch projection to freeze"),
    "clipping what is frozen": ("--recipe demo --clip-patch-grad 0.1",
                                "give --patch-projection learned"),
    "an optimizer without its lr": ("--recipe imagenet --optimizer lamb", "takes a --base-lr of its own"),
    "sgd for pre-training": ("--recipe demo --optimizer sgd --base-lr 1", "takes adamw, lars or lamb"),
    "lars for the linear stage": ("linear --init {r}/last.pt --optimizer lars --base-lr 1",
                                  "takes sgd"),
    "recipe of another family": ("--recipe imagenet --arch resnet50",
                                 "give --recipe imagenet-r50-100 or imagenet-r50-300"),
    "checkpointing and ViT-BN": ("--recipe demo --grad-checkpoint --mlp-norm batch", "running statistics"),
    "other heads than the run's": ("embed --init {r}/last.pt --heads 2", "--heads 2, but"),
    "another architecture than the run's": ("embed --init {r}/last.pt --arch vit_tiny",
                                            "--arch vit_tiny, but"),
    "no momentum encoder": ("export --init {r}/encoder.pt --init-encoder momentum_encoder", "holds no momentum_encoder"),
    "the demo with a resnet": ("--recipe demo --arch resnet10", "give --recipe cifar-resnet"),
    "a head without a hidden layer": ("--recipe demo --hidden-dim 0", "without a hidden layer"),
    "the momentum of another optimizer": ("--recipe demo --momentum 0.99", "m is --ema-momentum"),
    "no predictor with an output": ("--recipe demo --predictor none --no-predictor-output-bn",
                                    "would change nothing here"),
    "unknown position": ("--recipe demo --position circular", "invalid choice: 'circular'"),
    "momentum above 1": ("--recipe demo --ema-momentum 1.5", "at most 1"),
    "pretrain's field in export": ("export --init {r}/last.pt --epochs 3", "no setting of the stage export"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence_and_exit_code_2(mistake, trained, tmp_path, capsys):
    flags, sentence = MISTAKES[mistake]
    out = [] if "--out" in flags else ["--out", tmp_path / "out"]
    assert main(*flags.format(r=trained).split(), *out) == 2
    assert_one_sentence(capsys, sentence)
