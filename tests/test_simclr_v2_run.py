"""simclr_v2.py as a program, in short: ranks, kill and resume, its three stages, mistakes."""

import math
import time

import pytest
import torch
from conftest import (
    assert_close_runs, assert_one_sentence, assert_same_weights, kill_at_step, losses, program,
    records, run, weights)
from helpers import same

import simclr_v2

SMALL = ["--recipe", "demo", "--width", "0.125", "--image-size", "16", "--dim", "8", "--batch-size", "16",
         "--workers", "0", "--knn-every", "0", "--precision", "fp32", "--log-every", "1",
         "--warmup-epochs", "0.5"]
TUNE = ["--workers", "0", "--precision", "fp32", "--recipe", "demo", "--batch-size", "4", "--epochs", "2",
        "--log-every", "1"]
FIRST = ["--workers", "0", "--precision", "fp32", "--steps", "1", "--fresh", "--knn-every", "0"]
main = program(simclr_v2)


@pytest.fixture(scope="module")
def trained(classes, tmp_path_factory):
    """Two epochs of three steps on 48 images of three classes, 16 px."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main("--data", classes, *SMALL, "--epochs", 2, "--knn-every", 1, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def tuned(trained, classes, tmp_path_factory):
    """That network, fine-tuned from layer 1 with a quarter of the labels: 12 images, 4 of a class."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    assert main("finetune", "--init", trained / "last.pt", "--data", classes, *TUNE, "--labels", 0.25,
                "--out", out) == 0
    return out


@pytest.mark.parametrize("flags", [[], ["--queue", "64"]], ids=["batch", "queue"])
def test_two_processes_are_the_same_run_as_one(flags, classes, tmp_path):
    args = ["--data", classes, *SMALL, *flags, "--precision", "fp64", "--steps", "3"]
    assert main(*args, "--out", tmp_path / "one") == 0
    run("simclr_v2.py", *args, "--out", tmp_path / "two", processes=2)
    assert_close_runs(tmp_path / "one", tmp_path / "two", 3, "contrast_top1", "online_train_top1")


def test_a_killed_run_ends_with_the_same_bits(classes, tmp_path):
    args = ["--data", classes, *SMALL, "--epochs", "12", "--queue", "32"]
    assert 0 < kill_at_step(10, "simclr_v2.py", *args, out=tmp_path / "killed", fork=True) < 36
    for name in ("killed", "whole"):
        assert main(*args, "--out", tmp_path / name) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 36
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")


def test_the_log_has_the_monitors_and_says_the_numbers_of_steps(classes, tmp_path, capsys):
    assert main("--data", classes, *SMALL, "--batch-size", 14, "--epochs", 2, "--knn-every", 1, "--out",
                tmp_path) == 0
    said = capsys.readouterr().out
    assert "6 steps (the authors' code: 7, for" in said  # 48 // 14 = 3 an epoch; 96 // 14 + 1
    assert f"about {2 * math.log(27):.2f} by chance, 26 negatives" in said
    last = records(tmp_path)[-1]
    assert {"std", "rank", "contrast_top1", "online_train_top1"} <= last.keys()
    first, *_, end = records(tmp_path, "knn")
    assert "online_top1" not in first and 0 <= end["online_top1"] <= 1


def test_without_labels_there_is_no_online_classifier(photos, tmp_path):
    assert main("--data", photos, *SMALL, "--steps", 1, "--out", tmp_path) == 0
    assert not any("online" in name for name in (*records(tmp_path)[0], *weights(tmp_path)))


def test_every_choice_trains(classes, tmp_path):
    for i, flags in enumerate((
            "--head-layers 0", "--head-layers 1", "--head-layers 4", "--queue 64", "--recipe imagenet-v1 "
            "--arch resnet10 --small-images", "--optimizer sgd --base-lr 0.1", "--lr-rule linear",
            "--arch resnet50 --sk --width 0.125", "--arch vit_mini --patch-size 8 --optimizer adamw "
            "--base-lr 1e-3")):
        small = SMALL[:2] + SMALL[4:] if "vit" in flags else SMALL
        small = small[:-2] if "head-layers 0" not in flags else SMALL[:6] + SMALL[8:]  # --dim
        out = tmp_path / str(i)
        assert main("--data", classes, *small, "--warmup-epochs", 0.5, *flags.split(), "--steps", 2,
                    "--out", out) == 0, flags
        assert len(losses(out)) == 2 and losses(out)[0] != losses(out)[1]


def test_a_pretrained_network_is_trained_on_with_a_new_online_classifier(trained, classes, tmp_path):
    again = tmp_path / "again"  # the first step's lr is 0
    assert main("--data", classes, *SMALL, "--init", trained / "last.pt", "--steps", 1, "--out",
                again) == 0
    before, after = weights(trained), weights(again)
    for name in ("encoder.conv1.weight", "projector.2.0.weight"):
        assert torch.equal(before[name], after[name])
    assert not torch.equal(before["online.weight"], after["online.weight"])


def test_an_encoder_alone_starts_the_momentum_encoder_as_its_copy(trained, classes, tmp_path):
    assert main("--data", classes, *SMALL, "--queue", 32, "--steps", 1, "--init", trained / "encoder.pt",
                "--out", tmp_path) == 0
    state = weights(tmp_path)
    for name in ("conv1.weight", "layer4.0.bn2.weight"):
        assert torch.equal(state[f"key_encoder.{name}"], state[f"encoder.{name}"])


# ------------------------------------------------------------------------------- stage 2: fine-tuning


@pytest.mark.parametrize("layer", range(4))
def test_finetuning_from_a_layer_keeps_what_is_below_it_and_trains_all_of_it(
        layer, trained, classes, tmp_path):
    args = ["finetune", "--init", trained / "last.pt", "--data", classes, *TUNE, "--labels", 0.25,
            "--from-layer", layer]
    assert main(*args, "--out", tmp_path) == 0
    before, after = weights(trained), weights(tmp_path)
    kept = {name.split(".")[1] for name in after if name.startswith("projector.")}
    assert kept == {str(i) for i in range(layer)}
    assert after["fc.weight"].shape == (3, {0: 64, 3: 8}.get(layer, 64))
    for name, x in after.items():  # buffers too; but the last layer's bias is fixed
        if not name.startswith("fc."):
            assert torch.equal(x, before[name]) == (name == "projector.2.1.bias"), name
    assert losses(tmp_path)[0] == pytest.approx(math.log(3), abs=1e-6)  # a new classifier is 0
    assert len((tmp_path / "labels.txt").read_text().splitlines()) == 12


def test_finetuning_resumes_to_the_same_bits_and_takes_its_list_back(trained, tuned, classes, tmp_path):
    args = ["finetune", "--init", trained / "last.pt", "--data", classes, *TUNE]
    for steps in (3, 0):
        assert main(*args, "--labels", 0.25, "--steps", steps, "--out", tmp_path / "paused") == 0
    assert main(*args, "--labels", tuned / "labels.txt", "--out", tmp_path / "list") == 0
    for name in ("paused", "list"):
        assert_same_weights(tmp_path / name, tuned)
    assert main(*args, "--labels", 0.5, "--out", tmp_path / "paused") == 2


def test_the_share_of_labels_settles_epochs_and_layer_also_when_a_file_lists_them(
        trained, classes, tmp_path, capsys):
    args = ["finetune", "--init", trained / "last.pt", "--data", classes, *FIRST, "--batch-size", 2]
    names = sorted(str(path.relative_to(classes / "train")) for path in (classes / "train").rglob("*.png"))
    (tmp_path / "few").write_text("ant/" + names[0].split("/")[1] + "\n" + "\n".join(names[20:23]))
    (tmp_path / "all").write_text("\n".join(names))
    for labels, sentence in ((0.02, "from layer 1 of the head, 60 epochs of 3 "),
                             (0.1, "from layer 1 of the head, 30 epochs of 5 "),
                             (1.0, "from layer 0 of the head, 30 epochs of 48 "),
                             (tmp_path / "few", "from layer 1 of the head, 30 epochs of 4 "),
                             (tmp_path / "all", "from layer 0 of the head, 30 epochs of 48 ")):
        assert main(*args, "--labels", labels, "--out", tmp_path / "o") == 0
        assert sentence in capsys.readouterr().out, labels


def test_from_scratch_there_is_no_head_unless_asked_for(classes, tmp_path, capsys):
    args = ["finetune", "--init", "none", "--width", 0.125, "--data", classes, *TUNE,
            "--image-size", 16, "--labels", 0.25]
    assert main(*args, "--out", tmp_path / "a") == 0
    assert "from layer 0 of the head" in capsys.readouterr().out
    assert main(*args, "--from-layer", 2, "--out", tmp_path / "b") == 0
    assert not any("projector" in name for name in weights(tmp_path / "a"))
    assert sum("projector" in name for name in weights(tmp_path / "b")) == 12


def test_linear_evaluation_changes_the_classifier_alone(trained, classes, tmp_path):
    assert main("linear", "--init", trained / "last.pt", "--data", classes, *TUNE, "--from-layer", 1,
                "--out", tmp_path) == 0
    before, after = weights(trained), weights(tmp_path)
    assert all(torch.equal(x, before[name]) for name, x in after.items() if not name.startswith("fc."))
    assert after["fc.weight"].abs().max() > 0 and len(records(tmp_path, "top1")) == 3


def test_top1_is_an_exact_count(trained, classes, tmp_path):
    args = ["--init", trained / "last.pt", "--data", classes, "--workers", 0, "--precision", "fp32"]
    assert main("linear", *args, "--epochs", 2, "--batch-size", 4, "--out", tmp_path / "run") == 0
    assert main("embed", *args, "--out", tmp_path / "e") == 0
    result, state = torch.load(tmp_path / "e" / "features.pt"), weights(tmp_path / "run")
    guess = (result["features"][-12:] @ state["fc.weight"].T + state["fc.bias"]).argmax(1)
    right = sum(a == b for a, b in zip(guess.tolist(), result["labels"][-12:], strict=True))
    assert records(tmp_path / "run", "top1")[-1]["top1"] == right / 12


@pytest.mark.parametrize("stage", ["finetune", "distill"])
def test_the_network_is_evaluated_every_so_many_epochs(stage, trained, tuned, classes, tmp_path):
    source = ["--teacher", tuned] if stage == "distill" else ["--init", trained / "last.pt",
                                                              "--labels", 0.25]
    for every, epochs in ((2, [0, 2, 3]), (0, [3])):
        assert main(stage, *source, "--data", classes, *TUNE, "--epochs", 3, "--knn-every", every,
                    "--out", tmp_path / str(every)) == 0
        assert [x["epoch"] for x in records(tmp_path / str(every), "top1")] == epochs


# ------------------------------------------------------------------------------ stage 3: distillation


def test_a_student_learns_from_the_teacher_without_labels(tuned, classes, photos, tmp_path, capsys):
    before = weights(tuned)
    for data, out in ((classes, "labelled"), (photos, "unlabelled")):
        assert main("distill", "--teacher", tuned, "--data", data, *TUNE, "--out", tmp_path / out) == 0
        for line in records(tmp_path / out):
            assert line["loss"] >= line["floor"] - 1e-6  # the teacher's entropy
    assert "at temperature 0.1" in capsys.readouterr().out  # self-distillation
    assert all(torch.equal(x, before[name]) for name, x in weights(tuned).items())
    first, *_, last = records(tmp_path / "labelled", "top1")
    assert "teacher_top1" in first and "teacher_top1" not in last
    assert first["teacher_top1"] == records(tuned, "top1")[-1]["top1"]
    assert records(tmp_path / "unlabelled", "top1") == []
    state = weights(tmp_path / "labelled")
    assert not any(name.startswith("projector.") for name in state)  # the head is left out
    assert state["encoder.conv1.weight"].shape == before["encoder.conv1.weight"].shape


def test_the_teacher_is_fixed_and_later_stages_crop_and_flip_alone(
        tuned, trained, classes, tmp_path, monkeypatch):
    step, seen = simclr_v2.distill_step, []

    def recorded(student, teacher, *rest):
        before = [x.clone() for x in teacher.state_dict().values()]
        result = step(student, teacher, *rest)
        trains = any(m.training for m in teacher.modules()) or any(
            p.requires_grad for p in teacher.parameters())
        seen.append(not trains and same(before, teacher.state_dict().values()))
        return result

    monkeypatch.setattr(simclr_v2, "distill_step", recorded)
    for name in ("augment", "color_jitter", "grayscale", "gaussian_blur"):
        monkeypatch.delattr(simclr_v2, name)
    args = ["--data", classes, *TUNE, "--steps", 3, "--out"]
    assert main("distill", "--teacher", tuned, *args, tmp_path / "kd") == 0 and seen == [True] * 3
    for stage in ("finetune", "linear"):
        assert main(stage, "--init", trained / "last.pt", "--labels", 0.25, *args,
                    tmp_path / stage) == 0


def test_a_student_may_be_another_network_and_teach_in_turn(tuned, classes, tmp_path, capsys):
    args = ["distill", "--data", classes, *TUNE]
    assert main(*args, "--teacher", tuned, "--width", 0.25, "--out", tmp_path / "wide") == 0
    assert "at temperature 1, 48 images, 0 of them labelled\n" in capsys.readouterr().out
    assert weights(tmp_path / "wide")["encoder.conv1.weight"].shape[0] == 16
    assert main(*args, "--teacher", tmp_path / "wide" / "last.pt", "--arch", "vit_mini", "--patch-size",
                8, "--optimizer", "adamw", "--base-lr", 1e-3, "--out", tmp_path / "vit") == 0
    assert "encoder.patch_embed.proj.weight" in weights(tmp_path / "vit")


def test_distillation_resumes_and_runs_on_two_processes(tuned, classes, tmp_path):
    args = ["distill", "--teacher", tuned, "--data", classes, *TUNE, "--precision", "fp64", "--alpha", 0.5,
            "--labels", 0.25]
    for steps in (5, 0):
        assert main(*args, "--steps", steps, "--out", tmp_path / "paused") == 0
    run("simclr_v2.py", *args, "--out", tmp_path / "two", processes=2)
    assert main(*args, "--out", tmp_path / "whole") == 0
    assert_same_weights(tmp_path / "paused", tmp_path / "whole")
    for name in ("loss", "floor", "agree"):
        one, two = ([line[name] for line in records(tmp_path / n)] for n in ("whole", "two"))
        assert one == pytest.approx(two, rel=0, abs=1e-9)


def test_alpha_mixes_the_labels_of_the_listed_images_in(tuned, classes, tmp_path):
    args = ["distill", "--teacher", tuned, "--data", classes, *TUNE, "--batch-size", 48, "--steps", 1]
    first = {}
    for name, flags in {"kd": [], "few": ["--alpha", 0.5, "--labels", tuned / "labels.txt"],
                        "all": ["--alpha", 0.5, "--labels", 1]}.items():
        assert main(*args, *flags, "--out", tmp_path / name) == 0
        first[name] = losses(tmp_path / name)[0]
    # The student starts near even logits: ln 3 a labelled image, 12 or 48 of 48, and half of it.
    few, whole = (2 * first[name] - first["kd"] for name in ("few", "all"))
    assert few == pytest.approx(12 / 48 * math.log(3), abs=0.05)
    assert whole == pytest.approx(math.log(3), abs=0.1)


def test_the_square_of_the_temperature_is_a_factor_that_can_be_left_out(tuned, classes, tmp_path):
    args = ["distill", "--teacher", tuned, "--data", classes, *TUNE, "--temperature", 0.5, "--steps", 1]
    assert main(*args, "--out", tmp_path / "a") == 0
    assert main(*args, "--no-tau-squared", "--out", tmp_path / "b") == 0
    (a,), (b,) = records(tmp_path / "a"), records(tmp_path / "b")
    assert a["loss"] == pytest.approx(b["loss"] / 4, rel=1e-6)
    assert a["floor"] == pytest.approx(b["floor"] / 4, rel=1e-6)


def test_another_teacher_is_another_run(tuned, trained, classes, tmp_path):
    args = ["distill", "--data", classes, *TUNE, "--steps", 1, "--out", tmp_path / "run"]
    assert main(*args, "--teacher", tuned) == 0
    assert main(*args, "--teacher", tuned / "last.pt") == 0  # the same one
    assert main("finetune", "--init", trained / "last.pt", "--data", classes, *TUNE, "--labels", 0.5, "--out",
                tmp_path / "other") == 0
    assert main(*args, "--teacher", tmp_path / "other") == 2


def test_features_of_any_stage_can_be_taken(tuned, photos, tmp_path):
    assert main("embed", "--init", tuned / "last.pt", "--data", photos, "--workers", 0, "--out",
                tmp_path) == 0
    assert torch.load(tmp_path / "features.pt")["features"].shape == (40, 64)


MISTAKES = {
    "selective kernels in basic blocks": ("--sk", "--arch resnet10 --sk: selective kernels replace the"),
    "selective kernels in a vit": ("--recipe imagenet-vit --sk", "--sk True is for a ResNet"),
    "a queue of no whole batches": ("--queue 64", "a multiple of 128"),
    "momentum of no queue": ("--ema-momentum 0.9", "would change nothing here"),
    "width of no head": ("--head-layers 0 --dim 64", "would change nothing here"),
    "a head for embed": ("embed --init none --dim 64", "would change nothing here"),
    "a head that nobody reads": ("linear --init none --head-layers 2", "would change nothing here"),
    "width of what nobody reads": ("finetune --init none --from-layer 1 --dim 64",
                                   "would change nothing here"),
    "a student's head": ("distill --teacher {t} --head-layers 2", "would change nothing here"),
    "a projection frozen after pre-training": (
        "linear --init none --arch vit_mini --patch-projection learned", "would change nothing here"),
    "embed of no such network": ("embed --init none --arch resnet18 --sk", "selective kernels"),
    "another mean than the teacher's": ("distill --teacher {t} --mean 0 0 0", "see the same images"),
    "another std than the teacher's": ("distill --teacher {t} --std 1 1 1", "see the same images"),
    "another stem than the teacher's": ("distill --teacher {t} --no-small-images",
                                        "see the same images"),
    "an optimizer without its lr": ("--optimizer adamw", "takes a --base-lr of its own"),
    "lars for a vit": ("--arch vit_mini", "give --optimizer adamw"),
    "no teacher": ("distill", "distill needs --teacher"),
    "a teacher of no such folder": ("distill --teacher nowhere", "there is no file nowhere"),
    "a teacher without classifier": ("distill --teacher {r}", "is no run of finetune, distill or linear"),
    "another image size than the teacher's": ("distill --teacher {t} --image-size 32",
                                              "both see the same images"),
    "a teacher of other classes": ("distill --teacher {t}", "knows 3 classes, and demo has 10"),
    "labels that nobody asks for": ("distill --teacher {t} --labels 0.1", "would change nothing here"),
    "alpha above 1": ("distill --teacher {t} --alpha 2", "at most 1"),
    "more layers than the head has": ("finetune --init {r}/last.pt --from-layer 4", "has 3 layers"),
    "a head in an encoder alone": ("finetune --init {r}/encoder.pt --labels 0.1", "holds 0 layers of the"),
    "a student that is no new one": ("distill --teacher {t} --init {r}/last.pt", "starts at random"),
    "a queue as long as an epoch": ("--queue 8192", "no less than an epoch's keys"),
    "a head that was cut": ("finetune --init {t}/last.pt --from-layer 2", "holds 1 layers of the head"),
    "parts of a batch": ("distill --teacher {t} --accumulate 2", "would change the method"),
    "batch of one": ("--batch-size 1", "2 at least"),
    "another method's official file": ("linear --init {r}/official.pth", "TensorFlow's"),
    "recipe of another family": ("--recipe imagenet --arch vit_small", "give --recipe imagenet-vit"),
    "too narrow": ("--width 0.0625", "0.125 is the least"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence_and_exit_code_2(mistake, trained, tuned, tmp_path, capsys):
    flags, sentence = MISTAKES[mistake]
    if "official" in flags:
        torch.save({"arch": "resnet50", "state_dict": {}}, trained / "official.pth")
    assert main(*flags.format(r=trained, t=tuned).split(), "--out", tmp_path / "out") == 2
    assert_one_sentence(capsys, sentence)


@pytest.mark.slow
def test_the_largest_network_trains_one_step_on_a_cpu(capsys):
    """ResNet-152, width 3, SK: 795 million parameters, and the head's 76 (v2, Table 1)."""
    args = simclr_v2.parse_args(["--recipe", "imagenet", "--arch", "resnet152", "--width", "3", "--sk"])
    args.device, args.dtype = torch.device("cpu"), torch.float32
    simclr_v2.check(args)
    model = simclr_v2.SimCLR(simclr_v2.build_encoder(args), args.dim, args.head_layers)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == 794_704_160 + 76_308_608
    optimizer, began = simclr_v2.build_optimizer(model, args), time.time()
    before = {name: p.detach().norm().item() for name, p in model.named_parameters()}
    loss = simclr_v2.train_step(model, optimizer, torch.rand(4, 3, 64, 64), None, 40.0, args)[0]
    assert loss.isfinite()
    moved = {name for name, p in model.named_parameters() if p.norm().item() != before[name]}
    # The rest of a block has no gradient as long as its last batch norm's weight is 0.
    assert {name for name in before if name.endswith(("bn3.weight", ".0.weight"))} <= moved
    with capsys.disabled():
        print(f"\n{count / 1e6:.0f} M parameters, two images of 64 px: {time.time() - began:.0f} s, peak "
              f"memory {simclr_v2.peak_memory(args.device):.1f} GB")


# --------------------------------------------------------------------- every flag of every stage

RESNET = {  # of every stage; "more | flag": what the flag needs, then the flag itself
    "arch": "--arch resnet18", "width": "--width 0.25", "sk": "--arch resnet50 | --sk",
    "zero_init_residual": "--no-zero-init-residual", "precision": "--precision fp64"}
VIT = {"patch_size": "{v} | --patch-size 4", "heads": "{v} | --heads 2"}
VIEW = {"small_images": "--no-small-images", "image_size": "--image-size 24",
        "mean": "--mean 0.4 0.4 0.4", "std": "--std 0.5 0.5 0.5"}
LESSON = {
    "optimizer": "--base-lr 0.1 | --optimizer sgd", "base_lr": "--base-lr 0.5",
    "lr_rule": "--lr-rule {r}", "epochs": "--epochs 4", "batch_size": "--batch-size 8",
    "warmup_epochs": "--warmup-epochs 0.1", "momentum": "--momentum 0.5",
    "weight_decay": "--weight-decay 0.2", "crop_min": "--crop-min 0.9"}
LATER = RESNET | VIT | VIEW | LESSON | {
    "from_layer": "--from-layer 2", "labels": "--labels 0.75",
    "head_layers": "--from-layer 2 | --head-layers 2", "dim": "--from-layer 3 | --dim 6"}
EFFECTS = {
    "pretrain": RESNET | VIT | VIEW | LESSON | {
        "patch_projection": "{v} | --patch-projection learned", "head_layers": "--head-layers 2",
        "dim": "--dim 6", "temperature": "--temperature 0.2", "queue": "--queue 32",
        "ema_momentum": "--queue 32 | --ema-momentum 0.5", "jitter": "--jitter 0.1 0.2 0.3 0.05",
        "jitter_prob": "--jitter-prob 0.4", "gray_prob": "--gray-prob 0.6",
        "blur_prob": "--image-size 24 | --blur-prob 0.7",
        "knn_k": "--knn-temperature 5 | --knn-k 3",
        "knn_temperature": "--knn-temperature 5"},
    "linear": LATER | {"optimizer": "--base-lr 0.1 | --optimizer lars"},
    "finetune": LATER,
    "distill": RESNET | VIT | LESSON | {
        "alpha": "--alpha 0.5", "labels": "--alpha 0.5 | --labels 0.75",
        "temperature": "--temperature 0.5", "tau_squared": "--no-tau-squared"},
    "embed": RESNET | VIT | VIEW}
ELSEWHERE = {  # in test_another_teacher_is_another_run, and refused (see MISTAKES)
    "linear": {"patch_projection"}, "finetune": {"patch_projection"},
    "distill": {"teacher", "patch_projection", "head_layers", "dim", *VIEW},
    "embed": {"patch_projection", "head_layers", "dim"}}


@pytest.fixture(scope="module")
def three_steps(classes, tuned, tmp_path_factory):
    """stage, flags -> weights after three steps and what was evaluated before them, or features:
    the program without its run folder. Each answer is kept."""
    known, out = {}, tmp_path_factory.mktemp("three")
    base = {stage: "--init none --width 0.125 --image-size 16 --batch-size 4" for stage in EFFECTS}
    base |= {
        "pretrain": "--width 0.125 --image-size 16 --dim 8 --batch-size 16 --warmup-epochs 0.5",
        "distill": f"--teacher {tuned} --batch-size 16 --warmup-epochs 0.5",
        "embed": "--init none --width 0.125 --image-size 16"}
    for stage in ("linear", "finetune"):
        base[stage] += " --labels 0.5 --from-layer 1 --epochs 2 --warmup-epochs 0.2"

    def fit(args, run, data, model, optimizer, step, monitor, evaluate, views):
        known["now"] = {f"before {k}": torch.tensor(v) for k, v in evaluate(0).items()}
        model.train()
        for i, batch in enumerate(simclr_v2.batches(args, data.train, 0, 3, views)):
            step(batch, i / (len(data.train) // args.batch_size))
        known["now"] |= model.state_dict()

    def run(stage, flags):
        flags = flags.format(v="--arch vit_mini --patch-size 8 --optimizer adamw --base-lr 1e-3"
                             if stage != "embed" else "--arch vit_mini --patch-size 8")
        if (stage, flags) not in known:
            start = base[stage].replace("--width 0.125", "" if "vit" in flags else "--width 0.125")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(simclr_v2, "fit", fit)
                patch.setattr(simclr_v2.Run, "save_views", lambda *args: None)
                assert main(stage, "--recipe", "demo", "--data", classes, "--workers", 0, "--fresh",
                            "--precision", "fp32", *start.split(), *flags.split(),
                            "--out", out) == 0
            if stage == "embed":
                known["now"] = {"h": torch.load(out / "features.pt")["features"]}
            known[stage, flags] = known.pop("now")
        return known[stage, flags]

    return run


def test_the_table_has_every_flag_of_every_stage():
    for stage, fields in EFFECTS.items():
        args = simclr_v2.parse_args([stage, "--init", "none"])
        assert {*fields} | ELSEWHERE.get(stage, set()) == {*args.fields}, stage
        assert not {*fields} & ELSEWHERE.get(stage, set())


@pytest.mark.parametrize("stage, name", [(s, name) for s in EFFECTS for name in EFFECTS[s]])
def test_a_flag_changes_what_is_computed(stage, name, three_steps):
    more, flag = ("| " + EFFECTS[stage][name]).split("| ")[-2:]
    flag = flag.replace("{r}", "sqrt" if stage == "linear" else "linear")
    without, with_it = three_steps(stage, more.strip()), three_steps(stage, f"{more}{flag}".strip())
    assert without.keys() != with_it.keys() or any(
        x.shape != with_it[k].shape or not torch.equal(x.double(), with_it[k].double())
        for k, x in without.items())


def test_without_a_flag_all_is_the_same(three_steps, classes):
    """Else the test above would prove nothing."""
    for stage in EFFECTS:
        one, two = three_steps(stage, ""), three_steps(stage, "--log-every 7")
        assert one.keys() == two.keys() and same(one.values(), two.values()), stage
