"""The building blocks in common.py against independent oracles: torchvision, formulas, slow loops.

Several processes: W = 1, 2 and 4 real gloo processes, started once for all cases, against one
process on the whole batch, in float64.
"""
import copy
import io
import math
import random
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

import common
from common import (
    LARS, SyncBatchNorm, all_gather, demo_images, draws, gather_with_grad, generator, knn_accuracy,
    resnet, sync_batch_norm, to_device)
from conftest import ROOT, on_ranks
from helpers import DOUBLE, Gather, count

# ------------------------------------------------------------------------------ ResNets

BLOCKS = {  # He et al. 2016 (1512.03385), table 1; 200 from 1603.05027, section 4; 10 is ours
    10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3),
    101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3),
}


def backbone_count(depth, width=1, stem=7):
    """Parameters of convolutions and batch norms, from the widths in table 1."""
    def conv(i, o, k):  # with its batch norm
        return i * o * k * k + 2 * o

    inputs = int(64 * width)
    total = conv(3, inputs, stem)
    for stage, blocks in enumerate(BLOCKS[depth]):
        inner = int(64 * width) * 2**stage
        outputs = inner if depth < 50 else 4 * inner
        for block in range(blocks):
            if depth < 50:
                total += conv(inputs, inner, 3) + conv(inner, inner, 3)
            else:
                total += conv(inputs, inner, 1) + conv(inner, inner, 3) + conv(inner, outputs, 1)
            if block == 0 and (stage > 0 or inputs != outputs):
                total += conv(inputs, outputs, 1)  # projection shortcut
            inputs = outputs
    return total


def on_meta(make, *args, **kwargs):
    with torch.device("meta"):
        return make(*args, **kwargs)


def torchvision_resnet(depth):
    return getattr(pytest.importorskip("torchvision").models, f"resnet{depth}")


def randomized(model, seed=0):
    """Fresh batch norms are nearly the identity, which would hide a wrong one: move them off it."""
    g = torch.Generator().manual_seed(seed)
    for name, t in model.state_dict().items():
        if t.is_floating_point() and t.ndim == 1:
            low = -0.2 if name.endswith(("bias", "running_mean")) else 0.5
            t.copy_(torch.rand(t.shape, generator=g, dtype=t.dtype) * (1 if low > 0 else 0.4) + low)
    return model


def layer4_output(model, images):
    shapes = []
    model.layer4.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    features = model(images)
    assert features.shape == (len(images), model.feature_dim)
    return tuple(shapes[0])


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_features_equal_torchvisions_with_the_same_weights(depth):
    ours, theirs = randomized(resnet(depth)), on_meta(torchvision_resnet(depth))
    state = {k: v.clone() for k, v in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False, assign=True)
    assert set(missing) == {"fc.weight", "fc.bias"} and unexpected == []
    theirs.fc = nn.Identity()
    images = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for mode in (True, False):  # train first: then eval sees new running statistics
            a, b = ours.train(mode)(images), theirs.train(mode)(images)
            assert a.shape == (3, ours.feature_dim) and b.std() > 0.01
            assert (a - b).abs().max() < 1e-5 * b.abs().max()
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_layers_are_torchvisions_with_only_the_classifier_missing(depth):
    ours, theirs = on_meta(resnet, depth), on_meta(torchvision_resnet(depth))
    assert ours.feature_dim == theirs.fc.in_features
    del theirs.fc
    shapes, settings = zip(*(
        ([(k, v.shape, v.dtype) for k, v in m.state_dict().items()],
         {k: repr(x) for k, x in m.named_modules() if isinstance(x, (nn.Conv2d, nn.BatchNorm2d))})
        for m in (ours, theirs)))
    assert shapes[0] == shapes[1]
    assert settings[0] == settings[1]  # stride (on the 3x3), padding, bias, eps, momentum


@pytest.mark.parametrize("depth", BLOCKS)
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("small", [False, True])
def test_parameter_counts_follow_the_formula(depth, width, small):
    model = on_meta(resnet, depth, width, small_images=small)
    assert count(model) == backbone_count(depth, width, stem=3 if small else 7)
    assert model.feature_dim == (512 if depth < 50 else 2048) * width


def test_parameter_counts_are_the_published_ones():
    # torchvision's counts less the classifier; resnet200 is 64.7 M with it, as in timm
    assert count(on_meta(resnet, 18)) == 11_689_512 - 513_000
    assert count(on_meta(resnet, 34)) == 21_797_672 - 513_000
    assert count(on_meta(resnet, 50)) == 25_557_032 - 2_049_000 == 23_508_032
    assert count(on_meta(resnet, 101)) == 44_549_160 - 2_049_000
    assert count(on_meta(resnet, 152)) == 60_192_808 - 2_049_000
    assert round((count(on_meta(resnet, 200)) + 2_049_000) / 1e5) == 647


@pytest.mark.parametrize("depth, width, millions", [(50, 1, 24), (50, 2, 94), (50, 4, 375),
                                                    (200, 2, 250)])
def test_wide_networks_have_byols_size(depth, width, millions):  # BYOL, table 1
    assert round(count(on_meta(resnet, depth, width)) / 1e6) == millions


@pytest.mark.parametrize("depth, width, millions", [
    (50, 1, 24), (50, 2, 94), (101, 1, 43), (101, 2, 170), (152, 1, 58), (152, 2, 233)])
def test_wide_networks_have_simclr_v2s_size(depth, width, millions):
    # SimCLR v2, table 1 (without SK), whose numbers include the running statistics
    state = on_meta(resnet, depth, width).state_dict().values()
    assert round(sum(v.numel() for v in state if v.is_floating_point()) / 1e6) == millions


@pytest.mark.parametrize("depth, last", [(10, 2), (18, 2), (50, 3)])
def test_zero_init_residual_zeroes_the_last_norm_of_each_block_and_nothing_else(depth, last):
    states = []
    for zero in (False, True):
        torch.manual_seed(0)
        states.append(resnet(depth, 0.25, zero_init_residual=zero).state_dict())
    plain, zeroed = states
    pattern = rf"layer[1-4]\.\d+\.bn{last}\.weight"
    changed = {k for k in plain if not torch.equal(plain[k], zeroed[k])}
    assert changed == {k for k in plain if re.fullmatch(pattern, k)}
    assert len(changed) == sum(BLOCKS[depth]) and all((zeroed[k] == 0).all() for k in changed)
    assert all((plain[k] == 1).all() for k in changed)


@pytest.mark.parametrize("depth, width, channels", [(18, 0.5, 256), (10, 1, 512), (50, 0.25, 512)])
def test_small_images_keep_4x4_features_of_32_pixels(depth, width, channels):
    images = torch.randn(2, 3, 32, 32)
    model = resnet(depth, width, small_images=True)  # SimCLR, appendix B.9: 3x3 stem, no pooling
    stem = model.conv1
    assert (stem.kernel_size, stem.stride, stem.padding) == ((3, 3), (1, 1), (1, 1))
    assert stem.bias is None
    assert layer4_output(model, images) == (2, channels, 4, 4)
    assert layer4_output(resnet(depth, width), images) == (2, channels, 1, 1)
    differing = {k for k, v in resnet(depth, width).state_dict().items()
                 if v.shape != model.state_dict()[k].shape}
    assert differing == {"conv1.weight"}


def test_features_are_the_spatial_mean_of_layer4():
    model, maps = resnet(10, 0.25, small_images=True).eval(), []
    model.layer4.register_forward_hook(lambda module, inputs, output: maps.append(output))
    features = model(torch.randn(2, 3, 40, 24))
    assert maps[0].shape == (2, 128, 5, 3)
    torch.testing.assert_close(features, maps[0].mean((2, 3)))


@pytest.mark.parametrize("depth, dim", [(10, 128), (18, 128), (50, 512)])
def test_width_may_be_a_fraction(depth, dim):
    model = resnet(depth, 0.25)
    assert model.conv1.out_channels == 16 and model.feature_dim == dim
    assert count(model) == backbone_count(depth, 0.25)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, dim)


@pytest.mark.parametrize("args", [
    *((depth,) for depth in (0, 9, 19, 51, 1000, -50)),
    *((18, width) for width in (0.124, 0.0625, 0.0, -1.0, float("nan"))),
    *((depth, 1, 0.0625) for depth in (10, 18, 34))], ids=str)
def test_an_unknown_depth_a_narrow_one_and_selective_kernels_in_basic_blocks_are_errors(args):
    with pytest.raises(ValueError):
        resnet(*args)
    assert resnet(50, 0.125).conv1.out_channels == 8  # the minimum


def test_options_beyond_the_design_must_be_named():
    with pytest.raises(TypeError):
        resnet(18, 1, 0.0, True, True)


# --------------------------------------------------------------------------------- LARS

SHAPES = [(3, 4), (5,), (2, 3, 2, 2), (1,), (4, 1)]
LRS = [0.1, 0.3, 0.6, 0.2, 0.05]


def tensors(seed, shapes=SHAPES):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]


def loop_lars(weights, gradients, lrs, weight_decay=0.0, momentum=0.9, trust_coefficient=0.001,
              lr_in_momentum=False, exclude_1d=True, sum_of_norms=False):
    """LARS in plain floats. gradients[step][parameter]; `sum_of_norms`: a known mistake."""
    def norm(v):
        return math.sqrt(sum(x * x for x in v))

    result = []
    for index, weight in enumerate(weights):
        w = weight.flatten().tolist()
        b = [0.0] * len(w)
        for step, lr in enumerate(lrs):
            g = gradients[step][index].flatten().tolist()
            u, r = g, 1.0
            if weight.ndim > 1 or not exclude_1d:
                u = [gi + weight_decay * wi for gi, wi in zip(g, w)]
                below = norm(g) + weight_decay * norm(w) if sum_of_norms else norm(u)
                if trust_coefficient is not None and norm(w) > 0 and below > 0:
                    r = trust_coefficient * norm(w) / below
            for i in range(len(w)):
                b[i] = momentum * b[i] + (lr * r * u[i] if lr_in_momentum else r * u[i])
                w[i] -= b[i] if lr_in_momentum else lr * b[i]
        result.append(torch.tensor(w, dtype=torch.float64).reshape(weight.shape))
    return result


def steps(optimizer, params, gradients, lrs):
    for grads, lr in zip(gradients, lrs):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p, g in zip(params, grads):
            p.grad = None if g is None else g.clone()
        optimizer.step()
    return [p.detach() for p in params]


def run_lars(weights, gradients, lrs, **options):
    params = [nn.Parameter(w.clone()) for w in weights]
    return steps(LARS(params, lr=lrs[0], **options), params, gradients, lrs)


def distance(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b))


WEIGHTS, GRADIENTS = tensors(0), [tensors(1 + step) for step in range(len(LRS))]
RECIPE = dict(weight_decay=0.1, momentum=0.8, trust_coefficient=0.05)


@pytest.mark.parametrize("lr_in_momentum", [False, True])
@pytest.mark.parametrize("exclude_1d", [True, False])
@pytest.mark.parametrize("recipe", [RECIPE, {}, dict(weight_decay=1e-6, momentum=0.0),
                                    dict(RECIPE, trust_coefficient=None)], ids=str)
def test_lars_equals_a_loop_over_floats(lr_in_momentum, exclude_1d, recipe):
    # You et al. 2017 (1708.03888), algorithm 1; 1-d parameters as BYOL, section 3.3
    options = dict(recipe, lr_in_momentum=lr_in_momentum, exclude_1d=exclude_1d)
    fast = run_lars(WEIGHTS, GRADIENTS, LRS, **options)
    assert distance(fast, loop_lars(WEIGHTS, GRADIENTS, LRS, **options)) < 1e-12
    # The oracle sees the mistakes that matter
    for mistake in (dict(exclude_1d=not exclude_1d), dict(lr_in_momentum=not lr_in_momentum),
                    dict(trust_coefficient=0.002), dict(momentum=0.7),
                    # lightning-bolts, solo-learn and lightly divide by |g| + wd |w|
                    *[dict(sum_of_norms=True)] * (recipe is RECIPE)):
        if not (recipe.get("momentum") == 0.0 and "lr_in_momentum" in mistake):
            other = loop_lars(WEIGHTS, GRADIENTS, LRS, **{**options, **mistake})
            assert distance(fast, other) > 1e-5


def test_both_places_of_the_learning_rate_agree_until_it_changes():
    both = [dict(RECIPE, lr_in_momentum=v) for v in (False, True)]
    for lrs, same in ([0.2] * 5, True), (LRS, False):
        a, b = (run_lars(WEIGHTS, GRADIENTS, lrs, **options) for options in both)
        assert (distance(a, b) < 1e-12) is same
    assert distance(a, b) > 1e-3


def test_a_step_takes_a_closure_returns_its_loss_and_leaves_gradients_alone():
    plain, g = run_lars(WEIGHTS, GRADIENTS[:1], LRS[:1], **RECIPE), GRADIENTS[0]
    params = [nn.Parameter(w.clone()) for w in WEIGHTS]
    optimizer = LARS(params, lr=LRS[0], **RECIPE)

    def closure():
        optimizer.zero_grad()
        loss = sum((p * x).sum() for p, x in zip(params, g))
        loss.backward()
        return loss

    with torch.no_grad():  # the closure has gradients nevertheless
        loss = optimizer.step(closure)
    assert loss.item() == pytest.approx(sum((w * x).sum().item() for w, x in zip(WEIGHTS, g)))
    assert distance([p.detach() for p in params], plain) == 0
    assert all(torch.equal(p.grad, x) for p, x in zip(params, g))
    assert optimizer.step() is None


@pytest.mark.parametrize("lr_in_momentum, expected", [(False, [[2.28, -1.96]]),
                                                      (True, [[2.28, -2.96]])])
def test_two_steps_of_lars_equal_those_by_hand(lr_in_momentum, expected):
    # Step 1, lr 1: u = (-3, 8) + (3, 4) = (0, 12); r = 0.8 * 5 / 12 = 1/3; b = (0, 4); w = (3, 0)
    # Step 2, lr 1/2: u = (0, 4) + (3, 0) = (3, 4); r = 0.8 * 3 / 5 = 0.48; r u = (1.44, 1.92)
    #   lr outside: b = (0, 2) + (1.44, 1.92) = (1.44, 3.92); w = (3, 0) - b / 2
    #   lr inside:  b = (0, 2) + (0.72, 0.96) = (0.72, 2.96); w = (3, 0) - b
    w, g1, g2 = torch.tensor([[[3, 4]], [[-3, 8]], [[0, 4]]], dtype=torch.float64)
    w, = run_lars([w], [[g1], [g2]], [1.0, 0.5], weight_decay=1.0, momentum=0.5,
                  trust_coefficient=0.8, lr_in_momentum=lr_in_momentum)
    torch.testing.assert_close(w, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("lr_in_momentum", [False, True])
def test_zero_norms_switch_the_adaptation_off(lr_in_momentum):
    options = dict(trust_coefficient=0.05, lr_in_momentum=lr_in_momentum)
    zero, w, g = torch.zeros(2, 3).double(), *tensors(3, [(2, 3), (2, 3)])
    # Zero weights take the raw gradient, zero gradients without decay change nothing
    for decay in (0.0, 0.1):
        moved, = run_lars([zero], [[g]], [0.2], weight_decay=decay, **options)
        torch.testing.assert_close(moved, -0.2 * g)
    still, both = run_lars([w, zero], [[zero, zero]] * 2, [0.2] * 2, **options)
    assert torch.equal(still, w) and torch.equal(both, zero)
    # With decay the update is wd * w; its size drops out: w shrinks by lr * trust
    shrunk, = run_lars([w], [[zero]], [0.2], weight_decay=0.1, **options)
    torch.testing.assert_close(shrunk, w * (1 - 0.2 * 0.05))


@pytest.mark.parametrize("lr_in_momentum", [False, True])
def test_1d_parameters_get_plain_momentum_sgd(lr_in_momentum):  # BYOL, section 3.3
    shapes = [(5,), (1,)]
    weights, grads = tensors(4, shapes), [tensors(5 + i, shapes) for i in range(4)]
    ours = run_lars(weights, grads, [0.2] * 4, **RECIPE, lr_in_momentum=lr_in_momentum)
    params = [nn.Parameter(w.clone()) for w in weights]
    sgd = steps(torch.optim.SGD(params, lr=0.2, momentum=0.8), params, grads, [0.2] * 4)
    assert distance(ours, sgd) < 1e-12 and distance(ours, weights) > 0.1


def test_without_exclusion_it_is_apex_larc_as_in_simsiams_linear_probe():
    # LARC(clip=False, trust 0.001) around SGD, weight decay 0: SimSiam, appendix A
    weights, grads = tensors(6, [(4, 6), (4,)]), [tensors(7 + i, [(4, 6), (4,)]) for i in range(4)]
    weights[1].zero_()
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = torch.optim.SGD(params, lr=0.2, momentum=0.9)
    for step, (lr, gs) in enumerate(zip(LRS, grads)):
        optimizer.param_groups[0]["lr"] = lr
        for p, g in zip(params, gs):
            if p.norm() != 0 and g.norm() != 0:
                g = g * 0.001 * p.detach().norm() / g.norm()
            p.grad = g.clone()
        optimizer.step()
        if step == 0:  # a zero-initialized bias takes one raw step
            torch.testing.assert_close(params[1].detach(), -LRS[0] * grads[0][1])
        ours = run_lars(weights, grads[:step + 1], LRS[:step + 1], exclude_1d=False)
        assert distance(ours, [p.detach() for p in params]) < 1e-12
    assert distance(ours, run_lars(weights, grads, LRS)) > 1e-3


def test_parameters_without_gradient_are_skipped():
    # The middle one is frozen in all steps but the last: then its momentum starts from zero
    weights, grads = tensors(8), [tensors(9 + step) for step in range(3)]
    grads[0][2] = grads[1][2] = None
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = LARS(params, lr=0.1, **RECIPE)
    before = steps(optimizer, params, grads[:2], LRS[:2])
    assert torch.equal(before[2], weights[2])
    after = steps(optimizer, params, grads[2:], LRS[2:3])
    for i in range(len(SHAPES)):
        late = 2 if i == 2 else 0
        expected = loop_lars([weights[i]], [[g[i]] for g in grads[late:]], LRS[late:3], **RECIPE)
        assert distance([after[i]], expected) < 1e-12
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert distance(after, [p.detach() for p in params]) == 0


@pytest.mark.parametrize("lr_in_momentum", [False, True])
def test_a_saved_optimizer_continues_identically(lr_in_momentum):
    options = dict(RECIPE, lr_in_momentum=lr_in_momentum)
    straight = run_lars(WEIGHTS, GRADIENTS, LRS, **options)
    params = [nn.Parameter(w.clone()) for w in WEIGHTS]
    first = LARS(params, lr=LRS[0], **options)
    steps(first, params, GRADIENTS[:2], LRS)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    params = [nn.Parameter(p.detach().clone()) for p in params]
    second = LARS(params, lr=123.0)  # options, too, come from the file
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.param_groups[0]["lr"] == LRS[1]
    resumed = steps(second, params, GRADIENTS[2:], LRS[2:])
    assert distance(straight, resumed) == 0
    fresh = steps(LARS(params, lr=1.0, **options), params, GRADIENTS[:1], LRS)
    assert distance(fresh, resumed) == 0 and distance(WEIGHTS, resumed) > 0.1


def test_parameter_groups_keep_their_own_settings():
    weights, grads = tensors(12), [tensors(13 + i) for i in range(3)]
    params = [nn.Parameter(w.clone()) for w in weights]
    own = [dict(lr=0.1), dict(lr=0.5, weight_decay=0.3),
           dict(lr=0.2, exclude_1d=False, momentum=0.5, lr_in_momentum=True)]
    members = [[0, 1], [2], [3, 4]]
    optimizer = LARS([dict(params=[params[i] for i in m], **o) for m, o in zip(members, own)],
                     lr=9.0, **RECIPE)
    for gs in grads:
        for p, g in zip(params, gs):
            p.grad = g.clone()
        optimizer.step()
    for m, o in zip(members, own):
        options = {**RECIPE, **o}
        lr = options.pop("lr")
        expected = loop_lars([weights[i] for i in m], [[g[i] for i in m] for g in grads],
                             [lr] * 3, **options)
        assert distance([params[i].detach() for i in m], expected) < 1e-12


# -------------------------------------------------------------------------- several processes

IMAGES, VECTORS = (8, 3, 4, 5), (8, 6)  # of all processes together
CASES = {  # name: shape, arguments of the batch norm, what else is special
    "images": (IMAGES, {}, {}),
    "vectors": (VECTORS, {}, {}),
    "one vector in each of four": ((4, 6), {}, {}),
    "sequences": ((8, 3, 7), {}, {}),
    "channels_last": (IMAGES, {}, dict(memory_format=torch.channels_last)),
    "other momentum and eps": (VECTORS, dict(momentum=0.3, eps=0.1), {}),
    "not affine": (VECTORS, dict(affine=False), {}),
    "no running statistics": (IMAGES, dict(track_running_stats=False), {}),
    "neither": (VECTORS, dict(affine=False, track_running_stats=False), {}),
    "input without gradient": (IMAGES, {}, dict(input_grad=False)),
    "frozen weights": (IMAGES, {}, dict(frozen=True)),
    "bfloat16": (IMAGES, {}, dict(dtype=torch.bfloat16, offset=30.0)),
    "far from zero": (IMAGES, {}, dict(dtype=torch.float32, offset=4000.0)),
}
EXACT = [name for name, case in CASES.items() if "dtype" not in case[2]]
FAULTS = ["none", "local", "local gradient", "detached", "biased", "mean of variances"]
GATHERS = ["none", "no gradient", "local slice", "times W"]  # mistakes of helpers.Gather


def batch_norm(shape, kwargs, special):
    torch.manual_seed(0)
    bn = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1], **kwargs)
    for t in bn.state_dict().values():
        if t.is_floating_point():
            t.uniform_(0.5, 1.5)
    for p in bn.parameters():
        p.requires_grad_(not special.get("frozen", False))
    return bn if "dtype" in special else bn.double()


def three_batches(shape, special):
    g = torch.Generator().manual_seed(1)
    data = [torch.randn(shape, generator=g, dtype=DOUBLE) * 2 for _ in range(3)]
    data = [(x + special.get("offset", 0.7)).to(special.get("dtype")) for x in data]
    return [x.to(memory_format=special.get("memory_format", torch.contiguous_format)) for x in data]


def loss_of(y, coefficients):  # mean over the images of something whose slope depends on y
    y = y.double()
    return (coefficients * y.sin() + y.pow(3) / 30).mean()


def record(bn, batches, rows, world, special, alone):
    """What one rank sees: two training steps, one without gradient, evaluation of `alone`."""
    seen, want = {}, special.get("input_grad", True)
    coefficients = torch.linspace(-1, 2, batches[0].numel(), dtype=DOUBLE)
    coefficients = coefficients.reshape(batches[0].shape)[rows]
    for step in range(2):
        x = batches[step][rows].clone().requires_grad_(want)
        y = bn(x)
        if y.requires_grad:
            loss_of(y, coefficients).backward()
        seen[f"rows y{step}"] = y.detach()
        if want:
            seen[f"rows dx{step}"] = x.grad / world
    with torch.no_grad():
        seen["rows y2"] = bn(batches[2][rows])
    seen |= {f"mean d{k}": p.grad.clone() for k, p in bn.named_parameters() if p.requires_grad}
    seen |= {f"each {k}": b.clone() for k, b in bn.named_buffers() if b is not None}
    if alone is not None:
        x = batches[0][alone].clone().requires_grad_()
        y = bn.eval()(x)
        loss_of(y, coefficients[:len(x)]).backward()
        seen |= {"first eval y": y.detach(), "first eval dx": x.grad}
        seen |= {f"first eval {k}": b.clone() for k, b in bn.named_buffers() if b is not None}
    return seen


class Slow(nn.BatchNorm2d):
    """Global batch norm from a mean over ranks with its gradient, and one known fault in it."""

    def forward(self, x):
        if not self.training or self.fault == "local":
            return super().forward(x)

        def over_ranks(t):  # of all images, with the gradient of all ranks' losses
            which = "local slice" if self.fault == "local gradient" else "none"
            return Gather.apply(t.mean((0, 2, 3))[None], which).mean(0)

        def shaped(t):
            return t[None, :, None, None]

        count = dist.get_world_size() * x.numel() / x.shape[1]
        mean = over_ranks(x)
        center = x.mean((0, 2, 3)) if self.fault == "mean of variances" else mean
        var = over_ranks((x - shaped(center)).square())
        if self.fault == "detached":
            mean, var = mean.detach(), var.detach()
        with torch.no_grad():
            unbiased = var if self.fault == "biased" else var * count / (count - 1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
            self.num_batches_tracked += 1
        normal = (x - shaped(mean)) * shaped((var + self.eps).rsqrt())
        return normal * shaped(self.weight) + shaped(self.bias)


class TwoViews(nn.Module):
    """A SimSiam-like loss: convolution and dense layers, one forward pass per view."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 5, 2), nn.BatchNorm2d(5),
            nn.Flatten(), nn.Linear(10, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6),
            nn.BatchNorm1d(6, affine=False)).double()

    def forward(self, a, b, together=False):
        za, zb = self.net(torch.cat([a, b])).chunk(2) if together else (self.net(a), self.net(b))
        return -cosine_similarity(za, zb.detach()).mean() - cosine_similarity(za * 2 + 1, zb).mean()


def network_state(model, batches, rows, **kwargs):
    model(*(x[rows] for x in batches[:2]), **kwargs).backward()
    state = {f"mean d{k}": p.grad.clone() for k, p in model.named_parameters()}
    state |= {f"each {k}": b.clone() for k, b in model.named_buffers()}
    return {k.replace("module.", ""): v for k, v in state.items()}


def contrast(gather, rows, world):
    """Each row is to find itself among those of all ranks: gradients through both sides of x @ x.T,
    and through a plain sum, whose gradient is not contiguous."""
    x = three_batches(VECTORS, {})[0].T.clone().T[rows].requires_grad_()  # neither is x
    y = gather(x)
    target = torch.arange(len(y))[rows]
    (cross_entropy(x @ y.T / 9, target) + cross_entropy(y[2:4], torch.tensor([1, 5]))).backward()
    total, = torch.autograd.grad(gather(x).sum(), x)
    return {"each y": y.detach(), "rows dx": x.grad / world, "rows dsum": total / world}


def collectives(bn, x):
    """What one forward and one backward pass call."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce",
                     "broadcast"):
            def counted(*args, name=name, function=getattr(dist, name, None)):
                calls.append(name.removesuffix("_into_tensor").removesuffix("_single"))
                return function(*args)
            if hasattr(dist, name):
                patch.setattr(dist, name, counted)
        y = bn(x.requires_grad_())
        calls.append("backward")
        y.square().sum().backward()
    return calls


def on_rank(name, rank, world):
    case = shape, _, special = CASES.get(name, CASES["images"])
    n = shape[0] // world
    rows, batches = slice(rank * n, rank * n + n), three_batches(shape, special)
    if name == "network":
        model = nn.parallel.DistributedDataParallel(sync_batch_norm(TwoViews()),
                                                    broadcast_buffers=False)
        return network_state(model, batches, rows)
    if name == "gather":
        found = {which: contrast(lambda x: Gather.apply(x, which), rows, world)
                 for which in GATHERS}
        return {"ours": contrast(gather_with_grad, rows, world), **found}
    if name == "all_gather":
        x = torch.arange(12).view(4, 3).T + 100 * rank  # int64, not contiguous
        return all_gather(x), all_gather(torch.ones(2, requires_grad=True) * rank)
    bn = sync_batch_norm(nn.Sequential(batch_norm(*case)))[0]
    if name == "collectives":
        return collectives(bn, batches[0][rows])
    if name in FAULTS:
        bn, state = Slow(3).double(), bn.state_dict()
        bn.load_state_dict(state)
        bn.fault = name
    # Evaluation must not wait for other ranks: only the first one does it
    return record(bn, batches, rows, world, special, rows if rank == 0 else None)


def worker(rank, world):
    results = {}
    for name in [*CASES, *FAULTS, "network", "gather", "all_gather", "collectives"]:
        try:
            results[name] = on_rank(name, rank, world)
        except RuntimeError as error:  # fails this case, not all that follow
            results[name] = {"error": str(error)}
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(worker, tmp_path_factory.mktemp("ranks"))


def whole(ranks, world, name, *key):
    """One process's view of what `world` ranks saw: outputs side by side, gradients averaged."""
    parts, result = [r[world][name] for r in ranks[:world]], {}
    assert not any("error" in p for p in parts), [p.get("error") for p in parts]
    for k in key:
        parts = [p[k] for p in parts]
    for key in parts[0]:
        values = [p[key] for p in parts if key in p]
        kind = key.split()[0]
        if kind == "each" and not all(torch.equal(v, values[0]) for v in values):
            values = [torch.tensor(torch.nan)]  # ranks disagree: equal to nothing
        result[key] = (torch.cat(values) if kind == "rows" else
                       torch.stack(values).mean(0) if kind == "mean" else values[0])
    return result


def one_process(name, world, upcast=None):
    shape, kwargs, special = CASES[name]
    batches = [x.to(upcast) for x in three_batches(shape, special)]
    bn = batch_norm(*CASES[name]).to(upcast)
    return record(bn, batches, slice(None), 1, special, slice(shape[0] // world))


def wrong(found, reference, tolerance=1e-10):
    """The quantities that differ from one process on the whole batch."""
    assert found.keys() == reference.keys()
    return {k for k, v in reference.items()
            if found[k].shape != v.shape or found[k].dtype != v.dtype
            or not (found[k] - v).abs().max() < tolerance}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", EXACT)
def test_ranks_together_equal_one_process_on_the_whole_batch(ranks, name, world):
    reference = one_process(name, world)
    assert {"rows y0", "rows y1", "rows y2", "first eval y"} < reference.keys()
    assert wrong(whole(ranks, world, name), reference) == set()
    counters = [v for k, v in reference.items() if k.endswith("num_batches_tracked")]
    assert counters == [3] * len(counters)  # three training passes, none in evaluation


@pytest.mark.parametrize("world", [2, 4])
def test_the_oracle_accepts_a_right_batch_norm_and_rejects_wrong_ones(ranks, world):
    reference = one_process("images", world)
    found = {fault: wrong(whole(ranks, world, fault), reference) for fault in FAULTS}
    found = {fault: {k for k in keys if "eval" not in k} for fault, keys in found.items()}
    outputs, dx = {"rows y0", "rows y1", "rows y2"}, {"rows dx0", "rows dx1"}
    assert found["none"] == set()
    assert found["biased"] == {"each running_var"}
    assert found["detached"] == found["local gradient"] == dx
    assert found["mean of variances"] >= outputs | dx | {"each running_var"}
    assert found["local"] >= outputs | dx | {"each running_mean", "each running_var"}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_network_under_ddp_gets_the_gradient_of_the_global_batch(ranks, world):
    batches = three_batches(IMAGES, {})
    reference = network_state(TwoViews(), batches, slice(None))
    assert all(v.abs().max() > 1e-4 for k, v in reference.items()
               if k.startswith("mean") and k.endswith("weight"))
    found = whole(ranks, world, "network")
    assert wrong(found, reference) == set()
    joined = network_state(TwoViews(), batches, slice(None), together=True)
    assert len(wrong(found, joined)) > 10  # views concatenated through batch norm


@pytest.mark.parametrize("world", [2, 4])
def test_it_takes_one_all_gather_forward_and_one_all_reduce_back(ranks, world):
    for r in ranks[:world]:
        assert r[world]["collectives"] == ["all_gather", "backward", "all_reduce"]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_channels_last_stays_channels_last(ranks, world):
    for r in ranks[:world]:
        seen = r[world]["channels_last"]
        for key in ("rows y0", "rows dx0", "rows y2"):
            assert seen[key].is_contiguous(memory_format=torch.channels_last), key


@pytest.mark.parametrize("world", [1, 2, 4])
def test_bfloat16_is_normalized_with_float32_statistics(ranks, world):
    found = whole(ranks, world, "bfloat16")
    reference = one_process("bfloat16", world, torch.float32)
    for key, exact in reference.items():
        low = key.startswith("rows") or key in ("first eval y", "first eval dx")
        if key.endswith("num_batches_tracked"):
            assert torch.equal(found[key], exact)
            continue
        assert found[key].dtype == (torch.bfloat16 if low else torch.float32), key
        # One rounding to bfloat16 is 2^-9; gradients pass two; running statistics stay float32
        relative = 1e-5 if "running" in key else 2**-8 if " y" in key else 0.02
        error = (found[key].float() - exact).abs().max()
        assert error < relative * exact.abs().max(), key


@pytest.mark.parametrize("world", [1, 2, 4])
def test_float32_statistics_survive_a_mean_far_from_zero(ranks, world):
    # E[x^2] - E[x]^2 in float32 has no correct digit here: 4000^2 is stored in steps of 1
    found = whole(ranks, world, "far from zero")
    reference = one_process("far from zero", world, torch.float64)
    for step in range(3):
        assert found[f"rows y{step}"].dtype == torch.float32
        assert (found[f"rows y{step}"] - reference[f"rows y{step}"]).abs().max() < 5e-3
    variance = found["each running_var"].double()
    torch.testing.assert_close(variance, reference["each running_var"], rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", EXACT)
def test_without_a_process_group_it_is_the_ordinary_batch_norm(name):
    assert not dist.is_initialized()
    shape, kwargs, special = CASES[name]
    bn = SyncBatchNorm(shape[1], **kwargs).double()
    ordinary = batch_norm(*CASES[name])
    bn.load_state_dict(ordinary.state_dict())
    for p in bn.parameters():
        p.requires_grad_(not special.get("frozen", False))
    seen = record(bn, three_batches(shape, special), slice(None), 1, special, slice(4))
    reference = record(ordinary, three_batches(shape, special), slice(None), 1, special, slice(4))
    assert wrong(seen, reference, 1e-12) == set()


def test_one_value_per_channel_is_an_error_as_in_the_ordinary_batch_norm():
    for bn in (nn.BatchNorm1d(3), SyncBatchNorm(3)):
        with pytest.raises(ValueError):
            bn(torch.randn(1, 3))
        assert bn.eval()(torch.randn(1, 3)).shape == (1, 3)


def test_sync_batch_norm_keeps_everything_but_the_class():
    shared = nn.BatchNorm1d(6, momentum=0.2)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.3), nn.LayerNorm(4),
        nn.Sequential(nn.ModuleDict({"deep": nn.BatchNorm1d(6, affine=False)}), shared, shared),
        nn.BatchNorm2d(4, track_running_stats=False)).double()
    model[1].weight.requires_grad_(False)
    model[1].eval()
    randomized(model)

    def settings():
        return {n: (x.eps, x.momentum, x.affine, x.num_features, x.training, x.track_running_stats)
                for n, x in model.named_modules() if hasattr(x, "momentum")}

    before, state = settings(), copy.deepcopy(model.state_dict())
    kept = {n: (id(t), t.data_ptr(), t.requires_grad) for n, t in model.named_parameters()}
    assert sync_batch_norm(model) is model
    assert settings() == before and len(before) == 4
    # The same parameter objects: an optimizer made before still holds them
    assert {n: (id(t), t.data_ptr(), t.requires_grad) for n, t in model.named_parameters()} == kept
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[k], state[k]) for k in state)
    assert all(after[k].dtype == state[k].dtype for k in state)
    assert {n for n, m in model.named_modules() if isinstance(m, SyncBatchNorm)} == set(before)
    assert not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in model.modules())
    assert model[3][1] is model[3][2] and type(model[2]) is nn.LayerNorm
    assert isinstance(sync_batch_norm(nn.BatchNorm1d(3)), SyncBatchNorm)  # one alone, too


def test_a_synchronized_resnet_keeps_names_and_features():
    model = randomized(resnet(10, 0.25, small_images=True)).eval()
    images = torch.randn(2, 3, 32, 32)
    before, names = model(images), list(model.state_dict())
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    sync_batch_norm(model)
    assert sum(isinstance(m, SyncBatchNorm) for m in model.modules()) == norms == 12
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(images), before)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_gathered_rows_have_rank_order_and_the_gradient_of_one_process(ranks, world):
    reference = contrast(lambda x: x, slice(None), 1)
    assert torch.equal(reference["each y"], three_batches(VECTORS, {})[0])
    found = {k: wrong(whole(ranks, world, "gather", k), reference, 1e-12)
             for k in ("ours", *GATHERS)}
    assert found["ours"] == found["none"] == set()
    if world > 1:
        assert all(found[k] == {"rows dx", "rows dsum"} for k in GATHERS[1:])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_gather_takes_any_type_and_gives_no_gradient(ranks, world):
    x = torch.arange(12).view(4, 3).T
    for r in ranks[:world]:
        rows, floats = r[world]["all_gather"]
        assert torch.equal(rows, torch.cat([x + 100 * i for i in range(world)]))
        assert floats.tolist() == [i for i in range(world) for _ in range(2)]
        assert world == 1 or not floats.requires_grad


# -------------------------------------------------------------------------------------- randomness


@pytest.mark.parametrize("world", [1, 2, 4])
def test_parts_of_a_draw_are_those_of_one_process(world, monkeypatch):
    one = draws(3, "crop", 7, 8, 2, 5)
    expected = torch.rand(8, 2, 5, dtype=DOUBLE, generator=generator(3, "crop", 7))
    assert one.dtype == DOUBLE and torch.equal(one, expected)
    monkeypatch.setattr(common, "world_size", lambda: world)
    parts = []
    for r in range(world):
        monkeypatch.setattr(common, "rank", lambda: r)
        parts.append(draws(3, "crop", 7, 8, 2, 5))
        assert len(parts[r]) == 8 // world
    assert torch.equal(torch.cat(parts), one)


def test_draws_depend_on_seed_name_and_step():
    state = torch.get_rng_state()
    keys = [(0, "crop", 0), (1, "crop", 0), (0, "crop", 1), (0, "colour", 0), (0, "order", 0),
            (10, "crop", 1), (1, "crop", 10), (1, "crop", 1)]
    seen = [draws(*key, 8, 5) for key in keys]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert all(torch.equal(draws(*key, 8, 5), u) for key, u in zip(keys, seen))
    numbers = torch.cat(seen).flatten()
    assert numbers.unique().numel() == numbers.numel()


def test_streams_are_those_of_earlier_runs():  # else a run would go on with another order
    assert generator(0, "order", 3).initial_seed() == 8244215730568551301
    assert generator(1, "crop", 0).initial_seed() == 8769085604394998340


@pytest.mark.parametrize("name", ["cpu", "cuda", "mps"])
def test_moving_does_not_wait_for_cuda_and_for_cuda_alone(name):  # MPS would read freed memory
    class Moved:
        def to(self, *args, **kwargs):
            return args, kwargs

    device = torch.device(name)
    assert to_device(Moved(), device) == ((device,), dict(non_blocking=name == "cuda"))
    x = torch.arange(3)
    assert torch.equal(to_device(x, torch.device("cpu")), x)


# ------------------------------------------------------------------------------ quality of features


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["bank", "queries"])
def test_knn_accuracy_of_features_that_are_not_finite_is_nan(side, value):
    x, labels = torch.eye(4), torch.arange(4)
    assert knn_accuracy(x, labels, x, labels, 1, 0.1) == 1
    broken = x.clone()
    broken[2, 1] = value
    bank, queries = (broken, x) if side == "bank" else (x, broken)
    assert math.isnan(knn_accuracy(bank, labels, queries, labels, 1, 0.1))


# -------------------------------------------------------------------------- demo images

def test_demo_images_have_the_shape_of_cifar():
    for n in (1, 7, 300):
        images, labels = demo_images(n, seed=0)
        assert images.shape == (n, 3, 32, 32) and images.dtype == torch.uint8
        assert labels.shape == (n,) and labels.dtype == torch.int64
    assert images.float().flatten(1).std(1).min() > 1  # no image is blank
    assert len({bytes(x.flatten().tolist()) for x in images}) == 300  # and no two are equal


DIGEST = """
import hashlib, common
images, labels = common.demo_images(20, seed=3)
digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
"""


def test_demo_images_depend_on_the_seed_and_on_nothing_else():
    torch.manual_seed(0)
    first = demo_images(20, seed=3)
    torch.manual_seed(1)
    again, other = demo_images(20, seed=3), demo_images(20, seed=4)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    here = {}
    exec(DIGEST, here)  # and in a process of its own, whose hashes are seeded otherwise
    there = subprocess.run([sys.executable, "-c", f"{DIGEST}print(digest)"], cwd=ROOT, text=True,
                           capture_output=True)
    assert [here["digest"]] == there.stdout.split(), there.stderr
    assert not any(torch.equal(a, b) for a in first[0] for b in other[0])


def test_demo_images_leave_the_global_random_state_alone():
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    demo_images(20, seed=0)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


@pytest.mark.parametrize("seed", [0, 1])
def test_demo_images_show_ten_classes_about_equally_often(seed):
    _, labels = demo_images(1000, seed)
    counts = torch.bincount(labels, minlength=10)
    assert len(counts) == 10 and counts.min() >= 60 and counts.max() <= 140
