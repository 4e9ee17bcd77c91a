"""The augmentation of simsiam.py against torchvision, fed with the same random numbers.

"sheet 3" is the augmentation section of the fact sheet of arXiv 2011.10566: RandomResizedCrop of
.2 to 1, ColorJitter(.4, .4, .4, .1) with probability .8, grayscale .2, blur .5 with sigma in
(.1, 2), flip .5.
"""
import itertools
import math

import pytest
import torch
import torchvision
from torchvision.transforms.v2 import functional as TF

import dcl
import simsiam
from helpers import uniform

STRENGTH = (0.4, 0.4, 0.4, 0.1)  # sheet 3


def images(n, height, width=None, seed=0):
    """Smooth colours with noise, and the awkward pixels: black, white, grey, pure colours."""
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
    if width / height < 3 / 4:  # none of ten tries fits: a central crop
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
    boxes = torch.stack(simsiam.crop_boxes(u, height, width, crop_min), 1)
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
    u = torch.full((1, 23), 0.999, dtype=torch.float64)
    *ours, flip = simsiam.crop_boxes(u, height, width, 0.2)
    assert tuple(int(v) for v in ours) == box and not flip.item()
    assert slow_box(u[0].tolist(), height, width, 0.2) == (*box, 10)


def test_first_try_that_fits_is_taken():
    u = torch.full((10, 23), 0.999, dtype=torch.float64)  # a failing try on a square
    for row in range(10):
        u[row, row] = (0.25 - 0.2) / 0.8  # area 1/4 at try number `row`, then another one
        u[row, 10 + row] = 0.5  # aspect 1
        u[row, row + 1:10], u[row, 11 + row:20] = 0.0, 0.5
    _, _, h, w, _ = simsiam.crop_boxes(u, 80, 80, 0.2)
    assert h.tolist() == w.tolist() == [40] * 10


def test_extreme_draws_stay_inside_and_flip_is_below_one_half():
    zero, one = torch.zeros(1, 23, dtype=torch.float64), torch.ones(1, 23, dtype=torch.float64)
    one -= 2 ** -53
    mixed = torch.where(torch.arange(23) >= 20, one, zero)  # small box, last position
    u = torch.cat([zero, one, mixed])
    top, left, h, w, flip = simsiam.crop_boxes(u, 32, 48, 0.2)
    assert (top + h <= 32).all() and (left + w <= 48).all()
    assert top[0] == left[0] == 0 and top[2] + h[2] == 32 and left[2] + w[2] == 48
    assert flip.tolist() == [True, False, False]
    half = torch.full((1, 23), 0.5, dtype=torch.float64)
    assert not simsiam.crop_boxes(half, 32, 32, 0.2)[4].item()


@pytest.mark.parametrize("height, width, crop_min", [(224, 224, 0.2), (120, 200, 0.08)])
def test_crops_are_distributed_as_torchvisions(height, width, crop_min):
    n = 2000
    top, left, h, w, flip = simsiam.crop_boxes(uniform(n, 23, seed=5), height, width, crop_min)
    ours = torch.stack([top, left, h, w], 1).double()
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    get_params = torchvision.transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([get_params(image, (crop_min, 1), (3 / 4, 4 / 3)) for _ in range(n)],
                          dtype=torch.float64)

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
    assert_same(simsiam.resized_crop(x, box_tensors(boxes), size), torchvision_crop(x, boxes, size))


def test_crop_oracle_tells_aliasing_a_missing_flip_and_a_shift():
    x = images(4, 96)
    boxes = [(0, 0, 96, 96, 1), (5, 9, 60, 80, 1), (20, 1, 64, 64, 1), (0, 30, 50, 66, 1)]
    ours = simsiam.resized_crop(x, box_tensors(boxes), 24)
    assert_same(ours, torchvision_crop(x, boxes, 24))
    unflipped = [(*box[:4], 0) for box in boxes]
    shifted = [(box[0], box[1], box[2], box[3] - 1, 1) for box in boxes]
    for wrong in (torchvision_crop(x, boxes, 24, antialias=False),
                  torchvision_crop(x, unflipped, 24), torchvision_crop(x, shifted, 24)):
        assert (ours - wrong).abs().amax((1, 2, 3)).min() > 1e-2


def test_whole_box_at_the_same_size_is_the_image():
    x = images(2, 32)
    y = simsiam.resized_crop(x, box_tensors([(0, 0, 32, 32, 0), (0, 0, 32, 32, 1)]), 32)
    assert_same(y, torch.stack([x[0], x[1].flip(-1)]))


def test_crops_do_not_look_outside_their_box():
    x = torch.full((1, 3, 40, 40), 1000.0)
    x[:, :, 10:20, 12:30] = 0.25
    y = simsiam.resized_crop(x, box_tensors([(10, 12, 10, 18, 0)]), 32)
    assert_same(y, torch.full((1, 3, 32, 32), 0.25))


# ---------------------------------------------------------------------------------------- colours


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
    u = torch.empty(len(orders), 4, dtype=torch.float64)
    for row, order in zip(u, orders):
        row[torch.tensor(order)] = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    assert u.argsort(1).tolist() == [list(order) for order in orders]
    return u


@pytest.mark.parametrize("operation", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_each_colour_operation_equals_torchvisions(operation):
    strength = [0.0] * 4
    strength[operation] = 0.5 if operation == 3 else 0.9  # wider than the recipe
    x, u = images(9, 30), uniform(9, 9, seed=operation)
    u[:, 1 + operation] = torch.linspace(0, 1 - 1e-9, 9)  # from end to end
    expected = each(torchvision_jitter, x, u, strength, 1.0)
    assert_same(simsiam.color_jitter(x.clone(), u, tuple(strength), 1.0), expected)
    moved = (expected - x).abs().amax((1, 2, 3)) > 0.05
    assert moved.tolist() == [i != 4 for i in range(9)]  # the middle draw is the identity


def test_jitter_in_every_order_equals_torchvisions_sequence():  # 24 images, 24 orders, one call
    x = images(1, 30).expand(24, -1, -1, -1).contiguous()
    u = uniform(1, 9).expand(24, -1).clone()
    u[:, 0] = 0.0
    u[:, 1:5] = torch.tensor([0.95, 0.9, 0.05, 0.9])
    u[:, 5:] = order_draws(ORDERS)
    ours = simsiam.color_jitter(x.clone(), u, STRENGTH, 0.8)
    assert_same(ours, each(torchvision_jitter, x, u))
    differing = [(ours[i] - ours[j]).abs().max() > 1e-3 for i in range(24) for j in range(i)]
    assert sum(differing) > 0.8 * len(differing)  # some pairs commute
    ranks = u.clone()  # mistake: the draws' ranks taken for the order
    ranks[:, 5:] = u[:, 5:].argsort(1).argsort(1).argsort(1).double()
    assert (each(torchvision_jitter, x, ranks) - ours).abs().max() > 1e-2


def test_jitter_of_a_random_batch_equals_torchvisions():
    x, u = images(40, 30), uniform(40, 9, seed=2)
    u[0, 0], u[1, 0] = 0.8, 0.79999  # applied if u < prob
    expected = each(torchvision_jitter, x, u)
    assert_same(simsiam.color_jitter(x.clone(), u, STRENGTH, 0.8), expected)
    untouched = (u[:, 0] >= 0.8).tolist()
    assert untouched[:2] == [True, False] and 1 < sum(untouched) < 20
    assert [torch.equal(a, b) for a, b in zip(expected, x)] == untouched


def test_parameters_span_the_recipes_range():  # sheet 3: .4, .4, .4, .1
    ends = torch.tensor([0.0, 1 - 1e-12], dtype=torch.float64)
    u = torch.zeros(2, 9, dtype=torch.float64)
    u[:, 1:5] = 0.5
    brightness = u.clone()
    brightness[:, 1] = ends
    y = simsiam.color_jitter(torch.full((2, 3, 4, 4), 0.5), brightness, STRENGTH, 0.8)
    assert_same(y[:, 0, 0, 0], torch.tensor([0.5 * 0.6, 0.5 * 1.4]))
    hue = u.clone()
    hue[:, 4] = ends
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(2, 3, 4, 4).contiguous()
    y = simsiam.color_jitter(red, hue, STRENGTH, 0.8)[:, :, 0, 0]  # a tenth of the circle each way
    assert_same(y, torch.tensor([[1.0, 0.0, 0.6], [1.0, 0.6, 0.0]]))


@pytest.mark.parametrize("prob", [0.0, 0.2, 1.0])
def test_grayscale_equals_torchvisions(prob):
    x, u = images(20, 30), uniform(20, seed=4)
    u[0], u[1], u[2] = 0.0, 0.2, 1 - 2 ** -53  # applied if u < prob
    expected = torch.stack([TF.rgb_to_grayscale(image, num_output_channels=3) if v < prob else image
                            for image, v in zip(x, u.tolist())])
    assert_same(simsiam.grayscale(x.clone(), u, prob), expected)
    applied = [not torch.equal(a, b) for a, b in zip(expected, x)]
    assert applied[:3] == [prob > 0, prob > 0.2, prob == 1]


@pytest.mark.parametrize("size", [10, 20, 32, 64, 96, 224])
def test_blur_equals_torchvisions_at_the_same_kernel_and_sigma(size):  # B20: sigma, not the size
    n = 2 if size == 224 else 8
    x, u = images(n, size), uniform(n, 2, seed=size)
    u[0] = torch.tensor([0.0, 0.999])
    u[1] = torch.tensor([0.5, 0.9])  # not below the probability
    low, high = 0.1, 2.0  # sheet 3
    taps = 2 * (size // 20) + 1  # 23 at 224

    def blur(image, u):
        sigma = low + (high - low) * u[1]
        return TF.gaussian_blur(image, [taps, taps], [sigma, sigma]) if u[0] < 0.5 else image

    expected = each(blur, x, u)
    ours = simsiam.gaussian_blur(x.clone(), u, 0.5, sigma=(low, high))
    assert_same(ours, expected)
    assert torch.equal(ours[1], x[1])
    assert torch.equal(ours[0], x[0]) == (taps == 1)


def test_normalize_equals_torchvisions():
    x = images(3, 30)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = TF.normalize(x, list(mean), list(std))
    assert_same(simsiam.normalize(x, mean, std), expected)


@pytest.mark.parametrize("operation, draws, rest", [
    (simsiam.color_jitter, (6, 9), (STRENGTH, 1.0)), (simsiam.grayscale, (6,), (1.0,)),
    (simsiam.gaussian_blur, (6, 2), (1.0, (0.1, 2.0))),
    (simsiam.resized_crop, None, (20,))], ids=lambda value: getattr(value, "__name__", ""))
def test_operations_leave_their_input_alone_or_say_so(operation, draws, rest):
    x = images(6, 40)
    before = x.clone()
    u = box_tensors([(0, 0, 40, 40, 1)] * 6) if draws is None else uniform(*draws)
    assert not torch.equal(operation(x, u, *rest)[:, :, :20, :20], before[:, :, :20, :20])
    assert torch.equal(x, before) or "in place" in operation.__doc__


# -------------------------------------------------------------------------------- the whole recipe


def torchvision_augment(image, u, args):
    """u: 9 for the jitter, 1 for the grayscale, 2 for the blur; then normalisation (sheet 3)."""
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
    args = script.parse_args(flags.split())
    x, u = images(48, 40), uniform(48, 12, seed=6)
    before = x.clone()
    ours = script.augment(x, u, args)
    assert_same(ours, each(torchvision_augment, x, u, args), 5e-5)  # 1e-5 over the smallest std
    assert torch.equal(x, before)
    assert torch.equal(ours, script.augment(x, u, args))  # same draws, same result


def test_default_sigma_and_probabilities_are_the_papers():  # sheet 3, beside the oracle above
    args = simsiam.parse_args(["--recipe", "imagenet"])
    x = images(1, 60)
    u = torch.tensor([[0.9, 0, 0, 0, 0, 0, 0, 0, 0, 0.9, 0.0, 0.0]], dtype=torch.float64)
    plain = TF.normalize(x, list(args.mean), list(args.std))
    assert_same(simsiam.augment(x, u, args), plain, 1e-4)  # sigma .1 is nearly the identity
    u[0, 11] = 1 - 1e-12
    blurred = TF.normalize(TF.gaussian_blur(x, [7, 7], [2.0, 2.0]), list(args.mean), list(args.std))
    assert_same(simsiam.augment(x, u, args), blurred, 5e-5)


def test_an_image_does_not_depend_on_its_batch():  # e.g. a contrast around the batch's mean
    args = simsiam.parse_args(["--recipe", "imagenet"])
    x, u = images(10, 40) * torch.linspace(0.1, 1, 10).view(-1, 1, 1, 1), uniform(10, 12, seed=8)
    u[:, 0], u[:, 2] = 0.0, 0.05
    together = simsiam.augment(x, u, args)
    alone = torch.cat([simsiam.augment(x[i:i + 1], u[i:i + 1], args) for i in range(10)])
    assert_same(together, alone, 1e-6)
    boxes = simsiam.crop_boxes(uniform(10, 23), 40, 40, 0.2)
    together = simsiam.resized_crop(x, boxes, 32)
    alone = [simsiam.resized_crop(x[i:i + 1], tuple(b[i:i + 1] for b in boxes), 32)
             for i in range(10)]
    assert_same(together, torch.cat(alone), 1e-6)


def two_views(args, x, step=0):
    """Both views of a batch as the program makes them: draw, crop, colour."""
    _, crops, colours = simsiam.draw_step(args, len(x), step, 2)
    views = []
    for view in range(2):
        boxes = simsiam.crop_boxes(crops[:, view], *x.shape[2:], args.crop_min)
        y = simsiam.resized_crop(x, boxes, args.image_size)
        views.append(simsiam.augment(y, colours[:, view], args))
    return views


@pytest.mark.parametrize("recipe", ["imagenet", "cifar", "demo"])
def test_copies_of_one_image_become_distinct_views(recipe):  # B8
    args = simsiam.parse_args(["--recipe", recipe, "--batch-size", "64", "--image-size", "32"])
    views = torch.cat(two_views(args, images(1, 96).expand(64, -1, -1, -1).contiguous()))
    gaps = torch.cdist(views.flatten(1), views.flatten(1), p=float("inf"))
    gaps.fill_diagonal_(1.0)
    assert gaps.min() > 1e-3  # 128 views, no two alike


def test_colours_alone_are_drawn_per_image():  # B8, with the crop out of the way
    x = images(1, 24).expand(64, -1, -1, -1).contiguous()
    u = uniform(64, 9)
    y = simsiam.color_jitter(x, u, STRENGTH, 0.8)
    distinct = {tuple(image.flatten().tolist()) for image in y}
    jittered = int((u[:, 0] < 0.8).sum())
    assert len(distinct) == jittered + 1  # and the untouched ones
    per_batch = simsiam.color_jitter(x, u[:1].expand(64, -1), STRENGTH, 0.8)
    assert len({tuple(image.flatten().tolist()) for image in per_batch}) == 1


def test_rates_are_the_recipes():  # sheet 3: .8, .2, .5, flip .5; measured on what comes out
    args = simsiam.parse_args(["--recipe", "imagenet", "--batch-size", "3000", "--mean", "0", "0",
                               "0", "--std", "1", "1", "1"])
    _, crops, colours = simsiam.draw_step(args, 3000, 0, 2)
    u = colours.flatten(0, 1)
    x = images(1, 6).expand(6000, -1, -1, -1)  # too small for a blur
    y = simsiam.augment(x, u, args)
    gray = (y.amax(1) - y.amin(1)).amax((1, 2)) < 1e-5
    coloured = u.clone()
    coloured[:, 9] = 0.99
    jittered = (simsiam.augment(x, coloured, args) - x).abs().amax((1, 2, 3)) > 1e-5
    step = torch.zeros(6000, 3, 20, 20)  # black and white: only blur makes a third value
    step[..., 10:] = 1.0
    coloured[:, 0] = 0.99
    y = simsiam.augment(step, coloured, args)[:, 0, 10]
    blurred = ((y > 1e-4) & (y < 1 - 1e-4)).any(1)  # shows for sigma from .233 on
    flips = simsiam.crop_boxes(crops.flatten(0, 1), 32, 32, 0.2)[4]
    sharp = 0.5 * (1 - (0.233 - 0.1) / 1.9)
    for name, applied, rate in (("jitter", jittered, 0.8), ("gray", gray, 0.2),
                                ("blur", blurred, sharp), ("flip", flips, 0.5)):
        error = math.sqrt(rate * (1 - rate) / 6000)
        assert applied.double().mean().item() == pytest.approx(rate, abs=4 * error), name


def test_cifar_never_blurs():  # App. D
    args = simsiam.parse_args(["--recipe", "cifar"])
    x, u = images(4, 40), uniform(4, 12)
    u[:, 0], u[:, 9:11] = 0.9, torch.tensor([0.9, 0.0])
    assert_same(simsiam.augment(x, u, args), TF.normalize(x, list(args.mean), list(args.std)))


# ------------------------------------------------------------------------------------------- draws


def draws(seed=0, batch=50, n=200, step=0, view=2):
    args = simsiam.parse_args(["--seed", str(seed), "--batch-size", str(batch)])
    return simsiam.draw_step(args, n, step, view)


def same(a, b):
    return [torch.equal(x, y) for x, y in zip(a, b)]


def test_draws_are_independent_uniform_numbers():
    _, crops, colours = draws(batch=4000, n=4000)
    assert crops.shape == (4000, 2, 23) and colours.shape == (4000, 2, 12)
    u = torch.cat([crops.flatten(1), colours.flatten(1)], 1)  # [4000, 70]
    assert crops.dtype == colours.dtype == torch.float64
    assert 0 <= u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1
    ranks = torch.arange(1, 4001, dtype=torch.float64)[:, None] / 4000
    assert (u.sort(0).values - ranks).abs().max() < 2.2 / math.sqrt(4000)  # KS test per column
    off_diagonal = u.T.corrcoef() - torch.eye(70, dtype=torch.float64)
    assert off_diagonal.abs().max() < 5 / math.sqrt(4000)  # columns, operations, views
    neighbours = torch.stack([u[:-1].flatten(), u[1:].flatten()]).corrcoef()[0, 1]
    assert abs(neighbours) < 0.01  # images


def test_all_orders_of_the_jitter_are_equally_likely():
    colours = draws(batch=4000, n=4000)[2].flatten(0, 1)
    counts = torch.zeros(24)
    for order in colours[:, 5:9].argsort(1).tolist():
        counts[ORDERS.index(tuple(order))] += 1
    assert ((counts - 8000 / 24).abs() < 5 * math.sqrt(8000 / 24)).all()


@pytest.mark.parametrize("n, batch", [(200, 50), (200, 200), (213, 50), (64, 1)])
def test_every_epoch_is_a_permutation(n, batch):  # B18; the last, smaller batch is dropped
    steps = n // batch
    epochs = [torch.cat([draws(batch=batch, n=n, step=epoch * steps + i)[0] for i in range(steps)])
              for epoch in range(3)]
    for order in epochs:
        assert order.numel() == steps * batch == order.unique().numel()
        assert 0 <= order.min() and order.max() < n
        if n % batch == 0:
            assert order.sort().values.tolist() == list(range(n))
        assert order.tolist() != sorted(order.tolist())
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    if n % batch:  # what one epoch drops, another takes
        assert torch.cat(epochs).unique().numel() > steps * batch


def test_every_image_leads_a_batch_at_some_time():
    first = torch.stack([draws(batch=20, n=20, step=step)[0] for step in range(200)])[:, 0]
    assert first.bincount(minlength=20).min() >= 1


def test_draws_depend_on_seed_and_step_alone():
    state = torch.get_rng_state()
    once = draws(seed=3, step=7)
    assert torch.equal(state, torch.get_rng_state())  # and disturb no other generator
    torch.manual_seed(99)
    draws(seed=5, step=2)
    assert same(once, draws(seed=3, step=7)) == [True] * 3
    assert same(once, draws(seed=3, step=8)) == [False] * 3
    assert same(once, draws(seed=4, step=7)) == [False] * 3
    assert same(draws(seed=0, step=1), draws(seed=1, step=0)) == [False] * 3  # not seed + step
    assert same(draws(seed=0, step=4), draws(seed=0, step=0)) == [False] * 3  # another epoch


def test_no_number_is_drawn_twice():  # views, images, steps and seeds share none
    seen = [torch.cat([x.flatten() for x in draws(seed=seed, step=step)[1:]])
            for seed in (0, 1) for step in range(6)]
    seen = torch.cat(seen)
    assert seen.unique().numel() > seen.numel() * (1 - 1e-3)


def test_two_views_differ_and_the_same_draws_give_the_same_views():  # B25: one index, two views
    args = simsiam.parse_args(["--recipe", "cifar", "--batch-size", "16"])
    x = images(16, 96)
    first, second = two_views(args, x)
    again, _ = two_views(args, x)
    assert torch.equal(first, again)
    assert (first - second).abs().amax((1, 2, 3)).min() > 1e-2
    assert (first - two_views(args, x, step=1)[0]).abs().amax((1, 2, 3)).min() > 1e-2
