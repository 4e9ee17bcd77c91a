"""Data as people have it: folders of all kinds, torchvision's sets, views."""

import os
import warnings

import numpy as np
import pytest
import torch
import torchvision
from conftest import TINY, mistake, on_ranks, program, write_images
from PIL import Image
from torchvision.transforms.v2 import functional as vision

import helpers
import simsiam

main = program(simsiam)


def settled(data, *flags, stage="pretrain"):
    return helpers.settled(simsiam, stage, "--init none --recipe demo --batch-size 4 --workers 0",
                           "--data", data, *flags, precision="fp32", dtype=torch.float32)


def center(images, args, *indices):
    (x, labels), = simsiam.batches(images, [(torch.tensor(indices), None)], args)
    return x, labels.tolist()


@pytest.mark.filterwarnings("error::UserWarning")  # all can be read
def test_any_tree_of_images_is_found_and_converted(tmp_path):
    root, pixels = tmp_path / "root", np.random.default_rng(0).integers(0, 256, (150, 140, 4), "u1")
    for folder in ("a", "b/c", "x.jpg", ".ipynb_checkpoints", "out", "../elsewhere"):
        write_images(root / folder, 1)
    os.rename(root / "a/00_000.jpg", os.fsencode(root) + b"/a/caf\xe9.jpeg")  # not UTF-8
    for name, x in {"GRAY.PNG": pixels[..., 0], "._mac.png": pixels[..., 0], "rgba.png": pixels,
                    "deep.png": pixels[..., 0] * np.uint16(256) + pixels[..., 1]}.items():
        Image.fromarray(x).save(root / name)
    Image.fromarray(pixels[..., :3]).save(root / "photo.webp", lossless=True)
    (root / "notes.txt").write_text("not an image")
    for link, target in (("b/cycle", root), ("y", tmp_path / "elsewhere"), ("z", root / "y")):
        os.symlink(target, root / link)
    data = simsiam.load_data(settled(root, "--out", root / "out"))
    names = ["GRAY.PNG", "a/caf\udce9.jpeg", "b/c/00_000.jpg", "deep.png", "photo.webp", "rgba.png",
             "x.jpg/00_000.jpg", "y/00_000.jpg"]
    assert [os.path.relpath(path, root) for path in data.train.paths] == names
    assert data.train.labels.tolist() == [-1] * 8 and data.val is None
    files = simsiam.FileCrops(data.train, None)
    shown = {name: files.read(i)[0] for i, name in enumerate(names)}
    assert all(x.dtype == torch.uint8 and x.shape[0] == 3 for x in shown.values())
    rgb = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(shown["photo.webp"], rgb[:3]) and torch.equal(shown["rgba.png"], rgb[:3])
    for name in ("GRAY.PNG", "deep.png"):  # 16 bits: the upper eight
        assert torch.equal(shown[name], rgb[:1].expand(3, -1, -1)), name


@pytest.mark.parametrize("folders, train, val, said", [  # c/ is empty
    ("train/b train/a val/b val/a", [0, 1], [0, 1], "2 images, 2 classes"),
    ("train/b/x/a train/a train/c/ val/b/y", [0, 1], [1], "2 classes"),  # none of a in val
    ("train/a train/.d val/a val/b", [-1], None, "train: fewer than two class folders, using all"),
    ("train val/a val/b", [-1], None, "train: fewer than two class folders, using all images"),
    ("train/a train/b", [-1, -1], None, "no train/ and val/, using all images in it"),
    ("a val/a", [-1, -1], None, "no train/ and val/, using all images in it without labels"),
    ("train/a train/b val/a val/c", 0, 0, "/val/c/00_000.png: its folder is not one of the 2 classes"),
    ("train/a train/b val", 0, 0, "/val/00_000.png: its folder is not one of the 2 classes in train/"),
    ("train train/a train/b val/a", 0, 0, "/train/00_000.png: its folder is not one of the 2 class")])
@pytest.mark.parametrize("size", [8, 100])  # in memory, on disk
def test_labels_come_from_train_and_val(folders, train, val, said, size, tmp_path, capsys):
    for folder in folders.split():
        write_images(tmp_path / folder, folder[-1] != "/", size=(size, size), kind="png")
    args = settled(tmp_path)
    args.batch_size = 1
    if train:
        data = simsiam.load_data(args)
        assert data.train.labels.tolist() == train and said in capsys.readouterr().out
        assert (data.val and data.val.labels.tolist()) == val and bool(data.bank) == bool(val)
    else:
        with pytest.raises(SystemExit, match=said):
            simsiam.load_data(args)


@pytest.mark.parametrize("sizes, kind, held", [
    ([(32, 32)], "jpg", True), ([(96, 60)], "png", True), ([(60, 97)], "png", False),
    ([(16, 16), (16, 20)], "png", False)])
def test_small_images_of_one_size_live_in_memory(sizes, kind, held, tmp_path):
    for i, size in enumerate(sizes):
        write_images(tmp_path, 6, seed=i, size=size, kind=kind)
    images = simsiam.load_data(settled(tmp_path)).train
    assert (images.pixels is not None) == held and len(images.paths) == 6 * len(sizes)
    for i, path in enumerate(images.paths):
        x = images.pixels[i] if held else simsiam.FileCrops(images, None).read(i)[0]
        assert torch.equal(x, torchvision.io.decode_image(path))


@pytest.mark.parametrize("size", [16, 140])  # in memory, on disk
@pytest.mark.parametrize("how", ["cut short", "an animation", "a dead link"])
def test_the_next_file_takes_the_place_of_an_unreadable_one(how, size, tmp_path):
    for folder in ("train/a", "train/b", "val/a"):
        write_images(tmp_path / folder, 4, seed=ord(folder[-1]), size=(size, size), kind="png")
    frames = [Image.new("RGB", (size, size), color) for color in ("red", "blue")]
    names = ["a/97_003.png", "b/98_003.png"]
    for path in (tmp_path / "train" / name for name in names):
        if how == "cut short":
            os.truncate(path, 90)
        elif how == "an animation":
            frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])
        else:
            path.unlink()
            path.symlink_to("nowhere")
    args = settled(tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default", UserWarning)  # as python has it
        images = simsiam.load_data(args).train
        (x, labels), _ = (center(images, args, *range(8)) for _ in range(2))
    assert labels == [0, 0, 0, 1, 1, 1, 1, 0]  # the last one's next is the first
    assert torch.equal(x[3], x[4]) and torch.equal(x[7], x[0]) and len(x.unique(dim=0)) == 6
    for name, told in zip(names, said, strict=True):  # once each
        assert f"{name}': using the next file" in str(told.message)


def test_an_imagenet_sized_bank_is_a_tenth(monkeypatch):
    files = {i: "ab"[i % 2] for i in range(1_281_167)}
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    monkeypatch.setattr(simsiam, "image_files", lambda root, args: files)
    monkeypatch.setattr(simsiam, "in_memory", lambda files, classes, args: simsiam.Images(
        torch.arange(len(files)), paths=np.arange(len(files))))
    train, bank, val = simsiam.folder_images(settled("imagenet"))
    assert len(train.labels) == len(val.labels) == 1_281_167 and bank.pixels is None
    assert len(bank.labels) == 128_117 and (bank.labels.numpy() == bank.paths).all()


def test_a_run_goes_on_with_the_same_images_alone(tmp_path):
    def command(parent, *size):
        write_images(tmp_path / parent / "x", 40, size=size, kind="png")
        return [*TINY, "--data", tmp_path / parent / "x", "--steps", 1, "--out", tmp_path / "out"]

    assert main(*command("here", 16, 16)) == 0 and main(*command("moved", 16, 16)) == 0
    assert "a run with different file_sizes: change" in mistake(simsiam, *command("other", 16, 18))


class FakeSet:
    """What torchvision's CIFAR and STL classes offer, without their files."""

    def __init__(self, root, train=None, split=None, download=False):
        self.calls.append((root, download))
        n = 6 if train or split == "train" else 10 if split == "train+unlabeled" else 4
        pixels = helpers.uniform(n, 3, 32, 31, seed=n).mul(256).byte().numpy()
        self.data = pixels if split else pixels.transpose(0, 2, 3, 1)
        self.targets = [0, 1] * 3 + [-1] * 4 if n == 10 else [0, 1] * (n // 2)
        self.labels = np.array(self.targets)


@pytest.mark.parametrize("name, stage, sizes", [
    ("cifar10", "pretrain", [6, 6, 4]), ("cifar100", "linear", [6, 6, 4]),
    ("stl10", "pretrain", [10, 6, 4]), ("stl10", "linear", [6, 6, 4])])
def test_torchvisions_sets_are_loaded_and_rank_0_alone_downloads(name, stage, sizes, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, name.upper(), FakeSet)
    for rank in (0, 1):
        FakeSet.calls = []
        monkeypatch.setattr(simsiam, "rank", lambda: rank)
        data = simsiam.load_data(settled(name, "--data-root sets", stage=stage))
        assert any(download for _, download in FakeSet.calls) == (rank == 0)
        assert {root for root, _ in FakeSet.calls} == {"sets"} and data.num_classes == 2
    assert [len(images.labels) for images in (data.train, data.bank, data.val)] == sizes
    pixels = helpers.uniform(6, 3, 32, 31, seed=6).mul(256).byte()
    assert torch.equal(data.bank.pixels, pixels) and data.bank.labels.tolist() == [0, 1] * 3


def test_any_number_of_processes_sees_the_same_features(classes, tmp_path):
    args = settled(classes, "--image-size 16")
    pixels = simsiam.load_data(args).val.pixels[:10]  # of 4 processes two have one more
    images = simsiam.Images(torch.arange(10), pixels)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(768))
    ranks = on_ranks(lambda rank, world: simsiam.features(encoder, images, args), tmp_path)
    h, y = ranks[0][1]
    expected = simsiam.normalize(pixels / 255, args.mean, args.std).flatten(1)
    assert y.tolist() == [*range(10)] and torch.allclose(h, expected)  # eval mode
    for r, world in ((0, 2), (1, 2), *((r, 4) for r in range(4))):
        assert all(map(torch.equal, ranks[r][world], (h, y)))


def test_views_from_disk_are_those_from_memory(classes):
    args = settled(classes, "--image-size", 12)
    held = simsiam.load_data(args).train
    files = simsiam.Images(held.labels, paths=held.paths)
    for (_, a, y), (_, b, z) in zip(*(simsiam.training_batches(images, 0, 9, 2, args)
                                      for images in (held, files)), strict=True):
        assert (a - b).abs().max() < 1.5 / 255 and torch.equal(y, z)  # rounded to 8 bits, twice


@pytest.mark.parametrize("flag, shorter", [("--no-small-images", 18), ("--small-images", 16)])
def test_the_test_view_is_the_center_on_disk_as_in_memory(flag, shorter, tmp_path):
    write_images(tmp_path, 4, size=(144, 144))  # too large for memory
    args = settled(tmp_path, "--image-size", 16, flag)
    images = simsiam.load_data(args).train
    x, _ = center(images, args, 3)
    photo = torchvision.io.decode_image(images.paths[3])
    resized = vision.resize(photo, [shorter], antialias=True)  # 18: 8 / 7 of 16
    assert torch.equal(x[0], vision.center_crop(resized, [16, 16]) / 255)
    images.pixels, error = photo[None].expand(4, -1, -1, -1), []
    for args.small_images in (args.small_images, not args.small_images):
        error.append((x - center(images, args, 3)[0]).abs().mean())
    assert error[0] < 0.01 and error[0] < error[1] / 4  # up to the rounding to 8 bits


def test_demos_linear_recipe_crops_nothing():
    args = settled("demo", "--batch-size 64", stage="linear")
    pixels = (helpers.uniform(64, 3, 32, 32) * 255).byte()
    images = simsiam.Images(torch.arange(64), pixels)
    for _, crops, labels in simsiam.training_batches(images, 0, 1, 1, args):
        for crop, x in zip(crops, pixels[labels] / 255, strict=True):
            assert torch.allclose(crop, x) or torch.allclose(crop, x.flip(2))
