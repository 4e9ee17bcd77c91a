"""simsiam.py against the paper: loss, gradients, heads, optimizer, recipes, monitors.

Every oracle here is written from the equations of arXiv 2011.10566 ("Sec.", "Eq.", "Table", "App.")
or, where it says so, from its released code.
"""
import copy
import math
import re
from typing import get_args

import pytest
import torch
from torch import nn

import simsiam
from common import resnet
from helpers import DOUBLE, Tiny, assert_fields, count, embedding_pairs, joined_views, settled
from simsiam import SimSiam, simsiam_loss


def random_outputs(batch=6, dim=5, dtype=DOUBLE, seed=0):
    """p1, p2, z1, z2 of very different lengths, as leaves that require gradients."""
    return [x for i in (0, 100) for x in embedding_pairs(batch, dim, dtype, seed + i)]


def tiny_model(dtype=DOUBLE, **options):
    torch.manual_seed(0)
    return SimSiam(Tiny(), dim=6, predictor_dim=4, **options).to(dtype)


def half_cosine(x):
    return (1 + math.cos(math.pi * x)) / 2


# ---------------------------------------------------------------------------------------- the loss


def slow_distance(p, z, similarity="cosine"):
    """D(p, z): Eq. 1, or the cross-entropy of Sec. 4.5; one image and one channel at a time."""
    total = 0.0
    for a, b in zip(p.tolist(), z.tolist()):
        if similarity == "cosine":
            dot = sum(i * j for i, j in zip(a, b))
            total -= dot / math.sqrt(sum(i * i for i in a)) / math.sqrt(sum(j * j for j in b))
        else:
            sum_a, sum_b = sum(math.exp(i) for i in a), sum(math.exp(j) for j in b)
            total -= sum(math.exp(j) / sum_b * math.log(math.exp(i) / sum_a) for i, j in zip(a, b))
    return total / len(p)


def slow_loss(p1, p2, z1, z2, similarity="cosine", symmetric=True):
    """Eq. 2-4; not symmetric: the first term alone, not halved (Sec. 4.6)."""
    first = slow_distance(p1, z2, similarity)
    return (first + slow_distance(p2, z1, similarity)) / 2 if symmetric else first


def wrong_losses(p1, p2, z1, z2):
    """Mistakes that people made, each of which the oracle above must tell from the loss."""
    cosine = nn.functional.cosine_similarity
    return {
        "sign": (cosine(p1, z2) + cosine(p2, z1)).mean() / 2,
        "factor 2": -(cosine(p1, z2) + cosine(p2, z1)).mean(),
        "sum over the batch": -(cosine(p1, z2) + cosine(p2, z1)).sum() / 2,
        "same view": -(cosine(p1, z1) + cosine(p2, z2)).mean() / 2,
        "p with p": -cosine(p1, p2).mean(),
        "z with z": -cosine(z1, z2).mean(),
        "over the batch": -(cosine(p1, z2, dim=0) + cosine(p2, z1, dim=0)).mean() / 2,
        "not normalized": -((p1 * z2).sum(1) + (p2 * z1).sum(1)).mean() / 2,
        "only one term": -cosine(p1, z2).mean(),
        "halved term": -cosine(p1, z2).mean() / 2,
        "other term": -cosine(p2, z1).mean(),
        "shifted by one": -(cosine(p1, z2.roll(1, 0)) + cosine(p2, z1.roll(1, 0))).mean() / 2,
        "squared distance": 2 - (cosine(p1, z2) + cosine(p2, z1)).mean(),
    }


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("similarity", ["cosine", "cross-entropy"])
@pytest.mark.parametrize("stop_grad", [True, False])
def test_loss_equals_a_double_loop_written_from_the_equations(similarity, symmetric, stop_grad):
    for seed, batch, dim in ((0, 6, 5), (1, 1, 7), (2, 17, 3)):
        outputs = random_outputs(batch, dim, seed=seed)
        loss = simsiam_loss(*outputs, similarity=similarity, symmetric=symmetric,
                            stop_grad=stop_grad)
        assert loss.shape == () and loss.dtype == DOUBLE
        assert abs(loss.item() - slow_loss(*outputs, similarity, symmetric)) < 1e-9


def test_oracle_tells_wrong_losses_from_the_right_one():
    outputs = random_outputs()
    right = {symmetric: slow_loss(*outputs, symmetric=symmetric) for symmetric in (True, False)}
    assert abs(simsiam_loss(*outputs).item() - right[True]) < 1e-9  # by default
    for name, wrong in wrong_losses(*outputs).items():
        if name != "only one term":  # that is the asymmetric loss
            assert abs(wrong.item() - right[False]) > 1e-2, name
        assert abs(wrong.item() - right[True]) > 1e-2, name
    p1, p2, z1, z2 = outputs  # cross-entropy with the arguments exchanged
    assert abs(slow_loss(z1, z2, p1, p2, "cross-entropy")
               - slow_loss(p1, p2, z1, z2, "cross-entropy")) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("similarity", ["cosine", "cross-entropy"])
def test_loss_is_computed_in_float32_in_half_precision_and_under_autocast(dtype, similarity):
    outputs = random_outputs(4, 2048, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        loss = simsiam_loss(*outputs, similarity=similarity)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow_loss(*outputs, similarity), rel=1e-5, abs=1e-6)
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


# ----------------------------------------------------------------------------------- its gradient


def cosine_gradient(p, z):
    """d D(p, z) / dp of a batch: -(z^ - cos(p, z) p^) / |p| / B, from Eq. 1."""
    p_hat, z_hat = (x / x.norm(dim=1, keepdim=True) for x in (p, z))
    cosine = (p_hat * z_hat).sum(1, keepdim=True)
    return -(z_hat - cosine * p_hat) / p.norm(dim=1, keepdim=True) / len(p)


def cross_entropy_gradient(p, z):
    return (p.softmax(1) - z.softmax(1)) / len(p)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("similarity", ["cosine", "cross-entropy"])
@pytest.mark.parametrize("options", [{}, dict(stop_grad=True), dict(stop_grad=False)], ids=str)
def test_gradients_are_the_analytic_ones(similarity, symmetric, options):
    outputs = p1, p2, z1, z2 = random_outputs()
    loss = simsiam_loss(*outputs, similarity=similarity, symmetric=symmetric, **options)
    found = torch.autograd.grad(loss, outputs, allow_unused=True)
    through_z = not options.get("stop_grad", True)  # sg(z), Eq. 3, is the default
    assert [g is not None for g in found] == [True, symmetric, through_z * symmetric, through_z]
    gradient = cosine_gradient if similarity == "cosine" else cross_entropy_gradient
    pairs = [(p1, z2), (p2, z1)]  # of targets only the cosine, which is symmetric
    pairs += [(z1, p2), (z2, p1)] if similarity == "cosine" else []
    for actual, pair in zip(found, pairs):
        if actual is not None:
            expected = gradient(*pair) * (0.5 if symmetric else 1.0)
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
            assert expected.abs().max() > 1e-2  # so 1e-9 says something about the size, too


@pytest.mark.parametrize("similarity", ["cosine", "cross-entropy"])
def test_gradients_equal_finite_differences(similarity):
    p1, p2, z1, z2 = random_outputs(4, 3)

    def loss(p1, p2, z1=z1, z2=z2, stop_grad=True):
        return simsiam_loss(p1, p2, z1, z2, similarity=similarity, stop_grad=stop_grad)

    assert torch.autograd.gradcheck(loss, (p1, p2), atol=1e-7, rtol=1e-6)
    assert torch.autograd.gradcheck(loss, (p1, p2, z1, z2, False), atol=1e-7, rtol=1e-6)


# --------------------------------------------------------------------------------------- the model


def test_forward_equals_two_separate_passes_bit_for_bit():  # BN statistics per view: authors' code
    model, (x1, x2) = tiny_model(), joined_views().chunk(2)
    twin = copy.deepcopy(model)
    z1, z2 = twin.projector(twin.encoder(x1)), twin.projector(twin.encoder(x2))
    expected = twin.predictor(z1), twin.predictor(z2), z1, z2
    ours = model(x1, x2)
    assert all(map(torch.equal, ours, expected))
    assert all(output.requires_grad for output in ours)  # the stop-gradient is the loss's
    for (name, buffer), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, other), name
        assert buffer.ndim > 0 or buffer == 2  # one update of the statistics per view
    together = twin.projector(twin.encoder(torch.cat([x1, x2])))
    assert (torch.cat([z1, z2]) - together).abs().max() > 0.1


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


def test_parameters_of_the_heads_of_resnet_50():  # 2048-d, hidden 512: Sec. 3
    with torch.device("meta"):
        model = SimSiam(resnet(50))
    # 3 weight matrices of 2048 x 2048, scale and shift of two BN, the frozen output bias
    assert count(model.projector) == 3 * 2048**2 + 2 * 2 * 2048 + 2048 == 12_593_152
    assert count(model.projector, True) == 12_591_104
    assert count(model.predictor) == 2 * 2048 * 512 + 2 * 512 + 2048 == 2_100_224
    assert count(model) == 12_593_152 + 2_100_224 + 23_508_032


def test_heads_start_uniform_as_in_pytorch():  # a fixed std of .01 may not converge
    encoder = Tiny()
    encoder.feature_dim = 400
    torch.manual_seed(0)
    for fc in SimSiam(encoder, dim=400, predictor_dim=100).modules():
        if isinstance(fc, nn.Linear):
            bound = 1 / math.sqrt(fc.in_features)
            assert fc.weight.abs().max() <= bound
            assert fc.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("recipe, stem, side", [  # no max-pool on CIFAR, either
    ("imagenet", ((7, 7), (2, 2), (3, 3)), 1), ("cifar", ((3, 3), (1, 1), (1, 1)), 4)])
def test_recipes_build_their_backbones(recipe, stem, side):
    args, sizes = settled(simsiam, "--recipe", recipe, "--arch", "resnet18"), []
    encoder = simsiam.build_encoder(args)
    encoder.layer4.register_forward_hook(lambda module, x, output: sizes.append(output.shape))
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 512)
    assert sizes == [(2, 512, side, side)] and encoder.feature_dim == 512
    last_scales = [m.bn2.weight for m in encoder.modules() if hasattr(m, "bn2")]
    assert len(last_scales) == 8 and not any(scale.any() for scale in last_scales)  # App. A
    conv = encoder.conv1
    assert (conv.kernel_size, conv.stride, conv.padding) == stem


# -------------------------------------------------------------------------- optimizer and schedule


@pytest.mark.parametrize("predictor_lr", ["constant", "decay"])
@pytest.mark.parametrize("predictor", ["mlp", "none", "frozen"])
def test_optimizer_holds_every_trainable_parameter_once(predictor_lr, predictor):
    args = settled(simsiam, "--recipe", "imagenet", "--predictor-lr", predictor_lr,
                   "--predictor", predictor)
    model = tiny_model(predictor=predictor)
    optimizer = simsiam.build_optimizer(model, args)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert {id(p) for p in model.parameters() if p.requires_grad} <= set(held)
    assert set(held) <= {id(p) for p in model.parameters()}
    assert isinstance(optimizer, torch.optim.SGD)  # App. A
    for group in optimizer.param_groups:  # BN and biases included
        assert group["momentum"] == 0.9 and group["dampening"] == 0 and not group["nesterov"]
        assert group["weight_decay"] == 1e-4 and not group["maximize"]


@pytest.mark.parametrize("predictor_lr", ["constant", "decay"])  # Table 1: 68.1 against 67.7
@pytest.mark.parametrize("epoch, flags, lr, share", [
    (0.0, "--batch-size 512", 0.1, 1), (0.0, "--batch-size 256", 0.05, 1),  # Sec. 4.3
    (0.0, "--batch-size 64", 0.0125, 1), (0.0, "--batch-size 4096", 0.8, 1),
    (0.0, "--base-lr 0.03", 0.06, 1),  # App. D
    *((epoch, "", 0.1, half_cosine(int(epoch) / 100)) for epoch in (0.0, 33.5, 50.0, 99.9)),
    (5.0, "--warmup-epochs 10", 0.1, 0.5)])
def test_learning_rates_that_a_step_uses(epoch, flags, lr, share, predictor_lr):
    args = settled(simsiam, "--recipe", "imagenet", "--predictor-lr", predictor_lr, *flags.split())
    model = tiny_model()
    optimizer = simsiam.build_optimizer(model, args)
    simsiam.train_step(model, optimizer, *joined_views().chunk(2), epoch, args)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            constant = name.startswith("predictor") and predictor_lr == "constant"
            assert rates[p] == pytest.approx(lr * (1 if constant else share), rel=1e-9), name


@pytest.mark.parametrize("epochs, warmup", [(100, 0), (800, 0), (100, 10)])
def test_cosine_steps_once_per_epoch_and_never_reaches_zero(epochs, warmup):  # authors' code
    args = settled(simsiam, "--recipe", "imagenet", "--epochs", epochs, "--warmup-epochs", warmup)
    for epoch in range(warmup, epochs):
        expected = half_cosine((epoch - warmup) / (epochs - warmup))
        for part in (0.0, 0.3, 0.5, 0.999):
            found = simsiam.cosine_decay(epoch + part, args)
            assert found == pytest.approx(expected, abs=1e-12) and found > 0
    for epoch in (0.0, 0.25, 1.0, 3.7, 9.99) if warmup else ():  # it rises with every step
        assert simsiam.cosine_decay(epoch, args) == pytest.approx(epoch / 10, abs=1e-9)


# ------------------------------------------------------------------------------------ one step


def distance(p, z, similarity):
    if similarity == "cross-entropy":
        log_p = p - p.exp().sum(1, keepdim=True).log()
        return -(z.exp() / z.exp().sum(1, keepdim=True) * log_p).sum(1).mean()
    return -((p * z).sum(1) / (p * p).sum(1).sqrt() / (z * z).sum(1).sqrt()).mean()


def slow_step(model, velocity, x1, x2, share, args, bn_decay=True, nesterov=False, scale=1.0,
              clear=True):
    """Algorithm 1 and SGD written out. The options after `args` are mistakes to tell apart."""
    z1, z2 = model.projector(model.encoder(x1)), model.projector(model.encoder(x2))
    p1, p2 = model.predictor(z1), model.predictor(z2)
    t1, t2 = (z1.detach(), z2.detach()) if args.stop_grad else (z1, z2)
    loss = distance(p1, t2, args.similarity)
    if args.symmetric:
        loss = (loss + distance(p2, t1, args.similarity)) / 2
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


def run_both(*flags, **mistake):
    """Four steps of train_step and of the oracle; the largest difference of the weights."""
    args = settled(simsiam, "--recipe", "imagenet", "--batch-size", "64", "--base-lr", "0.8",
                   "--weight-decay", "0.01", *flags)
    model, velocity = tiny_model(), {}
    twin, optimizer = copy.deepcopy(model), simsiam.build_optimizer(model, args)
    for i, epoch in enumerate((0.0, 0.75, 40.5, 70.0)):
        (x1, x2), share = joined_views(seed=10 + i).chunk(2), half_cosine(int(epoch) / 100)
        loss, z1 = simsiam.train_step(model, optimizer, x1, x2, epoch, args)
        slow, slow_z1 = slow_step(twin, velocity, x1, x2, share, args, **mistake)
        if not mistake:
            assert loss.item() == pytest.approx(slow.item(), abs=1e-12)
            torch.testing.assert_close(z1, slow_z1, rtol=0, atol=1e-9)
            assert not loss.requires_grad and not z1.requires_grad
    return max((a - b).abs().max().item()
               for a, b in zip(model.state_dict().values(), twin.state_dict().values()))


@pytest.mark.parametrize("flags", [
    "", "--no-stop-grad", "--no-symmetric", "--predictor-lr decay", "--similarity cross-entropy",
    "--momentum 0.5", "--no-stop-grad --no-symmetric --similarity cross-entropy"])
def test_train_step_equals_a_hand_written_sgd_step(flags):
    assert run_both(*flags.split()) < 1e-9


@pytest.mark.parametrize("mistake", [
    dict(bn_decay=False), dict(nesterov=True), dict(scale=2.0), dict(scale=0.5), dict(scale=-1.0),
    dict(clear=False)], ids=str)
def test_hand_written_step_tells_mistakes_apart(mistake):
    assert run_both(**mistake) > 1e-6


@pytest.mark.parametrize("predictor", ["mlp", "none", "frozen"])
def test_one_step_changes_every_trainable_parameter_and_nothing_else(predictor):
    args = settled(simsiam, "--weight-decay", "0", "--predictor", predictor)  # by gradients alone
    model = tiny_model(predictor=predictor)
    before = copy.deepcopy(model.state_dict())
    optimizer = simsiam.build_optimizer(model, args)
    simsiam.train_step(model, optimizer, *joined_views().chunk(2), 0.0, args)
    for name, p in model.named_parameters():
        assert torch.equal(before[name], p) != p.requires_grad, name


def test_bfloat16_step_keeps_loss_and_weights_in_float32():
    args = settled(simsiam, precision="bf16", dtype=torch.float32)
    model, views = tiny_model(torch.float32), joined_views().float().chunk(2)
    loss, _ = simsiam.train_step(model, simsiam.build_optimizer(model, args), *views, 0.0, args)
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------------ recipes

IMAGENET = dict(
    arch="resnet50", width=1, small_images=False, zero_init_residual=True,  # App. A
    projector_layers=3, hidden_dim=0, dim=2048, predictor_dim=512,  # Sec. 3, authors' code
    epochs=100, batch_size=512, base_lr=0.05, warmup_epochs=0, momentum=0.9,  # Sec. 3
    weight_decay=1e-4, image_size=224, crop_min=0.2,  # App. A
    jitter=(0.4, 0.4, 0.4, 0.1), jitter_prob=0.8, gray_prob=0.2,  # App. A
    blur_prob=0.5, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),  # authors' code
    stop_grad=True, predictor="mlp", predictor_lr="constant",  # Sec. 4.1, Table 1
    bn="default", similarity="cosine", symmetric=True,  # Table 3, Sec. 4.5, 4.6
    knn_k=200, knn_temperature=0.1)  # the community's monitor
CIFAR = dict(
    IMAGENET, arch="resnet18", small_images=True, projector_layers=2, dim=2048,  # App. D
    hidden_dim=2048, predictor_dim=512,  # community
    base_lr=0.03, epochs=800, weight_decay=5e-4, batch_size=512, warmup_epochs=0,  # App. D
    image_size=32, blur_prob=0.0,  # App. D
    mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616))  # CIFAR's
LINEAR_IMAGENET = dict(  # authors' code; crop_min: RandomResizedCrop's default
    optimizer="larc", base_lr=0.1, batch_size=4096, momentum=0.9, weight_decay=0, epochs=90,
    crop_min=0.08)
LINEAR_CIFAR = dict(  # PatrickHua/SimSiam; crop_min: ours
    LINEAR_IMAGENET, optimizer="sgd", base_lr=30, batch_size=256, epochs=100, crop_min=1)
DEMO = {name: IMAGENET[name] for name in (
    "stop_grad", "predictor", "predictor_lr", "bn", "similarity", "symmetric", "momentum",
    "jitter", "jitter_prob", "gray_prob")} | {"recipe": "demo", "small_images": True}


@pytest.mark.parametrize("flags, expected", [
    ("--recipe imagenet", IMAGENET), ("--data /data/imagenet", IMAGENET),
    ("--recipe cifar", CIFAR), ("--data cifar10", CIFAR), ("--data cifar100", CIFAR),
    ("--data stl10", {**CIFAR, "image_size": 96}),  # the CIFAR recipe at STL-10's size
    ("--data /data/imagenet --recipe cifar", CIFAR), ("--data cifar10 --recipe imagenet", IMAGENET),
    ("linear --init none --data /data/imagenet", LINEAR_IMAGENET),
    ("linear --init none --data demo --recipe imagenet", LINEAR_IMAGENET),
    ("linear --init none --data cifar10", LINEAR_CIFAR),
    ("", DEMO), ("--data demo", DEMO), ("--recipe demo", DEMO)])
def test_recipes_are_the_papers(flags, expected, monkeypatch):
    monkeypatch.setattr("os.path.isdir", lambda path: path == "/data/imagenet")
    args = settled(simsiam, *flags.split())
    assert_fields(args, expected)
    assert args.stage == "linear" or args.predictor_dim * 4 == args.dim  # the bottleneck, Sec. 3


@pytest.mark.parametrize("name", IMAGENET)
def test_a_flag_overrides_its_field_and_no_other(name):
    value, flag = getattr(simsiam.Pretrain, name), name.replace("_", "-")
    choices = [x for x in get_args(simsiam.Pretrain.__annotations__[name]) if x != value]
    other = (not value if isinstance(value, bool) else choices[-1] if choices else
             value + 1 if isinstance(value, int) else value / 2 if isinstance(value, float) else
             tuple(x / 2 for x in value))
    words = ["--" + flag, *(other if isinstance(value, tuple) else [other])]
    if isinstance(value, bool):
        words = ["--no-" * value + "--" * (not value) + flag]
    args = settled(simsiam, "--recipe", "imagenet", *words)
    assert_fields(args, {**IMAGENET, name: other})


def test_the_docstring_lists_the_departures():
    text = " ".join(simsiam.__doc__.split())
    code = re.search(r"Differences from the authors' code: (.+?) python simsiam.py", text)[1]
    assert "2011.10566" in text and "lr scaled by the batch of all nodes" in code
    assert "Gaussian blur" in code and "the last epoch, not the best" in code
    args = simsiam.settle(simsiam.parse_args(["--recipe", "imagenet"]))
    assert args.precision != "fp32" and "bfloat16" in code and args.knn_k > 0 and "kNN" in code


# ----------------------------------------------------------------------------------------- monitors


def slow_std(z):
    """Sec. 4.1: per channel the std over the batch of z / |z|, averaged, times sqrt(d)."""
    rows = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in z.tolist()]
    n, d, total = len(rows), len(rows[0]), 0.0
    for channel in zip(*rows):
        mean = sum(channel) / n
        total += math.sqrt(sum((v - mean) ** 2 for v in channel) / (n - 1))
    return math.sqrt(d) * total / d


def test_feature_std_equals_a_loop_and_ignores_the_length():
    z = random_outputs(20, 7)[0].detach() + torch.linspace(-1, 2, 7, dtype=DOUBLE)
    assert simsiam.feature_std(z) == pytest.approx(slow_std(z), abs=1e-6)
    assert simsiam.feature_std(100 * z) == pytest.approx(slow_std(z), abs=1e-6)
    unit = nn.functional.normalize(z)
    for wrong in (unit.std(1).mean(), z.std(0).mean(), unit.std()):  # wrong axis, not normalized
        assert abs(wrong * math.sqrt(7) - slow_std(z)) > 0.02


def slow_rank(z):
    values = torch.linalg.svdvals(z.double() - z.double().mean(0)) ** 2
    shares = [v / sum(values.tolist()) for v in values.tolist()]
    return math.exp(-sum(v * math.log(v) for v in shares if v > 0))


@pytest.mark.parametrize("n, d, power", [
    (100, 12, 0.0), (100, 12, 1.0), (10, 40, 0.5), (300, 64, 2.0), (1024, 64, 0.0)])
def test_effective_rank_equals_that_of_the_singular_values(n, d, power):  # of the whole batch
    torch.manual_seed(0)
    z = torch.randn(n, d) * torch.arange(1, d + 1) ** -power + 5 * torch.randn(d)
    assert simsiam.effective_rank(z) == pytest.approx(slow_rank(z), rel=1e-3)
    assert simsiam.effective_rank(50 * z) == pytest.approx(slow_rank(z), rel=1e-3)
    if (n, power) == (100, 1.0):  # mistakes: singular values not squared, not centered
        centered, values = torch.linalg.svdvals(z - z.mean(0)), torch.linalg.svdvals(z) ** 2
        for shares in (centered / centered.sum(), values / values.sum()):
            assert abs((-(shares * shares.log()).sum()).exp() - slow_rank(z)) > 0.5


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


# ---------------------------------------------------------------------------------------------- kNN


def slow_knn(bank, bank_labels, queries, labels, k, temperature, weighted=True, normalized=True):
    """Weighted vote of the k nearest by cosine, weights exp(cos / T) (arXiv 1805.01978)."""
    right = 0
    for query, label in zip(queries.double(), labels.tolist()):
        neighbors = []
        for row, row_label in zip(bank.double(), bank_labels.tolist()):
            length = (query.norm() * row.norm()) if normalized else 1.0
            neighbors.append(((query @ row / length).item(), row_label))
        votes, nearest = {}, sorted(neighbors, reverse=True)[:k]
        for cosine, row_label in nearest:
            weight = math.exp((cosine - nearest[0][0]) / temperature) if weighted else 1.0
            votes[row_label] = votes.get(row_label, 0.0) + weight
        right += max(votes, key=votes.get) == label
    return right / len(labels)


@pytest.fixture(scope="module")
def clusters():
    """Noisy classes of unequal size and length, so that every choice in the vote matters."""
    generator = torch.Generator().manual_seed(3)
    centers = torch.randn(5, 6, generator=generator)

    def sample(n):
        labels = (torch.rand(n, generator=generator) ** 2 * 5).long()
        noise = 1.2 * torch.randn(n, 6, generator=generator)
        lengths = torch.exp(torch.randn(n, 1, generator=generator))
        return (centers[labels] + noise) * lengths, labels

    return *sample(90), *sample(60)


@pytest.mark.parametrize("k, temperature", [
    (1, 0.1), (5, 0.1), (40, 0.1), (40, 10.0), (90, 0.1), (200, 0.1)])
def test_knn_equals_a_slow_loop_even_when_k_exceeds_the_bank(clusters, k, temperature):
    accuracy = simsiam.knn_accuracy(*clusters, k, temperature)
    assert accuracy == pytest.approx(slow_knn(*clusters, k, temperature), abs=1e-9)
    assert 0.3 < accuracy < 0.95  # neither chance nor trivial


def test_knn_oracle_tells_other_votes_apart(clusters):
    right = slow_knn(*clusters, 40, 0.1)
    assert slow_knn(*clusters, 40, 0.1, weighted=False) != right
    assert slow_knn(*clusters, 40, 0.1, normalized=False) != right
    assert slow_knn(*clusters, 40, 10.0) != right


def test_knn_counts_every_query_once():  # exact, whatever the chunks
    queries, labels = torch.eye(4).repeat(700, 1)[:2501], torch.arange(4).repeat(700)[:2501]
    wrong, unseen = labels.clone(), torch.full((2501,), 9)  # a class that the bank does not have
    wrong[-3:] = (wrong[-3:] + 1) % 4
    for given, right in ((labels, 2501), (wrong, 2498), (unseen, 0)):
        accuracy = simsiam.knn_accuracy(torch.eye(4), torch.arange(4), queries, given, 1, 0.1)
        assert accuracy == pytest.approx(right / 2501, abs=1e-9)
