"""moco_v3.py against the paper: loss, momentum encoder, heads, optimizers, recipes, checkpoints.

Every oracle here is written from Algorithm 1 of arXiv 2104.02057 or from the fact sheet of that
paper and its released code ("sheet 1" ... "sheet 8").
"""
import copy
import functools
import json
import math
import re

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torchvision.transforms.v2 import functional as TF

import moco_v3
from common import LARS, VITS, resnet, sincos_table, vit
from conftest import on_ranks, program, write_images
from helpers import DOUBLE, assert_fields, count, furthest, uniform
from moco_v3 import LAMB, MoCoV3, chance_and_floor, contrastive_loss
from test_augmentation import torchvision_jitter

main = program(moco_v3)


def parse(*flags, dtype=torch.float32):
    """The parsed arguments, made ready for a step on this machine's CPU."""
    args = moco_v3.parse_args([*map(str, flags)])
    args.device, args.dtype, args.precision, args.initial = torch.device("cpu"), dtype, "fp32", None
    return args


def embeddings(n=6, dim=5, dtype=DOUBLE, seed=0):
    """q and k of very different lengths, near each other in direction."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.logspace(-1, 1, n, dtype=DOUBLE)[:, None]
    q = torch.randn(n, dim, generator=g, dtype=DOUBLE)
    k = (q + torch.randn(n, dim, generator=g, dtype=DOUBLE)) * lengths.flip(0)
    return (q * lengths).to(dtype).requires_grad_(), k.to(dtype).requires_grad_()


def tiny_encoder(patch_projection="frozen", **options):
    """A real ViT on images of 8 x 8 pixels: four patches."""
    return vit("mini", 8, 4, patch_projection=patch_projection, **options)


def tiny_model(dtype=DOUBLE, seed=0, encoder=None, **options):
    torch.manual_seed(seed)
    encoder = encoder or tiny_encoder()
    return MoCoV3(encoder, **{"dim": 8, "hidden_dim": 16, **options}).to(dtype)


def views(n=6, dtype=DOUBLE, seed=1, side=8):
    """Two batches of images with clearly different statistics."""
    g = torch.Generator().manual_seed(seed)
    x1 = torch.randn(n, 3, side, side, generator=g, dtype=DOUBLE)
    x2 = 2 * x1.roll(1, 3) + torch.randn(n, 3, side, side, generator=g, dtype=DOUBLE) ** 2 - 1
    return x1.to(dtype), x2.to(dtype)


# ----------------------------------------------------------------------------------------- the loss


def slow_loss(q, k, temperature, scale=None):
    """ctr(q, k) of Algorithm 1, one query and one key at a time; scale: 2 tau unless given."""
    def cosine(a, b):
        dot = sum(i * j for i, j in zip(a, b))
        return dot / math.sqrt(sum(i * i for i in a)) / math.sqrt(sum(j * j for j in b))

    queries, keys, total = q.tolist(), k.tolist(), 0.0
    for n, query in enumerate(queries):
        logits = [cosine(query, key) / temperature for key in keys]
        largest = max(logits)
        total += largest + math.log(sum(math.exp(x - largest) for x in logits)) - logits[n]
    return total / len(queries) * (2 * temperature if scale is None else scale)


def slow_gradient(q, k, temperature):
    """d ctr / dq: 2 / N * (1 - q^ q^T) / |q| * (sum_m p_nm k^_m - k^_n), from the equation."""
    rows = []
    for n, query in enumerate(q):
        unit, keys = query / query.norm(), [key / key.norm() for key in k]
        logits = torch.stack([(unit * key).sum() / temperature for key in keys])
        shares = (logits - logits.max()).exp()
        shares = shares / shares.sum()
        pull = sum(share * key for share, key in zip(shares, keys)) - keys[n]
        rows.append(2 / len(q) * (pull - (pull * unit).sum() * unit) / query.norm())
    return torch.stack(rows)


def wrong_losses(q, k, t):
    """Mistakes that people made, each of which the oracle must tell from the loss."""
    unit_q, unit_k = normalize(q), normalize(k)
    logits, labels = unit_q @ unit_k.T / t, torch.arange(len(q))
    both = torch.cat([logits, (unit_q @ unit_q.T / t).fill_diagonal_(-math.inf)], 1)
    return {
        "without 2 tau": cross_entropy(logits, labels), "tau": t * cross_entropy(logits, labels),
        "2 without tau": 2 * cross_entropy(logits, labels),
        "sum over queries": 2 * t * cross_entropy(logits, labels, reduction="sum"),
        "keys choose queries": 2 * t * cross_entropy(logits.T, labels),
        "2N - 2 negatives, as SimCLR": 2 * t * cross_entropy(both, labels),
        "positive not among the classes": 2 * t * -(logits.diag() - logits.masked_fill(
            torch.eye(len(q)).bool(), -math.inf).logsumexp(1)).mean(),
        "not normalised": 2 * t * cross_entropy(q @ k.T / t, labels),
        "keys not normalised": 2 * t * cross_entropy(unit_q @ k.T / t, labels),
        "times tau": 2 * t * cross_entropy(logits * t * t, labels),
        "shifted labels": 2 * t * cross_entropy(logits, labels.roll(1)),
    }


@pytest.mark.parametrize("temperature", [0.005, 0.05, 0.2, 1.0])
def test_loss_and_gradient_equal_a_double_loop(temperature):
    for seed, n, dim in ((0, 6, 5), (1, 1, 7), (2, 17, 3)):
        q, k = embeddings(n, dim, seed=seed)
        loss = contrastive_loss(q, k, temperature)
        assert loss.shape == () and loss.dtype == DOUBLE
        assert abs(loss.item() - slow_loss(q, k, temperature)) < 1e-9
        dq, dk = torch.autograd.grad(loss, (q, k), allow_unused=True)
        assert dk is None  # Alg. 1: k1, k2 carry no gradient
        expected = slow_gradient(q.detach(), k.detach(), temperature)
        torch.testing.assert_close(dq, expected, rtol=0, atol=1e-9)
        assert n == 1 or expected.abs().max() > 1e-3


@pytest.mark.parametrize("temperature", [0.05, 0.2])
def test_the_double_loop_tells_wrong_losses_apart(temperature):
    q, k = embeddings()
    right = slow_loss(q, k, temperature)
    for name, wrong in wrong_losses(q, k, temperature).items():
        assert abs(wrong.item() - right) > 1e-3, name
    assert abs(slow_loss(q, k, temperature * 1.01) - right) > 1e-5


def test_gradient_equals_finite_differences():
    q, k = embeddings(4, 3)
    k = k.detach()
    assert torch.autograd.gradcheck(lambda q: contrastive_loss(q, k, 0.2), (q,), atol=1e-7, rtol=1e-6)


def test_loss_ignores_lengths_and_the_order_of_the_batch_but_not_the_pairing():
    q, k = (x.detach() for x in embeddings())
    lengths, order = torch.logspace(-3, 3, 6, dtype=DOUBLE)[:, None], torch.tensor([3, 0, 5, 1, 4, 2])
    loss = contrastive_loss(q, k, 0.2).item()
    for a, b in ((q * lengths, k), (q, k * lengths), (7 * q, 0.01 * k), (q[order], k[order])):
        assert contrastive_loss(a, b, 0.2).item() == pytest.approx(loss, abs=1e-12)
    assert abs(contrastive_loss(q, k[order], 0.2).item() - loss) > 1e-2


def test_factor_2_tau_keeps_the_size_of_the_gradient():  # Sec. 3; sheet 8, trap 13
    q, k = embeddings(32, 16)
    sizes = [torch.autograd.grad(contrastive_loss(q, k, t), q)[0].norm().item()
             for t in (0.5, 1.0, 2.0, 100.0)]
    assert max(sizes) < 1.5 * min(sizes)
    # Where all logits are alike it is that of 2 * (mean key - own key): BYOL's, at any temperature
    unit = normalize(k.detach())
    pull = 2 / 32 * (unit.mean(0) - unit)
    pull = (pull - (pull * normalize(q.detach())).sum(1, keepdim=True) * normalize(q.detach()))
    torch.testing.assert_close(torch.autograd.grad(contrastive_loss(q, k, 1e6), q)[0],
                               pull / q.detach().norm(dim=1, keepdim=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.005, 0.2])
def test_half_precision_inputs_are_raised_to_float32(dtype, temperature):
    q, k = embeddings(16, 256, dtype)
    k = k.detach().roll(1, 0)  # or the positive would stand alone at .005, without gradient
    loss = contrastive_loss(q, k, temperature)
    raised = contrastive_loss(q.double(), k.double(), temperature)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(raised.item(), rel=1e-5, abs=1e-6)
    loss.backward()
    assert q.grad.isfinite().all() and q.grad.any()
    huge = torch.full((4, 256), 300.0, dtype=dtype)  # 300^2 * 256 > 65504
    assert contrastive_loss(huge, huge, 0.2).item() == pytest.approx(0.4 * math.log(4), abs=1e-4)


def test_loss_is_computed_in_float32_under_autocast():
    q, k = embeddings(32, 64, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(q, k, 0.2)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow_loss(q, k, 0.2), abs=1e-5)


def test_collapse_to_zero_stays_finite():
    q, k = torch.zeros(3, 4, requires_grad=True), torch.zeros(3, 4)
    loss = contrastive_loss(q, k, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0.4 * math.log(3), abs=1e-6) and q.grad.isfinite().all()


# ------------------------------------------------------------------------------ chance and the floor


@pytest.mark.parametrize("temperature, table", [  # sheet 1
    (0.2, {256: (4.44, 0.79), 512: (4.99, 1.19), 1024: (5.55, 1.65), 2048: (6.10, 2.15),
           4096: (6.65, 2.68)}),
    (1.0, {256: (22.18, 18.19), 512: (24.95, 20.96), 1024: (27.73, 23.73), 2048: (30.50, 26.50),
           4096: (33.27, 29.27)})])
def test_chance_and_floor_are_the_sheets(temperature, table):
    for n, expected in table.items():
        assert chance_and_floor(n, temperature) == pytest.approx(expected, abs=0.0051)


@pytest.mark.parametrize("n, temperature", [(2, 0.2), (5, 0.2), (8, 1.0), (6, 0.05)])
def test_loss_reaches_chance_and_floor_and_nothing_below(n, temperature):
    chance, floor = chance_and_floor(n, temperature)
    same = torch.ones(n, 4, dtype=DOUBLE)
    simplex = torch.eye(n, dtype=DOUBLE) - 1 / n  # n points as far from each other as can be
    for x, expected in ((same, chance), (simplex, floor)):
        assert 2 * contrastive_loss(x, x, temperature).item() == pytest.approx(expected, abs=1e-9)
    for seed in range(20):  # whichever their direction: close pairs, and random negatives
        q, k = embeddings(n, n, seed=seed)
        assert 2 * contrastive_loss(q, q, temperature).item() > floor - 1e-9
        assert 2 * contrastive_loss(q, k, temperature).item() > floor - 1e-9


def test_a_random_network_of_many_channels_starts_near_chance():
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(256, 4096, generator=g) for _ in range(2))
    chance, floor = chance_and_floor(256, 0.2)
    assert 2 * contrastive_loss(q, k, 0.2).item() == pytest.approx(chance, abs=0.05) and floor < chance


# ----------------------------------------------------------------------- several processes equal one


N, WORLDS, TEMPERATURES = 8, (4, 2, 1), (0.005, 0.2, 1.0)


def two_queries_and_keys():
    (q1, k2), (q2, k1) = embeddings(N, 5, seed=3), embeddings(N, 5, seed=4)
    return [x.detach() for x in (q1, q2, k1, k2)]


def all_keys(k):
    parts = [torch.empty_like(k) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, k.contiguous())
    return torch.cat(parts)


def mutant(name, q, k, t):
    """Wrong ways to share the batch; "right" is the way to share it."""
    rank, n = dist.get_rank(), len(q)
    keys = normalize(k if name == "local negatives" else all_keys(k))
    first = 0 if name in ("unshifted labels", "local negatives") else n * rank
    loss = cross_entropy(normalize(q) @ keys.T / t, first + torch.arange(n)) * 2 * t
    return loss * dist.get_world_size() if name == "times W" else loss


MUTANTS = ("right", "unshifted labels", "same view", "local negatives", "times W")


def share(which, rank, world, t):
    """Loss and gradient of the symmetrised loss that one rank has of its slice."""
    q1, q2, k1, k2 = (x[rank * N // world:(rank + 1) * N // world].clone()
                      for x in two_queries_and_keys())
    q1.requires_grad_(), q2.requires_grad_(), k1.requires_grad_(), k2.requires_grad_()
    if which == "ours":
        loss = contrastive_loss(q1, k2, t) + contrastive_loss(q2, k1, t)
    elif which == "same view":
        loss = contrastive_loss(q1, k1, t) + contrastive_loss(q2, k2, t)
    else:
        loss = mutant(which, q1, k2.detach(), t) + mutant(which, q2, k1.detach(), t)
    loss.backward()
    assert k1.grad is None and k2.grad is None
    return {"loss": loss.detach(), "d1": q1.grad, "d2": q2.grad}


NETWORKS = {"vit-bn": "--recipe demo", "resnet": "--recipe cifar-resnet --base-lr 3"}


def network_steps(name, rank=0, world=1):
    """Two steps of the program's own: model, optimizer, DDP and batch norm of the global batch."""
    args = parse(*NETWORKS[name].split(), "--batch-size", N, dtype=DOUBLE)
    torch.manual_seed(0)
    if name == "resnet":
        model = tiny_model(encoder=resnet(10, 0.125, small_images=True), projector_layers=2,
                           predictor_output_bn=False)
    else:
        model = tiny_model(encoder=tiny_encoder(mlp_norm="batch"))
    optimizer = moco_v3.build_optimizer(model, args)
    wrapped, record = moco_v3.prepare(model, args), {}
    for i, (epoch, m) in enumerate(((0.5, 0.5), (4.0, 0.9))):
        x1, x2 = (x[rank * N // world:(rank + 1) * N // world] for x in views(N, seed=20 + i))
        loss, q1, h1, norms = moco_v3.train_step(wrapped, optimizer, x1, x2, epoch, m, args)
        record |= {f"mean loss {i}": loss.clone(), f"rows q {i}": q1.clone(),
                   f"rows h {i}": h1.clone(), f"each norms {i}": norms.clone()}
    return record | {f"each {key}": x.clone() for key, x in model.state_dict().items()}


def worker(rank, world):
    shares = {(which, t): share(which, rank, world, t) for which in ("ours", *MUTANTS)
              for t in TEMPERATURES}
    return shares | {name: network_steps(name, rank, world) for name in NETWORKS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(worker, tmp_path_factory.mktemp("ranks"), WORLDS)


def differs(ranks, world, which, t):
    """By how much the mean loss of the ranks, and their mean gradient, miss those of one process."""
    q1, q2, k1, k2 = two_queries_and_keys()
    parts = [ranks[rank][world][which, t] for rank in range(world)]
    loss = sum(part["loss"].item() for part in parts) / world
    error = abs(loss - slow_loss(q1, k2, t) - slow_loss(q2, k1, t))
    # DDP averages: each row is 1 / W of its rank's.
    gradients = [torch.cat([part[d] for part in parts]) / world for d in ("d1", "d2")]
    return max(furthest(gradients, [slow_gradient(q1, k2, t), slow_gradient(q2, k1, t)]), error)


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("world", sorted(WORLDS))
def test_loss_and_gradient_of_ranks_equal_those_of_one_process(ranks, world, t):  # sheet 1
    assert differs(ranks, world, "ours", t) < 1e-10
    assert differs(ranks, world, "right", t) < 1e-10


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("which", MUTANTS[1:])
def test_wrong_ways_to_share_the_batch_fail_that_check(ranks, which, world):
    for t in (0.2, 1.0):
        assert differs(ranks, world, which, t) > 1e-3


def assert_same_network(ranks, world, name, reference, tolerance=1e-10):
    parts = [ranks[rank][world][name] for rank in range(world)]
    for key, expected in reference.items():
        values = [part[key] for part in parts]
        if key.startswith("rows"):
            values = [torch.cat(values)]
        elif key.startswith("mean"):
            values = [sum(values) / world]
        for value in values:
            torch.testing.assert_close(value, expected, rtol=0, atol=tolerance,
                                       msg=lambda m: f"{key}: {m}")


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("world", sorted(WORLDS))
def test_training_on_ranks_equals_one_process(ranks, world, name):
    """Both encoders, their running statistics, losses and gradient norms, after two steps."""
    assert_same_network(ranks, world, name, network_steps(name))


# ---------------------------------------------------------------------------------------- the heads


def layers(head):
    """A head's layers as words."""
    words = []
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            bias = " bias" * (layer.bias is not None)
            words.append(f"fc {layer.in_features}-{layer.out_features}{bias}")
        elif isinstance(layer, nn.BatchNorm1d):
            assert layer.eps == 1e-5 and layer.momentum == 0.1 and layer.track_running_stats
            words.append(f"BN {layer.num_features} {'affine' if layer.affine else 'plain'}")
        elif not isinstance(layer, (nn.Sequential, nn.Identity)):
            words.append(type(layer).__name__)
    return words


VIT_PROJECTOR = ["fc 384-4096", "BN 4096 affine", "ReLU", "fc 4096-4096", "BN 4096 affine", "ReLU",
                 "fc 4096-256", "BN 256 plain"]
R50_PROJECTOR = ["fc 2048-4096", "BN 4096 affine", "ReLU", "fc 4096-256", "BN 256 plain"]
PREDICTOR = ["fc 256-4096", "BN 4096 affine", "ReLU", "fc 4096-256"]


def on_meta(arch):
    with torch.device("meta"):
        if arch == "resnet50":
            return MoCoV3(resnet(50), projector_layers=2, predictor_output_bn=False)
        *stem, size = arch.removeprefix("vit_").split("_")
        return MoCoV3(vit(size, stem="conv" if stem else "patch"))


def test_heads_are_the_authors():  # sheet 2.6; sheet 8, traps 3 and 7
    model = on_meta("vit_small")
    assert layers(model.projector) == VIT_PROJECTOR
    assert layers(model.predictor) == [*PREDICTOR, "BN 256 plain"]
    assert layers(model.momentum_projector) == VIT_PROJECTOR
    model = on_meta("resnet50")
    assert layers(model.projector) == R50_PROJECTOR == layers(model.momentum_projector)
    assert layers(model.predictor) == PREDICTOR


@pytest.mark.parametrize("arch, total, projector, keys", [  # sheet 2.6, 7
    ("vit_small", 84.267, 19.415, 342), ("vit_base", 215.68, 20.988, 342),
    ("vit_large", 652.78, None, None), ("resnet50", 68.012, 9.445, 663)])
def test_numbers_of_parameters_and_keys_are_the_authors(arch, total, projector, keys):
    model = on_meta(arch)
    assert count(model) / 1e6 == pytest.approx(total, abs=0.0051 if total > 100 else 0.00051)
    assert projector is None or round(count(model.projector) / 1e6, 3) == projector
    assert round(count(model.predictor) / 1e6, 3) == 2.105
    assert keys is None or len(model.state_dict()) == keys
    both = count(model.encoder) + count(model.projector)
    assert both == count(model.momentum_encoder) + count(model.momentum_projector)
    assert both * 2 + count(model.predictor) == count(model)


def test_ablated_heads_lack_only_what_was_taken_from_them():  # Sec. 6.2
    bare = tiny_model(bn="none")
    assert layers(bare.projector) == [word for word in layers(tiny_model().projector)
                                      if not word.startswith("BN")]
    assert not [m for part in (bare.projector, bare.predictor, bare.momentum_projector)
                for m in part.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    without = tiny_model(predictor="none")
    q1, q2, k1, k2, _ = without(*views())
    assert not list(without.predictor.parameters())
    assert torch.equal(q1, k1) and torch.equal(q2, k2)  # at the start the encoders are alike
    assert layers(without.projector) == layers(tiny_model().projector)


def test_heads_start_as_pytorch_starts_them():  # sheet 2.3: after the backbone's Xavier loop
    encoder = tiny_encoder()
    model = tiny_model(encoder=encoder, dim=256, hidden_dim=512)
    for head in (model.projector, model.predictor):
        for fc in (m for m in head.modules() if isinstance(m, nn.Linear)):
            bound = 1 / math.sqrt(fc.in_features)
            assert fc.weight.abs().max() <= bound + 1e-9
            assert fc.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


# --------------------------------------------------------------------------------- the two encoders


def pairs(model):
    """(name, parameter, its momentum copy)."""
    theirs = dict(model.named_parameters())
    return [(name, p, theirs[f"momentum_{name}"]) for name, p in theirs.items()
            if name.split(".")[0] in ("encoder", "projector")]


def test_momentum_encoder_starts_as_a_copy_and_never_has_a_gradient():  # Alg. 1
    model = tiny_model(torch.float32)
    assert len(pairs(model)) == len(list(model.momentum_encoder.parameters())) + len(
        list(model.momentum_projector.parameters()))
    for name, online, target in pairs(model):
        assert torch.equal(online, target) and online.data_ptr() != target.data_ptr(), name
        assert not target.requires_grad, name
    state = model.state_dict()  # in the checkpoint
    assert {name.split(".")[0] for name in state} == {
        "encoder", "projector", "predictor", "momentum_encoder", "momentum_projector"}
    for part in ("encoder", "projector"):
        names = {name for name in state if name.startswith(f"{part}.")}
        assert {f"momentum_{name}" for name in names} == {
            name for name in state if name.startswith(f"momentum_{part}.")}
    model.eval()
    model.train()
    assert all(m.training for m in model.modules())  # sheet 1: keys see their own batch
    *_, k1, k2, h1 = model(*views(dtype=torch.float32))
    assert not k1.requires_grad and not k2.requires_grad
    sum(x.sum() for x in model(*views(dtype=torch.float32))[:2]).backward()
    assert all(target.grad is None for _, _, target in pairs(model))


def apart(model, seed=5):
    """Lets the momentum encoder be another network, as after some steps."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, online, target in pairs(model):
            if online.requires_grad:
                target.add_(0.1 * torch.randn(target.shape, generator=g, dtype=DOUBLE).to(target.dtype))
    return model


@pytest.mark.parametrize("backbone", ["vit", "resnet"])
def test_forward_equals_separate_passes_of_each_view(backbone):  # App. A; sheet 8, trap 6
    encoder = resnet(10, 0.125, small_images=True) if backbone == "resnet" else tiny_encoder()
    model, (x1, x2) = apart(tiny_model(encoder=encoder)), views()
    twin = copy.deepcopy(model)
    outputs = model(x1, x2)
    h1, h2 = twin.encoder(x1), twin.encoder(x2)
    q1, q2 = (twin.predictor(twin.projector(h)) for h in (h1, h2))
    k1, k2 = (twin.momentum_projector(twin.momentum_encoder(x)) for x in (x1, x2))
    for ours, expected in zip(outputs, (q1, q2, k1, k2, h1)):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    assert (outputs[2] - model.projector(model.encoder(x1))).abs().max() > 1e-2  # another network
    model = copy.deepcopy(twin)
    together = twin.momentum_projector(twin.momentum_encoder(torch.cat([x1, x2])))
    assert (together[:6] - outputs[2]).abs().max() > 1e-2  # batch norm over both views


def test_running_statistics_follow_their_own_batches_and_are_not_averaged():  # sheet 1
    model = apart(tiny_model())
    before = copy.deepcopy(model.state_dict())
    model(*views())
    seen = copy.deepcopy(model.state_dict())
    statistics = [name for name, _ in model.named_buffers() if "running" in name]
    assert {name.split(".")[0] for name in statistics} == {
        "projector", "predictor", "momentum_projector"}
    for name in statistics:
        assert not torch.equal(before[name], seen[name]), name
    for name, b in model.named_buffers():
        assert not name.endswith("num_batches_tracked") or b == 2, name  # one per view
    assert not torch.equal(seen["projector.1.running_mean"], seen["momentum_projector.1.running_mean"])
    model.update_momentum_encoder(0.5)
    for name, b in model.named_buffers():
        assert torch.equal(b, seen[name]), name


@pytest.mark.parametrize("m", [0, 1, 0.99, 0.5])
def test_update_takes_every_parameter_and_nothing_else(m):
    model = apart(tiny_model())
    with torch.no_grad():  # the frozen ones as well: both are in Alg. 1's "params"
        model.encoder.patch_embed.proj.weight.add_(1)
    before = copy.deepcopy(model)
    places = [p.data_ptr() for p in model.parameters()]
    model.update_momentum_encoder(m)
    for (name, online, target), (_, old_online, old_target) in zip(pairs(model), pairs(before)):
        assert torch.equal(online, old_online), name
        torch.testing.assert_close(target, m * old_target + (1 - m) * old_online, rtol=0, atol=1e-15)
        assert not m or not online.requires_grad or not torch.equal(target, online), name
        if m == 0:
            assert torch.equal(target, online), name
        if m == 1:
            assert torch.equal(target, old_target), name
    for a, b in zip(model.predictor.parameters(), before.predictor.parameters()):
        assert torch.equal(a, b)
    assert places == [p.data_ptr() for p in model.parameters()]  # in place
    assert not any(p.requires_grad for _, _, p in pairs(model))


# ----------------------------------------------------------------------------- optimizers, schedules


@pytest.mark.parametrize("optimizer", ["adamw", "lars", "lamb"])
@pytest.mark.parametrize("predictor", ["mlp", "none"])
@pytest.mark.parametrize("patch_projection", ["frozen", "learned"])
def test_optimizer_holds_every_trainable_parameter_once(optimizer, predictor, patch_projection):
    args = parse("--recipe", "imagenet", "--optimizer", optimizer)
    model = tiny_model(torch.float32, encoder=tiny_encoder(patch_projection), predictor=predictor)
    optimizer = moco_v3.build_optimizer(model, args)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    target = {id(p) for p in (*model.momentum_encoder.parameters(),
                              *model.momentum_projector.parameters())}
    assert len(held) == len(set(held)) and set(held) == trainable and not target & set(held)


def test_adamw_is_torchs_and_decays_everything():  # sheet 4.1; sheet 8, trap 11
    args, model = parse("--recipe", "imagenet"), tiny_model(torch.float32)
    optimizer = moco_v3.build_optimizer(model, args)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8
        assert group["weight_decay"] == 0.1 and not group["amsgrad"] and not group["maximize"]
    vectors = [p for group in optimizer.param_groups for p in group["params"] if p.dim() == 1]
    assert len(vectors) > 20


@pytest.mark.parametrize("recipe, decay", [("100", 1e-6), ("300", 1e-6), ("1000", 1.5e-6)])
def test_lars_has_the_authors_settings(recipe, decay):  # sheet 4.1
    args = parse("--recipe", f"imagenet-r50-{recipe}")
    model = tiny_model(torch.float32, encoder=resnet(10, 0.125))
    optimizer = moco_v3.build_optimizer(model, args)
    assert isinstance(optimizer, LARS)
    for group in optimizer.param_groups:
        assert group["momentum"] == 0.9 and group["weight_decay"] == decay
        assert group["trust_coefficient"] == 0.001 and group["exclude_1d"]
        assert not group["lr_in_momentum"]


def test_momentum_rises_along_a_cosine():  # sheet 4.1
    args = parse("--recipe", "imagenet")
    for epoch, expected in ((0, 0.99), (100, 0.9925), (200, 0.9975), (300, 1.0)):
        assert moco_v3.momentum_schedule(epoch, args) == pytest.approx(expected, abs=1e-12)
    for epoch in (0.1, 39.99, 40.0, 123.4, 299.9):  # no warm-up, and fractions count
        expected = 1 - 0.01 * (1 + math.cos(math.pi * epoch / 300)) / 2
        assert moco_v3.momentum_schedule(epoch, args) == pytest.approx(expected, abs=1e-12)
    args = parse("--recipe", "imagenet-r50-1000")
    assert moco_v3.momentum_schedule(0.0, args) == pytest.approx(0.996, abs=1e-12)
    assert moco_v3.momentum_schedule(500.0, args) == pytest.approx(0.998, abs=1e-12)
    for m in (0.0, 0.9, 0.999):  # Sec. 6.2
        args = parse("--recipe", "imagenet", "--ema-schedule", "constant", "--ema-momentum", m)
        assert {moco_v3.momentum_schedule(epoch, args) for epoch in (0.0, 17.3, 300.0)} == {m}
        args = parse("--recipe", "imagenet", "--ema-momentum", m)
        assert moco_v3.momentum_schedule(0.0, args) == m
        assert moco_v3.momentum_schedule(300.0, args) == 1.0


def test_lr_rises_from_0_over_the_warm_up_and_falls_to_0_with_every_step():  # sheet 4.1
    args = parse("--recipe", "imagenet")  # 40 of 300 epochs
    assert moco_v3.warmup_cosine(0.0, args) == 0
    for epoch in (0.001, 0.25, 1.0, 17.7, 39.99):
        assert moco_v3.warmup_cosine(epoch, args) == pytest.approx(epoch / 40, abs=1e-12)
    for epoch in (40.0, 40.5, 100.0, 170.0, 299.999):
        expected = (1 + math.cos(math.pi * (epoch - 40) / 260)) / 2
        assert moco_v3.warmup_cosine(epoch, args) == pytest.approx(expected, abs=1e-12)
    assert moco_v3.warmup_cosine(170.0, args) == pytest.approx(0.5, abs=1e-12)
    assert moco_v3.warmup_cosine(300.0, args) == pytest.approx(0, abs=1e-12)
    args = parse("--recipe", "imagenet-r50-100")  # 10 of 100
    assert moco_v3.warmup_cosine(5.0, args) == 0.5 and moco_v3.warmup_cosine(10.0, args) == 1
    assert moco_v3.warmup_cosine(55.0, args) == pytest.approx(0.5, abs=1e-12)
    args = parse("--recipe", "imagenet", "--warmup-epochs", 0)
    assert moco_v3.warmup_cosine(0.0, args) == 1


@pytest.mark.parametrize("recipe, batch, peak", [  # sheet 4.1: "eff."
    ("imagenet", 4096, 2.4e-3), ("imagenet", 1024, 6e-4), ("imagenet-r50-100", 4096, 9.6),
    ("imagenet-r50-300", 4096, 4.8), ("imagenet-r50-1000", 4096, 4.8)])
def test_learning_rate_is_scaled_by_the_batch_over_256(recipe, batch, peak):
    args = parse("--recipe", recipe, "--batch-size", batch)
    for epoch, part in ((0.0, 0), (args.warmup_epochs / 2, 0.5), (float(args.warmup_epochs), 1),
                        ((args.epochs + args.warmup_epochs) / 2, 0.5)):
        model = tiny_model(torch.float32)
        optimizer = moco_v3.build_optimizer(model, args)
        moco_v3.train_step(model, optimizer, *views(dtype=torch.float32), epoch, 0.99, args)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(peak * part, rel=1e-9)


def loop_lamb(weights, gradients, lrs, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, mistake=""):
    """LAMB over Python floats, from the equations in its docstring; weights: lists of lists."""
    weights = [list(map(float, w.flatten())) for w in weights]
    shapes = [g.shape for g in gradients[0]]
    a, b = ([[0.0] * len(w) for w in weights] for _ in range(2))
    for t, (lr, grads) in enumerate(zip(lrs, gradients), 1):
        for i, (w, g) in enumerate(zip(weights, grads)):
            g, update = list(map(float, g.flatten())), []
            adapted = len(shapes[i]) > 1 or mistake == "vectors too"
            decay = weight_decay if adapted else 0.0
            for j in range(len(w)):
                a[i][j] = betas[0] * a[i][j] + (1 - betas[0]) * g[j]
                b[i][j] = betas[1] * b[i][j] + (1 - betas[1]) * g[j] ** 2
                first = a[i][j] / (1 if mistake == "no correction" else 1 - betas[0] ** t)
                second = b[i][j] / (1 if mistake == "no correction" else 1 - betas[1] ** t)
                u = first / (math.sqrt(second) + eps)
                if mistake == "eps in the root":
                    u = first / math.sqrt(second + eps)
                update.append(u if mistake == "decay outside" else u + decay * w[j])
            norm, size = (math.sqrt(sum(x * x for x in v)) for v in (w, update))
            ratio = norm / size if adapted and norm > 0 and size > 0 else 1.0
            if mistake == "clipped ratio":
                ratio = min(ratio, 10.0)
            if mistake == "no ratio":
                ratio = 1.0
            for j in range(len(w)):
                outside = decay * w[j] if mistake == "decay outside" else 0.0
                w[j] -= lr * (ratio * update[j] + outside)
    return [torch.tensor(w, dtype=DOUBLE).reshape(s) for w, s in zip(weights, shapes)]


SHAPES, LRS = [(4, 3), (5,), (2, 3, 2, 2), (1, 1), ()], [0.0, 0.1, 0.3, 0.02, 0.5]
SETTINGS = dict(betas=(0.8, 0.95), eps=1e-3, weight_decay=0.03)


def tensors(seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(s, generator=g, dtype=DOUBLE) for s in SHAPES]


def lamb_inputs():
    weights = tensors(0)
    weights[2] *= 40  # |w| / |u| beyond 10, where some clip it
    return weights, [tensors(seed, 0.1 * seed) for seed in range(1, 6)]


def run_lamb(weights, gradients, lrs, save_at=None, **settings):
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = LAMB(params, lr=lrs[0], **settings)
    for t, (lr, grads) in enumerate(zip(lrs, gradients)):
        if t == save_at:
            state = copy.deepcopy(optimizer.state_dict())
            params = [nn.Parameter(p.detach().clone()) for p in params]
            optimizer = LAMB(params, lr=9.0, betas=(0.1, 0.1), eps=1.0)
            optimizer.load_state_dict(state)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p, g in zip(params, grads):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("settings", [{}, SETTINGS, dict(weight_decay=0.1)], ids=str)
def test_lamb_equals_a_loop_over_floats(settings):
    weights, gradients = lamb_inputs()
    ours = run_lamb(weights, gradients, LRS, **settings)
    assert furthest(ours, loop_lamb(weights, gradients, LRS, **settings)) < 1e-9
    assert furthest(ours, weights) > 0.1


@pytest.mark.parametrize("mistake", ["vectors too", "no correction", "eps in the root",
                                     "decay outside", "clipped ratio", "no ratio"])
def test_the_loop_tells_other_lambs_apart(mistake):
    weights, gradients = lamb_inputs()
    assert furthest(run_lamb(weights, gradients, LRS, **SETTINGS),
                    loop_lamb(weights, gradients, LRS, **SETTINGS, mistake=mistake)) > 1e-3


def test_lamb_neither_decays_nor_adapts_vectors():
    weights, gradients = lamb_inputs()
    ours = run_lamb(weights, gradients, LRS, weight_decay=0.3)
    params = [nn.Parameter(w.clone()) for w in weights]
    adam = torch.optim.Adam(params, eps=1e-6)
    for lr, grads in zip(LRS, gradients):
        adam.param_groups[0]["lr"] = lr
        for p, g in zip(params, grads):
            p.grad = g.clone()
        adam.step()
    for i, shape in enumerate(SHAPES):
        same = (ours[i] - params[i].detach()).abs().max() < 1e-9
        assert same == (len(shape) < 2), shape


def test_lamb_with_norms_of_zero_takes_the_bare_step():
    zero, g = torch.zeros(3, 2, dtype=DOUBLE), torch.full((3, 2), 0.5, dtype=DOUBLE)
    w, = run_lamb([zero], [[g]], [0.1])
    torch.testing.assert_close(w, torch.full_like(w, -0.1 * 0.5 / (0.5 + 1e-6)), rtol=0, atol=1e-12)
    ones = torch.ones(3, 2, dtype=DOUBLE)
    w, = run_lamb([ones], [[zero]], [0.1])  # neither gradient nor decay
    assert torch.equal(w, ones)
    weights, gradients = [zero, ones, zero], [[g, zero, zero], [g, g, zero], [zero, g, g]]
    ours = run_lamb(weights, gradients, [0.1, 0.2, 0.3], weight_decay=0.1)
    assert furthest(ours, loop_lamb(weights, gradients, [0.1, 0.2, 0.3], weight_decay=0.1)) < 1e-9


def test_a_saved_lamb_continues_identically():
    weights, gradients = lamb_inputs()
    whole = run_lamb(weights, gradients, LRS, **SETTINGS)
    for at in (1, 3):
        again = run_lamb(weights, gradients, LRS, save_at=at, **SETTINGS)
        assert all(torch.equal(a, b) for a, b in zip(whole, again))


def test_lamb_takes_a_closure_as_torchs_optimizers_do():
    w = nn.Parameter(torch.ones(2, 2, dtype=DOUBLE))

    def closure():
        loss = (w * w).sum()
        loss.backward()
        return loss

    assert LAMB([w], lr=0.1).step(closure).item() == 4
    torch.testing.assert_close(w.detach(), torch.full((2, 2), 0.9, dtype=DOUBLE), rtol=0, atol=1e-6)


def test_lamb_skips_what_has_no_gradient_and_keeps_groups_apart():
    a, b, c = (nn.Parameter(torch.ones(2, 2, dtype=DOUBLE)) for _ in range(3))
    optimizer = LAMB([{"params": [a]}, {"params": [b, c], "lr": 0.5, "weight_decay": 1.0}], lr=0.1)
    a.grad, b.grad = torch.full((2, 2), 2.0, dtype=DOUBLE), torch.full((2, 2), 2.0, dtype=DOUBLE)
    optimizer.step()
    torch.testing.assert_close(a.detach(), torch.full((2, 2), 0.9, dtype=DOUBLE), rtol=0, atol=1e-9)
    torch.testing.assert_close(b.detach(), torch.full((2, 2), 0.5, dtype=DOUBLE), rtol=0, atol=1e-9)
    assert torch.equal(c, torch.ones_like(c))


# ----------------------------------------------------------------------------------------- one step


def ctr(q, k, t):
    logits = (q / q.norm(dim=1, keepdim=True)) @ (k / k.norm(dim=1, keepdim=True)).T / t
    return 2 * t * (logits.exp().sum(1).log() - logits.diag()).mean()


def slow_update(optimizer, w, g, state, lr, args, mistake):
    """AdamW, LARS or LAMB on one weight (sheet 4.1; LAMB's docstring)."""
    decay = args.weight_decay
    if mistake == "no decay of vectors" and w.dim() == 1:
        decay = 0.0
    state["t"] = t = state.get("t", 0) + 1
    if optimizer == "lars":
        if w.dim() > 1:
            g = g + decay * w
            g = g * (0.001 * w.norm() / g.norm() if w.norm() > 0 and g.norm() > 0 else 1.0)
        state["mu"] = 0.9 * state.get("mu", 0) + g
        return w - lr * state["mu"]
    if mistake == "decay in the gradient":
        g, decay = g + decay * w, 0.0
    state["a"] = 0.9 * state.get("a", 0) + 0.1 * g
    state["b"] = 0.999 * state.get("b", 0) + 0.001 * g * g
    first, second = state["a"] / (1 - 0.9 ** t), state["b"] / (1 - 0.999 ** t)
    if optimizer == "lamb":
        u = first / (second.sqrt() + 1e-6)
        if w.dim() > 1:
            u = u + decay * w
            u = u * (w.norm() / u.norm() if w.norm() > 0 and u.norm() > 0 else 1.0)
        return w - lr * u
    return w - lr * decay * w - lr * first / (second.sqrt() + 1e-8)


def slow_step(model, states, x1, x2, share, m, args, mistake=""):
    """Algorithm 1 written out. The mistakes are to be told apart."""
    def average():
        with torch.no_grad():
            for name, online, target in pairs(model):
                if not (mistake == "projector not averaged" and name.startswith("projector.")):
                    target.copy_(m * target + (1 - m) * online)
            if mistake == "statistics averaged":
                buffers = dict(model.named_buffers())
                for name, b in buffers.items():
                    if name.startswith("projector.") and b.is_floating_point():
                        other = buffers[f"momentum_{name}"]
                        other.copy_(m * other + (1 - m) * b)

    def keys(x):
        k = model.momentum_projector(model.momentum_encoder(x))
        return model.predictor(k) if mistake == "keys predicted" else k

    if mistake == "average before keys":
        average()
    q1, q2 = (model.predictor(model.projector(model.encoder(x))) for x in (x1, x2))
    if mistake == "views together":
        q1, q2 = model.predictor(model.projector(model.encoder(torch.cat([x1, x2])))).chunk(2)
    if mistake == "keys in eval mode":
        model.momentum_projector.eval()
    with torch.no_grad():
        k1, k2 = keys(x1), keys(x2)
    model.train()
    t = args.temperature
    if mistake == "same view":
        k1, k2 = k2, k1
    loss = ctr(q1, k2, t) + ctr(q2, k1, t)
    loss = {"halved": loss / 2, "without 2 tau": loss / 2 / t, "one direction": ctr(q1, k2, t)}.get(
        mistake, loss)
    if mistake == "average before the step":
        average()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()))
    if mistake == "gradient clipped":
        norm = torch.stack([g.norm() for g in grads]).norm()
        grads = [g * min(1.0, 1.0 / norm.item()) for g in grads]
    lr = args.base_lr * args.batch_size / 256 * share
    with torch.no_grad():
        for (name, w), g in zip(named.items(), grads):
            w.copy_(slow_update(args.optimizer, w, g, states.setdefault(name, {}), lr, args, mistake))
    if mistake not in ("average before keys", "average before the step"):
        average()
        if mistake == "averaged twice":
            average()
    return loss.detach(), q1.detach()


STEP = "--recipe imagenet --batch-size 512 --base-lr 0.02"
EPOCHS, MOMENTA = (0.0, 10.3, 100.3), (0.9, 0.5, 0.99)


def fresh(args, options):
    torch.manual_seed(0)
    encoder = tiny_encoder(args.patch_projection, position=args.position)
    return tiny_model(encoder=encoder, **dict(options))


@functools.cache
def trained(flags, options):
    """What three steps of train_step give, and the checkpoint after them."""
    args = parse(*flags.split(), dtype=DOUBLE)
    model, results = fresh(args, options), []
    optimizer = moco_v3.build_optimizer(model, args)
    for i, (epoch, m) in enumerate(zip(EPOCHS, MOMENTA)):
        results.append(moco_v3.train_step(model, optimizer, *views(seed=10 + i), epoch, m, args))
    assert not any(x.requires_grad for result in results for x in result)
    return results, model.state_dict()


def run_both(flags="", options=(), mistake=""):
    """Three steps of train_step and of the oracle; the largest difference in the checkpoint."""
    flags = f"{STEP} {flags}"
    args = parse(*flags.split(), dtype=DOUBLE)
    twin, states = fresh(args, options), {}
    results, ours = trained(flags, options)
    for i, (epoch, m) in enumerate(zip(EPOCHS, MOMENTA)):
        at = math.floor(epoch) if mistake == "lr per epoch" else epoch
        share = at / 40 if at < 40 else (1 + math.cos(math.pi * (at - 40) / 260)) / 2
        loss, q1 = slow_step(twin, states, *views(seed=10 + i), share, m, args, mistake)
        if not mistake:
            assert float(results[i][0]) == pytest.approx(loss.item(), abs=1e-9)
            torch.testing.assert_close(results[i][1], q1, rtol=0, atol=1e-7)
    theirs = twin.state_dict()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.mark.parametrize("flags, options", [
    ("", ()), ("--optimizer lars --base-lr 5 --weight-decay 0.01", ()), ("--optimizer lamb", ()),
    ("--patch-projection learned --position learned --temperature 1", ()),
    ("", (("predictor", "none"),)), ("", (("bn", "none"),)),
    ("", (("projector_layers", 2), ("predictor_output_bn", False)))])
def test_train_step_equals_algorithm_1_written_out(flags, options):
    assert run_both(flags, options) < 1e-7


@pytest.mark.parametrize("mistake", [
    "average before keys", "average before the step", "averaged twice", "projector not averaged",
    "statistics averaged", "keys predicted", "keys in eval mode", "views together", "same view",
    "halved", "without 2 tau", "one direction", "gradient clipped", "no decay of vectors",
    "decay in the gradient", "lr per epoch"])
def test_algorithm_1_written_out_tells_mistakes_apart(mistake):
    # Adam forgives a factor
    flags = "--optimizer lars --base-lr 5" if mistake in ("halved", "without 2 tau") else ""
    assert run_both(flags, mistake=mistake) > 1e-5


def test_a_step_with_the_next_momentum_makes_the_keys_of_the_authors_order():  # sheet 1
    """Theirs: average with m(t), then keys. Ours: keys, step, then average with m(t + 1)."""
    args = parse(*STEP.split(), "--ema-momentum", 0.5, dtype=DOUBLE)
    ours, official = tiny_model(), tiny_model()
    optimizers = [moco_v3.build_optimizer(model, args) for model in (ours, official)]
    shifted, unshifted = [], []
    times = [(t, 10 + 60 * t) for t in range(5)]

    def official_step(t, epoch):
        with torch.no_grad():
            for _, online, target in pairs(official):
                m = moco_v3.momentum_schedule(epoch, args)
                target.copy_(m * target + (1 - m) * online)
        return moco_v3.train_step(official, optimizers[1], *views(seed=t), epoch, 1.0, args)[0]

    theirs = [official_step(t, epoch).item() for t, epoch in times]
    for t, epoch in times:
        m = moco_v3.momentum_schedule(epoch + 60, args)
        loss = moco_v3.train_step(ours, optimizers[0], *views(seed=t), epoch, m, args)[0]
        shifted.append(loss.item())
    assert shifted == pytest.approx(theirs, abs=1e-9)
    other = tiny_model()
    optimizer = moco_v3.build_optimizer(other, args)
    for t, epoch in times:
        m = moco_v3.momentum_schedule(epoch, args)
        loss = moco_v3.train_step(other, optimizer, *views(seed=t), epoch, m, args)[0]
        unshifted.append(loss.item())
    assert max(abs(a - b) for a, b in zip(unshifted, theirs)) > 1e-4


def test_first_step_has_lr_0_and_one_step_moves_every_trainable_weight():
    args = parse("--recipe", "imagenet", "--weight-decay", 0)  # so that only gradients move weights
    model = tiny_model(torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = moco_v3.build_optimizer(model, args)
    moco_v3.train_step(model, optimizer, *views(dtype=torch.float32), 0.0, 0.5, args)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    moco_v3.train_step(model, optimizer, *views(dtype=torch.float32), 40.0, 0.5, args)
    for name, online, target in pairs(model):
        assert torch.equal(online, before[name]) != online.requires_grad, name
        assert torch.equal(target, before[name]) != online.requires_grad, name  # once, and now
    for name, p in model.predictor.named_parameters(prefix="predictor"):
        assert not torch.equal(p, before[name]), name


def test_update_happens_exactly_once_per_step(monkeypatch):
    args, model, momenta = parse("--recipe", "imagenet"), tiny_model(torch.float32), []
    optimizer = moco_v3.build_optimizer(model, args)
    update, step, order = MoCoV3.update_momentum_encoder, optimizer.step, []
    monkeypatch.setattr(MoCoV3, "update_momentum_encoder", lambda self, m: (
        order.append("average"), momenta.append(m), update(self, m))[2])
    optimizer.step = lambda *args: (order.append("step"), step(*args))[1]
    forward = model.momentum_encoder.register_forward_hook(lambda *_: order.append("key"))
    for m in (0.9, 0.3):
        moco_v3.train_step(model, optimizer, *views(dtype=torch.float32), 50.0, m, args)
    forward.remove()
    assert order == ["key", "key", "step", "average"] * 2 and momenta == [0.9, 0.3]
    with torch.no_grad():  # a forward pass alone changes no weight
        before = [p.clone() for p in model.parameters()]
        model(*views(dtype=torch.float32))
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_bfloat16_step_keeps_loss_and_weights_in_float32(monkeypatch):
    args, calls = parse("--recipe", "imagenet"), []
    monkeypatch.setattr(moco_v3, "contrastive_loss", lambda q, k, t: (
        calls.append((q, k, contrastive_loss(q, k, t))), calls[-1][2])[1])
    args.precision, args.dtype = "bf16", torch.bfloat16
    model = tiny_model(torch.float32)
    optimizer = moco_v3.build_optimizer(model, args)
    loss, *_, norms = moco_v3.train_step(model, optimizer, *views(dtype=torch.float32), 1.0, 0.9, args)
    assert loss.dtype == torch.float32 and loss.isfinite() and norms.isfinite().all()
    assert len(calls) == 2
    for q, k, term in calls:  # design: losses in float32 at least
        assert term.item() == pytest.approx(slow_loss(q.detach(), k, 0.2), abs=1e-6)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------------- Sec. 4: the first layer


def build(patch_projection, dtype=DOUBLE, *flags):
    args = parse("--recipe", "demo", "--patch-projection", patch_projection, "--image-size", 8,
                 "--patch-size", 4, "--base-lr", 0.1, *flags, dtype=dtype)
    torch.manual_seed(0)
    return tiny_model(dtype, encoder=moco_v3.build_encoder(args)), args


def raw_gradients(model, x1, x2, args):
    """By name, of the loss alone."""
    twin = copy.deepcopy(model)
    q1, q2, k1, k2, _ = twin(x1, x2)
    loss = ctr(q1, k2, args.temperature) + ctr(q2, k1, args.temperature)
    named = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()))))


def norm_of(gradients, *prefixes):
    chosen = [g for name, g in gradients.items() if name.startswith(prefixes)]
    assert chosen
    return math.sqrt(sum(g.pow(2).sum().item() for g in chosen))


@pytest.mark.parametrize("patch_projection", ["frozen", "learned", "batchnorm", "weightnorm"])
def test_gradient_norms_are_those_of_first_and_last_layer(patch_projection):  # Fig. 4
    model, args = build(patch_projection)
    x1, x2 = views()
    gradients = raw_gradients(model, x1, x2, args)
    first = "encoder.blocks.0.attn.qkv." if patch_projection == "frozen" else "encoder.patch_embed."
    expected = norm_of(gradients, first), norm_of(gradients, "encoder.blocks.2.")
    optimizer = moco_v3.build_optimizer(model, args)
    norms = moco_v3.train_step(model, optimizer, x1, x2, 2.0, 0.9, args)[3]
    assert norms.shape == (2,) and norms.tolist() == pytest.approx(expected, rel=1e-9)
    assert min(expected) > 1e-3 and abs(expected[0] - expected[1]) > 1e-3


def test_gradient_norms_of_a_resnet_are_those_of_its_first_convolution_and_last_block():
    args = parse("--recipe", "imagenet-r50-100", dtype=DOUBLE)
    model = tiny_model(encoder=resnet(10, 0.125, small_images=True))
    x1, x2 = views()
    gradients = raw_gradients(model, x1, x2, args)
    optimizer = moco_v3.build_optimizer(model, args)
    norms = moco_v3.train_step(model, optimizer, x1, x2, 2.0, 0.9, args)[3]
    expected = norm_of(gradients, "encoder.conv1."), norm_of(gradients, "encoder.layer4.0.")
    assert norms.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e6])
def test_clipping_shortens_the_gradient_of_the_patch_projection_alone(clip):  # sheet 6
    model, args = build("learned", DOUBLE, "--clip-patch-grad", clip)
    x1, x2 = views()
    raw = raw_gradients(model, x1, x2, args)
    optimizer = moco_v3.build_optimizer(model, args)
    seen, step = {}, optimizer.step

    def record(*rest):
        seen.update({name: p.grad.clone() for name, p in model.named_parameters()
                     if p.grad is not None})
        return step(*rest)

    optimizer.step = record
    norms = moco_v3.train_step(model, optimizer, x1, x2, 2.0, 0.9, args)[3]
    first = norm_of(raw, "encoder.patch_embed.")
    factor = clip / first if clip and clip < first else 1.0
    assert first > 0.1 and (factor < 1) == (clip == 0.05)
    for name, g in raw.items():
        expected = g * factor if "patch_embed" in name else g
        torch.testing.assert_close(seen[name], expected, rtol=1e-5, atol=1e-12, msg=name)
    assert norms[0].item() == pytest.approx(first, rel=1e-6)  # as it was: the spike must show


@pytest.mark.parametrize("patch_projection", ["frozen", "learned", "batchnorm", "weightnorm"])
def test_every_patch_projection_trains(patch_projection):
    model, args = build(patch_projection, torch.float32)
    optimizer = moco_v3.build_optimizer(model, args)
    before = copy.deepcopy(model.state_dict())
    for i in range(3):
        x1, x2 = views(dtype=torch.float32, seed=i)
        assert moco_v3.train_step(model, optimizer, x1, x2, 2.0, 0.9, args)[0].isfinite()
    patch = [name for name, p in model.named_parameters() if "encoder.patch_embed." in name]
    tensors = {"frozen": 2, "learned": 2, "batchnorm": 4, "weightnorm": 3}[patch_projection]
    assert len(patch) == 2 * tensors
    for name in patch:  # in both encoders
        same = torch.equal(before[name], model.state_dict()[name])
        assert same == (patch_projection == "frozen"), name
    fixed = ("encoder.pos_embed", "momentum_encoder.pos_embed")
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in fixed)
    assert not torch.equal(before["encoder.cls_token"], model.state_dict()["encoder.cls_token"])


def test_variants_of_the_patch_projection_are_the_papers():  # Sec. 4.2: BN, WeightNorm
    x = views(dtype=torch.float32)[0]
    learned, normed, weighted = (build(name, torch.float32)[0].encoder.eval()
                                 for name in ("learned", "batchnorm", "weightnorm"))
    assert isinstance(normed.patch_embed.norm, nn.BatchNorm2d) and normed.patch_embed.norm.affine
    assert nn.utils.parametrize.is_parametrized(weighted.patch_embed.proj, "weight")
    torch.testing.assert_close(weighted(x), learned(x), rtol=0, atol=1e-5)  # at its start
    weights = weighted.patch_embed.proj.parametrizations.parameters()
    shapes = sorted(tuple(p.shape) for p in weights)
    assert shapes == [(96, 1, 1, 1), (96, 3, 4, 4)]  # length, direction
    normed.train()
    grid = []
    normed.patch_embed.norm.register_forward_hook(lambda m, i, o: grid.append((i[0], o)))
    normed(x)
    (before, after), = grid
    assert before.shape == (6, 96, 2, 2)
    assert after.mean((0, 2, 3)).abs().max() < 1e-5 and (after.var((0, 2, 3)) - 1).abs().max() < 0.1


# ------------------------------------------------------------------------------------ augmentation


def oracle_view(image, u, args, view, order="blur, solarise"):
    """Sheet 3 for one image. u: 9 for the jitter, 1 for the grayscale, 2 for blur, 1 for solarise."""
    def blur(image):
        if u[10] >= (1.0, 0.1)[view]:
            return image
        taps, sigma = 2 * (image.shape[-1] // 20) + 1, 0.1 + 1.9 * u[11]
        return TF.gaussian_blur(image, [taps, taps], [sigma, sigma])

    def solarise(image):
        return TF.solarize(image, 128 / 255) if u[12] < (0.0, 0.2)[view] else image

    image = torchvision_jitter(image, u[:9], (0.4, 0.4, 0.2, 0.1), 0.8)
    if u[9] < 0.2:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    image = solarise(blur(image)) if order == "blur, solarise" else blur(solarise(image))
    return TF.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def far_from_threshold(y, expected):
    """Where rounding cannot decide whether a pixel is solarised: nearly everywhere."""
    close = (y - expected).abs().amax(1, keepdim=True) < 1e-3
    assert close.float().mean() > 0.999
    return torch.where(close, y - expected, torch.zeros(()))


@pytest.mark.parametrize("view", [0, 1])
def test_views_equal_torchvisions_chain(view):  # order and probabilities of sheet 3
    args = parse("--recipe", "imagenet")
    x, u = uniform(64, 3, 40, 40, seed=2).float(), uniform(64, moco_v3.COLOUR_DRAWS, seed=3)
    assert moco_v3.COLOUR_DRAWS == 13
    u[:8, 10], u[:8, 12] = 0.0, 0.1  # both of the rare ones, so that their order counts
    before = x.clone()
    ours = moco_v3.augment(x, u, args, view)
    assert torch.equal(x, before) and torch.equal(ours, moco_v3.augment(x, u, args, view))
    rows = list(zip(x, u.tolist()))
    expected = torch.stack([oracle_view(image, row, args, view) for image, row in rows])
    assert far_from_threshold(ours, expected).abs().max() < 1e-4
    other = torch.stack([oracle_view(image, row, args, 1 - view) for image, row in rows])
    assert (ours - other).abs().amax((1, 2, 3)).gt(1e-2).float().mean() > 0.5
    if view:
        swapped = torch.stack([oracle_view(*row, args, 1, "solarise, blur") for row in rows])
        assert (ours - swapped)[:8].abs().max() > 0.1


@pytest.mark.parametrize("view, blurs, solarises", [(0, 1.0, 0.0), (1, 0.1, 0.2)])
def test_rates_differ_by_view_as_in_byol(view, blurs, solarises):  # sheet 3
    args = parse("--recipe", "imagenet", "--batch-size", 3000, "--mean", 0, 0, 0, "--std", 1, 1, 1)
    u = moco_v3.draw_step(args, 3000, 0, 2)[2][:, view].clone()
    u[:, 0], u[:, 9] = 0.99, 0.99  # neither jitter nor grayscale
    x = torch.zeros(3000, 3, 20, 20)
    x[..., 10:] = 1.0
    y = moco_v3.augment(x, u, args, view)
    solarised = y[:, 0, 10, -1] < 0.5
    row = y[:, 0, 10]
    blurred = ((row > 1e-4) & (row < 1 - 1e-4)).any(1)  # shows for sigma from .233 on
    shown = blurs * (1 - (0.233 - 0.1) / 1.9)
    for applied, rate in ((solarised, solarises), (blurred, shown)):
        error = math.sqrt(rate * (1 - rate) / 3000)
        assert applied.double().mean().item() == pytest.approx(rate, abs=4 * error + 1e-9)
    assert not (y[:, 0, 10, 0] > 0.5).any()  # black is never inverted


def test_blur_of_the_first_view_ignores_its_draw_and_the_second_solarises_alone():
    args = parse("--recipe", "imagenet")
    x, u = uniform(2, 3, 40, 40).float(), torch.full((2, 13), 0.999, dtype=DOUBLE)
    u[1, 12] = 0.0
    first, second = (moco_v3.augment(x, u, args, view) for view in (0, 1))
    plain = TF.normalize(x, list(args.mean), list(args.std))
    blurred = TF.normalize(TF.gaussian_blur(x, [5, 5], [1.998, 1.998]), list(args.mean), list(args.std))
    solarised = TF.normalize(TF.solarize(x, 128 / 255), list(args.mean), list(args.std))
    torch.testing.assert_close(first, blurred, rtol=0, atol=1e-4)
    torch.testing.assert_close(second[0], plain[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(second[1], solarised[1], rtol=0, atol=1e-5)


def test_solarise_inverts_from_level_128_on():  # PIL's threshold
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 3, 1, 256)
    x, u = levels.float() / 255, torch.tensor([0.0, 0.1999, 0.2], dtype=DOUBLE)
    y = (moco_v3.solarize(x, u, 0.2) * 255).round().to(torch.uint8)
    expected = TF.solarize(levels, 128)
    assert expected[0, 0, 0, 127] == 127 and expected[0, 0, 0, 128] == 127
    assert torch.equal(y[:2], expected[:2]) and torch.equal(y[2], levels[2])
    assert torch.equal(moco_v3.solarize(x, u, 0.0), x)
    mixed = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))  # each channel alone
    torch.testing.assert_close(moco_v3.solarize(mixed, torch.zeros(1), 1.0),
                               TF.solarize(mixed, 128 / 255))


# ------------------------------------------------------------------------------------------ recipes

VIT_S = dict(  # sheet 4.1, 2.6, 3
    arch="vit_small", heads=0, patch_size=16, stem="patch", mlp_norm="layer", position="sincos",
    pooling="class", patch_projection="frozen",
    projector_layers=3, hidden_dim=4096, dim=256, predictor="mlp", predictor_output_bn=True,
    bn="default",
    optimizer="adamw", epochs=300, batch_size=4096, base_lr=1.5e-4, warmup_epochs=40, weight_decay=0.1,
    temperature=0.2, ema_momentum=0.99, ema_schedule="cosine", clip_patch_grad=0,
    image_size=224, crop_min=0.08, jitter=(0.4, 0.4, 0.2, 0.1), jitter_prob=0.8, gray_prob=0.2,
    blur_prob=(1.0, 0.1), solarize_prob=(0.0, 0.2),
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), knn_k=200, knn_temperature=0.07)
R50 = {**{name: VIT_S[name] for name in (
    "hidden_dim", "dim", "predictor", "bn", "batch_size", "ema_schedule", "image_size", "jitter",
    "jitter_prob", "gray_prob", "blur_prob", "solarize_prob", "mean", "std", "clip_patch_grad")},
    **dict(arch="resnet50", width=1, small_images=False, zero_init_residual=True,
           patch_projection="learned", projector_layers=2, predictor_output_bn=False,
           optimizer="lars", momentum=0.9, epochs=100,
           base_lr=0.6, weight_decay=1e-6, warmup_epochs=10, temperature=1.0, ema_momentum=0.99,
           crop_min=0.2)}
R50_300 = {**R50, "epochs": 300, "base_lr": 0.3}
R50_1000 = {**R50, "epochs": 1000, "base_lr": 0.3, "weight_decay": 1.5e-6, "ema_momentum": 0.996}
PROBE = dict(optimizer="sgd", momentum=0.9, weight_decay=0, epochs=90, batch_size=1024,  # sheet 4.2
             crop_min=0.08, image_size=224, mean=VIT_S["mean"], std=VIT_S["std"])
PROBE_VIT, PROBE_R50 = {**PROBE, "base_lr": 3}, {**PROBE, "base_lr": 0.1}


@pytest.mark.parametrize("flags, expected", [
    ("--recipe imagenet", VIT_S), ("--data /data/imagenet", VIT_S),
    ("--recipe imagenet --arch vit_base", {**VIT_S, "arch": "vit_base"}),
    ("--data /data/imagenet --arch vit_large", {**VIT_S, "arch": "vit_large"}),
    ("--data /data/imagenet --batch-size 1024", {**VIT_S, "batch_size": 1024}),
    ("--recipe imagenet-r50-100", R50), ("--recipe imagenet-r50-300", R50_300),
    ("--recipe imagenet-r50-1000", R50_1000), ("--data /data/imagenet --arch resnet50", R50),
    ("linear --init x --recipe imagenet", PROBE_VIT), ("linear --init x --data /imagenet", PROBE_VIT),
    ("linear --init x --recipe imagenet-r50-100", PROBE_R50),
    ("linear --init x --recipe imagenet-r50-1000", PROBE_R50),
    ("linear --init x --data /imagenet --arch resnet50", PROBE_R50)])
def test_recipes_are_the_authors(flags, expected):
    assert_fields(parse(*flags.split()), expected)


@pytest.mark.parametrize("recipe", ["cifar", "cifar-resnet", "demo"])
def test_small_recipes_keep_the_method(recipe):
    args = parse("--recipe", recipe)
    method = VIT_S if args.arch.startswith("vit") else R50
    assert_fields(args, {name: method[name] for name in (
        "predictor", "bn", "predictor_output_bn", "projector_layers", "optimizer", "ema_schedule",
        "jitter", "jitter_prob", "gray_prob", "patch_projection", "clip_patch_grad")})
    assert args.image_size == 32 and args.blur_prob == (0, 0)  # sheet 3: drop it at 32 px


def test_recipes_build_their_backbones():  # sheet 8, trap 9
    for flags, size, patch in (("--recipe imagenet", "small", 16), ("--recipe cifar", "tiny", 4)):
        encoder = moco_v3.build_encoder(parse(*flags.split()))
        assert encoder.feature_dim == VITS[size][0] and len(encoder.blocks) == VITS[size][1]
        assert encoder.patch_embed.proj.kernel_size == (patch, patch)
        assert not encoder.patch_embed.proj.weight.requires_grad
    args = parse("--recipe", "imagenet-r50-100")
    encoder = moco_v3.build_encoder(args)
    assert encoder.feature_dim == 2048 and not any(b.bn3.weight.any() for b in encoder.layer4)


def test_a_recipe_of_the_other_family_is_refused(tmp_path, capsys):  # sheet 8, trap 3
    for flags in ("--recipe imagenet --arch resnet50", "--recipe imagenet-r50-100 --arch vit_small",
                  "--recipe cifar --arch resnet18", "--recipe cifar-resnet --arch vit_tiny"):
        assert moco_v3.main([*flags.split(), "--data", "demo", "--out", str(tmp_path)]) == 2
        sentence = capsys.readouterr().err
        assert "recipe" in sentence and sentence.count("\n") == 1


# --------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder of two classes, eight training images of 16 px each."""
    root = tmp_path_factory.mktemp("toy")
    for split, n in (("train", 8), ("val", 2)):
        for k, name in enumerate("ab"):
            write_images(root / split / name, n, seed=10 * k + n, size=(16, 16), kind="png")
    return root


RUN = ["--recipe", "demo", "--image-size", 16, "--patch-size", 8, "--dim", 8, "--hidden-dim", 16,
       "--batch-size", 8, "--epochs", 3, "--warmup-epochs", 1, "--base-lr", 0.005,
       "--ema-momentum", 0.9, "--workers", 0, "--log-every", 1]


def test_a_run_passes_the_next_momentum_and_the_two_views(toy, tmp_path, monkeypatch):
    steps, seen = [], []
    step, augment = moco_v3.train_step, moco_v3.augment

    def record(model, optimizer, x1, x2, epoch, m, args):
        steps.append((epoch, m, x1.shape, x2.shape, torch.equal(x1, x2)))
        return step(model, optimizer, x1, x2, epoch, m, args)

    monkeypatch.setattr(moco_v3, "train_step", record)
    monkeypatch.setattr(moco_v3, "augment", lambda x, u, args, view: (
        seen.append((view, len(x))), augment(x, u, args, view))[1])
    assert main(*RUN, "--data", toy, "--out", tmp_path, "--knn-every-steps", 2) == 0
    assert [epoch for epoch, *_ in steps] == pytest.approx([t / 2 for t in range(6)])
    expected = [1 - 0.1 * (1 + math.cos(math.pi * (t + 1) / 6)) / 2 for t in range(6)]
    assert [m for _, m, *_ in steps] == pytest.approx(expected, abs=1e-9)  # the module's docstring
    assert all(a == b == (8, 3, 16, 16) and not same for *_, a, b, same in steps)
    whole = [view for view, n in seen if n == 8]
    assert whole.count(0) == whole.count(1) >= 6
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    chance, floor = chance_and_floor(8, 0.2)
    losses = [line for line in lines if "loss" in line]
    assert len(losses) == 6
    for line, (_, m, *_) in zip(losses, steps):
        assert line["chance"] == pytest.approx(chance) and line["floor"] == pytest.approx(floor)
        assert line["loss"] > floor and line["grad_first"] > 0 and line["grad_last"] > 0
        assert line["m"] == pytest.approx(m)
    assert losses[0]["lr"] == 0 and losses[2]["lr"] == pytest.approx(0.005 * 8 / 256)
    assert [line["step"] for line in lines if "knn_queue" in line] and [
        line for line in lines if "knn" in line]
    assert [line for line in lines if "dip" in line]
    state = torch.load(tmp_path / "last.pt")["model"]
    assert any(name.startswith("momentum_encoder.") for name in state)  # the target in the checkpoint


def test_the_largest_gradient_norm_since_the_last_line_is_logged(toy, tmp_path, monkeypatch):
    step, norms = moco_v3.train_step, iter([3.0, 50.0, 2.0, 1.0, 7.0, 4.0])

    def spiky(*args):
        loss, q1, h1, norm = step(*args)
        n = next(norms)
        return loss, q1, h1, torch.tensor([n, 2 * n])

    monkeypatch.setattr(moco_v3, "train_step", spiky)
    flags = [*RUN, "--log-every", 3, "--knn-every", 0, "--data", toy, "--out", tmp_path]
    assert main(*flags) == 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    lines = [(line["grad_first"], line["grad_last"]) for line in lines if "grad_first" in line]
    assert max(lines) == (50.0, 100.0) and (7.0, 14.0) in lines  # no spike is lost


# -------------------------------------------------------------------------- the authors' checkpoints


def official(arch, seed=0):
    """A made-up checkpoint in their layout (sheet 7): random rows, expanded, so that it is small."""
    g = torch.Generator().manual_seed(seed)
    head, state = "head" if arch.startswith("vit") else "fc", {}
    for name, x in on_meta(arch).state_dict().items():
        name = re.sub(r"^(momentum_)?projector", rf"\1encoder.{head}", name)
        name = "module." + re.sub(r"^encoder", "base_encoder", name)
        if name.endswith("pos_embed"):
            table = sincos_table(14, 14, x.shape[-1])
            x = torch.cat([torch.zeros(1, x.shape[-1]), table])[None]
        elif x.is_floating_point():
            row = torch.rand(x.shape[-1:], generator=g)
            x = (row + 0.5 if "running_var" in name else row - 0.5).expand(x.shape)
        else:
            x = torch.tensor(7)
        state[name] = x
    return {"epoch": 300, "arch": arch, "state_dict": state, "optimizer": {"state": {}}, "scaler": {}}


def linear_file(file):
    """Their linear-*.pth.tar: backbone and classifier (sheet 7)."""
    head = "fc" if file["arch"] == "resnet50" else "head"
    state = {name.replace("base_encoder.", ""): x for name, x in file["state_dict"].items()
             if name.startswith("module.base_encoder.") and f".{head}." not in name}
    state[f"module.{head}.weight"] = torch.ones(1).expand(1000, 384)
    state[f"module.{head}.bias"] = torch.ones(1000)
    return {"epoch": 90, "arch": file["arch"], "state_dict": state, "best_acc1": torch.tensor(73.2),
            "optimizer": {}}


@pytest.mark.parametrize("arch, keys", [("vit_small", 342), ("vit_base", 342), ("resnet50", 663),
                                        ("vit_conv_small", None)])
def test_official_names_become_ours(arch, keys):  # sheet 7
    file = official(arch)
    assert keys is None or len(file["state_dict"]) == keys
    if arch == "vit_small":
        shapes = {name: tuple(x.shape) for name, x in file["state_dict"].items()}
        assert shapes["module.base_encoder.head.6.weight"] == (256, 4096)
        assert shapes["module.momentum_encoder.head.7.running_mean"] == (256,)
        assert shapes["module.predictor.4.running_var"] == (256,)
        assert "module.base_encoder.head.7.weight" not in shapes
    if arch == "resnet50":
        assert file["state_dict"]["module.base_encoder.fc.3.weight"].shape == (256, 4096)
        assert "module.predictor.4.running_mean" not in file["state_dict"]
    ours = {name: tuple(x.shape) for name, x in on_meta(arch).state_dict().items()}
    state, settings = moco_v3.read_official(file)
    assert {name: tuple(x.shape) for name, x in state.items()} == ours
    for part, theirs in (("encoder", "base_encoder"), ("momentum_encoder", "momentum_encoder")):
        name = "conv1.weight" if arch == "resnet50" else "blocks.3.mlp.fc1.weight"
        assert torch.equal(state[f"{part}.{name}"], file["state_dict"][f"module.{theirs}.{name}"])
    assert settings["arch"] == arch.replace("conv_", "")
    if arch != "resnet50":
        assert settings["stem"] == ("conv" if "conv" in arch else "patch")
        assert settings["heads"] == 12 and settings["position"] == "sincos"
        assert settings["pooling"] == "class" and settings["patch_size"] == 16


@pytest.mark.parametrize("arch", ["vit_small", "resnet50"])
def test_official_names_without_module_become_ours_too(arch):  # sheet 7: "with/without module."
    file = official(arch)
    bare = {name.removeprefix("module."): x for name, x in file["state_dict"].items()}
    with_prefix, without = (moco_v3.read_official({**file, "state_dict": state})
                            for state in (file["state_dict"], bare))
    assert with_prefix[1] == without[1] and with_prefix[0].keys() == without[0].keys()


def test_their_linear_checkpoints_are_backbones():
    for arch in ("vit_small", "resnet50"):
        file = official(arch)
        state, settings = moco_v3.read_official(linear_file(file))
        backbone = {f"encoder.{name}" for name in on_meta(arch).encoder.state_dict()}
        assert {f"encoder.{name.removeprefix('encoder.')}" for name in state} == backbone
        assert settings["arch"] == arch


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints in the authors' layout, right and wrong."""
    root = tmp_path_factory.mktemp("official")
    small, mini = official("vit_small"), official("vit_mini")
    right = {"small": small, "mini": mini, "r50": official("resnet50"), "linear": linear_file(small),
             "conv": official("vit_conv_small")}
    state, table = mini["state_dict"], mini["state_dict"]["module.base_encoder.pos_embed"]
    gone = "module.base_encoder.blocks.1.attn.qkv.bias"
    wrong = {
        "mae": {**state, "module.base_encoder.pos_embed": torch.cat(
            [table[..., 48:], table[..., :48]], -1)},
        "missing": {name: x for name, x in state.items() if name != gone},
        "unexpected": {**state, "module.base_encoder.blocks.3.norm1.weight": torch.ones(96)},
        "shape": {**state, gone: torch.ones(96)},
        "headless": {name: x for name, x in state.items() if ".head.4." not in name},
    }
    for name, file in right.items():
        torch.save(file, root / f"{name}.pth.tar")
    for name, broken in wrong.items():
        torch.save({**mini, "state_dict": broken}, root / f"{name}.pth.tar")
    torch.save({**mini, "arch": "vit_giant"}, root / "giant.pth.tar")
    torch.save({"state_dict": state}, root / "anonymous.pth.tar")
    whole = (root / "small.pth.tar").read_bytes()
    (root / "truncated.pth.tar").write_bytes(whole[:len(whole) // 2])
    return root


def loaded(path):
    return torch.load(path / "encoder.pt")


@pytest.mark.parametrize("which, part", [("encoder", "base_encoder"), ("momentum_encoder",) * 2])
def test_export_takes_the_encoder_that_was_asked_for(which, part, files, tmp_path):
    flags = [] if which == "encoder" else ["--init-encoder", which]
    assert main("export", "--init", files / "mini.pth.tar", "--out", tmp_path, *flags) == 0
    state = torch.load(files / "mini.pth.tar")["state_dict"]
    ours = loaded(tmp_path)
    assert len(ours) == len(vit("mini").state_dict())
    for name, x in ours.items():
        assert torch.equal(x, state[f"module.{part}.{name}"]), name
    assert not torch.equal(ours["norm.bias"], state["module.{}.norm.bias".format(
        {"base_encoder": "momentum_encoder", "momentum_encoder": "base_encoder"}[part])])


def test_exported_small_loads_strictly_into_timm_with_12_heads(files, tmp_path, capsys):
    assert main("export", "--init", files / "small.pth.tar", "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert "12" in out and "6" in out and "num_heads" in out and "timm" in out  # sheet 8, trap 9
    about = json.loads((tmp_path / "encoder.json").read_text())
    assert about["arch"] == "vit_small" and about["heads"] == 12 and about["image_size"] == 224
    assert about["feature_dim"] == 384
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=12)
    model.load_state_dict(loaded(tmp_path), assign=True)  # strictly


def test_the_input_of_an_official_file_is_imagenets(files, tmp_path):  # sheet 3
    assert main("export", "--init", files / "mini.pth.tar", "--out", tmp_path) == 0
    about = json.loads((tmp_path / "encoder.json").read_text())
    assert about["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert about["std"] == pytest.approx([0.229, 0.224, 0.225])


def test_where_timms_heads_match_nothing_is_said(files, tmp_path, capsys):
    torch.save(official("vit_tiny"), tmp_path / "tiny.pth.tar")
    assert main("export", "--init", tmp_path / "tiny.pth.tar", "--out", tmp_path) == 0
    assert "num_heads" not in capsys.readouterr().out


def test_resnet_and_linear_files_export(files, tmp_path):
    assert main("export", "--init", files / "r50.pth.tar", "--out", tmp_path / "r50") == 0
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    model.fc = nn.Identity()
    model.load_state_dict(loaded(tmp_path / "r50"), assign=True)
    state = torch.load(files / "r50.pth.tar")["state_dict"]
    assert torch.equal(loaded(tmp_path / "r50")["conv1.weight"],
                       state["module.base_encoder.conv1.weight"])
    assert main("export", "--init", files / "linear.pth.tar", "--out", tmp_path / "linear") == 0
    small = torch.load(files / "small.pth.tar")["state_dict"]
    for name, x in loaded(tmp_path / "linear").items():
        assert torch.equal(x, small[f"module.base_encoder.{name}"]), name


def test_a_file_with_a_convolutional_stem_exports_without_a_flag(files, tmp_path):
    assert main("export", "--init", files / "conv.pth.tar", "--out", tmp_path) == 0
    assert "patch_embed.proj.12.weight" in loaded(tmp_path)
    assert json.loads((tmp_path / "encoder.json").read_text())["stem"] == "conv"


REFUSED = {  # file, flags, what the sentence must name
    "another architecture": ("small", "--arch vit_base", ["--arch vit_base", "vit_small"]),
    "another family": ("small", "--arch resnet50", ["resnet50", "vit_small"]),
    "a vit for resnet50": ("r50", "--arch vit_small", ["vit_small", "resnet50"]),
    "6 heads": ("small", "--heads 6", ["--heads 6", "12"]),
    "learned positions": ("mini", "--position learned", ["--position learned", "sincos"]),
    "another stem": ("small", "--stem conv", ["--stem conv"]),
    "MAE's table": ("mae", "", ["pos_embed", "sin-cos"]),
    "truncated": ("truncated", "", ["truncated.pth.tar", "cannot be loaded"]),
    "missing key": ("missing", "", ["Missing key", "blocks.1.attn.qkv.bias"]),
    "unexpected key": ("unexpected", "", ["blocks.3.norm1.weight"]),
    "another shape": ("shape", "", ["blocks.1.attn.qkv.bias"]),
    "unknown architecture": ("giant", "", ["giant"]),
    "no architecture": ("anonymous", "", ["anonymous.pth.tar"]),
    "no momentum encoder": ("linear", "--init-encoder momentum_encoder", ["linear.pth.tar"]),
}


@pytest.fixture(scope="module")
def sentences():
    return {}


@pytest.mark.parametrize("stage, case", [("export", case) for case in REFUSED] + [
    ("linear", case) for case in ("MAE's table", "missing key", "6 heads", "another family")])
def test_a_file_that_does_not_fit_is_refused_with_its_own_sentence(stage, case, files, toy, sentences,
                                                                       tmp_path, capsys):
    name, flags, words = REFUSED[case]
    out = tmp_path / "out"
    extra = ["--data", toy, "--recipe", "imagenet-r50-100" if name == "r50" else "imagenet",
             "--batch-size", 4] if stage == "linear" else []
    if stage == "linear" and "--arch" in flags:
        extra = extra[:2]
    assert main(stage, "--init", files / f"{name}.pth.tar", *flags.split(), *extra, "--out", out) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in captured.err, captured.err
    same = [other for other, line in sentences.items() if line == lines[0].replace(name, "FILE")]
    assert same in ([], [case]), "each its own sentence"
    sentences[case] = lines[0].replace(name, "FILE")
    for word in words:
        assert word in lines[0]
    assert not (out / "encoder.pt").exists()


def test_linear_evaluation_of_an_official_file_keeps_the_backbone(files, toy, tmp_path):
    assert main("linear", "--init", files / "mini.pth.tar", "--data", toy, "--recipe", "imagenet",
                "--epochs", 1, "--batch-size", 8, "--workers", 0, "--precision", "fp32",
                "--out", tmp_path) == 0
    state = torch.load(files / "mini.pth.tar")["state_dict"]
    ours = {name: x for name, x in torch.load(tmp_path / "last.pt")["model"].items()
            if name.startswith("encoder.")}
    assert len(ours) == len(vit("mini").state_dict())
    for name, x in ours.items():
        assert torch.equal(x, state[f"module.base_encoder.{name.removeprefix('encoder.')}"]), name


def no_step(monkeypatch):
    """train_step in zero time, changing nothing."""
    monkeypatch.setattr(moco_v3, "train_step", lambda model, optimizer, x1, x2, *_: (
        torch.ones(()), torch.randn(len(x1), 256), torch.randn(len(x1), 96), torch.ones(2)))


PRETRAIN = ["--recipe", "imagenet", "--batch-size", 4, "--steps", 1, "--knn-every", 0, "--workers", 0,
            "--precision", "fp32"]


def test_pretraining_goes_on_from_an_official_file(files, toy, tmp_path, monkeypatch):
    no_step(monkeypatch)
    assert main(*PRETRAIN, "--init", files / "mini.pth.tar", "--data", toy, "--out", tmp_path) == 0
    theirs, _ = moco_v3.read_official(torch.load(files / "mini.pth.tar"))
    ours = torch.load(tmp_path / "last.pt")["model"]
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():  # heads, predictor and running statistics included
        assert torch.equal(x, theirs[name]), name


def test_pretraining_refuses_a_cut_head(files, toy, tmp_path, monkeypatch, capsys):
    no_step(monkeypatch)
    assert main(*PRETRAIN, "--init", files / "headless.pth.tar", "--data", toy, "--out", tmp_path) == 2
    assert "projector.4" in capsys.readouterr().err
    assert main("export", "--init", files / "headless.pth.tar", "--out", tmp_path / "e") == 0


def test_export_of_a_run_says_what_it_is(toy, tmp_path):
    assert main(*RUN, "--data", toy, "--out", tmp_path / "run", "--steps", 2, "--knn-every", 0) == 0
    assert main("export", "--init", tmp_path / "run" / "last.pt", "--out", tmp_path / "e") == 0
    about = json.loads((tmp_path / "e" / "encoder.json").read_text())
    assert about["arch"] == "vit_mini" and about["image_size"] == 16 and about["patch_size"] == 8
    model = vit("mini", 16, 8)
    model.load_state_dict(loaded(tmp_path / "e"))
    state = torch.load(tmp_path / "run" / "last.pt")["model"]
    for name, x in loaded(tmp_path / "e").items():
        assert torch.equal(x, state[f"encoder.{name}"]), name
    assert main("export", "--init", tmp_path / "run" / "last.pt", "--out", tmp_path / "m",
                "--init-encoder", "momentum_encoder") == 0
    for name, x in loaded(tmp_path / "m").items():
        assert torch.equal(x, state[f"momentum_encoder.{name}"]), name


def test_the_warm_up_is_measured_against_the_recipe_that_init_brings(tmp_path):
    torch.save({"config": {"arch": "resnet50"}, "model": {}}, tmp_path / "last.pt")
    args = moco_v3.parse_args(["--data", str(tmp_path), "--init", str(tmp_path / "last.pt"),
                               "--epochs", "30", "--device", "cpu"])  # the ViT's warm-up takes 40
    moco_v3.setup(args)
    assert args.recipe == "imagenet-r50-100" and args.warmup_epochs == 10
