"""simclr_v2.py against the paper: losses, memory, head, networks, LARS, training step, fine-tuning,
distillation, recipes, processes.

Every oracle here is written from the fact sheet of arXiv 2006.10029 and 2002.05709 ("sheet 1.1" ...
"sheet 6, T16"), without a look at simclr_v2.py.
"""
import copy
import functools
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import avg_pool2d, batch_norm, conv2d, cross_entropy, normalize

import simclr_v2
import simsiam
from common import LARS, SelectiveKernel, ShortcutPool, resnet
from conftest import on_ranks
from helpers import DOUBLE, Gather, Tiny, count, differs, furthest, part, ready, record_gradients
from helpers import embedding_pairs as embeddings
from helpers import joined_views as views
from simclr_v2 import SimCLR, TaskNetwork, distillation_loss, nt_xent_loss, projection_head

parse = functools.partial(ready, simclr_v2)


def unit_rows(n, dim=5, seed=9):
    g = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, dim, generator=g, dtype=DOUBLE))


def shaken(module, seed=5):
    """The module in float64 with every parameter and running statistic away from where it began."""
    g = torch.Generator().manual_seed(seed)
    module.to(DOUBLE)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=DOUBLE))
        for name, x in module.named_buffers():
            if "running" in name:
                x.add_(torch.rand(x.shape, generator=g, dtype=DOUBLE))
    return module


trainable = functools.partial(count, trainable=True)

# ----------------------------------------------------------------------------- NT-Xent, sheet 1.1

TEMPERATURES = (0.005, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0)


def slow_loss(z1, z2, tau, mistake=""):
    """The mean of l over the 2n anchors, one candidate at a time."""
    n = len(z1)
    z = [x / (5 if mistake == "not normalised" else x.square().sum().sqrt()) for x in (*z1, *z2)]
    anchors, total = range(n if mistake == "first view's anchors" else 2 * n), 0
    for a in anchors:
        positive, below = (a + n) % (2 * n), []
        if mistake == "the next image's positive":
            positive = positive // n * n + (positive + 1) % n
        for c in range(2 * n):
            logit = z[a] @ z[c] / tau
            if c == a and mistake == "self masked by 0":
                below.append((0 * logit).exp())
            elif c == a and mistake != "no self mask":
                continue
            elif c == positive and mistake == "masked positives":  # sheet 6, T5
                continue
            elif c != positive and c // n == a // n and mistake == "same view left out":
                continue
            elif c != positive and c // n != a // n and mistake == "other view left out":
                continue
            else:
                below.append(logit.exp())
        total = total - ((z[a] @ z[positive] / tau).exp() / sum(below)).log()
    return total / {"official scale": n, "summed": 1}.get(mistake, len(anchors))


@pytest.mark.parametrize("tau", TEMPERATURES)
def test_loss_and_gradient_equal_a_double_loop(tau):
    for n, dim, seed in ((7, 5, 0), (2, 3, 1), (5, 16, 2)):
        z = embeddings(n, dim, seed=seed)
        ours, expected = nt_xent_loss(*z, tau), slow_loss(*z, tau)
        assert ours.shape == () and ours.dtype == DOUBLE
        assert abs(ours.item() - expected.item()) < 1e-9
        both = [torch.autograd.grad(x, z) for x in (ours, expected)]
        assert furthest(*both) < 1e-9 * max(1, 1 / tau)
        assert tau < 0.05 or min(g.abs().max() for g in both[0]) > 1e-3


@pytest.mark.parametrize("mistake", [
    "no self mask", "self masked by 0", "masked positives", "same view left out",
    "other view left out", "first view's anchors", "the next image's positive", "not normalised",
    "official scale", "summed"])
def test_the_double_loop_tells_wrong_losses_apart(mistake):
    z = embeddings(noise=2)
    for tau in (0.1, 0.5):
        ours, wrong = nt_xent_loss(*z, tau), slow_loss(*z, tau, mistake)
        assert abs(ours - wrong) > 1e-3
        both = [torch.autograd.grad(x, z) for x in (ours, wrong)]
        assert furthest(*both) > 1e-3


def test_loss_ignores_lengths_the_order_of_views_and_of_images_but_not_the_pairing():
    z1, z2 = (x.detach() for x in embeddings())
    lengths, order = torch.logspace(-3, 3, 7, dtype=DOUBLE)[:, None], [3, 0, 6, 1, 4, 2, 5]
    for tau in (0.005, 0.1, 1.0):
        loss = nt_xent_loss(z1, z2, tau).item()
        for a, b in ((z1 * lengths, z2), (9 * z1, 0.01 * z2), (z2, z1), (z1[order], z2[order])):
            assert nt_xent_loss(a, b, tau).item() == pytest.approx(loss, abs=1e-10)
        assert abs(nt_xent_loss(z1, z2[order], tau).item() - loss) > 1e-2


def test_gradient_is_that_of_cross_entropy_on_the_sphere():
    """dL/dz = sum over the roles of anchor and candidate of (p - y) / tau; then (I - z z^T) / |u|."""
    for tau, n in ((0.05, 6), (0.1, 9), (0.5, 4)):
        inputs = embeddings(n, noise=1)
        u = torch.cat(inputs).detach()
        z, pair = normalize(u), torch.arange(2 * n).roll(n)
        p = (z @ z.T / tau).fill_diagonal_(-math.inf).softmax(1)
        residual = p - torch.eye(2 * n, dtype=DOUBLE)[pair]
        slope = (residual + residual.T) @ z / tau / (2 * n)
        expected = (slope - (slope * z).sum(1, keepdim=True) * z) / u.norm(dim=1, keepdim=True)
        ours = torch.autograd.grad(nt_xent_loss(*inputs, tau), inputs)
        assert furthest(ours, expected.chunk(2)) < 1e-10 and expected.abs().max() > 1e-2
        one_way = (residual @ z) / tau / (2 * n)  # candidates without gradient: sheet 6, T1
        one_way = (one_way - (one_way * z).sum(1, keepdim=True) * z) / u.norm(dim=1, keepdim=True)
        assert furthest(ours, one_way.chunk(2)) > 1e-2


def test_losses_have_their_values_in_closed_form():  # sheet 1.1, sanity values: twice ours
    for n in (2, 32, 512):
        same = torch.full((n, 3), 0.3, dtype=DOUBLE)
        for tau in (0.005, 0.1, 1.0):
            loss = nt_xent_loss(same, same, tau).item()
            assert loss == pytest.approx(math.log(2 * n - 1))
    assert 2 * loss == pytest.approx(13.861, abs=6e-4)
    for tau in (0.02, 0.1, 1.0):  # aligned positives, orthogonal images
        eye = torch.eye(8, dtype=DOUBLE)
        expected = math.log1p(14 * math.exp(-1 / tau))
        assert nt_xent_loss(eye, 5 * eye, tau).item() == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32_whatever_comes_in(dtype):  # sheet 1.1: 1e9 overflows fp16
    z = embeddings(16, 32, dtype, noise=1)
    keys, queue = [x.detach() for x in embeddings(16, 32, dtype, seed=3)], unit_rows(8, 32)
    raised = [x.detach().double() for x in z]
    for tau in (0.005, 0.1, 1.0):
        with torch.autocast("cpu", torch.bfloat16):
            plain = nt_xent_loss(*z, tau)
            memory = nt_xent_loss(*z, tau, keys, queue.float())
        for ours, exact in ((plain, slow_loss(*raised, tau)), (
                memory, slow_memory(*raised, *(k.double() for k in keys), queue, tau))):
            assert ours.dtype == torch.float32
            assert ours.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-5)
            assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(ours, z))
    logits = (3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))).to(dtype)
    for tau in (0.1, 1.0):
        with torch.autocast("cpu", torch.bfloat16):
            ours = distillation_loss(logits, logits.flip(0), tau)
        assert ours.dtype == torch.float32
        exact = slow_distillation(logits.double(), logits.flip(0).double(), tau).item()
        assert ours.item() == pytest.approx(exact, rel=1e-5)


# ---------------------------------------------------- loss against the memory, sheet 4.2's design


def slow_memory(z1, z2, k1, k2, queue, tau, mistake=""):
    """Anchors of both views against momentum keys: the other view's key of the same image is the
    positive; keys of all other images, of both views, and the queue are negatives."""
    views, keys = [[x / x.norm() for x in z] for z in (z1, z2)], (k1, k2)
    keys = [[k / k.norm() for k in view] for view in keys]
    total, n = 0, len(z1)
    for v in range(1 if mistake == "first view's anchors" else 2):
        for i, anchor in enumerate(views[v]):
            positive = keys[v if mistake == "own view's positive" else 1 - v][i]
            below = [] if mistake == "positive left out" else [positive]
            for u in range(2):
                for j in range(n):
                    other = views if mistake == "online negatives" else keys
                    if mistake == "other view's keys alone" and u == v:
                        continue
                    if mistake == "own view's keys alone" and u != v:
                        continue
                    if j != i or mistake == "own key kept" and u == v:
                        below.append(other[u][j])
            below += [] if queue is None or mistake == "no queue" else [*queue]
            below = sum((anchor @ k / tau).exp() for k in below)
            total = total - ((anchor @ positive / tau).exp() / below).log()
    return total / (n if mistake in ("official scale", "first view's anchors") else 2 * n)


@pytest.mark.parametrize("rows", [0, 6])
@pytest.mark.parametrize("tau", [0.005, 0.1, 0.5, 1.0])
def test_memory_loss_equals_a_loop_and_passes_gradient_to_the_anchors_alone(tau, rows):
    z, keys = embeddings(), embeddings(seed=4)
    queue = unit_rows(rows).requires_grad_() if rows else None
    ours = nt_xent_loss(*z, tau, keys, queue)
    fixed = [k.detach() for k in keys], queue if queue is None else queue.detach()
    expected = slow_memory(*z, *fixed[0], fixed[1], tau)
    assert ours.shape == () and abs(ours.item() - expected.item()) < 1e-9
    inputs = [*z, *keys, *([] if queue is None else [queue])]
    found = torch.autograd.grad(ours, inputs, allow_unused=True)
    theirs = torch.autograd.grad(expected, z)
    assert furthest(found[:2], theirs) < 1e-9 * max(1, 1 / tau)
    assert all(g is None or not g.any() for g in found[2:])
    assert tau < 0.05 or min(g.abs().max() for g in theirs) > 1e-3


@pytest.mark.parametrize("mistake", [
    "own key kept", "positive left out", "own view's positive", "other view's keys alone",
    "own view's keys alone", "online negatives", "no queue", "official scale",
    "first view's anchors"])
def test_the_loop_over_the_memory_tells_wrong_losses_apart(mistake):
    z, keys, queue = embeddings(noise=2), embeddings(seed=4, noise=2), unit_rows(6)
    keys = [k.detach() for k in keys]
    for tau in (0.1, 0.5):
        ours, wrong = (nt_xent_loss(*z, tau, keys, queue),
                       slow_memory(*z, *keys, queue, tau, mistake))
        assert abs(ours - wrong) > 1e-3
        both = [torch.autograd.grad(x, z, materialize_grads=True) for x in (ours, wrong)]
        assert furthest(*both) > 1e-3


def test_memory_loss_of_collapsed_embeddings_counts_its_candidates():
    same = torch.full((8, 3), 0.3, dtype=DOUBLE)
    for rows in (0, 64):  # 2N - 1 keys, for one's own view's key is no candidate, and the queue
        queue = normalize(same[:1]).expand(rows, 3) if rows else None
        loss = nt_xent_loss(same, same, 0.1, (same, same), queue).item()
        assert loss == pytest.approx(math.log(15 + rows))


# ------------------------------------------------------------------ projection head, sheet 1.3


@pytest.mark.parametrize("layers, dim, size", [
    (3, 2048, 8_659_072), (3, 4096, 34_095_232), (3, 6144, 76_308_608), (3, 512, 592_000),
    (2, 2048, 4_460_672), (2, 512, 328_832)])
def test_heads_have_the_sheets_sizes(layers, dim, size):
    with torch.device("meta"):
        head = projection_head(dim, layers, 128)
    assert trainable(head) == size and len(head) == layers
    for i, layer in enumerate(head):
        last = i == layers - 1
        kinds = nn.Linear, nn.BatchNorm1d, nn.ReLU
        assert [type(x) for x in layer] == [*kinds[:2 if last else 3]]
        assert layer[0].bias is None and layer[0].weight.shape == (128 if last else dim, dim)
        assert layer[1].weight.requires_grad  # sheet 6, T16: the last has gamma but no beta
        assert (layer[1].bias is not None and layer[1].bias.requires_grad) is not last


def slow_head(layers, h):
    """BN(W ... relu(BN(W h))) with the batch's statistics, in the formula's terms."""
    for i, layer in enumerate(layers):
        h = h @ layer[0].weight.T
        var, mean = h.var(0, unbiased=False), h.mean(0)
        h = (h - mean) / (var + 1e-5).sqrt() * layer[1].weight
        if i < len(layers) - 1:
            h = (h + layer[1].bias).clamp(min=0)
    return h


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_a_head_is_linear_and_batch_norm_with_relu_between(layers):
    head = shaken(projection_head(6, layers, 4))
    h = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    z = head(h)
    assert z.shape == (9, 4) and furthest([z], [slow_head(head, h)]) < 1e-12
    assert z.mean(0).abs().max() < 1e-12  # no beta at the end
    wrong = slow_head(head, h).clamp(min=0)
    assert furthest([z], [wrong]) > 1e-2
    assert not head[-1][1].bias.any()


def test_a_head_without_layers_is_the_identity_and_one_layer_is_linear():
    h = torch.randn(5, 8, dtype=DOUBLE)
    head = projection_head(8, 0, 128)
    assert isinstance(head, nn.Sequential) and len(head) == 0 and head(h) is h
    head = projection_head(8, 1, 16)
    assert len(head) == 1 and trainable(head) == 8 * 16 + 16
    model = SimCLR(Tiny(), dim=16, head_layers=0).to(DOUBLE)
    z1, z2, *_ = model(views())
    twin = SimCLR(Tiny(), dim=16, head_layers=0).to(DOUBLE)
    twin.load_state_dict(model.state_dict())
    assert furthest([torch.cat([z1, z2])], [twin.encoder(views())]) < 1e-12


def test_head_weights_start_normal_with_deviation_0_01():
    torch.manual_seed(0)
    for layer in projection_head(600, 3, 600):
        w = layer[0].weight.detach() / 0.01
        assert abs(w.std().item() - 1) < 6e-3 and abs(w.mean().item()) < 6e-3
        assert (w.abs() > 2).double().mean().item() == pytest.approx(0.0455, abs=2e-3)  # not cut
        assert (layer[1].weight == 1).all() and not layer[1].bias.any()


# ------------------------------------------------------------------------ networks, sheets 2.1-2.4

NETWORKS = {  # (depth, width, SK): trainable; and BN buffers; and 1000-way; and layer 1 and 1000-way
    (50, 1, 0): (23_508_032, 23_561_152, 25_557_032, 29_755_432),
    (50, 1, 1): (35_215_584, 35_277_408, 37_264_584, 41_462_984),
    (50, 2, 0): (93_907_072, 94_013_312, 98_004_072, 114_789_480),
    (50, 2, 1): (140_306_048, 140_428_864, 144_403_048, 161_188_456),
    (101, 1, 0): (42_500_160, 42_605_504, 44_549_160, 48_747_560),
    (101, 1, 1): (64_662_304, 64_786_144, 66_711_304, 70_909_704),
    (101, 2, 0): (169_771_136, 169_981_824, 173_868_136, 190_653_544),
    (101, 2, 1): (257_132_224, 257_377_984, 261_229_224, 278_014_632),
    (152, 1, 0): (58_143_808, 58_295_232, 60_192_808, 64_391_208),
    (152, 1, 1): (88_940_896, 89_119_584, 90_989_896, 95_188_296),
    (152, 2, 0): (232_253_568, 232_556_416, 236_350_568, 253_135_976),
    (152, 2, 1): (353_398_528, 353_752_896, 357_495_528, 374_280_936),
    (152, 3, 1): (794_704_160, 795_235_360, 800_849_160, 838_610_184)}
PAPER_MILLIONS = (24, 35, 94, 140, 43, 65, 170, 257, 58, 89, 233, 354, 795)


def running(module):
    return sum(x.numel() for name, x in module.named_buffers() if "running" in name)


@pytest.mark.parametrize("depth, width, sk", NETWORKS)
def test_networks_have_the_papers_sizes(depth, width, sk):
    expected = NETWORKS[depth, width, sk]
    with torch.device("meta"):
        net = resnet(depth, width, sk_ratio=0.0625 * sk)
        head = projection_head(net.feature_dim, 3, 128)
        tasks = [TaskNetwork(net, [*head[:k]], 1000) for k in range(2)]
    assert net.feature_dim == 2048 * width and all(p.requires_grad for p in net.parameters())
    assert trainable(net) == expected[0] and trainable(net) + running(net) == expected[1]
    assert round(expected[1] / 1e6) == PAPER_MILLIONS[[*NETWORKS].index((depth, width, sk))]
    assert tuple(map(trainable, tasks)) == expected[2:]


def test_other_networks_have_the_sheets_sizes():  # sheet 2.4, "others"
    with torch.device("meta"):
        assert trainable(resnet(50, 4)) == 375_378_176
        assert trainable(resnet(200)) == 62_624_832
        assert trainable(resnet(50, small_images=True)) == 23_500_352
        # Ours keep torchvision's names (design.md): in their first group no 1x1 shortcut (sheet 2.1)
        shortcut = 64 * 64 + 2 * 64
        for depth, small, size in ((18, False, 11_180_736), (18, True, 11_173_056),
                                   (34, True, 21_281_216)):
            assert trainable(resnet(depth, small_images=small)) == size - shortcut


@pytest.mark.parametrize("depth", [10, 18, 34])
def test_selective_kernels_in_basic_blocks_are_refused(depth):  # sheet 2.3
    with pytest.raises(ValueError, match=r"\w+ \w+ \w+"), torch.device("meta"):
        resnet(depth, sk_ratio=0.0625)


@pytest.mark.parametrize("width", [1, 2])
def test_networks_with_selective_kernels_have_resnet_d_stems_and_shortcuts(width):  # sheet 2.2
    with torch.device("meta"):
        net, plain = resnet(50, width, sk_ratio=0.0625), resnet(50, width)
        small = resnet(50, width, sk_ratio=0.0625, small_images=True)
    kinds = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    assert isinstance(net.conv1, nn.Sequential) and [type(x) for x in net.conv1] == kinds
    convs = [x for x in net.conv1 if isinstance(x, nn.Conv2d)]
    assert [tuple(x.weight.shape) for x in convs] == [
        (32 * width, 3, 3, 3), (32 * width, 32 * width, 3, 3), (64 * width, 32 * width, 3, 3)]
    assert [x.stride[0] for x in convs] == [2, 1, 1] and all(x.padding == (1, 1) for x in convs)
    assert all(x.bias is None for x in convs) and net.bn1.weight.shape == (64 * width,)
    assert plain.conv1.weight.shape == (64 * width, 3, 7, 7) and plain.conv1.stride == (2, 2)
    assert small.conv1.weight.shape == (64 * width, 3, 3, 3) and small.conv1.stride == (1, 1)
    for stride, group, dim in zip((1, 2, 2, 2), (net.layer1, net.layer2, net.layer3, net.layer4),
                                  (64, 128, 256, 512)):
        pool, conv, bn = group[0].downsample  # the stride is the pool's
        assert isinstance(pool, ShortcutPool) and isinstance(bn, nn.BatchNorm2d)
        assert conv.kernel_size == (1, 1) and conv.stride == (1, 1)
        x = torch.zeros(1, 3, 8, 8)
        assert pool(x).shape[-1] == 8 // stride
        for i, block in enumerate(group):
            assert isinstance(block.conv2, SelectiveKernel) and (i == 0 or block.downsample is None)
            shapes = {tuple(p.shape) for p in block.conv2.parameters() if p.ndim > 1}
            f, m = dim * width, max(int(dim * width * 0.0625), 32)
            assert {(2 * f, f, 3, 3)} <= shapes and {s[:2] for s in shapes} == {
                (2 * f, f), (m, f), (2 * f, m)}
    assert not [x for x in plain.modules() if isinstance(x, (SelectiveKernel, ShortcutPool))]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("sk", [0.0, 0.0625])
def test_networks_map_images_to_features(sk, small):
    net = resnet(50, 0.125, sk_ratio=sk, small_images=small)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = []
    net.layer1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    net(x).square().sum().backward()
    assert net(x).shape == (2, 256) == (2, net.feature_dim)
    assert seen[0] == (2, 8, *((32, 32) if small else (8, 8)))  # no pool on small images
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def slow_kernel(unit, x, stride, training, mistake=""):
    """x -> u1, u2 by one convolution -> mixed by softmax over the two branches (sheet 2.3)."""
    f = x.shape[1]
    weights = {tuple(p.shape[:2]): p for p in unit.parameters() if p.ndim > 1}
    m = next(shape[0] for shape in weights if shape[1] == f and shape[0] != 2 * f)
    norms = {bn.num_features: bn for bn in unit.modules() if isinstance(bn, nn.BatchNorm2d)}

    def normalised(y, bn):
        var, mean = y.var((0, 2, 3), unbiased=False), y.mean((0, 2, 3))
        if not training:
            var, mean = bn.running_var, bn.running_mean
        shape = 1, -1, 1, 1
        y = (y - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
        return y * bn.weight.view(shape) + bn.bias.view(shape)

    y = normalised(conv2d(x, weights[2 * f, f], stride=stride, padding=1), norms[2 * f])
    y = y if mistake == "no ReLU before the mix" else y.clamp(min=0)
    u = (y[:, ::2], y[:, 1::2]) if mistake == "branches interleaved" else (y[:, :f], y[:, f:])
    s = (u[0] + u[1]).mean((2, 3), keepdim=True)
    s = normalised(conv2d(s, weights[m, f].view(m, f, 1, 1)), norms[m])
    s = s if mistake == "no ReLU in the gate" else s.clamp(min=0)
    logits = conv2d(s, weights[2 * f, m].view(2 * f, m, 1, 1))
    out = torch.empty_like(u[0])
    for b in range(len(x)):
        for c in range(f):
            first, second = logits[b, c, 0, 0], logits[b, f + c, 0, 0]
            share = first.exp() / (first.exp() + second.exp())
            one, two = share, 1 - share
            if mistake == "softmax over channels":
                one, two = (logits[b, o:o + f].softmax(0)[c, 0, 0] for o in (0, f))
            if mistake == "sigmoids":
                one, two = first.sigmoid(), second.sigmoid()
            if mistake == "even mix":
                one = two = 0.5
            out[b, c] = one * u[0][b, c] + two * u[1][b, c]
    return out  # a ReLU would change nothing: u is not negative


def kernel_and_input(dim=8, stride=1, ratio=0.0625):
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    return shaken(SelectiveKernel(dim, stride, ratio)), torch.randn(3, dim, 6, 6, generator=g,
                                                                    dtype=DOUBLE)


@pytest.mark.parametrize("dim, ratio", [(8, 0.0625), (40, 0.9)])
@pytest.mark.parametrize("stride", [1, 2])
def test_selective_kernel_equals_its_formula(stride, dim, ratio):
    unit, x = kernel_and_input(dim, stride, ratio)
    for training in (False, True):
        x.requires_grad_()
        expected = slow_kernel(unit, x, stride, training)
        ours = unit.train(training)(x)
        assert ours.shape == (3, dim, 6 // stride, 6 // stride)
        assert furthest([ours], [expected]) < 1e-11
        ascent = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
        inputs = [x, *unit.parameters()]
        both = [torch.autograd.grad((y * ascent).sum(), inputs) for y in (ours, expected)]
        assert furthest(*both) < 1e-9 and min(g.abs().max() for g in both[0]) > 1e-6


@pytest.mark.parametrize("mistake", [
    "no ReLU before the mix", "branches interleaved", "no ReLU in the gate",
    "softmax over channels", "sigmoids", "even mix"])
def test_the_formula_tells_wrong_kernels_apart(mistake):
    unit, x = kernel_and_input()
    wrong = slow_kernel(unit.eval(), x, 1, False, mistake)
    assert furthest([unit(x)], [wrong]) > 1e-3


def test_branches_share_the_weight_1_so_equal_branches_give_themselves():
    unit, x = kernel_and_input()
    main = next(p for p in unit.parameters() if p.ndim == 4 and p.shape[-1] == 3)
    bn = next(x for x in unit.modules() if isinstance(x, nn.BatchNorm2d) and x.num_features == 16)
    with torch.no_grad():
        for p in (main, bn.weight, bn.bias, bn.running_mean, bn.running_var):
            p[8:] = p[:8]
    unit.eval()
    expected = batch_norm(conv2d(x, main[:8], padding=1), bn.running_mean[:8], bn.running_var[:8],
                          bn.weight[:8], bn.bias[:8]).relu()
    assert furthest([unit(x)], [expected]) < 1e-12 and expected.any()


def test_gates_are_at_least_32_wide():  # sheet 2.3: m = max(int(f * ratio), 32)
    for f, ratio, m in ((64, 0.0625, 32), (512, 0.0625, 32), (600, 0.0625, 37), (1536, 0.0625, 96)):
        with torch.device("meta"):
            unit = SelectiveKernel(f, 1, ratio)
        assert {tuple(p.shape[:2]) for p in unit.parameters() if p.ndim > 1} == {
            (2 * f, f), (m, f), (2 * f, m)}
        assert trainable(unit) == 18 * f * f + 4 * f + 3 * f * m + 2 * m  # no other bias, no third BN


@pytest.mark.parametrize("stride", [1, 2])
def test_a_bottleneck_with_a_selective_kernel_has_no_norm_or_relu_after_it(stride):
    net = shaken(resnet(50, 0.1875, sk_ratio=0.0625)).eval()
    block = (net.layer1 if stride == 1 else net.layer2)[0]
    x = torch.randn(2, block.conv1.in_channels, 6, 6, dtype=DOUBLE)

    def bn(y, m):
        return batch_norm(y, m.running_mean, m.running_var, m.weight, m.bias)

    mixed = slow_kernel(block.conv2, bn(conv2d(x, block.conv1.weight), block.bn1).relu(), stride,
                        False)
    y = bn(conv2d(mixed, block.conv3.weight), block.bn3)
    pooled = torch.tensor(slow_pool(x, stride), dtype=DOUBLE)
    shortcut = bn(conv2d(pooled, block.downsample[1].weight), block.downsample[2])
    assert furthest([block(x)], [(y + shortcut).relu()]) < 1e-10
    assert (y + shortcut).min() < 0 < (y + shortcut).max()


def slow_pool(x, stride, mistake=""):
    """Stride 1: 'SAME', padded cells are not counted. Stride 2: one row and column of zeros at the
    end, which even maps never reach (sheet 2.2)."""
    counted, result = stride == 2 or mistake == "padding counted", []
    height, width = x.shape[2:]
    for image in x.tolist():
        result.append([])
        for channel in image:
            rows = []
            for top in range(0, height, stride):
                rows.append([])
                for left in range(0, width, stride):
                    cells = [channel[i][j] for i in (top, top + 1) for j in (left, left + 1)
                             if i < height and j < width]
                    rows[-1].append(sum(cells) / (4 if counted else len(cells)))
            result[-1].append(rows)
    return result


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(6, 6), (7, 7), (5, 8), (1, 1), (2, 2)])
def test_shortcut_pools_average_the_cells_inside_the_map(size, stride):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    x = x.requires_grad_() + 1
    ours, expected = ShortcutPool(stride)(x), torch.tensor(slow_pool(x, stride), dtype=DOUBLE)
    assert furthest([ours], [expected]) < 1e-12
    if stride == 1:  # sheet 6: not zero padding and a quarter, as in a well-known port
        wrong = torch.tensor(slow_pool(x, 1, "padding counted"), dtype=DOUBLE)
        assert furthest([ours], [wrong]) > 1e-2
        same = torch.ones(1, 1, *size, dtype=DOUBLE)
        assert furthest([ShortcutPool(1)(same)], [same]) < 1e-12
    elif size == (6, 6):
        assert furthest([ours], [avg_pool2d(x, 2)]) < 1e-12
        shifted = torch.tensor(slow_pool(x, 1), dtype=DOUBLE)[..., 1::2, 1::2]
        assert furthest([ours], [shifted]) > 1e-2


@pytest.mark.parametrize("depth, sk", [(18, 0.0), (50, 0.0), (50, 0.0625)])
def test_zero_init_is_that_of_each_blocks_last_norm(depth, sk):  # sheet 2.1; sheet 6, T15
    for zero in (True, False):
        net = resnet(depth, 0.125, sk_ratio=sk, small_images=True, zero_init_residual=zero)
        last, found = "bn2.weight" if depth == 18 else "bn3.weight", 0
        norms = {f"{name}.weight": x for name, x in net.named_modules()
                 if isinstance(x, nn.BatchNorm2d)}
        for name, bn in norms.items():
            ends = name.startswith("layer") and name.count(".") == 3 and name.endswith(last)
            found += ends
            assert (bn.weight == (0 if ends and zero else 1)).all() and not bn.bias.any(), name
        assert found == (8 if depth == 18 else 16)
    default = resnet(depth, 0.125, sk_ratio=sk, small_images=True)
    assert all((p == 1).all() for name, p in default.named_parameters()
               if name in norms)


# --------------------------------------------------------------------------- LARS, sheets 1.6 and T7


def test_two_steps_of_simclrs_lars_equal_those_by_hand():
    # lambda 1, m 0.5, eta 0.6. A matrix. Step 1, lr 2: u = (0, -4) + (3, 4) = (3, 0);
    #   r = 0.6 * 5 / 3 = 1; v = 2 (3, 0) = (6, 0); w = (-3, 4).
    # Step 2, lr 1/2: u = (7, -1) + (-3, 4) = (4, 3); r = 0.6 * 5 / 5;
    #   v = (3, 0) + 0.5 * 0.6 (4, 3) = (4.2, 0.9); w = (-7.2, 3.1)
    # Ratio 1: v = (3, 0) + 0.5 (4, 3). A vector: no decay either, v = (0, -8), then (3.5, -4.5)
    # The lr outside the buffer would end at (-3, 4) - 0.5 ((1.5, 0) + 0.6 (4, 3)) = (-4.95, 3.1)
    start = torch.tensor([3.0, 4.0], dtype=DOUBLE)
    adapted, raw, vector = (nn.Parameter(start.clone().view(shape))
                            for shape in ((1, 2), (2, 1), (2,)))
    optimizer = LARS([{"params": [adapted, vector]},
                      {"params": [raw], "trust_coefficient": None}], lr=0.0, weight_decay=1.0,
                     momentum=0.5, trust_coefficient=0.6, lr_in_momentum=True)
    for lr, g in ((2.0, [0.0, -4.0]), (0.5, [7.0, -1.0])):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p in (adapted, raw, vector):
            p.grad = torch.tensor(g, dtype=DOUBLE).view(p.shape)
        optimizer.step()
    for p, expected in ((adapted, [-7.2, 3.1]), (raw, [-8.0, 2.5]), (vector, [-0.5, 16.5])):
        assert p.flatten().tolist() == pytest.approx(expected, abs=1e-12)


def test_lars_takes_ratio_1_for_zero_norms():
    for w, g in (([0.0, 0.0], [3.0, 4.0]), ([3.0, 4.0], [0.0, 0.0])):
        p = nn.Parameter(torch.tensor([w], dtype=DOUBLE))
        optimizer = LARS([p], lr=0.5, momentum=0.9, lr_in_momentum=True)
        p.grad = torch.tensor([g], dtype=DOUBLE)
        optimizer.step()
        assert p[0].tolist() == [x - 0.5 * y for x, y in zip(w, g)]


def build(kind="", layers=3):
    """A SimCLR of Tiny, its key networks others than the online ones, as after some steps."""
    torch.manual_seed(0)
    queue, classes = 32 if "queue" in kind else 0, 4 if "online" in kind else 0
    model = SimCLR(Tiny(), dim=6, head_layers=layers, queue=queue, classes=classes)
    model = model.to(DOUBLE)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad or name.startswith("key_") and p.any():
                p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=DOUBLE))
    return model


KINDS_OF_TENSOR = ("adapted", "raw, decayed", "raw")


def kind_of_tensor(name, p):
    """Who gets trust ratio and decay (the sheet's table)."""
    if p.ndim == 1:
        return "raw"  # batch norms and biases
    return "raw, decayed" if name.startswith(("online.", "fc.")) else "adapted"


def slow_lars(w, g, v, lr, kind, decay=0.1, momentum=0.9, eta=0.001, mistake=""):
    """One tensor's step in floats: (w, v) after it."""
    shape, w, g, v = w.shape, w.flatten().tolist(), g.flatten().tolist(), v.flatten().tolist()
    u = g if kind == "raw" else [a + decay * b for a, b in zip(g, w)]
    ratio = 1.0
    if kind == "adapted":
        lengths = [math.sqrt(sum(a * a for a in x)) for x in (w, u)]
        ratio = eta * lengths[0] / lengths[1] if min(lengths) > 0 else 1.0
    inside = mistake != "lr outside the buffer"
    v = [momentum * a + (lr if inside else 1) * ratio * b for a, b in zip(v, u)]
    step = [a + (lr * ratio * b if inside else b * 0) for a, b in zip([momentum * x for x in v], u)
            ] if mistake == "Nesterov" else v
    w = [a - (1 if inside else lr) * b for a, b in zip(w, step)]
    return [torch.tensor(x, dtype=DOUBLE).view(shape) for x in (w, v)]


def networks():
    task = TaskNetwork(Tiny(), [*projection_head(8, 3, 6)[:2]], 4).to(DOUBLE)
    with torch.no_grad():
        task.fc.weight.normal_()
    flags = "--weight-decay", 0.1, "--optimizer", "lars"
    return {"pretrain": (build("online, queue"), parse("--recipe", "imagenet", *flags)),
            "finetune": (task, parse("finetune", "--init", "x", "--recipe", "imagenet", *flags))}


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_kernels_are_adapted_the_classifier_is_decayed_and_the_rest_takes_the_raw_lr(stage):
    model, args = networks()[stage]
    optimizer = simclr_v2.build_optimizer(model, args)
    assert isinstance(optimizer, LARS)
    wanted = {name: p for name, p in model.named_parameters()
              if p.requires_grad and not name.startswith("key_")}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(trained) == len(wanted) and {*map(id, trained)} == {*map(id, wanted.values())}
    slow = {name: (p.detach().clone(), torch.zeros_like(p)) for name, p in wanted.items()}
    wrong = {kind: copy.deepcopy(slow) for kind in KINDS_OF_TENSOR}
    g = torch.Generator().manual_seed(3)
    for lr in (0.3, 0.7, 0.1):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, p in wanted.items():
            p.grad = torch.randn(p.shape, generator=g, dtype=DOUBLE)
            slow[name] = slow_lars(slow[name][0], p.grad, slow[name][1], lr, kind_of_tensor(name, p))
            for kind in KINDS_OF_TENSOR:
                w, v = wrong[kind][name]
                wrong[kind][name] = slow_lars(w, p.grad, v, lr, kind)
        optimizer.step()
    kinds = set()
    for name, p in wanted.items():
        assert furthest([p], [slow[name][0]]) < 1e-12, name
        for kind in {*KINDS_OF_TENSOR} - {kind_of_tensor(name, p)}:
            assert furthest([p], [wrong[kind][name][0]]) > 1e-4, (name, kind)
        kinds.add(kind_of_tensor(name, p))
    assert kinds == {*KINDS_OF_TENSOR}
    assert (model.online if stage == "pretrain" else model.fc).weight.ndim == 2


def test_momentum_sgd_is_nesterovs_and_decays_all_but_batch_norm():  # sheet 1.6
    model = build("online")
    args = parse("--recipe", "imagenet", "--optimizer", "sgd", "--weight-decay", 0.1,
                 "--base-lr", 0.05)
    optimizer, norms = simclr_v2.build_optimizer(model, args), set()
    for name, module in model.named_modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            norms |= {f"{name}.weight", f"{name}.bias"}
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    slow = {name: (p.detach().clone(), torch.zeros_like(p)) for name, p in wanted.items()}
    g = torch.Generator().manual_seed(3)
    for _ in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 0.3
        for name, p in wanted.items():
            p.grad = torch.randn(p.shape, generator=g, dtype=DOUBLE)
            w, v = slow[name]
            u = p.grad + (0 if name in norms else 0.1) * w
            v = 0.9 * v + u
            slow[name] = w - 0.3 * (u + 0.9 * v), v
        optimizer.step()
    for name, p in wanted.items():
        assert furthest([p], [slow[name][0]]) < 1e-12, name


# ------------------------------------------------------------------------------- schedule, sheet 4


def test_numbers_of_steps_are_the_authors():  # sheets 4.1, 4.4, 4.5: N * E // B + 1
    for images, epochs, batch, steps in (
            (1_281_167, 800, 4096, 250_228), (12_811, 60, 1024, 751), (128_116, 30, 1024, 3_754),
            (1_281_167, 30, 1024, 37_535), (1_281_167, 400, 4096, 125_114),
            (1_281_167, 90, 4096, 28_151)):
        assert simclr_v2.official_steps(images, epochs, batch) == steps
        assert images // batch * epochs + 1 != steps  # whole batches of an epoch: another number


def test_schedule_is_a_linear_warm_up_from_0_and_half_a_cosine():  # sheet 4.1
    args = parse("--recipe", "imagenet")
    assert simclr_v2.warmup_cosine(0.0, args) == 0 and simclr_v2.warmup_cosine(40.0, args) == 1
    for epoch in (0.003, 1.0, 20.0, 39.999, 40.5, 100.0, 420.0, 799.99, 800.0):
        expected = epoch / 40 if epoch < 40 else (1 + math.cos(math.pi * (epoch - 40) / 760)) / 2
        assert simclr_v2.warmup_cosine(epoch, args) == pytest.approx(expected, abs=1e-12)


FINETUNE = "finetune --init x --recipe imagenet"


@pytest.mark.parametrize("flags, peak", [
    ("--recipe imagenet", 6.4), ("--recipe imagenet-v1", 4.8), ("--recipe cifar", 2.0),  # sheet 4.1
    ("--recipe imagenet --base-lr 0.075", 4.8),                                          # and v1's
    ("--recipe imagenet-v1 --batch-size 256", 0.3), ("--recipe imagenet --batch-size 256", 1.6),
    (FINETUNE, 0.16), (f"{FINETUNE} --width 2", 0.064), (f"{FINETUNE} --sk", 0.064),     # sheet 4.4
    (f"{FINETUNE}-v1", 0.8),
    ("linear --init none --recipe imagenet", 1.6), ("linear --init none --recipe cifar", 0.2),
    ("distill --init none --teacher x --recipe imagenet", 6.4)])                    # sheets 4.3, 4.5
def test_peak_learning_rates_are_the_sheets(flags, peak):
    assert simclr_v2.peak_lr(parse(*flags.split())) == pytest.approx(peak, rel=1e-9)


# ---------------------------------------------------------------------------- model and its memory


def labels_of(n=8, seed=1):
    return torch.randint(4, (n,), generator=torch.Generator().manual_seed(seed))


def test_both_views_pass_through_batch_norm_together():  # sheet 2.1, "BN sync"; sheet 6, T6
    model, x = build("online"), views()
    whole, parts = (copy.deepcopy(model) for _ in range(2))
    z1, z2, keys, logits = model(x)
    h = whole.encoder(x)
    assert keys is None and logits.shape == (16, 4)
    assert furthest([z1, z2], whole.projector(h).chunk(2)) < 1e-12
    assert furthest([logits], [whole.online(h)]) < 1e-12
    assert furthest([z1, z2], [parts.projector(parts.encoder(y)) for y in x.chunk(2)]) > 1e-2
    states = [{name: y for name, y in m.state_dict().items() if "running" in name}.values()
              for m in (model, whole, parts)]
    assert furthest(states[0], states[1]) < 1e-12 and furthest(states[0], states[2]) > 1e-3
    plain = build()
    assert plain(x)[2:] == (None, None)
    assert not [name for name in plain.state_dict() if "key" in name or "queue" in name]


def test_the_online_classifier_sends_no_gradient_to_the_encoder():  # sheet 4.3
    model = build("online")
    names, parameters = zip(*[(name, p) for name, p in model.named_parameters() if p.requires_grad])
    logits = model(views())[3]
    loss = cross_entropy(logits, labels_of().repeat(2))
    for name, g in zip(names, torch.autograd.grad(loss, parameters, allow_unused=True)):
        assert (g is not None and g.any().item()) == name.startswith("online."), name
    assert {name for name in names if "online" in name} == {"online.weight", "online.bias"}
    assert model.online.weight.shape == (4, 8)  # reads h, not z


def test_keys_are_those_of_the_momentum_networks_without_gradient():  # sheet 4.2
    torch.manual_seed(0)
    fresh = SimCLR(Tiny(), dim=6, queue=8)
    named = dict(fresh.named_parameters())
    assert all(torch.equal(p, named[f"key_{x}"]) for x, p in named.items() if "key" not in x)
    assert not any(p.requires_grad for name, p in named.items() if "key" in name)
    assert fresh.queue.shape == (8, 6) and "queue" in fresh.state_dict()
    assert furthest([fresh.queue.norm(dim=1)], [torch.ones(8)]) < 1e-6
    model, x = build("queue"), views()
    twin = copy.deepcopy(model)
    z1, z2, keys, _ = model(x)
    theirs = [normalize(k) for k in twin.key_projector(twin.key_encoder(x)).chunk(2)]
    assert furthest([normalize(k) for k in keys], theirs) < 1e-12
    assert z1.requires_grad and z2.requires_grad and not any(k.requires_grad for k in keys)
    online = twin.projector(twin.encoder(x)).chunk(2)
    assert furthest([z1, z2], online) < 1e-12
    assert furthest([normalize(k) for k in keys], [normalize(k) for k in online]) > 1e-2


def in_order(rows):
    """Rows sorted by their first number, for their order within one step is free."""
    return rows[rows[:, 0].argsort()]


@pytest.mark.parametrize("size", [4, 10, 12, 16])
def test_queue_holds_the_newest_keys_of_both_views_with_length_1(size):
    torch.manual_seed(0)
    model, g = SimCLR(Tiny(), dim=6, queue=size).to(DOUBLE), torch.Generator().manual_seed(3)
    steps = [in_order(model.queue.clone())]
    for _ in range(8):
        keys = 5 * torch.randn(2, 2, 6, generator=g, dtype=DOUBLE)
        model.enqueue(tuple(keys), 0.9)
        steps.append(normalize(keys.flatten(0, 1)))
        assert model.queue.shape == (size, 6)
        assert furthest([model.queue.norm(dim=1)], [torch.ones(size, dtype=DOUBLE)]) < 1e-6
        remaining, rows = size, model.queue.clone()
        for newest in reversed(steps):  # whole steps, then a part of the oldest
            gaps = (newest[:, None] - rows).abs().amax(2) < 1e-12
            if len(newest) > remaining:
                assert gaps.any(1).sum() == remaining
                break
            assert gaps.any(1).all()
            remaining -= len(newest)


def test_enqueue_averages_parameters_alone():  # EMA, sheet 4.2
    model, x = build("queue, online"), views()
    keys = model(x)[2]
    before = copy.deepcopy(model.state_dict())
    model.enqueue(keys, 0.8)
    moved = 0
    for name, after in model.state_dict().items():
        expected = before[name]
        if name.startswith("key_") and name in dict(model.named_parameters()):
            expected = 0.8 * expected + 0.2 * before[name[4:]]
            moved += furthest([after], [before[name]]) > 1e-3
        if after.is_floating_point() and name != "queue":
            assert furthest([after], [expected]) < 1e-14, name
    assert moved == 12  # conv, its bias, norm; three linear, three norms, the last without beta


# ----------------------------------------------------------------------------- one training step

STEP = "--recipe imagenet --batch-size 400 --base-lr 0.01 --weight-decay 0.1"
KINDS = {"plain": "", "online": "", "online, queue": "--queue 1600 --ema-momentum 0.8"}
EPOCHS = (0.0, 20.0, 50.5, 400.25)


def slow_step(kind, model, buffers, x, labels, epoch, mistake=""):
    """LARS at 0.01 * sqrt(400), warm-up of 40 of 800 epochs (sheets 1.1, 1.6, 4)."""
    def network(y, key=""):
        h = getattr(model, f"{key}encoder")(y)
        return h, getattr(model, f"{key}projector")(h)

    h, z = network(x)
    if mistake == "views apart":
        h, z = (torch.cat(y) for y in zip(*(network(view) for view in x.chunk(2))))
    z1, z2 = z.chunk(2)
    if "queue" in kind:
        with torch.no_grad():
            k = network(x, "" if mistake == "online keys" else "key_")[1].chunk(2)
        queue = model.queue.clone()
        if mistake == "keys in queue":
            queue = torch.cat([queue, normalize(torch.cat(k))])
        loss = 2 * slow_memory(z1, z2, *k, queue, 0.1)
    else:
        loss = 2 * slow_loss(z1, z2, 0.1)
    trained = loss / (2 if mistake == "half the loss" else 1)  # sheet 6, T3
    if "online" in kind:
        both = labels.repeat_interleave(2) if mistake == "labels interleaved" else labels.repeat(2)
        h = h if mistake == "online gradient to the encoder" else h.detach()
        trained = trained + cross_entropy(model.online(h), both)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(trained, [*named.values()])
    share = epoch / 40 if epoch < 40 else (1 + math.cos(math.pi * (epoch - 40) / 760)) / 2
    lr = 0.01 * (400 / 256 if mistake == "linear rule" else 20) * share  # sheet 6, T19
    with torch.no_grad():
        for (name, p), g in zip(named.items(), gradients):
            kind_of, old = kind_of_tensor(name, p), p.clone()
            if mistake == "norms adapted" and p.ndim == 1:
                kind_of = "adapted"
            if mistake == "norms decayed" and p.ndim == 1:
                kind_of = "raw, decayed"
            if mistake == "classifier adapted" and "online" in name:
                kind_of = kind_of.replace("raw, decayed", "adapted")
            if mistake == "classifier not decayed" and "online" in name:
                kind_of = "raw"
            v = buffers.get(name, torch.zeros_like(p))
            new, buffers[name] = slow_lars(p, g, v, lr, kind_of, mistake=mistake,
                                           decay=0 if mistake == "no decay" else 0.1)
            p.copy_(new)
            if "queue" in kind and "online" not in name and mistake != "no average":
                average = old if mistake == "average before the step" else p
                model.get_parameter(f"key_{name}").mul_(0.8).add_(0.2 * average)
        if "queue" in kind:
            model.queue.copy_(torch.cat([model.queue[16:], normalize(torch.cat(k))]))
    return loss.detach()


def step_differs(kind, mistake=""):
    args, model, twin = parse(*STEP.split(), *KINDS[kind].split()), build(kind), build(kind)
    optimizer, buffers, worst = simclr_v2.build_optimizer(model, args), {}, []
    for i, epoch in enumerate(EPOCHS):
        x, labels = views(seed=30 + i), labels_of(seed=30 + i)
        ours = simclr_v2.train_step(model, optimizer, x, labels if "online" in kind else None,
                                    epoch, args)[0]
        assert ours.shape == () and not ours.requires_grad
        theirs = slow_step(kind, twin, buffers, x, labels, epoch, mistake)
        worst.append(abs(ours - theirs).item())
    states = model.state_dict(), twin.state_dict()
    for name, y in states[1].items():
        if y.is_floating_point():
            pair = [states[0][name], y]
            worst.append(furthest(*([in_order(y)] if name == "queue" else [y] for y in pair)))
    return max(worst)


@pytest.mark.parametrize("kind", KINDS)
def test_training_steps_equal_those_written_out(kind):
    assert step_differs(kind) < 1e-9


@pytest.mark.parametrize("mistake", [
    "views apart", "half the loss", "labels interleaved", "online gradient to the encoder",
    "linear rule", "norms adapted", "norms decayed", "classifier adapted", "classifier not decayed",
    "lr outside the buffer", "no decay", "online keys", "keys in queue", "average before the step",
    "no average"])
def test_steps_written_out_with_a_mistake_differ(mistake):
    queue = mistake in ("online keys", "keys in queue", "average before the step", "no average")
    assert step_differs("online, queue" if queue else "online", mistake) > 1e-6


def test_a_step_trains_twice_the_mean_in_one_forward_of_both_views():  # sheet 1.1; sheet 6, T3
    args, model, seen, found = parse(*STEP.split()), build("online"), [], {}
    twin, x = copy.deepcopy(model), views()
    optimizer = simclr_v2.build_optimizer(model, args)
    model.encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    step = optimizer.step

    def recorded(*rest):
        found.update({name: p.grad.clone() for name, p in model.named_parameters()
                      if p.grad is not None})
        return step(*rest)

    optimizer.step = recorded
    loss = simclr_v2.train_step(model, optimizer, x, labels_of(), 40.0, args)[0]
    z1, z2, _, logits = twin(x)
    mean = nt_xent_loss(z1, z2, 0.1)
    assert seen == [16] and loss.item() == pytest.approx(2 * mean.item(), rel=1e-12)
    named = {name: p for name, p in twin.named_parameters()
             if p.requires_grad and "online" not in name}
    expected = torch.autograd.grad(2 * mean, [*named.values()])
    ours = [found[name] for name in named]
    assert furthest(ours, expected) < 1e-12
    assert all(found[name].abs().max() > 1e-4 for name in named if name != "encoder.conv.bias")
    assert furthest(ours, [g / 2 for g in expected]) > 1e-3
    loss = cross_entropy(logits, labels_of().repeat(2))
    expected = torch.autograd.grad(loss, [*twin.online.parameters()])
    assert furthest([found["online.weight"], found["online.bias"]], expected) < 1e-12
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.2)


def test_the_online_classifier_skips_unknown_labels():  # STL-10's are -1
    args, model, labels = parse(*STEP.split()), build("online"), labels_of()
    labels[::3] = -1
    twin, x = copy.deepcopy(model), views()
    simclr_v2.train_step(model, simclr_v2.build_optimizer(model, args), x, labels, 40.0, args)
    both = labels.repeat(2)
    loss = cross_entropy(twin(x)[3][both >= 0], both[both >= 0], reduction="sum") / 16
    assert furthest([p.grad for p in model.online.parameters()],
                    torch.autograd.grad(loss, [*twin.online.parameters()])) < 1e-12


def test_the_first_step_of_all_has_lr_0_and_leaves_the_weights():  # sheet 4.1
    args, model = parse(*STEP.split()), build()
    before = copy.deepcopy(model.state_dict())
    simclr_v2.train_step(model, simclr_v2.build_optimizer(model, args), views(), None, 0.0, args)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


def test_a_step_with_a_memory_moves_only_the_online_networks_by_gradient():
    args, model = parse(*STEP.split(), "--queue", 1600, "--ema-momentum", 1), build("queue")
    optimizer, before = simclr_v2.build_optimizer(model, args), copy.deepcopy(model.state_dict())
    simclr_v2.train_step(model, optimizer, views(), None, 40.0, args)
    for name, p in model.named_parameters():
        frozen = not p.requires_grad
        assert torch.equal(p, before[name]) == frozen, name
    assert not torch.equal(model.queue, before["queue"])
    assert not model.projector[-1][1].bias.any()


# -------------------------------------------------------------------- fine-tuning, sheet 1.4, T8-T12


def tune_network(k, frozen=False, layers=3):
    torch.manual_seed(0)
    encoder, head = shaken(Tiny()), shaken(projection_head(8, layers, 6))
    return TaskNetwork(encoder, [*head[:k]], 5, frozen=frozen).to(DOUBLE), encoder, head


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_the_classifier_reads_the_output_of_layer_k(k):
    task, encoder, head = tune_network(k)
    x, width = views(), 6 if k == 3 else 8
    assert task.fc.weight.shape == (5, width) and task.fc.bias.shape == (5,)
    assert not task.fc.weight.any() and not task.fc.bias.any()  # not a pre-training one: T9
    kept = [id(p) for layer in head[:k] for p in layer.parameters()]
    ours = [id(p) for p in task.parameters()]
    assert {*ours} == {*map(id, encoder.parameters()), *kept, *map(id, task.fc.parameters())}
    targets = torch.randint(5, (16,), generator=torch.Generator().manual_seed(0))
    fresh = task(x)
    assert fresh.shape == (16, 5) and not fresh.any()
    assert cross_entropy(fresh, targets).item() == pytest.approx(math.log(5), abs=1e-12)
    with torch.no_grad():
        task.fc.weight.normal_(generator=torch.Generator().manual_seed(1))
    twins = copy.deepcopy(encoder), copy.deepcopy(head)
    h = twins[0](x)
    outputs = [h]  # H of the sheet: h, out 1, ..., out L
    for i, layer in enumerate(twins[1]):
        h = layer[1](layer[0](h))
        outputs.append(h := h.relu() if i < 2 else h)
    assert furthest([task(x)], [outputs[k] @ task.fc.weight.T]) < 1e-12
    if k:  # the linear's output, before norm and ReLU, is another
        before = head[k - 1][0](outputs[k - 1])
        assert furthest([task(x)], [before @ task.fc.weight.T]) > 1e-2
        assert k == 3 or furthest([task(x)], [outputs[k - 1] @ task.fc.weight.T]) > 1e-2
    else:
        assert furthest([task(x)], [normalize(outputs[0]) @ task.fc.weight.T]) > 1e-2


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_fine_tuning_trains_everything_and_with_the_batchs_statistics(k):  # T10, T11
    task, encoder, head = tune_network(k)
    with torch.no_grad():
        task.fc.weight.normal_(generator=torch.Generator().manual_seed(1))
    task.train()
    statistics = copy.deepcopy([*task.named_buffers()])
    loss = cross_entropy(task(views()), torch.arange(16) % 5)
    loss.backward()
    for name, p in task.named_parameters():
        assert p.requires_grad or name.endswith("1.bias")  # the last batch norm has no beta
        if p.requires_grad and not name.endswith("conv.bias"):  # which the batch norm takes away
            assert p.grad.abs().max() > 1e-8, name
    assert all(not torch.equal(before, after) for (name, before), (_, after)
               in zip(statistics, task.named_buffers()) if "running" in name)
    assert k == 0 or head[0][0].weight.grad.any()  # W 1, which TF1's code leaves alone
    assert all(p.grad is None for layer in head[k:] for p in layer.parameters())
    task.zero_grad()
    fixed = task.eval()(views())
    assert torch.allclose(fixed[:3], task(views()[:3]))


@pytest.mark.parametrize("k", [0, 1, 3])
def test_a_frozen_network_trains_the_classifier_alone_on_fixed_features(k):  # T12
    task, encoder, head = tune_network(k, frozen=True)
    x = views()
    with torch.no_grad():
        task.fc.weight.normal_(generator=torch.Generator().manual_seed(1))
    h = copy.deepcopy(encoder).eval()(x)
    for layer in copy.deepcopy(head).eval()[:k]:
        h = layer(h)
    for mode in (True, False, True):
        assert task.train(mode) is task and task.training == mode
        before = copy.deepcopy(task.state_dict())
        out = task(x)
        assert furthest([out], [h @ task.fc.weight.T]) < 1e-12
        assert all(torch.equal(y, before[name]) for name, y in task.state_dict().items())
        assert not any(m.training for net in (encoder, *head[:k]) for m in net.modules())
    found = [p for p in task.parameters() if p.requires_grad]
    task.zero_grad()
    cross_entropy(out, torch.arange(16) % 5).backward()
    assert all(p.grad is None for net in (encoder, *head[:k]) for p in net.parameters())
    assert task.fc.weight.grad.any() and task.fc.bias.grad.any()
    assert {id(task.fc.weight), id(task.fc.bias)} <= {*map(id, found)}


# ---------------------------------------------------------------- distillation, sheet 1.5, T13


def slow_distillation(student, teacher, tau, mistake=""):
    """The mean over images of - sum over classes of P_T log P_S."""
    total = 0
    for s, t in zip(student, teacher):
        if mistake == "direction":
            s, t = t, s
        tau_t = 1 if mistake == "teacher at 1" else tau
        tau_s = 1 if mistake == "student at 1" else tau
        below_s, below_t = sum((x / tau_s).exp() for x in s), sum((x / tau_t).exp() for x in t)
        for x, y in zip(s, t):
            total = total - (y / tau_t).exp() / below_t * ((x / tau_s).exp() / below_s).log()
        if mistake == "divergence":
            for y in t:
                p = (y / tau).exp() / below_t
                total = total + p * p.log()
    scale = {"summed": len(student), "times tau squared": tau**2, "per class": 1 / student.shape[1]}
    return total / len(student) * scale.get(mistake, 1)


def some_logits(seed=0, n=6, classes=4):
    g = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(n, classes, generator=g, dtype=DOUBLE).requires_grad_() for _ in "st"]


@pytest.mark.parametrize("tau", [0.05, 0.1, 0.5, 1.0, 2.0])
def test_distillation_equals_a_loop_with_gradient_to_the_student_alone(tau):
    student, teacher = some_logits()
    ours, expected = distillation_loss(student, teacher, tau), slow_distillation(
        student, teacher, tau)
    assert ours.shape == () and ours.dtype == DOUBLE
    assert ours.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-12)
    ds, dt = torch.autograd.grad(ours, (student, teacher), allow_unused=True)
    assert dt is None
    difference = (student / tau).softmax(1) - (teacher / tau).softmax(1)
    assert furthest([ds], [difference / tau / 6]) < 1e-12  # its size: 1 / tau, no tau squared
    assert tau == 1 or furthest([ds], [difference * tau / 6]) > 1e-2


@pytest.mark.parametrize("mistake", ["direction", "teacher at 1", "student at 1", "summed",
                                     "times tau squared", "per class", "divergence"])
def test_the_loop_tells_wrong_distillations_apart(mistake):
    student, teacher = some_logits()
    for tau in (0.3, 2.0):
        ours, wrong = (distillation_loss(student, teacher, tau),
                       slow_distillation(student, teacher.detach(), tau, mistake))
        assert abs(ours - wrong) > 1e-3
        if mistake != "divergence":  # differs by the teacher's entropy, a constant
            both = [torch.autograd.grad(x, student)[0] for x in (ours, wrong)]
            assert furthest(both[:1], both[1:]) > 1e-3


def test_distillation_is_least_where_the_student_is_the_teacher():
    student, teacher = some_logits()
    for tau in (0.1, 1.0, 3.0):
        p = (teacher / tau).softmax(1)
        entropy = -(p * p.log()).sum(1).mean().item()
        assert distillation_loss(student, teacher, tau).item() > entropy + 1e-3
        same = (teacher.detach() + torch.linspace(-9, 9, 6, dtype=DOUBLE)[:, None]).requires_grad_()
        loss = distillation_loss(same, teacher, tau)  # a constant for each image has no effect
        assert loss.item() == pytest.approx(entropy, rel=1e-9)
        assert torch.autograd.grad(loss, same)[0].abs().max() < 1e-12
    certain = 1e3 * torch.eye(4, dtype=DOUBLE)
    assert distillation_loss(certain, certain, 0.1).item() == 0
    wrong = distillation_loss(certain, certain.roll(1, 0), 0.1)
    assert wrong.item() == pytest.approx(1e4)
    flat = torch.zeros(6, 4, dtype=DOUBLE)  # a fresh classifier, as student
    assert distillation_loss(flat, teacher, 0.1).item() == pytest.approx(math.log(4))


DISTILL_STEP = ("distill --init none --teacher x --recipe imagenet --batch-size 400 --base-lr 0.01 "
                "--weight-decay 0.1 --temperature 0.5")


def distilled(flags, mistake=""):
    """How far three steps are from those written out: of 400 epochs, 20 of warm-up."""
    args = parse(*f"{DISTILL_STEP} {flags}".split())
    torch.manual_seed(0)
    teacher, student = (TaskNetwork(shaken(Tiny(), seed), [], 4).to(DOUBLE) for seed in (5, 6))
    for net in (teacher, student):
        nn.init.normal_(net.fc.weight)
    teacher.eval()
    twin, optimizer = copy.deepcopy(student), simclr_v2.build_optimizer(student, args)
    buffers, worst, alpha = {}, [], args.alpha
    for i, epoch in enumerate((0.0, 10.0, 200.25)):
        x, labels = views(4, seed=40 + i), torch.tensor([0, -1, 3, -1, -1, 2, -1, -1])
        inputs, hooks = [], [net.encoder.register_forward_pre_hook(
            lambda module, inputs_: inputs.append(inputs_[0])) for net in (teacher, student)]
        ours, s, t = simclr_v2.distill_step(student, teacher, optimizer, x, labels, epoch, args)
        [hook.remove() for hook in hooks]
        assert len(inputs) == 2 and all(y is x for y in inputs)  # T14: one crop for both
        assert not (ours.requires_grad or s.requires_grad or t.requires_grad)
        theirs = twin(x), teacher(x).detach()
        worst += [furthest([s, t], theirs)]
        known = cross_entropy(theirs[0][labels >= 0], labels[labels >= 0], reduction="sum")
        known = known / (3 if mistake == "by the labelled" else 8)
        loss = slow_distillation(*theirs, 0.5) * (1 if mistake == "no tau squared" else 0.25)
        loss = (1 - alpha) * loss + alpha * known if mistake == "alpha of the labels" else (
            alpha * loss + (1 - alpha) * known)
        worst.append(abs(ours - loss).item())
        named = dict(twin.named_parameters())
        gradients = torch.autograd.grad(loss, [*named.values()])
        lr = 0.2 * (epoch / 20 if epoch < 20 else (1 + math.cos(math.pi * (epoch - 20) / 380)) / 2)
        for (name, p), g in zip(named.items(), gradients):
            kind = "raw" if p.ndim == 1 else "adapted"  # sheet 1.6: the demo's classifier too
            if mistake == "classifier not adapted" and name == "fc.weight":
                kind = "raw, decayed"
            new, buffers[name] = slow_lars(p, g, buffers.get(name, torch.zeros_like(p)), lr, kind)
            with torch.no_grad():
                p.copy_(new)
    return max(*worst, furthest(student.state_dict().values(), twin.state_dict().values()))


@pytest.mark.parametrize("flags", ["", "--alpha 0.75"])
def test_distillation_steps_equal_those_written_out(flags):
    assert distilled(flags) < 1e-9


@pytest.mark.parametrize("mistake", ["by the labelled", "no tau squared", "alpha of the labels",
                                     "classifier not adapted"])
def test_distillation_steps_with_a_mistake_differ(mistake):
    assert distilled("--alpha 0.75", mistake) > 1e-3


# ---------------------------------------------------------------------------- augmentation, sheet 3


@pytest.mark.parametrize("recipe", ["imagenet", "imagenet-v1", "cifar", "demo"])
def test_views_are_those_of_simsiam(recipe):  # which test_augmentation.py compares with torchvision
    args = parse("--recipe", recipe)
    g = torch.Generator().manual_seed(0)
    x = torch.rand(48, 3, 40, 40, generator=g)
    u = torch.rand(48, simclr_v2.COLOUR_DRAWS, generator=g, dtype=DOUBLE)
    ours = simclr_v2.augment(x, u, args)
    assert furthest([ours], [simsiam.augment(x, u[:, :12], args)]) < 1e-5
    assert furthest([ours], [simsiam.augment(x, u.roll(1, 0)[:, :12], args)]) > 0.1  # u: each image's own


# --------------------------------------------------------------------------- recipes, sheets 3 and 4

BOTH = dict(  # v1 and v2 on ImageNet
    arch="resnet50", width=1, sk=False, small_images=False,
    zero_init_residual=True,                              # 2.1
    dim=128,                                              # 1.3
    temperature=0.1, optimizer="lars", momentum=0.9,      # 4.1
    batch_size=4096,                                      # 4.1
    queue=0, ema_momentum=0.999,                          # 4.2: off by default
    image_size=224, crop_min=0.08,                        # 3, rows 1 and 5
    jitter=(0.8, 0.8, 0.8, 0.2), jitter_prob=0.8, gray_prob=0.2, blur_prob=0.5,  # 3, s = 1
    mean=(0, 0, 0), std=(1, 1, 1))                        # 3: no normalisation anywhere; T18
PRETRAIN = {
    "imagenet": BOTH | dict(head_layers=3, lr_rule="sqrt", base_lr=0.1, epochs=800, warmup_epochs=40,
                            weight_decay=1e-4),           # 4.1, column "v2 ImageNet"
    "imagenet-v1": BOTH | dict(head_layers=2, lr_rule="linear", base_lr=0.3, epochs=1000,
                               warmup_epochs=10, weight_decay=1e-6),  # 4.1, column "v1 ImageNet"
    "cifar": BOTH | dict(                                 # 4.1, column "CIFAR-10 command"
        arch="resnet18", small_images=True, image_size=32,  # 5.4, T17
        head_layers=3, lr_rule="linear", base_lr=1, epochs=1000, warmup_epochs=10, batch_size=512,
        weight_decay=1e-4, temperature=0.5,
        jitter=(0.4, 0.4, 0.4, 0.1), blur_prob=0)}        # 3: s = 0.5, no blur
LINEAR = {  # 4.3
    "imagenet": dict(lr_rule="linear", base_lr=0.1, epochs=90, batch_size=4096, momentum=0.9,
                     crop_min=0.08),
    "cifar": dict(lr_rule="linear", base_lr=0.1, epochs=100, batch_size=512, momentum=0.9,
                  weight_decay=0, crop_min=0.08)}
LINEAR["imagenet-v1"] = LINEAR["imagenet"]
FINETUNED = {  # 4.4
    "imagenet": dict(optimizer="lars", lr_rule="sqrt", base_lr=0.005, batch_size=1024, momentum=0.9,
                     weight_decay=0, crop_min=0.08),
    "imagenet-v1": dict(lr_rule="linear", base_lr=0.05, batch_size=4096, momentum=0.9, weight_decay=0,
                        crop_min=0.08, from_layer=0)}
DISTILLED = {  # 4.5: as in pre-training; 1.5: no tau squared, all images without their labels
    "imagenet": dict(temperature=1, tau_squared=True, alpha=1, optimizer="lars", lr_rule="sqrt",
                     base_lr=0.1, epochs=400, batch_size=4096, warmup_epochs=20, momentum=0.9,
                     weight_decay=1e-4, crop_min=0.08)}
STAGES = {"": ("PRETRAIN", PRETRAIN), "linear --init none": ("LINEAR", LINEAR),
          "finetune --init x": ("FINETUNE", FINETUNED),
          "distill --init none --teacher x": ("DISTILL", DISTILLED)}


def plain(value):
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("stage, recipe", [(stage, recipe) for stage, (_, table) in STAGES.items()
                                           for recipe in table])
def test_recipes_are_the_sheets(stage, recipe):
    name, table = STAGES[stage]
    assert tuple(simclr_v2.RECIPE_NAMES) == ("imagenet", "imagenet-v1", "imagenet-vit", "cifar",
                                             "demo")
    column, args = simclr_v2.RECIPE_NAMES.index(recipe), parse(*stage.split(), "--recipe", recipe)
    for field, value in table[recipe].items():
        assert plain(getattr(args, field)) == value, field
        assert plain(getattr(simclr_v2, name)[field][column]) in (value, None), field
    if stage.startswith("linear"):
        assert args.weight_decay in (0, 1e-6)  # 4.3: the paper's, README's
    if stage.startswith(("linear", "finetune")):
        assert not getattr(args, "warmup_epochs", 0)  # 4.3, 4.4
    assert all(len(values) == 5 for values in getattr(simclr_v2, name).values())


@pytest.mark.parametrize("labels, epochs, layer", [("0.01", 60, 1), ("0.1", 30, 1), ("1.0", 30, 0)])
def test_fine_tuning_follows_the_share_of_labels(labels, epochs, layer):  # sheet 4.4
    for more in ([], ["--width", 2], ["--sk"], ["--width", 3, "--sk"]):
        args = parse(*FINETUNE.split(), "--labels", labels, *more)
        assert (args.epochs, args.from_layer) == (epochs, layer)
        assert args.base_lr == (0.002 if more else 0.005)
    args = parse(*FINETUNE.split(), "--labels", labels, "--epochs", 7, "--from-layer", 2, "--base-lr",
                 0.3, "--sk")
    assert (args.epochs, args.from_layer, args.base_lr) == (7, 2, 0.3)


def test_evaluations_by_sgd_are_nesterovs():  # sheets 4.3, 4.4
    for flags in (f"{FINETUNE}-v1", "linear --init none --recipe imagenet",
                  "linear --init none --recipe cifar"):
        frozen = flags.startswith("linear")
        args, (task, *_) = parse(*flags.split()), tune_network(0, frozen)
        optimizer = simclr_v2.build_optimizer(task, args)
        assert type(optimizer) is torch.optim.SGD
        for group in optimizer.param_groups:
            assert group["nesterov"] and group["momentum"] == 0.9
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert (trained == {id(task.fc.weight), id(task.fc.bias)}) is frozen


# --------------------------------------------------------- several processes equal one, T1, T2, T4

N, WORLDS = 8, (4, 2, 1)
GATHERS = ("right", "no gradient", "local slice", "times W")
TEXTBOOK = ("right", "wrong label offset", "unshifted mask", "masked positives", "no self mask",
            "local negatives", "no gradient", "local slice", "times W")


def textbook(z1, z2, tau, which):
    """Local anchors against all processes' embeddings, logits laid out as in sheet 1.1."""
    local = [normalize(z) for z in (z1, z2)]
    everyone, first = local, 0
    if which != "local negatives":
        everyone, first = [Gather.apply(z, which) for z in local], len(z1) * dist.get_rank()
    own, n, total = torch.arange(len(z1)), len(everyone[0]), 0
    nothing = torch.tensor(-math.inf, dtype=DOUBLE)
    label = own + (0 if which == "wrong label offset" else first)
    diagonal = n + own + (0 if which == "unshifted mask" else first)
    for v in range(2):
        logits = torch.cat([local[v] @ everyone[1 - v].T, local[v] @ everyone[v].T], 1) / tau
        positives = logits[own, label]
        if which != "no self mask":
            logits = logits.index_put((own, diagonal), nothing)
        if which == "masked positives":
            logits = logits.index_put((own, label), nothing)
        total = total + (logits.logsumexp(1) - positives).mean() / 2
    return total


def on_inputs(rank=0, world=1, n=N, loss=nt_xent_loss, memory=True):
    """Loss and input gradients of this process's images, without a memory and with one."""
    z, k = (torch.cat(embeddings(n, 6, seed=seed)).detach() for seed in (2, 3))
    z1, z2 = part(z, rank, world).requires_grad_().chunk(2)
    keys, record = part(k, rank, world).chunk(2), {}
    cases = {"plain": (), "keys": (keys,), "keys and queue": (keys, unit_rows(10, 6))}
    for name, more in cases.items():
        if memory or not more:
            value = loss(z1, z2, 0.1, *more)
            gradients = torch.autograd.grad(value, (z1, z2))
            record |= {f"mean {name}": value.detach()}
            record |= {f"split {name} {i}": g / world for i, g in enumerate(gradients)}
    return record


def network_steps(kind, rank=0, world=1):
    """Two steps of the program's own: model, optimizer, DDP, batch norm of the global batch."""
    args, model, record = parse(*STEP.split(), *KINDS[kind].split()), build(kind), {}
    optimizer = simclr_v2.build_optimizer(model, args)
    net, done = simclr_v2.prepare(model, args), record_gradients(model, optimizer, record)
    for i, epoch in enumerate(EPOCHS[1:3]):
        x = part(views(N, seed=20 + i), rank, world)
        labels = labels_of(N, seed=i).chunk(world)[rank] if "online" in kind else None
        loss = simclr_v2.train_step(net, optimizer, x, labels, epoch, args)[0]
        record |= {f"mean loss {i}": loss.clone()}
    assert done()
    for key, x in model.state_dict().items():
        if x.is_floating_point():
            record[f"each {key}"] = in_order(x) if key == "queue" else x.clone()
    return record


alone = functools.cache(network_steps)


def worker(rank, world):
    assert (simclr_v2.rank(), simclr_v2.world_size()) == (rank, world)
    ours = simclr_v2.gather_with_gradient
    results = {("inputs",): on_inputs(rank, world),
               ("one image each",): on_inputs(rank, world, n=4)}
    for kind in KINDS:
        results[kind,] = network_steps(kind, rank, world)
    for which in TEXTBOOK if world > 1 else ():
        loss = functools.partial(textbook, which=which)
        results["textbook", which] = on_inputs(rank, world, loss=loss, memory=False)
    for which in GATHERS if world > 1 else ():
        simclr_v2.gather_with_gradient = lambda x, which=which: Gather.apply(x, which)
        results["inputs", which] = on_inputs(rank, world, memory=False)
        results["plain", which] = network_steps("plain", rank, world)
        simclr_v2.gather_with_gradient = ours
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(worker, tmp_path_factory.mktemp("ranks"), WORLDS)


@pytest.mark.parametrize("world", WORLDS)
def test_losses_and_gradients_on_ranks_equal_one_process(ranks, world):
    for key, reference in (("inputs", on_inputs()), ("one image each", on_inputs(n=4))):
        worst = differs(ranks, reference, world, key)
        assert max(worst.values()) < 1e-10, worst
    z, k = (embeddings(N, 6, seed=seed) for seed in (2, 3))  # and one process is the loop's
    queue, reference = unit_rows(10, 6), on_inputs()
    for name, value in {"plain": slow_loss(*z, 0.1), "keys": slow_memory(*z, *k, None, 0.1),
                        "keys and queue": slow_memory(*z, *k, queue, 0.1)}.items():
        assert abs(reference[f"mean {name}"] - value) < 1e-10
        assert furthest([reference[f"split {name} {i}"] for i in range(2)],
                        torch.autograd.grad(value, z)) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", WORLDS)
def test_training_on_ranks_equals_one_process(ranks, world, kind):
    """Losses, gradients, networks, running statistics and memory, over two steps."""
    worst = differs(ranks, alone(kind), world, kind)
    assert max(worst.values()) < 1e-10, worst


@pytest.mark.parametrize("world", [2, 4])
def test_wrong_gathers_fail_those_checks_though_their_losses_are_right(ranks, world):
    for key, reference in (("inputs", on_inputs(memory=False)), ("plain", alone("plain"))):
        assert max(differs(ranks, reference, world, key, "right").values()) < 1e-10
        for which in GATHERS[1:]:
            worst = differs(ranks, reference, world, key, which)
            assert worst["gradient"] > 1e-3, (key, which)
            assert key == "plain" or worst["mean"] < 1e-12, which  # values cannot tell


@pytest.mark.parametrize("world", [2, 4])
def test_wrong_textbook_losses_fail_those_checks(ranks, world):
    reference = on_inputs(memory=False)
    assert max(differs(ranks, reference, world, "textbook", "right").values()) < 1e-10
    for which in TEXTBOOK[1:]:
        worst = differs(ranks, reference, world, "textbook", which)
        assert worst["gradient"] > 1e-3, which
        assert which in GATHERS or worst["mean"] > 1e-3, which
