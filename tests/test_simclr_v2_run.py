"""simclr_v2.py as a program, in short: ranks, kill and resume, its three stages, mistakes."""

import math
import signal
import time

import pytest
import torch
from conftest import (
    finish, records, run, saved_step, send, start, wait_for_step, weights, write_images)

import simclr_v2

SMALL = ["--recipe", "demo", "--width", "0.125", "--image-size", "16", "--dim", "8", "--batch-size", "16",
         "--workers", "0", "--knn-every", "0", "--precision", "fp32", "--log-every", "1",
         "--warmup-epochs", "0.5"]
TUNE = ["--workers", "0", "--precision", "fp32", "--recipe", "demo", "--batch-size", "4", "--epochs", "2",
        "--log-every", "1"]
FIRST = ["--workers", "0", "--precision", "fp32", "--steps", "1", "--fresh", "--knn-every", "0"]


def main(*args):
    return simclr_v2.main([*map(str, args)])


def losses(out):
    return [line["loss"] for line in records(out)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


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
    for name in ("loss", "contrast_top1", "online_train_top1"):
        one, two = ([line[name] for line in records(tmp_path / n)] for n in ("one", "two"))
        assert len(one) == 3 and one == pytest.approx(two, rel=0, abs=1e-10), name
    torch.testing.assert_close(weights(tmp_path / "one"), weights(tmp_path / "two"), rtol=0, atol=1e-10)


def test_killed_and_started_again_ends_with_the_same_bits(classes, tmp_path):
    args = ["--data", classes, *SMALL, "--epochs", "12", "--queue", "32"]
    running = start("simclr_v2.py", *args, "--out", tmp_path / "killed")
    wait_for_step(tmp_path / "killed" / "log.jsonl", 10, running)
    send(running, signal.SIGKILL)
    finish(running)
    assert 0 < saved_step(tmp_path / "killed") < 36
    for name in ("killed", "whole"):
        assert main(*args, "--out", tmp_path / name) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 36
    assert same(weights(tmp_path / "killed").values(), weights(tmp_path / "whole").values())


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
        assert same(weights(tmp_path / name).values(), weights(tuned).values())
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


# ------------------------------------------------------------------------------ stage 3: distillation


def test_a_student_learns_from_the_teacher_without_labels(tuned, classes, photos, tmp_path, capsys):
    before = weights(tuned)
    for data, out in ((classes, "labelled"), (photos, "unlabelled")):
        assert main("distill", "--teacher", tuned, "--data", data, *TUNE, "--out", tmp_path / out) == 0
        for line in records(tmp_path / out):
            assert line["loss"] >= line["floor"] - 1e-6  # the teacher's entropy
    assert "at temperature 0.1" in capsys.readouterr().out  # self-distillation
    assert same(weights(tuned).values(), before.values())
    first, *_, last = records(tmp_path / "labelled", "top1")
    assert "teacher_top1" in first and "teacher_top1" not in last
    assert first["teacher_top1"] == records(tuned, "top1")[-1]["top1"]
    assert records(tmp_path / "unlabelled", "top1") == []
    state = weights(tmp_path / "labelled")
    assert not any(name.startswith("projector.") for name in state)  # the head is left out
    assert state["encoder.conv1.weight"].shape == before["encoder.conv1.weight"].shape


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
    assert same(weights(tmp_path / "paused").values(), weights(tmp_path / "whole").values())
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
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and "Traceback" not in error


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
