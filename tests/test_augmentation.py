"""The augmentation of simsiam.py against torchvision, fed with the same random numbers.

"App. A" is that of arXiv 2011.10566: RandomResizedCrop of .2 to 1, ColorJitter(.4, .4, .4, .1) with
probability .8, grayscale .2, blur with sigma in (.1, 2), flip; in the code the last two with .5.
"""
import hashlib
import itertools
import math

import pytest
import torch
import torchvision
from torchvision.transforms.v2 import functional as TF

import common
import dcl
import simsiam
from common import (
    color_jitter, crop_boxes, draws, gaussian_blur, grayscale, normalize, resized_crop, solarize)
from conftest import TINY
from helpers import DOUBLE, uniform

STRENGTH = (0.4, 0.4, 0.4, 0.1)  # App. A


def settings(flags, script=simsiam):
    args = script.parse_args(flags.split())
    args = script.settle(args) if hasattr(script, "settle") else args
    args.device, args.dtype = torch.device("cpu"), torch.float32
    return args


def images(n, height, width=None, seed=0):
    """Noise, and the awkward pixels: black, white, gray, pure colors."""
    x = uniform(n, 3, height, width or height, seed=seed).float()
    corners = torch.tensor(list(itertools.product((0.0, 0.5, 1.0), repeat=3)))
    k = min(height, 27)
    x[:, :, :k, 0] = corners[:k].T
    return x


def assert_same(ours, expected, tolerance=1e-5):
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------- crop boxes


def slow_box(u, height, width, crop_min):
    """torchvision's RandomResizedCrop.get_params with its random numbers taken from u."""
    def place(h, w):
        return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w

    for attempt in range(10):
        area = height * width * (crop_min + (1 - crop_min) * u[attempt])
        low, high = math.log(3 / 4), math.log(4 / 3)
        aspect = math.exp(low + (high - low) * u[10 + attempt])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return (*place(h, w), attempt)
    if width / height < 3 / 4:  # none of ten tries fits: a center crop
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w, 10


@pytest.mark.parametrize("height, width", [
    (32, 32), (224, 224), (96, 64), (375, 500), (500, 375), (40, 400), (400, 40), (30, 41), (7, 3)])
@pytest.mark.parametrize("crop_min", [0.08, 0.2, 1.0])
def test_crop_boxes_equal_the_ten_tries_of_torchvision(height, width, crop_min):
    u = uniform(300, 23, seed=height + width)
    u[:100, :8] = 1 - u[:100, :8] * 0.02  # nearly the whole area: tries often fail
    boxes = torch.stack(crop_boxes(u, height, width, crop_min), 1)
    expected = [slow_box(row, height, width, crop_min) for row in u.tolist()]
    assert boxes[:, :4].tolist() == [list(box[:4]) for box in expected]
    assert boxes[:, 4].bool().tolist() == (u[:, 22] < 0.5).tolist()
    attempts = {box[4] for box in expected}
    assert attempts - {0}  # later tries or the fallback do occur in this test
    top, left, h, w = boxes[:, :4].T
    assert (top >= 0).all() and (left >= 0).all() and (h > 0).all() and (w > 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()


@pytest.mark.parametrize("height, width, box", [
    (100, 100, (0, 0, 100, 100)),  # the whole image
    (300, 100, (83, 0, 133, 100)), (100, 300, (0, 83, 100, 133)),  # at most 3/4, at most 4/3
    (1000, 10, (493, 0, 13, 10)), (10, 1000, (0, 493, 10, 13))])
def test_when_no_try_fits_the_crop_is_central(height, width, box):
    u = torch.full((1, 23), 0.999, dtype=DOUBLE)
    *ours, flip = crop_boxes(u, height, width, 0.2)
    assert tuple(int(v) for v in ours) == box and not flip.item()
    assert slow_box(u[0].tolist(), height, width, 0.2) == (*box, 10)


def test_first_try_that_fits_is_taken():
    u = torch.full((10, 23), 0.999, dtype=DOUBLE)  # a failing try on a square
    for row in range(10):
        u[row, row] = (0.25 - 0.2) / 0.8  # area 1/4 at try number `row`, then another one
        u[row, 10 + row] = 0.5  # aspect 1
        u[row, row + 1:10], u[row, 11 + row:20] = 0.0, 0.5
    _, _, h, w, _ = crop_boxes(u, 80, 80, 0.2)
    assert h.tolist() == w.tolist() == [40] * 10


def test_extreme_draws_stay_inside_and_flip_is_below_one_half():
    zero, one = torch.zeros(1, 23, dtype=DOUBLE), torch.ones(1, 23, dtype=DOUBLE)
    one -= 2 ** -53
    mixed = torch.where(torch.arange(23) >= 20, one, zero)  # small box, last position
    u = torch.cat([zero, one, mixed])
    top, left, h, w, flip = crop_boxes(u, 32, 48, 0.2)
    assert (top + h <= 32).all() and (left + w <= 48).all()
    assert top[0] == left[0] == 0 and top[2] + h[2] == 32 and left[2] + w[2] == 48
    assert flip.tolist() == [True, False, False]
    half = torch.full((1, 23), 0.5, dtype=DOUBLE)
    assert not crop_boxes(half, 32, 32, 0.2)[4].item()


@pytest.mark.parametrize("height, width, crop_min", [(224, 224, 0.2), (120, 200, 0.08)])
def test_crops_are_distributed_as_torchvisions(height, width, crop_min):
    n = 2000
    top, left, h, w, flip = crop_boxes(uniform(n, 23, seed=5), height, width, crop_min)
    ours = torch.stack([top, left, h, w], 1).double()
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    get_params = torchvision.transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([get_params(image, (crop_min, 1), (3 / 4, 4 / 3)) for _ in range(n)],
                          dtype=DOUBLE)

    def statistics(box):
        top, left, h, w = box.unbind(1)
        return dict(area=h * w, aspect=(w / h).log(), top=top, left=left, right=left + w)

    for (name, a), b in zip(statistics(ours).items(), statistics(theirs).values()):
        error = ((a.var() + b.var()) / n).sqrt()
        assert abs(a.mean() - b.mean()) < 4 * error, name
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.08), name
        grid = torch.cat([a, b]).unique()
        cdf = [torch.searchsorted(x.sort().values, grid, right=True) / n for x in (a, b)]
        assert (cdf[0] - cdf[1]).abs().max() < 1.95 * math.sqrt(2 / n), name  # KS test, p = .001
    assert flip.double().mean().item() == pytest.approx(0.5, abs=0.045)  # four standard errors


# ---------------------------------------------------------------------------------- resized crops


def box_tensors(boxes):
    top, left, height, width, flip = torch.tensor(boxes).unbind(1)
    return top, left, height, width, flip.bool()


def torchvision_crop(x, boxes, size, antialias=True):
    views = []
    for image, (top, left, height, width, flip) in zip(x, boxes):
        view = TF.resized_crop(image, top, left, height, width, [size, size], antialias=antialias)
        views.append(TF.horizontal_flip(view) if flip else view)
    return torch.stack(views)


@pytest.mark.parametrize("height, width, size", [
    (32, 32, 32), (20, 20, 48), (120, 75, 32), (64, 150, 24), (90, 90, 90), (40, 300, 16)])
def test_resized_crop_equals_torchvisions_antialiased_one(height, width, size):
    x = images(12, height, width)
    u = uniform(12, 23, seed=size)
    boxes = [(*slow_box(row, height, width, 0.08)[:4], i % 2) for i, row in enumerate(u.tolist())]
    boxes[0], boxes[1] = (0, 0, height, width, 0), (0, 0, height, width, 1)
    boxes[2], boxes[3] = (3, 5, 1, 1, 0), (2, 4, 7, 1, 1)  # one pixel, one column
    before = x.clone()
    assert_same(resized_crop(x, box_tensors(boxes), size), torchvision_crop(x, boxes, size))
    assert torch.equal(x, before)


def test_crop_oracle_tells_aliasing_a_missing_flip_and_a_shift():
    x = images(4, 96)
    boxes = [(0, 0, 96, 96, 1), (5, 9, 60, 80, 1), (20, 1, 64, 64, 1), (0, 30, 50, 66, 1)]
    ours = resized_crop(x, box_tensors(boxes), 24)
    assert_same(ours, torchvision_crop(x, boxes, 24))
    unflipped = [(*box[:4], 0) for box in boxes]
    shifted = [(box[0], box[1], box[2], box[3] - 1, 1) for box in boxes]
    for wrong in (torchvision_crop(x, boxes, 24, antialias=False),
                  torchvision_crop(x, unflipped, 24), torchvision_crop(x, shifted, 24)):
        assert (ours - wrong).abs().amax((1, 2, 3)).min() > 1e-2


def test_whole_box_at_the_same_size_is_the_image():
    x = images(2, 32)
    y = resized_crop(x, box_tensors([(0, 0, 32, 32, 0), (0, 0, 32, 32, 1)]), 32)
    assert_same(y, torch.stack([x[0], x[1].flip(-1)]))


def test_crops_do_not_look_outside_their_box():
    x = torch.full((1, 3, 40, 40), 1000.0)
    x[:, :, 10:20, 12:30] = 0.25
    y = resized_crop(x, box_tensors([(10, 12, 10, 18, 0)]), 32)
    assert_same(y, torch.full((1, 3, 32, 32), 0.25))


# ---------------------------------------------------------------------------------------- colors


def torchvision_jitter(image, u, strength=STRENGTH, prob=0.8):
    """u: whether, how much for brightness, contrast, saturation, hue, and four for the order."""
    if u[0] >= prob:
        return image
    adjust = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    for i in sorted(range(4), key=lambda i: u[5 + i]):
        shift = (2 * u[1 + i] - 1) * strength[i]
        image = adjust[i](image, shift if i == 3 else 1 + shift)
    return image


def each(function, x, u, *rest):
    return torch.stack([function(image, row, *rest) for image, row in zip(x, u.tolist())])


ORDERS = list(itertools.permutations(range(4)))


def order_draws(orders):
    """Draws u[5:9] whose argsort is the given order of operations."""
    u = torch.empty(len(orders), 4, dtype=DOUBLE)
    for row, order in zip(u, orders):
        row[torch.tensor(order)] = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=DOUBLE)
    assert u.argsort(1).tolist() == [list(order) for order in orders]
    return u


@pytest.mark.parametrize("operation", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_each_color_operation_equals_torchvisions(operation):
    strength = [0.0] * 4
    strength[operation] = 0.5 if operation == 3 else 0.9  # wider than the recipe
    x, u = images(9, 30), uniform(9, 9, seed=operation)
    u[:, 1 + operation] = torch.linspace(0, 1 - 1e-9, 9)  # from end to end
    expected = each(torchvision_jitter, x, u, strength, 1.0)
    assert_same(color_jitter(x.clone(), u, tuple(strength), 1.0), expected)
    moved = (expected - x).abs().amax((1, 2, 3)) > 0.05
    assert moved.tolist() == [i != 4 for i in range(9)]  # the middle draw is the identity


def test_jitter_in_every_order_equals_torchvisions_sequence():  # 24 images, 24 orders, one call
    x = images(1, 30).expand(24, -1, -1, -1).contiguous()
    u = uniform(1, 9).expand(24, -1).clone()
    u[:, 0] = 0.0
    u[:, 1:5] = torch.tensor([0.95, 0.9, 0.05, 0.9])
    u[:, 5:] = order_draws(ORDERS)
    ours = color_jitter(x.clone(), u, STRENGTH, 0.8)
    assert_same(ours, each(torchvision_jitter, x, u))
    differing = [(ours[i] - ours[j]).abs().max() > 1e-3 for i in range(24) for j in range(i)]
    assert sum(differing) > 0.8 * len(differing)  # some pairs commute
    ranks = u.clone()  # mistake: the draws' ranks taken for the order
    ranks[:, 5:] = u[:, 5:].argsort(1).argsort(1).argsort(1).double()
    assert (each(torchvision_jitter, x, ranks) - ours).abs().max() > 1e-2


@pytest.mark.parametrize("n, size", [(40, 30), (13, 224), (3, 600)])  # in 1, 3 and 3 parts
def test_jitter_of_a_random_batch_equals_torchvisions(n, size):
    x, u = images(n, size), uniform(n, 9, seed=2)
    u[0, 0], u[1, 0] = 0.8, 0.79999  # applied if u < prob
    expected = each(torchvision_jitter, x, u)
    assert_same(color_jitter(x, u, STRENGTH, 0.8), expected)
    untouched = (u[:, 0] >= 0.8).tolist()
    assert untouched[:2] == [True, False] and sum(untouched) <= n // 2
    assert [torch.equal(a, b) for a, b in zip(expected, x)] == untouched


def test_parameters_span_the_recipes_range():  # App. A: .4, .4, .4, .1
    ends = torch.tensor([0.0, 1 - 1e-12], dtype=DOUBLE)
    u = torch.zeros(2, 9, dtype=DOUBLE)
    u[:, 1:5] = 0.5
    brightness = u.clone()
    brightness[:, 1] = ends
    y = color_jitter(torch.full((2, 3, 4, 4), 0.5), brightness, STRENGTH, 0.8)
    assert_same(y[:, 0, 0, 0], torch.tensor([0.5 * 0.6, 0.5 * 1.4]))
    hue = u.clone()
    hue[:, 4] = ends
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(2, 3, 4, 4).contiguous()
    y = color_jitter(red, hue, STRENGTH, 0.8)[:, :, 0, 0]  # a tenth of the circle each way
    assert_same(y, torch.tensor([[1.0, 0.0, 0.6], [1.0, 0.6, 0.0]]))


@pytest.mark.parametrize("prob", [0.0, 0.2, 1.0])
def test_grayscale_equals_torchvisions(prob):
    x, u = images(20, 30), uniform(20, seed=4)
    u[0], u[1], u[2] = 0.0, 0.2, 1 - 2 ** -53  # applied if u < prob
    expected = torch.stack([TF.rgb_to_grayscale(image, num_output_channels=3) if v < prob else image
                            for image, v in zip(x, u.tolist())])
    assert_same(grayscale(x.clone(), u, prob), expected)
    applied = [not torch.equal(a, b) for a, b in zip(expected, x)]
    assert applied[:3] == [prob > 0, prob > 0.2, prob == 1]


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_solarize_equals_torchvisions_at_pils_threshold(dtype):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(3, 3, -1, -1)
    u = torch.tensor([0.0, 0.19999, 0.2], dtype=DOUBLE)  # applied if u < prob
    y = solarize(levels.to(dtype) / 255, u, 0.2)
    expected = torch.cat([TF.solarize(levels[:2], 128), levels[2:]])
    assert torch.equal((y * 255).round().to(torch.uint8), expected)
    x = images(3, 30)
    assert_same(solarize(x, u, 1.0), TF.solarize(x, 128 / 255))


@pytest.mark.parametrize("size", [10, 20, 32, 64, 96, 224])
def test_blur_equals_torchvisions_at_the_same_kernel_and_sigma(size):  # sigma, not the size
    n = 2 if size == 224 else 8
    x, u = images(n, size), uniform(n, 2, seed=size)
    u[0] = torch.tensor([0.0, 0.999])
    u[1] = torch.tensor([0.5, 0.9])  # not below the probability
    low, high = 0.1, 2.0  # App. A
    taps = 2 * (size // 20) + 1  # 23 at 224

    def blur(image, u):
        sigma = low + (high - low) * u[1]
        return TF.gaussian_blur(image, [taps, taps], [sigma, sigma]) if u[0] < 0.5 else image

    expected = each(blur, x, u)
    ours = gaussian_blur(x.clone(), u, 0.5, sigma=(low, high))
    assert_same(ours, expected)
    assert torch.equal(ours[1], x[1])
    assert torch.equal(ours[0], x[0]) == (taps == 1)


def test_normalize_equals_torchvisions():
    x = images(3, 30)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected, before = TF.normalize(x, list(mean), list(std)), x.clone()
    assert_same(normalize(x, mean, std), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("operation", [
    lambda x, u, prob: color_jitter(x, u, STRENGTH, prob),
    lambda x, u, prob: grayscale(x, u[:, 0], prob), lambda x, u, prob: solarize(x, u[:, 0], prob),
    lambda x, u, prob: gaussian_blur(x, u[:, :2], prob, (0.1, 2.0))],
    ids=["color_jitter", "grayscale", "solarize", "gaussian_blur"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_probabilities_0_and_1_mean_none_and_all_and_the_input_stays(operation, dtype):
    x, u = images(5, 40).to(dtype), uniform(5, 9)
    before = x.clone()
    assert torch.equal(operation(x, u, 0.0), before)
    y = operation(x, u, 1.0)
    assert y.dtype == dtype and (y - before).abs().amax((1, 2, 3)).min() > 1e-3
    assert torch.equal(x, before)


# -------------------------------------------------------------------------------- the whole recipe


def torchvision_augment(image, u, args):
    """u: 9 for the jitter, 1 for the grayscale, 2 for the blur; then normalization (App. A)."""
    image = torchvision_jitter(image, u[:9], args.jitter, args.jitter_prob)
    if u[9] < args.gray_prob:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    if u[10] < args.blur_prob:
        taps, sigma = 2 * (image.shape[-1] // 20) + 1, 0.1 + 1.9 * u[11]
        image = TF.gaussian_blur(image, [taps, taps], [sigma, sigma])
    return TF.normalize(image, list(args.mean), list(args.std))


AUGMENTATIONS = [
    "--recipe imagenet", "--recipe cifar", "--recipe demo",
    "--recipe imagenet --jitter 0.1 0.2 0.3 0.05 --jitter-prob 0.5 --gray-prob 0.6 --blur-prob 0.3"
    " --mean 0.1 0.2 0.3 --std 0.4 0.5 0.6"]


@pytest.mark.parametrize("script", [simsiam, dcl], ids=["simsiam", "dcl"])
@pytest.mark.parametrize("flags", AUGMENTATIONS)
def test_augment_equals_torchvisions_chain(script, flags):
    args = settings(flags, script)
    x, u = images(48, 40), uniform(48, 12, seed=6)
    before = x.clone()
    ours = script.augment(x, u, args)
    assert_same(ours, each(torchvision_augment, x, u, args), 5e-5)  # 1e-5 over the smallest std
    assert torch.equal(x, before)
    assert torch.equal(ours, script.augment(x, u, args))  # same draws, same result


def test_default_sigma_and_probabilities_are_the_papers():  # App. A: beside the oracle above
    args = settings("--recipe imagenet")
    x = images(1, 60)
    u = torch.tensor([[0.9, 0, 0, 0, 0, 0, 0, 0, 0, 0.9, 0.0, 0.0]], dtype=DOUBLE)
    plain = TF.normalize(x, list(args.mean), list(args.std))
    assert_same(simsiam.augment(x, u, args), plain, 1e-4)  # sigma .1 is nearly the identity
    u[0, 11] = 1 - 1e-12
    blurred = TF.normalize(TF.gaussian_blur(x, [7, 7], [2.0, 2.0]), list(args.mean), list(args.std))
    assert_same(simsiam.augment(x, u, args), blurred, 5e-5)


def test_an_image_does_not_depend_on_its_batch():  # e.g. a contrast around the batch's mean
    args = settings("--recipe imagenet")
    x, u = images(10, 40) * torch.linspace(0.1, 1, 10).view(-1, 1, 1, 1), uniform(10, 12, seed=8)
    u[:, 0], u[:, 2] = 0.0, 0.05
    together = simsiam.augment(x, u, args)
    alone = torch.cat([simsiam.augment(x[i:i + 1], u[i:i + 1], args) for i in range(10)])
    assert_same(together, alone, 1e-6)
    boxes = crop_boxes(uniform(10, 23), 40, 40, 0.2)
    together = resized_crop(x, boxes, 32)
    alone = [resized_crop(x[i:i + 1], tuple(b[i:i + 1] for b in boxes), 32)
             for i in range(10)]
    assert_same(together, torch.cat(alone), 1e-6)


def stream(*key):
    """The generator of a purpose, as all runs so far have had it."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def steps(args, pixels, start=0, stop=1):
    """Crops [2 * b, 3, S, S] of each step, and the places of its images among pixels."""
    data = simsiam.Images(torch.arange(len(pixels)), pixels)
    return [step[1:] for step in simsiam.training_batches(data, start, stop, 2, args)]


def two_views(args, pixels, step=0):
    (crops, _), = steps(args, pixels, step, step + 1)
    u = draws(args.seed, "colour", step, args.batch_size, 2, 12).transpose(0, 1).flatten(0, 1)
    return simsiam.augment(crops, u, args).chunk(2)


def pictures(n, size=96):
    return (images(n, size) * 255).to(torch.uint8)


@pytest.mark.parametrize("recipe", ["imagenet", "cifar", "demo"])
def test_copies_of_one_image_become_distinct_views(recipe):
    args = settings(f"--recipe {recipe} --batch-size 64 --image-size 32")
    views = torch.cat(two_views(args, pictures(1).expand(64, -1, -1, -1)))
    gaps = torch.cdist(views.flatten(1), views.flatten(1), p=float("inf"))
    gaps.fill_diagonal_(1.0)
    assert gaps.min() > 1e-3  # 128 views, no two alike


def test_colors_alone_are_drawn_per_image():  # with the crop out of the way
    x = images(1, 24).expand(64, -1, -1, -1).contiguous()
    u = uniform(64, 9)
    y = color_jitter(x, u, STRENGTH, 0.8)
    distinct = {tuple(image.flatten().tolist()) for image in y}
    jittered = int((u[:, 0] < 0.8).sum())
    assert len(distinct) == jittered + 1  # and the untouched ones
    per_batch = color_jitter(x, u[:1].expand(64, -1), STRENGTH, 0.8)
    assert len({tuple(image.flatten().tolist()) for image in per_batch}) == 1


def test_rates_are_the_recipes():  # App. A: .8, .2, .5, flip .5; measured on what comes out
    args = settings("--recipe imagenet --mean 0 0 0 --std 1 1 1")
    u = draws(0, "colour", 0, 3000, 2, 12).flatten(0, 1)
    x = images(1, 6).expand(6000, -1, -1, -1)  # too small for a blur
    y = simsiam.augment(x, u, args)
    gray = (y.amax(1) - y.amin(1)).amax((1, 2)) < 1e-5
    colored = u.clone()
    colored[:, 9] = 0.99
    jittered = (simsiam.augment(x, colored, args) - x).abs().amax((1, 2, 3)) > 1e-5
    step = torch.zeros(6000, 3, 20, 20)  # black and white: only blur makes a third value
    step[..., 10:] = 1.0
    colored[:, 0] = 0.99
    y = simsiam.augment(step, colored, args)[:, 0, 10]
    blurred = ((y > 1e-4) & (y < 1 - 1e-4)).any(1)  # shows for sigma from .233 on
    flips = crop_boxes(draws(0, "crop", 0, 3000, 2, 23).flatten(0, 1), 32, 32, 0.2)[4]
    sharp = 0.5 * (1 - (0.233 - 0.1) / 1.9)
    for name, applied, rate in (("jitter", jittered, 0.8), ("gray", gray, 0.2),
                                ("blur", blurred, sharp), ("flip", flips, 0.5)):
        error = math.sqrt(rate * (1 - rate) / 6000)
        assert applied.double().mean().item() == pytest.approx(rate, abs=4 * error), name


def test_cifar_never_blurs():  # App. D
    args = settings("--recipe cifar")
    x, u = images(4, 40), uniform(4, 12)
    u[:, 0], u[:, 9:11] = 0.9, torch.tensor([0.9, 0.0])
    assert_same(simsiam.augment(x, u, args), TF.normalize(x, list(args.mean), list(args.std)))


def test_two_views_differ_and_the_same_draws_give_the_same_views():  # one index, two views
    args = settings("--recipe cifar --batch-size 16")
    first, second = two_views(args, pictures(16))
    assert torch.equal(first, two_views(args, pictures(16))[0])
    for other in (second, two_views(args, pictures(16), step=1)[0]):
        assert (first - other).abs().amax((1, 2, 3)).min() > 1e-2


# ------------------------------------------------------------------- what the program makes of it


def torchvision_views(pixels, crop, color, args):
    """Views [b, 2, 3, S, S] of images [b, 3, H, W], by torchvision alone."""
    views = []
    for image, boxes, colors in zip(pixels / 255, crop.tolist(), color.tolist()):
        for u, more in zip(boxes, colors):
            top, left, h, w, _ = slow_box(u, *image.shape[1:], args.crop_min)
            box = (top, left, h, w, u[22] < 0.5)
            view = torchvision_crop(image[None], [box], args.image_size)[0]
            views.append(torchvision_augment(view, more, args))
    return torch.stack(views).unflatten(0, (-1, 2))


def test_a_run_trains_on_the_views_of_its_seed_and_so_does_its_continuation(tmp_path, monkeypatch):
    flags = [*TINY, "--seed", "5", "--blur-prob", "0.5", "--out", str(tmp_path)]
    seen, train_step = [], simsiam.train_step

    def watched(model, optimizer, x1, x2, *rest):
        seen.append(torch.stack([x1, x2], 1))
        return train_step(model, optimizer, x1, x2, *rest)

    monkeypatch.setattr(simsiam, "train_step", watched)
    for stop in ("2", "4"):
        assert simsiam.main([*flags, "--steps", stop]) == 0
    pixels, args = common.demo_images(4000, 0)[0], settings(" ".join(flags))
    order = torch.randperm(4000, generator=stream(5, "order", 0))
    assert len(seen) == 4
    for step, views in enumerate(seen):
        crop, color = (torch.rand(16, 2, n, dtype=DOUBLE, generator=stream(5, name, step))
                       for name, n in (("crop", 23), ("colour", 12)))
        batch = pixels[order[16 * step:16 * step + 16]]
        assert_same(views, torchvision_views(batch, crop, color, args), 5e-5)


@pytest.mark.parametrize("n, batch", [(200, 50), (200, 200), (213, 50), (64, 2)])
def test_every_epoch_is_a_permutation(n, batch):  # the last, smaller batch is dropped
    per_epoch, args = n // batch, settings(f"--batch-size {batch} --image-size 4 --seed 3")
    pixels = pictures(n, 4)
    found = [index for _, index in steps(args, pixels, 0, 3 * per_epoch)]
    epochs = torch.stack(found).view(3, -1)
    for epoch, order in enumerate(epochs):
        expected = torch.randperm(n, generator=stream(3, "order", epoch))
        assert torch.equal(order, expected[:per_epoch * batch])
        assert order.numel() == order.unique().numel() and order.tolist() != sorted(order.tolist())
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    if n % batch:  # what one epoch drops, another takes
        assert epochs.unique().numel() > per_epoch * batch
    middle = per_epoch + per_epoch // 2  # a run that goes on there
    for a, b in zip(found[middle:], steps(args, pixels, middle, 3 * per_epoch), strict=True):
        assert torch.equal(a, b[1])


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_a_batch(world, monkeypatch):
    args, pixels = settings("--batch-size 8 --image-size 16 --seed 3"), pictures(21, 16)
    alone, parts = steps(args, pixels, 1, 4), []
    for r in range(world):
        for module in (common, simsiam):
            monkeypatch.setattr(module, "world_size", lambda: world)
            monkeypatch.setattr(module, "rank", lambda: r)
        parts.append(steps(args, pixels, 1, 4))
    for (crops, index), *shares in zip(alone, *parts, strict=True):
        assert torch.equal(torch.cat([part[1] for part in shares]), index)
        both = torch.cat([part[0].unflatten(0, (2, -1)) for part in shares], 1)
        assert torch.equal(both.flatten(0, 1), crops)


def test_every_image_leads_a_batch_at_some_time():
    args = settings("--batch-size 20 --image-size 4")
    first = torch.stack([index for _, index in steps(args, pictures(20, 4), 0, 200)])[:, 0]
    assert first.bincount(minlength=20).min() >= 1


# ------------------------------------------------------------------------------------------- draws


def test_draws_are_independent_uniform_numbers():
    u = torch.cat([draws(0, "crop", 0, 4000, 2, 23).flatten(1),
                   draws(0, "colour", 0, 4000, 2, 12).flatten(1)], 1)  # [4000, 70]
    assert u.dtype == DOUBLE and 0 <= u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1
    ranks = torch.arange(1, 4001, dtype=DOUBLE)[:, None] / 4000
    assert (u.sort(0).values - ranks).abs().max() < 2.2 / math.sqrt(4000)  # KS test per column
    off_diagonal = u.T.corrcoef() - torch.eye(70, dtype=DOUBLE)
    assert off_diagonal.abs().max() < 5 / math.sqrt(4000)  # columns, operations, views
    neighbors = torch.stack([u[:-1].flatten(), u[1:].flatten()]).corrcoef()[0, 1]
    assert abs(neighbors) < 0.01  # images


def test_all_orders_of_the_jitter_are_equally_likely():
    counts = torch.zeros(24)
    for order in draws(0, "colour", 0, 8000, 12)[:, 5:9].argsort(1).tolist():
        counts[ORDERS.index(tuple(order))] += 1
    assert ((counts - 8000 / 24).abs() < 5 * math.sqrt(8000 / 24)).all()


def test_no_number_is_drawn_twice():  # views, images, steps and seeds share none
    seen = torch.cat([draws(seed, name, step, 50, 2, n).flatten() for seed in (0, 1)
                      for step in range(6) for name, n in (("crop", 23), ("colour", 12))])
    assert seen.unique().numel() > seen.numel() * (1 - 1e-3)
