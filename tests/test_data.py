"""Data as people have it: folders of all kinds, torchvision's sets, the order in which it is seen."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import TINY, write_images
from PIL import Image

import simsiam


def args_for(data, *more):
    args = simsiam.parse_args([*TINY, "--data", str(data), "--batch-size", "4", *more])
    args.device, args.dtype, args.initial = torch.device("cpu"), torch.float32, None
    return args


@pytest.fixture
def zoo(tmp_path):
    """40 files: nested, JPEG, PNG, WebP; one grey, one RGBA, one 16-bit, one truncated."""
    write_images(tmp_path / "a", 30)
    write_images(tmp_path / "b" / "c", 4, kind="png")
    pixels = np.random.default_rng(0).integers(0, 256, (150, 140, 4), dtype=np.uint8)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(pixels[..., :3]).save(tmp_path / "photo.webp", lossless=True)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "UPPER.JPG")
    (tmp_path / "b" / "broken.jpeg").write_bytes((tmp_path / "a" / "00_000.jpg").read_bytes()[:400])
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path, pixels


def test_any_tree_of_images_is_found_and_converted(zoo, capsys):
    root, pixels = zoo
    data = simsiam.load_data(args_for(root))
    assert len(data.train) == 40 and data.bank is None and data.val is None
    assert "40 images, on disk, no labels: kNN off" in capsys.readouterr().out
    names = [os.fsdecode(name) for name in data.train.names]
    assert names == sorted(names)
    read = {name: data.train.read(i)[0] for i, name in enumerate(names)}
    assert all(x.dtype == torch.uint8 and x.shape[0] == 3 for x in read.values())
    rgb = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(read["photo.webp"], rgb[:3]) and torch.equal(read["rgba.png"], rgb[:3])
    for name in ("grey.png", "deep.png"):  # 16 bits: the upper eight
        assert torch.equal(read[name], rgb[:1].expand(3, -1, -1)), name


def test_a_file_name_that_is_no_utf8_is_read(tmp_path):
    write_images(tmp_path, 3)
    os.rename(tmp_path / "00_001.jpg", os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    images = simsiam.load_data(args_for(tmp_path, "--batch-size", "2")).train
    assert [images.read(i)[1] for i in range(3)] == [0, 1, 2]
    simsiam.say(images.path(2))  # and can be named


def test_an_unreadable_image_has_one_substitute_for_ever(zoo):
    images = simsiam.load_data(args_for(zoo[0])).train
    i = [os.fsdecode(name) for name in images.names].index("b/broken.jpeg")
    x, shown = images.read(i)
    again, shown_again = simsiam.load_data(args_for(zoo[0])).train.read(i)
    assert shown == shown_again != i and torch.equal(x, again) and torch.equal(x, images.read(shown)[0])


def test_a_folder_with_train_and_val_has_labels_and_small_images_live_in_memory(classes, capsys):
    data = simsiam.load_data(args_for(classes))
    assert "48 images, in memory on cpu, 3 classes" in capsys.readouterr().out
    assert data.classes == ["ant", "bee", "cat"]
    for images, n in ((data.train, 16), (data.val, 4)):
        assert images.labels.tolist() == sorted([0, 1, 2] * n)
        for i in (0, n, len(images) - 1):
            assert torch.equal(images.pixels[i], torchvision.io.decode_image(images.path(i)))
            assert images.path(i).split(os.sep)[-2] == data.classes[images.labels[i]]


def test_images_of_two_sizes_stay_on_disk(tmp_path):
    write_images(tmp_path, 6, size=(16, 16), kind="png")
    write_images(tmp_path, 6, seed=1, size=(16, 20), kind="png")
    assert simsiam.load_data(args_for(tmp_path)).train.pixels is None


def test_small_images_with_an_unreadable_one_take_its_substitutes_label(classes, tmp_path):
    import shutil
    shutil.copytree(classes, tmp_path / "x")
    (tmp_path / "x" / "train" / "ant" / "05_003.png").write_bytes(b"no")
    data = simsiam.load_data(args_for(tmp_path / "x"))
    i = [os.fsdecode(name) for name in data.train.names].index("ant/05_003.png")
    _, shown = data.train.read(i)
    assert torch.equal(data.train.pixels[i], data.train.pixels[shown])
    assert data.train.labels[i] == data.train.labels[shown]
    assert data.train.unreadable == {data.train.path(i)}


class FakeSet:
    """What torchvision's CIFAR and STL classes offer, without their files."""

    classes = ["a", "b"]
    calls = []

    def __init__(self, root, train=None, split=None, download=False):
        self.calls.append((train, split, download))
        n = 6 if train or split == "train" else 10 if split == "train+unlabeled" else 4
        g = np.random.default_rng(n)
        if split is None:
            self.data, self.targets = g.integers(0, 256, (n, 32, 32, 3), np.uint8), [0, 1] * (n // 2)
        else:
            self.data = g.integers(0, 256, (n, 3, 96, 96), np.uint8)
            self.labels = np.array([0, 1] * 3 + [-1] * 4 if n == 10 else [0, 1] * (n // 2))


@pytest.mark.parametrize("name, attribute", [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_cifar_comes_through_torchvision(name, attribute, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, attribute, FakeSet)
    data = simsiam.load_data(args_for(name))
    assert data.train.pixels.shape == (6, 3, 32, 32) and data.val.pixels.shape == (4, 3, 32, 32)
    pixels = np.random.default_rng(6).integers(0, 256, (6, 32, 32, 3), np.uint8)
    assert torch.equal(data.train.pixels, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert data.bank is data.train and data.train.labels.tolist() == [0, 1] * 3


def test_stl10_pretrains_on_the_unlabelled_split_and_votes_with_the_labelled(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "STL10", FakeSet)
    args = args_for("stl10")
    data = simsiam.load_data(args)
    assert [len(images) for images in (data.train, data.bank, data.val)] == [10, 6, 4]
    assert simsiam.parse_args(["--data", "stl10"]).image_size == 96  # its size
    args.stage = "linear"
    assert len(simsiam.load_data(args).train) == 6


def test_rank_0_alone_downloads(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeSet)
    FakeSet.calls.clear()
    simsiam.load_data(args_for("cifar10"))
    assert (True, None, True) in FakeSet.calls
    FakeSet.calls.clear()
    monkeypatch.setattr(simsiam, "rank", lambda: 1)
    simsiam.load_data(args_for("cifar10"))
    assert FakeSet.calls and not any(download for *_, download in FakeSet.calls)


def test_a_download_that_fails_says_where_to_put_the_files(monkeypatch, tmp_path, capsys):
    def fail(*args, **kwargs):
        raise OSError("<urlopen error no network>")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    assert simsiam.main(["--data", "cifar10", "--data-root", str(tmp_path), "--out",
                         str(tmp_path / "out")]) == 2
    assert "could not get cifar10 under --data-root" in capsys.readouterr().err


def test_an_image_gets_the_same_views_in_memory_alone_and_on_two_ranks(classes, monkeypatch):
    args = args_for(classes, "--image-size", "16")
    images = simsiam.load_data(args).train
    alone = [*simsiam.batches(args, images, 0, 30, views=2)]
    assert len(alone) == 30
    for rank in (0, 1):
        monkeypatch.setattr(simsiam, "world_size", lambda: 2)
        monkeypatch.setattr(simsiam, "rank", lambda rank=rank: rank)
        for whole, half in zip(alone, simsiam.batches(args, images, 0, 30, views=2)):
            for name in ("crops", "colours"):
                a, b = (getattr(x, name).unflatten(0, (2, -1)) for x in (whole, half))
                assert torch.equal(a[:, 2 * rank:2 * rank + 2], b)
            assert torch.equal(whole.wanted[2 * rank:2 * rank + 2], half.wanted)


def test_the_loaders_processes_change_nothing(photos):
    batches = [[*simsiam.batches(args_for(photos, "--workers", str(n)), images, 3, 14, views=2)]
               for n in (0, 2) for images in [simsiam.load_data(args_for(photos)).train]]
    assert len(batches[0]) == len(batches[1]) == 11
    for a, b in zip(*batches):
        assert torch.equal(a.crops, b.crops) and torch.equal(a.colours, b.colours)
    seen = torch.cat([batch.crops for batch in batches[0]]).flatten(1)
    assert len(seen.unique(dim=0)) == len(seen)  # no view twice, over epochs and images


@pytest.mark.parametrize("flag, shorter", [("--no-small-images", 18), ("--small-images", 16)])
def test_the_test_view_is_the_centre_on_disk_as_in_memory(flag, shorter, tmp_path):
    write_images(tmp_path, 4, size=(144, 144))  # too large to be taken into memory
    args = args_for(tmp_path, "--image-size", "16", flag)
    images = simsiam.load_data(args).train
    x, _ = next(simsiam.load(args, images, [(torch.tensor([3]), None)]))
    photo = torchvision.io.decode_image(images.path(3))
    expected = torchvision.transforms.v2.functional.center_crop(  # 18: 8 / 7 of 16
        torchvision.transforms.v2.functional.resize(photo, [shorter], antialias=True), [16, 16])
    assert torch.equal(x[0], expected / 255)
    images.pixels, images.names = photo[None], images.names[3:4]
    error = []
    for args.small_images in (args.small_images, not args.small_images):
        y, _ = next(simsiam.load(args, images, [(torch.tensor([0]), None)]))
        error.append((x - y).abs().mean())
    assert error[0] < 0.01 and error[0] < error[1] / 4  # up to the rounding to 8 bits


def test_the_test_view_at_the_datas_own_size_is_the_image(classes):
    args = args_for(classes, "--image-size", "16")
    images = simsiam.load_data(args).train
    x, _ = next(simsiam.load(args, images, [(torch.tensor([3]), None)]))
    assert torch.equal(x[0], images.pixels[3] / 255)


def test_features_come_in_order_whatever_the_number_of_processes(classes, monkeypatch):
    args = args_for(classes, "--image-size", "16")
    images = simsiam.load_data(args).val  # 12 images on 5 ranks: some have one more
    encoder = torch.nn.Flatten()
    alone, shown = simsiam.features(encoder, images, args)
    assert shown.tolist() == list(range(12)) and len(alone.unique(dim=0)) == 12
    parts, gathered = [], []
    monkeypatch.setattr(simsiam, "world_size", lambda: 5)
    monkeypatch.setattr(simsiam, "report_unreadable", lambda *a: None)
    monkeypatch.setattr(simsiam, "all_gather", lambda x: (gathered.append(x), x.repeat_interleave(
        5, 0) if x.ndim == 1 else torch.zeros(15, x.shape[1]))[1])
    for r in range(5):
        monkeypatch.setattr(simsiam, "rank", lambda r=r: r)
        simsiam.features(encoder, images, args)
        parts.append(gathered[-2])
    together = torch.stack(parts).transpose(0, 1).flatten(0, 1)[:12]  # as all_gather orders them
    assert torch.equal(together, alone)


def test_an_imagenet_sized_bank_is_a_tenth(monkeypatch):
    images = simsiam.Images(np.array([b"x"] * 1_281_167), torch.zeros(1_281_167), root="r")
    monkeypatch.setattr(simsiam, "find_images", lambda folder: images)
    monkeypatch.setattr(simsiam, "load_pixels", lambda images, args: images)
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    monkeypatch.setattr(os, "scandir", lambda path: [SimpleNamespace(name=c, is_dir=lambda: True)
                                                     for c in ("x", "y")])
    train, bank, _, _ = simsiam.folder_data(SimpleNamespace(data="d"))
    assert len(train) == 1_281_167 and len(bank) == len(bank.labels) == 128_117
