"""simsiam.py against the paper: loss, gradients, heads, optimizer, recipes, monitors.

Every oracle here is written from the equations of arXiv 2011.10566 ("Sec.", "Eq.", "Table", "App.")
or, where it says so, from its released code.
"""
import copy
import math

import pytest
import torch
from torch import nn

import simsiam
from helpers import DOUBLE, Tiny, assert_fields, count, embedding_pairs, joined_views, settled
from simsiam import SimSiam, simsiam_loss


def random_outputs(batch=6, dim=5, dtype=DOUBLE, seed=0):
    """p1, p2, z1, z2 of very different lengths, as leaves that require gradients."""
    return [x for i in (0, 100) for x in embedding_pairs(batch, dim, dtype, seed + i)]


def tiny_model(**options):
    torch.manual_seed(0)
    return SimSiam(Tiny(), dim=6, predictor_dim=4, **options).to(DOUBLE)


# ------------------------------------------------------------------------ the loss and its gradient


def slow_distance(p, z, similarity="cosine"):
    """D(p, z): Eq. 1, or the cross-entropy of Sec. 4.5; one image at a time."""
    total = 0.0
    for a, b in zip(p.double(), z.double()):
        if similarity == "cosine":
            total -= (a @ b) / (a @ a).sqrt() / (b @ b).sqrt()
        else:
            total -= (b.exp() / b.exp().sum() * (a.exp() / a.exp().sum()).log()).sum()
    return total / len(p)


def slow_loss(p1, p2, z1, z2, similarity="cosine", symmetric=True):
    """Eq. 2-4; not symmetric: the first term alone, not halved (Sec. 4.6)."""
    first = slow_distance(p1, z2, similarity)
    return (first + slow_distance(p2, z1, similarity)) / 2 if symmetric else first


def cosine_gradient(p, z):
    """d D(p, z) / dp of a batch: -(z^ - cos(p, z) p^) / |p| / B, from Eq. 1; of z: (z, p)."""
    p_hat, z_hat = (x / x.norm(dim=1, keepdim=True) for x in (p, z))
    cosine = (p_hat * z_hat).sum(1, keepdim=True)
    return -(z_hat - cosine * p_hat) / p.norm(dim=1, keepdim=True) / len(p)


def cross_entropy_gradient(p, z):
    return (p.softmax(1) - z.softmax(1)) / len(p)


def cross_entropy_gradient_of_target(z, p):
    log_p, share = p.log_softmax(1), z.softmax(1)
    return -share * (log_p - (share * log_p).sum(1, keepdim=True)) / len(p)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("similarity", ["cosine", "cross-entropy"])
@pytest.mark.parametrize("options", [{}, dict(stop_grad=True), dict(stop_grad=False)], ids=str)
def test_loss_and_gradients_are_those_of_the_equations(similarity, symmetric, options):
    of_p, of_z = {"cosine": (cosine_gradient, cosine_gradient), "cross-entropy": (
        cross_entropy_gradient, cross_entropy_gradient_of_target)}[similarity]
    for seed, batch, dim in ((0, 6, 5), (1, 1, 7), (2, 17, 3)):
        outputs = p1, p2, z1, z2 = random_outputs(batch, dim, seed=seed)
        loss = simsiam_loss(*outputs, similarity=similarity, symmetric=symmetric, **options)
        assert loss.shape == () and loss.dtype == DOUBLE
        assert abs(loss - slow_loss(*outputs, similarity, symmetric)) < 1e-9
        found = torch.autograd.grad(loss, outputs, allow_unused=True)
        through_z = not options.get("stop_grad", True)  # sg(z), Eq. 3, is the default
        assert [g is not None for g in found] == [True, symmetric, through_z * symmetric, through_z]
        gradients = of_p(p1, z2), of_p(p2, z1), of_z(z1, p2), of_z(z2, p1)
        for actual, expected in zip(found, gradients):
            if actual is not None:
                expected = expected * (0.5 if symmetric else 1.0)
                torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
                assert expected.abs().max() > 1e-2  # so 1e-9 says something about the size, too


def test_oracle_tells_wrong_losses_from_the_right_one():  # mistakes that people made
    outputs, cosine = random_outputs(), nn.functional.cosine_similarity
    p1, p2, z1, z2 = outputs
    right = {symmetric: slow_loss(*outputs, symmetric=symmetric) for symmetric in (True, False)}
    assert abs(simsiam_loss(*outputs) - right[True]) < 1e-9  # by default
    for name, wrong in {
            "sign": (cosine(p1, z2) + cosine(p2, z1)).mean() / 2,
            "factor 2": -(cosine(p1, z2) + cosine(p2, z1)).mean(),
            "sum over the batch": -(cosine(p1, z2) + cosine(p2, z1)).sum() / 2,
            "same view": -(cosine(p1, z1) + cosine(p2, z2)).mean() / 2,
            "p with p": -cosine(p1, p2).mean(), "z with z": -cosine(z1, z2).mean(),
            "over the batch": -(cosine(p1, z2, dim=0) + cosine(p2, z1, dim=0)).mean() / 2,
            "not normalized": -((p1 * z2).sum(1) + (p2 * z1).sum(1)).mean() / 2,
            "only one term": -cosine(p1, z2).mean(), "other term": -cosine(p2, z1).mean(),
            "halved term": -cosine(p1, z2).mean() / 2,
            "shifted by one": -(cosine(p1, z2.roll(1, 0)) + cosine(p2, z1.roll(1, 0))).mean() / 2,
            "squared distance": 2 - (cosine(p1, z2) + cosine(p2, z1)).mean()}.items():
        if name != "only one term":  # that is the asymmetric loss
            assert abs(wrong - right[False]) > 1e-2, name
        assert abs(wrong - right[True]) > 1e-2, name
    exchanged = slow_loss(z1, z2, p1, p2, "cross-entropy")  # the arguments of the cross-entropy
    assert abs(exchanged - slow_loss(*outputs, "cross-entropy")) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("similarity", ["cosine", "cross-entropy"])
def test_loss_is_computed_in_float32_in_half_precision_and_under_autocast(dtype, similarity):
    outputs = random_outputs(4, 2048, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        loss = simsiam_loss(*outputs, similarity=similarity)
    assert loss.dtype == torch.float32
    expected = slow_loss(*outputs, similarity).item()
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    loss.backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in outputs[:2])
    huge = [torch.full((2, 2048), 300.0, dtype=dtype) for _ in range(4)]  # 300^2 * 2048 > 65504
    expected = {"cosine": -1, "cross-entropy": math.log(2048)}[similarity]
    assert simsiam_loss(*huge, similarity=similarity).item() == pytest.approx(expected, abs=1e-4)


def test_collapse_to_zero_stays_finite():  # the cosine of the authors' code has an eps of 1e-8
    outputs = [torch.zeros(3, 4, requires_grad=True) for _ in range(4)]
    loss = simsiam_loss(*outputs)
    loss.backward()
    assert loss.item() == 0 and all(x.grad.isfinite().all() for x in outputs[:2])


# --------------------------------------------------------------------------------------- the model


def layers(head):
    """A head's layers as words."""
    words = []
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            bias = ("no bias" if layer.bias is None
                    else "bias" if layer.bias.requires_grad else "frozen bias")
            words.append(f"fc {layer.in_features}-{layer.out_features} {bias}")
        elif isinstance(layer, nn.BatchNorm1d):
            assert layer.eps == 1e-5 and layer.momentum == 0.1 and layer.track_running_stats
            words.append(f"BN {layer.num_features} {'affine' if layer.affine else 'plain'}")
        elif not isinstance(layer, (nn.Sequential, nn.Identity)):
            words.append(type(layer).__name__)
    return ", ".join(words)


HIDDEN = "fc 8-8 no bias, BN 8 affine, ReLU, fc 8-8 no bias, BN 8 affine, ReLU, "
PROJECTOR = HIDDEN + "fc 8-6 frozen bias, BN 6 plain"  # the bias is frozen where a BN cancels it
PREDICTOR = "fc 6-4 no bias, BN 4 affine, ReLU, fc 4-6 bias"


@pytest.mark.parametrize("options, projector, predictor", [
    ({}, PROJECTOR, PREDICTOR), (dict(bn="default"), PROJECTOR, PREDICTOR),  # Table 3
    (dict(bn="none"), "fc 8-8 bias, ReLU, fc 8-8 bias, ReLU, fc 8-6 bias",
     "fc 6-4 bias, ReLU, fc 4-6 bias"),
    (dict(bn="hidden"), HIDDEN + "fc 8-6 bias", PREDICTOR),
    (dict(bn="all"), PROJECTOR, PREDICTOR + ", BN 6 affine"),
    (dict(predictor="none"), PROJECTOR, ""),  # Table 1
    (dict(predictor="frozen"), PROJECTOR, "fc 6-4 no bias, BN 4 affine, ReLU, fc 4-6 frozen bias"),
    (dict(projector_layers=2, hidden_dim=5),  # App. D: the CIFAR variant
     "fc 8-5 no bias, BN 5 affine, ReLU, fc 5-6 frozen bias, BN 6 plain", PREDICTOR)], ids=str)
def test_heads_of_every_row_of_tables_1_and_3(options, projector, predictor):
    model = tiny_model(**options)
    assert layers(model.projector) == projector and layers(model.predictor) == predictor
    frozen = {id(p) for p in model.predictor.parameters() if not p.requires_grad}
    assert len(frozen) == (5 if options.get("predictor") == "frozen" else 0)
    # Frozen or not, the gradient passes through it, and a frozen bias is PyTorch's random one
    assert model(*joined_views().chunk(2))[0].requires_grad
    fc = [m for m in model.projector if isinstance(m, nn.Linear)][-1]
    assert fc.bias.abs().max() <= fc.in_features**-0.5 and fc.bias.unique().numel() == 6


def test_default_heads_have_the_papers_sizes_and_start_as_in_pytorch():  # 2048-d, 512: Sec. 3
    encoder = Tiny()
    encoder.feature_dim = 2048  # ResNet-50's
    torch.manual_seed(0)
    model = SimSiam(encoder)
    # 3 weight matrices of 2048 x 2048, scale and shift of two BN, the frozen output bias
    assert count(model.projector) == 3 * 2048**2 + 2 * 2 * 2048 + 2048 == 12_593_152
    assert count(model.projector, True) == 12_591_104
    assert count(model.predictor) == 2 * 2048 * 512 + 2 * 512 + 2048 == 2_100_224
    for fc in model.modules():
        if isinstance(fc, nn.Linear):  # uniform: a fixed std of .01 may not converge
            bound = 1 / math.sqrt(fc.in_features)
            assert fc.weight.abs().max() <= bound
            assert fc.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("recipe, kernel", [("imagenet", 7), ("cifar", 3)])
def test_recipes_build_their_backbones(recipe, kernel):
    args = settled(simsiam, "--recipe", recipe, "--arch resnet18 --width 0.5")
    encoder = simsiam.build_encoder(args)
    assert encoder.conv1.kernel_size == (kernel, kernel) and encoder.feature_dim == 256
    last_scales = [m.bn2.weight for m in encoder.modules() if hasattr(m, "bn2")]
    assert len(last_scales) == 8 and not any(scale.any() for scale in last_scales)  # App. A


# ---------------------------------------------------------------------- schedule, optimizer, step


@pytest.mark.parametrize("epochs, warmup", [(100, 0), (800, 0), (100, 10)])
def test_cosine_steps_once_per_epoch_and_never_reaches_zero(epochs, warmup):  # authors' code
    args = settled(simsiam, "--recipe", "imagenet", "--epochs", epochs, "--warmup-epochs", warmup)
    for epoch in range(warmup, epochs):
        expected = (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2
        for part in (0.0, 0.3, 0.5, 0.999):
            found = simsiam.cosine_decay(epoch + part, args)
            assert found == pytest.approx(expected, abs=1e-12) and found > 0
    for epoch in (0.0, 0.25, 1.0, 3.7, 9.99) if warmup else ():  # it rises with every step
        assert simsiam.cosine_decay(epoch, args) == pytest.approx(epoch / 10, abs=1e-9)


def slow_step(model, velocity, x1, x2, share, args, joint=False, bn_decay=True, nesterov=False,
              scale=1.0, clear=True):
    """Algorithm 1 and SGD written out. The options after `args` are mistakes to tell apart."""
    z1, z2 = model.projector(model.encoder(torch.cat([x1, x2]))).chunk(2) if joint else [
        model.projector(model.encoder(x)) for x in (x1, x2)]  # BN statistics of each view
    p1, p2 = model.predictor(z1), model.predictor(z2)
    targets = (z1.detach(), z2.detach()) if args.stop_grad else (z1, z2)
    loss = slow_loss(p1, p2, *targets, args.similarity, args.symmetric)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(scale * loss, list(named.values()))
    lr = args.base_lr * args.batch_size / 256
    with torch.no_grad():
        for (name, weight), grad in zip(named.items(), grads):
            constant = name.startswith("predictor.") and args.predictor_lr == "constant"
            decay = args.weight_decay if bn_decay or weight.dim() > 1 else 0.0
            if not clear:
                grad = velocity[name + " grad"] = grad + velocity.get(name + " grad", 0)
            grad = grad + decay * weight
            velocity[name] = args.momentum * velocity[name] + grad if name in velocity else grad
            update = grad + args.momentum * velocity[name] if nesterov else velocity[name]
            weight -= lr * (1.0 if constant else share) * update
    return loss.detach(), z1.detach()


def run_both(flags="", **mistake):
    """Four steps of train_step and of the oracle; the largest difference of the weights."""
    base = "--recipe imagenet --batch-size 64 --base-lr 0.8 --weight-decay 0.01"
    args = settled(simsiam, base, flags)
    model, velocity = tiny_model(predictor=args.predictor), {}
    twin, optimizer = copy.deepcopy(model), simsiam.build_optimizer(model, args)
    for i, epoch in enumerate((0.0, 0.75, 40.5, 70.0)):
        share = (1 + math.cos(math.pi * int(epoch) / 100)) / 2
        x1, x2 = joined_views(seed=10 + i).chunk(2)
        loss, z1 = simsiam.train_step(model, optimizer, x1, x2, epoch, args)
        slow, slow_z1 = slow_step(twin, velocity, x1, x2, share, args, **mistake)
        if not mistake:
            assert abs(loss - slow) < 1e-12 and (z1 - slow_z1).abs().max() < 1e-9
            assert not loss.requires_grad and not z1.requires_grad
    return max((a - b).abs().max().item()
               for a, b in zip(model.state_dict().values(), twin.state_dict().values()))


@pytest.mark.parametrize("flags", [
    "", "--no-stop-grad", "--no-symmetric", "--predictor-lr decay", "--similarity cross-entropy",
    "--momentum 0.5", "--no-stop-grad --no-symmetric --similarity cross-entropy",
    "--predictor none", "--predictor frozen", "--batch-size 512", "--base-lr 0.03"])
def test_train_step_equals_a_hand_written_sgd_step(flags):  # of all weights and statistics
    assert run_both(flags) < 1e-9


@pytest.mark.parametrize("mistake", [
    dict(joint=True), dict(bn_decay=False), dict(nesterov=True), dict(scale=2.0), dict(scale=0.5),
    dict(scale=-1.0), dict(clear=False)], ids=str)
def test_hand_written_step_tells_mistakes_apart(mistake):
    assert run_both(**mistake) > 1e-6


# ------------------------------------------------------------------------------------------ recipes

IMAGENET = dict(
    arch="resnet50", width=1, small_images=False, zero_init_residual=True,  # App. A
    projector_layers=3, hidden_dim=0, dim=2048, predictor_dim=512,  # Sec. 3, authors' code
    epochs=100, batch_size=512, base_lr=0.05, warmup_epochs=0, momentum=0.9,  # Sec. 3
    weight_decay=1e-4, image_size=224, crop_min=0.2, jitter=(0.4, 0.4, 0.4, 0.1),  # App. A
    jitter_prob=0.8, gray_prob=0.2, blur_prob=0.5,  # App. A; blur: authors' code
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), stop_grad=True,  # authors' code, 4.1
    predictor="mlp", predictor_lr="constant", bn="default",  # Table 1, Table 3
    similarity="cosine", symmetric=True,  # Sec. 4.5, 4.6
    knn_k=200, knn_temperature=0.1)  # the community's monitor
CIFAR = dict(  # App. D, but hidden_dim: community, mean and std: CIFAR's
    IMAGENET, arch="resnet18", small_images=True, projector_layers=2, hidden_dim=2048,
    base_lr=0.03, epochs=800, weight_decay=5e-4, image_size=32, blur_prob=0.0,
    mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616))
LINEAR_IMAGENET = dict(optimizer="larc", base_lr=0.1, batch_size=4096, momentum=0.9, weight_decay=0,
                       epochs=90, crop_min=0.08)  # authors' code; RandomResizedCrop's default
LINEAR_CIFAR = dict(  # PatrickHua/SimSiam; crop_min: ours
    LINEAR_IMAGENET, optimizer="sgd", base_lr=30, batch_size=256, epochs=100, crop_min=1)
DEMO = {name: CIFAR[name] for name in (
    "stop_grad", "predictor", "predictor_lr", "bn", "similarity", "symmetric", "momentum", "jitter",
    "jitter_prob", "gray_prob", "blur_prob", "small_images")}
DEMO |= {"recipe": "demo", "dim": 256, "predictor_dim": 64}  # h has d / 4 here, too: Sec. 3


@pytest.mark.parametrize("flags, expected", [
    ("--recipe imagenet", IMAGENET), ("--data /data/imagenet", IMAGENET),
    ("--recipe cifar", CIFAR), ("--data cifar10", CIFAR), ("--data cifar100", CIFAR),
    ("--data stl10", {**CIFAR, "image_size": 96}),  # the CIFAR recipe at STL-10's size
    ("--data /data/imagenet --recipe cifar", CIFAR), ("--data cifar10 --recipe imagenet", IMAGENET),
    ("linear --init none --data /data/imagenet", LINEAR_IMAGENET),
    ("linear --init none --data demo --recipe imagenet", LINEAR_IMAGENET),
    ("linear --init none --data cifar10", LINEAR_CIFAR), ("", DEMO), ("--data demo", DEMO),
    ("--recipe demo", DEMO)])
def test_recipes_are_the_papers(flags, expected, monkeypatch):
    monkeypatch.setattr("os.path.isdir", lambda path: path == "/data/imagenet")
    assert_fields(settled(simsiam, *flags.split()), expected)


# ----------------------------------------------------------------------------------------- monitors


def slow_std(z):
    """Sec. 4.1: per channel the std over the batch of z / |z|, averaged, times sqrt(d)."""
    unit = torch.stack([row / row.square().sum().sqrt() for row in z])
    variances = [(x - x.sum() / len(z)).square().sum() / (len(z) - 1) for x in unit.T]
    return sum(math.sqrt(v) for v in variances) / math.sqrt(z.shape[1])


def test_feature_std_equals_a_loop_and_ignores_the_length():
    z = random_outputs(20, 7)[0].detach() + torch.linspace(-1, 2, 7, dtype=DOUBLE)
    assert simsiam.feature_std(z) == pytest.approx(slow_std(z), abs=1e-6)
    assert simsiam.feature_std(100 * z) == pytest.approx(slow_std(z), abs=1e-6)
    unit = nn.functional.normalize(z)
    for wrong in (unit.std(1).mean(), z.std(0).mean(), unit.std()):  # wrong axis, not normalized
        assert abs(wrong * math.sqrt(7) - slow_std(z)) > 0.02


@pytest.mark.parametrize("n, d, power", [
    (100, 12, 0.0), (100, 12, 1.0), (10, 40, 0.5), (300, 64, 2.0), (1024, 64, 0.0)])
def test_effective_rank_equals_that_of_the_singular_values(n, d, power):  # of the whole batch
    def rank_of(values):
        shares = values / values.sum()
        return (-torch.xlogy(shares, shares).sum()).exp().item()

    torch.manual_seed(0)
    z = torch.randn(n, d) * torch.arange(1, d + 1) ** -power + 5 * torch.randn(d)
    raw, centered = (torch.linalg.svdvals(x) for x in (z.double(), z.double() - z.double().mean(0)))
    for scale in (1, 50):
        assert simsiam.effective_rank(scale * z) == pytest.approx(rank_of(centered**2), rel=1e-3)
    if (n, power) == (100, 1.0):  # mistakes: singular values not squared, not centered
        for values in (centered, raw**2):
            assert abs(rank_of(values) - rank_of(centered**2)) > 0.5


def test_effective_rank_sees_the_blind_spot_of_the_std():  # rank 1 passes for healthy
    torch.manual_seed(0)
    signs = torch.randint(0, 2, (1, 128)) * 2.0 - 1
    z, isotropic = torch.randn(1, 128), torch.randn(512, 40)
    for images, std, rank in (
            (torch.cat([signs.expand(256, -1), -signs.expand(256, -1)]), 1, 1),  # two points
            (torch.cat([signs.expand(511, -1), -signs]), 2 / math.sqrt(512), 1),  # an outlier
            (torch.randn(512, 1) * signs + torch.randn(128), None, 1),  # a line
            (z.expand(512, -1), 0, None), (z * (torch.rand(512, 1) + 0.1), 0, None),  # one point
            (torch.randn(512, 256), 1, None), (isotropic, 1, None)):  # Sec. 4.1
        assert std is None or simsiam.feature_std(images) == pytest.approx(std, rel=0.01, abs=1e-5)
        assert rank is None or simsiam.effective_rank(images) == pytest.approx(rank, abs=0.01)
    assert type(simsiam.feature_std(isotropic)) is type(simsiam.effective_rank(isotropic)) is float
    assert 0.9 * 40 < simsiam.effective_rank(isotropic) <= 40.001
    assert math.isfinite(simsiam.effective_rank(torch.ones(64, 8)))  # a log line must not be NaN


def slow_knn(bank, bank_labels, queries, labels, k, temperature, weighted=True, normalized=True):
    """Weighted vote of the k nearest by cosine, weights exp(cos / T) (arXiv 1805.01978)."""
    right, bank = 0, bank.double()
    for query, label in zip(queries.double(), labels.tolist()):
        lengths = query.norm() * bank.norm(dim=1) if normalized else 1.0
        cosines = ((bank * query).sum(1) / lengths).tolist()
        votes, nearest = {}, sorted(zip(cosines, bank_labels.tolist()), reverse=True)[:k]
        for cosine, row_label in nearest:
            weight = math.exp((cosine - nearest[0][0]) / temperature) if weighted else 1.0
            votes[row_label] = votes.get(row_label, 0.0) + weight
        right += max(votes, key=votes.get) == label
    return right / len(labels)


def clusters():
    """Noisy classes of unequal size and length, so that every choice in the vote matters."""
    g = torch.Generator().manual_seed(3)
    centers, found = torch.randn(5, 6, generator=g), []
    for n in (90, 60):
        labels = (torch.rand(n, generator=g) ** 2 * 5).long()
        noise = 1.2 * torch.randn(n, 6, generator=g)
        found += [(centers[labels] + noise) * torch.exp(torch.randn(n, 1, generator=g)), labels]
    return found


@pytest.mark.parametrize("k, temperature", [
    (1, 0.1), (5, 0.1), (40, 0.1), (40, 10.0), (90, 0.1), (200, 0.1)])
def test_knn_equals_a_slow_loop_even_when_k_exceeds_the_bank(k, temperature):
    slow = slow_knn(*clusters(), k, temperature)
    accuracy = simsiam.knn_accuracy(*clusters(), k, temperature)
    assert accuracy == pytest.approx(slow, abs=1e-9)
    assert 0.3 < accuracy < 0.95  # neither chance nor trivial
    if (k, temperature) == (40, 0.1):  # the loop tells other votes apart
        for mistake in (dict(weighted=False), dict(normalized=False), dict(temperature=10.0)):
            assert slow_knn(*clusters(), **{"k": k, "temperature": temperature, **mistake}) != slow


def test_knn_counts_every_query_once():  # exact, whatever the chunks
    queries, labels = torch.eye(4).repeat(700, 1)[:2501], torch.arange(4).repeat(700)[:2501]
    wrong, unseen = labels.clone(), torch.full((2501,), 9)  # a class that the bank does not have
    wrong[-3:] = (wrong[-3:] + 1) % 4
    for given, right in ((labels, 2501), (wrong, 2498), (unseen, 0)):
        accuracy = simsiam.knn_accuracy(torch.eye(4), torch.arange(4), queries, given, 1, 0.1)
        assert accuracy == pytest.approx(right / 2501, abs=1e-9)
