"""A user's mistake ends in exit code 2 and one sentence that names the thing, and costs nothing."""

import os
import pickle
import shutil

import pytest
import torch
from conftest import TINY, write_images
from PIL import Image

import simsiam


@pytest.fixture(scope="module")
def world(tmp_path_factory, photos, classes):
    """Folders and files to make mistakes with, and the directory's contents to compare later."""
    root = tmp_path_factory.mktemp("world")
    (root / "empty").mkdir()
    (root / "file").write_text("no folder")
    shutil.copytree(classes / "train" / "ant", root / "one_class" / "train" / "ant")
    shutil.copytree(classes / "val" / "ant", root / "one_class" / "val" / "ant")
    shutil.copytree(classes, root / "strange")
    (root / "strange" / "val" / "cat").rename(root / "strange" / "val" / "dog")
    (root / "no_val_images" / "train" / "a").mkdir(parents=True)
    write_images(root / "broken", 50, size=(140, 150))
    for i in (3, 4):  # 2 of 50 are more than 1 % and more than one
        os.truncate(root / "broken" / f"00_{i:03}.jpg", 300)
    write_images(root / "broken_small", 50, size=(16, 16))
    for i in (3, 4):
        os.truncate(root / "broken_small" / f"00_{i:03}.jpg", 300)
    write_images(root / "ruined", 20)
    for path in (root / "ruined").iterdir():
        os.truncate(path, 100)
    assert simsiam.main([*TINY, "--data", str(classes), "--image-size", "16", "--steps", "1",
                         "--out", str(root / "run")]) == 0
    shutil.copy(root / "run" / "encoder.pt", root / "bare.pt")
    shutil.copytree(root / "run", root / "truncated")
    os.truncate(root / "truncated" / "last.pt", 2000)
    with open(root / "evil.pt", "wb") as file:
        pickle.dump(Evil(root), file)
    torch.save({"epoch": 3}, root / "other.pt")
    torch.save([1, 2], root / "list.pt")
    torch.save({"arch": "vit_small", "state_dict": {"module.x": torch.zeros(1)}}, root / "vit.pt")
    frames = [Image.new("RGB", (140, 140), colour) for colour in ("red", "blue")]
    (root / "moving").mkdir()
    frames[0].save(root / "moving" / "a.jpg", format="GIF", save_all=True, append_images=frames[1:])
    shutil.copytree(root / "run", root / "logless")
    (root / "logless" / "log.jsonl").unlink()
    (root / "logless" / "log.jsonl").mkdir()
    (root / "foreign").mkdir()
    (root / "foreign" / "log.jsonl").write_text("my own notes\n")
    return root


class Evil:
    def __init__(self, root):
        self.path = str(root / "owned")

    def __reduce__(self):
        return os.mkdir, (self.path,)


CASES = {  # what is wrong: (command, with {w} for the world and {c} for a good folder, the sentence)
    "missing folder": ("--data {w}/nowhere", "nowhere: no such folder"),
    "a file as the folder": ("--data {w}/file", "file: no such folder"),
    "empty folder": ("--data {w}/empty", "no JPEG, PNG or WebP image under"),
    "one class": ("--data {w}/one_class", "1 class folders, and labels take two"),
    "class in val alone": ("--data {w}/strange", "dog is in none of the class folders"),
    "misspelt data set": ("--data cifar11", "cifar11: no such folder, nor one of demo, cifar10"),
    "batch larger than the data": ("--data {c} --batch-size 64", "--batch-size 64 is more than the 48"),
    "batch of nought": ("--batch-size 0", "--batch-size 0 makes no sense"),
    "batch of one": ("--batch-size 1", "--batch-size 1 leaves batch norm nothing"),
    "negative batch": ("--batch-size -8", "--batch-size -8 makes no sense"),
    "batch of a word": ("--batch-size many", "invalid int value: 'many'"),
    "negative learning rate": ("--base-lr -0.1", "--base-lr -0.1 makes no sense"),
    "learning rate nan": ("--base-lr nan", "--base-lr nan makes no sense"),
    "infinite weight decay": ("--weight-decay inf", "--weight-decay inf makes no sense"),
    "probability of two": ("--blur-prob 2", "--blur-prob 2.0 makes no sense: it is 0 or more, at most 1"),
    "crop of nothing": ("--crop-min 0", "--crop-min 0.0 makes no sense: it is above 0, at most 1"),
    "jitter of three numbers": ("--jitter 0.4 0.4 0.4", "expected 4 arguments"),
    "no epoch": ("--epochs 0", "--epochs 0 makes no sense"),
    "all warm-up": ("--warmup-epochs 9 --epochs 9", "--warmup-epochs 9 leaves none of 9 epochs"),
    "width of nothing": ("--width 0.001", "width 0.001 leaves the stem fewer than 8 channels"),
    "unknown recipe": ("--recipe imagnet", "invalid choice: 'imagnet'"),
    "unknown stage": ("pretrian", "invalid choice: 'pretrian'"),
    "unknown network": ("--arch resnet51", "invalid choice: 'resnet51'"),
    "unknown ablation": ("--predictor noen", "invalid choice: 'noen'"),
    "unknown flag": ("--learning-rate 1", "unrecognized arguments: --learning-rate"),
    "flag of another stage": ("linear --init {w}/run/last.pt --blur-prob 0.1",
                              "--blur-prob is no setting of the stage linear"),
    "accumulation where batch norm forbids": ("--accumulate 2", "--accumulate would change the method"),
    "a device that is not here": ("--device {absent}", "torch sees none here"),
    "2 % truncated images": ("--data {w}/broken --epochs 2", "2 images under"),
    "2 % truncated small images": ("--data {w}/broken_small", "2 images under"),
    "nothing but truncated images": ("--data {w}/ruined", "are unreadable, more than 1 %"),
    "linear without weights": ("linear --data {c}", "linear needs --init"),
    "linear without labels": ("linear --data {w}/broken --init {w}/run/last.pt", "linear needs labels"),
    "missing checkpoint": ("linear --data {c} --init {w}/no.pt", "there is no file"),
    "truncated checkpoint": ("linear --data {c} --init {w}/truncated/last.pt", "cannot be loaded"),
    "malicious checkpoint": ("linear --data {c} --init {w}/evil.pt", "cannot be loaded"),
    "weights of another method": ("linear --data {c} --init {w}/vit.pt",
                                  "holds a vit_small, which simsiam.py does not build"),
    "seed of astronomers": ("--seed 18446744073709551616", "0 or more, at most 1e+18"),
    "an image format that moves": ("--data {w}/moving", "1 images under"),
    "some other file": ("linear --data {c} --init {w}/other.pt", "is none of a run's last.pt"),
    "a file of a list": ("linear --data {c} --init {w}/list.pt", "is none of a run's last.pt"),
    "checkpoint of another architecture": (
        "linear --data {c} --init {w}/run/last.pt --arch resnet18",
        "--arch resnet18, but {w}/run/last.pt has resnet10"),
    "weights of another width": (
        "embed --data {c} --init {w}/bare.pt --recipe demo --width 0.5",
        "does not fit --arch resnet10 --width 0.5"),
    "weights of another width than encoder.json says": (
        "embed --data {c} --init {w}/run/encoder.pt --recipe demo --width 0.5",
        "--width 0.5, but {w}/run/encoder.pt has 0.125"),
    "weights with other heads": ("--data {c} --init {w}/run/last.pt --dim 8",
                                 "size mismatch for projector.3.weight"),
    "another configuration in --out": ("--data {c} --out {w}/run --seed 7",
                                       "run holds another run, with seed 0 (now 7)"),
    "another recipe in --out": ("--data {c} --out {w}/run --dim 8 --base-lr 1",
                                "base_lr 0.48 (now 1.0), dim 16 (now 8)"),
    "other data in --out": ("--data demo --out {w}/run", "images 48-"),
    "a file as the parent of --out": ("--data {c} --out {w}/file/run", "Not a directory"),
    "a file as --out": ("--data {c} --out {w}/file", "File exists"),
    "somebody's own log in --out": ("--data {c} --out {w}/foreign", "log.jsonl is none of ours"),
    "a folder in the log's place": ("--data {c} --out {w}/logless", "Is a directory: '{w}/logless/log"),
    "embed into a file": ("embed --data {c} --init {w}/run/last.pt --out {w}/file/x",
                          "Not a directory"),
}


def contents(root):
    return {path: path.read_bytes() for path in sorted(root.rglob("*"))
            if path.is_file() and path.name != "lock"}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_gets_one_sentence_exit_code_2_and_loses_nothing(case, world, classes, tmp_path,
                                                                   capsys):
    command, sentence = CASES[case]
    absent = "mps" if torch.cuda.is_available() else "cuda"
    words = command.format(w=world, c=classes, absent=absent).split()
    stage = words[0] if not words[0].startswith("-") else "pretrain"
    defaults = ["--out", str(tmp_path / "out")]  # the case's own words come later and win
    defaults += [*TINY, "--image-size", "16"] if stage == "pretrain" else ["--workers", "0"]
    before = contents(world)
    assert simsiam.main([stage, *defaults, *words[stage in words:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("simsiam.py: ") and error.count("\n") == 1, error
    assert sentence.format(w=world) in error, error
    assert "Traceback" not in error and 20 < len(error) < 420
    assert contents(world) == before and not (world / "owned").exists()


def test_a_batch_that_the_processes_cannot_share_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(simsiam, "world_size", lambda: 3)
    assert simsiam.main([*TINY, "--out", str(tmp_path)]) == 2
    assert "must be a multiple of the 3 processes" in capsys.readouterr().err


def test_a_rank_that_no_launcher_has_set_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RANK", "0")
    assert simsiam.main([*TINY, "--out", str(tmp_path)]) == 2
    assert "start with torchrun, or unset RANK" in capsys.readouterr().err


def test_one_unreadable_image_of_many_is_named_once_and_replaced(tmp_path, capsys):
    write_images(tmp_path / "data", 40)
    os.truncate(tmp_path / "data" / "00_007.jpg", 300)
    assert simsiam.main([*TINY, "--data", str(tmp_path / "data"), "--image-size", "16",
                         "--batch-size", "8", "--epochs", "3", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.count("00_007.jpg") == 1 and "unreadable, another image stands in" in said
    assert "no labels: kNN off" in said
