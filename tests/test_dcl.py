"""dcl.py against the paper: losses, q_B, queue, training step, recipes, processes, log.

The oracles are written from the equations of arXiv 2110.06848, one anchor at a time.
"""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

import dcl
from conftest import assert_close_runs, mistake, on_ranks, program, records, run
from dcl import (
    Contrast, dcl_loss, dclw_loss, info_nce_loss, margins, npc_multiplier, queue_margins)
from helpers import DOUBLE, Gather, Tiny, differs, furthest, part, record_gradients, settled
from helpers import embedding_pairs as embeddings
from helpers import joined_views as views

parse = functools.partial(settled, dcl)
LOSSES = {"infonce": info_nce_loss, "dcl": dcl_loss, "dclw": dclw_loss,
          "dclw, weight trained": functools.partial(dclw_loss, backprop_weight=True)}


def slow_terms(z1, z2, tau, mistake=""):
    """s of each image, log U of each of the 2n anchors, term by term."""
    n = len(z1)
    z = [x / (5 if mistake == "not normalized" else x.square().sum().sqrt()) for x in (*z1, *z2)]
    s, log_u = [z[i] @ z[n + i] for i in range(n)], []
    for a in range(2 * n):
        own, i = a // n * n, a % n  # its view begins at own
        same = sum((z[a] @ z[own + j] / tau).exp() for j in range(n)
                   if j != i or mistake == "self kept") * (mistake != "same view left out")
        other = sum((z[a] @ z[n - own + j] / tau).exp() for j in range(n)
                    if j != i or mistake == "positive kept")
        both = same.log() + other.log() if mistake == "two logarithms" else (same + other).log()
        log_u.append(both)  # two logarithms: lightly before its pull request 1827
    return s, log_u


def slow(name, z1, z2, tau, sigma=0.5, mistake=""):
    """The loss, one anchor at a time."""
    s, log_u = slow_terms(z1, z2, tau, mistake)
    total, n, sigma = 0, len(s), 1 if mistake == "sigma outside" else sigma
    mean = sum((x / sigma).exp() for x in s) / (1 if mistake == "no mean" else n)
    for a in range(n if mistake == "one direction" else 2 * n):
        i = a % n
        if name == "infonce":
            p = (s[i] / tau).exp()
            total = total - (p / (p + log_u[a].exp())).log()
            continue
        w = torch.ones((), dtype=DOUBLE) if name == "dcl" else 2 - (s[i] / sigma).exp() / mean
        w = {"no weight": w * 0 + 1, "weight without 2 -": 2 - w, "weight - 1": w - 1,
             "clamped": w.clamp(min=0)}.get(mistake, w)
        w = w if "trained" in name else w.detach()
        total = total - w * s[i] / tau + log_u[a] * (w if mistake == "weight on both" else 1)
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


@pytest.mark.parametrize("names, mistakes", [
    ((*LOSSES, "q"), ("self kept", "same view left out", "two logarithms", "positive kept",
                      "not normalized")),
    ((*LOSSES,), ("one direction", "summed", "summed over views")),
    (("dclw", "dclw, weight trained"), ("no weight", "weight without 2 -", "weight - 1", "clamped",
                                        "no mean", "sigma outside", "weight on both")),
    (("q",), ("P over all", "second views first", "image by image"))], ids=str)
def test_the_double_loops_tell_wrong_losses_apart(names, mistakes):
    z = embeddings(noise=2)  # with weights below 0
    for tau, name, which in itertools.product((0.1, 0.5), names, mistakes):
        oracle = slow_q if name == "q" else functools.partial(slow, name, sigma=0.2)
        wrong, right = oracle(*z, tau, mistake=which), oracle(*z, tau)
        assert furthest([wrong], [right]) > 1e-3, (tau, name, which)
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
    assert q.min() < 0.9


def test_losses_have_their_values_in_closed_form():
    eye = torch.eye(8, dtype=DOUBLE)
    for tau, (name, loss) in itertools.product((0.005, 0.02, 0.07, 0.1, 1.0), LOSSES.items()):
        for n in (2, 32, 256):  # all z are equal, so all weights are 1
            same = torch.full((n, 3), 0.3, dtype=DOUBLE)
            others = 2 * n - (1 if name == "infonce" else 2)
            assert loss(same, same, tau).item() == pytest.approx(math.log(others)), name
            q = npc_multiplier(same, same, tau)
            assert furthest([q], [torch.full_like(q, (2 * n - 2) / (2 * n - 1))]) < 1e-12
        m = math.log(14) - 1 / tau  # aligned positives, orthogonal images: s = 1, all others 0
        expected = math.log1p(math.exp(m)) if name == "infonce" else m  # no lower bound of 0
        assert loss(eye, 5 * eye, tau).item() == pytest.approx(expected, rel=1e-9, abs=0), name
    for loss in (*LOSSES.values(), npc_multiplier, margins):
        with pytest.raises(ValueError):
            loss(torch.randn(1, 4), torch.randn(1, 4), 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32_whatever_comes_in(dtype):
    z = embeddings(16, 32, dtype, noise=torch.linspace(0.5, 6, 16)[:, None])  # easy and hard
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
            assert "dclw" not in name or loss(*raised, tau, sigma=0.005).isfinite()  # exp(200)
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


STEP = ("--recipe imagenet --batch-size 512 --base-lr 0.2 --epochs 160 --warmup-epochs 10 "
        "--momentum 0.7 --weight-decay 0.1 --temperature 0.2")
KINDS = {"infonce": "--loss infonce", "dcl": "--loss dcl", "dclw": "--loss dclw --sigma 0.3",
         "dclw, weight trained": "--loss dclw --dclw-backprop-weight --sigma 0.3",
         "queue, dcl": "--queue 1024 --ema-momentum 0.8 --batch-size 128",
         "queue, infonce": "--loss infonce --queue 1024 --ema-momentum 0.8 --batch-size 128"}
EPOCHS = (2.5, 10, 50.5, 150.25)


def tiny_model(name=""):
    """Its key networks are others than the online ones, as after some steps."""
    torch.manual_seed(0)
    model = Contrast(Tiny(), dim=6, hidden_dim=16, queue=16 if "queue" in name else 0).to(DOUBLE)
    with torch.no_grad():
        for path, p in model.named_parameters():
            p.add_(0.1 * path.startswith("key_") * torch.randn_like(p))
    return model


def test_the_head_has_two_layers_and_one_batch_norm():
    for bn in (True, False):
        head = Contrast(Tiny(), head_bn=bn).projector
        sizes = [layer.weight.shape for layer in head if isinstance(layer, nn.Linear)]
        assert sizes == [(2048, 8), (128, 2048)]
        assert sum(isinstance(layer, nn.BatchNorm1d) for layer in head) == bn


def slow_queue(q, k, queue, tau):
    """Margins of the anchors against the queue alone: the positive is no negative."""
    q, k = (x / x.square().sum(dim=1, keepdim=True).sqrt() for x in (q, k))
    return torch.stack([sum((a @ c / tau).exp() for c in queue).log() - a @ b / tau
                        for a, b in zip(q, k)])


@pytest.mark.parametrize("tau", [0.005, 0.07, 0.2, 1.0])
def test_queue_margins_equal_a_loop_and_pass_gradient_to_the_query_alone(tau):
    (q, k), queue = embeddings(), normalize(torch.cat(embeddings(seed=9)))
    ours, expected = queue_margins(q, k, queue, tau), slow_queue(q, k, queue, tau)
    assert ours.shape == (7,) and furthest([ours], [expected]) < 1e-9
    dq, dk, dqueue = torch.autograd.grad(ours.sum(), (q, k, queue), allow_unused=True)
    theirs, = torch.autograd.grad(expected.sum(), q)
    assert furthest([dq], [theirs]) < 1e-9 / tau and dq.abs().max() > 1e-3 and dk is dqueue is None
    q, k, queue = (x.detach().bfloat16().float() for x in (q, k, queue))
    with torch.autocast("cpu", torch.bfloat16):
        half = queue_margins(q.bfloat16(), k.bfloat16(), queue, tau)
    assert half.dtype == torch.float32 and torch.equal(half, queue_margins(q, k, queue, tau))


def slow_step(name, model, buffers, x, epoch, mistake=""):
    """SGD as STEP says: linear warm-up over 10 epochs, then half a cosine to epoch 160."""
    def network(y, key=""):
        return getattr(model, f"{key}projector")(getattr(model, f"{key}encoder")(y))

    if "queue" in name:
        z, k = network(x[:8]), network(x[8:], "" if mistake == "online keys" else "key_").detach()
        m = slow_queue(z, k, torch.cat([model.queue, normalize(k)]) if mistake == "keys in queue"
                       else model.queue, 0.2)
        loss = (m.exp().log1p() if "infonce" in name else m).mean()
    else:
        apart = mistake == "views apart"
        z, k = (network(x[:8]), network(x[8:])) if apart else network(x).chunk(2)
        m = torch.stack(slow_terms(z, k, 0.2)[1]) - torch.cosine_similarity(z, k).repeat(2) / 0.2
        loss = slow(name, z, k, 0.2, 0.3)
    named = {path: p for path, p in model.named_parameters() if not path.startswith("key_")}
    gradients = torch.autograd.grad(loss, [*named.values()])
    share = epoch / 10 if epoch < 10 else (1 + math.cos(math.pi * (epoch - 10) / 150)) / 2
    images = 256 if mistake == "lr of 256" else 128 if "queue" in name else 512
    lr = 0.2 * images / 256 * share
    with torch.no_grad():
        for (path, p), g in zip(named.items(), gradients):
            old, g = p.clone(), g + (0 if mistake == "no decay" else 0.1) * p
            buffers[path] = g + (0 if mistake == "no momentum" else 0.7) * buffers.get(path, 0)
            p.sub_(lr * buffers[path])
            if "queue" in name and mistake != "no average":
                key = model.get_parameter(f"key_{path}")
                key.mul_(0.8).add_(0.2 * (old if mistake == "average before the step" else p))
        if "queue" in name:
            model.queue.copy_(torch.cat([model.queue, normalize(k)])[-16:])
    return loss.detach(), z.detach(), m.detach()


@pytest.mark.parametrize("name, mistake", [
    *((name, "") for name in KINDS),
    *(("dclw", which) for which in ("views apart", "lr of 256", "no decay", "no momentum")),
    *(("queue, dcl", which) for which in ("online keys", "keys in queue", "lr of 256", "no average",
                                          "average before the step"))])
def test_training_steps_equal_those_written_out_and_no_others(name, mistake):
    args = parse(*STEP.split(), *KINDS[name].split())
    model, twin, buffers, worst = tiny_model(name), tiny_model(name), {}, []
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
    worst = max(*worst, furthest(*(state.values() for state in states)))
    assert worst > 1e-4 if mistake else worst < 1e-9, worst


@pytest.mark.parametrize("name", ["dcl", "queue, dcl"])
def test_a_bfloat16_step_keeps_loss_weights_and_queue_in_float32(name):
    args = parse(*STEP.split(), *KINDS[name].split(), precision="bf16", dtype=torch.float32)
    model = tiny_model(name).float()
    optimizer = dcl.build_optimizer(model, args)
    loss, z, _, m = dcl.train_step(model, optimizer, views().float(), 9, args)
    assert z.dtype == torch.bfloat16 and loss.dtype == m.dtype == torch.float32
    for path, x in model.state_dict().items():
        assert x.dtype in (torch.float32, torch.int64) and x.isfinite().all(), path  # 2nd: counts
    assert model.queue is None or (model.queue.norm(dim=1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("flags, path, shape", [
    ("", "conv1", (64, 3, 7, 7)), ("--small-images", "conv1", (64, 3, 3, 3)),
    ("--zero-init-residual --width 0.5", "conv1", (32, 3, 7, 7)),
    ("--zero-init-residual --arch resnet18", "layer4.1.conv2", (512, 512, 3, 3))])
def test_encoder_is_the_one_of_the_flags(flags, path, shape):
    encoder = dcl.build_encoder(parse("--recipe", "imagenet", *flags.split()))
    assert encoder.get_submodule(path).weight.shape == shape
    last = encoder.layer1[0].bn2 if "18" in flags else encoder.layer1[0].bn3
    assert last.weight.any() != ("zero" in flags)


PAPER = dict(epochs=200, batch_size=256, base_lr=0.03, dim=128, momentum=0.9, sigma=0.5, loss="dcl",
             gray_prob=0.2, dclw_backprop_weight=False, negatives="global", queue=0, width=1,
             warmup_epochs=0, zero_init_residual=False)
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


N, WORLDS, GATHERS = 8, (4, 2, 1), ("right", "no gradient", "local slice", "times W")


def statistics(m):
    """Each within a step over all anchors, then the mean over steps; in numpy."""
    m, q = m.numpy(), 1 / (1 + np.exp(-m.numpy()))
    steps = {"q_mean": q.mean(1), "q_std": q.std(1), "q_cv": q.std(1) / q.mean(1),
             "q_below_0.1": (q < 0.1).mean(1), "dcl": m.mean(1),
             "infonce": np.log1p(np.exp(m)).mean(1)}
    return {name: x.mean() for name, x in steps.items()}


def some_margins():
    """5 steps of 16 anchors; the ranks' parts, and the steps, differ clearly."""
    g = torch.Generator().manual_seed(4)
    shift = torch.linspace(-4, 3, 16, dtype=DOUBLE) + 2 * torch.arange(5.0)[:, None]
    return shift + torch.randn(5, 16, generator=g, dtype=DOUBLE)


def on_inputs(rank=0, world=1, negatives="global", n=N):
    """Loss and input gradients of this process's images, its q and margins."""
    z = torch.cat(embeddings(n, 6, seed=2)).detach()
    z1, z2 = part(z, rank, world).requires_grad_().chunk(2)
    record = {}
    for name, loss in LOSSES.items():
        value = loss(z1, z2, 0.1, negatives=negatives)
        gradients = torch.stack(torch.autograd.grad(value, (z1, z2)), dim=1)
        record |= {f"mean {name}": value.detach(), f"split {name}": gradients / world}
    q, (m, s) = npc_multiplier(z1, z2, 0.1, negatives), margins(z1, z2, 0.1, negatives)
    record |= {"rows q": q.view(2, -1).T, "rows m": m.detach().view(2, -1).T}
    return record | {"rows s": s.detach()}


def network_steps(name, rank=0, world=1, flags=""):
    """Two steps of the program's own: model, optimizer, DDP, batch norm of the global batch."""
    args = parse(*STEP.split(), *KINDS[name].split(), *flags.split())
    model, record = tiny_model(name), {}
    optimizer = dcl.build_optimizer(model, args)
    net, done = dcl.distribute(model, args), record_gradients(model, optimizer, record)
    for i, epoch in enumerate(EPOCHS[:2]):
        x = part(views(N, seed=20 + i), rank, world)
        loss, z1, _, m = dcl.train_step(net, optimizer, x, epoch, args)
        record |= {f"mean loss {i}": loss.clone(), f"rows z {i}": z1.clone(),
                   f"rows m {i}": m.view(-1, len(z1)).T}
    assert done()
    return record | {f"each {key}": x.clone() for key, x in model.state_dict().items()}


def worker(rank, world):
    assert (dcl.rank(), dcl.world_size()) == (rank, world)
    ours = dcl.gather_with_grad
    readings = [dcl.coupling(dcl.all_gather(m.chunk(world, dim=1)[rank].T).T)
                for m in some_margins().split([3, 2])]  # as pretrain() makes them
    results = {("monitor",): readings, ("one image each",): on_inputs(rank, world, n=4)}
    results |= {("inputs", which): on_inputs(rank, world, which) for which in ("global", "local")}
    results |= {(name,): network_steps(name, rank, world) for name in KINDS}
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
def test_ranks_equal_one_process(ranks, world):
    """Losses, q, margins, gradients; and networks, statistics and queue, over two steps."""
    references = {("inputs", "global"): on_inputs(), ("one image each",): on_inputs(n=4)}
    for key, reference in (references | {(name,): network_steps(name) for name in KINDS}).items():
        worst = differs(ranks, reference, world, *key)
        assert max(worst.values()) < 1e-10, (key, worst)


@pytest.mark.parametrize("world", [2, 4])
def test_wrong_gathers_fail_those_checks_though_their_losses_are_right(ranks, world):
    for key, reference in (("inputs", on_inputs()), ("dcl", network_steps("dcl"))):
        assert max(differs(ranks, reference, world, key, "right").values()) < 1e-10
        for which in GATHERS[1:]:
            worst = differs(ranks, reference, world, key, which)
            assert worst["gradient"] > 1e-3, (key, which)
            assert key == "dcl" or worst["mean"] < 1e-12, which  # values cannot tell
        local = differs(ranks, reference, world, key, "local")
        assert min(local["gradient"], local["mean"], local["rows"]) > 1e-3, key
    for which in (*GATHERS[1:], "local"):
        found = [ranks[rank][world]["inputs", which] for rank in range(world)]
        for key in (f"split {name}" for name in LOSSES):  # each of them, not only the worst
            gradients = torch.cat([x[key] for x in found])
            assert furthest([gradients], [on_inputs()[key]]) > 1e-3, (key, which)


@pytest.mark.parametrize("world", WORLDS)
def test_local_negatives_are_each_process_alone(ranks, world):
    z = torch.cat(embeddings(N, 6, seed=2)).detach()
    pairs = torch.cosine_similarity(*z.chunk(2))
    weights = (2 - N * (pairs / 0.5).softmax(dim=0)).chunk(world)  # of the global batch
    for rank in range(world):
        expected = on_inputs(rank, world)  # no process group here
        z1, z2 = part(z, rank, world).requires_grad_().chunk(2)
        m, s = margins(z1, z2, 0.1)
        value = (m + ((1 - weights[rank]) * s / 0.1).repeat(2)).mean()
        expected |= {"mean dclw": value, "mean dclw, weight trained": value,
                     "split dclw": torch.stack(torch.autograd.grad(value, (z1, z2)), 1) / world}
        for name, x in ranks[rank][world]["inputs", "local"].items():
            if name != "split dclw, weight trained":  # it passes through the others' pairs
                assert furthest([x], [expected[name]]) < 1e-12, name


@pytest.mark.parametrize("world", WORLDS)
def test_monitor_averages_over_steps_what_numpy_finds_in_each_on_all_anchors(ranks, world):
    for i, steps in enumerate(some_margins().split([3, 2])):
        expected, pooled = statistics(steps), statistics(steps.reshape(1, -1))
        for rank in range(world):
            assert ranks[rank][world]["monitor",][i] == pytest.approx(expected, rel=1e-6)
        assert i or 0 < expected["q_below_0.1"] < 1
        assert abs(pooled["q_cv"] - expected["q_cv"]) > 1e-3  # another number
        halves = [statistics(x) for x in steps.chunk(2, 1)]
        for key in ("q_cv", "q_std"):  # so is the mean of the ranks' values
            assert abs(sum(half[key] for half in halves) / 2 - expected[key]) > 1e-3


SMALL = ("--recipe demo --width 0.125 --image-size 16 --dim 8 --hidden-dim 16 --batch-size 16 "
         "--workers 0 --knn-every 0 --precision fp32 --log-every 1").split()
main = program(dcl)


def test_two_processes_log_what_one_does(classes, tmp_path):
    args = ["--data", classes, *SMALL, "--loss", "dclw", "--precision", "fp64"]
    main(*args, "--steps", 4, "--out", tmp_path / "one")
    said = run("dcl.py", *args, "--steps", 4, "--out", tmp_path / "two", processes=2)
    assert "dclw: 30 negatives per anchor" in said
    assert_close_runs(tmp_path / "one", tmp_path / "two", 4, "q_mean", "q_std", "q_cv",
                      "q_below_0.1", "dcl", "infonce", "w_min", "w_mean")
    for line in records(tmp_path / "two"):
        assert line["w_mean"] == pytest.approx(1) and line["w_min"] < 1
    args += ["--steps", 1, "--negatives", "local", "--out", tmp_path / "local"]
    assert "dclw: 14 negatives per anchor" in run("dcl.py", *args, processes=2)


def test_the_log_holds_the_mean_q_and_both_losses_since_the_last_line(classes, tmp_path):
    flags = {loss: ("--loss", loss) for loss in ("infonce", "dcl", "dclw")}
    args = ["--data", classes, *SMALL, "--epochs", 3, "--steps", 7]
    for name, more in (flags | {"epoch": ("--log-every", 100)}).items():  # the last: dcl again
        main(*args, *more, "--out", tmp_path / name)
    first = {name: records(tmp_path / name)[0] for name in flags}
    for name in ("q_mean", "q_std", "q_cv", "q_below_0.1", "dcl", "infonce"):
        assert len({line[name] for line in first.values()}) == 1, name  # one network, one batch
    for loss in ("infonce", "dcl"):
        assert first[loss]["loss"] == pytest.approx(first[loss][loss], abs=1e-5)
    assert len({line["loss"] for line in first.values()}) == 3
    each, found = ({line["step"]: line["q_cv"] for line in records(tmp_path / name)}
                   for name in ("dcl", "epoch"))
    assert found.keys() == {1, 3, 6, 7} and found[1] == pytest.approx(each[1])
    assert found[6] == pytest.approx((each[4] + each[5] + each[6]) / 3)


@pytest.mark.parametrize("queue, epochs, marks, anchors, held", [  # 4096 / anchors, rounded up
    (0, 1, (1, 4, 20, 41), 192, 22), (96, 2, (1, 8, 41, 82), 96, 43)])
def test_histograms_cover_the_last_4096_anchors(queue, epochs, marks, anchors, held, tmp_path):
    main(*SMALL, "--batch-size", 96, "--queue", queue, "--image-size", 8, "--epochs", epochs,
         "--log-every", 50, "--out", tmp_path)
    lines = records(tmp_path, "q_histogram")
    found = [(line["step"], line["share"], sum(line["q_histogram"])) for line in lines]
    assert found == [(step, share, anchors * min(step, held))
                     for step, share in zip(marks, (0.01, 0.1, 0.5, 1))]
    assert all(len(line["q_histogram"]) == 50 for line in lines)


@pytest.mark.parametrize("flags, sentence", [
    ("--queue 24", "--queue 24: must be a multiple of --batch-size 16"),
    ("--queue 32 --loss dclw", "--loss dclw does not support --queue"),
    ("--queue 48", "less than 48, or an image"), ("--temperature 0", "0.0: must be between")])
def test_mistakes_get_one_sentence(flags, sentence, classes, tmp_path):
    assert sentence in mistake(dcl, "--data", classes, *SMALL, *flags.split(), "--out", tmp_path)
