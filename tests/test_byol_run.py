"""byol.py as a program, in short: ranks, kill and resume, monitors, labels, stages, mistakes."""

import os

import numpy as np
import pytest
import torch
from conftest import (
    assert_close_runs, assert_one_sentence, assert_same_weights, kill_at_step, losses, program,
    records, run, weights, write_images)
from helpers import same

import byol

SMALL = ["--recipe", "demo", "--width", "0.125", "--image-size", "16", "--dim", "8", "--hidden-dim",
         "16", "--batch-size", "16", "--workers", "0", "--knn-every", "0", "--precision", "fp32",
         "--log-every", "1"]
TUNE = ["--workers", "0", "--precision", "fp32", "--batch-size", "2", "--epochs", "2"]
main = program(byol)


def differ(a, b):
    """Of two networks' weights."""
    return a.keys() != b.keys() or not same(a.values(), b.values())


def assert_each_flag_counts(result, effects):
    """effects: flags in common -> the flags of which each, beside them, makes other weights."""
    for common, variants in effects.items():
        plain = result(common)
        assert not differ(plain, result(common))
        for flags in variants:
            assert differ(plain, result(f"{common} {flags}")), flags


@pytest.fixture(scope="module")
def trained(classes, tmp_path_factory):
    """Two epochs of three steps on 48 images of three classes, 16 px."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main("--data", classes, *SMALL, "--epochs", 2, "--warmup-epochs", 0.5, "--knn-every", 1,
                "--out", out) == 0
    return out


def test_two_processes_are_the_same_run_as_one(classes, tmp_path):
    args = ["--data", classes, *SMALL, "--precision", "fp64", "--steps", "4", "--warmup-epochs", "0.5"]
    assert main(*args, "--out", tmp_path / "one") == 0
    run("byol.py", *args, "--out", tmp_path / "two", processes=2)
    assert_close_runs(tmp_path / "one", tmp_path / "two", 4)


def test_a_killed_run_ends_with_the_same_bits(classes, tmp_path):
    args = ["--data", classes, *SMALL, "--epochs", "12"]
    assert 0 < kill_at_step(10, "byol.py", *args, out=tmp_path / "killed", fork=True) < 36
    for name in ("killed", "whole"):
        assert main(*args, "--out", tmp_path / name) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 36
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    assert [line["tau"] for line in records(tmp_path / "whole")] == [
        byol.ema_tau(k, 36, byol.PRETRAIN["base_tau"][-1] ** (16 / 100)) for k in range(36)]


def test_the_target_is_in_the_checkpoint_and_not_in_the_optimizer(trained):
    checkpoint = torch.load(trained / "last.pt")
    names = {name.split(".")[0] for name in checkpoint["model"]}
    assert names == {"encoder", "projector", "predictor", "target_encoder", "target_projector"}
    args = byol.parse_args([*SMALL])
    model = byol.BYOL(byol.build_encoder(args), args.dim, args.hidden_dim, args.output_bn)
    trainable = sum(p.requires_grad for p in model.parameters())
    assert len(checkpoint["optimizer"]["state"]) == trainable


def test_the_monitors_are_those_of_the_log(trained):
    first, *_, last = records(trained)
    assert first["target_distance"] == 0 < last["target_distance"]  # step 0 has lr 0
    assert first["tau"] < last["tau"] < 1 and {"std", "rank", "z_norm"} <= last.keys()
    assert [line["epoch"] for line in records(trained, "knn")] == [0, 1, 2]


def test_the_log_gives_the_distance_of_the_networks_after_the_step(trained):
    model = weights(trained)
    parameters = dict(byol.BYOL(byol.resnet(10, 0.125, small_images=True), 8, 16, True).named_parameters())
    pairs = [(model[name.removeprefix("target_")], model[name]) for name in parameters
             if name.startswith("target_")]
    ahead = sum((a - b).square().sum() for a, b in pairs).sqrt()
    length = sum(a.square().sum() for a, b in pairs).sqrt()
    assert records(trained)[-1]["target_distance"] == pytest.approx((ahead / length).item(), rel=1e-5)


def test_a_fixed_target_stays_and_one_without_memory_follows_at_once(classes, tmp_path):
    for tau in (0, 1):
        assert main("--data", classes, *SMALL, "--warmup-epochs", 0.5, "--base-tau", tau,
                    "--tau-schedule", "constant", "--steps", 3, "--out", tmp_path / str(tau)) == 0
        distances = [line["target_distance"] for line in records(tmp_path / str(tau))]
        assert {line["tau"] for line in records(tmp_path / str(tau))} == {tau}
        assert (max(distances) == 0) == (tau == 0)
    assert distances[0] == 0 < distances[1] < distances[2]  # tau 1: it is left behind


def test_with_the_online_network_as_target_the_log_has_no_tau(classes, tmp_path, capsys):
    assert main("--data", classes, *SMALL, "--target", "online", "--beta", 1, "--steps", 1, "--out",
                tmp_path) == 0
    assert not {"tau", "target_distance"} & records(tmp_path)[0].keys()
    # All cosines 0: 2 and 2 alpha log(16 + 15) a direction.
    said = capsys.readouterr().out
    assert "loss: about 5.37 by chance\n" in said and "tau" not in said.split("kNN")[0]


def test_tau_follows_the_batch_size_and_says_so(classes, tmp_path, capsys):
    assert main("--data", classes, *SMALL, "--steps", 1, "--out", tmp_path / "a") == 0
    base = byol.PRETRAIN["base_tau"][-1]
    assert "(the recipe's to the power of 16 / 100)" in capsys.readouterr().out
    assert records(tmp_path / "a")[0]["tau"] == pytest.approx(base ** 0.16)
    assert main("--data", classes, *SMALL, "--base-tau", 0.5, "--steps", 1, "--out", tmp_path / "b") == 0
    assert "power" not in capsys.readouterr().out and records(tmp_path / "b")[0]["tau"] == 0.5


def test_every_ablation_trains(classes, tmp_path):
    for i, flags in enumerate((
            "--predictor none", "--no-output-bn --base-tau 0 --predictor-lr-mult 10",
            "--beta 1", "--beta 0.5 --alpha 0.3 --target online", "--jitter-prob 0 --gray-prob 0",
            "--jitter-prob 0 --gray-prob 0 --flip-prob 0 --solarize-prob 0 0.5 --blur-prob 1 0",
            "--optimizer sgd --base-lr 0.1 --weight-decay 5e-4", "--arch vit_mini --patch-size 8 "
            "--optimizer adamw --base-lr 1e-3 --weight-decay 0.03")):
        small = SMALL[:2] + SMALL[4:] if "vit" in flags else SMALL
        out = tmp_path / str(i)
        assert main("--data", classes, *small, *flags.split(), "--steps", 2, "--warmup-epochs", 0.5,
                    "--out", out) == 0, flags
        assert len(losses(out)) == 2 and losses(out)[0] != losses(out)[1]


VIT = "--arch vit_mini --patch-size 8 --optimizer adamw --base-lr 1e-3 --weight-decay 0.03"
EFFECTS = {  # what is common to two runs: the flags, each by itself, that must tell them apart
    "": ("--arch resnet18", "--width 0.25", "--no-small-images", "--zero-init-residual",
         "--hidden-dim 24", "--dim 4", "--no-output-bn", "--predictor none", "--target online",
         "--optimizer sgd --base-lr 2 --weight-decay 1e-6", "--epochs 4", "--batch-size 24",
         "--base-lr 1", "--warmup-epochs 0.5", "--momentum 0.5", "--weight-decay 0.1",
         "--base-tau 0.5", "--tau-schedule constant", "--predictor-lr-mult 3", "--precision fp64",
         "--image-size 24", "--crop-min 0.9", "--flip-prob 0", "--jitter 0 0 0 0",
         "--jitter-prob 0", "--gray-prob 1", "--solarize-prob 0 1", "--mean 0 0 0", "--std 1 1 1",
         "--beta 1", "--seed 1"),
    "--beta 1": ("--alpha 0.3",), "--image-size 32": ("--blur-prob 0 1",),  # one tap at 16 px
    VIT: ("--patch-size 4", "--heads 2", "--patch-projection learned")}


def test_every_flag_of_pretraining_changes_the_run(classes, tmp_path):
    def result(flags):
        out = tmp_path / f"{len([*tmp_path.iterdir()])}"
        small = SMALL[:2] + SMALL[4:] if "vit" in flags else SMALL
        assert main("--data", classes, *small, "--warmup-epochs", 0.25, *flags.split(), "--steps", 2,
                    "--out", out) == 0, flags
        return weights(out)

    assert_each_flag_counts(result, EFFECTS)


def test_the_monitors_take_their_flags_and_the_online_projections(classes, tmp_path, monkeypatch):
    asked, seen, plain = [], [], byol.feature_std
    monkeypatch.setattr(byol, "knn_accuracy", lambda bank, there, queries, here, k, temperature:
                        asked.append((k, temperature)) or 0.5)
    monkeypatch.setattr(byol, "feature_std", lambda z: seen.append(z) or plain(z))
    assert main("--data", classes, *SMALL, "--knn-every", 1, "--knn-k", 7, "--knn-temperature", 0.3,
                "--steps", 1, "--out", tmp_path) == 0
    assert asked == [(7, 0.3)]
    line, (z,) = records(tmp_path)[0], seen
    assert z.shape == (16, 8) and line["std"] == plain(z)
    assert line["rank"] == byol.effective_rank(z)
    assert line["z_norm"] == pytest.approx(sum(row.norm().item() for row in z) / 16, rel=1e-6)


def test_without_flips_every_crop_is_as_the_image_was():
    u = torch.rand(200, byol.CROP_DRAWS, dtype=torch.float64)
    for prob, least, most in ((0.0, 0, 0), (1.0, 200, 200), (0.5, 60, 140)):
        assert least <= byol.crop_boxes(u, 32, 32, 0.08, prob)[4].sum() <= most
    images = byol.Images(np.array(["a"]), pixels=torch.arange(3 * 64).byte().view(1, 3, 8, 8))
    args = byol.parse_args(["--recipe", "demo", "--image-size", "8"])
    args.device, args.dtype = torch.device("cpu"), torch.float32
    mirrored = []
    for args.flip_prob in (0.0, 1.0):
        draws = torch.full((1, 1, byol.CROP_DRAWS), 0.5)
        mirrored.append(next(byol.load(args, images, [(torch.tensor([0]), draws)], 1.0))[0])
    assert torch.equal(mirrored[0].flip(3), mirrored[1]) and not torch.equal(*mirrored)


# ---------------------------------------------------------------------------------- labels, stages


def labelled(classes, labels, *flags):
    args = byol.parse_args(["finetune", "--init", "none", "--data", str(classes), "--labels",
                            str(labels), "--batch-size", "1", *flags])
    args.device, args.dtype, args.workers = torch.device("cpu"), torch.float32, 0
    return byol.labelled(byol.load_data(args, labels=True).train, args)


def test_a_share_of_the_labels_is_the_same_of_every_class_and_of_every_run(classes):
    some, more = labelled(classes, 0.25), labelled(classes, 0.5)
    assert some.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4  # 16 of each class
    assert {*some.names} < {*more.names} and len(more) == 24
    assert [*labelled(classes, 0.25).names] == [*some.names]
    assert [*labelled(classes, 0.25, "--seed", "1").names] != [*some.names]
    assert len(labelled(classes, 0.01)) == 3 and len(labelled(classes, 1.0)) == 48  # 1 at least


def test_what_the_classes_do_not_share_evenly_goes_to_some_of_them(classes):  # as in SimCLR's lists
    counts = [labelled(classes, 0.27, "--seed", str(seed)).labels.bincount().tolist() for seed in range(9)]
    assert all(sorted(count) == [4, 4, 5] for count in counts)  # 13 of 48
    assert len({count.index(5) for count in counts}) > 1


def test_large_and_small_classes_give_as_many(tmp_path):
    for name, n in (("a", 3), ("b", 9)):
        write_images(tmp_path / "train" / name, n, size=(16, 16), kind="png")
        write_images(tmp_path / "val" / name, 1, size=(16, 16), kind="png")
    assert labelled(tmp_path, 0.5).labels.tolist() == [0] * 3 + [1] * 3


def test_pixels_names_and_labels_stay_together(classes):
    whole, some = labelled(classes, "1"), labelled(classes, 0.25)
    place = {name: i for i, name in enumerate(whole.names)}
    for name, label, pixels in zip(some.names, some.labels, some.pixels):
        assert label == whole.labels[place[name]] and torch.equal(pixels, whole.pixels[place[name]])


@pytest.mark.parametrize("form", ["path", "name"])  # ours, and that of SimCLR's lists
def test_a_list_of_images_is_read_back(form, classes, tmp_path):
    names = [name.decode() for name in labelled(classes, 0.25).names]
    lines = [name if form == "path" else name.split("/")[1] for name in reversed(names)]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n\n")
    images = labelled(classes, tmp_path / "list.txt")
    assert [name.decode() for name in images.names] == names[::-1]
    assert images.labels.tolist() == [2] * 4 + [1] * 4 + [0] * 4


def test_a_file_name_must_stand_for_one_image_and_counts_once(tmp_path):
    for name in "ab":
        write_images(tmp_path / "train" / name, 3, size=(16, 16), kind="png")
        write_images(tmp_path / "val" / name, 1, size=(16, 16), kind="png")
    listed = tmp_path / "list.txt"
    listed.write_text("a/00_000.png\nb/00_001.png\na/00_000.png\n")
    assert [name.decode() for name in labelled(tmp_path, listed).names] == ["a/00_000.png",
                                                                            "b/00_001.png"]
    listed.write_text("00_000.png\n")  # both classes have one
    with pytest.raises(byol.UserError, match="more than once among the training images"):
        labelled(tmp_path, listed)


def test_a_subset_counts_its_own_unreadable_images(classes):  # 1 % of 12, not of 48
    assert labelled(classes, 0.25).total == 12


def test_a_name_that_is_not_utf8_is_written_and_read_back(tmp_path):
    for name in "ab":
        for split in ("train", "val"):
            write_images(tmp_path / split / name, 2, size=(16, 16), kind="png")
        folder = os.fsencode(tmp_path / "train" / name)
        os.rename(os.path.join(folder, b"00_000.png"), os.path.join(folder, b"\xff.png"))
    args = ["finetune", "--init", "none", "--recipe", "demo", "--width", 0.125, "--data", tmp_path,
            *TUNE, "--image-size", 16]
    assert main(*args, "--labels", 0.5, "--seed", 1, "--out", tmp_path / "one") == 0
    for labels in (tmp_path / "one" / "labels.txt", ".50"):  # the same images: the same run
        assert main(*args, "--labels", labels, "--seed", 1, "--out", tmp_path / "one") == 0


def test_a_vit_is_finetuned_resumed_and_evaluated(classes, tmp_path):
    vit = ["--recipe", "imagenet-vit", "--arch", "vit_mini", "--image-size", 16, "--patch-size", 8]
    args = ["finetune", "--init", "none", "--data", classes, *vit, *TUNE, "--base-lr", 1]
    for steps in (4, 5):
        assert main(*args, "--labels", 0.25, "--steps", steps, "--out", tmp_path / "vit") == 0
    encoder = torch.load(tmp_path / "vit" / "encoder.pt")
    torch.manual_seed(0)
    built = byol.build_encoder(byol.parse_args([*map(str, vit), "--heads", "3"])).state_dict()
    for name, x in encoder.items():  # table and projection stay as build_encoder froze them
        fixed = name == "pos_embed" or name.startswith("patch_embed.")
        assert torch.equal(x, built[name]) == fixed or name.endswith("bias"), name
    assert main("embed", "--init", tmp_path / "vit" / "last.pt", "--data", classes, "--workers", 0,
                "--out", tmp_path / "embed") == 0


def test_only_bottlenecks_start_as_identities():
    for arch, expected in (("resnet18", False), ("resnet50", True)):
        for flags, value in (([], expected), (["--zero-init-residual"], True)):
            args = byol.parse_args(["--recipe", "cifar", "--arch", arch, *flags])
            byol.check(args)
            assert args.zero_init_residual == value


def test_finetuning_trains_the_whole_network_and_linear_evaluation_its_classifier(
        trained, classes, tmp_path):
    before = {name.removeprefix("encoder."): x for name, x in weights(trained).items()
              if name.startswith("encoder.")}
    for stage in ("linear", "finetune"):
        out = tmp_path / stage
        assert main(stage, "--init", trained / "last.pt", "--data", classes, *TUNE, "--labels", 0.25,
                    "--out", out) == 0
        after = torch.load(out / "encoder.pt")
        changed = {name for name, x in after.items() if not torch.equal(x, before[name])}
        assert changed == (set() if stage == "linear" else set(after))  # buffers too
        assert len((out / "labels.txt").read_text().splitlines()) == 12
        assert len(records(out, "top1")) == 3 and weights(out)["fc.weight"].abs().max() > 0
    # The list written is the one that makes the same run.
    assert main("finetune", "--init", trained / "last.pt", "--data", classes, *TUNE, "--labels",
                tmp_path / "finetune" / "labels.txt", "--out", tmp_path / "again") == 0
    assert_same_weights(tmp_path / "again", tmp_path / "finetune")


def test_finetuning_from_scratch_starts_at_random_and_evaluates_when_asked(classes, tmp_path):
    assert main("finetune", "--init", "none", "--data", classes, *TUNE, "--recipe", "demo", "--width",
                0.125, "--image-size", 16, "--epochs", 3, "--knn-every", 2, "--out", tmp_path) == 0
    assert [line["epoch"] for line in records(tmp_path, "top1")] == [0, 2, 3]
    assert records(tmp_path, "config")[0]["config"]["init"] is None
    lr = [line["lr"] for line in records(tmp_path)]
    assert lr[0] == byol.FINETUNE["base_lr"][-1] * 2 / 256  # a cosine from the first step on


def test_finetuning_resumes_to_the_same_bits_and_refuses_other_labels(trained, classes, tmp_path):
    args = ["finetune", "--init", trained / "last.pt", "--data", classes, *TUNE]
    for steps in (3, 0):
        assert main(*args, "--labels", 0.25, "--steps", steps, "--out", tmp_path / "paused") == 0
    assert main(*args, "--labels", 0.25, "--out", tmp_path / "whole") == 0
    assert_same_weights(tmp_path / "paused", tmp_path / "whole")
    assert main(*args, "--labels", 0.5, "--out", tmp_path / "whole") == 2


TUNED = {  # as EFFECTS
    "--init {last}": ("--base-lr 0.3", "--epochs 3", "--batch-size 4", "--momentum 0",
                      "--weight-decay 0.5", "--crop-min 0.2", "--precision fp64", "--labels 0.25",
                      "--init-encoder target_encoder", "--seed 1"),
    "--init none --recipe demo --width 0.125 --image-size 16": (
        "--arch resnet18", "--width 0.25", "--no-small-images", "--zero-init-residual",
        "--image-size 24", "--mean 0 0 0", "--std 1 1 1")}


@pytest.mark.parametrize("stage", ["linear", "finetune"])
def test_every_flag_of_the_later_stages_changes_the_run(stage, trained, classes, tmp_path):
    def result(flags):
        out = tmp_path / f"{len([*tmp_path.iterdir()])}"
        assert main(stage, "--data", classes, *TUNE, "--labels", 1, *flags.format(
            last=trained / "last.pt").split(), "--steps", 2, "--out", out) == 0, flags
        return weights(out)

    assert_each_flag_counts(result, TUNED)


@pytest.mark.parametrize("stage", ["linear", "finetune"])
def test_later_stages_train_by_nesterov_and_half_a_cosine(stage, classes, tmp_path, monkeypatch):
    def fit(args, run, data, model, optimizer, step, monitor, evaluate, views):
        group, = optimizer.param_groups  # App. C.1, and the authors' code for the cosine
        assert type(optimizer) is torch.optim.SGD and group["nesterov"] and views == 1
        assert (group["momentum"], group["weight_decay"]) == (0.9, 0)
        part = model.fc if stage == "linear" else model
        assert {*map(id, group["params"])} == {*map(id, part.parameters())}
        batch = next(byol.batches(args, data.train, 0, 1, 1))
        for done, share in ((0, 1), (0.25, (1 + 0.5 ** 0.5) / 2), (0.5, 0.5), (1, 0)):
            step(batch, done * args.epochs)
            assert group["lr"] == pytest.approx(3 * 8 / 256 * share, abs=1e-12)

    monkeypatch.setattr(byol, "fit", fit)
    assert main(stage, "--init", "none", "--data", classes, *TUNE, "--labels", 1, "--recipe", "demo",
                "--width", 0.125, "--image-size", 16, "--batch-size", 8, "--base-lr", 3, "--out",
                tmp_path) == 0


@pytest.mark.parametrize("stage", ["linear", "finetune"])
def test_top1_is_the_share_of_val_images_that_the_saved_network_gets_right(
        stage, trained, classes, tmp_path):  # users.md, B21, B22: 12 images, in eval mode
    assert main(stage, "--init", trained / "last.pt", "--data", classes, *TUNE, "--labels", 1,
                "--base-lr", 3, "--batch-size", 5, "--out", tmp_path) == 0
    args = byol.parse_args([*SMALL, "--data", str(classes)])
    args.device, args.dtype = torch.device("cpu"), torch.float32
    val = byol.load_data(args, labels=True).val
    model = byol.Classifier(byol.build_encoder(args), 3, frozen=True).eval()
    model.load_state_dict(weights(tmp_path))
    x = (val.pixels / 255 - 0.5) / 0.25  # 16 px as they are
    with torch.no_grad():
        right = model(x).argmax(1) == val.labels
    assert records(tmp_path, "top1")[-1]["top1"] == right.sum().item() / 12
    assert 0 < right.sum() < 12


def test_the_target_encoder_can_be_evaluated(trained, photos, tmp_path):
    found = []
    for which in ("encoder", "target_encoder"):
        assert main("embed", "--init", trained / "last.pt", "--init-encoder", which, "--data", photos,
                    "--workers", 0, "--out", tmp_path / which) == 0
        found.append(torch.load(tmp_path / which / "features.pt")["features"])
    assert found[0].shape == (40, 64) and not torch.equal(*found)


def test_pretraining_from_an_encoder_alone_starts_the_target_as_its_copy(trained, classes, tmp_path):
    assert main("--data", classes, *SMALL, "--warmup-epochs", 0.5, "--steps", 1, "--init",
                trained / "encoder.pt", "--out", tmp_path) == 0
    assert records(tmp_path)[0]["target_distance"] == 0  # the first step has lr 0


MISTAKES = {
    "share above 1": ("finetune --init none --labels 2", "--labels 2 makes no sense"),
    "share of 0": ("finetune --init none --labels 0", "--labels 0 makes no sense"),
    "no such list": ("finetune --init none --labels nothing.txt", "neither a share such as 0.01"),
    "a list of other images": ("finetune --init none --labels {r}/log.jsonl", "not among the training"),
    "fewer labels than the batch": ("finetune --init none --labels 0.01 --batch-size 500",
                                    "more than the 40 images of --labels 0.01"),
    "parts of a fine-tuning batch": ("finetune --init none --accumulate 2", "would change the method"),
    "no init at all": ("finetune", "or none for random weights"),
    "labels in pre-training": ("--labels 0.1", "no setting of the stage pretrain"),
    "lars for a vit": ("--arch vit_mini", "give --optimizer adamw"),
    "an optimizer without its lr": ("--optimizer adamw", "a --base-lr and a --weight-decay of its own"),
    "width of a vit": ("--recipe imagenet-vit --width 0.5", "--width 0.5 is for a ResNet"),
    "patches of a resnet": ("--patch-size 4", "--patch-size 4 is for a ViT"),
    "image of no whole patches": ("--recipe imagenet-vit --image-size 30", "no whole number of patches"),
    "an encoder of no file": ("finetune --init none --init-encoder target_encoder", "--init is none"),
    "the list's place taken": ("finetune --init none --labels 0.1 --out {r}/taken",
                               "could not write"),
    "lr of no predictor": ("--predictor none --predictor-lr-mult 3", "would change nothing here"),
    "tau of no target": ("--target online --base-tau 0.5", "would change nothing here"),
    "temperature of no negatives": ("--alpha 0.2", "would change nothing here"),
    "tau above 1": ("--base-tau 1.5", "at most 1"),
    "too narrow": ("--width 0.0625", "0.125 is the least"),
    "a head without a hidden layer": ("--hidden-dim 0", "without a hidden layer"),
    "another method's official file": ("linear --init {r}/official.pth", "BYOL's are pickles of JAX"),
    "recipe of another family": ("--recipe imagenet --arch vit_small", "give --recipe imagenet-vit"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence_and_exit_code_2(mistake, trained, tmp_path, capsys):
    flags, sentence = MISTAKES[mistake]
    if "official" in flags:
        torch.save({"arch": "resnet50", "state_dict": {}}, trained / "official.pth")
    (trained / "taken" / "labels.txt").mkdir(parents=True, exist_ok=True)
    out = [] if "--out" in flags else ["--out", tmp_path / "out"]
    assert main(*flags.format(r=trained).split(), *out) == 2
    assert_one_sentence(capsys, sentence)
