"""moco_v3.py against arXiv 2104.02057: loss, encoders, heads, optimizers, recipes, checkpoints.

The oracles are written from Algorithm 1, or from the settings and checkpoints of the authors' code.
What is `wrong` is a mistake that an oracle must tell apart.
"""

import copy
import functools
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import losses, mistake, on_ranks, program, records, weights
from helpers import (
    DOUBLE, Gather, assert_fields, count, differs, embedding_pairs, furthest, settled, uniform)
from test_augmentation import torchvision_jitter
from test_vit import slow_vit
from torch import nn
from torchvision.transforms.v2 import functional as TF

import moco_v3
from moco_v3 import LAMB, LARS, VITS, MoCoV3, chance_and_floor, contrastive_loss, resnet, vit

main, ready = program(moco_v3), functools.partial(settled, moco_v3)
ENCODERS = {  # on images of 8 px, a ViT's four patches
    "vit": lambda: vit("mini", 8, 4, patch_projection="frozen"),
    "vit learned": lambda: vit("mini", 8, 4, position="learned"),
    "vit-bn": lambda: vit("mini", 8, 4, mlp_norm="batch"),
    "resnet": lambda: resnet(10, 0.125, small_images=True)}


def tiny_model(encoder="vit", **options):
    torch.manual_seed(0)
    encoder = ENCODERS[encoder]() if isinstance(encoder, str) else encoder
    return MoCoV3(encoder, **{"dim": 8, "hidden_dim": 16, **options}).to(DOUBLE)


def views(n=6, seed=1):
    """Two batches of images with clearly different statistics."""
    x1, noise = (4 * uniform(n, 3, 8, 8, seed=s) - 2 for s in (seed, seed + 99))
    return x1, 2 * x1.roll(1, 3) + noise ** 2 - 1


def pairs(model):
    """(name, parameter, its momentum copy)."""
    theirs = dict(model.named_parameters())
    return [(name, p, theirs[f"momentum_{name}"]) for name, p in theirs.items()
            if name.split(".")[0] in ("encoder", "projector")]


@torch.no_grad()
def apart(model):
    """Lets the momentum encoder be another network, as after some steps."""
    for _, online, target in pairs(model):
        target += online.requires_grad * 0.3 * (uniform(*target.shape) - 0.5)
    return model


# ----------------------------------------------------------------------------------------- the loss


def slow_loss(q, k, temperature):
    """ctr(q, k) of Algorithm 1, one query and one key at a time."""
    total = 0.0
    for n, query in enumerate(q.tolist()):
        logits = [sum(i * j for i, j in zip(query, key)) / math.hypot(*query) / math.hypot(*key)
                  / temperature for key in k.tolist()]
        largest = max(logits)
        total += largest + math.log(sum(math.exp(x - largest) for x in logits)) - logits[n]
    return 2 * temperature * total / len(q)


def slow_ctr(q, k, t):
    """The same, as matrices."""
    logits = (q / q.norm(dim=1, keepdim=True)) @ (k / k.norm(dim=1, keepdim=True)).T / t
    return 2 * t * (logits.exp().sum(1).log() - logits.diag()).mean()


def slow_gradient(q, k, t):
    return torch.autograd.grad(slow_ctr(q.requires_grad_(), k.detach(), t), q)[0]


@pytest.mark.parametrize("temperature", [0.005, 0.05, 0.2, 1.0])
def test_loss_and_gradient_equal_a_double_loop(temperature):
    for seed, n, dim in ((0, 6, 5), (1, 1, 7), (2, 17, 3)):
        q, k = embedding_pairs(n, dim, seed=seed)
        loss = contrastive_loss(q, k, temperature)
        assert loss.shape == () and abs(loss.item() - slow_loss(q, k, temperature)) < 1e-9
        dq, dk = torch.autograd.grad(loss, (q, k), allow_unused=True)
        assert dk is None  # Alg. 1: k1, k2 carry no gradient
        expected = slow_gradient(q, k, temperature)
        assert furthest([dq], [expected]) < 1e-9 and (n == 1 or expected.abs().max() > 1e-3)


@pytest.mark.parametrize("t", [0.05, 0.2])
def test_the_double_loop_tells_wrong_losses_apart(t):
    q, k = (x.detach() for x in embedding_pairs())
    right, unit_q, unit_k = slow_loss(q, k, t), F.normalize(q), F.normalize(k)
    logits, labels, ce = unit_q @ unit_k.T / t, torch.arange(len(q)), F.cross_entropy
    both = torch.cat([logits, (unit_q @ unit_q.T / t).fill_diagonal_(-math.inf)], 1)
    others = logits.masked_fill(torch.eye(len(q)).bool(), -math.inf)
    for wrong, loss in {
            "without 2 tau": ce(logits, labels) / 2 / t, "half": ce(logits, labels) / 2,
            "2 without tau": ce(logits, labels) / t, "sum": ce(logits, labels) * len(q),
            "keys choose": ce(logits.T, labels), "2N - 2 negatives, as SimCLR": ce(both, labels),
            "positive not among the classes": (others.logsumexp(1) - logits.diag()).mean(),
            "not normalized": ce(q @ k.T / t, labels), "times tau": ce(logits * t * t, labels),
            "keys not normalized": ce(unit_q @ k.T / t, labels),
            "shifted labels": ce(logits, labels.roll(1))}.items():
        assert abs(2 * t * loss.item() - right) > 1e-3, wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.005, 0.2])
def test_half_precision_inputs_are_raised_to_float32(dtype, temperature):
    q, k = embedding_pairs(16, 256, dtype)
    k = k.detach().roll(1, 0)  # or the positive would stand alone at .005, without gradient
    with torch.autocast("cpu", dtype):
        loss = contrastive_loss(q, k, temperature)
    raised = contrastive_loss(q.double(), k.double(), temperature).item()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(raised, rel=1e-5, abs=1e-6)
    loss.backward()
    assert q.grad.isfinite().all() and q.grad.any()
    for same in (torch.full((4, 256), 300.0, dtype=dtype), torch.zeros(4, 256)):  # 300^2 overflows
        loss = contrastive_loss(same, same, temperature)
        assert loss.item() == pytest.approx(2 * temperature * math.log(4), abs=1e-4)


@pytest.mark.parametrize("temperature, table", [  # rounded, as computed once from the equation
    (0.2, {256: (4.44, 0.79), 512: (4.99, 1.19), 1024: (5.55, 1.65), 4096: (6.65, 2.68)}),
    (1.0, {256: (22.18, 18.19), 512: (24.95, 20.96), 1024: (27.73, 23.73), 4096: (33.27, 29.27)})])
def test_the_loss_reaches_chance_and_floor_and_nothing_below(temperature, table):
    for n, expected in table.items():
        assert chance_and_floor(n, temperature) == pytest.approx(expected, abs=0.0051)
    for n in (2, 5, 8):
        simplex = torch.eye(n, dtype=DOUBLE) - 1 / n  # n points as far from each other as can be
        same, floor = torch.ones(n, 4, dtype=DOUBLE), chance_and_floor(n, temperature)[1]
        reached = [2 * contrastive_loss(x, x, temperature).item() for x in (same, simplex)]
        assert reached == pytest.approx(chance_and_floor(n, temperature), abs=1e-9)
        for seed in range(20):
            q, k = embedding_pairs(n, n, seed=seed)
            assert all(2 * contrastive_loss(q, y, temperature) > floor - 1e-9 for y in (q, k))


# --------------------------------------------------------------------- several processes equal one

N, WORLDS = 8, (4, 2, 1)
WRONG = ("unshifted labels", "same view", "local negatives", "times W")


def share(which, rank, world, t):
    """Loss of one rank's slice, and its part of the averaged gradient."""
    q1, k2, q2, k1 = (x.detach().chunk(world)[rank].clone().requires_grad_()
                      for seed in (3, 4) for x in embedding_pairs(N, seed=seed))

    def ctr(q, k):
        if which in ("right", "same view"):
            return contrastive_loss(q, k, t)
        k, first = k.detach(), rank * len(q) if which == "times W" else 0
        keys = F.normalize(k if which == "local negatives" else Gather.apply(k, ""))
        loss = F.cross_entropy(F.normalize(q) @ keys.T / t, first + torch.arange(len(q))) * 2 * t
        return loss * (world if which == "times W" else 1)

    loss = ctr(q1, k1) + ctr(q2, k2) if which == "same view" else ctr(q1, k2) + ctr(q2, k1)
    loss.backward()
    assert k1.grad is None and k2.grad is None
    return {"mean loss": loss.detach(), "split d1": q1.grad / world, "split d2": q2.grad / world}


def network_steps(name, rank=0, world=1):
    """Two steps of the program's own: model, optimizer, DDP and batch norm of the global batch."""
    recipe = "--recipe cifar-resnet --base-lr 3" if name == "resnet" else "--recipe demo"
    args, record, model = ready(recipe, "--batch-size", N), {}, tiny_model(name)
    optimizer, net = moco_v3.build_optimizer(model, args), moco_v3.distribute(model, args)
    for i, time in enumerate(((0.5, 0.5), (4.0, 0.9))):
        x1, x2 = (x.chunk(world)[rank] for x in views(N, seed=20 + i))
        results = moco_v3.train_step(net, optimizer, x1, x2, *time, args)
        for kind, x in zip(("mean loss", "rows q", "rows h", "each norms"), results, strict=True):
            record[f"{kind} {i}"] = x.clone()
    return record | {f"each {key}": x.clone() for key, x in model.state_dict().items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    def compute(rank, world):
        shares = {(which, t): share(which, rank, world, t)
                  for which in ("right", *WRONG) for t in (0.005, 0.2, 1.0)}
        return shares | {(name,): network_steps(name, rank, world) for name in ENCODERS}
    return on_ranks(compute, tmp_path_factory.mktemp("ranks"), WORLDS)


@pytest.mark.parametrize("world", sorted(WORLDS))
def test_losses_and_gradients_of_ranks_equal_those_of_one_process(ranks, world):
    (q1, k2), (q2, k1) = ([x.detach() for x in embedding_pairs(N, seed=seed)] for seed in (3, 4))
    for t in (0.005, 0.2, 1.0):
        loss = torch.tensor(slow_loss(q1, k2, t) + slow_loss(q2, k1, t), dtype=DOUBLE)
        reference = {"mean loss": loss, "split d1": slow_gradient(q1, k2, t),
                     "split d2": slow_gradient(q2, k1, t)}
        assert max(differs(ranks, reference, world, "right", t).values()) < 1e-10
        for which in WRONG if world > 1 and t > 0.1 else ():
            assert max(differs(ranks, reference, world, which, t).values()) > 1e-3, which


@pytest.mark.parametrize("name", ENCODERS)
def test_training_on_ranks_equals_one_process(ranks, name):
    """Both encoders, their running statistics, losses and gradient norms, after two steps."""
    for world in WORLDS:
        assert max(differs(ranks, network_steps(name), world, name).values()) < 1e-10


# ------------------------------------------------------------------------- heads and two encoders


def layers(head):
    """The layers' names and the shapes of their parameters."""
    return [(type(m).__name__, *(tuple(p.shape) for p in m.parameters())) for m in head]


def expected_head(*widths, output_bn=True):
    found = []
    for i, o in zip(widths, widths[1:]):
        found += [("Linear", (o, i)), ("BatchNorm1d", (o,), (o,)), ("ReLU",)]
    return found[:-2] + [("BatchNorm1d",)] * output_bn


@pytest.mark.parametrize("arch, total, projector, keys", [  # millions of parameters
    ("vit_small", 84.267, 19.415, 342), ("vit_base", 215.68, 20.988, 342),
    ("vit_large", 652.78, 22.036, 630), ("resnet50", 68.012, 9.445, 663)])
def test_heads_and_numbers_of_parameters_are_the_authors(arch, total, projector, keys):
    vision = arch != "resnet50"
    args = ready("--arch", arch, "--recipe", "imagenet" if vision else "imagenet-r50-100")
    with torch.device("meta"):
        model = MoCoV3(moco_v3.build_encoder(args), args.dim, args.hidden_dim,
                       args.projector_layers, args.predictor, args.predictor_output_bn, args.bn)
    head = expected_head(model.encoder.feature_dim, *[4096] * (1 + vision), 256)
    assert layers(model.projector) == layers(model.momentum_projector) == head
    assert layers(model.predictor) == expected_head(256, 4096, 256, output_bn=vision)
    assert count(model) / 1e6 == pytest.approx(total, abs=0.0051 if total > 100 else 0.00051)
    assert round(count(model.projector) / 1e6, 3) == projector
    assert len(model.state_dict()) == keys


def test_ablated_heads_lack_only_what_was_taken_from_them():  # Sec. 6.2
    bare, without, whole = tiny_model(bn="none"), tiny_model(predictor="none"), tiny_model()
    for part in ("projector", "predictor", "momentum_projector"):
        kept = [x for x in layers(getattr(whole, part)) if x[0] != "BatchNorm1d"]
        assert layers(getattr(bare, part)) == kept
    q1, q2, k1, k2, _ = without(*views())
    assert torch.equal(q1, k1) and torch.equal(q2, k2)  # at the start the encoders are alike
    for fc in tiny_model(dim=256, hidden_dim=512).projector[::3]:  # PyTorch's start, not Xavier's
        assert fc.weight.std().item() == pytest.approx((3 * fc.in_features) ** -0.5, rel=0.02)


@pytest.mark.parametrize("name", ENCODERS)
def test_each_view_is_encoded_alone_where_batch_norm_would_mix_them(name):  # App. A
    model, (x1, x2), passes = apart(tiny_model(name)), views(), []
    twin = copy.deepcopy(model)
    for encoder in (model.encoder, model.momentum_encoder):
        encoder.register_forward_hook(lambda module, x, y: passes.append(len(y)))
    outputs = model.eval().train()(x1, x2)
    assert passes == ([12, 12] if name in ("vit", "vit learned") else [6] * 4)
    h1, h2 = twin.encoder(x1), twin.encoder(x2)
    q1, q2 = (twin.predictor(twin.projector(h)) for h in (h1, h2))
    k1, k2 = (twin.momentum_projector(twin.momentum_encoder(x)) for x in (x1, x2))
    assert furthest(outputs, (q1, q2, k1, k2, h1)) < 1e-12 and (q1 - k1).abs().max() > 1e-2
    assert not any(x.requires_grad for x in outputs[2:])
    model.update_momentum_encoder(0.5)  # the statistics are of each view in turn, not averaged
    assert furthest(model.buffers(), twin.buffers()) < 1e-12 and len([*model.buffers()]) > 10
    both = twin.momentum_projector(twin.momentum_encoder(torch.cat([x1, x2])))
    assert (both[:6] - k1).abs().max() > 1e-2


# ----------------------------------------------------------------------------- schedules, one step


@pytest.mark.parametrize("flags, function, values", [
    ("imagenet", "momentum_schedule", {0: 0.99, 100: 0.9925, 200: 0.9975, 300: 1.0, 123.4:
                                       1 - 0.005 * (1 + math.cos(math.pi * 123.4 / 300))}),
    ("imagenet-r50-1000", "momentum_schedule", {0: 0.996, 500: 0.998}),
    ("imagenet --ema-schedule constant --ema-momentum 0.9", "momentum_schedule",
     {0: 0.9, 300: 0.9}),
    ("imagenet", "warmup_cosine", {0: 0, 0.25: 0.25 / 40, 39.99: 39.99 / 40, 40: 1, 170: 0.5,
                                   300: 0,
                                   100.5: (1 + math.cos(math.pi * 60.5 / 260)) / 2}),
    ("imagenet-r50-100", "warmup_cosine", {5: 0.5, 10: 1, 55: 0.5}),
    ("imagenet --warmup-epochs 0", "warmup_cosine", {0: 1})])
def test_schedules_change_with_every_step(flags, function, values):
    args = ready("--recipe", flags)
    for epoch, expected in values.items():
        assert getattr(moco_v3, function)(epoch, args) == pytest.approx(expected, abs=1e-12), epoch


def test_lamb_takes_a_closure_and_groups_and_norms_of_zero():
    a, b, c, zero = (nn.Parameter(x * torch.ones(2, 2, dtype=DOUBLE)) for x in (1, 1, 1, 0))
    groups = [{"params": [a, zero]}, {"params": [b, c], "lr": 0.5, "weight_decay": 1.0}]

    def closure():
        loss = (a * a + b * b + zero).sum()
        loss.backward()
        return loss

    assert LAMB(groups, lr=0.1).step(closure).item() == 8
    for w, value in ((a, 0.9), (b, 0.5), (c, 1.0), (zero, -0.1)):  # c has no gradient
        torch.testing.assert_close(w.detach(), torch.full_like(w, value), rtol=0, atol=1e-6)


def slow_step(model, state, x1, x2, factor, m, args, wrong=""):
    """Algorithm 1 written out, and mistakes. AdamW is torch's, LARS is tested in test_common.py."""
    @torch.no_grad()
    def average():
        for name, online, target in pairs(model):
            if not (wrong == "projector not averaged" and name.startswith("projector.")):
                target.copy_(m * target + (1 - m) * online)
        if wrong == "statistics averaged":
            for a, b in zip(model.momentum_projector.buffers(), model.projector.buffers()):
                a.copy_(m * a + (1 - m) * b)

    if wrong == "average before keys":
        average()
    q1, q2 = (model.predictor(model.projector(model.encoder(x))) for x in (x1, x2))
    if wrong == "views together":
        q1, q2 = model.predictor(model.projector(model.encoder(torch.cat([x1, x2])))).chunk(2)
    model.momentum_projector.train(wrong != "keys in eval mode")
    with torch.no_grad():
        k1, k2 = (model.momentum_projector(model.momentum_encoder(x)) for x in (x1, x2))
        if wrong == "keys predicted":
            k1, k2 = model.predictor(k1), model.predictor(k2)
    k1, k2 = (k2, k1) if wrong == "same view" else (k1, k2)
    first, second = slow_ctr(q1, k2, args.temperature), slow_ctr(q2, k1, args.temperature)
    loss = first if wrong == "one direction" else first + second
    loss = loss / {"halved": 2, "without 2 tau": 2 * args.temperature}.get(wrong, 1)
    if wrong == "average before the step":
        average()
    params = [p for p in model.parameters() if p.requires_grad]
    lr, decay = args.base_lr * args.batch_size / 256 * factor, args.weight_decay
    if not state:
        kind = {"adamw": torch.optim.AdamW, "lars": LARS, "lamb": functools.partial(
            torch.optim.Adam, eps=1e-6)}[args.optimizer]
        kind = torch.optim.Adam if wrong == "decay in the gradient" else kind
        state["optimizer"] = kind([{"params": [w for w in params if (w.dim() < 2) == thin]}
                                   for thin in (False, True)], lr=0.0, weight_decay=decay)
    for w, g in zip(params, torch.autograd.grad(loss, params)):
        w.grad = g
    if wrong == "gradient clipped":
        nn.utils.clip_grad_norm_(params, 1.0)
    thick, thin = state["optimizer"].param_groups
    thin["weight_decay"] = 0.0 if wrong == "no decay of vectors" else decay
    thick["lr"] = thin["lr"] = lr
    if args.optimizer == "lamb":  # Adam with lr 1 makes u
        thick["lr"], thick["weight_decay"], thin["weight_decay"] = 1.0, 0.0, 0.0
    before = [w.detach().clone() for w in thick["params"]]
    state["optimizer"].step()
    for w, old in zip(thick["params"], before) if args.optimizer == "lamb" else ():
        u = old - w.detach() + (0 if wrong == "decay outside" else decay) * old
        ratio = {"no ratio": 1.0, "clipped": 0.01}.get(wrong, old.norm() / u.norm())
        outside = decay * old if wrong == "decay outside" else 0
        w.data = old - lr * (ratio * u + outside)
    for _ in range(0 if wrong.startswith("average before") else 1 + (wrong == "averaged twice")):
        average()
    return loss.detach(), q1.detach()


STEP = "--recipe imagenet --batch-size 512 --base-lr 0.02 "
TIMES = ((0.0, 0.9), (10.3, 0.5), (100.3, 0.99))  # epoch, m


def run_both(flags="", encoder="vit", options={}, wrong=""):
    """Three steps of train_step and of the oracle; the largest difference in the checkpoint."""
    args, state = ready(STEP + flags), {}
    model, twin = (tiny_model(encoder, **options) for _ in range(2))
    optimizer = moco_v3.build_optimizer(model, args)
    for i, (epoch, m) in enumerate(TIMES):
        at = math.floor(epoch) if wrong == "lr per epoch" else epoch
        factor = at / 40 if at < 40 else (1 + math.cos(math.pi * (at - 40) / 260)) / 2
        loss, q1 = slow_step(twin, state, *views(seed=10 + i), factor, m, args, wrong)
        ours = moco_v3.train_step(model, optimizer, *views(seed=10 + i), epoch, m, args)
        assert not any(x.requires_grad for x in ours)
        assert wrong or abs(ours[0] - loss) < 1e-9 and furthest([ours[1]], [q1]) < 1e-7
    return furthest(model.state_dict().values(), twin.state_dict().values())


@pytest.mark.parametrize("flags, encoder, options", [
    ("", "vit", {}), ("--optimizer lars --base-lr 5 --weight-decay 0.01", "resnet", {}),
    ("--optimizer lamb", "vit", {}), ("--temperature 1", "vit learned", {}), ("", "vit-bn", {}),
    ("--optimizer lars --base-lr 5 --momentum 0.9", "vit", dict(predictor="none")),
    ("", "vit", dict(bn="none")), ("", "vit", dict(projector_layers=2, predictor_output_bn=False))])
def test_train_step_equals_algorithm_1_written_out(flags, encoder, options):
    assert run_both(flags, encoder, options) < 1e-7


@pytest.mark.parametrize("wrong, flags", [
    *((wrong, "") for wrong in (
        "average before keys", "average before the step", "averaged twice", "keys predicted",
        "projector not averaged", "statistics averaged", "keys in eval mode", "views together",
        "same view", "one direction", "gradient clipped", "no decay of vectors", "lr per epoch",
        "decay in the gradient")),
    *((wrong, "--optimizer lars --base-lr 5") for wrong in ("halved", "without 2 tau")),  # for Adam
    *((wrong, "--optimizer lamb") for wrong in ("no ratio", "clipped", "decay outside"))])
def test_algorithm_1_written_out_tells_mistakes_apart(wrong, flags):
    assert run_both(flags, wrong=wrong) > 1e-5


def test_a_step_with_the_next_momentum_makes_the_keys_of_the_authors_order():
    """Theirs: average with m(t), then keys. Ours: keys, step, then average with m(t + 1)."""
    args, losses = ready(STEP, "--ema-momentum 0.5"), {"theirs": [], "ours": [], "not shifted": []}
    for order in losses:
        model = tiny_model()
        optimizer = moco_v3.build_optimizer(model, args)
        for i, epoch in enumerate((10, 70, 130, 190)):
            m = moco_v3.momentum_schedule(epoch + (60 if order == "ours" else 0), args)
            if order == "theirs":
                model.update_momentum_encoder(m)
                m = 1.0
            loss = moco_v3.train_step(model, optimizer, *views(seed=i), epoch, m, args)[0]
            losses[order].append(loss.item())
    assert losses["ours"] == pytest.approx(losses["theirs"], abs=1e-9)
    assert losses["not shifted"] != pytest.approx(losses["theirs"], abs=1e-4)


@pytest.mark.parametrize("projection, first, tensors", [
    ("frozen", "blocks.0.attn.qkv.", 2), ("learned", "patch_embed.", 2),
    ("batchnorm", "patch_embed.", 4), ("weightnorm", "patch_embed.", 3), ("resnet", "conv1.", 0)])
@pytest.mark.parametrize("clip", [0.0, 0.05, 1e6])
def test_gradients_of_first_and_last_layer_and_clipping(projection, first, tensors, clip):  # Sec. 4
    flags = f"--patch-projection {projection} --image-size 8 --patch-size 4 --base-lr 0.1"
    if projection == "resnet":
        flags = "--recipe cifar-resnet --arch resnet10 --width 0.125"
    args, (x1, x2), seen = ready("--recipe demo", flags, "--clip-patch-grad", clip), views(), {}
    model = tiny_model(moco_v3.build_encoder(args))
    before, twin = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    q1, q2, k1, k2, _ = twin(x1, x2)
    (slow_ctr(q1, k2, args.temperature) + slow_ctr(q2, k1, args.temperature)).backward()
    raw = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    norms = [math.hypot(*(g.norm() for name, g in raw.items()
                          if name.startswith(f"encoder.{layer}")))
             for layer in (first, "layer4.0." if projection == "resnet" else "blocks.2.")]
    optimizer = moco_v3.build_optimizer(model, args)
    optimizer.register_step_pre_hook(lambda *_: seen.update(
        {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    ours = moco_v3.train_step(model, optimizer, x1, x2, 2.0, 0.9, args)[3]
    assert ours.tolist() == pytest.approx(norms, rel=1e-9)  # before clipping
    assert abs(norms[0] - norms[1]) > 1e-3 and seen.keys() == raw.keys()
    clipped = clip == 0.05 and projection not in ("frozen", "resnet")
    for name, g in raw.items():
        factor = clip / norms[0] if clipped and "patch_embed" in name else 1.0
        assert factor <= 1 and furthest([seen[name]], [g * factor]) < 1e-5 * g.norm() + 1e-12, name
    patch = [name for name, _ in model.named_parameters() if "encoder.patch_embed." in name]
    assert len(patch) == 2 * tensors  # in both encoders
    moved = {not torch.equal(before[name], model.state_dict()[name]) for name in patch}
    assert moved == {projection != "frozen"} or not patch


# ---------------------------------------------------------------------------- augmentation, recipes


def oracle_view(image, u, view, order=("blur", "solarize")):
    """The authors' chain for one image. u: 9 for the jitter, 1 gray, 2 for blur, 1 for solarize."""
    image = torchvision_jitter(image, u[:9], (0.4, 0.4, 0.2, 0.1), 0.8)
    if u[9] < 0.2:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    for name in order:
        if name == "blur" and u[10] < (1.0, 0.1)[view]:
            image = TF.gaussian_blur(image, [5, 5], [0.1 + 1.9 * u[11]] * 2)
        if name == "solarize" and u[12] < (0.0, 0.2)[view]:
            image = TF.solarize(image, 128 / 255)
    return TF.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_views_equal_torchvisions_chain():
    args = ready("--recipe imagenet")
    x, u = uniform(128, 3, 40, 40).float(), uniform(128, 13, seed=3)
    u[64:72, 10], u[64:72, 12] = 0.0, 0.1  # both of the rare ones, so that their order counts
    u[72:76, 10:13], u[76:80, 10:13] = 0.0999, 0.1999  # just below the second view's probabilities
    ours = moco_v3.augment(x, u, args)

    def distance(view, images=slice(64), **how):  # where rounding does not decide to solarize
        theirs = torch.stack([oracle_view(image, row, view, **how)
                              for image, row in zip(x.chunk(2)[view], u.chunk(2)[view].tolist())])
        error = (ours.chunk(2)[view] - theirs)[images].abs().amax(1)
        return error.flatten(1).quantile(0.999, dim=1)

    assert max(distance(0).max(), distance(1).max()) < 1e-4
    assert distance(1, slice(8), order=("solarize", "blur")).max() > 0.1
    ours = torch.cat(ours.chunk(2)[::-1])  # each view's probabilities are its own
    assert min((distance(view) > 1e-2).float().mean() for view in (0, 1)) > 0.5


VIT_S = dict(
    arch="vit_small", heads=0, patch_size=16, mlp_norm="layer", position="sincos", pooling="class",
    patch_projection="frozen", projector_layers=3, hidden_dim=4096, dim=256, predictor="mlp",
    predictor_output_bn=True, bn="default", optimizer="adamw", epochs=300, batch_size=4096,
    base_lr=1.5e-4, warmup_epochs=40, weight_decay=0.1, temperature=0.2, ema_momentum=0.99,
    ema_schedule="cosine", clip_patch_grad=0, image_size=224, crop_min=0.08, momentum=0.9,
    jitter=(0.4, 0.4, 0.2, 0.1), jitter_prob=0.8, gray_prob=0.2, blur_prob=(1.0, 0.1),
    solarize_prob=(0.0, 0.2), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), knn_k=200,
    knn_temperature=0.07, width=1, small_images=False, zero_init_residual=True)
R50 = VIT_S | dict(
    arch="resnet50", projector_layers=2, predictor_output_bn=False, optimizer="lars", epochs=100,
    base_lr=0.6, weight_decay=1e-6, warmup_epochs=10, temperature=1.0, crop_min=0.2)
PROBE = dict(optimizer="sgd", momentum=0.9, weight_decay=0, epochs=90, batch_size=1024, base_lr=3,
             crop_min=0.08, image_size=224, mean=VIT_S["mean"], std=VIT_S["std"])
SMALL = dict(image_size=32, blur_prob=(0, 0), small_images=True, crop_min=0.2,
             mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
CIFAR = VIT_S | SMALL | dict(arch="vit_tiny", patch_size=4, epochs=800, batch_size=512,
                             base_lr=5e-4)
CIFAR_R18 = R50 | SMALL | dict(
    arch="resnet18", epochs=1000, batch_size=256, base_lr=6.0, temperature=0.2)


@pytest.mark.parametrize("flags, expected", [
    ("--data FOLDER", VIT_S), ("--data FOLDER --arch vit_large", VIT_S | {"arch": "vit_large"}),
    ("--recipe imagenet-r50-100", R50), ("--data FOLDER --arch resnet50", R50),
    ("--recipe imagenet-r50-300", R50 | {"epochs": 300, "base_lr": 0.3}),
    ("--recipe imagenet-r50-1000", R50 | {"epochs": 1000, "base_lr": 0.3, "weight_decay": 1.5e-6,
                                          "ema_momentum": 0.996}),
    ("--data cifar10", CIFAR), ("--data cifar100 --arch resnet18", CIFAR_R18),
    ("--data stl10", CIFAR | {"image_size": 96}),
    ("--data stl10 --arch resnet18", CIFAR_R18 | {"image_size": 96}),
    ("linear --init none --data FOLDER", PROBE),
    ("linear --init none --data FOLDER --arch resnet50", PROBE | {"base_lr": 0.1}),
    ("linear --init none --data demo --recipe imagenet-r50-1000", PROBE | {"base_lr": 0.1}),
    ("linear --init none --data cifar10 --arch resnet18", dict(base_lr=0.1, epochs=100))])
def test_recipes_are_the_authors(flags, expected, tmp_path):
    args = ready(flags.replace("FOLDER", str(tmp_path)))
    assert_fields(args, expected)
    with torch.device("meta"):
        encoder = moco_v3.build_encoder(args)
    if args.arch.startswith("vit"):
        assert (encoder.feature_dim, len(encoder.blocks)) == VITS[args.arch[4:]][:2]
        assert encoder.patch_embed.proj.kernel_size == (args.patch_size, args.patch_size)
        assert not encoder.patch_embed.proj.weight.requires_grad


# ------------------------------------------------------------------------------------------- a run

TINY = ("--recipe demo --image-size 16 --dim 16 --hidden-dim 32 --batch-size 16 --workers 0 "
        "--epochs 2 --warmup-epochs 0.5 --knn-every 0 --precision fp32 --log-every 1").split()
RESNET = "--recipe cifar-resnet --arch resnet10 --width 0.125"


@pytest.fixture(scope="module")
def pretrained(classes, tmp_path_factory):
    """Two epochs of three steps on 48 images of three classes, 16 px."""
    out = tmp_path_factory.mktemp("pretrained")
    words = [*TINY, "--data", classes, "--knn-every", 1, "--knn-every-steps", 2]
    assert main(*words, "--out", out) == 0
    return out


def test_a_run_logs_what_the_study_of_stability_needs(pretrained, classes, tmp_path, capsys):
    lines = records(pretrained)
    assert [x["m"] for x in lines] == pytest.approx(  # of the next step: see the docstring
        [1 - 0.5 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(1, 7)])
    assert [x["lr"] for x in lines[:2]] == [0, pytest.approx(0.01 / 16 / 1.5)]
    assert {(x["chance"], x["floor"]) for x in lines} == {chance_and_floor(16, 0.2)}
    assert [x["step"] for x in records(pretrained, "knn_queue")] == [2, 4, 6]
    assert main(*TINY, "--data", classes, "--log-every", 3, "--out", tmp_path / "few") == 0
    few = records(tmp_path / "few")
    assert not records(tmp_path / "few", "knn_queue") and few[-1]["loss"] == lines[-1]["loss"]
    both = [([x[name] for x in lines], [x[name] for x in few])
            for name in ("grad_first", "grad_last")]
    for all, some in both:  # no spike is lost
        assert some == [all[0], max(all[1:3]), max(all[3:6])]
    assert any(some[1:] != [all[2], all[5]] for all, some in both)  # the last is not the largest
    curve = enumerate((.5, .6, .3, .7))
    log = (json.dumps({"step": step, "knn_queue": knn}) for step, knn in curve)
    (tmp_path / "log.jsonl").write_text("\n".join(log))
    capsys.readouterr()
    moco_v3.report_dip(type("args", (), {"out": tmp_path}))
    assert "fell by up to 30.0%, at step 2;" in capsys.readouterr().out


def test_the_queue_holds_a_tenth_of_an_epoch_and_votes(tmp_path, monkeypatch):
    seen, real = [], moco_v3.log_queue_knn
    monkeypatch.setattr(moco_v3, "log_knn", lambda *args: None)
    monkeypatch.setattr(moco_v3, "log_queue_knn", lambda encoder, queue, epoch, step, val, args: (
        seen.append((step, [len(h) for h, _ in queue], queue[-1][0].sum().item()))))
    assert main(*TINY, "--batch-size", 100, "--knn-every", 1, "--knn-every-steps", 2, "--steps", 8,
                "--out", tmp_path) == 0
    assert [x[:2] for x in seen] == [(step, [100] * 4) for step in (4, 6, 8)]
    assert len({x[2] for x in seen}) == 3
    args, labels = ready("--recipe demo --knn-k 5"), torch.arange(100) % 10
    args.out, val = tmp_path, moco_v3.Images(torch.arange(3000) % 10)
    monkeypatch.setattr(moco_v3, "features", lambda encoder, images, args: (  # tell the class
        torch.eye(10)[images.labels], images.labels))
    for known, accuracy in ((labels, 1.0), (labels.where(labels % 2 > 0, -1), 0.5)):
        real(nn.Identity(), [(torch.eye(10)[labels], known)] * 4, 0.1, 4, val, args)
        assert records(tmp_path, "knn_queue")[-1]["knn_queue"] == pytest.approx(accuracy, abs=1e-3)


@pytest.mark.parametrize("flags", [
    "", "--arch vit_tiny", "--patch-size 16", "--heads 6", "--mlp-norm batch", "--position learned",
    "--position none", "--pooling mean", "--pooling mean-no-norm", "--patch-projection learned",
    "--patch-projection batchnorm", "--patch-projection weightnorm", "--projector-layers 2",
    "--dim 8",
    "--arch vit_conv_small --patch-size 16", "--hidden-dim 24", "--predictor none", "--bn none",
    "--no-predictor-output-bn", "--optimizer lamb", "--optimizer lars --base-lr 0.1",
    "--weight-decay 0",
    "--temperature 0.5", "--ema-momentum 0.9", "--ema-schedule constant", "--gray-prob 1",
    "--solarize-prob 0 1", "--blur-prob 0 1 --image-size 24", RESNET, RESNET + " --no-small-images",
    RESNET + " --momentum 0.1", RESNET + " --no-zero-init-residual"])
def test_every_ablation_is_another_run(flags, classes, tmp_path, seen={}):
    assert main(*TINY, "--data", classes, "--steps", 3, *flags.split(), "--out", tmp_path) == 0
    curve = *losses(tmp_path), sum(x.sum().item() for x in weights(tmp_path).values())
    assert seen.setdefault(curve, flags) == flags and len(curve) == 4


@pytest.mark.parametrize("flags, sentence", [
    ("--patch-size 5", "no whole number of patches of 5"), ("--heads 5", "5 heads do not share 96"),
    ("--arch vit_conv_small", "the conv stem makes patches of 16 pixels"),
    ("--grad-checkpoint --mlp-norm batch", "running statistics"),
    ("--ema-momentum 1.5", "between 0 and 1"), ("--warmup-epochs 2", "less than --epochs 2")])
def test_settings_that_cannot_be_built_get_one_sentence(flags, sentence, tmp_path):
    assert sentence in mistake(moco_v3, *TINY, *flags.split(), "--out", tmp_path)


# ------------------------------------------------------------------------------- weights of --init


def test_pretraining_from_a_file_starts_both_encoders_with_it(pretrained, classes, tmp_path):
    assert main(*TINY, "--data", classes, "--init", pretrained / "last.pt", "--seed", 1,
                "--steps", 1,
                "--out", tmp_path) == 0  # the first step has lr 0
    before, after = weights(pretrained), weights(tmp_path)
    for name in (x for x in before if x.startswith("encoder.")):
        assert torch.equal(after[name], before[name])
        assert torch.equal(after[f"momentum_{name}"], before[name])
    assert not torch.equal(after["projector.0.weight"], before["projector.0.weight"])


@functools.cache
def official(arch):
    """A file in the layout of the authors' pre-training: random backbones, with small heads."""
    encoder = moco_v3.build_encoder(ready("--recipe imagenet --arch", arch))
    model = apart(tiny_model(encoder)).float()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5), module.running_var.uniform_(0.5, 1.5)
    head = "head" if arch.startswith("vit") else "fc"
    state = {re.sub(r"^(momentum_)?projector", rf"\1encoder.{head}", name): x
             for name, x in model.state_dict().items()}
    state = {"module." + re.sub("^encoder", "base_encoder", name): x for name, x in state.items()}
    return {"epoch": 300, "arch": arch, "state_dict": state, "optimizer": {}, "scaler": {}}


@pytest.mark.parametrize("arch", ["vit_small", "vit_conv_small", "resnet50"])
def test_an_authors_checkpoint_gives_the_authors_features(arch, tmp_path):
    torch.save(official(arch), tmp_path / "file.pth.tar")
    for which, part in (("encoder", "base_encoder"), ("momentum_encoder", "momentum_encoder")):
        args = ready("linear --data", tmp_path, "--init", tmp_path / "file.pth.tar",
                     "--init-encoder", which)
        assert args.arch == arch and args.base_lr == (0.1 if arch == "resnet50" else 3.0)
        encoder, x = moco_v3.load_encoder(args).eval(), 2 * uniform(2, 3, 224, 224) - 1
        state = {name.removeprefix(f"module.{part}."): y.double() for name, y in
                 official(arch)["state_dict"].items() if name.startswith(f"module.{part}.")}
        assert ("patch_embed.proj.12.bias" in state) == ("conv" in arch)
        with torch.no_grad():
            if arch == "resnet50":
                theirs = torchvision.models.resnet50().double().eval()
                missing = theirs.load_state_dict(state, strict=False).missing_keys
                assert missing == ["fc.weight", "fc.bias"]
                theirs.fc = nn.Identity()
                expected = theirs(x)
            else:
                expected, six = (slow_vit(state, x, heads) for heads in (12, 6))  # timm's: 6
                assert (six - expected).abs().max() > 1e-2
            assert furthest([encoder(x)], [expected]) < 1e-9 and expected.std(dim=0).mean() > 1e-3


@pytest.mark.parametrize("old, new", [  # without "module."; as in their linear-*.pth.tar; DeiT's
    ("module.", ""), ("module.base_encoder.", "module."), ("module.base_encoder.", "")])
def test_other_layouts_of_the_authors_files(old, new, classes, tmp_path):
    file, path = official("vit_mini"), tmp_path / "file.pth.tar"
    linear = ["linear", "--data", classes, "--init", path, "--batch-size", 16]
    state = {name.replace(old, new): x for name, x in file["state_dict"].items() if old in name}
    torch.save({**file, "state_dict": state}, path)
    for name, x in moco_v3.load_encoder(ready(*linear, dtype=torch.float32)).state_dict().items():
        assert torch.equal(x, file["state_dict"][f"module.base_encoder.{name}"])
    wrong = ["--arch", "vit_tiny"] if old == "module." else ["--init-encoder", "momentum_encoder"]
    assert "does not fit" in mistake(moco_v3, *linear, *wrong, "--out", tmp_path)
