"""simclr_v2.py against the papers: losses, memory, head, networks, training step, fine-tuning,
distillation, recipes, several processes; and its later stages as a program.

The oracles are written from arXiv 2006.10029 ("v2"), arXiv 2002.05709 ("v1") and google-research's
code, one number at a time where that is possible.
"""

import copy
import functools
import json
import math

import pytest
import torch
from conftest import TINY, losses, mistake, on_ranks, program, records, weights
from helpers import DOUBLE, Gather, Tiny, assert_fields, differs, furthest, part
from helpers import embedding_pairs as embeddings
from helpers import joined_views as views
from helpers import record_gradients
from torch import nn
from torch.nn.functional import batch_norm, cross_entropy, normalize

import simclr_v2
import simsiam
from common import resnet
from simclr_v2 import SimCLR, distillation_loss, nt_xent_loss, projection_head, task_network

main = program(simclr_v2)
FINETUNE = "finetune --init none --data demo --recipe imagenet"


def parse(*flags):
    """The settings, made ready for a step on this machine's CPU."""
    args = simclr_v2.settle(simclr_v2.parse_args([*map(str, flags)]))
    args.device, args.dtype, args.precision = torch.device("cpu"), DOUBLE, "fp64"
    return args


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def shaken(module, seed=5):
    """The module in float64 with every parameter and running statistic away from its start."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.to(DOUBLE).parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=DOUBLE))
        for name, x in module.named_buffers():
            if "running" in name:
                x.add_(torch.rand(x.shape, generator=g, dtype=DOUBLE))
    return module


# ---------------------------------------------------------------------------- NT-Xent, and memory


def slow_loss(z1, z2, tau, keys=None, queue=None, mistake=""):
    """v1's Eq. (1), one anchor and one candidate at a time. Keys of a momentum encoder stand for
    the candidates: for the positive, the other view of the same image; for the negatives, both
    views of all other images; the queue has more of these."""
    views, keys = ([[x if mistake == "not normalized" else x / x.norm() for x in z] for z in pair]
                   for pair in ((z1, z2), keys or (z1, z2)))
    total, n = 0, len(z1)
    for v in range(1 if mistake == "first view's anchors" else 2):
        for i, anchor in enumerate(views[v]):
            positive = keys[v if mistake == "own view's positive" else 1 - v][
                (i + 1) % n if mistake == "the next image's positive" else i]
            below = [] if mistake == "positive left out" else [positive]
            below += [positive * 0] if mistake == "self masked by 0" else []
            for u in range(2):
                if mistake != f"{'own' if u != v else 'other'} view's keys alone":
                    others = (views if mistake == "online negatives" else keys)[u]
                    below += [others[j] for j in range(n)
                              if j != i or mistake == "own key kept" and u == v]
            below += [] if queue is None or mistake == "no queue" else [*queue]
            below = sum((anchor @ k / tau).exp() for k in below)
            total = total - ((anchor @ positive / tau).exp() / below).log()
    return total / {"authors' scale": n, "first view's anchors": n, "summed": 1}.get(mistake, 2 * n)


def memories(n=7, dim=5, seed=0, **how):
    """No memory, one of keys, one of keys and a queue: the arguments after the temperature."""
    keys = [k.detach() for k in embeddings(n, dim, seed=seed + 4, **how)]
    return (), (keys,), (keys, normalize(randn(6, dim, seed=9)))


@pytest.mark.parametrize("tau", [0.005, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0])
def test_losses_and_gradients_equal_a_double_loop(tau):
    for n, dim, seed in ((7, 5, 0), (2, 3, 1), (5, 16, 2)):
        z = embeddings(n, dim, seed=seed)
        for memory in memories(n, dim, seed):
            fixed = [x.requires_grad_() for part in memory for x in part]
            ours, expected = nt_xent_loss(*z, tau, *memory), slow_loss(*z, tau, *memory)
            assert ours.shape == () and ours.dtype == DOUBLE and abs(ours - expected) < 1e-9
            found = torch.autograd.grad(ours, [*z, *fixed], allow_unused=True)
            theirs = torch.autograd.grad(expected, z)
            assert furthest(found[:2], theirs) < 1e-9 * max(1, 1 / tau)
            assert all(g is None or not g.any() for g in found[2:])  # the memory is fixed
            assert tau < 0.05 or min(g.abs().max() for g in theirs) > 1e-3


@pytest.mark.parametrize("wrong", [
    "own key kept", "self masked by 0", "positive left out", "other view's keys alone",
    "own view's keys alone", "first view's anchors", "the next image's positive", "not normalized",
    "authors' scale", "summed", "own view's positive", "online negatives", "no queue"])
def test_the_double_loop_tells_wrong_losses_apart(wrong):
    z, with_memory = embeddings(noise=2), ("own view's positive", "online negatives", "no queue")
    for tau in (0.1, 0.5):
        for memory in memories(noise=2)[2 if wrong in with_memory else 0:]:
            both = [f(*z, tau, *memory) for f in (
                nt_xent_loss, lambda *x: slow_loss(*x, *[None] * (5 - len(x)), wrong))]
            assert abs(both[0] - both[1]) > 1e-3
            grads = [torch.autograd.grad(x, z, materialize_grads=True) for x in both]
            assert furthest(*grads) > 1e-3


def test_losses_have_their_values_in_closed_form():
    eye = torch.eye(8, dtype=DOUBLE)  # aligned positives, orthogonal images
    for tau in (0.02, 0.1, 1.0):
        expected = math.log1p(14 * math.exp(-1 / tau))
        assert nt_xent_loss(eye, 5 * eye, tau).item() == pytest.approx(expected, rel=1e-9)
        for n in (2, 512):  # all alike; the code's 2 ln(2N - 1) is 13.861 at N = 512
            same, queue = torch.full((n, 3), 0.3, dtype=DOUBLE), torch.full((9, 3), 3**-0.5)
            assert nt_xent_loss(same, same, tau).item() == pytest.approx(math.log(2 * n - 1))
            loss = nt_xent_loss(same, same, tau, (same, same), queue).item()
            assert loss == pytest.approx(math.log(2 * n + 8), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32_whatever_comes_in(dtype):
    z, keys = embeddings(16, 32, dtype, noise=1), embeddings(16, 32, dtype, seed=3)
    queue, logits = normalize(randn(8, 32)), (3 * randn(4, 6)).to(dtype).requires_grad_()
    for tau in (0.005, 0.1, 1.0):
        a, b, *wide = (x.detach().double() for x in (*z, *keys))
        exact = (slow_loss(a, b, tau), slow_loss(a, b, tau, wide, queue),
                 slow_distillation(logits.double(), logits.flip(0).double(), max(tau, 0.1)))
        with torch.autocast("cpu", torch.bfloat16):
            ours = (nt_xent_loss(*z, tau), nt_xent_loss(*z, tau, keys, queue.float()),
                    distillation_loss(logits, logits.flip(0), max(tau, 0.1)))
        for x, y, inputs in zip(ours, exact, (z, z, [logits])):
            assert x.dtype == torch.float32 and x.item() == pytest.approx(y.item(), rel=1e-5,
                                                                          abs=1e-5)
            assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(x, inputs))


# ------------------------------------------------------------------------------------------- head


@pytest.mark.parametrize("layers", range(5))
def test_a_head_is_linear_and_batch_norm_with_relu_between(layers):
    head, h = shaken(projection_head(6, layers, 4)), randn(9, 6)
    expected, last = h, layers - 1
    for i, (linear, norm, *relu) in enumerate(head):
        assert linear.bias is None and linear.weight.shape == (4 if i == last else 6, 6)
        assert [type(x) for x in relu] == [nn.ReLU] * (i < last)
        y = expected @ linear.weight.T
        y = (y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-5).sqrt() * norm.weight
        expected = y if i == last else (y + norm.bias).clamp(min=0)
        assert norm.weight.requires_grad and norm.bias.requires_grad == (i < last)
    z = head(h)
    assert furthest([z], [expected]) < 1e-12 and z.shape == (9, 4 if layers else 6)
    assert layers == 0 or furthest([z], [expected.clamp(min=0)]) > 1e-2 and not norm.bias.any()


def test_weights_of_head_and_online_classifier_start_with_deviation_0_01():
    torch.manual_seed(0)
    model = SimCLR(resnet(10), 600, 2, classes=600)
    for w in (*(layer[0].weight for layer in model.projector), model.online.weight):
        w = w.detach() / 0.01
        assert abs(w.std().item() - 1) < 6e-3 and abs(w.mean().item()) < 6e-3
        assert (w.abs() > 2).double().mean().item() == pytest.approx(0.0455, abs=2e-3)  # not cut
    assert not model.online.bias.any()


# --------------------------------------------------------------------- model, optimizer, schedule


def build(kind="", layers=3):
    """A SimCLR of Tiny, its key networks others than the online ones, as after some steps."""
    torch.manual_seed(0)
    model = SimCLR(Tiny(), 6, layers, 32 * ("queue" in kind), 4 * ("online" in kind)).to(DOUBLE)
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if p.requires_grad or name.startswith("key_") and p.any():
                p.add_(0.1 * randn(*p.shape, seed=i))
    return model


def in_order(rows):
    """Rows sorted by their first number, as their order within a step is free."""
    return rows[rows[:, 0].argsort()]


@pytest.mark.parametrize("layers, width", [(3, 6), (0, 8)])
def test_the_momentum_networks_start_as_copies_and_the_queue_with_length_1(layers, width):
    model = SimCLR(Tiny(), 6, layers, queue=8)
    named = dict(model.named_parameters())
    assert all(torch.equal(p, named[f"key_{x}"]) for x, p in named.items() if "key" not in x)
    assert not any(p.requires_grad for name, p in named.items() if "key" in name)
    assert model.state_dict()["queue"].shape == (8, width)
    assert furthest([model.queue.norm(dim=1)], [torch.ones(8)]) < 1e-6


@pytest.mark.parametrize("size", [4, 12, 16])
def test_the_queue_holds_the_newest_keys_of_both_views_with_length_1(size):
    model, steps = SimCLR(Tiny(), dim=6, queue=size).to(DOUBLE), []
    for i in range(8):
        keys = 5 * randn(2, 2, 6, seed=i)
        model.enqueue(tuple(keys), 0.9)
        steps = [*steps, *normalize(keys.flatten(0, 1))][-size:]
        newest, rows = torch.stack(steps), model.queue
        assert ((newest[:, None] - rows).abs().amax(2) < 1e-12).any(1).all() and len(rows) == size


def step_kind(name, p, stage="pretrain"):
    """Who gets LARS' ratio, and decay: norms and biases neither, a classifier decay alone."""
    if p.ndim == 1:
        return "raw"
    return "decayed" if name in ("online.weight", "fc.weight") and stage != "distill" else "adapted"


def slow_lars(w, g, v, lr, kind, decay=0.1, mistake=""):
    """One tensor's step: the lr is inside the momentum -> w, v."""
    u = g if kind == "raw" else g + decay * w
    norms = w.norm(), u.norm()
    ratio = 0.001 * norms[0] / norms[1] if kind == "adapted" and min(norms) > 0 else 1
    if mistake == "lr outside the buffer":
        v = 0.9 * v + ratio * u
        return w - lr * v, v
    v = 0.9 * v + lr * ratio * u
    return w - v, v


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_sgd_is_nesterovs_and_all_but_batch_norms_are_decayed(optimizer):
    model = build("online")
    ours = simclr_v2.build_optimizer(model, parse(
        "--optimizer", optimizer.lower(), "--momentum", 0.7, "--weight-decay", 0.1))
    assert type(ours) is getattr(torch.optim, optimizer)
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in ours.param_groups) == len(names)
    for group in ours.param_groups:
        assert optimizer == "AdamW" or group["nesterov"] and group["momentum"] == 0.7
        norms = {names[p].split(".")[-2] in ("bn", "1") for p in group["params"]}
        assert norms == {group["weight_decay"] == 0} and group["weight_decay"] in (0, 0.1)


@pytest.mark.parametrize("flags, peak", [
    ("--recipe imagenet", 6.4), ("--recipe imagenet-v1", 4.8), ("--recipe cifar", 2.0),
    ("--recipe imagenet --base-lr 0.075", 4.8), ("--recipe imagenet --batch-size 256", 1.6),
    ("--recipe imagenet-v1 --batch-size 256", 0.3), (FINETUNE, 0.16), (f"{FINETUNE}-v1", 0.8),
    ("linear --init none --data demo --recipe imagenet", 1.6),
    ("linear --init none --data demo --recipe cifar", 0.2),
    ("distill --teacher none --data demo --recipe imagenet", 6.4)])
def test_learning_rates_are_the_authors(flags, peak):
    """Linear warm-up from 0, then half a cosine to 0, at every step."""
    args = parse(*flags.split())
    warmup, epochs = args.warmup_epochs, args.epochs
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    for share in (0, 0.003, 0.02, 0.0499, 0.05, 0.3, 0.777, 1):
        epoch = share * epochs
        expected = (epoch / warmup if epoch < warmup else
                    (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2)
        simclr_v2.set_lr(optimizer, epoch, args)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(peak * expected, abs=1e-12)


# ------------------------------------------------------------------------------ one training step

STEP = "--recipe imagenet --batch-size 400 --base-lr 0.01 --weight-decay 0.1"
KINDS = {"plain": "", "online": "", "online, queue": "--queue 1600 --ema-momentum 0.8"}


def labels_of(n=8, seed=1):
    return torch.randint(4, (n,), generator=torch.Generator().manual_seed(seed))


def slow_step(kind, model, buffers, x, labels, epoch, mistake=""):
    """Twice the mean of all anchors; LARS at 0.01 * sqrt(400), warm-up of 40 of 800 epochs."""
    def network(y, key=""):
        h = getattr(model, f"{key}encoder")(y)
        return h, getattr(model, f"{key}projector")(h)

    h, z = network(x)
    if mistake == "views apart":
        h, z = (torch.cat(y) for y in zip(*(network(view) for view in x.chunk(2))))
    if "queue" in kind:
        with torch.no_grad():
            k = network(x, "" if mistake == "online keys" else "key_")[1].chunk(2)
        newest = normalize(torch.cat(k))
        queue = torch.cat([model.queue, newest]) if mistake == "keys in queue" else model.queue
        loss = 2 * slow_loss(*z.chunk(2), 0.1, k, queue.clone())
        model.queue.copy_(torch.cat([model.queue[16:], newest]))
    else:
        loss = 2 * slow_loss(*z.chunk(2), 0.1)
    trained = loss / (2 if mistake == "half the loss" else 1)
    if "online" in kind:
        both = labels.repeat_interleave(2) if mistake == "labels interleaved" else labels.repeat(2)
        known, h = both >= 0, h if mistake == "online gradient to the encoder" else h.detach()
        trained = trained + cross_entropy(model.online(h)[known], both[known], reduction="sum") / (
            known.sum() if mistake == "by the labeled" else 16)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(trained, [*named.values()])
    share = epoch / 40 if epoch < 40 else (1 + math.cos(math.pi * (epoch - 40) / 760)) / 2
    lr = 0.01 * (400 / 256 if mistake == "linear rule" else 20) * share
    wrong = {"norms adapted": ("raw", "adapted"), "norms decayed": ("raw", "decayed"),
             "classifier adapted": ("decayed", "adapted"), "classifier raw": ("decayed", "raw")}
    for (name, p), g in zip(named.items(), gradients):
        kind_of, old = step_kind(name, p), p.detach().clone()
        before, after = wrong.get(mistake, ("", ""))
        new, buffers[name] = slow_lars(
            old, g, buffers.get(name, torch.zeros_like(p)), lr,
            after if kind_of == before else kind_of, 0 if mistake == "no decay" else 0.1, mistake)
        p.data.copy_(new)
        if "queue" in kind and "online" not in name and mistake != "no average":
            average = old if mistake == "average before the step" else new
            model.get_parameter(f"key_{name}").data.mul_(0.8).add_(0.2 * average)
    return loss.detach()


def step_differs(kind, mistake=""):
    """Of four steps, the first one with lr 0; some labels are unknown."""
    args, model, twin = parse(*STEP.split(), *KINDS[kind].split()), build(kind), build(kind)
    optimizer, buffers, worst = simclr_v2.build_optimizer(model, args), {}, []
    for i, epoch in enumerate((0.0, 20.0, 50.5, 400.25)):
        x, labels = views(seed=30 + i), labels_of(seed=30 + i)
        labels[i] = -1
        ours = simclr_v2.train_step(model, optimizer, x, labels, epoch, args)[0]
        assert ours.shape == () and not ours.requires_grad
        worst.append(abs(ours - slow_step(kind, twin, buffers, x, labels, epoch, mistake)).item())
    for (name, x), y in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        if y.is_floating_point():  # running statistics too
            worst.append(furthest(*([in_order(t)] if name == "queue" else [t] for t in (x, y))))
    return max(worst)


@pytest.mark.parametrize("kind, mistake", [
    *((kind, "") for kind in KINDS), *(("online", x) for x in (
        "views apart", "half the loss", "labels interleaved", "online gradient to the encoder",
        "by the labeled", "linear rule", "norms adapted", "norms decayed", "classifier adapted",
        "classifier raw", "lr outside the buffer", "no decay")), *(("online, queue", x) for x in (
            "online keys", "keys in queue", "average before the step", "no average"))])
def test_training_steps_equal_those_written_out_without_a_mistake(kind, mistake):
    assert step_differs(kind, mistake) > 1e-6 if mistake else step_differs(kind) < 1e-9


# ------------------------------------------------------------------------------------ distillation


def slow_distillation(student, teacher, tau, mistake=""):
    """The mean over images of - sum over classes of P_T log P_S."""
    total = 0
    for s, t in zip(student, teacher):
        s, t = (t, s) if mistake == "direction" else (s, t)
        s, t = (x / (1 if mistake == who else tau) for x, who in ((s, "student at 1"),
                                                                 (t, "teacher at 1")))
        below_s, below_t = s.exp().sum(), t.exp().sum()
        for x, y in zip(s, t):
            p = y.exp() / below_t
            total = total - p * (x.exp() / below_s).log()
            total = total + (p * p.log() if mistake == "divergence" else 0)
    return total / len(student) * {"summed": len(student), "times tau squared": tau**2,
                                   "per class": 1 / student.shape[1]}.get(mistake, 1)


@pytest.mark.parametrize("tau", [0.05, 0.3, 1.0, 2.0])
def test_distillation_equals_a_loop_with_gradient_to_the_student_alone(tau):
    student, teacher = (2 * x.requires_grad_() for x in randn(2, 6, 4))
    ours, expected = (f(student, teacher, tau) for f in (distillation_loss, slow_distillation))
    assert ours.shape == () and ours.dtype == DOUBLE and abs(ours - expected) < 1e-10
    ds, dt = torch.autograd.grad(ours, (student, teacher), allow_unused=True)
    p = (teacher / tau).softmax(1)
    assert dt is None and furthest([ds], [((student / tau).softmax(1) - p) / tau / 6]) < 1e-12
    entropy = -(p * p.log()).sum(1).mean().item()  # the least value, up to a constant a row
    same = distillation_loss(teacher + torch.arange(6.0)[:, None], teacher, tau)
    assert same.item() == pytest.approx(entropy, rel=1e-9) and ours > entropy + 1e-3
    for kind in ("direction", "summed", "per class", "divergence",
                 *["teacher at 1", "student at 1", "times tau squared"] * (tau != 1)):
        assert abs(ours - slow_distillation(student, teacher, tau, kind)) > 1e-3, kind


def distilled(flags, mistake=""):
    """How far three steps are from those written out: of 400 epochs, 20 of warm-up."""
    args = parse("distill", "--teacher", "none", "--data", "demo", *STEP.split(), "--temperature",
                 0.5, *flags.split())
    teacher, student = (task_network(shaken(Tiny(), seed), nn.Sequential(), 4).to(DOUBLE)
                        for seed in (5, 6))
    for i, net in enumerate((teacher.eval(), student)):
        net.fc.weight.data.copy_(randn(4, 8, seed=i))
    twin, optimizer, inputs = copy.deepcopy(student), simclr_v2.build_optimizer(student, args), []
    for net in (teacher, student):
        net.encoder.register_forward_pre_hook(lambda module, x: inputs.append(x[0]))
    buffers, worst = {}, []
    for i, epoch in enumerate((0.0, 10.0, 200.25)):
        x, labels = views(4, seed=40 + i), torch.tensor([0, -1, 3, -1, -1, 2, -1, -1])
        ours, s, t = simclr_v2.distill_step(student, teacher, optimizer, x, labels, epoch, args)
        assert len(inputs) == 2 * i + 2 and inputs[-1] is x and inputs[-2] is x  # one crop for both
        assert not (ours.requires_grad or s.requires_grad or t.requires_grad)
        theirs, known = (twin(x), t), labels >= 0
        labeled = cross_entropy(theirs[0][known], labels[known], reduction="sum")
        labeled = labeled / (3 if mistake == "by the labeled" else 8)
        loss = slow_distillation(*theirs, 0.5) * (
            1 if "--no" in flags or mistake == "no tau squared" else 0.25)
        alpha = 1 - args.alpha if mistake == "alpha of the labels" else args.alpha
        loss = alpha * loss + (1 - alpha) * labeled
        worst += [abs(ours - loss).item(), furthest([s], theirs[:1])]
        named = dict(twin.named_parameters())
        lr = 0.2 * (epoch / 20 if epoch < 20 else (1 + math.cos(math.pi * (epoch - 20) / 380)) / 2)
        for (name, p), g in zip(named.items(), torch.autograd.grad(loss, [*named.values()])):
            stage = "" if mistake == "classifier not adapted" else "distill"
            v = buffers.get(name, torch.zeros_like(p))
            p.data, buffers[name] = slow_lars(p.data, g, v, lr, step_kind(name, p, stage))
    return max(*worst, furthest(student.state_dict().values(), twin.state_dict().values()))


@pytest.mark.parametrize("flags, mistake", [
    ("", ""), ("--alpha 0.75", ""), ("--no-tau-squared", ""), *(("--alpha 0.75", x) for x in (
        "by the labeled", "no tau squared", "alpha of the labels", "classifier not adapted"))])
def test_distillation_steps_equal_those_written_out_without_a_mistake(flags, mistake):
    assert distilled(flags, mistake) > 1e-3 if mistake else distilled(flags) < 1e-9


# --------------------------------------------------------------------------- augmentation, recipes


@pytest.mark.parametrize("recipe", ["imagenet", "cifar", "demo"])
def test_views_are_those_of_simsiam(recipe):  # which test_augmentation.py compares with torchvision
    args, g = parse("--recipe", recipe), torch.Generator().manual_seed(0)
    x, u = torch.rand(48, 3, 40, 40, generator=g), torch.rand(48, 13, generator=g, dtype=DOUBLE)
    ours = simclr_v2.augment(x, u, args)
    assert furthest([ours], [simsiam.augment(x, u[:, :12], args)]) < 1e-5
    assert furthest([ours], [simsiam.augment(x, u[:, :12].roll(1, 0), args)]) > 0.1


LARS = dict(optimizer="lars", momentum=0.9)
BOTH = LARS | dict(  # v1 and v2 on ImageNet
    arch="resnet50", width=1, sk=False, small_images=False, zero_init_residual=True, dim=128,
    temperature=0.1, batch_size=4096, queue=0, ema_momentum=0.999, image_size=224, crop_min=0.08,
    jitter=(0.8, 0.8, 0.8, 0.2), jitter_prob=0.8, gray_prob=0.2, blur_prob=0.5,
    mean=(0, 0, 0), std=(1, 1, 1))  # no normalization anywhere
V2 = dict(lr_rule="sqrt", base_lr=0.1, weight_decay=1e-4)
V1 = dict(lr_rule="linear", base_lr=0.3, weight_decay=1e-6)
VIT = dict(lr_rule="linear", base_lr=2e-4, epochs=300, weight_decay=0.1, optimizer="adamw")
CIFAR = BOTH | dict(
    arch="resnet18", small_images=True, image_size=32, head_layers=3, lr_rule="linear", base_lr=1,
    epochs=1000, warmup_epochs=10, batch_size=512, weight_decay=1e-4, temperature=0.5,
    jitter=(0.4, 0.4, 0.4, 0.1), blur_prob=0)
LINEAR = dict(lr_rule="linear", base_lr=0.1, epochs=90, batch_size=4096, momentum=0.9, labels="1.0",
              crop_min=0.08, optimizer="sgd", weight_decay=0, warmup_epochs=0, from_layer=0)
TUNED = LARS | dict(lr_rule="sqrt", base_lr=0.005, epochs=60, batch_size=1024, weight_decay=0,
                    warmup_epochs=0, crop_min=0.08, labels="0.01", from_layer=1)
STUDENT = LARS | dict(temperature=1, tau_squared=True, alpha=1, epochs=400, batch_size=4096,
                      warmup_epochs=20, crop_min=0.08, labels="")
TABLE = {  # v1, App. B; v2, Sec. 3.1; authors' code
    "pretrain": {"imagenet": BOTH | V2 | dict(head_layers=3, epochs=800, warmup_epochs=40),
                 "imagenet-v1": BOTH | V1 | dict(head_layers=2, epochs=1000, warmup_epochs=10),
                 "imagenet-vit": BOTH | VIT | dict(arch="vit_small", patch_size=16),
                 "cifar": CIFAR, "stl10": CIFAR | dict(image_size=96)},
    "linear --init none": {"imagenet": LINEAR, "imagenet-v1": LINEAR,
                           "cifar": LINEAR | dict(epochs=100, batch_size=512)},
    "finetune --init none": {"imagenet": TUNED, "imagenet-v1": TUNED | dict(
        lr_rule="linear", base_lr=0.05, batch_size=4096, from_layer=0, optimizer="sgd")},
    "distill --teacher none": {"imagenet": STUDENT | V2, "imagenet-v1": STUDENT | V1,
                               "imagenet-vit": STUDENT | VIT}}


@pytest.mark.parametrize("stage, recipe", [(stage, x) for stage in TABLE for x in TABLE[stage]])
def test_recipes_are_the_published_ones(stage, recipe):
    args = parse(*stage.split(), "--data", "demo", "--recipe", recipe)
    assert_fields(args, TABLE[stage][recipe])
    assert [*simclr_v2.RECIPES[args.stage]] == [*simclr_v2.RECIPES["pretrain"]]


@pytest.mark.parametrize("share, epochs, layer", [
    (0.01, 60, 1), (0.03, 60, 1), (0.05, 30, 1), (0.3, 30, 1), (0.5, 30, 0), (1, 30, 0)])
def test_fine_tuning_follows_the_fraction_of_labels(share, epochs, layer):
    for more in ([], ["--width", 2], ["--sk"], ["--epochs", 7, "--from-layer", 2, "--base-lr", 3]):
        for head_layers in (4, 3, 2, 1, 0, None):  # None: from scratch
            args = parse(*FINETUNE.split(), *more)
            args.initial = {} if head_layers is None else {"config": {"head_layers": head_layers}}
            simclr_v2.published(args, share)
            found = args.epochs, args.from_layer, args.base_lr
            highest = max(0, (head_layers or 0) - 1)
            assert found == ((7, 2, 3) if "--epochs" in more else (
                epochs, min(layer, highest), 0.002 if more else 0.005))
            assert found == tuple(args.config[x] for x in ("epochs", "from_layer", "base_lr"))


# -------------------------------------------------------------------- several processes equal one

N, WORLDS = 8, (4, 2, 1)
GATHERS = ("right", "no gradient", "local slice", "times W", "rank 0's labels and mask")


def on_inputs(rank=0, world=1, n=N, memory=True):
    """Loss and input gradients of this process's images, without a memory and with one."""
    z, k = (torch.cat(embeddings(n, 6, seed=seed)).detach() for seed in (2, 3))
    z1, z2 = part(z, rank, world).requires_grad_().chunk(2)
    keys, record = part(k, rank, world).chunk(2), {}
    for i, more in enumerate([(), (keys,), (keys, normalize(randn(10, 6)))] if memory else [()]):
        value = nt_xent_loss(z1, z2, 0.1, *more)
        record[f"mean {i}"] = value.detach()
        record |= {f"split {i} {x}": g / world for x, g in zip("ab", torch.autograd.grad(
            value, (z1, z2)))}
    return record


@functools.cache
def network_steps(kind, rank=0, world=1):
    """Two steps of the program's own: model, optimizer, DDP, batch norm of the global batch."""
    args, model, record = parse(*STEP.split(), *KINDS[kind].split()), build(kind), {}
    optimizer = simclr_v2.build_optimizer(model, args)
    net, done = simclr_v2.distribute(model, args), record_gradients(model, optimizer, record)
    for i, epoch in enumerate((20.0, 50.5)):
        x = part(views(N, seed=20 + i), rank, world)
        labels = labels_of(N, seed=i).chunk(world)[rank]
        loss, *outputs = simclr_v2.train_step(net, optimizer, x, labels, epoch, args)
        record[f"mean loss {i}"] = loss.clone()
        record |= {f"each {x} {i}": torch.tensor(value) for x, value in
                   simclr_v2.monitors(*outputs, labels).items()}
    assert done()
    return record | {f"each {key}": in_order(x) if key == "queue" else x.clone()
                     for key, x in model.state_dict().items() if x.is_floating_point()}


def worker(rank, world):
    results = {("inputs", n): on_inputs(rank, world, n) for n in (N, 4)}
    results |= {(kind,): network_steps.__wrapped__(kind, rank, world) for kind in KINDS}
    for which in GATHERS if world > 1 else ():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(simclr_v2, "gather_with_grad", lambda x: Gather.apply(x, which))
            if "rank 0" in which:
                patch.setattr(simclr_v2, "rank", lambda: 0)
            results["gather", which] = on_inputs(rank, world, memory=False)
            results["network", which] = network_steps.__wrapped__("plain", rank, world)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(worker, tmp_path_factory.mktemp("ranks"), WORLDS)


@pytest.mark.parametrize("world", WORLDS)
def test_processes_equal_one_process(ranks, world):
    """Losses, gradients, networks, running statistics, memory and monitors."""
    for key, reference in ((("inputs", N), on_inputs()), (("inputs", 4), on_inputs(n=4)),
                           *(((kind,), network_steps(kind)) for kind in KINDS)):
        worst = differs(ranks, reference, world, *key)
        assert max(worst.values()) < 1e-10, (key, worst)


@pytest.mark.parametrize("world", [2, 4])
def test_wrong_gathers_and_offsets_fail_those_checks(ranks, world):
    for key, reference in ("gather", on_inputs(memory=False)), ("network", network_steps("plain")):
        assert max(differs(ranks, reference, world, key, "right").values()) < 1e-10
        for which in GATHERS[1:]:
            worst = differs(ranks, reference, world, key, which)
            assert worst["gradient"] > 1e-3, (key, which)
            if key == "gather":  # a wrong gather's value is right
                assert (worst["mean"] < 1e-12) == ("rank 0" not in which), which


# ------------------------------------------------------------------------ as a program: the stages

SMALL = [x for x in TINY if x not in ("--predictor-dim", "8")] + ["--image-size", "16"]
TUNE = ["--recipe", "demo", "--batch-size", 4, "--epochs", 2, "--log-every", 1, "--workers", 0,
        "--precision", "fp32"]


@pytest.fixture(scope="module")
def pretrained(classes, tmp_path_factory):
    """Two epochs of three steps on 48 images of three classes, with a momentum encoder."""
    out = tmp_path_factory.mktemp("pretrained")
    assert main(*SMALL, "--data", classes, "--epochs", 2, "--queue", 32, "--knn-every", 1,
                "--log-every", 1, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def tuned(pretrained, tmp_path_factory):
    """Fine-tuned from layer 1 with a quarter of the labels: 12 images."""
    out = tmp_path_factory.mktemp("tuned")
    assert main("finetune", "--init", pretrained / "last.pt", *TUNE, "--labels", 0.25, "--out",
                out) == 0
    return out


def test_pretraining_logs_its_monitors(pretrained, photos, tmp_path):
    lines = records(pretrained)
    assert {"epoch", "step", "loss", "lr", "std", "rank", "contrast_top1", "online_train_top1",
            "images_per_s", "minutes_left"} == {*lines[0]} and len(lines) == 6
    assert [x["epoch"] for x in records(pretrained, "online_top1")] == [1, 2]
    assert main(*SMALL, "--data", photos, "--steps", 1, "--out", tmp_path) == 0  # no labels
    assert not any("online" in name for name in (*records(tmp_path)[0], *weights(tmp_path)))


def test_every_choice_trains(pretrained, classes, tmp_path):
    curves = {}
    for flags in ("", "--head-layers 0", "--head-layers 1", "--head-layers 4", "--queue 32",
                  "--queue 32 --ema-momentum 0.5", "--lr-rule linear", "--temperature 0.5",
                  "--optimizer sgd --base-lr 0.1", "--arch resnet50", "--arch resnet50 --sk",
                  "--arch vit_mini", "--arch vit_mini --patch-projection learned",
                  "--arch vit_mini --heads 2", f"--queue 32 --init {pretrained / 'encoder.pt'}"):
        vit = "--optimizer adamw --base-lr 1e-3 --warmup-epochs 0.1" * ("vit" in flags)
        assert main(*SMALL, "--data", classes, *flags.split(), *vit.split(), "--log-every", 1,
                    "--steps", 4, "--out", tmp_path / flags) == 0
        curves[tuple(losses(tmp_path / flags))] = flags
    assert len(curves) == 15 and {len(curve) for curve in curves} == {4}
    about = json.loads((tmp_path / "--arch vit_mini" / "encoder.json").read_text())
    assert about["heads"] == 3  # not 0, which timm would not know
    state = weights(tmp_path / "--arch vit_mini"), weights(tmp_path / "--head-layers 0")
    assert "encoder.patch_embed.proj.weight" in state[0] and "projector" not in str([*state[1]])


@pytest.mark.parametrize("stage", ["finetune", "linear"])
@pytest.mark.parametrize("layer", range(4))
def test_later_stages_keep_the_first_layers_of_the_head(stage, layer, pretrained, classes, tmp_path,
                                                        monkeypatch):
    for name in ("augment", "color_jitter"):  # crops and flips alone
        monkeypatch.delattr(simclr_v2, name)
    assert main(stage, "--init", pretrained / "last.pt", *TUNE, "--labels", 0.25, "--from-layer",
                layer, "--out", tmp_path) == 0
    before, after = weights(pretrained), weights(tmp_path)
    kept = {name.split(".")[1] for name in after if name.startswith("projector.")}
    assert kept == {str(i) for i in range(layer)} and after["fc.weight"].any()
    for name, x in after.items():  # buffers too; but the bias of the head's end is fixed
        if not name.startswith("fc."):
            fixed = stage == "linear" or name == "projector.2.1.bias"
            assert torch.equal(x, before[name]) == fixed, name
    assert losses(tmp_path)[0] == pytest.approx(math.log(3), abs=1e-6)  # a new classifier is 0
    args = parse(stage, "--init", pretrained / "last.pt", *TUNE, "--from-layer", layer)
    args.dtype, args.precision = torch.float32, "fp32"
    model = simclr_v2.load_network(args, 3)
    model.load_state_dict(after)
    h, y = simclr_v2.features(model[0], simclr_v2.load_data(args).val, args)
    for i in range(layer):  # linear, batch norm, and ReLU unless it is the last of the head
        norm = model.projector[i][1]
        h = h @ after[f"projector.{i}.0.weight"].T
        h = batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        h = h if i == 2 else h.relu()
    guess = (h @ after["fc.weight"].T + after["fc.bias"]).argmax(1)
    assert records(tmp_path, "top1")[-1]["top1"] == (guess == y).sum().item() / len(y)


def test_a_student_learns_from_a_fixed_teacher(tuned, photos, tmp_path, monkeypatch, capsys):
    teachers, step = [], simclr_v2.distill_step
    monkeypatch.setattr(simclr_v2, "distill_step", lambda student, teacher, *rest: (
        teachers.append([teacher, copy.deepcopy(teacher)]), step(student, teacher, *rest))[1])
    monkeypatch.delattr(simclr_v2, "augment")
    args = ["distill", *TUNE, "--batch-size", 16, "--warmup-epochs", 0.5]
    for more in ([], ["--data", photos], ["--width", 0.25], ["--arch", "vit_mini"]):
        out = tmp_path / str(more[-1:])
        assert main(*args, "--teacher", tuned / "last.pt", *more, "--out", out) == 0
        assert all(line["loss"] >= line["floor"] - 1e-6 for line in records(out))
        assert f"temperature {1 if len(more) == 2 and more[0] != '--data' else 0.1:g}\n" in (
            capsys.readouterr().out)
        assert not any("projector" in name for name in weights(out))
    for teacher, before in teachers:
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
        assert furthest(teacher.state_dict().values(), before.state_dict().values()) == 0
    assert len(teachers) == 22 and not records(tmp_path / f"[{photos!r}]", "top1")
    first, *rest = records(tmp_path / "[]", "teacher_top1")
    assert first["teacher_top1"] == records(tuned, "top1")[-1]["top1"] and not rest
    assert main(*args, "--teacher", tmp_path / "['vit_mini']" / "last.pt", "--out",
                tmp_path / "next") == 0  # students teach


def test_alpha_mixes_in_the_labels_that_the_teacher_was_given(tuned, classes, tmp_path):
    (tmp_path / "list").write_text("".join(f"ant/{path.name}\n" for path in sorted(
        (classes / "train" / "ant").iterdir())[:6]))
    args, first = ["distill", "--teacher", tuned / "last.pt", *TUNE, "--batch-size", 48], {}
    for name, flags in {"kd": [], "12": ["--alpha", 0.5], "6": ["--alpha", 0.5, "--labels",
                        tmp_path / "list"], "48": ["--alpha", 0.5, "--labels", 1]}.items():
        assert main(*args, *flags, "--steps", 1, "--out", tmp_path / name) == 0
        first[name] = losses(tmp_path / name)[0]
    for n in (6, 12, 48):  # the student starts near even logits: ln 3 a labeled image
        mixed = 2 * first[str(n)] - first["kd"]
        assert mixed == pytest.approx(n / 48 * math.log(3), abs=0.1 * n / 48 + 0.02)
    images = simclr_v2.Images(torch.tensor([0, 1, -1, 1, 0, -1]))
    args = parse("distill", "--teacher", "none", "--data", "demo", "--labels", 1)
    assert simclr_v2.known_labels(images, args).tolist() == images.labels.tolist()


MISTAKES = {  # {r}, {t}: the pre-trained run, the tuned one; {p}, {c}: images without, with labels
    "--arch resnet10 --sk": "selective kernels need the", "--queue 64": "a multiple of 128",
    "--queue 8192": "its own negative", "--width 0.0625": "0.125",
    "distill --teacher {r}": "not the last.pt of a finetune, distill or linear run",
    "distill --teacher none --data demo": "not the last.pt of a finetune",
    "distill --teacher {t} --mean 0 0 0 --image-size 32": "other image_size, mean",
    "distill --teacher {t} --data demo": "the teacher has 3 classes, demo has 10",
    "distill --teacher {t} --batch-size 4 --alpha 2": "must be 1, or below",
    "distill --teacher {t} --batch-size 4 --data {p} --alpha 0.5": "with --labels",
    "finetune --init {r} --batch-size 2 --from-layer 4": "fewer layers of the head",
    "finetune --init {t} --batch-size 2 --from-layer 2": "fewer layers of the head",
    "finetune --init {e} --batch-size 2 --data {c}": "fewer layers of the head",
    "finetune --init {r} --batch-size 2 --data {p}": "needs labels",
    "linear --init {r} --batch-size 2 --data {p}": "needs labels"}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_gets_one_sentence(flags, pretrained, tuned, photos, classes, tmp_path):
    words = flags.format(r=pretrained / "last.pt", t=tuned / "last.pt", p=photos, c=classes,
                         e=pretrained / "encoder.pt").split()
    assert MISTAKES[flags] in mistake(simclr_v2, *words, "--out", tmp_path / "out")
