"""simclr_v2.py against the papers: losses, head, steps, recipes, processes; stages as a program.

The oracles are written from arXiv 2006.10029 ("v2"), arXiv 2002.05709 ("v1") and google-research's
code, one number at a time where that is possible.
"""

import copy
import functools
import json
import math
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY, losses, mistake, on_ranks, program, records, weights
from helpers import (
    DOUBLE, Gather, Tiny, assert_fields, differs, embedding_pairs, furthest, joined_views, part,
    record_gradients, same, settled, uniform)
from torch import nn
from torch.nn.functional import batch_norm, cross_entropy, normalize

import simclr_v2
import simsiam
from common import resnet
from simclr_v2 import SimCLR, distillation_loss, nt_xent_loss, projection_head, task_network

main = program(simclr_v2)
parse = functools.partial(settled, simclr_v2)
FINETUNE = "finetune --init none --data demo --recipe imagenet"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def shaken(module, seed=5):
    """The module in float64 with all that can change away from its start, key networks too."""
    with torch.no_grad():
        for i, (name, p) in enumerate(module.to(DOUBLE).named_parameters()):
            if p.requires_grad or p.any():  # the bias of a head's end stays 0
                p.add_(0.3 * randn(*p.shape, seed=seed + i))
        for name, x in module.named_buffers():
            if "running" in name:
                x.add_(randn(*x.shape, seed=seed).abs())
    return module


def warmup_cosine(epoch, warmup, epochs):
    """Linear from 0, then half a cosine to 0, at every step."""
    if epoch < warmup:
        return epoch / warmup
    return (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2


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
    keys = [k.detach() for k in embedding_pairs(n, dim, seed=seed + 4, **how)]
    return (), (keys,), (keys, normalize(randn(6, dim, seed=9)))


@pytest.mark.parametrize("tau", [0.005, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0])
def test_losses_and_gradients_equal_a_double_loop(tau):
    for n, dim, seed in ((7, 5, 0), (2, 3, 1), (5, 16, 2)):
        z = embedding_pairs(n, dim, seed=seed)
        for memory in memories(n, dim, seed):
            keys, *queue = memory or [()]
            fixed = [x.requires_grad_() for x in (*keys, *queue)]
            ours, expected = nt_xent_loss(*z, tau, *memory), slow_loss(*z, tau, *memory)
            assert ours.shape == () and ours.dtype == DOUBLE and abs(ours - expected) < 1e-9
            found = torch.autograd.grad(ours, [*z, *fixed], allow_unused=True)
            theirs = torch.autograd.grad(expected, z)
            assert furthest(found[:2], theirs) < 1e-9 * max(1, 1 / tau)
            assert all(g is None or not g.any() for g in found[2:])  # the memory is fixed
            assert tau < 0.05 or min(g.abs().max() for g in theirs) > 1e-3
    eye, ones = torch.eye(8, dtype=DOUBLE), torch.ones(512, 3, dtype=DOUBLE)
    for z, memory, expected in (  # in closed form: images that are orthogonal, all that are alike
            ((eye, 5 * eye), (), math.log1p(14 * math.exp(-1 / tau))),
            ((ones, ones), (), math.log(1023)), ((ones[:2], ones[:2]), (), math.log(3)),
            ((ones, ones), ((ones, ones), normalize(ones)), math.log(1023 + 512))):
        assert nt_xent_loss(*z, tau, *memory).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("wrong", [
    "own key kept", "self masked by 0", "positive left out", "other view's keys alone",
    "own view's keys alone", "first view's anchors", "the next image's positive", "not normalized",
    "authors' scale", "summed", "own view's positive", "online negatives", "no queue"])
def test_the_double_loop_tells_wrong_losses_apart(wrong):
    z = embedding_pairs(noise=2)
    with_memory = wrong in ("own view's positive", "online negatives", "no queue")
    for tau in (0.1, 0.5):
        for memory in memories(noise=2)[2 * with_memory:]:
            both = nt_xent_loss(*z, tau, *memory), slow_loss(*z, tau, *memory, mistake=wrong)
            assert abs(both[0] - both[1]) > 1e-3
            grads = [torch.autograd.grad(x, z, materialize_grads=True) for x in both]
            assert furthest(*grads) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32_whatever_comes_in(dtype):
    z, keys = embedding_pairs(16, 32, dtype, noise=1), embedding_pairs(16, 32, dtype, seed=3)
    queue, logits = normalize(randn(8, 32)), (3 * randn(4, 6)).to(dtype).requires_grad_()
    a, b, *wide = (x.detach().double() for x in (*z, *keys))
    for tau in (0.005, 0.1, 1.0):
        exact = (slow_loss(a, b, tau), slow_loss(a, b, tau, wide, queue),
                 slow_distillation(logits.double(), logits.flip(0).double(), max(tau, 0.1)))
        with torch.autocast("cpu", torch.bfloat16):
            ours = (nt_xent_loss(*z, tau), nt_xent_loss(*z, tau, keys, queue.float()),
                    distillation_loss(logits, logits.flip(0), max(tau, 0.1)))
        for x, y, inputs in zip(ours, exact, (z, z, [logits])):
            assert x.dtype == torch.float32
            assert x.item() == pytest.approx(y.item(), rel=1e-5, abs=1e-5)
            assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(x, inputs))


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


def test_a_new_model_starts_as_the_authors_with_copies_and_a_queue_of_length_1():
    torch.manual_seed(0)
    for layers, width in ((3, 600), (0, 512)):
        model = SimCLR(resnet(10), 600, layers, queue=8, classes=600)
        for w in (*(layer[0].weight for layer in model.projector), model.online.weight):
            w = w.detach() / 0.01
            assert abs(w.std().item() - 1) < 6e-3 and abs(w.mean().item()) < 6e-3
            assert (w.abs() > 2).double().mean().item() == pytest.approx(0.0455, abs=2e-3)  # uncut
        named = dict(model.named_parameters())
        keys = {name: p for name, p in named.items() if name.startswith("key_")}
        assert all(torch.equal(p, named[name[4:]]) for name, p in keys.items())
        assert not any(p.requires_grad for p in keys.values()) and not model.online.bias.any()
        assert len(named) == 2 * len(keys) + 2 and model.state_dict()["queue"].shape == (8, width)
        assert furthest([model.queue.norm(dim=1)], [torch.ones(8)]) < 1e-6


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_sgd_is_nesterovs_and_all_but_batch_norms_are_decayed(optimizer):
    model = SimCLR(Tiny(), 6, classes=4).to(DOUBLE)
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
    args, optimizer = parse(flags), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    for share in (0, 0.003, 0.02, 0.0499, 0.05, 0.3, 0.777, 1):
        simclr_v2.set_lr(optimizer, share * args.epochs, args)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(peak * warmup_cosine(
            share * args.epochs, args.warmup_epochs, args.epochs), abs=1e-12)


STEP = "--recipe imagenet --batch-size 400 --base-lr 0.01 --weight-decay 0.1"
KINDS = {"plain": "", "online": "", "online, queue": "--queue 1600 --ema-momentum 0.8"}


def build(kind):
    """A SimCLR of Tiny, its key networks others than the online ones, as after some steps."""
    torch.manual_seed(0)
    return shaken(SimCLR(Tiny(), 6, 3, 32 * ("queue" in kind), 4 * ("online" in kind)))


def slow_lars(named, buffers, loss, lr, mistake="", stage="pretrain"):
    """The lr is inside the momentum. Norms and biases get neither LARS' ratio nor decay, the
    matrix of a classifier decay alone, but a student's is adapted, too."""
    wrong = {("norms adapted", "raw"): "adapted", ("classifier adapted", "decayed"): "adapted",
             ("norms decayed", "raw"): "decayed", ("classifier raw", "decayed"): "raw"}
    for (name, p), g in zip(named.items(), torch.autograd.grad(loss, [*named.values()])):
        classifier = name in ("online.weight", "fc.weight") and stage != "distill"
        kind = "raw" if p.ndim == 1 else "decayed" if classifier else "adapted"
        kind = wrong.get((mistake, kind), kind)
        w, outside = p.detach(), mistake == "lr outside the buffer"
        u = g if kind == "raw" or mistake == "no decay" else g + 0.1 * w
        adapted = kind == "adapted" and w.any() and u.any()
        u = 0.001 * w.norm() / u.norm() * u if adapted else u
        v = 0.9 * buffers.get(name, 0) + (u if outside else lr * u)
        buffers[name], p.data = v, w - (lr * v if outside else v)


def slow_step(kind, model, buffers, x, labels, epoch, mistake=""):
    """Twice the mean of all anchors; LARS at 0.01 * sqrt(400), warm-up of 40 of 800 epochs."""
    def network(y, key=""):
        h = getattr(model, f"{key}encoder")(y)
        return h, getattr(model, f"{key}projector")(h)

    h, z = network(x)
    if mistake == "views apart":
        h, z = (torch.cat(y) for y in zip(*(network(view) for view in x.chunk(2))))
    memory = ()
    if "queue" in kind:
        with torch.no_grad():
            k = network(x, "" if mistake == "online keys" else "key_")[1].chunk(2)
        newest, old = normalize(torch.cat(k)), model.queue.clone()
        memory = k, torch.cat([old, newest]) if mistake == "keys in queue" else old
        model.queue.copy_(torch.cat([old[16:], newest]))
    loss = 2 * slow_loss(*z.chunk(2), 0.1, *memory)
    trained = loss / (2 if mistake == "half the loss" else 1)
    if "online" in kind:
        both = labels.repeat_interleave(2) if mistake == "labels interleaved" else labels.repeat(2)
        known, h = both >= 0, h if mistake == "online gradient to the encoder" else h.detach()
        trained = trained + cross_entropy(model.online(h)[known], both[known], reduction="sum") / (
            known.sum() if mistake == "by the labeled" else 16)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    old = {name: p.detach().clone() for name, p in named.items()}
    lr = 0.01 * (400 / 256 if mistake == "linear rule" else 20) * warmup_cosine(epoch, 40, 800)
    slow_lars(named, buffers, trained, lr, mistake)
    for name, p in named.items():
        if "queue" in kind and "online" not in name and mistake != "no average":
            average = old[name] if mistake == "average before the step" else p.detach()
            model.get_parameter(f"key_{name}").data.mul_(0.8).add_(0.2 * average)
    return loss.detach()


@pytest.mark.parametrize("kind, mistake", [
    *((kind, "") for kind in KINDS), *(("online", x) for x in (
        "views apart", "half the loss", "labels interleaved", "online gradient to the encoder",
        "by the labeled", "linear rule", "norms adapted", "norms decayed", "classifier adapted",
        "classifier raw", "lr outside the buffer", "no decay")), *(("online, queue", x) for x in (
            "online keys", "keys in queue", "average before the step", "no average"))])
def test_training_steps_equal_those_written_out_without_a_mistake(kind, mistake):
    """Of four steps, the first one with lr 0; some labels are unknown."""
    args, model, twin = parse(STEP, KINDS[kind]), build(kind), build(kind)
    optimizer, buffers, worst = simclr_v2.build_optimizer(model, args), {}, []
    for i, epoch in enumerate((0.0, 20.0, 50.5, 400.25)):
        x, labels = joined_views(seed=30 + i), randn(4, 8, seed=30 + i).argmax(0)
        labels[i] = -1
        ours = simclr_v2.train_step(model, optimizer, x, labels, epoch, args)[0]
        assert ours.shape == () and not ours.requires_grad
        worst.append(abs(ours - slow_step(kind, twin, buffers, x, labels, epoch, mistake)).item())
    states = ([x for x in net.state_dict().values() if x.is_floating_point()]
              for net in (model, twin))  # running statistics too
    worst = max(*worst, furthest(*states))
    assert worst > 1e-6 if mistake else worst < 1e-9


def slow_distillation(student, teacher, tau, mistake=""):
    """The mean over images of - sum over classes of P_T log P_S."""
    total = 0
    for s, t in zip(student, teacher):
        s, t = (t, s) if mistake == "direction" else (s, t)
        s = s / (1 if mistake == "student at 1" else tau)
        t = t / (1 if mistake == "teacher at 1" else tau)
        log_s, log_t = ((x.exp() / x.exp().sum()).log() for x in (s, t))
        total = total - (log_t.exp() * (log_s - log_t * (mistake == "divergence"))).sum()
    return total / len(student) * {"summed": len(student), "times tau squared": tau**2,
                                   "per class": 1 / student.shape[1]}.get(mistake, 1)


@pytest.mark.parametrize("tau", [0.05, 0.3, 1.0, 2.0])
def test_distillation_equals_a_loop_with_gradient_to_the_student_alone(tau):
    student, teacher = (2 * x.requires_grad_() for x in randn(2, 6, 4))
    ours, expected = (f(student, teacher, tau) for f in (distillation_loss, slow_distillation))
    assert ours.shape == () and ours.dtype == DOUBLE and abs(ours - expected) < 1e-10
    ds, dt = torch.autograd.grad(ours, (student, teacher), allow_unused=True)
    exact = ((student / tau).softmax(1) - (teacher / tau).softmax(1)) / tau / 6
    assert dt is None and furthest([ds], [exact]) < 1e-12
    for kind in ("direction", "summed", "per class", "divergence",
                 *["teacher at 1", "student at 1", "times tau squared"] * (tau != 1)):
        assert abs(ours - slow_distillation(student, teacher, tau, kind)) > 1e-3, kind


@pytest.mark.parametrize("flags, mistake", [
    ("", ""), ("--alpha 0.75", ""), ("--no-tau-squared", ""), *(("--alpha 0.75", x) for x in (
        "by the labeled", "no tau squared", "alpha of the labels", "classifier not adapted"))])
def test_distillation_steps_equal_those_written_out_without_a_mistake(flags, mistake):
    """Three steps: of 400 epochs, 20 of warm-up."""
    args = parse("distill --teacher none --data demo", STEP, "--temperature 0.5", flags)
    teacher, student = (task_network(Tiny(), nn.Sequential(), 4) for _ in range(2))
    teacher, student = shaken(teacher, 5).eval(), shaken(student, 25)
    twin, optimizer = copy.deepcopy(student), simclr_v2.build_optimizer(student, args)
    named, buffers, worst = dict(twin.named_parameters()), {}, []
    for i, epoch in enumerate((0.0, 10.0, 200.25)):
        x, labels = joined_views(4, seed=40 + i), torch.tensor([0, -1, 3, -1, -1, 2, -1, -1])
        ours, *logits = simclr_v2.distill_step(student, teacher, optimizer, x, labels, epoch, args)
        assert not any(y.requires_grad for y in (ours, *logits))
        y, t, known = twin(x), teacher(x).detach(), labels >= 0  # one crop for both
        labeled = cross_entropy(y[known], labels[known], reduction="sum") / (
            3 if mistake == "by the labeled" else 8)
        loss = slow_distillation(y, t, 0.5) * (
            1 if "--no" in flags or mistake == "no tau squared" else 0.25)
        alpha = 1 - args.alpha if mistake == "alpha of the labels" else args.alpha
        loss = alpha * loss + (1 - alpha) * labeled
        worst += [abs(ours - loss).item(), furthest(logits, [y, t])]
        slow_lars(named, buffers, loss, 0.2 * warmup_cosine(epoch, 20, 400),
                  stage="" if mistake == "classifier not adapted" else "distill")
    worst += [furthest(student.state_dict().values(), twin.state_dict().values())]
    assert max(worst) > 1e-3 if mistake else max(worst) < 1e-9


@pytest.mark.parametrize("recipe", ["imagenet", "cifar", "demo"])
def test_views_are_those_of_simsiam(recipe):  # which test_augmentation.py compares with torchvision
    args, x, u = parse("--recipe", recipe), uniform(48, 3, 40, 40).float(), uniform(48, 13, seed=1)
    ours = simclr_v2.augment(x, u, args)
    assert furthest([ours], [simsiam.augment(x, u[:, :12], args)]) < 1e-5
    assert furthest([ours], [simsiam.augment(x, u[:, :12].roll(1, 0), args)]) > 0.1


BOTH = dict(  # v1 and v2 on ImageNet
    arch="resnet50", width=1, sk=False, small_images=False, zero_init_residual=True, dim=128,
    temperature=0.1, batch_size=4096, queue=0, ema_momentum=0.999, image_size=224, crop_min=0.08,
    jitter=(0.8, 0.8, 0.8, 0.2), jitter_prob=0.8, gray_prob=0.2, blur_prob=0.5,
    mean=(0, 0, 0), std=(1, 1, 1), optimizer="lars", momentum=0.9)  # no normalization anywhere
V2 = dict(lr_rule="sqrt", base_lr=0.1, weight_decay=1e-4)
V1 = dict(lr_rule="linear", base_lr=0.3, weight_decay=1e-6)
VIT = dict(lr_rule="linear", base_lr=2e-4, epochs=300, weight_decay=0.1, optimizer="adamw")
CIFAR = BOTH | dict(
    arch="resnet18", small_images=True, image_size=32, head_layers=3, lr_rule="linear", base_lr=1,
    epochs=1000, warmup_epochs=10, batch_size=512, weight_decay=1e-4, temperature=0.5,
    jitter=(0.4, 0.4, 0.4, 0.1), blur_prob=0)
LINEAR = dict(lr_rule="linear", base_lr=0.1, epochs=90, batch_size=4096, momentum=0.9, labels="1.0",
              crop_min=0.08, optimizer="sgd", weight_decay=0, warmup_epochs=0, from_layer=0)
TUNED = LINEAR | dict(lr_rule="sqrt", base_lr=0.005, epochs=60, batch_size=1024, labels="0.01",
                      from_layer=1, optimizer="lars")
STUDENT = dict(temperature=1, tau_squared=True, alpha=1, epochs=400, batch_size=4096, labels="",
               warmup_epochs=20, crop_min=0.08, optimizer="lars", momentum=0.9)
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
    args = parse(stage, "--data demo --recipe", recipe)
    assert_fields(args, TABLE[stage][recipe])
    assert [*simclr_v2.RECIPES[args.stage]] == [*simclr_v2.RECIPES["pretrain"]]


@pytest.mark.parametrize("share, epochs, layer", [
    (0.01, 60, 1), (0.03, 60, 1), (0.05, 30, 1), (0.3, 30, 1), (0.5, 30, 0), (1, 30, 0)])
def test_fine_tuning_follows_the_fraction_of_labels(share, epochs, layer):
    for more in ("", "--width 2", "--sk", "--epochs 7 --from-layer 2 --base-lr 3"):
        for head_layers in (4, 3, 2, 1, 0, None):  # None: from scratch
            args = parse(FINETUNE, more)
            args.initial = {} if head_layers is None else {"config": {"head_layers": head_layers}}
            simclr_v2.published(args, share)
            found = args.epochs, args.from_layer, args.base_lr
            assert found == ((7, 2, 3) if "--epochs" in more else (
                epochs, min(layer, max(0, (head_layers or 0) - 1)), 0.002 if more else 0.005))
            assert found == tuple(args.config[x] for x in ("epochs", "from_layer", "base_lr"))


GATHERS = ("right", "no gradient", "local slice", "times W", "rank 0's labels and mask")


def network_steps(kind, n, rank, world):
    """Two steps of the program's own: model, optimizer, DDP, batch norm of the global batch."""
    args, model, record = parse(STEP, KINDS[kind]), build(kind), {}
    optimizer = simclr_v2.build_optimizer(model, args)
    net, done = simclr_v2.distribute(model, args), record_gradients(model, optimizer, record)
    for i, epoch in enumerate((20.0, 50.5)):
        x = part(joined_views(n, seed=20 + i), rank, world)
        labels = randn(4, n, seed=i).argmax(0).chunk(world)[rank]
        loss, *outputs = simclr_v2.train_step(net, optimizer, x, labels, epoch, args)
        record[f"mean loss {i}"] = loss.clone()
        record |= {f"each {x} {i}": torch.tensor(value) for x, value in
                   simclr_v2.monitors(*outputs, labels).items()}
    assert done()
    return record | {f"each {key}": x.clone() for key, x in model.state_dict().items()
                     if x.is_floating_point()}


def worker(rank, world):
    results = {(kind, n): network_steps(kind, n, rank, world) for kind in KINDS for n in (8, 4)}
    for which in GATHERS if world > 1 else ():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(simclr_v2, "gather_with_grad", lambda x: Gather.apply(x, which))
            if "rank 0" in which:
                patch.setattr(simclr_v2, "rank", lambda: 0)
            results["gather", which] = network_steps("plain", 8, rank, world)
    return results


def test_processes_equal_one_process_unless_the_gather_is_wrong(tmp_path):
    """Losses, gradients, networks, running statistics, memory and monitors."""
    ranks, alone = on_ranks(worker, tmp_path), worker(0, 1)
    for world in (1, 2, 4):
        for key, reference in alone.items():
            worst = differs(ranks, reference, world, *key)
            assert max(worst.values()) < 1e-10, (world, key, worst)
        for which in GATHERS if world > 1 else ():
            worst = differs(ranks, alone["plain", 8], world, "gather", which)
            right = max(worst.values()) < 1e-10
            assert right if which == "right" else worst["gradient"] > 1e-3, (world, which, worst)


SMALL = [x for x in TINY if x not in ("--predictor-dim", "8")] + ["--image-size", "16"]
TUNE = "--recipe demo --batch-size 4 --epochs 2 --log-every 1 --workers 0 --precision fp32".split()


@pytest.fixture(scope="module")
def runs(classes, tmp_path_factory):
    """Two epochs of three steps on 48 images of three classes, with a momentum encoder; and this
    network fine-tuned from layer 1 with a quarter of the labels: 12 images."""
    out = tmp_path_factory.mktemp("runs")
    assert main(*SMALL, "--data", classes, "--epochs", 2, "--queue", 32, "--knn-every", 1,
                "--log-every", 1, "--out", out / "pretrained") == 0
    assert main("finetune", "--init", out / "pretrained/last.pt", *TUNE, "--labels", 0.25, "--out",
                out / "tuned") == 0
    return out


def test_pretraining_logs_its_monitors(runs, photos, tmp_path):
    lines = records(runs / "pretrained")
    assert {"epoch", "step", "loss", "lr", "std", "rank", "contrast_top1", "online_train_top1",
            "images_per_s", "minutes_left"} == {*lines[0]} and len(lines) == 6
    assert [x["epoch"] for x in records(runs / "pretrained", "online_top1")] == [1, 2]
    assert main(*SMALL, "--data", photos, "--steps", 1, "--out", tmp_path) == 0  # no labels
    assert not any("online" in name for name in (*records(tmp_path)[0], *weights(tmp_path)))


def test_every_choice_trains(runs, classes, tmp_path):
    vit = "--arch vit_mini --optimizer adamw --base-lr 1e-3 --warmup-epochs 0.1"
    choices = (
        vit, f"{vit} --heads 2", f"{vit} --patch-projection learned", "", "--head-layers 0",
        "--head-layers 1", "--head-layers 4", "--queue 32", "--queue 32 --ema-momentum 0.5",
        "--lr-rule linear", "--temperature 0.5", "--optimizer sgd --base-lr 0.1",
        f"--queue 32 --init {runs / 'pretrained/encoder.pt'}")
    for i, flags in enumerate(choices):
        assert main(*SMALL, "--data", classes, *flags.split(), "--log-every", 1, "--steps", 3,
                    "--out", tmp_path / str(i)) == 0
    curves = {tuple(losses(tmp_path / str(i))) for i in range(len(choices))}
    assert len(curves) == len(choices) and {len(curve) for curve in curves} == {3}
    heads = json.loads((tmp_path / "0/encoder.json").read_text())["heads"]
    assert heads == 3  # not 0, which timm would not know
    assert "encoder.patch_embed.proj.weight" in weights(tmp_path / "0")
    assert "projector" not in str([*weights(tmp_path / "4")])


@pytest.mark.parametrize("stage", ["finetune", "linear"])
@pytest.mark.parametrize("layer", range(4))
def test_later_stages_keep_the_first_layers_of_the_head(stage, layer, runs, tmp_path, monkeypatch):
    monkeypatch.delattr(simclr_v2, "augment")  # crops and flips alone
    command = [stage, "--init", runs / "pretrained/last.pt", *TUNE, "--from-layer", layer]
    assert main(*command, "--labels", 0.25, "--out", tmp_path) == 0
    before, after = weights(runs / "pretrained"), weights(tmp_path)
    for name, x in after.items():  # buffers too; but the bias of the head's end is fixed
        if not name.startswith("fc."):
            fixed = stage == "linear" or name == "projector.2.1.bias"
            assert torch.equal(x, before[name]) == fixed, name
    assert losses(tmp_path)[0] == pytest.approx(math.log(3), abs=1e-6)  # a new classifier is 0
    assert after["fc.weight"].any()
    args = settled(simclr_v2, *command, precision="fp32", dtype=torch.float32)
    model = simclr_v2.load_network(args, 3)
    model.load_state_dict(after)  # which has just as many layers
    h, y = simclr_v2.features(model[0], simclr_v2.load_data(args).val, args)
    for i in range(layer):  # linear, batch norm, and ReLU unless it is the last of the head
        norm = model.projector[i][1]
        h = h @ after[f"projector.{i}.0.weight"].T
        h = batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        h = h if i == 2 else h.relu()
    guess = (h @ after["fc.weight"].T + after["fc.bias"]).argmax(1)
    assert records(tmp_path, "top1")[-1]["top1"] == (guess == y).sum().item() / len(y)


def test_a_student_learns_from_a_fixed_teacher(runs, photos, tmp_path, monkeypatch):
    tuned, step = runs / "tuned", Mock(side_effect=simclr_v2.distill_step)
    monkeypatch.setattr(simclr_v2, "distill_step", step)
    monkeypatch.delattr(simclr_v2, "augment")
    args = ["distill", *TUNE, "--batch-size", 16, "--warmup-epochs", 0.5]
    for temperature, *more in ((0.1, ), (0.1, "--data", photos), (1, "--width", 0.25),
                               (1, "--arch", "vit_mini")):
        out = tmp_path / str(len(more) and more[0])
        assert main(*args, "--teacher", tuned / "last.pt", *more, "--out", out) == 0
        assert all(line["loss"] >= line["floor"] - 1e-6 for line in records(out))
        assert not any("projector" in name for name in weights(out))
        _, teacher, *_, settings = step.call_args.args
        assert settings.temperature == temperature and not teacher.training
        assert not any(p.requires_grad for p in teacher.parameters())
        assert same(teacher.state_dict().values(), weights(tuned).values())
    assert step.call_count == 22 and not records(tmp_path / "--data", "top1")
    first, = records(tmp_path / "0", "teacher_top1")
    assert first["teacher_top1"] == records(tuned, "top1")[-1]["top1"]
    assert main(*args, "--teacher", tmp_path / "--arch/last.pt", "--steps", 1, "--out",
                tmp_path / "next") == 0  # students teach


def test_alpha_mixes_in_the_labels_that_the_teacher_was_given(runs, classes, tmp_path):
    names, first = sorted(path.name for path in (classes / "train/ant").iterdir()), {}
    (tmp_path / "list").write_text("".join(f"ant/{name}\n" for name in names[:6]))
    args = ["distill", "--teacher", runs / "tuned/last.pt", *TUNE, "--batch-size", 48, "--steps", 1]
    for n, *flags in ((0, ), (12, "--alpha", 0.5), (48, "--alpha", 0.5, "--labels", 1),
                      (6, "--alpha", 0.5, "--labels", tmp_path / "list")):
        assert main(*args, *flags, "--out", tmp_path / str(n)) == 0
        first[n] = losses(tmp_path / str(n))[0]
    for n in (6, 12, 48):  # the student starts near even logits: ln 3 a labeled image
        assert 2 * first[n] - first[0] == pytest.approx(n / 48 * math.log(3),
                                                        abs=0.1 * n / 48 + 0.02)
    images = simclr_v2.Images(torch.tensor([0, 1, -1, 1, 0, -1]))
    args = parse("distill --teacher none --data demo --labels 1")
    assert simclr_v2.known_labels(images, args).tolist() == images.labels.tolist()


MISTAKES = {  # {r}, {t}: the pre-trained run, the tuned one; {p}, {c}: images without, with labels
    "--arch resnet10 --sk": "selective kernels need ResNet", "--queue 64": "a multiple of 128",
    "--queue 8192": "its own negative", "--width 0.0625": "0.125",
    "distill --teacher {r}": "not the last.pt of a finetune, distill or linear run",
    "distill --teacher {t} --mean 0 0 0 --image-size 32": "the same image_size, mean",
    "distill --teacher {t} --data demo": "the teacher has 3 classes, demo has 10",
    "distill --teacher {t} --alpha 2": "must be 1, or below",
    "distill --teacher {t} --data {p} --alpha 0.5": "with --labels",
    "finetune --init {r} --from-layer 4": "fewer head layers",
    "finetune --init {t} --from-layer 2": "fewer head layers",
    "finetune --init {e} --data {c}": "fewer head layers",
    "finetune --init {r} --data {p}": "needs labels",
    "linear --init {r} --data {p}": "needs labels"}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_gets_one_sentence(flags, runs, photos, classes, tmp_path):
    words = flags.format(r=runs / "pretrained/last.pt", t=runs / "tuned/last.pt", p=photos,
                         c=classes, e=runs / "pretrained/encoder.pt").split()
    words += ["--batch-size", 2] * (not flags.startswith("--"))  # there are few images
    assert MISTAKES[flags] in mistake(simclr_v2, *words, "--out", tmp_path / "out")
