"""The augmentation of simsiam.py and dcl.py against torchvision, fed with the same random numbers.

"App. A" is that of arXiv 2011.10566: RandomResizedCrop of .2 to 1, ColorJitter(.4, .4, .4, .1) with
probability .8, grayscale .2, blur with sigma in (.1, 2), flip; in the code the last two with .5.
"""
import itertools
from unittest.mock import patch

import pytest
import torch
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as TF

import common
import dcl
import simsiam
from common import (
    color_jitter, crop_boxes, gaussian_blur, generator, grayscale, resized_crop, solarize)
from conftest import TINY
from helpers import DOUBLE, same, settled, uniform

STRENGTH = (0.4, 0.4, 0.4, 0.1)  # App. A


def settings(script, *flags):
    return settled(script, *flags, precision="fp32", dtype=torch.float32)


def images(n, height, width=None):
    """Noise, and the awkward pixels: black, white, gray, pure colors."""
    x = uniform(n, 3, height, width or height).float()
    corners = torch.tensor(list(itertools.product((0.0, 0.5, 1.0), repeat=3)))
    k = min(height, 27)
    x[:, :, :k, 0] = corners[:k].T
    return x


def assert_same(ours, expected, tolerance=1e-5):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)  # of one dtype, too


def torchvision_box(u, height, width, crop_min):
    """RandomResizedCrop.get_params with its random numbers taken from u; how often it tried."""
    numbers, places = [u[i] for attempt in range(10) for i in (attempt, 10 + attempt)], u[20:]

    def uniform_(x, low, high):
        return torch.tensor(float(low) + float(high - low) * numbers.pop(0), dtype=DOUBLE)

    def randint(low, high, size):
        return torch.tensor(int(places.pop(0) * high))

    with patch.object(torch.Tensor, "uniform_", uniform_), patch.object(torch, "randint", randint):
        image = torch.empty(3, height, width)
        box = RandomResizedCrop.get_params(image, (crop_min, 1), (3 / 4, 4 / 3))
    return *box, 10 - len(numbers) // 2


@pytest.mark.parametrize("height, width", [
    (32, 32), (224, 224), (96, 64), (375, 500), (500, 375), (40, 400), (400, 40), (30, 41), (7, 3),
    (1000, 10), (10, 1000)])
@pytest.mark.parametrize("crop_min", [0.08, 0.2, 1.0])
def test_crop_boxes_equal_the_ten_tries_of_torchvision(height, width, crop_min):
    u = uniform(300, 23, seed=height + width)
    u[:100, :8] = 1 - u[:100, :8] * 0.02  # nearly the whole area: tries often fail
    # The ends of the range, a small box at the last position, no try that fits
    u[-5:] = torch.tensor([0.0, 0.5, 1 - 2**-53, 0.0, 0.999], dtype=DOUBLE)[:, None]
    u[-2, 20:] = 1 - 2**-53
    *boxes, flip = crop_boxes(u, height, width, crop_min)
    expected = [torchvision_box(row, height, width, crop_min) for row in u.tolist()]
    assert torch.stack(boxes, 1).tolist() == [list(box[:4]) for box in expected]
    assert torch.equal(flip, u[:, 22] < 0.5)
    assert {box[4] for box in expected} - {1}  # later tries or the center crop do occur
    top, left, h, w = boxes
    assert (top + h <= height).all() and (left + w <= width).all()


def torchvision_crop(x, boxes, size, antialias=True):
    views = []
    for image, (top, left, height, width, flip) in zip(x, boxes):
        view = TF.resized_crop(image, top, left, height, width, [size, size], antialias=antialias)
        views.append(TF.horizontal_flip(view) if flip else view)
    return torch.stack(views)


@pytest.mark.parametrize("height, width, size", [
    (32, 32, 32), (20, 20, 48), (120, 75, 32), (64, 150, 24), (90, 90, 90), (40, 300, 16)])
def test_resized_crop_equals_torchvisions_antialiased_one(height, width, size):
    x, u = images(12, height, width), uniform(12, 23, seed=size)
    boxes = [(*torchvision_box(row, height, width, 0.08)[:4], i % 2)
             for i, row in enumerate(u.tolist())]
    boxes[0], boxes[1] = (0, 0, height, width, 0), (0, 0, height, width, 1)
    boxes[2], boxes[3] = (3, 5, 1, 1, 0), (2, 4, 7, 1, 1)  # one pixel, one column
    ours = resized_crop(x, torch.tensor(boxes).unbind(1), size)
    assert_same(ours, torchvision_crop(x, boxes, size))


def test_crop_oracle_tells_aliasing_a_missing_flip_and_a_shift():
    x = images(4, 96)
    boxes = [(0, 0, 96, 96, 1), (5, 9, 60, 80, 1), (20, 1, 64, 64, 1), (0, 30, 50, 66, 1)]
    unflipped, shifted = [(*b[:4], 0) for b in boxes], [(*b[:3], b[3] - 1, 1) for b in boxes]
    ours = resized_crop(x, torch.tensor(boxes).unbind(1), 24)
    assert_same(ours, torchvision_crop(x, boxes, 24))
    for wrong in (torchvision_crop(x, boxes, 24, antialias=False),
                  torchvision_crop(x, unflipped, 24), torchvision_crop(x, shifted, 24)):
        assert (ours - wrong).abs().amax((1, 2, 3)).min() > 1e-2


def torchvision_jitter(image, u, strength=STRENGTH, prob=0.8):
    """u: whether, how much for brightness, contrast, saturation, hue, and four for the order."""
    if u[0] >= prob:
        return image
    jitter = v2.ColorJitter(*strength)
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    adjust = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    for i in sorted(range(4), key=lambda i: u[5 + i]):
        if ranges[i] is not None:  # it is for a strength of 0
            low, high = ranges[i]
            image = adjust[i](image, low + (high - low) * u[1 + i])
    return image


def torchvision_blur(image, u, low=0.1, high=2.0):  # App. A; 23 taps at 224 px
    taps, sigma = 2 * (image.shape[-1] // 20) + 1, low + (high - low) * u
    return TF.gaussian_blur(image, [taps, taps], [sigma, sigma])


def each(function, x, u, *rest):
    return torch.stack([function(image, row, *rest) for image, row in zip(x, u.tolist())])


@pytest.mark.parametrize("ours, theirs", [  # ours, on a batch; torchvision's, on an image
    (lambda x, u, prob: color_jitter(x, u, STRENGTH, prob),
     lambda image, u: torchvision_jitter(image, u, STRENGTH, 1.0)),
    (lambda x, u, prob: grayscale(x, u[:, 0], prob),
     lambda image, u: TF.rgb_to_grayscale(image, num_output_channels=3)),
    (lambda x, u, prob: solarize(x, u[:, 0], prob),
     lambda image, u: TF.solarize(image, 128 / 255)),
    (lambda x, u, prob: gaussian_blur(x, u[:, :2], prob, (0.1, 2.0)),
     lambda image, u: torchvision_blur(image, u[1]))], ids="jitter grayscale solarize blur".split())
@pytest.mark.parametrize("prob", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_each_operation_equals_torchvisions_with_its_probability(ours, theirs, prob, dtype):
    x, u = images(20, 40).to(dtype), uniform(20, 9, seed=4)
    u[:4, 0] = torch.tensor([0.0, 0.19999, 0.2, 1 - 2**-53], dtype=DOUBLE)  # applied if u < prob
    before, y, applied = x.clone(), ours(x, u, prob), u[:, 0] < prob
    assert applied.any() == (prob > 0) and applied.all() == (prob == 1)
    assert_same(y, torch.where(applied[:, None, None, None], each(theirs, x, u), x))
    assert torch.equal((y - x).abs().amax((1, 2, 3)) > 1e-3, applied)
    assert torch.equal(y[~applied], x[~applied]) and torch.equal(x, before)


@pytest.mark.parametrize("operation", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_each_color_operation_equals_torchvisions(operation):
    strength = [0.0] * 4
    strength[operation] = 0.5 if operation == 3 else 0.9  # wider than the recipe
    x, u = images(9, 30), uniform(9, 9, seed=operation)
    u[:, 1 + operation] = torch.linspace(0, 1 - 1e-9, 9)  # from end to end
    expected = each(torchvision_jitter, x, u, strength, 1.0)
    assert_same(color_jitter(x, u, tuple(strength), 1.0), expected)
    moved = (expected - x).abs().amax((1, 2, 3)) > 0.05
    assert moved.tolist() == [i != 4 for i in range(9)]  # the middle draw is the identity


def test_jitter_in_every_order_equals_torchvisions_sequence():  # 24 images, 24 orders, one call
    x, u = images(1, 30).expand(24, -1, -1, -1), torch.zeros(24, 9, dtype=DOUBLE)
    u[:, 1:5] = torch.tensor([0.95, 0.9, 0.05, 0.9])
    for row, order in zip(u, itertools.permutations(range(4))):
        row[[5 + i for i in order]] = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=DOUBLE)
    ours = color_jitter(x, u, STRENGTH, 0.8)
    assert_same(ours, each(torchvision_jitter, x, u))
    differing = [(ours[i] - ours[j]).abs().max() > 1e-3 for i in range(24) for j in range(i)]
    assert sum(differing) > 0.8 * len(differing)  # some pairs commute
    ranks = u.clone()  # mistake: the draws' ranks taken for the order
    ranks[:, 5:] = u[:, 5:].argsort(1).argsort(1).argsort(1).double()
    assert (each(torchvision_jitter, x, ranks) - ours).abs().max() > 1e-2


@pytest.mark.parametrize("n, size", [(13, 224), (3, 600)])  # in 5 and 3 parts
def test_jitter_of_a_large_batch_equals_torchvisions(n, size):
    x, u = images(n, size), uniform(n, 9, seed=2)
    u[0, 0] = 0.8  # not below the probability
    assert_same(color_jitter(x, u, STRENGTH, 0.8), each(torchvision_jitter, x, u))


def test_solarize_has_pils_threshold():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    for dtype in (torch.float32, DOUBLE):
        y = solarize(levels.to(dtype) / 255, torch.zeros(1), 0.2)
        assert torch.equal((y * 255).round().to(torch.uint8), TF.solarize(levels, 128))


@pytest.mark.parametrize("size", [10, 20, 32, 64, 96, 224])
def test_blur_equals_torchvisions_at_the_same_kernel_and_sigma(size):  # sigma, not the size
    n = 2 if size == 224 else 8
    x, u = images(n, size), uniform(n, 2, seed=size)
    u[0] = torch.tensor([0.0, 0.999])
    ours = gaussian_blur(x, u, 1.0, sigma=(0.1, 2.0))
    assert_same(ours, each(lambda image, u: torchvision_blur(image, u[1]), x, u))
    assert torch.equal(ours[0], x[0]) == (size < 20)  # one tap


def torchvision_augment(image, u, args):
    """u: 9 for the jitter, 1 for the grayscale, 2 for the blur; then normalization (App. A)."""
    image = torchvision_jitter(image, u[:9], args.jitter, args.jitter_prob)
    if u[9] < args.gray_prob:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    if u[10] < args.blur_prob:
        image = torchvision_blur(image, u[11])
    return TF.normalize(image, list(args.mean), list(args.std))


@pytest.mark.parametrize("script", [simsiam, dcl], ids=["simsiam", "dcl"])
@pytest.mark.parametrize("flags", [  # test_recipes_are_the_papers has their numbers
    "--recipe imagenet", "--recipe cifar", "--recipe demo",
    "--recipe imagenet --jitter 0.1 0.2 0.3 0.05 --jitter-prob 0.5 --gray-prob 0.6 --blur-prob 0.3"
    " --mean 0.1 0.2 0.3 --std 0.4 0.5 0.6"])
def test_augment_equals_torchvisions_chain(script, flags):
    args = settings(script, *flags.split())
    x, u = images(48, 40), uniform(48, 12, seed=6)
    expected = each(torchvision_augment, x, u, args)
    assert_same(script.augment(x, u, args), expected, 5e-5)  # 1e-5 over the smallest std


def test_a_run_trains_on_the_views_of_its_seed_and_so_does_its_continuation(tmp_path, monkeypatch):
    flags = [*TINY, "--seed", "5", "--blur-prob", "0.5", "--out", str(tmp_path)]
    seen, train_step = [], simsiam.train_step

    def watched(model, optimizer, x1, x2, *rest):
        seen.append(torch.stack([x1, x2], 1))
        return train_step(model, optimizer, x1, x2, *rest)

    monkeypatch.setattr(simsiam, "train_step", watched)
    for stop in ("2", "4"):
        assert simsiam.main([*flags, "--steps", stop]) == 0
    pixels, args = common.demo_images(4000, 0)[0], settings(simsiam, *flags)
    order = torch.randperm(4000, generator=generator(5, "order", 0))
    for step, views in zip(range(4), seen, strict=True):  # of functions equal to torchvision's
        crop, color = (torch.rand(16, 2, n, dtype=DOUBLE, generator=generator(5, name, step))
                       for name, n in (("crop", 23), ("colour", 12)))
        batch = pixels[order[16 * step:16 * step + 16]].repeat_interleave(2, 0) / 255
        boxes = crop_boxes(crop.flatten(0, 1), 32, 32, args.crop_min)
        crops = resized_crop(batch, boxes, args.image_size)
        expected = simsiam.augment(crops, color.flatten(0, 1), args)
        assert_same(views.flatten(0, 1), expected, 5e-5)


@pytest.mark.parametrize("n, batch", [(200, 50), (200, 200), (213, 50), (64, 2)])
def test_every_epoch_is_a_permutation(n, batch):  # the last, smaller batch is dropped
    args = settings(simsiam, "--batch-size", batch, "--image-size", "4", "--seed", "3")
    per_epoch, pixels = n // batch, (images(n, 4) * 255).to(torch.uint8)

    def indices(start):  # the images that each step takes
        data = simsiam.Images(torch.arange(n), pixels)
        return [x for *_, x in simsiam.training_batches(data, start, 3 * per_epoch, 2, args)]

    found = indices(0)
    epochs = torch.stack(found).view(3, -1)
    for epoch, order in enumerate(epochs):
        expected = torch.randperm(n, generator=generator(3, "order", epoch))
        assert torch.equal(order, expected[:per_epoch * batch])
    assert epochs.unique().numel() == n  # what one epoch drops, another takes
    middle = per_epoch + per_epoch // 2  # a run that goes on there
    assert same(found[middle:], indices(middle))
