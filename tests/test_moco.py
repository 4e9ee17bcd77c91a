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
    DOUBLE, Gather, assert_fields, count, differs, embedding_pairs, furthest, joined_views,
    same, settled, uniform)
from test_augmentation import torchvision_jitter
from test_vit import slow_vit
from torch import nn
from torchvision.transforms.v2 import functional as TF

import moco_v3
from moco_v3 import LAMB, LARS, MoCoV3, chance_and_floor, contrastive_loss, resnet, vit

main, ready = program(moco_v3), functools.partial(settled, moco_v3)
ENCODERS = {  # on images of 6 px, a ViT's four patches
    "vit": lambda: vit("mini", 6, 3, patch_projection="frozen"),
    "vit learned": lambda: vit("mini", 6, 3, position="learned"),
    "vit-bn": lambda: vit("mini", 6, 3, mlp_norm="batch"),
    "resnet": lambda: resnet(10, 0.125, small_images=True)}
RESNET = "--recipe cifar-resnet --arch resnet10 --width 0.125"


def tiny_model(encoder="vit", **options):
    torch.manual_seed(0)
    encoder = ENCODERS[encoder]() if isinstance(encoder, str) else encoder
    return MoCoV3(encoder, **{"dim": 8, "hidden_dim": 16, **options}).to(DOUBLE)


def views(n=6, seed=1):
    return joined_views(n, seed).chunk(2)


# ----------------------------------------------------------------------------------------- the loss


def slow_ctr(q, k, t):
    """ctr(q, k) of Algorithm 1, one query and one key at a time."""
    total = 0.0
    for n, query in enumerate(q):
        logits = torch.stack([query @ key / query.norm() / key.norm() / t for key in k])
        total = total + logits.exp().sum().log() - logits[n]
    return 2 * t * total / len(q)


@pytest.mark.parametrize("t", [0.005, 0.05, 0.2, 1.0])
def test_loss_and_gradient_equal_a_double_loop(t):
    for seed, n, dim in ((0, 6, 5), (1, 1, 7), (2, 17, 3)):
        q, k = embedding_pairs(n, dim, seed=seed)
        loss, expected = contrastive_loss(q, k, t), slow_ctr(q, k, t)
        assert loss.shape == () and abs(loss - expected) < 1e-9
        dq, dk = torch.autograd.grad(loss, (q, k), allow_unused=True)
        assert dk is None  # Alg. 1: k1, k2 carry no gradient
        slow_dq, = torch.autograd.grad(expected, q)
        assert furthest([dq], [slow_dq]) < 1e-9 and (n == 1 or slow_dq.abs().max() > 1e-3)


@pytest.mark.parametrize("t", [0.05, 0.2])
def test_the_double_loop_tells_wrong_losses_apart(t):
    q, k = (x.detach() for x in embedding_pairs())
    unit_q, unit_k, labels = F.normalize(q), F.normalize(k), torch.arange(len(q))
    logits, ce = unit_q @ unit_k.T / t, F.cross_entropy
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
        assert abs(2 * t * loss - slow_ctr(q, k, t)) > 1e-3, wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", [0.005, 0.2])
def test_half_precision_inputs_are_raised_to_float32(dtype, t):
    q, k = embedding_pairs(16, 256, dtype)
    k = k.detach().roll(1, 0)  # or the positive would stand alone at .005, without gradient
    with torch.autocast("cpu", dtype):
        loss = contrastive_loss(q, k, t)
    expected = slow_ctr(q.double(), k.double(), t).item()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, 1e-5, 1e-6)
    loss.backward()
    assert q.grad.isfinite().all() and q.grad.any()
    for x in (torch.full((4, 256), 300.0, dtype=dtype), torch.zeros(4, 256)):  # 300^2 overflows
        loss = contrastive_loss(x, x, t)
        assert loss.item() == pytest.approx(2 * t * math.log(4), abs=1e-4)


@pytest.mark.parametrize("t", [0.2, 1.0])
def test_the_loss_reaches_chance_and_floor_and_nothing_below(t):
    for n in (2, 5, 8):
        simplex = torch.eye(n, dtype=DOUBLE) - 1 / n  # n points as far from each other as can be
        equal, limits = torch.ones(n, 4, dtype=DOUBLE), chance_and_floor(n, t)
        reached = [2 * contrastive_loss(x, x, t).item() for x in (equal, simplex)]
        assert reached == pytest.approx(limits, abs=1e-9)
        for seed in range(20):
            q, k = embedding_pairs(n, n, seed=seed)
            assert all(2 * contrastive_loss(q, y, t) > limits[1] - 1e-9 for y in (q, k))


# --------------------------------------------------------------------- several processes equal one

N, WORLDS, WRONG = 8, (4, 2, 1), ("unshifted labels", "local negatives", "times W")


def share(which, rank, world, t):
    """Loss of one rank's slice, and its part of the averaged gradient."""
    q, k = (x.detach().chunk(world)[rank].requires_grad_() for x in embedding_pairs(N))
    if which == "right":
        loss = contrastive_loss(q, k, t)
    else:
        k = k.detach() if which == "local negatives" else Gather.apply(k.detach(), "")
        labels = torch.arange(len(q)) + (rank * len(q) if which == "times W" else 0)
        loss = 2 * t * F.cross_entropy(F.normalize(q) @ F.normalize(k).T / t, labels)
        loss = loss * (world if which == "times W" else 1)
    loss.backward()
    return {"mean loss": loss.detach(), "split gradient": q.grad / world}


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


def test_losses_and_gradients_of_ranks_equal_those_of_one_process(ranks):
    q, k = embedding_pairs(N)
    for t in (0.005, 0.2, 1.0):
        loss = slow_ctr(q, k, t)
        reference = {"mean loss": loss, "split gradient": torch.autograd.grad(loss, q)[0]}
        for world in WORLDS:
            assert max(differs(ranks, reference, world, "right", t).values()) < 1e-10
            for which in WRONG if world > 1 and t > 0.1 else ():
                assert max(differs(ranks, reference, world, which, t).values()) > 1e-3, which


@pytest.mark.parametrize("name", ENCODERS)  # both encoders, statistics, losses, gradient norms
def test_training_on_ranks_equals_one_process(ranks, name):
    for world in WORLDS:
        assert max(differs(ranks, network_steps(name), world, name).values()) < 1e-10


# -------------------------------------------------------------------- heads, schedules, one step


def layers(head):
    """The layers' names and the shapes of their parameters."""
    return [(type(m).__name__, *(tuple(p.shape) for p in m.parameters())) for m in head]


def expected_head(*widths, output_bn=True):
    found = []
    for i, o in zip(widths, widths[1:]):
        found += [("Linear", (o, i)), ("BatchNorm1d", (o,), (o,)), ("ReLU",)]
    return found[:-2] + [("BatchNorm1d",)] * output_bn


@pytest.mark.parametrize("arch, total, keys", [  # millions of parameters
    ("vit_small", 84.267, 342), ("vit_base", 215.68, 342), ("vit_large", 652.78, 630),
    ("resnet50", 68.012, 663)])
def test_heads_and_numbers_of_parameters_are_the_authors(arch, total, keys):
    vision = arch != "resnet50"
    args = ready("--arch", arch, "--recipe", "imagenet" if vision else "imagenet-r50-100")
    with torch.device("meta"):
        model = MoCoV3(moco_v3.build_encoder(args), args.dim, args.hidden_dim,
                       args.projector_layers, args.predictor, args.predictor_output_bn, args.bn)
    head = expected_head(model.encoder.feature_dim, *[4096] * (1 + vision), 256)
    assert layers(model.projector) == layers(model.momentum_projector) == head
    assert layers(model.predictor) == expected_head(256, 4096, 256, output_bn=vision)
    assert count(model) / 1e6 == pytest.approx(total, abs=0.0051 if total > 100 else 0.00051)
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


@pytest.mark.parametrize("flags, function, values", [
    ("imagenet", "momentum_schedule", {0: 0.99, 100: 0.9925, 200: 0.9975, 300: 1}),
    ("imagenet-r50-1000", "momentum_schedule", {0: 0.996, 500: 0.998}),
    ("imagenet --ema-schedule constant --ema-momentum 0.9", "momentum_schedule", {0: .9, 300: .9}),
    ("imagenet", "warmup_cosine", {0: 0, .4: .01, 40: 1, 105: .5 + .125 ** .5, 170: .5, 300: 0}),
    ("imagenet-r50-100", "warmup_cosine", {5: 0.5, 10: 1, 55: 0.5}),
    ("imagenet --warmup-epochs 0", "warmup_cosine", {0: 1})])
def test_schedules_change_with_every_step(flags, function, values):
    args = ready("--recipe", flags)
    for epoch, expected in values.items():
        assert getattr(moco_v3, function)(epoch, args) == pytest.approx(expected, abs=1e-12), epoch


def test_lamb_takes_a_closure_and_groups_and_norms_of_zero():
    a, b, c, zero = (nn.Parameter(x * torch.ones(2, 2, dtype=DOUBLE)) for x in (1, 1, 1, 0))
    groups = [{"params": [a, zero]}, {"params": [b, c], "lr": 0.5, "weight_decay": 3.0}]

    def closure():
        loss = (2 * a * a - b * b + zero).sum()
        loss.backward()
        return loss

    assert LAMB(groups, lr=0.1).step(closure).item() == 4
    expected = [torch.full_like(a, value) for value in (0.9, 0.5, 1.0, -0.1)]  # c has no gradient
    assert furthest([a, b, c, zero], expected) < 1e-6


def slow_step(model, state, x1, x2, factor, m, args, wrong=""):
    """Algorithm 1 written out, and mistakes. AdamW is torch's, LARS is tested in test_common.py."""
    @torch.no_grad()
    def average():
        averaged = [(model.momentum_encoder.parameters(), model.encoder.parameters()),
                    (model.momentum_projector.parameters(), model.projector.parameters()),
                    (model.momentum_projector.buffers(), model.projector.buffers())]
        number = {"projector not averaged": 1, "statistics averaged": 3}.get(wrong, 2)
        for targets, onlines in averaged[:number]:
            for target, online in zip(targets, onlines, strict=True):
                target.copy_(m * target + (1 - m) * online)

    if wrong == "average before keys":
        average()
    h1, h2 = (model.encoder(x) for x in (x1, x2))
    parts = [torch.cat([h1, h2])] if wrong == "views together" else [h1, h2]
    q1, q2 = torch.cat([model.predictor(model.projector(h)) for h in parts]).chunk(2)
    model.momentum_encoder.train()
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
    (thick, thin), lamb = state["optimizer"].param_groups, args.optimizer == "lamb"
    thick.update(lr=1.0 if lamb else lr, weight_decay=0.0 if lamb else decay)  # 1.0: Adam makes u
    thin.update(lr=lr, weight_decay=0.0 if lamb or wrong == "no decay of vectors" else decay)
    before = [w.detach().clone() for w in thick["params"]]
    state["optimizer"].step()
    for w, old in zip(thick["params"], before) if lamb else ():
        u = old - w.detach() + (0 if wrong == "decay outside" else decay) * old
        ratio = {"no ratio": 1.0, "clipped": 0.01}.get(wrong, old.norm() / u.norm())
        w.data = old - lr * (ratio * u + (decay * old if wrong == "decay outside" else 0))
    for _ in range(0 if wrong.startswith("average before") else 1 + (wrong == "averaged twice")):
        average()
    return loss.detach(), q1.detach(), h1.detach()


STEP = "--recipe imagenet --batch-size 512 --base-lr 0.02 "


def run_both(flags="", encoder="vit", options={}, wrong=""):
    """Three steps of train_step and of the oracle; the largest difference in the checkpoint."""
    args, state, passes = ready(STEP + flags), {}, []
    model, twin = (tiny_model(encoder, **options) for _ in range(2))
    for part in (model.encoder, model.momentum_encoder):
        part.register_forward_hook(lambda module, x, y: passes.append(len(y)))
    optimizer = moco_v3.build_optimizer(model, args)
    for i, (epoch, m) in enumerate(((0.0, 0.9), (10.3, 0.5), (100.3, 0.99))):
        at = math.floor(epoch) if wrong == "lr per epoch" else epoch
        factor = at / 40 if at < 40 else (1 + math.cos(math.pi * (at - 40) / 260)) / 2
        loss, *outputs = slow_step(twin, state, *views(seed=10 + i), factor, m, args, wrong)
        ours = moco_v3.train_step(model, optimizer, *views(seed=10 + i), epoch, m, args)
        assert not any(x.requires_grad for x in ours)
        assert wrong or abs(ours[0] - loss) < 1e-9 and furthest(ours[1:3], outputs) < 1e-7
    # App. A: only where no batch norm would mix the views, both are encoded at once.
    assert passes == (6 * [12] if encoder in ("vit", "vit learned") else 12 * [6])
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
    args, state, model, twin = ready(STEP, "--ema-momentum 0.5"), {}, tiny_model(), tiny_model()
    optimizer = moco_v3.build_optimizer(model, args)
    for i, epoch in enumerate((10, 70, 130, 190)):
        factor = moco_v3.warmup_cosine(epoch, args)
        m, following = (moco_v3.momentum_schedule(x, args) for x in (epoch, epoch + 60))
        theirs = slow_step(twin, state, *views(seed=i), factor, m, args, "average before keys")
        ours = moco_v3.train_step(model, optimizer, *views(seed=i), epoch, following, args)
        assert abs(ours[0] - theirs[0]) < 1e-9


@pytest.mark.parametrize("flags, first, tensors", [
    ("--patch-projection frozen", "blocks.0.attn.qkv.", 0), (RESNET, "conv1.", 0),
    *((f"--patch-projection {kind}", "patch_embed.", number)
      for kind, number in (("learned", 2), ("batchnorm", 4), ("weightnorm", 3)))])
@pytest.mark.parametrize("clip", [0.0, 0.05, 1e6])
def test_gradients_of_first_and_last_layer_and_clipping(flags, first, tensors, clip):  # Sec. 4
    args = ready("--recipe demo --image-size 6 --patch-size 3", flags, "--clip-patch-grad", clip)
    model, (x1, x2), seen = tiny_model(moco_v3.build_encoder(args)), views(), {}
    twin, optimizer = copy.deepcopy(model), moco_v3.build_optimizer(model, args)
    q1, q2, k1, k2, _ = twin(x1, x2)
    (slow_ctr(q1, k2, args.temperature) + slow_ctr(q2, k1, args.temperature)).backward()
    raw = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    norms = [math.hypot(*(g.norm() for name, g in raw.items() if name.startswith(layer)))
             for layer in (f"encoder.{first}", ("encoder.layer4.0.", "encoder.blocks.2."))]
    optimizer.register_step_pre_hook(lambda *_: seen.update(
        {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    ours = moco_v3.train_step(model, optimizer, x1, x2, 2.0, 0.9, args)[3]
    assert ours.tolist() == pytest.approx(norms, rel=1e-9)  # before clipping
    assert abs(norms[0] - norms[1]) > 1e-3 and seen.keys() == raw.keys()
    for name, g in raw.items():
        factor = clip / norms[0] if clip == 0.05 and "patch_embed" in name else 1.0
        assert factor <= 1 and furthest([seen[name]], [g * factor]) < 1e-5 * g.norm() + 1e-12, name
    assert sum("patch_embed." in name for name in raw) == tensors


# ---------------------------------------------------------------------------- augmentation, recipes


def test_views_equal_the_authors_chain_by_torchvision():
    x, u = uniform(128, 3, 40, 40).float(), uniform(128, 13, seed=3)
    u[64:72, 10], u[64:72, 12] = 0.0, 0.1  # both of the rare ones, so that their order counts
    u[72:76, 10:13], u[76:80, 10:13] = 0.0999, 0.1999  # just below the second view's probabilities
    ours = moco_v3.augment(x, u, ready("--recipe imagenet"))

    def theirs(image, u, view, order):
        """u: 9 numbers for the jitter, 1 for the gray, 2 for the blur, 1 for the solarization."""
        image = torchvision_jitter(image, u[:9], (0.4, 0.4, 0.2, 0.1), 0.8)
        image = TF.rgb_to_grayscale(image, num_output_channels=3) if u[9] < 0.2 else image
        for name in order:
            if name == "blur" and u[10] < (1.0, 0.1)[view]:
                image = TF.gaussian_blur(image, [5, 5], [0.1 + 1.9 * u[11]] * 2)
            if name == "solarize" and u[12] < (0.0, 0.2)[view]:
                image = TF.solarize(image, 128 / 255)
        return TF.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    def distance(view, order=("blur", "solarize")):  # where rounding does not decide to solarize
        images = zip(x.chunk(2)[view], u.chunk(2)[view].tolist())
        error = ours.chunk(2)[view] - torch.stack([theirs(*image, view, order) for image in images])
        return error.abs().amax(1).flatten(1).quantile(0.999, dim=1)

    assert max(distance(0).max(), distance(1).max()) < 1e-4
    assert distance(1, order=("solarize", "blur"))[:8].max() > 0.1
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
R18 = R50 | SMALL | dict(arch="resnet18", epochs=1000, batch_size=256, base_lr=6.0, temperature=0.2)


@pytest.mark.parametrize("flags, expected", [
    ("--data FOLDER", VIT_S), ("--data FOLDER --arch vit_large", VIT_S | {"arch": "vit_large"}),
    ("--recipe imagenet-r50-100", R50), ("--data FOLDER --arch resnet50", R50),
    ("--recipe imagenet-r50-300", R50 | {"epochs": 300, "base_lr": 0.3}),
    ("--recipe imagenet-r50-1000", R50 | {"epochs": 1000, "base_lr": 0.3, "weight_decay": 1.5e-6,
                                          "ema_momentum": 0.996}),
    ("--data cifar10", CIFAR), ("--data cifar100 --arch resnet18", R18),
    ("--data stl10", CIFAR | {"image_size": 96}),
    ("--data stl10 --arch resnet18", R18 | {"image_size": 96}),
    ("linear --init none --data FOLDER", PROBE),
    ("linear --init none --data FOLDER --arch resnet50", PROBE | {"base_lr": 0.1}),
    ("linear --init none --data demo --recipe imagenet-r50-1000", PROBE | {"base_lr": 0.1}),
    ("linear --init none --data cifar10 --arch resnet18", dict(base_lr=0.1, epochs=100))])
def test_recipes_are_the_authors(flags, expected, tmp_path):
    assert_fields(ready(flags.replace("FOLDER", str(tmp_path))), expected)


# ---------------------------------------------------------------------- a run, weights of --init

TINY = ("--recipe demo --image-size 16 --dim 16 --hidden-dim 32 --batch-size 16 --workers 0 "
        "--epochs 2 --warmup-epochs 0.5 --knn-every 0 --precision fp32 --log-every 1").split()


def test_a_run_logs_what_the_study_of_stability_needs(classes, tmp_path, capsys):
    words = [*TINY, "--data", classes]  # 48 images of 16 px, two epochs of three steps
    assert main(*words, "--knn-every", 1, "--knn-every-steps", 2, "--out", tmp_path) == 0
    assert main(*words, "--log-every", 3, "--out", tmp_path / "few") == 0
    lines, few = records(tmp_path), records(tmp_path / "few")
    assert [x["m"] for x in lines] == pytest.approx(  # of the next step: see the docstring
        [1 - 0.5 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(1, 7)])
    assert [x["lr"] for x in lines[:2]] == [0, pytest.approx(0.01 / 16 / 1.5)]
    assert {(x["chance"], x["floor"]) for x in lines} == {chance_and_floor(16, 0.2)}
    assert [x["step"] for x in records(tmp_path, "knn_queue")] == [2, 4, 6]
    assert not records(tmp_path / "few", "knn_queue") and few[-1]["loss"] == lines[-1]["loss"]
    for name in ("grad_first", "grad_last"):  # no spike is lost
        all, some = ([x[name] for x in run] for run in (lines, few))
        assert some == [all[0], max(all[1:3]), max(all[3:6])]
    assert some[1:] != [all[2], all[5]]  # the last is not the largest
    log = [json.dumps({"step": i, "knn_queue": knn}) for i, knn in enumerate((.5, .6, .3, .7))]
    (tmp_path / "log.jsonl").write_text("\n".join(log))
    moco_v3.report_dip(ready("--out", tmp_path))
    assert "drop of knn_queue: 30.0%, at step 2;" in capsys.readouterr().out


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
    "--dim 8", "--arch vit_conv_small --patch-size 16", "--hidden-dim 24", "--predictor none",
    "--bn none", "--no-predictor-output-bn", "--optimizer lamb", "--optimizer lars --base-lr 0.1",
    "--weight-decay 0", "--temperature 0.5", "--ema-momentum 0.9", "--ema-schedule constant",
    "--gray-prob 1", "--solarize-prob 0 1", "--blur-prob 0 1 --image-size 24", RESNET,
    *(f"{RESNET} {x}" for x in ("--no-small-images", "--momentum 0.1", "--no-zero-init-residual"))])
def test_every_ablation_is_another_run(flags, classes, tmp_path, seen={}):
    assert main(*TINY, "--data", classes, "--steps", 3, *flags.split(), "--out", tmp_path) == 0
    curve = *losses(tmp_path), sum(x.sum().item() for x in weights(tmp_path).values())
    assert seen.setdefault(curve, flags) == flags and len(curve) == 4


def test_settings_that_cannot_be_built_get_one_sentence(tmp_path):  # more: test_vit.py
    assert "heads 5 does not divide" in mistake(moco_v3, *TINY, "--heads", 5, "--out", tmp_path)
    assert "between 0 and 1" in mistake(moco_v3, *TINY, "--ema-momentum", 1.5, "--out", tmp_path)


def test_pretraining_from_a_file_starts_both_encoders_with_it(classes, tmp_path):
    words, file = [*TINY, "--data", classes, "--steps", 1], tmp_path / "last.pt"  # its lr is 0
    assert main(*words, "--out", tmp_path) == 0
    assert main(*words, "--init", file, "--seed", 1, "--out", tmp_path / "new") == 0
    before, after = weights(tmp_path), weights(tmp_path / "new")
    for name in (x for x in before if x.startswith("encoder.")):
        assert torch.equal(after[name], before[name])
        assert torch.equal(after[f"momentum_{name}"], before[name])
    assert not torch.equal(after["projector.0.weight"], before["projector.0.weight"])


@pytest.mark.parametrize("arch", ["vit_small", "vit_conv_small", "resnet50"])
def test_an_authors_checkpoint_gives_the_authors_features(arch, tmp_path):
    model = tiny_model(moco_v3.build_encoder(ready("--recipe imagenet --arch", arch))).float()
    head, file, layout = "fc" if arch == "resnet50" else "head", tmp_path / "file.pth.tar", {}
    for i, (name, x) in enumerate(model.state_dict().items()):
        name = re.sub(r"^(momentum_)?projector", rf"\1encoder.{head}", name)
        layout["module." + re.sub("^encoder", "base_encoder", name)] = (
            x + 0.05 * (uniform(*x.shape, seed=i).float() - 0.5) if x.is_floating_point() else x)
    x = 2 * uniform(2, 3, 224, 224) - 1
    torch.save({"arch": arch, "state_dict": layout, "optimizer": {}}, file)
    for which, part in (("momentum_encoder", "momentum_encoder."), ("encoder", "base_encoder.")):
        args = ready("linear --data", tmp_path, "--init", file, "--init-encoder", which)
        assert args.arch == arch and args.base_lr == (0.1 if arch == "resnet50" else 3.0)
        encoder = moco_v3.load_encoder(args).eval()
        state = {name.split(part)[1]: y.double() for name, y in layout.items() if part in name}
        assert ("patch_embed.proj.12.bias" in state) == ("conv" in arch)
        with torch.no_grad():
            if arch == "resnet50":
                theirs = torchvision.models.resnet50().double().eval()
                theirs.fc = nn.Identity()
                assert not theirs.load_state_dict(state, strict=False).missing_keys
                expected = theirs(x)
            else:
                expected = slow_vit(state, x, 12)  # heads; timm's has 6
            assert furthest([encoder(x)], [expected]) < 1e-9 and expected.std(dim=0).mean() > 1e-3
    if arch == "vit_small":  # without "module."; as in their linear-*.pth.tar; DeiT's
        for old, new in (("module.", ""), (f"module.{part}", "module."), (f"module.{part}", "")):
            other = {name.replace(old, new): y for name, y in layout.items() if old in name}
            torch.save({"arch": arch, "state_dict": other}, file)
            again = moco_v3.load_encoder(ready("linear --data", tmp_path, "--init", file))
            assert same(again.state_dict().values(), encoder.state_dict().values())
        assert "does not fit" in mistake(moco_v3, "linear", "--data", "demo", "--init", file,
                                         "--init-encoder", "momentum_encoder", "--out", tmp_path)
