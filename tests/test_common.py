"""The building blocks in common.py against independent oracles: torchvision, formulas, slow loops.

1, 2 and 4 real gloo processes, started once for all cases, against one process, in float64.
"""
import copy
import inspect
import math
import re
from unittest.mock import Mock

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.functional import conv2d, cross_entropy

import common
from common import (
    LARS, SelectiveKernel, ShortcutPool, SyncBatchNorm, all_gather, demo_images, draws,
    gather_with_grad, generator, knn_accuracy, resnet, sync_batch_norm, to_device)
from conftest import on_ranks
from helpers import DOUBLE, Gather, count, furthest

BLOCKS = {  # He et al. 2016 (1512.03385), table 1; 200 from 1603.05027, section 4; 10 is ours
    10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3),
    101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}


def on_meta(make, *args):
    with torch.device("meta"):
        return make(*args)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def randomized(model, seed=0):
    """Fresh batch norms are nearly the identity, which would hide a wrong one: move them off it."""
    g = torch.Generator().manual_seed(seed)
    for name, t in model.state_dict().items():
        if t.is_floating_point() and t.ndim == 1:
            low = -0.2 if name.endswith(("bias", "running_mean")) else 0.5
            t.copy_(torch.rand(t.shape, generator=g, dtype=t.dtype) * (1 if low > 0 else 0.4) + low)
    return model


def torchvision_resnet(depth):
    theirs = torchvision.models.resnet
    block = theirs.BasicBlock if depth < 50 else theirs.Bottleneck
    return on_meta(theirs.ResNet, block, BLOCKS[depth])


@pytest.mark.parametrize("depth", [10, 18, 34, 50])
def test_features_equal_torchvisions_with_the_same_weights(depth):
    torch.manual_seed(0)
    ours, theirs = randomized(resnet(depth)), torchvision_resnet(depth)
    state = {k: v.clone() for k, v in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False, assign=True)
    assert set(missing) == {"fc.weight", "fc.bias"} and unexpected == []
    theirs.fc = nn.Identity()
    images = torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        for mode in (True, False):  # train first: then eval sees new running statistics
            a, b = ours.train(mode)(images), theirs.train(mode)(images)
            assert a.shape == (3, ours.feature_dim) and b.std() > 0.01
            assert (a - b).abs().max() < 1e-5 * b.abs().max()
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)


@pytest.mark.parametrize("depth", BLOCKS)
def test_layers_are_torchvisions_with_only_the_classifier_missing(depth):
    def layers(model):  # stride (on the 3x3), padding, bias, eps, momentum, but not the channels
        return {k: re.sub(r"\(\d+(, \d+)?", "", repr(x)) for k, x in model.named_modules()
                if isinstance(x, (nn.Conv2d, nn.BatchNorm2d))}

    def shapes(model, width=1):  # the numbers from 64 on are channels
        return [(k, [int(n * width) if n >= 64 else n for n in v.shape], v.dtype)
                for k, v in model.state_dict().items()]

    theirs = torchvision_resnet(depth)
    dim, theirs.fc = theirs.fc.in_features, nn.Identity()
    expected = layers(theirs)
    for width in (0.25, 1, 2):
        ours = on_meta(resnet, depth, width)
        assert ours.feature_dim == width * dim
        assert layers(ours) == expected and shapes(ours) == shapes(theirs, width)


@pytest.mark.parametrize("depth, width, byol, simclr_v2, sk, exactly", [
    (50, 1, 24, 24, 35, 35_215_584), (50, 2, 94, 94, 140, 140_306_048),
    (50, 4, 375, None, None, None), (101, 1, None, 43, 65, 64_662_304),
    (101, 2, None, 170, 257, 257_132_224), (152, 1, None, 58, 89, 88_940_896),
    (152, 2, None, 233, 354, 353_398_528), (152, 3, None, None, 795, 794_704_160),
    (200, 2, 250, None, None, None)])
def test_networks_have_the_published_sizes(depth, width, byol, simclr_v2, sk, exactly):
    # Millions, from BYOL, table 1, and SimCLR v2, table 1, which counts running statistics, too
    for sk_ratio, alone, together in ((0.0, byol, simclr_v2), (0.0625, None, sk)):
        if (alone or together) is not None:
            model = on_meta(resnet, depth, width, sk_ratio)
            running = sum(x.numel() for name, x in model.named_buffers() if "running" in name)
            assert alone in (None, round(count(model) / 1e6))
            assert together in (None, round((count(model) + running) / 1e6))
            assert not sk_ratio or count(model, True) == exactly


@pytest.mark.parametrize("depth, sk, last", [(10, 0, 2), (18, 0, 2), (50, 0, 3), (50, 0.0625, 3)])
def test_zero_init_residual_zeroes_the_last_norm_of_each_block_and_nothing_else(depth, sk, last):
    for zero in (False, True):
        state = resnet(depth, 0.25, sk, zero_init_residual=zero).state_dict()
        found = [k for k, x in state.items() if k.endswith("weight") and not x.any()]
        norms = [k for k in state if re.fullmatch(rf"layer\d\.\d+\.bn{last}\.weight", k)]
        assert found == norms * zero and len(norms) >= 4


@pytest.mark.parametrize("depth, width, sk, channels", [
    (18, 0.5, 0, 256), (10, 1, 0, 512), (50, 0.25, 0, 512), (50, 0.25, 0.0625, 512)])
def test_small_images_keep_4x4_features_of_32_pixels(depth, width, sk, channels):
    small, plain = (resnet(depth, width, sk, small_images=small) for small in (True, False))
    for model, side in ((small, 4), (plain, 1)):
        sizes = []
        model.layer4.register_forward_hook(lambda module, x, output: sizes.append(output.shape))
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, channels)
        assert sizes == [(2, channels, side, side)]
    stem = small.conv1  # SimCLR, appendix B.9: 3x3, no pooling
    assert (stem.kernel_size, stem.stride, stem.padding) == ((3, 3), (1, 1), (1, 1))
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (small, plain)]
    assert {k.split(".")[0] for k, _ in shapes[0].items() ^ shapes[1].items()} == {"conv1"}


@pytest.mark.parametrize("error, args", [
    *((ValueError, (depth,)) for depth in (0, 9, 19, 51, 1000, -50)),
    *((ValueError, (18, width)) for width in (0.124, 0.0625, 0.0, -1.0, math.nan)),
    *((ValueError, (depth, 1, 0.0625)) for depth in (10, 18, 34)),  # selective kernels
    (TypeError, (18, 1, 0.0, True, True))], ids=str)  # an option that must be named
def test_what_no_resnet_has_is_an_error(error, args):
    with pytest.raises(error):
        resnet(*args)
    assert resnet(50, 0.125).conv1.out_channels == 8  # the minimum


# ---------------------------------------------------- selective kernels, as in SimCLR v2's code


def bn(y, norm, batch=False):
    mean, var = (None, None) if batch else (norm.running_mean, norm.running_var)
    return nn.functional.batch_norm(y, mean, var, norm.weight, norm.bias, training=batch)


def slow_kernel(kernel, x, stride, training=False, mistake=""):
    """u1, u2 by one convolution, mixed by a softmax over the two branches for each channel."""
    f = x.shape[1]
    u = bn(conv2d(x, kernel.conv.weight, stride=stride, padding=1), kernel.bn, training)
    u = u if mistake == "no ReLU before the mix" else u.clamp(min=0)
    u = (u[:, ::2], u[:, 1::2]) if mistake == "branches interleaved" else (u[:, :f], u[:, f:])
    s = conv2d((u[0] + u[1]).mean((2, 3), keepdim=True), kernel.squeeze.weight)
    s = bn(s, kernel.squeeze_bn, training)
    s = conv2d(s if mistake == "no ReLU in the gate" else s.clamp(min=0), kernel.select.weight)
    one, two = s[:, :f], s[:, f:]
    total = one.exp() + two.exp()
    one, two = {"softmax over channels": (one.softmax(1), two.softmax(1)), "even mix": (0.5, 0.5),
                "sigmoids": (one.sigmoid(), two.sigmoid())}.get(
                    mistake, (one.exp() / total, two.exp() / total))
    return one * u[0] + two * u[1]


@pytest.mark.parametrize("stride", [1, 2])
def test_a_selective_kernel_equals_its_formula(stride):
    for f, ratio, m in ((64, 0.0625, 32), (40, 0.9, 36), (600, 0.0625, 37)):  # m: 32 at the least
        kernel = on_meta(SelectiveKernel, f, stride, ratio)
        assert kernel.squeeze.weight.shape == (m, f, 1, 1)  # no bias, no third norm:
        assert count(kernel, True) == 18 * f * f + 4 * f + 3 * f * m + 2 * m
    kernel = randomized(SelectiveKernel(8, stride, 0.0625).to(DOUBLE))
    x = normals(3, 8, 6, 6, seed=1).requires_grad_()
    for training in (True, False):
        expected, ours = slow_kernel(kernel, x, stride, training), kernel.train(training)(x)
        assert ours.shape == (3, 8, 6 // stride, 6 // stride)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)
        ascent, inputs = normals(*ours.shape, seed=2), [x, *kernel.parameters()]
        found, theirs = (torch.autograd.grad((y * ascent).sum(), inputs) for y in (ours, expected))
        torch.testing.assert_close(found, theirs, rtol=0, atol=1e-9)
        assert min(g.abs().max() for g in found) > 1e-6
    for wrong in ("no ReLU before the mix", "branches interleaved", "no ReLU in the gate",
                  "softmax over channels", "sigmoids", "even mix"):
        assert (kernel(x) - slow_kernel(kernel, x, stride, mistake=wrong)).abs().max() > 1e-3, wrong


def slow_pool(x, stride):
    """Stride 1: "SAME", padded cells are not counted. Stride 2: zeros at the end count."""
    height, width = x.shape[2:]
    out = x.new_zeros(*x.shape[:2], -(-height // stride), -(-width // stride))
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            cells = x[:, :, i * stride:i * stride + 2, j * stride:j * stride + 2]
            out[:, :, i, j] = cells.sum((2, 3)) / (4 if stride == 2 else cells[0, 0].numel())
    return out


@pytest.mark.parametrize("stride, layer", [(1, "layer1"), (2, "layer2")])
def test_networks_with_selective_kernels_are_resnet_d(stride, layer):
    for size in ((6, 6), (7, 7), (5, 8), (1, 1)):
        x = normals(2, 3, *size) + 1
        assert (ShortcutPool(stride)(x) - slow_pool(x, stride)).abs().max() < 1e-12
    net = randomized(resnet(50, 0.1875, sk_ratio=0.0625).to(DOUBLE)).eval()
    block = getattr(net, layer)[0]
    x = normals(2, block.conv1.in_channels, 6, 6)
    y = slow_kernel(block.conv2, bn(conv2d(x, block.conv1.weight), block.bn1).relu(), stride)
    y = bn(conv2d(y, block.conv3.weight), block.bn3)  # neither norm nor ReLU between
    y = y + bn(conv2d(slow_pool(x, stride), block.downsample[1].weight), block.downsample[2])
    torch.testing.assert_close(block(x), y.relu(), rtol=0, atol=1e-10)
    kinds = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    assert [type(x) for x in net.conv1] == kinds
    assert [(x.stride[0], x.out_channels) for x in net.conv1[::3]] == [(2, 6), (1, 6), (1, 12)]


# --------------------------------------------------------------------------------- LARS

LRS = [0.1, 0.3, 0.6, 0.2, 0.05]
SHAPES = [(3, 4), (5,), (2, 3, 2, 2), (1,), (4, 1), (2, 2), (2, 2), (2, 2)]
WEIGHTS, *GRADIENTS = [[normals(*shape, seed=10 * step + i) for i, shape in enumerate(SHAPES)]
                       for step in range(6)]  # gradients[step][parameter]
for zero in (WEIGHTS[5], WEIGHTS[7], *(g for grads in GRADIENTS for g in grads[6:])):
    zero.zero_()  # zero norms, of weights, gradients and both, switch the adaptation off
RECIPE = dict(weight_decay=0.1, momentum=0.8, trust_coefficient=0.05)


def slow_lars(weights, gradients, lrs, weight_decay=0.0, momentum=0.9, trust_coefficient=0.001,
              lr_in_momentum=False, exclude_1d=True, sum_of_norms=False):
    """One parameter after the other. `sum_of_norms`: a known mistake."""
    result = []
    for i, w in enumerate(weights):
        b = 0.0
        for g, lr in zip((grads[i] for grads in gradients), lrs, strict=True):
            u, r = g, 1.0
            if w.ndim > 1 or not exclude_1d:
                u = g + weight_decay * w
                w_norm, g_norm, u_norm = (x.square().sum().sqrt() for x in (w, g, u))
                below = g_norm + weight_decay * w_norm if sum_of_norms else u_norm
                if trust_coefficient is not None and w_norm > 0 and below > 0:
                    r = trust_coefficient * w_norm / below
            b = momentum * b + (lr * r * u if lr_in_momentum else r * u)
            w = w - (b if lr_in_momentum else lr * b)
        result.append(w)
    return result


def parameters(weights):
    return [nn.Parameter(w.clone()) for w in weights]


def steps(optimizer, params, gradients, lrs):
    for grads, lr in zip(gradients, lrs):
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] if lr is None else lr
        for p, g in zip(params, grads):
            p.grad = None if g is None else g.clone()
        optimizer.step()
        assert all(g is None or torch.equal(p.grad, g) for p, g in zip(params, grads))  # untouched
    return [p.detach().clone() for p in params]


def run_lars(weights, gradients, lrs, **options):
    params = parameters(weights)
    return steps(LARS(params, lr=lrs[0], **options), params, gradients, lrs)


@pytest.mark.parametrize("lr_in_momentum", [False, True])
@pytest.mark.parametrize("exclude_1d", [True, False])
@pytest.mark.parametrize("recipe", [RECIPE, {}, dict(weight_decay=1e-6, momentum=0.0),
                                    dict(RECIPE, trust_coefficient=None)], ids=str)
def test_lars_equals_its_formula(lr_in_momentum, exclude_1d, recipe):
    # You et al. 2017 (1708.03888), algorithm 1; 1-d parameters as BYOL, section 3.3
    options = dict(recipe, lr_in_momentum=lr_in_momentum, exclude_1d=exclude_1d)
    fast = run_lars(WEIGHTS, GRADIENTS, LRS, **options)
    assert furthest(fast, slow_lars(WEIGHTS, GRADIENTS, LRS, **options)) < 1e-12
    # The oracle sees the mistakes that matter
    for mistake in (dict(exclude_1d=not exclude_1d), dict(lr_in_momentum=not lr_in_momentum),
                    dict(trust_coefficient=0.002), dict(momentum=0.7),
                    # lightning-bolts, solo-learn and lightly divide by |g| + wd |w|
                    *[dict(sum_of_norms=True)] * (recipe is RECIPE)):
        if not (recipe.get("momentum") == 0.0 and "lr_in_momentum" in mistake):
            other = slow_lars(WEIGHTS, GRADIENTS, LRS, **{**options, **mistake})
            assert furthest(fast, other) > 1e-5


def test_a_saved_optimizer_continues_identically_and_a_step_takes_a_closure():
    params = parameters(WEIGHTS)
    first = LARS(params, lr=LRS[0], **RECIPE)

    def closure():
        loss = sum((p * g).sum() for p, g in zip(params, GRADIENTS[0]))
        loss.backward()
        return loss

    with torch.no_grad():  # the closure has gradients nevertheless
        assert first.step(closure) == sum((w * g).sum() for w, g in zip(WEIGHTS, GRADIENTS[0]))
    params = parameters(steps(first, params, GRADIENTS[1:2], LRS[1:2]))
    second = LARS(params, lr=123.0)  # options, too, come from the file
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed = steps(second, params, GRADIENTS[2:], LRS[2:])
    assert furthest(resumed, run_lars(WEIGHTS, GRADIENTS, LRS, **RECIPE)) == 0


def test_groups_keep_their_own_settings_and_parameters_without_gradient_are_skipped():
    params = parameters(WEIGHTS)
    own = [dict(lr=0.1), dict(lr=0.5, weight_decay=0.3),
           dict(lr=0.2, exclude_1d=False, momentum=0.5, lr_in_momentum=True)]
    optimizer = LARS([dict(params=params[i::3], **options) for i, options in enumerate(own)],
                     lr=9.0, **RECIPE)
    late = [2, 3, 0, 0, 3, 5, 0, 2]  # the first step with a gradient; 5: none
    gradients = [[g if step >= first else None for g, first in zip(grads, late)]
                 for step, grads in enumerate(GRADIENTS)]
    found = steps(optimizer, params, gradients, [None] * 5)
    for i, weight in enumerate(WEIGHTS):
        options = {**RECIPE, **own[i % 3]}
        grads = [[g[i]] for g in GRADIENTS[late[i]:]]  # momentum starts from zero
        expected = slow_lars([weight], grads, [options.pop("lr")] * len(grads), **options)
        assert furthest(found[i:i + 1], expected) < 1e-12


# -------------------------------------------------------------------------- several processes

IMAGES, VECTORS = (8, 3, 4, 5), (8, 6)  # of all processes together
CASES = {  # name: shape, arguments of the batch norm, what else is special
    "images": (IMAGES, {}, {}), "vectors": (VECTORS, {}, {}), "sequences": ((8, 3, 7), {}, {}),
    "one vector in each of four": ((4, 6), {}, {}),
    "channels_last": (IMAGES, {}, dict(memory_format=torch.channels_last)),
    "other momentum and eps": (VECTORS, dict(momentum=0.3, eps=0.1), {}),
    "not affine": (VECTORS, dict(affine=False), {}),
    "no running statistics": (IMAGES, dict(track_running_stats=False), {}),
    "neither": (VECTORS, dict(affine=False, track_running_stats=False), {}),
    "input without gradient": (IMAGES, {}, dict(input_grad=False)),
    "frozen weights": (IMAGES, {}, dict(frozen=True)),
    "bfloat16": (IMAGES, {}, dict(dtype=torch.bfloat16, offset=30.0)),
    "far from zero": (IMAGES, {}, dict(dtype=torch.float32, offset=4000.0))}
FAULTS = {  # of SyncBatchNorm and its gradient: the text, the mistake
    "local": ("self.training and world_size() > 1", "False"),
    "local gradient": ("dist.all_reduce(sums)", "pass"),
    "detached": ("dx = dx + F.batch_norm(x, mean, var, sums[0], sums[1], eps=ctx.eps)", "pass"),
    "biased": ("var * n / (n - 1)", "var"),
    "mean of variances": ("(var + (mean - mean.mean(dim=0)).square())", "var")}
GATHERS = ["gather ours", "gather none", "gather no gradient", "gather local slice",
           "gather times W"]  # the last three are mistakes of helpers.Gather


def batch_norm(shape, kwargs, special):
    bn = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1], **kwargs)
    bn = randomized(bn if "dtype" in special else bn.double())
    return bn.requires_grad_(not special.get("frozen", False))


def three_batches(shape, special):
    data = [normals(*shape, seed=i) * 2 + special.get("offset", 0.7) for i in range(3)]
    layout = special.get("memory_format", torch.contiguous_format)
    return [x.to(special.get("dtype", DOUBLE), memory_format=layout) for x in data]


def record(bn, batches, rows, world, special, alone):
    """What one rank sees: two training steps, one without gradient, evaluation of `alone`."""
    seen, want = {}, special.get("input_grad", True)
    slopes = torch.linspace(-1, 2, batches[0].numel(), dtype=DOUBLE).view(batches[0].shape)[rows]
    for step in range(2):
        x = batches[step][rows].clone().requires_grad_(want)
        y = bn(x)
        if y.requires_grad:  # the mean of something whose slope depends on y
            (slopes * y.double().sin() + y.double().pow(3) / 30).mean().backward()
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
        y.double().square().mean().backward()
        seen |= {"first eval y": y.detach(), "first eval dx": x.grad}
    return seen


def faulty(text, mistake):
    source = inspect.getsource(common.SyncNormalize) + inspect.getsource(SyncBatchNorm)
    assert source.count(text) == 1, text
    names = dict(vars(common))
    exec(source.replace(text, mistake), names)
    return names["SyncBatchNorm"]


def contrast(gather, rows, world):
    """Each row is to find itself among those of all ranks: gradients through both sides of x @ x.T,
    and through a plain sum, whose gradient is not contiguous."""
    x = three_batches(VECTORS, {})[0].T.clone().T[rows].requires_grad_()  # neither is x
    y = gather(x)
    target = torch.arange(len(y))[rows]
    (cross_entropy(x @ y.T / 9, target) + cross_entropy(y[2:4], torch.tensor([1, 5]))).backward()
    total, = torch.autograd.grad(gather(x).sum(), x)
    return {"each y": y.detach(), "rows dx": x.grad / world, "rows dsum": total / world}


def on_rank(name, rank, world):
    case = shape, _, special = CASES.get(name, CASES["images"])
    n = shape[0] // world
    rows, batches = slice(rank * n, rank * n + n), three_batches(shape, special)
    if name in GATHERS:
        which = name.removeprefix("gather ")
        ours = gather_with_grad if which == "ours" else lambda x: Gather.apply(x, which)
        return contrast(ours, rows, world)
    if name == "all_gather":
        x = torch.arange(12).view(4, 3).T + 100 * rank  # int64, not contiguous
        return all_gather(x), all_gather(torch.ones(2, requires_grad=True) * rank)
    bn = sync_batch_norm(nn.Sequential(batch_norm(*case)))[0]
    if name in FAULTS:
        bn.__class__ = faulty(*FAULTS[name])
    # Evaluation must not wait for other ranks: only the first one does it
    return record(bn, batches, rows, world, special, rows if rank == 0 else None)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    names = [*CASES, *FAULTS, *GATHERS, "all_gather"]
    return on_ranks(lambda rank, world: {name: on_rank(name, rank, world) for name in names},
                    tmp_path_factory.mktemp("ranks"))


def whole(ranks, world, name):
    """One process's view of what `world` ranks saw: outputs side by side, gradients averaged."""
    parts, result = [r[world][name] for r in ranks[:world]], {}
    for key in parts[0]:
        values = [p[key] for p in parts if key in p]
        kind = key.split()[0]
        if kind == "each" and not all(torch.equal(v, values[0]) for v in values):
            values = [torch.tensor(torch.nan)]  # ranks disagree: equal to nothing
        result[key] = (torch.cat(values) if kind == "rows" else
                       torch.stack(values).mean(0) if kind == "mean" else values[0])
    return result


def one_process(name, world, upcast=None, convert=lambda bn: bn):
    shape, _, special = CASES[name]
    batches = [x.to(upcast) for x in three_batches(shape, special)]
    bn = convert(batch_norm(*CASES[name]).to(upcast))
    return record(bn, batches, slice(None), 1, special, slice(shape[0] // world))


def wrong(found, reference, tolerance=1e-10):
    """The quantities that differ from one process on the whole batch."""
    assert found.keys() == reference.keys()
    return {k for k, v in reference.items()
            if found[k].shape != v.shape or found[k].dtype != v.dtype
            or not (found[k] - v).abs().max() < tolerance}


@pytest.mark.parametrize("world", [0, 1, 2, 4])  # 0: without a process group
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "dtype" not in case[2]])
def test_ranks_together_equal_one_process_on_the_whole_batch(ranks, name, world):
    reference = one_process(name, world or 1)
    found = whole(ranks, world, name) if world else one_process(name, 1, convert=sync_batch_norm)
    assert wrong(found, reference, 1e-10 if world else 1e-12) == set()


@pytest.mark.parametrize("world", [2, 4])
def test_a_wrong_batch_norm_is_told_apart(ranks, world):
    reference = one_process("images", world)
    found = {fault: {key for key in wrong(whole(ranks, world, fault), reference)
                     if "eval" not in key} for fault in FAULTS}
    outputs, dx = {"rows y0", "rows y1", "rows y2"}, {"rows dx0", "rows dx1"}
    assert found["biased"] == {"each running_var"}
    assert found["detached"] == found["local gradient"] == dx
    assert found["mean of variances"] >= outputs | dx | {"each running_var"}
    assert found["local"] >= outputs | dx | {"each running_mean", "each running_var"}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name, dtype, upcast, tolerances", [
    # One rounding to bfloat16 is 2^-9; gradients pass two; running statistics stay float32
    ("bfloat16", torch.bfloat16, torch.float32, dict(y=2**-8, d=0.02, running=1e-5)),
    # E[x^2] - E[x]^2 in float32 has no correct digit here: 4000^2 is stored in steps of 1
    ("far from zero", torch.float32, DOUBLE, dict(y=1e-3, d=1e-3, running=1e-4))])
def test_statistics_are_those_of_float32(ranks, world, name, dtype, upcast, tolerances):
    found = whole(ranks, world, name)
    for key, exact in one_process(name, world, upcast).items():
        if exact.is_floating_point():
            kind = "running" if "running" in key else "y" if " y" in key else "d"
            alike = kind == "running" or key.startswith("mean")
            assert found[key].dtype == (torch.float32 if alike else dtype), key
            error = (found[key].to(upcast) - exact).abs().max()
            assert error < tolerances[kind] * exact.abs().max(), key


@pytest.mark.parametrize("world", [1, 2, 4])
def test_gathered_rows_have_rank_order_and_the_gradient_of_one_process(ranks, world):
    reference = contrast(lambda x: x, slice(None), 1)
    assert torch.equal(reference["each y"], three_batches(VECTORS, {})[0])
    for name in GATHERS if world > 1 else GATHERS[:2]:
        expected = set() if name in GATHERS[:2] else {"rows dx", "rows dsum"}
        assert wrong(whole(ranks, world, name), reference, 1e-12) == expected
    x = torch.arange(12).view(4, 3).T
    for r in ranks[:world]:  # without gradient, of any type
        rows, floats = r[world]["all_gather"]
        assert torch.equal(rows, torch.cat([x + 100 * i for i in range(world)]))
        assert floats.tolist() == sorted([*range(world)] * 2) and not floats.requires_grad


# ------------------------------------------------------------- random numbers, features and images


@pytest.mark.parametrize("world", [1, 2, 4])
def test_parts_of_a_draw_are_those_of_one_process_and_of_earlier_runs(world, monkeypatch):
    assert generator(0, "order", 3).initial_seed() == 8244215730568551301
    assert generator(1, "crop", 0).initial_seed() == 8769085604394998340
    monkeypatch.setattr(common, "world_size", lambda: world)
    expected = torch.rand(8, 2, 5, dtype=DOUBLE, generator=generator(3, "crop", 7))
    for r in range(world):
        monkeypatch.setattr(common, "rank", lambda: r)
        assert torch.equal(draws(3, "crop", 7, 8, 2, 5), expected.chunk(world)[r])


@pytest.mark.parametrize("name", ["cpu", "cuda", "mps"])
def test_moving_does_not_wait_for_cuda_and_for_cuda_alone(name):  # MPS would read freed memory
    x, device = Mock(), torch.device(name)
    to_device(x, device)
    x.to.assert_called_once_with(device, non_blocking=name == "cuda")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1], ids=["bank", "queries"])
def test_knn_accuracy_of_features_that_are_not_finite_is_nan(side, value):
    x, labels = [torch.eye(4), torch.eye(4)], torch.arange(4)
    assert knn_accuracy(x[0], labels, x[1], labels, 1, 0.1) == 1
    x[side][2, 1] = value
    assert math.isnan(knn_accuracy(x[0], labels, x[1], labels, 1, 0.1))


def test_demo_images_have_the_shape_of_cifar_and_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    images, labels = demo_images(300, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert images.shape == (300, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [30] * 10
    torch.manual_seed(1)
    assert all(map(torch.equal, demo_images(300, seed=3), (images, labels)))
    other = demo_images(300, seed=4)[0]
    assert len(torch.cat([images, other]).flatten(1).unique(dim=0)) == 600  # no two are equal
    means = [demo_images(n, seed=3)[0].float().mean().item() for n in (1, 7)]
    assert means == pytest.approx([133.95, 128.48], abs=0.01)  # with other versions, too
