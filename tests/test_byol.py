"""byol.py against the paper: loss, target network, training step, heads, recipes, processes.

Every oracle here is written from arXiv 2006.07733 ("Eq.", "Alg.", "Table") or from the fact sheet
of that paper and its released code ("sheet 1" ... "sheet 9"), without a look at byol.py.
"""
import copy
import functools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torchvision.transforms.v2 import functional as TF

import byol
from byol import BYOL, byol_loss, ema_tau, negatives_loss
from common import LARS, SyncBatchNorm, resnet
from conftest import on_ranks
from helpers import DOUBLE, Gather, Tiny, differs, furthest, ready, record_gradients, uniform
from test_augmentation import torchvision_jitter

parse = functools.partial(ready, byol)


def tiny_model(dtype=DOUBLE, encoder=None, **options):
    torch.manual_seed(0)
    return BYOL(encoder or Tiny(), **{"dim": 8, "hidden_dim": 16, **options}).to(dtype)


def pairs(model):
    """(name, online parameter, its target)."""
    named = dict(model.named_parameters())
    return [(name, p, named[f"target_{name}"]) for name, p in named.items()
            if name.startswith(("encoder.", "projector."))]


def apart(model):
    """Lets the target be another network, as after some steps."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, _, target in pairs(model):
            target.add_(0.1 * torch.randn(target.shape, generator=g, dtype=DOUBLE).to(target))
    return model


def views(n=6, dtype=DOUBLE, seed=1, side=8):
    """Two batches of images with clearly different statistics."""
    g = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(n, 3, side, side, generator=g, dtype=DOUBLE) for _ in range(2))
    return x.to(dtype), (2 * x.flip(3) + noise ** 2 - 1).to(dtype)


def embeddings(n=6, dim=5, dtype=DOUBLE, seed=0):
    """p, z and z_same of very different lengths, rows of one index near each other in direction."""
    g = torch.Generator().manual_seed(seed)
    x, *noise = (torch.randn(n, dim, generator=g, dtype=DOUBLE) for _ in range(3))
    lengths = torch.logspace(-1, 1, n, dtype=DOUBLE)[:, None]
    return [y.to(dtype).requires_grad_() for y in (
        x * lengths, (x + noise[0]) * lengths.flip(0), (x + noise[1]) * lengths.roll(2, 0))]


# ------------------------------------------------------------------------------- the loss, Eq. (2)


def slow_loss(p, z):
    """2 - 2 cos, one image at a time, over Python floats."""
    def cos(a, b):
        return sum(i * j for i, j in zip(a, b)) / math.hypot(*a) / math.hypot(*b)

    return sum(2 - 2 * cos(a, b) for a, b in zip(p.tolist(), z.tolist())) / len(p)


def slow_gradient(p, z):
    """d/dp: of image i, -2 / N * (z^ - (p^ z^) p^) / |p|, with a^ = a / |a|."""
    p, z = p.detach(), z.detach()
    length, other = p.norm(dim=1, keepdim=True), z / z.norm(dim=1, keepdim=True)
    unit = p / length
    return -2 / len(p) * (other - (unit * other).sum(1, keepdim=True) * unit) / length


@pytest.mark.parametrize("seed, n, dim", [(0, 6, 5), (1, 1, 7), (2, 17, 3)])
def test_loss_and_gradient_equal_those_of_the_equation(seed, n, dim):
    p, z, _ = embeddings(n, dim, seed=seed)
    loss, expected = byol_loss(p, z), slow_gradient(p, z)
    assert loss.shape == () and loss.dtype == DOUBLE
    assert abs(loss.item() - slow_loss(p, z)) < 1e-9
    dp, dz = torch.autograd.grad(loss, (p, z), allow_unused=True)
    assert dz is None  # only theta is trained
    assert furthest([dp], [expected]) < 1e-9 and expected.abs().max() > 1e-3
    for factor in (0.5, 2):  # the size, not only the direction (sheet 9, trap 1)
        assert furthest([dp], [factor * expected]) > 1e-3
    both = torch.autograd.grad(byol_loss(p, z, stop_grad=False), (p, z))
    assert furthest(both, [expected, slow_gradient(z, p)]) < 1e-9  # Table 5b: "theta"


def test_the_loop_tells_wrong_losses_apart():
    p, z, _ = embeddings()
    cos, unit_p, unit_z = torch.cosine_similarity(p, z), normalize(p), normalize(z)
    for name, wrong in {
        "1 - cos": (1 - cos).mean(), "-2 cos": (-2 * cos).mean(), "4 - 4 cos": (4 - 4 * cos).mean(),
        "sum over images": (2 - 2 * cos).sum(), "root": (2 - 2 * cos).sqrt().mean(),
        "mean over channels": (unit_p - unit_z).square().mean(),
        "not normalised": (p - z).square().sum(1).mean(),
        "z not normalised": (unit_p - z).square().sum(1).mean(),
        "over the batch": (p / p.norm(dim=0) - z / z.norm(dim=0)).square().sum(1).mean(),
        "other images": (2 - 2 * torch.cosine_similarity(p, z.roll(1, 0))).mean(),
    }.items():
        assert abs(wrong.item() - slow_loss(p, z)) > 1e-3, name


def test_loss_ignores_lengths_and_the_order_of_the_batch_but_not_the_pairing():
    p, z, _ = (x.detach() for x in embeddings())
    lengths, order = torch.logspace(-3, 3, 6, dtype=DOUBLE)[:, None], [3, 0, 5, 1, 4, 2]
    loss = byol_loss(p, z).item()
    for a, b in ((p * lengths, z), (p, z * lengths), (9 * p, 0.01 * z), (p[order], z[order])):
        assert byol_loss(a, b).item() == pytest.approx(loss, abs=1e-12)
    assert abs(byol_loss(p, z[order]).item() - loss) > 1e-2
    assert byol_loss(p, 5 * p).item() == pytest.approx(0, abs=1e-12)  # sheet 1: two are in [0, 8]
    assert byol_loss(p, -p).item() == pytest.approx(4, abs=1e-12)
    assert 0 < loss < 4


def test_sum_of_both_directions_is_about_4_at_a_random_start():  # sheet 1
    losses = []
    for seed in range(6):
        torch.manual_seed(seed)
        model = BYOL(resnet(10, 0.125, small_images=True), hidden_dim=512)
        p1, p2, z1, z2, _ = model(*views(16, torch.float32, side=16))
        losses.append((byol_loss(p1, z2) + byol_loss(p2, z1)).item())
    assert sum(losses) / 6 == pytest.approx(4, abs=0.5) and 2.5 < min(losses) < max(losses) < 5.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32_whatever_comes_in(dtype):  # sheet 9, trap 12
    p, z, _ = inputs = embeddings(16, 64, dtype)
    raised = [x.detach().double() for x in inputs]
    expected = slow_loss(*raised[:2]), slow_negatives(*raised, 0.3).item()
    with torch.autocast("cpu", torch.bfloat16):
        losses = byol_loss(p, z), negatives_loss(*inputs, 0.3)
    for loss, value in zip(losses, expected):
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(value, rel=1e-5)
        gradient, = torch.autograd.grad(loss, p)
        assert gradient.isfinite().all() and gradient.any()
    huge = torch.full((4, 256), 300.0, dtype=dtype)  # 300^2 * 256 > 65504
    assert abs(byol_loss(huge, huge).item()) < 1e-5
    zero = torch.zeros(3, 4, requires_grad=True)
    (byol_loss(zero, zero) + negatives_loss(zero, zero, zero, 0.1)).backward()
    assert zero.grad.isfinite().all()


# ------------------------------------------------------------------ negatives: the road to SimCLR


def slow_negatives(p, z, z_same, alpha, mistake=""):
    """2 alpha mean_i log(sum_j exp S(v_i, v'_j) / alpha + sum_{j != i} exp S(v_i, v_j) / alpha)."""
    def s(a, b):
        dot = (a * b).sum() / alpha
        return dot if mistake == "not normalised" else dot / a.norm() / b.norm()

    n, total = len(p), 0
    if mistake == "views swapped":
        z, z_same = z_same, z
    for i in range(n):
        cross = [s(p[i], z[j]) for j in range(n) if j != i or mistake != "positive left out"]
        own = [s(p[i], z_same[j]) for j in range(n) if j != i or mistake == "own view kept"]
        cross, own = torch.stack(cross).logsumexp(0), torch.stack(own).logsumexp(0)
        total = total + {"two logarithms": cross + own, "one view": cross}.get(  # users.md, B5
            mistake, torch.logaddexp(cross, own))
    if mistake == "mean of the exponentials":
        total = total - n * math.log(2 * n - 1)
    factor = {"without 2 alpha": 1, "alpha": alpha, "2": 2, "summed": 2 * alpha * n}
    return factor.get(mistake, 2 * alpha) * total / n


@pytest.mark.parametrize("alpha", [0.005, 0.01, 0.05, 0.1, 0.3, 1.0])
def test_negatives_equal_a_double_loop_and_complete_infonce(alpha):  # Table 5b; sheet 5
    inputs = p, z, _ = embeddings(7, 4)
    ours, slow = negatives_loss(*inputs, alpha), slow_negatives(*inputs, alpha)
    assert ours.shape == () and ours.dtype == DOUBLE and abs(ours.item() - slow.item()) < 1e-9
    assert furthest(*(torch.autograd.grad(x, inputs) for x in (ours, slow))) < 1e-9
    a, b, c = map(normalize, inputs)
    logits = torch.cat([a @ b.T, (a @ c.T).fill_diagonal_(-math.inf)], 1) / alpha
    infonce = 2 + 2 * alpha * cross_entropy(logits, torch.arange(7))
    expected = torch.autograd.grad(infonce, inputs)
    for stop_grad in (False, True):
        sum_of_both = byol_loss(p, z, stop_grad=stop_grad) + negatives_loss(*inputs, alpha)
        assert abs(sum_of_both - infonce) < 1e-9
        error = furthest(torch.autograd.grad(sum_of_both, inputs), expected)
        assert error > 1e-3 if stop_grad else error < 1e-9
    assert torch.autograd.gradcheck(lambda *x: negatives_loss(*x, 0.3), embeddings(4, 3), atol=1e-7)


@pytest.mark.parametrize("mistake", [
    "not normalised", "views swapped", "positive left out", "own view kept", "one view",
    "two logarithms", "mean of the exponentials", "without 2 alpha", "alpha", "2", "summed"])
def test_the_double_loop_tells_wrong_negatives_apart(mistake):
    for alpha in (0.1, 0.3):
        wrong = slow_negatives(*embeddings(), alpha, mistake)
        assert (wrong - slow_negatives(*embeddings(), alpha)).abs() > 1e-3


# -------------------------------------------------------------------------------- tau, Sec. 3.3


@pytest.mark.parametrize("base, half_life, table", [  # sheet 1
    (0.996, 173, (0.996, 0.99659, 0.998, 0.99941, 1)),
    (0.99, 69, (0.99, 0.99146, 0.995, 0.99854, 1)), (0.9995, 1386, None)])
def test_tau_rises_along_half_a_cosine_from_its_base_to_1(base, half_life, table):
    for total in (1000, 31_200, 312_784):
        values = [ema_tau(total * i // 4, total, base) for i in range(5)]
        assert values[0] == base and values[4] == 1  # exactly
        assert table is None or values == pytest.approx(table, abs=5.1e-6)
        for k in (1, 7, total // 3, total - 1):
            expected = 1 - (1 - base) * (math.cos(math.pi * k / total) + 1) / 2
            assert ema_tau(k, total, base) == pytest.approx(expected, abs=1e-14)
    target, online = torch.ones(1, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE)
    for _ in range(half_life):
        byol.update_ema([target], [online], ema_tau(0, 10**6, base))
    assert target.item() == pytest.approx(0.5, abs=(1 - base) / 2)


@pytest.mark.parametrize("recipe, batch, expected, error", [  # sheet 4: tau ** (B / B_ref)
    ("imagenet", 4096, 0.996, 1e-12), ("imagenet", 512, 0.9995, 1e-6),
    ("imagenet", 256, 0.99975, 1e-6), ("imagenet", 512, 0.996 ** (1 / 8), 1e-12),
    ("imagenet-300", 1024, 0.99 ** 0.25, 1e-12),
    ("imagenet-100", 256, 0.9994, 3e-5), ("imagenet-40", 8192, 0.97 ** 2, 1e-12),
    ("cifar", 256, 0.996, 1e-12), ("cifar", 128, 0.996 ** 0.5, 1e-12)])
def test_base_tau_follows_the_batch_unless_given(recipe, batch, expected, error):
    flags = "--recipe", recipe, "--batch-size", batch
    assert parse(*flags).base_tau == pytest.approx(expected, abs=error)
    assert parse(*flags, "--base-tau", 0.9).base_tau == 0.9


# ------------------------------------------------------------------------------- the two networks


@pytest.mark.parametrize("backbone", ["tiny", "resnet"])
def test_forward_is_four_passes_each_of_one_view(backbone):  # sheet 1; sheet 9, trap 3
    encoder = resnet(10, 0.125, small_images=True) if backbone == "resnet" else None
    model, (x1, x2) = apart(tiny_model(encoder=encoder)), views()
    model.eval()
    model.train()  # sheet 9, trap 2: the target, too
    twin = copy.deepcopy(model)
    p1, p2, z1, z2, h1 = outputs = model(x1, x2)
    y1, y2 = (twin.projector(twin.encoder(x)) for x in (x1, x2))
    theirs = [twin.target_projector(twin.target_encoder(x)) for x in (x1, x2)]
    assert furthest(outputs, (twin.predictor(y1), twin.predictor(y2), *theirs, y1)) < 1e-12
    together = twin.target_projector(twin.target_encoder(torch.cat([x1, x2])))
    assert furthest([z1], [together[:6]]) > 1e-2 and furthest([z1], [y1]) > 1e-2
    assert [x.requires_grad for x in (p1, p2, z1, z2, h1)] == [True, True, False, False, False]
    (byol_loss(p1, z2, stop_grad=False) + byol_loss(p2, z1, stop_grad=False)).backward()
    for name, online, target in pairs(model):  # the target is saved, but never trained
        assert online.grad is not None and target.grad is None and not target.requires_grad, name
        assert {name, f"target_{name}"} < model.state_dict().keys()
    assert len(pairs(model)) == len([*model.target_encoder.parameters(),
                                     *model.target_projector.parameters()])


def test_running_statistics_of_the_target_follow_its_own_batches_view_by_view():  # sheet 1
    model, batches = apart(tiny_model()), views()
    inputs = [[part.conv(x) for x in batches] for part in (model.encoder, model.target_encoder)]
    model(*batches)
    model.update_target(0.5)  # averages none
    for bn, seen in zip((model.encoder.bn, model.target_encoder.bn), inputs):
        mean, var = torch.zeros(8, dtype=DOUBLE), torch.ones(8, dtype=DOUBLE)
        for y in seen:  # decay .9; view 1, then view 2
            mean, var = 0.9 * mean + 0.1 * y.mean((0, 2, 3)), 0.9 * var + 0.1 * y.var((0, 2, 3))
        assert furthest([bn.running_mean, bn.running_var], [mean, var]) < 1e-12
        assert bn.num_batches_tracked == 2
    assert furthest([model.encoder.bn.running_mean], [mean]) > 1e-3


@pytest.mark.parametrize("tau", [0, 1, 0.5, 0.9995])
def test_update_averages_every_parameter_with_its_own_and_nothing_else(tau):
    model = apart(tiny_model())
    before = copy.deepcopy(model)
    _, *both = zip(*pairs(before))
    theta, xi = (torch.cat([x.detach().flatten() for x in part]) for part in both)
    distance = ((theta - xi).norm() / theta.norm()).item()
    assert float(model.target_distance()) == pytest.approx(distance, rel=1e-9)
    model.update_target(tau)
    for (name, online, target), theta, xi in zip(pairs(model), *both):
        assert torch.equal(online, theta), name
        assert (target - tau * xi - (1 - tau) * theta).abs().max() < 1e-15, name
        assert tau not in (0, 1) or torch.equal(target, (theta, xi)[tau]), name
    assert furthest(model.predictor.parameters(), before.predictor.parameters()) == 0
    assert float(model.target_distance()) == pytest.approx(tau * distance, rel=1e-9, abs=1e-12)


def test_target_online_passes_gradient_through_both_branches():  # Table 5b: "theta"
    model, twin = tiny_model(target="online"), tiny_model(target="online")
    p1, p2, z1, z2, _ = model(*views())
    y1, y2 = (twin.projector(twin.encoder(x)) for x in views())
    assert furthest((p1, p2, z1, z2), (twin.predictor(y1), twin.predictor(y2), y1, y2)) < 1e-12
    for ours, expected in ((z1, y1), (z2, y2)):
        both = [torch.autograd.grad(z.square().sum(), network.encoder.conv.weight)[0]
                for z, network in ((ours, model), (expected, twin))]
        assert furthest(both[:1], both[1:]) < 1e-9 and both[0].abs().max() > 1e-3
    bare = tiny_model(target="online", predictor="none")
    p1, p2, z1, z2, _ = bare(*views())
    assert torch.equal(p1, z1) and torch.equal(p2, z2) and not list(bare.predictor.parameters())


@pytest.mark.parametrize("depth, width, encoder, projector", [  # sheet 2
    (50, 2048, 23_508_032, 9_449_472), (18, 512, 11_176_512, 3_158_016)])
def test_heads_and_numbers_of_parameters_are_the_authors(depth, width, encoder, projector):
    with torch.device("meta"):
        model = BYOL(resnet(depth))
    for part, inputs, total in (("projector", width, projector), ("predictor", 256, 2_109_440),
                                ("target_projector", width, projector)):
        head = getattr(model, part)
        assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
        assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
            "0.weight": (4096, inputs), "0.bias": (4096,), "1.weight": (4096,), "1.bias": (4096,),
            "3.weight": (256, 4096)}  # no bias at the end, no batch norm either
        assert (head[1].eps, head[1].momentum, head[1].track_running_stats) == (1e-5, 0.1, True)
        assert sum(p.numel() for p in head.parameters()) == total, part
    assert sum(p.numel() for p in model.parameters()) == 2 * (encoder + projector) + 2_109_440


# ------------------------------------------------------------------------------ one step, Alg. 1


def slow_lars(w, g, buffer, lr, decay, mistake):
    """sheet 4, as coded: decayed gradient, its norm, momentum, the lr outside the buffer."""
    raw, weight = g, w.dim() > 1
    if weight or mistake == "vectors decayed":
        g = g + decay * w
    if weight or mistake == "vectors adapted":
        norm = {"LARC's norm": raw.norm() + decay * w.norm(),
                "norm before the decay": raw.norm()}.get(mistake, g.norm())
        g = g * (0.001 * w.norm() / norm if w.norm() > 0 and norm > 0 else 1)
    buffer.mul_(0 if mistake == "no momentum" else 0.9).add_(
        lr * g if mistake == "lr in the buffer" else g)
    return w - buffer if mistake == "lr in the buffer" else w - lr * buffer


def slow_average(model, tau, mistake):
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, online in list(named.items()):
        buffer = name.endswith(("running_mean", "running_var")) and mistake == "buffers averaged"
        if name.startswith(("encoder.", "projector.")) and (online.requires_grad or buffer):
            if mistake == "predictor averaged":  # sheet 9, trap 11
                online = named[name.replace("projector", "predictor")]
            named[f"target_{name}"].mul_(tau).add_((1 - tau) * online)


def slow_step(model, buffers, x1, x2, share, tau, args, mistake=""):
    """Alg. 1 written out; with args.target, beta and alpha the rows of Table 5b."""
    def both(network, together):
        return network(torch.cat([x1, x2])).chunk(2) if together else (network(x1), network(x2))

    y1, y2 = both(lambda x: model.projector(model.encoder(x)), mistake == "views concatenated")
    p1, p2 = model.predictor(y1), model.predictor(y2)
    if mistake == "target in eval mode":
        model.target_encoder.eval(), model.target_projector.eval()
    z1, z2 = (y1, y2) if args.target == "online" else both(
        lambda x: model.target_projector(model.target_encoder(x)), mistake == "target concatenated")
    model.train()
    if mistake == "target predicted":
        z1, z2 = model.predictor(z1).detach(), model.predictor(z2).detach()
    if mistake == "stop-gradient kept":
        z1, z2 = z1.detach(), z2.detach()
    if mistake == "same view":
        z1, z2 = z2, z1
    loss = 0
    for p, z, same in ((p1, z2, z1), (p2, z1, z2)):
        unit_p, unit_z = (x / x.square().sum(1, keepdim=True).sqrt() for x in (p, z))
        loss = loss + (unit_p - unit_z).square().sum(1).mean()
        if args.beta:
            loss = loss + args.beta * slow_negatives(p, z, same, args.alpha)
        if mistake == "one direction":
            break
    weights = {name: p for name, p in model.named_parameters() if not name.startswith("target_")}
    if mistake == "stop-gradient missing":
        weights = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss / (1 + (mistake == "mean of directions")),
                                    list(weights.values()))
    with torch.no_grad():
        if mistake == "EMA before the step":
            slow_average(model, tau, mistake)
        for (name, w), g in zip(weights.items(), gradients):
            factor = args.predictor_lr_mult if name.startswith("predictor") else 1
            lr = args.base_lr * args.batch_size / 256 * share * factor
            buffer = buffers.setdefault(name, torch.zeros_like(w))
            w.copy_(slow_lars(w, g, buffer, lr, args.weight_decay, mistake))
        times = {"EMA before the step": 0, "EMA forgotten": 0, "EMA twice": 2}
        for _ in range(times.get(mistake, 1)):
            slow_average(model, tau, mistake)
    return loss.detach(), y1.detach()


STEP = "--recipe imagenet --batch-size 512 --base-lr 1 --weight-decay 0.1"
TIMES = ((3.0, 0.9), (10.7, 0.5), (400.3, 0.99))  # epoch, tau


def build(args):
    return apart(tiny_model(predictor=args.predictor, target=args.target))


@functools.cache
def trained(flags):
    """What three steps of train_step return and leave."""
    args = parse(*flags.split())
    model = build(args)
    optimizer = byol.build_optimizer(model, args)
    results = [byol.train_step(model, optimizer, *views(seed=10 + i), epoch, tau, args)
               for i, (epoch, tau) in enumerate(TIMES)]
    return results, model.state_dict()


def run_both(flags, mistake=""):
    """Three steps of train_step and of the oracle; the largest difference in the state dict."""
    args = parse(*flags.split())
    twin, buffers, (results, ours) = build(args), {}, trained(flags)
    if mistake == "stop-gradient missing":
        twin.requires_grad_()
    for i, (epoch, tau) in enumerate(TIMES):
        at = math.floor(epoch) if mistake == "lr per epoch" else epoch
        share = at / 10 if at < 10 else (1 + math.cos(math.pi * (at - 10) / 990)) / 2
        loss, y1 = slow_step(twin, buffers, *views(seed=10 + i), share, tau, args, mistake)
        if not mistake:
            assert not results[i][0].requires_grad and not results[i][1].requires_grad
            assert results[i][0].item() == pytest.approx(loss.item(), abs=1e-9)
            assert furthest([results[i][1]], [y1]) < 1e-8
    theirs = twin.state_dict()
    names = [name for name in ours if args.target == "ema" or not name.startswith("target_")]
    return furthest([ours[name] for name in names], [theirs[name] for name in names])


SIMCLR = "--target online --beta 1 --predictor none"


@pytest.mark.parametrize("flags", [
    "", "--predictor-lr-mult 10", "--predictor none", "--beta 1", "--beta 0.5 --alpha 0.3",
    "--target online", "--target online --beta 1", SIMCLR])
def test_train_step_equals_algorithm_1_written_out(flags):
    assert run_both(f"{STEP} {flags}") < 1e-8


@pytest.mark.parametrize("mistake", [
    "EMA before the step", "EMA forgotten", "EMA twice", "predictor averaged", "buffers averaged",
    "mean of directions", "one direction", "same view", "target in eval mode", "views concatenated",
    "target concatenated", "target predicted", "stop-gradient missing", "stop-gradient kept",
    "vectors adapted", "vectors decayed", "LARC's norm", "norm before the decay",
    "lr in the buffer", "no momentum", "lr per epoch"])
def test_algorithm_1_written_out_tells_mistakes_apart(mistake):
    flags = f"{STEP} {SIMCLR}" if mistake == "stop-gradient kept" else STEP
    assert run_both(flags, mistake) > 1e-5


@pytest.mark.parametrize("optimizer", ["lars", "adamw", "sgd"])
def test_predictor_lr_multiplier_multiplies_the_predictors_lr_alone(optimizer):  # Table 21
    moved = {}
    for factor in (0, 1, 10):
        args = parse(*STEP.split(), "--optimizer", optimizer, "--predictor-lr-mult", factor)
        model = tiny_model()
        before, names = copy.deepcopy(model), {id(p): name for name, p in model.named_parameters()}
        built = byol.build_optimizer(model, args)
        byol.train_step(model, built, *views(), 5.0, 1.0, args)
        held = [names[id(p)] for group in built.param_groups for p in group["params"]]
        assert sorted(held) == sorted(name for name in names.values() if "target" not in name)
        for group in built.param_groups:  # half the peak of 1 * 512 / 256
            for name in (names[id(p)] for p in group["params"]):
                lr = factor if name.startswith("predictor.") else 1
                assert group["lr"] == pytest.approx(lr, rel=1e-12), name
        weights = zip(model.parameters(), before.parameters())
        moved[factor] = [(new - old).detach() for new, old in weights]
    for name, none, one, ten in zip(names.values(), *moved.values()):
        less, more = (0, 10) if name.startswith("predictor.") else (1, 1)
        torch.testing.assert_close(none, less * one, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(ten, more * one, rtol=1e-9, atol=1e-13)
        assert "target" in name or name.endswith("bias") or one.abs().max() > 1e-5, name


def test_lr_rises_from_0_over_10_epochs_and_falls_to_0_along_a_cosine():  # sheet 4
    args = parse("--recipe", "imagenet")
    assert byol.warmup_cosine(0.0, args) == 0 and byol.warmup_cosine(10.0, args) == 1
    for epoch in (0.003, 1.0, 7.7, 9.999, 10.5, 100.0, 505.0, 999.99, 1000.0):
        cosine = (1 + math.cos(math.pi * (epoch - 10) / 990)) / 2
        expected = epoch / 10 if epoch < 10 else cosine
        assert byol.warmup_cosine(epoch, args) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("flags, peak", [  # sheet 4: base x batch / 256
    ("imagenet", 3.2), ("imagenet-300", 4.8), ("imagenet-100", 7.2), ("imagenet-40", 7.2),
    ("imagenet --batch-size 512 --base-lr 0.4", 0.8), ("cifar", 2.0), ("imagenet-vit", 16e-4)])
def test_peak_learning_rates_and_optimizers_are_the_sheets(flags, peak):
    args, model = parse("--recipe", *flags.split()), tiny_model()
    optimizer = byol.build_optimizer(model, args)
    byol.train_step(model, optimizer, *views(), float(args.warmup_epochs), 0.9, args)
    assert isinstance(optimizer, torch.optim.AdamW if "vit" in flags else LARS)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(peak, rel=1e-9)
        assert group["weight_decay"] == args.weight_decay > 0  # without it BYOL diverges: Table 15
        if "vit" not in flags:
            assert group["exclude_1d"] and not group["lr_in_momentum"]
            assert group["momentum"] == 0.9 and group["trust_coefficient"] == 0.001


def test_compile_is_asked_for_by_its_flag(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda net: compiled.append(net))
    for flags in ((), ("--compile",)):
        args = parse(*flags)
        net = byol.prepare(tiny_model(), args)
        assert compiled == [net] * len(flags)


# --------------------------------------------------------------------- several processes equal one

N, WORLDS = 8, (4, 2, 1)
NETWORKS = {"byol": "", "simclr": SIMCLR, "negatives": "--beta 1 --alpha 0.3"}
GATHERS = ("right", "no gradient", "local slice", "times W", "local only", "unshifted diagonal")


def shared_negatives(p, z, z_same, alpha, which):
    p, z, z_same = map(normalize, (p, z, z_same))
    own = torch.arange(len(p))
    first = 0 if which in ("local only", "unshifted diagonal") else len(p) * dist.get_rank()
    if which != "local only":
        z, z_same = Gather.apply(z, which), Gather.apply(z_same, which)
    same = (p @ z_same.T).index_put((own, own + first), torch.tensor(-math.inf, dtype=DOUBLE))
    return 2 * alpha * (torch.cat([p @ z.T, same], 1) / alpha).logsumexp(1).mean()


def network_steps(name, rank=0, world=1, mistake=""):
    """Two steps of the program's own: model, optimizer, DDP, batch norm of the global batch."""
    args = parse(*STEP.split(), *NETWORKS[name].split(), "--batch-size", N)
    model, record, ours = build(args), {}, byol.negatives_loss
    optimizer = byol.build_optimizer(model, args)
    net = byol.prepare(model, args)
    for path, module in model.named_modules():
        if mistake == "local batch norm" and isinstance(module, SyncBatchNorm):
            module.__class__ = nn.BatchNorm2d if "encoder" in path else nn.BatchNorm1d
    if mistake in GATHERS:
        byol.negatives_loss = functools.partial(shared_negatives, which=mistake)
    done = record_gradients(model, optimizer, record)
    for i, (epoch, tau) in enumerate(((100.0, 0.5), (300.0, 0.9))):
        x1, x2 = (x[rank * N // world:(rank + 1) * N // world] for x in views(N, seed=20 + i))
        loss, h1 = byol.train_step(net, optimizer, x1, x2, epoch, tau, args)
        record |= {f"mean loss {i}": loss.clone(), f"rows h {i}": h1.clone()}
    byol.negatives_loss = ours
    assert done()
    return record | {f"each {key}": x.clone() for key, x in model.state_dict().items()}


alone = functools.cache(network_steps)


def worker(rank, world):
    assert (byol.rank(), byol.world_size()) == (rank, world)
    cases = [*((name, "") for name in NETWORKS), ("byol", "local batch norm"),
             *(("simclr", which) for which in GATHERS)]
    return {case: network_steps(case[0], rank, world, case[1]) for case in cases}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(worker, tmp_path_factory.mktemp("ranks"), WORLDS)


def network_differs(ranks, world, name, mistake=""):
    return differs(ranks, alone(name), world, name, mistake)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("world", WORLDS)
def test_training_on_ranks_equals_one_process(ranks, world, name):
    """Losses, all gradients, both networks and their running statistics, over two steps."""
    worst = network_differs(ranks, world, name)
    assert max(worst.values()) < 1e-10, worst


@pytest.mark.parametrize("world", [2, 4])
def test_training_with_wrong_gathers_or_local_batch_norm_fails_that_check(ranks, world):
    assert max(network_differs(ranks, world, "simclr", "right").values()) < 1e-10
    for which in GATHERS[1:]:  # users.md, B1 to B3
        assert network_differs(ranks, world, "simclr", which)["gradient"] > 1e-3, which
    assert min(network_differs(ranks, world, "byol", "local batch norm").values()) > 1e-3


# -------------------------------------------------------------------------- augmentation, sheet 3


VIEWS = ((1.0, 0.0), (0.1, 0.2))  # blur and solarise of T and of T'


def oracle_view(image, u, blur, solarise, solarise_first=False):
    """One image. u: 9 for the jitter, 1 for the grayscale, 2 for the blur, 1 for solarise."""
    image = torchvision_jitter(image, u[:9], (0.4, 0.4, 0.2, 0.1), 0.8)
    image = TF.rgb_to_grayscale(image, 3) if u[9] < 0.2 else image
    for operation in ("solarise", "blur") if solarise_first else ("blur", "solarise"):
        if operation == "blur" and u[10] < blur:
            taps, sigma = 2 * int(image.shape[-1] / 10 / 2) + 1, 0.1 + 1.9 * u[11]
            image = TF.gaussian_blur(image, [taps, taps], [sigma, sigma])
        if operation == "solarise" and u[12] < solarise:
            image = torch.where(image < 0.5, image, 1 - image)
    return TF.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("side, n", [(224, 4), (96, 8), (40, 48)])
def test_views_equal_the_chain_of_the_sheet(view, side, n):  # 23 taps at 224 px
    args = parse("--recipe", "imagenet")
    x, u = uniform(n, 3, side, side, seed=2).float(), uniform(n, byol.COLOUR_DRAWS, seed=3)
    u[:2, 10:] = torch.tensor([0.01, 0.9, 0.1])  # both of the rare ones, so that their order counts
    before = x.clone()
    ours, rows = byol.augment(x, u, args, view), list(zip(x, u.tolist()))

    def agrees(*how):  # the share of pixels; the threshold of solarise has a test of its own
        expected = torch.stack([oracle_view(*row, *how) for row in rows])
        return ((ours - expected).abs().amax(1) < 1e-3).float().mean().item()

    assert torch.equal(x, before) and agrees(*VIEWS[view]) > 0.997
    assert agrees(*VIEWS[1 - view]) < 0.9 and (view == 0 or agrees(*VIEWS[1], True) < 0.99)


@pytest.mark.parametrize("view", [0, 1])
def test_rates_of_blur_and_solarise_differ_by_view(view):
    args = parse("--recipe", "imagenet", "--batch-size", 2000, "--mean", 0, 0, 0, "--std", 1, 1, 1,
                 "--jitter-prob", 0, "--gray-prob", 0)
    x = torch.zeros(4000, 3, 20, 20)
    x[..., 10:] = 1.0  # only blur makes a third value
    draws = byol.draw_step(args, 2000, 0, 2)[2].transpose(0, 1).flatten(0, 1)
    rows = byol.two_views(SimpleNamespace(crops=x, colours=draws), args)[view][:, 0, 10]
    blurred, solarised = ((rows > 1e-4) & (rows < 1 - 1e-4)).any(1), rows[:, -1] < 0.5
    shows = 1 - (0.233 - 0.1) / 1.9  # the share of sigmas that show
    for applied, rate in ((solarised, VIEWS[view][1]), (blurred, VIEWS[view][0] * shows),
                          (solarised & blurred, VIEWS[view][0] * VIEWS[view][1] * shows)):
        error = 4 * math.sqrt(rate * (1 - rate) / 2000) + 1e-9
        assert applied.double().mean().item() == pytest.approx(rate, abs=error)


def test_solarise_inverts_8_bit_levels_from_one_half_on():  # sheet 3: x if x < .5 else 1 - x
    x = (torch.arange(256) / 255).expand(2, 3, 1, 256)  # between 127 and 128 the script departs
    y = byol.solarize(x.clone(), torch.tensor([0.199, 0.2], dtype=DOUBLE), 0.2)
    assert torch.equal(y[1], x[1])
    torch.testing.assert_close(y[0], torch.where(x[0] < 0.5, x[0], 1 - x[0]))


# ------------------------------------------------------------------------------- recipes, sheet 4

PAPER = dict(
    arch="resnet50", width=1, small_images=False, zero_init_residual=True, dim=256, hidden_dim=4096,
    output_bn=False, predictor="mlp", predictor_lr_mult=1, optimizer="lars", momentum=0.9,
    batch_size=4096, epochs=1000, base_lr=0.2, weight_decay=1.5e-6, base_tau=0.996,
    warmup_epochs=10, tau_schedule="cosine", target="ema", beta=0, alpha=0.1, image_size=224,
    crop_min=0.08, flip_prob=0.5, jitter=(0.4, 0.4, 0.2, 0.1), jitter_prob=0.8, gray_prob=0.2,
    blur_prob=(1, 0.1), solarize_prob=(0, 0.2),
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
RECIPES = {
    "imagenet": {}, "imagenet-300": dict(epochs=300, base_lr=0.3, weight_decay=1e-6, base_tau=0.99),
    "imagenet-100": dict(epochs=100, base_lr=0.45, weight_decay=1e-6, base_tau=0.99),
    "imagenet-40": dict(epochs=40, base_lr=0.45, weight_decay=1e-6, base_tau=0.97),
    "imagenet-vit": dict(arch="vit_small", optimizer="adamw", base_lr=1e-4, weight_decay=0.03,
                         epochs=300, base_tau=None, warmup_epochs=None),  # None: not in the sheet
    "cifar": dict(arch="resnet18", batch_size=256, base_lr=2.0, weight_decay=1e-6,  # on Imagenette
                  small_images=True, zero_init_residual=False, image_size=32, blur_prob=(0, 0),
                  mean=None, std=None),
}
LINEAR = dict(epochs=80, batch_size=4096, base_lr=0.2, momentum=0.9, weight_decay=0, crop_min=0.08)
FINETUNE = dict(epochs=(30, 50), base_lr=(0.01, 0.02, 0.05, 0.1, 0.005), batch_size=(1024,),
                momentum=(0.9,), weight_decay=(0,), crop_min=(0.08,))  # the sweep


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_the_sheets(recipe):
    column, args = byol.RECIPE_NAMES.index(recipe), parse("--recipe", recipe)
    for name, value in {**PAPER, **RECIPES[recipe]}.items():
        parsed = getattr(args, name)
        parsed = tuple(parsed) if isinstance(parsed, list) else parsed
        table = byol.PRETRAIN[name][column] if name != "zero_init_residual" else value  # by depth
        assert value is None or parsed == value == table, name
    if recipe not in ("cifar", "imagenet-vit"):
        for name, value in LINEAR.items():  # the authors' code: one lr, its batch
            assert byol.LINEAR[name][column] == value, name
        for name, values in FINETUNE.items():
            assert byol.FINETUNE[name][column] in values, name


def test_monitors_see_a_healthy_and_a_collapsed_batch():  # sheet 6
    healthy = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    line = healthy[:, :1] * torch.linspace(1, 2, 16) + 30
    assert byol.feature_std(healthy) == pytest.approx(1, abs=0.02)
    assert byol.feature_std(line[:1].expand(50, -1)) < 1e-5  # over the batch: trap 10
    assert byol.effective_rank(healthy) == pytest.approx(16, abs=0.3)
    assert byol.effective_rank(line) == pytest.approx(1, abs=1e-3)
