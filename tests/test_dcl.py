"""dcl.py against the paper: losses, q_B, queue, training step, recipes, processes, log.

The oracles are written from the equations of arXiv 2110.06848, one anchor at a time.
"""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

import dcl
from conftest import assert_close_runs, losses, mistake, on_ranks, program, records, run
from dcl import (
    Contrast, dcl_loss, dclw_loss, info_nce_loss, margins, npc_multiplier, queue_margins)
from helpers import DOUBLE, Gather, Tiny, differs, furthest, part, record_gradients, settled
from helpers import embedding_pairs as embeddings
from helpers import joined_views as views

parse = functools.partial(settled, dcl)
LOSSES = {"infonce": info_nce_loss, "dcl": dcl_loss, "dclw": dclw_loss,
          "dclw, weight trained": functools.partial(dclw_loss, backprop_weight=True)}


# -------------------------------------------------------------------------------------- the losses


def slow_terms(z1, z2, tau, mistake=""):
    """s of each image, log U of each of the 2n anchors, term by term."""
    n = len(z1)
    z = [x / (5 if mistake == "not normalized" else x.square().sum().sqrt()) for x in (*z1, *z2)]
    s, log_u = [z[i] @ z[n + i] for i in range(n)], []
    for a in range(2 * n):
        own, i = a // n * n, a % n  # its view begins at own
        same, other = torch.zeros(2, dtype=DOUBLE)
        for j in range(n):
            if j != i or mistake == "self kept":
                same = same + (z[a] @ z[own + j] / tau).exp()
            if j != i or mistake == "positive kept":
                other = other + (z[a] @ z[n - own + j] / tau).exp()
        if mistake == "same view left out":
            same = torch.zeros((), dtype=DOUBLE)
        both = same.log() + other.log() if mistake == "two logarithms" else (same + other).log()
        log_u.append(both)  # two logarithms: lightly before its pull request 1827
    return s, log_u


def slow_weight(s, sigma, i, mistake=""):
    mean = sum((x / sigma).exp() for x in s) / (1 if mistake == "no mean" else len(s))
    w = 2 - (s[i] / sigma).exp() / mean
    if mistake == "sigma outside":
        w = 2 - s[i].exp() / sum(x.exp() for x in s) * len(s)
    return {"no weight": w * 0 + 1, "weight without 2 -": 2 - w, "weight - 1": w - 1,
            "clamped": w.clamp(min=0)}.get(mistake, w)


def slow(name, z1, z2, tau, sigma=0.5, mistake=""):
    """The loss, one anchor at a time."""
    s, log_u = slow_terms(z1, z2, tau, mistake)
    total, n = 0, len(s)
    for a in range(n if mistake == "one direction" else 2 * n):
        i = a % n
        p, u = (s[i] / tau).exp(), log_u[a].exp()
        if name == "infonce":
            total = total - (p / (p + u)).log()
            continue
        w = torch.ones((), dtype=DOUBLE) if name == "dcl" else slow_weight(s, sigma, i, mistake)
        w = w if "trained" in name else w.detach()
        last = w * log_u[a] if mistake == "weight on both" else log_u[a]
        total = total - w * s[i] / tau + last
    return total / {"summed": 1, "summed over views": n}.get(mistake, 2 * n)


def slow_q(z1, z2, tau, mistake=""):
    s, log_u = slow_terms(z1, z2, tau, mistake)
    p, u = torch.stack(s * 2).div(tau).exp(), torch.stack(log_u).exp()
    q = u / (p + u)
    order = {"second views first": q.roll(len(s)), "image by image": q.view(2, -1).T.flatten()}
    return order.get(mistake, p / (p + u) if mistake == "P over all" else q)


@pytest.mark.parametrize("tau", [0.005, 0.01, 0.05, 0.07, 0.1, 0.2, 0.5, 1.0])
def test_losses_and_q_equal_double_loops(tau):
    for n, dim, seed in ((7, 5, 0), (2, 3, 1), (5, 16, 2)):
        z = embeddings(n, dim, seed=seed)
        for name, loss in LOSSES.items():
            for sigma in (0.5, 0.1) if "dclw" in name else (0.5,):
                ours = loss(*z, tau, sigma=sigma) if "dclw" in name else loss(*z, tau)
                expected = slow(name, *z, tau, sigma)
                assert ours.shape == () and ours.dtype == DOUBLE
                assert abs(ours.item() - expected.item()) < 1e-9, name
                both = [torch.autograd.grad(x, z) for x in (ours, expected)]
                assert furthest(*both) < 1e-9 * max(1, 1 / tau), name
        q, (m, s) = npc_multiplier(*z, tau), margins(*z, tau)
        slow_s, log_u = (torch.stack(x) for x in slow_terms(*z, tau))
        assert q.shape == m.shape == (2 * n,) and s.shape == (n,) and not q.requires_grad
        assert furthest([q, m, s], [slow_q(*z, tau), log_u - slow_s.repeat(2) / tau, slow_s]) < 1e-9


COMMON = ["self kept", "same view left out", "two logarithms", "positive kept", "not normalized"]


@pytest.mark.parametrize("mistake", [
    *COMMON, "one direction", "summed", "summed over views", "no weight", "weight without 2 -",
    "weight - 1", "clamped", "no mean", "sigma outside", "weight on both", "P over all",
    "second views first", "image by image"])
def test_the_double_loops_tell_wrong_losses_apart(mistake):
    z = embeddings(noise=2)  # with weights below 0
    weighted = mistake in ("clamped", "no mean", "sigma outside") or "weight" in mistake
    only_q = "P over" in mistake or "first" in mistake or "by image" in mistake
    for tau in (0.1, 0.5):
        for name in LOSSES if not only_q else ():
            if not weighted or "dclw" in name:
                wrong = slow(name, *z, tau, 0.2, mistake)
                assert (wrong - slow(name, *z, tau, 0.2)).abs() > 1e-3, (name, tau)
        if only_q or mistake in COMMON:
            assert furthest([slow_q(*z, tau, mistake)], [slow_q(*z, tau)]) > 1e-3
    infonce = slow("infonce", *z, 0.1)
    assert abs(infonce - slow("dcl", *z, 0.1)) > 1e-3
    assert abs(infonce - slow("dcl", *z, 0.1, mistake="positive kept")) < 1e-9


@pytest.mark.parametrize("tau", [0.07, 0.1, 0.5, 1.0])
def test_gradient_of_infonce_is_q_times_that_of_dcl_anchor_by_anchor(tau):  # the master identity
    z = embeddings()
    m, q = margins(*z, tau)[0], npc_multiplier(*z, tau)
    s, log_u = slow_terms(*z, tau)
    for a in range(14):
        p, u = (s[a % 7] / tau).exp(), log_u[a].exp()
        infonce = -(p / (p + u)).log()
        assert abs(m[a] - infonce - q[a].log()) < 1e-12  # L_DC = L + log q
        theirs = torch.autograd.grad(infonce, z, retain_graph=True)
        ours = torch.autograd.grad(m[a], z, retain_graph=True)
        scale = max(1, max(g.abs().max().item() for g in ours))
        assert furthest([q[a] * g for g in ours], theirs) < 1e-12 * scale
    both = [torch.autograd.grad(x, z) for x in (info_nce_loss(*z, tau), (q * m).mean())]
    assert furthest(*both) < 1e-11 and q.min() < 0.9


def test_losses_have_their_values_in_closed_form():
    for n, value in ((32, 4.127), (256, 6.234), (2, math.log(2))):
        same = torch.full((n, 3), 0.3, dtype=DOUBLE)
        for tau in (0.005, 0.07, 1.0):
            for name in ("dcl", "dclw", "dclw, weight trained"):  # w = 1 where all s are equal
                assert LOSSES[name](same, same, tau).item() == pytest.approx(math.log(2 * n - 2))
            assert info_nce_loss(same, same, tau).item() == pytest.approx(math.log(2 * n - 1))
            q = npc_multiplier(same, same, tau)
            assert furthest([q], [torch.full_like(q, (2 * n - 2) / (2 * n - 1))]) < 1e-12
        assert dcl_loss(same, same, 0.1).item() == pytest.approx(value, abs=6e-4)
    for tau in (0.02, 0.1, 1.0):  # aligned positives, orthogonal images: s = 1, all others 0
        eye = torch.eye(8, dtype=DOUBLE)
        expected = math.log(14) - 1 / tau
        for name in ("dcl", "dclw", "dclw, weight trained"):
            assert LOSSES[name](eye, 5 * eye, tau).item() == pytest.approx(expected)
        assert info_nce_loss(eye, eye, tau).item() == pytest.approx(
            math.log1p(14 * math.exp(-1 / tau)), rel=1e-9)
    for tau, value in ((0.07, -9.36), (0.1, -5.47), (0.5, 2.15)):  # no lower bound of 0
        z = torch.randn(20, 32, 128, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
        mean = sum(dcl_loss(x, x, tau).item() for x in z) / 20
        assert mean == pytest.approx(value, abs=0.06)
    for loss in (*LOSSES.values(), npc_multiplier, margins):
        with pytest.raises(ValueError):
            loss(torch.randn(1, 4), torch.randn(1, 4), 0.1)


def test_dclw_becomes_dcl_for_large_sigma_and_does_not_overflow_for_small_ones():
    z = embeddings()
    for name in ("dclw", "dclw, weight trained"):
        ours, expected = LOSSES[name](*z, 0.1, sigma=1e9), dcl_loss(*z, 0.1)
        both = [torch.autograd.grad(x, z) for x in (ours, expected)]
        assert abs(ours - expected) < 1e-7 and furthest(*both) < 1e-6
        assert LOSSES[name](*(x.float() for x in z), 0.1, sigma=0.005).isfinite()  # exp(200)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32_whatever_comes_in(dtype):
    z = embeddings(16, 32, dtype, noise=1)
    raised = [x.detach().float() for x in z]
    for tau in (0.005, 0.07, 1.0):
        for name, loss in LOSSES.items():
            with torch.autocast("cpu", torch.bfloat16):
                ours = loss(*z, tau)
            exact = slow(name, *(x.double() for x in raised), tau).item()
            assert ours.dtype == torch.float32
            assert ours.item() == pytest.approx(loss(*raised, tau).item(), rel=1e-6)
            assert ours.item() == pytest.approx(exact, rel=1e-5, abs=1e-5)
            assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(ours, z)), name
        q, (m, s) = npc_multiplier(*z, tau), margins(*z, tau)
        assert {q.dtype, m.dtype, s.dtype} == {torch.float32} and q.isfinite().all()


@pytest.mark.parametrize("tau", [0.02, 0.05, 0.07])
def test_float32_needs_the_self_similarity_dropped_not_subtracted(tau):
    z1, z2 = embeddings(32, 128, torch.float32, noise=0.1)
    expected = slow("dcl", z1.double(), z2.double(), tau).item()
    assert dcl_loss(z1, z2, tau).item() == pytest.approx(expected, abs=1e-4)
    z = normalize(torch.cat([z1, z2]))
    logits = z @ z.T / tau
    s = logits.diagonal(32).repeat(2)
    wrong = ((logits.exp().sum(1) - s.exp() - math.exp(1 / tau)).log() - s).mean().item()
    assert not abs(wrong - expected) < 1e-3  # nan, too


# -------------------------------------------------------------------------------- model and queue


def apart(model):
    """Lets the key networks be others than the online ones, as after some steps."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("key_"):
                p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=DOUBLE))
    return model


def tiny_model(queue=0):
    torch.manual_seed(0)
    return apart(Contrast(Tiny(), dim=6, hidden_dim=16, queue=queue).to(DOUBLE))


def test_the_head_has_two_layers_and_one_batch_norm():
    for bn in (True, False):
        head = Contrast(Tiny(), head_bn=bn).projector
        sizes = [layer.weight.shape for layer in head if isinstance(layer, nn.Linear)]
        assert sizes == [(2048, 8), (128, 2048)]
        assert sum(isinstance(layer, nn.BatchNorm1d) for layer in head) == bn


def slow_queue(q, k, queue, tau):
    """Margins of the anchors against the queue alone: the positive is no negative."""
    result = []
    for a, b in zip(q, k):
        a, b = a / a.norm(), b / b.norm()
        result.append(sum((a @ c / tau).exp() for c in queue).log() - a @ b / tau)
    return torch.stack(result)


@pytest.mark.parametrize("tau", [0.005, 0.07, 0.2, 1.0])
def test_queue_margins_equal_a_loop_and_pass_gradient_to_the_query_alone(tau):
    (q, k), queue = embeddings(), normalize(torch.cat(embeddings(seed=9))).detach()
    ours, expected = queue_margins(q, k, queue, tau), slow_queue(q, k.detach(), queue, tau)
    assert ours.shape == (7,) and furthest([ours], [expected]) < 1e-9
    dq, dk = torch.autograd.grad(ours.sum(), (q, k), allow_unused=True, retain_graph=True)
    theirs, = torch.autograd.grad(expected.sum(), q)
    assert furthest([dq], [theirs]) < 1e-9 / tau and theirs.abs().max() > 1e-3 and dk is None
    with_key = slow_queue(q, k, torch.cat([queue, normalize(k)]), tau)
    assert furthest([with_key], [expected]) > 1e-3
    for name, value in (("dcl", ours.mean()), ("infonce", ours.exp().log1p().mean())):
        args = parse("--queue", 64, "--loss", name, "--temperature", tau)
        loss, m = dcl.loss_and_margins(q, k, queue, args)
        assert furthest([m], [ours]) == 0
        assert value.isinf() or loss.item() == pytest.approx(value.item(), rel=1e-9)
    asks = queue.clone().requires_grad_()
    assert torch.autograd.grad(queue_margins(q, k, asks, tau).sum(), asks, allow_unused=True) == (
        None,)
    q, k, queue = (x.detach().bfloat16().float() for x in (q, k, queue))
    with torch.autocast("cpu", torch.bfloat16):
        half = queue_margins(q.bfloat16(), k.bfloat16(), queue, tau)
    assert half.dtype == torch.float32 and torch.equal(half, queue_margins(q, k, queue, tau))


# ----------------------------------------------------------------------------- one training step

STEP = "--recipe imagenet --batch-size 512 --base-lr 0.2 --weight-decay 0.1"
KINDS = {"infonce": "--loss infonce", "dcl": "--loss dcl", "dclw": "--loss dclw --sigma 0.3",
         "dclw, weight trained": "--loss dclw --dclw-backprop-weight --sigma 0.3",
         "queue, dcl": "--queue 1024 --ema-momentum 0.8",
         "queue, infonce": "--loss infonce --queue 1024 --ema-momentum 0.8"}
EPOCHS = (0.0, 50.5, 150.25)


def build(name):
    return tiny_model(16 if "queue" in name else 0)


def slow_step(name, model, buffers, x, epoch, mistake=""):
    """SGD with momentum and decay at 0.2 * 512 / 256, cosine over 200 epochs."""
    def network(y, key=""):
        encoder, head = getattr(model, f"{key}encoder"), getattr(model, f"{key}projector")
        return head(encoder(y))

    if "queue" in name:
        z = network(x[:8])
        with torch.no_grad():
            k = network(x[8:], "" if mistake == "online keys" else "key_")
        m = slow_queue(z, k, torch.cat([model.queue, normalize(k)]) if mistake == "keys in queue"
                       else model.queue, 0.1)
        loss = (m.exp().log1p() if "infonce" in name else m).mean()
    else:
        z, k = network(x).chunk(2)
        if mistake == "views apart":
            z, k = network(x[:8]), network(x[8:])
        m = torch.stack(slow_terms(z, k, 0.1)[1]) - torch.cosine_similarity(z, k).repeat(2) / 0.1
        loss = slow(name, z, k, 0.1, 0.3)
    named = {path: p for path, p in model.named_parameters() if not path.startswith("key_")}
    gradients = torch.autograd.grad(loss, [*named.values()])
    lr = 0.2 * (1 if mistake == "lr of 256" else 2) * (1 + math.cos(math.pi * epoch / 200)) / 2
    with torch.no_grad():
        for (path, p), g in zip(named.items(), gradients):
            average = mistake == "average before the step" and "queue" in name
            old, g = p.clone(), g + (0 if mistake == "no decay" else 0.1) * p
            buffers[path] = g + (0 if mistake == "no momentum" else 0.9) * buffers.get(path, 0)
            p.sub_(lr * buffers[path])
            if "queue" in name and mistake != "no average":
                key = model.get_parameter(f"key_{path}")
                key.mul_(0.8).add_(0.2 * (old if average else p))
        if "queue" in name:
            model.queue.copy_(torch.cat([model.queue, normalize(k)])[-16:])
    return loss.detach(), z.detach(), m.detach()


def step_differs(name, mistake=""):
    args = parse(*STEP.split(), *KINDS[name].split())
    model, twin, buffers, worst = build(name), build(name), {}, []
    optimizer = dcl.build_optimizer(model, args)
    for i, epoch in enumerate(EPOCHS):
        x = views(seed=30 + i)
        ours = dcl.train_step(model, optimizer, x, epoch, args)
        theirs = slow_step(name, twin, buffers, x, epoch, mistake)
        assert not any(y.requires_grad for y in ours)
        worst.append(furthest([ours[0], ours[1], ours[3]], theirs))
    states = model.state_dict(), twin.state_dict()
    if "queue" in name:
        states[0]["queue"] = model.queue.roll(-int(model.oldest), 0)
        states[0]["oldest"] = states[1]["oldest"]
    return max(*worst, furthest(*(state.values() for state in states)))


@pytest.mark.parametrize("name", KINDS)
def test_training_steps_equal_those_written_out(name):
    assert step_differs(name) < 1e-9


@pytest.mark.parametrize("mistake", [
    "views apart", "lr of 256", "no decay", "no momentum", "online keys", "keys in queue",
    "average before the step", "no average"])
def test_steps_written_out_with_a_mistake_differ(mistake):
    queue = mistake in ("online keys", "keys in queue", "average before the step", "no average")
    assert step_differs("queue, dcl" if queue else "dclw", mistake) > 1e-4


@pytest.mark.parametrize("tau", [0.07, 0.3])  # neither is the recipe's
def test_the_loss_trained_is_the_public_one_at_the_flags(tau):
    z = embeddings()
    for flags, expected in {
            "--loss infonce": info_nce_loss(*z, tau), "--loss dcl": dcl_loss(*z, tau),
            "--loss dclw --sigma 0.3": dclw_loss(*z, tau, 0.3),
            "--loss dclw --dclw-backprop-weight": dclw_loss(*z, tau, backprop_weight=True)}.items():
        args = parse("--recipe", "imagenet", *flags.split(), "--temperature", tau)
        loss, m = dcl.loss_and_margins(*z, None, args)
        both = [torch.autograd.grad(x, z) for x in (loss, expected)]
        assert abs(loss - expected) < 1e-12 and furthest(*both) < 1e-12, flags
        assert furthest([m], [margins(*z, tau)[0]]) == 0
        assert not m.requires_grad


@pytest.mark.parametrize("queue", [0, 16])
def test_a_bfloat16_step_keeps_loss_weights_and_queue_in_float32(queue):
    args = parse(*STEP.split(), "--queue", 64 * queue, "--batch-size", 16, precision="bf16",
                 dtype=torch.float32)
    model = tiny_model(queue).float()
    optimizer, before = dcl.build_optimizer(model, args), copy.deepcopy(model.state_dict())
    loss, z, _, m = dcl.train_step(model, optimizer, views().float(), 0.0, args)
    assert z.dtype == torch.bfloat16 and loss.dtype == m.dtype == torch.float32
    for name, x in model.state_dict().items():
        assert x.dtype == before[name].dtype and x.isfinite().all(), name
    assert not queue or (model.queue.norm(dim=1) - 1).abs().max() < 1e-6


def test_rate_rises_linearly_then_falls_as_half_a_cosine_by_the_flags():
    args = parse("--batch-size", 128, "--base-lr", 0.4, "--epochs", 8, "--warmup-epochs", 4,
                 "--momentum", 0.7, "--weight-decay", 0.02)
    model = tiny_model()
    optimizer = dcl.build_optimizer(model, args)
    for epoch, share in ((0, 0), (1, 0.25), (2.5, 0.625), (4, 1), (6, 0.5), (7, 0.1464466)):
        dcl.train_step(model, optimizer, views(), epoch, args)
        group, = optimizer.param_groups
        assert group["lr"] == pytest.approx(0.2 * share, abs=1e-7)
        assert (group["momentum"], group["weight_decay"]) == (0.7, 0.02)


# ------------------------------------------------------------------------------ network and recipes


@pytest.mark.parametrize("flags, path, shape", [
    ("", "conv1", (64, 3, 7, 7)), ("--small-images", "conv1", (64, 3, 3, 3)),
    ("--arch resnet18", "layer4.1.conv2", (512, 512, 3, 3)),
    ("--width 0.5", "conv1", (32, 3, 7, 7))])
def test_encoder_is_the_one_of_the_flags(flags, path, shape):
    for more, zero in (("--zero-init-residual", True), ("--no-zero-init-residual", False)):
        encoder = dcl.build_encoder(parse("--recipe", "imagenet", *flags.split(), more))
        assert encoder.get_submodule(path).weight.shape == shape
        last = encoder.layer1[0].bn2 if "18" in flags else encoder.layer1[0].bn3
        assert last.weight.any() != zero


PAPER = dict(epochs=200, batch_size=256, base_lr=0.03, dim=128, momentum=0.9, sigma=0.5, loss="dcl",
             gray_prob=0.2, dclw_backprop_weight=False, negatives="global", queue=0, width=1)
IMAGENET = dict(arch="resnet50", temperature=0.1, weight_decay=1e-4, small_images=False,
                image_size=224)
SMALL = dict(arch="resnet18", temperature=0.07, weight_decay=5e-4, crop_min=0.2,  # CLD's code
             jitter=(0.4, 0.4, 0.4, 0.4), jitter_prob=1, blur_prob=0)
RECIPES = {"imagenet": IMAGENET, "imagenet100": IMAGENET, "stl10": {**SMALL, "image_size": 96},
           "cifar": {**SMALL, "image_size": 32, "small_images": True}}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_the_papers(recipe):
    assert dcl.RECIPES["pretrain"].keys() == {*RECIPES, "demo"} == dcl.RECIPES["linear"].keys()
    assert vars(parse("--recipe", recipe)).items() >= (PAPER | RECIPES[recipe]).items()
    for batch in (32, 512):  # the batch-size study: the rate follows the global number of images
        args, model = parse("--recipe", recipe, "--batch-size", batch), tiny_model()
        optimizer = dcl.build_optimizer(model, args)
        dcl.train_step(model, optimizer, views(), float(args.warmup_epochs), args)
        assert type(optimizer) is torch.optim.SGD
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(0.03 * batch / 256) and not group["nesterov"]
            assert group["momentum"] == 0.9 and group["weight_decay"] == args.weight_decay


# -------------------------------------------------------------------------------- the monitor of q


def statistics(steps):
    """Each within a step over all anchors, then the mean over steps; in numpy."""
    rows = []
    for m in steps:
        m = np.asarray(m, dtype=np.float64)
        q = 1 / (1 + np.exp(-m))
        rows.append({"q_mean": q.mean(), "q_std": q.std(), "q_cv": q.std() / q.mean(),
                     "q_below_0.1": (q < 0.1).mean(), "dcl": m.mean(),
                     "infonce": np.log1p(np.exp(m)).mean()})
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def some_margins():
    """5 steps of 16 anchors; the ranks' parts, and the steps, differ clearly."""
    g = torch.Generator().manual_seed(4)
    shift = torch.linspace(-4, 3, 16, dtype=DOUBLE) + 2 * torch.arange(5.0)[:, None]
    return shift + torch.randn(5, 16, generator=g, dtype=DOUBLE)


def monitored(rank=0, world=1):
    """Two readings, after three steps and after two more, as pretrain() makes them."""
    parts = [m.chunk(world, dim=1)[rank] for m in some_margins().split([3, 2])]
    return [dcl.coupling(dcl.all_gather(m.T).T) for m in parts]


def test_monitor_averages_over_steps_what_numpy_finds_in_each():
    m, readings = some_margins(), monitored()
    for reading, steps in zip(readings, (m[:3], m[3:])):
        assert reading == pytest.approx(statistics(steps), rel=1e-6)
        pooled = statistics(steps.reshape(1, -1))  # another number
        assert abs(pooled["q_cv"] - reading["q_cv"]) > 1e-3
        halves = [statistics(x) for x in steps.chunk(2, 1)]
        for key in ("q_cv", "q_std"):  # so is the mean of the ranks' values
            assert abs(sum(half[key] for half in halves) / 2 - reading[key]) > 1e-3
    assert 0 < readings[0]["q_below_0.1"] < 1


# --------------------------------------------------------------------- several processes equal one

N, WORLDS = 8, (4, 2, 1)
GATHERS = ("right", "no gradient", "local slice", "times W")


def on_inputs(rank=0, world=1, negatives="global", n=N):
    """Loss and input gradients of this process's images, its q and margins."""
    z = torch.cat(embeddings(n, 6, seed=2)).detach()
    z1, z2 = part(z, rank, world).requires_grad_().chunk(2)
    record = {}
    for name, loss in LOSSES.items():
        value = loss(z1, z2, 0.1, negatives=negatives)
        gradients = torch.autograd.grad(value, (z1, z2))
        record |= {f"mean {name}": value.detach()}
        record |= {f"split {name} {i}": g / world for i, g in enumerate(gradients)}
    q, (m, s) = npc_multiplier(z1, z2, 0.1, negatives), margins(z1, z2, 0.1, negatives)
    for i in range(2):
        record |= {f"rows q {i}": q.chunk(2)[i], f"rows m {i}": m.detach().chunk(2)[i]}
    return record | {"rows s": s.detach()}


def network_steps(name, rank=0, world=1, flags=""):
    """Two steps of the program's own: model, optimizer, DDP, batch norm of the global batch."""
    args = parse(*STEP.split(), *KINDS[name].split(), *flags.split())
    model, record = build(name), {}
    optimizer = dcl.build_optimizer(model, args)
    net, done = dcl.distribute(model, args), record_gradients(model, optimizer, record)
    for i, epoch in enumerate(EPOCHS[:2]):
        x = part(views(N, seed=20 + i), rank, world)
        loss, z1, _, m = dcl.train_step(net, optimizer, x, epoch, args)
        record |= {f"mean loss {i}": loss.clone(), f"rows z {i}": z1.clone()}
        record |= {f"rows m {i} {k}": y for k, y in enumerate(m.split(len(x) // 2))}
    assert done()
    return record | {f"each {key}": x.clone() for key, x in model.state_dict().items()}


alone = functools.cache(network_steps)


def worker(rank, world):
    assert (dcl.rank(), dcl.world_size()) == (rank, world)
    ours = dcl.gather_with_grad
    results = {("monitor",): monitored(rank, world),
               ("one image each",): on_inputs(rank, world, n=4)}
    for negatives in ("global", "local"):
        results["inputs", negatives] = on_inputs(rank, world, negatives)
    for name in KINDS:
        results[name,] = network_steps(name, rank, world)
    results["dcl", "local"] = network_steps("dcl", rank, world, "--negatives local")
    for which in GATHERS if world > 1 else ():
        dcl.gather_with_grad = lambda x, which=which: Gather.apply(x, which)
        results["inputs", which] = on_inputs(rank, world)
        results["dcl", which] = network_steps("dcl", rank, world)
        dcl.gather_with_grad = ours
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(worker, tmp_path_factory.mktemp("ranks"), WORLDS)


@pytest.mark.parametrize("world", WORLDS)
def test_losses_q_and_gradients_on_ranks_equal_one_process(ranks, world):
    worst = differs(ranks, on_inputs(), world, "inputs", "global")
    assert max(worst.values()) < 1e-10, worst
    worst = differs(ranks, on_inputs(n=4), world, "one image each")
    assert max(worst.values()) < 1e-10, worst


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("world", WORLDS)
def test_training_on_ranks_equals_one_process(ranks, world, name):
    """Losses, margins, gradients, networks, running statistics and queue, over two steps."""
    worst = differs(ranks, alone(name), world, name)
    assert max(worst.values()) < 1e-10, worst


@pytest.mark.parametrize("world", [2, 4])
def test_wrong_gathers_fail_those_checks_though_their_losses_are_right(ranks, world):
    for key, reference in (("inputs", on_inputs()), ("dcl", alone("dcl"))):
        assert max(differs(ranks, reference, world, key, "right").values()) < 1e-10
        for which in GATHERS[1:]:
            worst = differs(ranks, reference, world, key, which)
            assert worst["gradient"] > 1e-3, (key, which)
            assert key == "dcl" or worst["mean"] < 1e-12, which  # values cannot tell
        local = differs(ranks, reference, world, key, "local")
        assert min(local["gradient"], local["mean"], local["rows"]) > 1e-3, key
    for name in LOSSES:  # each of the losses, not only the worst of them
        reference = {k: x for k, x in on_inputs().items() if k.startswith(f"split {name}")}
        for which in (*GATHERS[1:], "local"):
            found = [ranks[rank][world]["inputs", which] for rank in range(world)]
            assert max(furthest([torch.cat([x[key] for x in found])], [expected])
                       for key, expected in reference.items()) > 1e-3, (name, which)


@pytest.mark.parametrize("world", WORLDS)
def test_local_negatives_are_each_process_alone(ranks, world):
    z = torch.cat(embeddings(N, 6, seed=2)).detach()
    pairs = torch.cosine_similarity(*z.chunk(2))
    weights = (2 - N * (pairs / 0.5).softmax(dim=0)).chunk(world)  # of the global batch
    for rank in range(world):
        z1, z2 = part(z, rank, world).requires_grad_().chunk(2)
        found = ranks[rank][world]["inputs", "local"]
        for name, loss in LOSSES.items():
            value = loss(z1, z2, 0.1)  # no process group here
            if name.startswith("dclw"):
                m, s = margins(z1, z2, 0.1)
                value = (m + ((1 - weights[rank]) * s / 0.1).repeat(2)).mean()
            if name == "dclw, weight trained":  # its gradient passes through the others' pairs
                assert abs(found[f"mean {name}"] - value) < 1e-12
                continue
            gradients = torch.autograd.grad(value, (z1, z2))
            assert abs(found[f"mean {name}"] - value) < 1e-12, name
            ours = [found[f"split {name} {i}"] * world for i in range(2)]
            assert furthest(ours, gradients) < 1e-12, name
        q = torch.cat([found["rows q 0"], found["rows q 1"]])
        assert furthest([q], [npc_multiplier(z1, z2, 0.1)]) < 1e-12


@pytest.mark.parametrize("world", WORLDS)
def test_monitor_on_ranks_equals_numpy_on_all_anchors(ranks, world):
    m = some_margins()
    for rank in range(world):
        for reading, steps in zip(ranks[rank][world]["monitor",], (m[:3], m[3:]), strict=True):
            assert reading == pytest.approx(statistics(steps), rel=1e-6)


# -------------------------------------------------------------------------------------- the program

SMALL = ["--recipe", "demo", "--width", 0.125, "--image-size", 16, "--dim", 8, "--hidden-dim", 16,
         "--batch-size", 16, "--workers", 0, "--knn-every", 0, "--precision", "fp32",
         "--log-every", 1]
main = program(dcl)


@pytest.mark.parametrize("flags", ["--loss dclw", "--queue 32 --loss infonce"])
def test_two_processes_log_what_one_does(flags, classes, tmp_path):
    args = ["--data", classes, *SMALL, *flags.split(), "--precision", "fp64", "--steps", 4]
    main(*args, "--out", tmp_path / "one")
    run("dcl.py", *args, "--out", tmp_path / "two", processes=2)
    weights = ["w_min", "w_mean"] if "dclw" in flags else []
    assert_close_runs(tmp_path / "one", tmp_path / "two", 4, "q_mean", "q_std", "q_cv",
                      "q_below_0.1", "dcl", "infonce", *weights)
    for line in records(tmp_path / "two") if weights else ():
        assert line["w_mean"] == pytest.approx(1) and line["w_min"] < 1


def test_local_negatives_are_another_run_and_their_number_is_said(classes, tmp_path):
    args = ["--data", classes, *SMALL, "--precision", "fp64", "--steps", 1, "--negatives"]
    for which, count in (("local", 14), ("global", 30)):
        said = run("dcl.py", *args, which, "--out", tmp_path / which, processes=2)
        assert f"dcl: {count} negatives an anchor" in said
    assert losses(tmp_path / "local") != losses(tmp_path / "global")


def test_the_log_holds_q_and_both_losses_whatever_is_trained(classes, tmp_path):
    first = {}
    for loss in ("infonce", "dcl", "dclw"):
        main("--data", classes, *SMALL, "--loss", loss, "--steps", 2, "--out", tmp_path / loss)
        first[loss] = records(tmp_path / loss)[0]
    for name in ("q_mean", "q_std", "q_cv", "q_below_0.1", "dcl", "infonce"):
        assert len({line[name] for line in first.values()}) == 1, name  # one network, one batch
    for loss in ("infonce", "dcl"):
        assert first[loss]["loss"] == pytest.approx(first[loss][loss], abs=1e-5)
    assert len({line["loss"] for line in first.values()}) == 3


def test_q_in_the_log_is_the_mean_of_the_steps_since_the_line_before(classes, tmp_path):
    args = ["--data", classes, *SMALL, "--epochs", 3, "--steps", 7]
    main(*args, "--out", tmp_path / "each")
    main(*args, "--log-every", 100, "--out", tmp_path / "epoch")
    each = {line["step"]: line["q_cv"] for line in records(tmp_path / "each")}
    found = {line["step"]: line["q_cv"] for line in records(tmp_path / "epoch")}
    assert found.keys() == {1, 3, 6, 7} and found[1] == pytest.approx(each[1])
    assert found[6] == pytest.approx((each[4] + each[5] + each[6]) / 3)


@pytest.mark.parametrize("queue, anchors", [(0, 192), (96, 96)])
def test_histograms_cover_the_last_4096_anchors_or_more(queue, anchors, tmp_path):
    flags = ["--batch-size", 96, "--queue", queue, "--epochs", 2, "--log-every", 50]
    main(*SMALL, *flags, "--out", tmp_path)
    lines = records(tmp_path, "q_histogram")
    assert [(line["step"], line["share"]) for line in lines] == [
        (1, 0.01), (8, 0.1), (41, 0.5), (82, 1)]
    for line in lines:  # 4096 / 192 and 4096 / 96 steps, rounded up
        seen = anchors * min(line["step"], 22 if queue == 0 else 43)
        assert len(line["q_histogram"]) == 50 and sum(line["q_histogram"]) == seen


@pytest.mark.parametrize("flags, sentence", {
    "--queue 24": "--queue 24: must be a multiple of --batch-size 16",
    "--queue 48": "less than an epoch's 48 images",
    "--queue 32 --loss dclw": "--loss dclw has no form for a queue",
    "--loss triplet": "invalid choice: 'triplet'", "--temperature 0": "--temperature 0.0: must be",
}.items())
def test_mistakes_get_one_sentence(flags, sentence, classes, tmp_path, capsys):
    words = ["--data", classes, *SMALL, *flags.split(), "--out", tmp_path / "run"]
    if "triplet" in flags:  # argparse's own
        with pytest.raises(SystemExit):
            main(*words)
        assert sentence in capsys.readouterr().err
    else:
        assert sentence in mistake(dcl, *words)
