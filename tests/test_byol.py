"""byol.py against the paper; and its own options and stages as a program.

Every oracle here is written from arXiv 2006.07733 ("Eq.", "Alg.", "Table", "App.") and its authors'
code, without a look at byol.py.
"""
import functools
import json
import math

import pytest
import torch
from conftest import mistake, on_ranks, program, records, weights, write_images
from helpers import (
    DOUBLE, Tiny, assert_fields, count, differs, embedding_pairs, furthest, joined_views,
    record_gradients, same, settled, uniform)
from test_augmentation import torchvision_blur, torchvision_jitter
from torch import nn
from torchvision.transforms.v2 import functional as TF

import byol
from byol import BYOL, byol_loss, ema_tau, negatives_loss
from common import LARS, SyncBatchNorm, resnet

main, parse = program(byol), functools.partial(settled, byol)


def build(args):
    """A small model, its target another network, as after some steps."""
    torch.manual_seed(0)
    model = BYOL(Tiny(), 8, 16, predictor=args.predictor, target=args.target).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.1 * torch.randn_like(p) * ("target_" in name))
    return model


def embeddings(n=6, dim=5, dtype=DOUBLE, seed=0):
    """p, z and z_same, the target's projections of the other view and of the same one."""
    return [*embedding_pairs(n, dim, dtype, seed, 1), embedding_pairs(n, dim, dtype, seed, -1)[1]]


def slow_loss(p, z, mistake=""):
    """Eq. (2), one image at a time."""
    def unit(x, exceptions):
        along = 0 if mistake == "over the batch" else 1
        return x if mistake in exceptions else x / x.square().sum(along, keepdim=True).sqrt()
    z = unit(z.roll(int(mistake == "other images"), 0), ("not normalized", "z not normalized"))
    ones = torch.stack([(a - b) @ (a - b) for a, b in zip(unit(p, ("not normalized",)), z)])
    if mistake == "root":
        ones = ones.sqrt()
    wrong = {"half": 0.5, "double": 2, "sum over images": len(p), "mean over channels": 0.2}
    return ones.mean() * wrong.get(mistake, 1) - 2 * (mistake == "-2 cos")


def slow_negatives(p, z, z_same, alpha, mistake=""):
    """2 alpha mean_i log(sum_j exp S(v_i, v'_j) / alpha + sum_{j != i} exp S(v_i, v_j) / alpha)."""
    def s(a, b):
        return a @ b / alpha / (1 if mistake == "not normalized" else a.norm() * b.norm())
    n, total = len(p), 0
    if mistake == "views swapped":
        z, z_same = z_same, z
    for i in range(n):
        cross = [s(p[i], z[j]) for j in range(n) if j != i or mistake != "positive left out"]
        own = [s(p[i], z_same[j]) for j in range(n) if j != i or mistake == "own view kept"]
        cross, own = torch.stack(cross).logsumexp(0), torch.stack(own).logsumexp(0)
        total = total + {"two logarithms": cross + own, "one view": cross}.get(
            mistake, torch.logaddexp(cross, own))
    total = total - n * math.log(2 * n - 1) * (mistake == "mean of the exponentials")
    factor = {"without 2 alpha": 1, "alpha": alpha, "2": 2, "summed": 2 * alpha * n}
    return factor.get(mistake, 2 * alpha) * total / n


@pytest.mark.parametrize("seed, n, dim", [(0, 6, 5), (1, 1, 7), (2, 17, 3)])
def test_loss_and_gradient_equal_those_of_the_equation(seed, n, dim):
    p, z, _ = embeddings(n, dim, seed=seed)
    loss, slow = byol_loss(p, z), slow_loss(p, z)
    assert loss.shape == () and loss.dtype == DOUBLE and abs(loss - slow) < 1e-9
    expected = torch.autograd.grad(slow, (p, z))
    dp, dz = torch.autograd.grad(loss, (p, z), allow_unused=True)
    assert dz is None and furthest([dp], expected[:1]) < 1e-9 < 1e-3 < dp.abs().max()
    both = torch.autograd.grad(byol_loss(p, z, stop_grad=False), (p, z))
    assert furthest(both, expected) < 1e-9  # Table 5b: "theta"


@pytest.mark.parametrize("alpha", [0.005, 0.01, 0.05, 0.1, 0.3, 1.0])
def test_negatives_and_their_gradient_equal_a_double_loop(alpha):  # Table 5b
    inputs = embeddings(7, 4)
    ours, slow = negatives_loss(*inputs, alpha), slow_negatives(*inputs, alpha)
    assert ours.shape == () and ours.dtype == DOUBLE and abs(ours.item() - slow.item()) < 1e-9
    assert furthest(*(torch.autograd.grad(x, inputs) for x in (ours, slow))) < 1e-9


@pytest.mark.parametrize("slow, args, mistakes", [
    (slow_loss, 2, "half, -2 cos, double, sum over images, root, mean over channels, "
     "not normalized, z not normalized, over the batch, other images"),
    (slow_negatives, 4, "not normalized, views swapped, positive left out, own view kept, "
     "one view, two logarithms, mean of the exponentials, without 2 alpha, alpha, 2, summed")])
def test_the_loops_tell_wrong_losses_apart(slow, args, mistakes):
    for alpha in (0.1, 0.3):
        for wrong in mistakes.split(", "):
            inputs = [*embeddings(), alpha][:args]
            assert (slow(*inputs, wrong) - slow(*inputs)).abs() > 1e-3, wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32_whatever_comes_in(dtype):
    p, z, _ = inputs = embeddings(16, 64, dtype)
    raised = [x.detach().double() for x in inputs]
    expected = slow_loss(*raised[:2]), slow_negatives(*raised, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        losses = byol_loss(p, z), negatives_loss(*inputs, 0.3)
    for loss, value in zip(losses, expected):
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(value.item(), rel=1e-5)
        gradient, = torch.autograd.grad(loss, p)
        assert gradient.isfinite().all() and gradient.any()
    huge = torch.full((4, 256), 300.0, dtype=dtype)  # 300^2 * 256 > 65504
    assert abs(byol_loss(huge, huge).item()) < 1e-5
    zero = torch.zeros(3, 4, requires_grad=True)
    (byol_loss(zero, zero) + negatives_loss(zero, zero, zero, 0.1)).backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("base", [0.996, 0.99, 0.9995])
def test_tau_rises_along_half_a_cosine_from_its_base_to_1(base):  # Sec. 3.3
    for total in (1000, 312_784):
        assert ema_tau(0, total, base) == base and ema_tau(total, total, base) == 1  # exactly
        for k in (7, total // 4, total // 2, total - 1):
            expected = 1 - (1 - base) * (math.cos(math.pi * k / total) + 1) / 2
            assert ema_tau(k, total, base) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("recipe, batch, expected, error", [  # tau ** (B / the recipe's), App. G
    ("imagenet", 4096, 0.996, 1e-12), ("imagenet", 512, 0.9995, 1e-6),
    ("imagenet", 512, 0.996 ** (1 / 8), 1e-12), ("imagenet-300", 1024, 0.99 ** 0.25, 1e-12),
    ("imagenet-40", 8192, 0.97 ** 2, 1e-12), ("cifar", 128, 0.996 ** 0.5, 1e-12)])
def test_base_tau_follows_the_batch_unless_given(recipe, batch, expected, error):
    flags = "--recipe", recipe, "--batch-size", batch
    assert byol.scaled_tau(parse(*flags)) == pytest.approx(expected, abs=error)
    assert byol.scaled_tau(parse(*flags, "--base-tau", 0.9)) == 0.9


@pytest.mark.parametrize("depth, width, encoder, projector", [
    (50, 2048, 23_508_032, 9_449_472), (18, 512, 11_176_512, 3_158_016)])
def test_heads_and_numbers_of_parameters_are_the_authors(depth, width, encoder, projector):
    with torch.device("meta"):
        model = BYOL(resnet(depth))
    for part, inputs in (("projector", width), ("predictor", 256), ("target_projector", width)):
        head = getattr(model, part)
        assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
        assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
            "0.weight": (4096, inputs), "0.bias": (4096,), "1.weight": (4096,), "1.bias": (4096,),
            "3.weight": (256, 4096)}  # no bias at the end, no batch norm either
        assert (head[1].eps, head[1].momentum, head[1].track_running_stats) == (1e-5, 0.1, True)
    assert count(model) == 2 * (encoder + projector) + 2_109_440
    demo = BYOL(Tiny(), 8, 16, output_bn=True)  # on g and its target, not on q
    assert [type(head[-1]) for head in (demo.projector, demo.target_projector, demo.predictor)] == [
        nn.BatchNorm1d, nn.BatchNorm1d, nn.Linear]


@torch.no_grad()
def slow_average(model, tau, mistake):
    state = model.state_dict(keep_vars=True)
    for name, online in state.items():
        buffer = name.endswith(("running_mean", "running_var")) and mistake == "buffers averaged"
        if name.startswith(("encoder.", "projector.")) and (online.requires_grad or buffer):
            if mistake == "predictor averaged":
                online = state[name.replace("projector", "predictor")]
            state[f"target_{name}"].mul_(tau).add_((1 - tau) * online)


def slow_step(model, optimizer, x1, x2, share, tau, args, mistake=""):
    """Alg. 1 written out; with args.target, beta and alpha the rows of Table 5b."""
    def both(network, together):
        return network(torch.cat([x1, x2])).chunk(2) if together else (network(x1), network(x2))

    y1, y2 = both(lambda x: model.projector(model.encoder(x)), mistake == "views concatenated")
    p1, p2 = model.predictor(y1), model.predictor(y2)
    for network in (model.target_encoder, model.target_projector):
        network.train(mistake != "target in eval mode")
    z1, z2 = (y1, y2) if args.target == "online" else both(
        lambda x: model.target_projector(model.target_encoder(x)), mistake == "target concatenated")
    if mistake == "target predicted":
        z1, z2 = model.predictor(z1).detach(), model.predictor(z2).detach()
    if mistake == "stop-gradient kept":
        z1, z2 = z1.detach(), z2.detach()
    if mistake == "same view":
        z1, z2 = z2, z1
    loss = 0
    for p, z, z_same in ((p1, z2, z1), (p2, z1, z2))[:1 if mistake == "one direction" else 2]:
        negatives = slow_negatives(p, z, z_same, args.alpha) if args.beta else 0
        loss = loss + slow_loss(p, z) + args.beta * negatives
    optimizer.zero_grad()
    (loss / (1 + (mistake == "mean of directions"))).backward()
    if mistake == "EMA before the step":
        slow_average(model, tau, mistake)
    for group, factor in zip(optimizer.param_groups, (1, args.predictor_lr_mult)):
        group["lr"] = args.base_lr * args.batch_size / 256 * share * factor
    optimizer.step()  # test_common.py compares it with a loop over floats
    for _ in range({"EMA before the step": 0, "EMA forgotten": 0, "EMA twice": 2}.get(mistake, 1)):
        slow_average(model, tau, mistake)
    return loss.detach(), y1.detach()


STEP = "--recipe imagenet --batch-size 512 --base-lr 1 --weight-decay 0.1"
SIMCLR = "--target online --beta 1 --predictor none"


def run_both(flags, mistake=""):
    """Three steps of train_step and of the oracle; the largest difference in the state dict."""
    args = parse(STEP, flags)
    model, twin = build(args), build(args)
    f, q, target = ([p for name, p in twin.named_parameters() if name.startswith(parts)]
                    for parts in (("encoder", "projector"), "predictor", "target_"))
    if mistake == "stop-gradient missing":
        twin.requires_grad_()
        f += target
    how = {"vectors adapted": {"exclude_1d": False}, "no momentum": {"momentum": 0},
           "lr in the buffer": {"lr_in_momentum": True}, "no decay": {"weight_decay": 0}}
    optimizer = byol.build_optimizer(model, args)
    slow_optimizer = LARS([{"params": f}, {"params": q}], 0.0, **{
        "weight_decay": 0.1, "momentum": 0.9, **how.get(mistake, {})})
    for i, (epoch, tau) in enumerate(((3.0, 0.9), (10.7, 0.5), (400.3, 0.99))):
        x1, x2 = joined_views(6, 10 + i).chunk(2)
        at = math.floor(epoch) if mistake == "lr per epoch" else epoch
        share = at / 10 if at < 10 else (1 + math.cos(math.pi * (at - 10) / 990)) / 2
        slow, y1 = slow_step(twin, slow_optimizer, x1, x2, share, tau, args, mistake)
        loss, z1 = byol.train_step(model, optimizer, x1, x2, epoch, tau, args)
        if not mistake:
            assert not loss.requires_grad and not z1.requires_grad
            assert furthest([loss, z1], [slow, y1]) < 1e-9
            theta, xi = (torch.cat([p.flatten() for p in part]) for part in (f, target))
            distance = ((theta - xi).norm() / theta.norm()).item()
            assert model.target_distance() == pytest.approx(distance, abs=1e-8)
    names = [x for x in twin.state_dict() if args.target == "ema" or not x.startswith("target_")]
    return furthest(*([net.state_dict()[name] for name in names] for net in (model, twin)))


@pytest.mark.parametrize("flags", [
    "", "--predictor-lr-mult 10", "--predictor none", "--beta 1", "--beta 0.5 --alpha 0.3",
    "--target online", "--target online --beta 1", SIMCLR])
def test_train_step_equals_algorithm_1_written_out(flags):
    assert run_both(flags) < 1e-8


@pytest.mark.parametrize("mistake", [
    "EMA before the step", "EMA forgotten", "EMA twice", "predictor averaged", "buffers averaged",
    "mean of directions", "one direction", "same view", "target in eval mode", "views concatenated",
    "target concatenated", "target predicted", "stop-gradient missing", "stop-gradient kept",
    "vectors adapted", "lr in the buffer", "no momentum", "no decay", "lr per epoch"])
def test_algorithm_1_written_out_tells_mistakes_apart(mistake):
    assert run_both(SIMCLR if mistake == "stop-gradient kept" else "", mistake) > 1e-5


@pytest.mark.parametrize("flags, peak", [  # base_lr * batch / 256 after the warm-up
    ("imagenet", 3.2), ("imagenet-300", 4.8), ("imagenet-100", 7.2), ("imagenet-40", 7.2),
    ("imagenet --batch-size 512 --base-lr 0.4", 0.8), ("cifar", 2.0), ("imagenet-vit", 16e-4),
    ("cifar --optimizer sgd --base-lr 0.1", 0.1)])
def test_learning_rates_and_optimizers_are_the_papers(flags, peak):
    args = parse("--recipe", flags, "--predictor-lr-mult 3")
    model, warm, end = build(args), args.warmup_epochs, args.epochs
    optimizer, views = byol.build_optimizer(model, args), joined_views().chunk(2)
    assert type(optimizer) is {"sgd": torch.optim.SGD, "lars": LARS, "adamw": torch.optim.AdamW}[
        args.optimizer]
    for epoch, share in ((0.0, 0), (warm / 4, 0.25), (warm, 1), ((warm + end) / 2, 0.5), (end, 0)):
        byol.train_step(model, optimizer, *views, epoch, 0.9, args)
        f, q = (group["lr"] for group in optimizer.param_groups)
        assert (f, q) == pytest.approx((peak * share, 3 * peak * share), abs=1e-12)  # Table 21
    for group in optimizer.param_groups:
        assert group["weight_decay"] == args.weight_decay > 0  # Table 15: it diverges without
        assert group.get("momentum", 0.9) == 0.9


NETWORKS = {"byol": "", "simclr": SIMCLR, "negatives": "--beta 1 --alpha 0.3"}


def network_steps(name, mistake, rank=0, world=1):
    """Two steps of the program's own: model, optimizer, DDP, batch norm of the global batch."""
    args = parse(STEP, NETWORKS[name], "--batch-size 8")
    model, record = build(args), {}
    optimizer = byol.build_optimizer(model, args)
    net = byol.distribute(model, args)
    for path, module in model.named_modules():
        if mistake == "local batch norm" and isinstance(module, SyncBatchNorm):
            module.__class__ = nn.BatchNorm2d if "encoder" in path else nn.BatchNorm1d
    done = record_gradients(model, optimizer, record)
    for i, (epoch, tau) in enumerate(((100.0, 0.5), (300.0, 0.9))):
        x1, x2 = (x.chunk(world)[rank] for x in joined_views(8, 20 + i).chunk(2))
        loss, z1 = byol.train_step(net, optimizer, x1, x2, epoch, tau, args)
        record |= {f"mean loss {i}": loss.clone(), f"rows z {i}": z1.clone()}
    assert done()
    return record | {f"each {key}": x.clone() for key, x in model.state_dict().items()}


def test_training_on_ranks_equals_one_process(tmp_path):
    """Losses, all gradients, both networks and their running statistics, over two steps."""
    cases = [*((name, "") for name in NETWORKS), ("byol", "local batch norm")]
    ranks = on_ranks(lambda rank, world: {case: network_steps(*case, rank, world)
                                          for case in cases}, tmp_path)
    for name, wrong in cases:
        alone = network_steps(name, "")
        for world in (4, 2, 1):
            worst = differs(ranks, alone, world, name, wrong).values()
            right = min(worst) > 1e-3 if wrong and world > 1 else max(worst) < 1e-10
            assert right, (name, wrong, world, worst)


VIEWS = ((1.0, 0.0), (0.1, 0.2))  # blur and solarization of t and of t', Table 6


def oracle_view(image, u, blur, solarize, solarize_first=False):
    """One image. u: 9 for the jitter, 1 for the grayscale, 2 for the blur, 1 for solarization."""
    image = torchvision_jitter(image, u[:9], (0.4, 0.4, 0.2, 0.1), 0.8)
    image = TF.rgb_to_grayscale(image, 3) if u[9] < 0.2 else image
    for operation in ("solarize", "blur") if solarize_first else ("blur", "solarize"):
        if operation == "blur" and u[10] < blur:
            image = torchvision_blur(image, u[11])
        if operation == "solarize" and u[12] < solarize:
            image = torch.where(image < 128 / 255, image, 1 - image)
    return TF.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize("side, n", [(224, 4), (96, 8), (40, 48)])
def test_views_equal_the_chain_of_the_paper(side, n):  # 23 taps at 224 px
    x, u = uniform(2 * n, 3, side, side, seed=2).float(), uniform(2 * n, byol.COLOR_DRAWS, seed=3)
    u[[0, 1, n, n + 1], 10:] = torch.tensor([0.01, 0.3, 0.1], dtype=DOUBLE)  # rare ones
    ours = byol.augment(x, u, parse("--recipe imagenet")).split(n)

    def agrees(view, *how):  # the share of pixels, as rounding may cross solarization's threshold
        rows = zip(x.split(n)[view], u.split(n)[view].tolist())
        expected = torch.stack([oracle_view(*row, *how) for row in rows])
        return ((ours[view] - expected).abs().amax(1) < 1e-3).float().mean().item()

    assert all(agrees(i, *VIEWS[i]) > 0.999 and agrees(i, *VIEWS[1 - i]) < 0.9 for i in (0, 1))
    assert agrees(1, *VIEWS[1], True) < 0.99


PAPER = dict(
    arch="resnet50", width=1, small_images=False, zero_init_residual=True, dim=256, hidden_dim=4096,
    output_bn=False, predictor="mlp", predictor_lr_mult=1, optimizer="lars", momentum=0.9,
    batch_size=4096, epochs=1000, base_lr=0.2, weight_decay=1.5e-6, base_tau=0.996,
    warmup_epochs=10, tau_schedule="cosine", target="ema", beta=0, alpha=0.1, image_size=224,
    crop_min=0.08, jitter=(0.4, 0.4, 0.2, 0.1), jitter_prob=0.8, gray_prob=0.2, blur_prob=(1, 0.1),
    solarize_prob=(0, 0.2), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
LINEAR = dict(epochs=80, batch_size=4096, base_lr=0.2, momentum=0.9, weight_decay=0, crop_min=0.08)
ABLATIONS = dict(epochs=300, base_lr=0.3, weight_decay=1e-6, base_tau=0.99)
CIFAR = dict(arch="resnet18", batch_size=256, base_lr=2.0, weight_decay=1e-6, small_images=True,
             zero_init_residual=False, image_size=32, blur_prob=(0, 0),
             mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))


@pytest.mark.parametrize("recipe, changed", [
    ("imagenet", {}), ("imagenet-300", ABLATIONS), ("cifar", CIFAR),
    ("imagenet-100", ABLATIONS | dict(epochs=100, base_lr=0.45)),
    ("imagenet-40", ABLATIONS | dict(epochs=40, base_lr=0.45, base_tau=0.97)),
    ("imagenet-vit", ABLATIONS | dict(arch="vit_small", optimizer="adamw", base_lr=1e-4,
                                      weight_decay=0.03, warmup_epochs=40)),
    ("stl10", CIFAR | dict(image_size=96))])
def test_recipes_are_the_papers(recipe, changed):
    assert_fields(parse("--recipe", recipe), PAPER | changed)
    small = {} if "imagenet" in recipe else {"batch_size": 256, "crop_min": 1}
    assert_fields(parse("linear", "--init", "none", "--data", "demo", "--recipe", recipe),
                  LINEAR | small)
    tuned = byol.RECIPES["finetune"][recipe]
    if "imagenet" in recipe:  # App. C.1, the sweep
        assert tuned.epochs in (30, 50) and tuned.base_lr in (0.005, 0.01, 0.02, 0.05, 0.1)
        assert (tuned.batch_size, tuned.momentum, tuned.weight_decay) == (1024, 0.9, 0)


SMALL = ("--recipe demo --image-size 16 --dim 8 --hidden-dim 16 --batch-size 16 --workers 0 "
         "--knn-every 0 --precision fp32 --log-every 1 --device cpu").split()
TUNE = ["--workers", "0", "--precision", "fp32", "--batch-size", "2", "--epochs", "2"]
VIT = "--arch vit_mini --patch-size 8 --optimizer adamw --base-lr 1e-3 --weight-decay 0.03"


@pytest.fixture(scope="module")
def pretrained(classes, tmp_path_factory):
    """Two epochs of three steps on 48 images of three classes, 16 px."""
    out = tmp_path_factory.mktemp("pretrained")
    assert main("--data", classes, *SMALL, "--width", 0.125, "--epochs", 2, "--out", out) == 0
    return out


def test_the_log_has_the_monitors_of_both_networks(pretrained, classes, tmp_path, capsys):
    first, *rest = lines = records(pretrained)
    assert first["target_distance"] == 0 and first["std"] > 0.5 and first["z_norm"] > 0  # lr 0
    assert 2.5 < first["loss"] < 5.5 and 1 < first["rank"] < 16
    assert all(line["target_distance"] > 0 for line in rest)
    # The recipe's 0.9 is for batches of 32.
    assert [line["tau"] for line in lines] == [ema_tau(k, 6, 0.9 ** 0.5) for k in range(6)]
    for name, flags in (("constant", "--base-tau 0 --tau-schedule constant --steps 3"),
                        ("online", "--target online --beta 1 --steps 1")):
        assert main("--data", classes, *SMALL, *flags.split(), "--out", tmp_path / name) == 0
    for line in records(tmp_path / "constant"):
        assert line["tau"] == line["target_distance"] == 0
    assert not {"tau", "target_distance"} & records(tmp_path / "online")[0].keys()
    # All cosines 0: 2 and 2 alpha log(16 + 15) a direction.
    assert "loss at random: about 5.37;" in capsys.readouterr().out


@pytest.mark.parametrize("stage, common, variants", [
    ("", "--width 0.125 --beta 1 --image-size 24", "--arch resnet18, --width 0.25, --dim 4,"
     "--no-small-images, --hidden-dim 24, --zero-init-residual, --no-output-bn, --predictor none,"
     "--target online, --beta 0, --alpha 0.3, --optimizer sgd --base-lr 2, --epochs 4, --base-lr 1,"
     "--batch-size 24, --warmup-epochs 0.25, --momentum 0.5, --weight-decay 0.1, --base-tau 0.5,"
     "--tau-schedule constant, --seed 1, --predictor-lr-mult 3, --image-size 16, --crop-min 0.9,"
     "--jitter 0 0 0 0, --jitter-prob 0, --gray-prob 1, --blur-prob 0 1, --solarize-prob 0 1,"
     "--mean 0 0 0, --std 1 1 1"),
    ("", VIT, "--patch-size 4, --heads 2, --patch-projection learned"),
    *((stage, "--init {0}", "--base-lr 0.3, --epochs 3, --batch-size 4, --momentum 0, --seed 1,"
       "--weight-decay 0.5, --crop-min 0.2, --labels 0.25, --init-encoder target_encoder")
      for stage in ("linear", "finetune"))])
def test_every_flag_changes_the_run(stage, common, variants, pretrained, classes, tmp_path):
    def result(flags):
        out = tmp_path / f"{len([*tmp_path.iterdir()])}"
        small = [stage, *TUNE, "--labels", 1] if stage else [*SMALL, "--warmup-epochs", 0.5]
        assert main(*small, "--data", classes, "--steps", 2, "--out", out,
                    *flags.format(pretrained / "last.pt").split()) == 0
        return weights(out)

    plain = result(common)
    for flags in ("", *variants.split(",")):
        other = result(f"{common} {flags}")
        assert (plain.keys() == other.keys() and same(plain.values(), other.values())) == (
            not flags), flags


def test_labels_are_a_fraction_of_every_class_or_a_list_of_files(tmp_path):
    for split, n in (("train", (3, 9, 9)), ("val", (1, 1, 1))):
        for name, images in zip("abc", n):
            write_images(tmp_path / split / name, images, size=(120, 110))

    def picked(labels, seed=0):
        args = parse("finetune", "--init", "none", "--data", tmp_path, "--labels", labels, "--seed",
                     seed, "--batch-size", 2, "--out", tmp_path / "out")
        images = byol.labeled(byol.load_data(args).train, args)
        assert all("abc"[k] == path.split("/")[-2] for k, path in zip(images.labels, images.paths))
        return [path[-len("a/00_000.jpg"):] for path in images.paths]

    some, more = picked(0.3), picked("0.6")
    assert [x[0] for x in some] == [*"aabbcc"] and {*some} < {*more} and some == picked(0.3)
    assert [x[0] for x in more].count("a") == 3  # of the 4 or 5 that the others give
    assert picked(0.3, seed=1) != some and len(picked(1.0)) == 21 and len(picked(0.01)) == 3
    found = [[x[0] for x in picked(0.33, seed)] for seed in range(9)]  # 7: one class gives one more
    assert {x.count("b") for x in found} == {2, 3} and {len(x) for x in found} == {7}
    listed = tmp_path / "list.txt"
    listed.write_text("c/00_001.jpg\na/00_002.jpg\n\nc/00_001.jpg\n")
    assert picked(listed) == ["a/00_002.jpg", "c/00_001.jpg"]
    for text, labels, said in (("00_000.jpg\n", listed, "1 of 1 lines do not match exactly one"),
                               ("", listed, "0 of 0 lines"), ("", "2", "above 0 and at most 1"),
                               ("", "0.0", "above 0 and at most 1"), ("", "no.txt", "no.txt")):
        listed.write_text(text)
        with pytest.raises((SystemExit, FileNotFoundError), match=said):
            picked(labels)


@pytest.mark.parametrize("stage", ["linear", "finetune"])
def test_later_stages_train_what_they_should_and_tell_top1(stage, pretrained, classes, tmp_path):
    lr = 30 if stage == "linear" else 3  # so that guesses differ among images
    flags = [stage, "--init", pretrained / "last.pt", *TUNE, "--batch-size", 5, "--base-lr", lr,
             "--epochs", 3, "--knn-every", 2, "--labels", 0.5, "--log-every", 1]
    assert main(*flags, "--out", tmp_path) == 0
    sgd, = torch.load(tmp_path / "last.pt")["optimizer"]["param_groups"]
    assert (sgd["momentum"], sgd["weight_decay"], sgd["nesterov"]) == (0.9, 0, True)
    assert [x["lr"] for x in records(tmp_path)] == pytest.approx(
        [lr * 5 / 256 * (1 + math.cos(math.pi * k / 12)) / 2 for k in range(12)])
    before, after = (torch.load(out / "encoder.pt") for out in (pretrained, tmp_path))
    assert {torch.equal(after[x], before[x]) for x in before} == {stage == "linear"}  # buffers too
    seen = after["bn1.num_batches_tracked"] - before["bn1.num_batches_tracked"]
    assert seen == (12 if stage == "finetune" else 0)  # also after an evaluation in between
    found = records(tmp_path, "top1")
    assert [x["epoch"] for x in found] == (
        [k / 4 for k in range(1, 13)] if stage == "linear" else [2, 3])
    args, fc = parse(*flags, "--data", classes), weights(tmp_path)
    encoder = byol.build_encoder(args).double()
    encoder.load_state_dict(after)
    h, y = byol.features(encoder, byol.load_data(args).val, args)  # center crops, in eval mode
    weight, bias = (fc["fc." * (stage == "finetune") + x].double() for x in ("weight", "bias"))
    assert found[-1]["top1"] == ((h @ weight.T + bias).argmax(dim=1) == y).sum().item() / 12
    assert "labeled" in mistake(byol, *flags, "--labels", 0.75, "--out", tmp_path)


def test_a_vit_has_its_recipe_keeps_what_is_frozen_and_says_its_heads(classes, tmp_path):
    vit = ["--data", classes, "--arch", "vit_mini", "--image-size", 16, "--patch-size", 8]
    assert main("finetune", "--init", "none", *vit, *TUNE, "--base-lr", 1, "--labels", 0.25,
                "--device", "cpu", "--out", tmp_path) == 0
    torch.manual_seed(0)
    args = parse(*vit)
    built = byol.build_encoder(args).state_dict()
    for name, x in torch.load(tmp_path / "encoder.pt").items():
        fixed = name == "pos_embed" or name.startswith("patch_embed.")
        assert torch.equal(x, built[name]) == fixed or name.endswith("bias"), name
    assert json.loads((tmp_path / "encoder.json").read_text())["heads"] == 3
    recipes = args.recipe, parse("--data", classes, "--arch", "resnet101").recipe
    assert recipes == ("imagenet-vit", "imagenet")


def test_pretraining_from_an_encoder_starts_the_target_as_its_copy(pretrained, classes, tmp_path):
    assert main("--data", classes, *SMALL, "--width", 0.125, "--steps", 1, "--init",
                pretrained / "encoder.pt", "--out", tmp_path) == 0  # the first step has lr 0
    model, given = weights(tmp_path), torch.load(pretrained / "encoder.pt")
    for name, x in given.items():
        kept = "running" in name or "batches" in name or torch.equal(model[f"encoder.{name}"], x)
        assert kept and torch.equal(model[f"target_encoder.{name}"], model[f"encoder.{name}"]), name
