"""simsiam.py against the paper: loss, gradients, heads, optimizer, recipes, monitors.

Every oracle here is written from the equations of arXiv 2011.10566 ("Sec.", "Eq.", "Table", "App.")
or from the fact sheet of that paper and its released code ("sheet 1" ... "sheet 10").
"""
import copy
import math
import re

import pytest
import torch
from torch import nn

import simsiam
from common import resnet
from helpers import DOUBLE, assert_fields
from simsiam import SimSiam, simsiam_loss


def settled(*flags):
    """The settings of this command line."""
    return simsiam.settle(simsiam.parse_args([*flags]))


def parse(*flags, dtype=torch.float32):
    """The settings, made ready for a step on this machine's CPU."""
    args = settled(*flags)
    args.device, args.dtype, args.precision = torch.device("cpu"), dtype, "fp32"
    return args


def random_outputs(batch=6, dim=5, dtype=DOUBLE, seed=0):
    """p1, p2, z1, z2 of very different lengths, as leaves that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.logspace(-1, 1, batch, dtype=DOUBLE)[:, None]
    return [(torch.randn(batch, dim, generator=generator, dtype=DOUBLE) * lengths + shift)
            .to(dtype).requires_grad_() for shift in (0.0, 0.3, -0.2, 0.1)]


class TinyEncoder(nn.Module):
    """A backbone of one layer whose BN makes each output depend on the whole batch."""
    feature_dim = 6

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.ReLU())

    def forward(self, x):
        return self.net(x)


def tiny_model(dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    return SimSiam(TinyEncoder(), dim=8, predictor_dim=4, **options).to(dtype)


def views(batch=9, dtype=torch.float32, seed=1):
    """Two batches of images with clearly different statistics."""
    generator = torch.Generator().manual_seed(seed)
    x1 = torch.randn(batch, 3, 2, 2, generator=generator, dtype=DOUBLE)
    x2 = 2 * torch.randn(batch, 3, 2, 2, generator=generator, dtype=DOUBLE) ** 2 - 1
    return x1.to(dtype), x2.to(dtype)


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
    """Eq. 2-4; without symmetrisation the first term alone, not halved (Sec. 4.6)."""
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
        "not normalised": -((p1 * z2).sum(1) + (p2 * z1).sum(1)).mean() / 2,
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


def test_default_loss_is_the_symmetric_cosine_with_stop_gradient():
    outputs = random_outputs()
    loss = simsiam_loss(*outputs)
    assert abs(loss.item() - slow_loss(*outputs)) < 1e-9
    assert torch.autograd.grad(loss, outputs[2:], allow_unused=True) == (None, None)


def test_oracle_tells_wrong_losses_from_the_right_one():
    outputs = random_outputs()
    right = {symmetric: slow_loss(*outputs, symmetric=symmetric) for symmetric in (True, False)}
    for name, wrong in wrong_losses(*outputs).items():
        if name != "only one term":  # that is the asymmetric loss
            assert abs(wrong.item() - right[False]) > 1e-2, name
        assert abs(wrong.item() - right[True]) > 1e-2, name
    p1, p2, z1, z2 = outputs  # cross-entropy with the arguments exchanged
    assert abs(slow_loss(z1, z2, p1, p2, "cross-entropy")
               - slow_loss(p1, p2, z1, z2, "cross-entropy")) > 1e-2


def test_loss_runs_from_minus_one_to_one():  # sheet 1
    z1, z2 = (z.detach() for z in random_outputs(seed=3)[2:])
    assert simsiam_loss(3 * z2, 7 * z1, z1, z2).item() == pytest.approx(-1, abs=1e-12)
    assert simsiam_loss(-z2, -z1, z1, z2).item() == pytest.approx(1, abs=1e-12)
    e1, e2 = torch.eye(2, dtype=DOUBLE).split(1)
    assert simsiam_loss(e1, e2, e1, e2).item() == pytest.approx(0, abs=1e-12)
    assert simsiam_loss(e2, e2, e1, e2).item() == pytest.approx(-0.5, abs=1e-12)
    for seed in range(20):
        assert -1 <= simsiam_loss(*random_outputs(seed=seed)).item() <= 1


def test_cosine_loss_ignores_the_length_of_every_vector():
    outputs = random_outputs()
    lengths = torch.logspace(-3, 3, 6, dtype=DOUBLE)[:, None]
    expected = simsiam_loss(*outputs).item()
    for i in range(4):
        scaled = [x * lengths if i == j else x for j, x in enumerate(outputs)]
        assert simsiam_loss(*scaled).item() == pytest.approx(expected, abs=1e-12)
    logits = [simsiam_loss(*(x * s for x in outputs), similarity="cross-entropy").item()
              for s in (1, 2)]
    assert abs(logits[0] - logits[1]) > 1e-2  # a softmax does depend on it


@pytest.mark.parametrize("similarity", ["cosine", "cross-entropy"])
def test_symmetric_loss_ignores_which_view_is_first_and_asymmetric_does_not(similarity):
    p1, p2, z1, z2 = random_outputs()
    there, back = ([simsiam_loss(*xs, similarity=similarity, symmetric=s).item()
                    for s in (True, False)] for xs in ((p1, p2, z1, z2), (p2, p1, z2, z1)))
    assert there[0] == pytest.approx(back[0], abs=1e-12)
    assert abs(there[1] - back[1]) > 1e-2
    assert (there[1] + back[1]) / 2 == pytest.approx(there[0], abs=1e-12)  # Eq. 2


@pytest.mark.parametrize("similarity", ["cosine", "cross-entropy"])
def test_loss_ignores_the_order_of_the_batch_but_not_of_one_view(similarity):
    outputs = random_outputs()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    loss = simsiam_loss(*outputs, similarity=similarity).item()
    together = simsiam_loss(*(x[order] for x in outputs), similarity=similarity).item()
    p1, p2, z1, z2 = outputs
    one = simsiam_loss(p1, p2[order], z1, z2[order], similarity=similarity).item()
    assert together == pytest.approx(loss, abs=1e-12) and abs(one - loss) > 1e-2
    doubled = simsiam_loss(*(torch.cat([x, x]) for x in outputs), similarity=similarity).item()
    assert doubled == pytest.approx(loss, abs=1e-12)  # a mean over the batch, not a sum


def test_squared_distance_of_unit_vectors_is_two_plus_two_d():  # sheet 1: MSE = 2 + 2 D
    outputs = [x.detach() for x in random_outputs()]
    p1, p2, z1, z2 = (x / x.norm(dim=1, keepdim=True) for x in outputs)
    first, second = ((p - z).pow(2).sum(1).mean().item() for p, z in ((p1, z2), (p2, z1)))
    assert first == pytest.approx(2 + 2 * simsiam_loss(*outputs, symmetric=False).item(), abs=1e-9)
    assert first + second == pytest.approx(4 + 4 * simsiam_loss(*outputs).item(), abs=1e-9)  # BYOL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("similarity", ["cosine", "cross-entropy"])
def test_half_precision_inputs_are_raised_to_float32(dtype, similarity):
    outputs = random_outputs(4, 2048, dtype)
    loss = simsiam_loss(*outputs, similarity=similarity)
    raised = simsiam_loss(*(x.double() for x in outputs), similarity=similarity)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(raised.item(), rel=1e-5, abs=1e-6)
    loss.backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in outputs[:2])
    huge = [torch.full((2, 2048), 300.0, dtype=dtype) for _ in range(4)]  # 300^2 * 2048 > 65504
    expected = {"cosine": -1, "cross-entropy": math.log(2048)}[similarity]
    assert simsiam_loss(*huge, similarity=similarity).item() == pytest.approx(expected, abs=1e-4)


def test_loss_is_computed_in_float32_under_autocast():
    outputs = random_outputs(32, 256, torch.float32)
    for similarity in ("cosine", "cross-entropy"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = simsiam_loss(*outputs, similarity=similarity)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(slow_loss(*outputs, similarity), abs=1e-5)


def test_collapse_to_zero_stays_finite():  # the authors' cosine has an eps of 1e-8 (sheet 1)
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
def test_targets_get_no_gradient_and_predictions_get_the_analytic_one(similarity, symmetric):
    outputs = p1, p2, z1, z2 = random_outputs()
    loss = simsiam_loss(*outputs, similarity=similarity, symmetric=symmetric)
    d1, d2, dz1, dz2 = torch.autograd.grad(loss, outputs, allow_unused=True)
    assert dz1 is None and dz2 is None  # B14: sg(z), Eq. 3
    gradient = cosine_gradient if similarity == "cosine" else cross_entropy_gradient
    share = 0.5 if symmetric else 1.0
    expected = share * gradient(p1, z2)
    torch.testing.assert_close(d1, expected, rtol=0, atol=1e-9)
    assert expected.abs().max() > 1e-2  # so 1e-9 says something about the size, too
    if symmetric:
        torch.testing.assert_close(d2, share * gradient(p2, z1), rtol=0, atol=1e-9)
    else:
        assert d2 is None


@pytest.mark.parametrize("similarity", ["cosine", "cross-entropy"])
def test_gradients_equal_finite_differences(similarity):
    p1, p2, z1, z2 = random_outputs(4, 3)

    def loss(p1, p2):
        return simsiam_loss(p1, p2, z1, z2, similarity=similarity)

    assert torch.autograd.gradcheck(loss, (p1, p2), atol=1e-7, rtol=1e-6)

    def whole_loss(*outputs):
        return simsiam_loss(*outputs, similarity=similarity, stop_grad=False)

    assert torch.autograd.gradcheck(whole_loss, (p1, p2, z1, z2), atol=1e-7, rtol=1e-6)


def test_without_stop_gradient_targets_get_the_analytic_gradient():
    outputs = p1, p2, z1, z2 = random_outputs()
    grads = torch.autograd.grad(simsiam_loss(*outputs, stop_grad=False), outputs)
    for grad, (a, b) in zip(grads, ((p1, z2), (p2, z1), (z1, p2), (z2, p1))):  # cos is symmetric
        torch.testing.assert_close(grad, cosine_gradient(a, b) / 2, rtol=0, atol=1e-9)
    asymmetric = simsiam_loss(*outputs, stop_grad=False, symmetric=False)
    dz1, dz2 = torch.autograd.grad(asymmetric, (z1, z2), allow_unused=True)
    assert dz1 is None and dz2.abs().max() > 1e-2


def test_detaching_p_or_both_would_be_noticed():  # sheet 9, trap 10
    outputs = p1, p2, z1, z2 = random_outputs()

    def grads(loss):
        return torch.autograd.grad(loss, outputs, allow_unused=True)

    right = grads(simsiam_loss(*outputs))
    assert [g is None for g in right] == [False, False, True, True]
    wrong_way = grads(-nn.functional.cosine_similarity(p1.detach(), z2).mean())
    assert [g is None for g in wrong_way] == [True, True, True, False]
    assert not simsiam_loss(p1.detach(), p2.detach(), z1, z2).requires_grad


def test_without_predictor_stop_gradient_only_halves_the_gradient():  # Sec. 4.2, sheet 1
    x1, x2 = views(dtype=DOUBLE)
    model = tiny_model(DOUBLE, predictor="none")
    weights = [p for p in model.parameters() if p.requires_grad]
    stopped, full = (torch.autograd.grad(simsiam_loss(*model(x1, x2), stop_grad=s), weights)
                     for s in (True, False))
    assert max(g.abs().max() for g in full) > 1e-3
    for half, whole in zip(stopped, full):
        torch.testing.assert_close(half, whole / 2, rtol=0, atol=1e-9)
    with_predictor = tiny_model(DOUBLE)
    weights = list(with_predictor.encoder.parameters())
    stopped, full = (
        torch.autograd.grad(simsiam_loss(*with_predictor(x1, x2), stop_grad=s), weights)
        for s in (True, False))
    assert any((half - whole / 2).abs().max() > 1e-4 for half, whole in zip(stopped, full))


# --------------------------------------------------------------------------------------- the model


def test_forward_equals_two_separate_passes_bit_for_bit():  # B12, sheet 1: BN statistics per view
    model, x1, x2 = tiny_model(), *views()
    twin = copy.deepcopy(model)
    p1, p2, z1, z2 = model(x1, x2)
    z1_, z2_ = twin.projector(twin.encoder(x1)), twin.projector(twin.encoder(x2))
    p1_, p2_ = twin.predictor(z1_), twin.predictor(z2_)
    for ours, expected in zip((p1, p2, z1, z2), (p1_, p2_, z1_, z2_)):
        assert torch.equal(ours, expected)
    for (name, ours), (_, expected) in zip(model.named_buffers(), twin.named_buffers()):
        assert torch.equal(ours, expected), name
        if name.endswith("num_batches_tracked"):
            assert ours == 2, name  # one update of the statistics per view
    together = twin.projector(twin.encoder(torch.cat([x1, x2])))
    assert (torch.cat([z1, z2]) - together).abs().max() > 0.1


def test_forward_leaves_the_stop_gradient_to_the_loss():  # or --no-stop-grad would be a no-op
    model = tiny_model()
    assert all(output.requires_grad for output in model(*views()))


def test_both_views_reach_the_encoder_through_their_own_prediction():  # sheet 1
    model, x1, x2 = tiny_model(DOUBLE), *views(dtype=DOUBLE)
    x1.requires_grad_()
    x2.requires_grad_()
    dx1, dx2 = torch.autograd.grad(simsiam_loss(*model(x1, x2)), (x1, x2))
    assert dx1.abs().max() > 1e-4 and dx2.abs().max() > 1e-4
    dx1, dx2 = torch.autograd.grad(simsiam_loss(*model(x1, x2), symmetric=False), (x1, x2),
                                   allow_unused=True)
    assert dx1.abs().max() > 1e-4 and (dx2 is None or not dx2.any())  # x2 is only a target


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
    return words


def test_heads_of_every_row_of_table_3():  # B13; sheet 2 and the table in sheet 5
    hidden = ["fc 6-6 no bias", "BN 6 affine", "ReLU"] * 2
    predictor = ["fc 8-4 no bias", "BN 4 affine", "ReLU", "fc 4-8 bias"]
    default = hidden + ["fc 6-8 frozen bias", "BN 8 plain"]
    rows = {
        # The output bias is frozen only where a BN cancels it.
        "none": (["fc 6-6 bias", "ReLU"] * 2 + ["fc 6-8 bias"],
                 ["fc 8-4 bias", "ReLU", "fc 4-8 bias"]),
        "hidden": (hidden + ["fc 6-8 bias"], predictor),
        "default": (default, predictor),
    }
    for bn, (projector_layers, predictor_layers) in rows.items():
        model = tiny_model(bn=bn)
        assert layers(model.projector) == projector_layers, bn
        assert layers(model.predictor) == predictor_layers, bn
    model = tiny_model(bn="all")
    assert layers(model.projector) == default
    *first, fc, bn = layers(model.predictor)
    assert first == predictor[:3] and fc.startswith("fc 4-8") and bn.startswith("BN 8")
    assert layers(tiny_model().projector) == default  # bn="default" is the default


def test_projector_of_two_layers_drops_a_hidden_one():  # App. D, sheet 2: the CIFAR variant
    projector = tiny_model(projector_layers=2, hidden_dim=5).projector
    assert layers(projector) == ["fc 6-5 no bias", "BN 5 affine", "ReLU",
                                 "fc 5-8 frozen bias", "BN 8 plain"]


def test_hidden_width_is_that_of_the_backbone_unless_given():  # sheet 2: the hidden-width trap
    def widths(model):
        return [(m.in_features, m.out_features) for m in model.projector.modules()
                if isinstance(m, nn.Linear)]

    with torch.device("meta"):
        encoder = resnet(18)
        assert widths(SimSiam(encoder)) == [(512, 512), (512, 512), (512, 2048)]
        assert widths(SimSiam(encoder, hidden_dim=2048)) == [(512, 2048), (2048, 2048),
                                                             (2048, 2048)]
        cifar = settled("--recipe", "cifar")
        model = SimSiam(encoder, dim=cifar.dim, predictor_dim=cifar.predictor_dim,
                        hidden_dim=cifar.hidden_dim, projector_layers=cifar.projector_layers)
        assert widths(model) == [(512, 2048), (2048, 2048)]


def test_numbers_of_parameters_of_resnet_50_are_the_sheets():  # sheet 2
    def count(module, trainable=False):
        return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)

    with torch.device("meta"):
        model = SimSiam(resnet(50))
    # 3 weight matrices of 2048 x 2048, scale and shift of two BN, the frozen output bias
    assert count(model.projector) == 3 * 2048 ** 2 + 2 * 2 * 2048 + 2048 == 12_593_152
    assert count(model.projector, trainable=True) == 12_591_104
    assert count(model.predictor) == 2 * 2048 * 512 + 2 * 512 + 2048 == 2_100_224
    assert count(model.encoder) == 23_508_032
    assert round(count(model) / 1e6, 3) == 38.201


def test_frozen_output_bias_keeps_its_random_value():  # sheet 2: the "hack"
    args = parse("--weight-decay", "0.1", dtype=DOUBLE)
    model = tiny_model(DOUBLE)
    fc = [m for m in model.projector.modules() if isinstance(m, nn.Linear)][-1]
    before = fc.bias.clone()
    assert 0 < before.abs().max() <= 1 / math.sqrt(6) and before.unique().numel() == 8
    simsiam.train_step(model, simsiam.build_optimizer(model, args), *views(dtype=DOUBLE), 0.0, args)
    assert torch.equal(fc.bias, before) and fc.bias.grad is None
    assert any(value.data_ptr() == fc.bias.data_ptr() for value in model.state_dict().values())


def test_heads_start_uniform_as_in_pytorch():  # sheet 2: fixed std .01 may not converge
    torch.manual_seed(0)
    encoder = TinyEncoder()
    encoder.feature_dim = 400
    model = SimSiam(encoder, dim=400, predictor_dim=100)
    for head in (model.projector, model.predictor):
        for fc in (m for m in head.modules() if isinstance(m, nn.Linear)):
            bound = 1 / math.sqrt(fc.in_features)
            assert fc.weight.abs().max() <= bound
            assert fc.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_output_bn_gives_every_channel_mean_zero_and_variance_one_per_view():  # sheet 6
    x1, x2 = views(64, DOUBLE)
    _, _, z1, z2 = tiny_model(DOUBLE)(x1, x2)
    for z in (z1, z2):
        torch.testing.assert_close(z.mean(0), torch.zeros(8, dtype=DOUBLE), rtol=0, atol=1e-9)
        assert (z.var(0, unbiased=False) - 1).abs().max() < 0.01  # 1 up to the eps of BN


def test_model_without_predictor_returns_its_projections():  # Table 1, row a
    model = tiny_model(predictor="none")
    p1, p2, z1, z2 = model(*views())
    assert torch.equal(p1, z1) and torch.equal(p2, z2)
    assert not list(model.predictor.parameters())


def test_frozen_predictor_is_the_same_network_but_never_trained():  # Table 1, row b
    args = parse(dtype=DOUBLE)
    model = tiny_model(DOUBLE, predictor="frozen")
    shapes = [p.shape for p in tiny_model().predictor.parameters()]
    before = [p.clone() for p in model.predictor.parameters()]
    assert [p.shape for p in before] == shapes
    assert not any(p.requires_grad for p in model.predictor.parameters())
    p1, _, z1, _ = model(*views(dtype=DOUBLE))
    assert not torch.equal(p1, z1) and p1.requires_grad  # the gradient passes through it
    encoder = copy.deepcopy(model.encoder)
    simsiam.train_step(model, simsiam.build_optimizer(model, args), *views(dtype=DOUBLE), 0.0, args)
    assert all(torch.equal(a, b) for a, b in zip(before, model.predictor.parameters()))
    assert not any(torch.equal(a, b)
                   for a, b in zip(encoder.parameters(), model.encoder.parameters()))


def test_recipes_build_their_backbones():  # sheet 2: stem of the CIFAR ResNet-18, zero-init
    sizes = {}
    for recipe in ("imagenet", "cifar"):
        encoder = simsiam.build_encoder(parse("--recipe", recipe, "--arch", "resnet18"))
        hook = encoder.layer4.register_forward_hook(
            lambda module, inputs, output: sizes.update({recipe: tuple(output.shape)}))
        assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 512) and encoder.feature_dim == 512
        hook.remove()
        last_scales = [m.bn2.weight for m in encoder.modules() if hasattr(m, "bn2")]
        assert len(last_scales) == 8 and not any(scale.any() for scale in last_scales)
        stem = encoder.conv1
        expected = ((7, 7), (2, 2), (3, 3)) if recipe == "imagenet" else ((3, 3), (1, 1), (1, 1))
        assert (stem.kernel_size, stem.stride, stem.padding) == expected
    assert sizes == {"imagenet": (2, 512, 1, 1), "cifar": (2, 512, 4, 4)}  # no max-pool on CIFAR


# -------------------------------------------------------------------------- optimizer and schedule


def learning_rates(model, optimizer):
    """The learning rates of the predictor and of the rest."""
    ids = {id(p) for p in model.predictor.parameters()}
    rates = {True: set(), False: set()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rates[id(parameter) in ids].add(group["lr"])
    assert len(rates[True]) == len(rates[False]) == 1
    return rates[True].pop(), rates[False].pop()


def step_rates(epoch, *flags):
    """Learning rates that a step at this epoch really used."""
    args = parse("--recipe", "imagenet", *flags)
    model = tiny_model()
    optimizer = simsiam.build_optimizer(model, args)
    simsiam.train_step(model, optimizer, *views(), epoch, args)
    return learning_rates(model, optimizer)


@pytest.mark.parametrize("predictor_lr", ["constant", "decay"])
@pytest.mark.parametrize("predictor", ["mlp", "none", "frozen"])
def test_optimizer_holds_every_trainable_parameter_once(predictor_lr, predictor):
    args = parse("--recipe", "imagenet", "--predictor-lr", predictor_lr, "--predictor", predictor)
    model = tiny_model(predictor=predictor)
    optimizer = simsiam.build_optimizer(model, args)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(held) == len(set(held)) and trainable <= set(held)  # sheet 9, trap 1
    frozen = {id(p) for p in model.parameters()} - trainable
    assert set(held) <= trainable | frozen
    assert isinstance(optimizer, torch.optim.SGD)  # sheet 4
    for group in optimizer.param_groups:
        assert group["momentum"] == 0.9 and group["dampening"] == 0 and not group["nesterov"]
        assert group["weight_decay"] == 1e-4 and not group["maximize"]  # BN and biases included


@pytest.mark.parametrize("batch, base_lr, expected", [
    (512, 0.05, 0.1), (256, 0.05, 0.05), (64, 0.05, 0.0125), (4096, 0.05, 0.8),  # Sec. 4.3
    (512, 0.03, 0.06)])  # App. D
def test_learning_rate_is_scaled_by_the_batch_over_256(batch, base_lr, expected):
    rates = step_rates(0.0, "--batch-size", str(batch), "--base-lr", str(base_lr))
    assert rates == pytest.approx((expected, expected), rel=1e-12)


def test_predictor_keeps_its_rate_when_constant():  # Table 1: 68.1 against 67.7
    for epoch in (0.0, 33.5, 50.0, 99.9):
        share = (1 + math.cos(math.pi * math.floor(epoch) / 100)) / 2
        assert step_rates(epoch) == pytest.approx((0.1, 0.1 * share), rel=1e-9)
        decayed = step_rates(epoch, "--predictor-lr", "decay")
        assert decayed == pytest.approx((0.1 * share, 0.1 * share), rel=1e-9)


def test_cosine_steps_once_per_epoch_and_never_reaches_zero():  # sheet 4
    args = settled("--recipe", "imagenet")  # 100 epochs

    def share(epoch):
        return simsiam.cosine_decay(epoch, args)

    assert share(0.0) == 1
    assert share(50.0) == pytest.approx(0.5, abs=1e-12)
    assert share(99.0) > 0
    assert share(99.0) == pytest.approx((1 + math.cos(0.99 * math.pi)) / 2, rel=1e-9)
    for epoch in range(100):
        expected = (1 + math.cos(math.pi * epoch / 100)) / 2
        for part in (0.0, 0.3, 0.5, 0.999):
            assert share(epoch + part) == pytest.approx(expected, abs=1e-12)
    longer = settled("--recipe", "imagenet", "--epochs", "800")
    assert simsiam.cosine_decay(400.0, longer) == pytest.approx(0.5, abs=1e-12)


def test_schedule_does_not_depend_on_the_size_of_the_data_set():  # B15
    args = settled("--recipe", "imagenet", "--epochs", "10")
    small, large = ([simsiam.cosine_decay(step / steps, args) for step in range(10 * steps)]
                    for steps in (4, 97))
    assert small[::4] == large[::97] and small[3::4] == large[96::97]
    assert len(set(small)) == len(set(large)) == 10
    per_iteration = [(1 + math.cos(math.pi * step / 40)) / 2 for step in range(40)]
    assert max(abs(a - b) for a, b in zip(small, per_iteration)) > 0.05  # the mutant differs


def test_warm_up_rises_linearly_with_every_step():  # sheet 4: 10 epochs where used
    args = settled("--recipe", "imagenet", "--warmup-epochs", "10")

    def share(epoch):
        return simsiam.cosine_decay(epoch, args)

    rise = [share(i / 97) for i in range(1, 970)]
    assert all(a < b for a, b in zip(rise, rise[1:]))
    for epoch in (0.25, 1.0, 3.7, 9.99):
        assert share(epoch) == pytest.approx(epoch / 10, abs=1e-9)
    for epoch in range(10, 100):  # then the cosine over the epochs left
        expected = (1 + math.cos(math.pi * (epoch - 10) / 90)) / 2
        assert share(epoch + 0.0) == pytest.approx(expected, abs=1e-12) == share(epoch + 0.9)
    assert step_rates(5.0, "--warmup-epochs", "10") == pytest.approx((0.1, 0.05), rel=1e-9)
    both = step_rates(5.0, "--warmup-epochs", "10", "--predictor-lr", "decay")
    assert both == pytest.approx((0.05, 0.05), rel=1e-9)


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


def run_both(args, **mistake):
    """Four steps of train_step and of the oracle; the largest difference of the weights."""
    model = tiny_model(DOUBLE)
    twin, velocity = copy.deepcopy(model), {}
    optimizer = simsiam.build_optimizer(model, args)
    for i, epoch in enumerate((0.0, 0.75, 40.5, 70.0)):
        x1, x2 = views(dtype=DOUBLE, seed=10 + i)
        share = (1 + math.cos(math.pi * math.floor(epoch) / 100)) / 2
        loss, z1 = simsiam.train_step(model, optimizer, x1, x2, epoch, args)
        slow, slow_z1 = slow_step(twin, velocity, x1, x2, share, args, **mistake)
        if not mistake:
            assert float(loss) == pytest.approx(slow.item(), abs=1e-12)
            torch.testing.assert_close(z1.detach(), slow_z1, rtol=0, atol=1e-9)
    return max((a - b).abs().max().item()
               for a, b in zip(model.state_dict().values(), twin.state_dict().values()))


STEP = "--recipe imagenet --batch-size 64 --base-lr 0.8 --weight-decay 0.01".split()


@pytest.mark.parametrize("flags", [
    "", "--no-stop-grad", "--no-symmetric", "--predictor-lr decay", "--similarity cross-entropy",
    "--momentum 0.5", "--no-stop-grad --no-symmetric --similarity cross-entropy"])
def test_train_step_equals_a_hand_written_sgd_step(flags):  # B7: flags reach loss and optimizer
    assert run_both(parse(*STEP, *flags.split(), dtype=DOUBLE)) < 1e-9


@pytest.mark.parametrize("mistake", [
    dict(bn_decay=False), dict(nesterov=True), dict(scale=2.0), dict(scale=0.5), dict(scale=-1.0),
    dict(clear=False)], ids=str)
def test_hand_written_step_tells_mistakes_apart(mistake):
    assert run_both(parse(*STEP, dtype=DOUBLE), **mistake) > 1e-6


def test_one_step_changes_every_trainable_parameter_and_nothing_else():  # B10
    # Without weight decay only a gradient can change a weight.
    args = parse("--no-zero-init-residual", "--weight-decay", "0")
    torch.manual_seed(0)
    encoder = simsiam.build_encoder(args)
    model = SimSiam(encoder, dim=args.dim, predictor_dim=args.predictor_dim,
                    hidden_dim=args.hidden_dim, projector_layers=args.projector_layers)
    before = copy.deepcopy(model.state_dict())
    optimizer = simsiam.build_optimizer(model, args)
    x1, x2 = torch.randn(2, 16, 3, 32, 32).unbind(0)
    loss, z1 = simsiam.train_step(model, optimizer, x1, x2, 0.0, args)
    assert math.isfinite(float(loss)) and z1.shape == (16, args.dim)
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) != parameter.requires_grad, name


def test_bfloat16_step_keeps_loss_and_weights_in_float32():
    args = parse()
    args.precision, args.dtype = "bf16", torch.bfloat16
    model = tiny_model()
    optimizer = simsiam.build_optimizer(model, args)
    loss, _ = simsiam.train_step(model, optimizer, *views(), 0.0, args)
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------------ recipes

IMAGENET = dict(
    arch="resnet50", width=1, small_images=False, zero_init_residual=True,  # sheet 2
    projector_layers=3, hidden_dim=0, dim=2048, predictor_dim=512,  # sheet 2
    epochs=100, batch_size=512,  # sheet 4
    base_lr=0.05, warmup_epochs=0, momentum=0.9, weight_decay=1e-4,  # sheet 4
    image_size=224, crop_min=0.2,  # sheet 3
    jitter=(0.4, 0.4, 0.4, 0.1), jitter_prob=0.8, gray_prob=0.2,  # sheet 3
    blur_prob=0.5,  # sheet 3, authors' code
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),  # sheet 3: ImageNet's
    stop_grad=True, predictor="mlp",  # sheet 1; Table 1
    predictor_lr="constant",  # sheet 4, README command; Table 1
    bn="default", similarity="cosine", symmetric=True,  # sheet 5: Table 3, Sec. 4.5, 4.6
    knn_k=200, knn_temperature=0.1)  # sheet 4, the community's monitor
CIFAR = dict(
    IMAGENET, arch="resnet18", small_images=True,  # sheet 2: 3x3 stem, no max-pool
    projector_layers=2, dim=2048,  # App. D
    hidden_dim=2048, predictor_dim=512,  # sheet 2: community
    base_lr=0.03, epochs=800, weight_decay=5e-4, batch_size=512, warmup_epochs=0,  # App. D
    image_size=32, blur_prob=0.0,  # sheet 3
    mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616))  # sheet 3: CIFAR's
LINEAR_IMAGENET = dict(  # sheet 4, authors' code
    optimizer="larc", base_lr=0.1, batch_size=4096, momentum=0.9, weight_decay=0, epochs=90,
    crop_min=0.08)  # the default scale of RandomResizedCrop
LINEAR_CIFAR = dict(  # sheet 4: PatrickHua
    optimizer="sgd", base_lr=30, batch_size=256, momentum=0.9, weight_decay=0, epochs=100,
    crop_min=1)  # ours


@pytest.mark.parametrize("flags, expected", [
    ("--recipe imagenet", IMAGENET), ("--data /data/imagenet", IMAGENET),
    ("--recipe cifar", CIFAR), ("--data cifar10", CIFAR), ("--data cifar100", CIFAR),
    ("--data stl10", {**CIFAR, "image_size": 96}),  # the CIFAR recipe at STL-10's size
    ("--data /data/imagenet --recipe cifar", CIFAR), ("--data cifar10 --recipe imagenet", IMAGENET),
    ("linear --init none --data /data/imagenet", LINEAR_IMAGENET),
    ("linear --init none --data demo --recipe imagenet", LINEAR_IMAGENET),
    ("linear --init none --data cifar10", LINEAR_CIFAR)])
def test_recipes_are_the_papers(flags, expected, monkeypatch):  # B11
    monkeypatch.setattr("os.path.isdir", lambda path: path == "/data/imagenet")
    assert_fields(settled(*flags.split()), expected)


def test_demo_keeps_the_method_and_is_the_default():
    method = {name: IMAGENET[name] for name in (
        "stop_grad", "predictor", "predictor_lr", "bn", "similarity", "symmetric", "momentum",
        "jitter", "jitter_prob", "gray_prob")}
    for flags in ([], ["--data", "demo"], ["--recipe", "demo"]):
        args = settled(*flags)
        assert_fields(args, {**method, "small_images": True})
        assert args.recipe == "demo" and args.predictor_dim * 4 == args.dim  # the bottleneck, 1/4


@pytest.mark.parametrize("flags, expected", [
    ("--arch resnet34", dict(arch="resnet34")), ("--width 0.5", dict(width=0.5)),
    ("--small-images", dict(small_images=True)),
    ("--no-zero-init-residual", dict(zero_init_residual=False)),
    ("--projector-layers 2", dict(projector_layers=2)), ("--hidden-dim 300", dict(hidden_dim=300)),
    ("--dim 256 --predictor-dim 64", dict(dim=256, predictor_dim=64)),
    ("--epochs 7", dict(epochs=7)), ("--batch-size 96", dict(batch_size=96)),
    ("--base-lr 0.5 --weight-decay 1e-5", dict(base_lr=0.5, weight_decay=1e-5)),  # Sec. 6.1
    ("--warmup-epochs 3", dict(warmup_epochs=3)), ("--momentum 0.8", dict(momentum=0.8)),
    ("--precision bf16", dict(precision="bf16")), ("--image-size 96", dict(image_size=96)),
    ("--crop-min 0.08", dict(crop_min=0.08)), ("--jitter 0.1 0.2 0.3 0.05",
                                               dict(jitter=(0.1, 0.2, 0.3, 0.05))),
    ("--jitter-prob 0.5 --gray-prob 0.1", dict(jitter_prob=0.5, gray_prob=0.1)),
    ("--blur-prob 0.25", dict(blur_prob=0.25)),
    ("--mean 0.1 0.2 0.3 --std 0.4 0.5 0.6", dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))),
    ("--no-stop-grad", dict(stop_grad=False)), ("--predictor none", dict(predictor="none")),
    ("--predictor frozen", dict(predictor="frozen")),
    ("--predictor-lr decay", dict(predictor_lr="decay")), ("--bn all", dict(bn="all")),
    ("--similarity cross-entropy", dict(similarity="cross-entropy")),
    ("--no-symmetric", dict(symmetric=False)),
    ("--knn-k 20 --knn-temperature 0.07", dict(knn_k=20, knn_temperature=0.07))])
def test_a_flag_overrides_its_field_and_no_other(flags, expected):
    args = settled("--recipe", "imagenet", *flags.split())
    assert_fields(args, {**IMAGENET, **expected})
    assert expected.items() - {**IMAGENET, "precision": "auto"}.items()  # really another value


def test_the_docstring_lists_the_departures():
    text = " ".join(simsiam.__doc__.split())
    assert "2011.10566" in text
    code = re.search(r"Differences from the authors' code: (.+?) python simsiam.py", text)[1]
    imagenet = settled("--recipe", "imagenet")
    # Text, and whether the program does differ so: both must hold, or neither.
    for words, differs in (
            ("bfloat16", imagenet.precision != "fp32"),  # sheet 4: fp32
            ("lr scaled by the batch of all nodes", True),  # sheet 9, trap 12
            ("Gaussian blur", True),  # sheet 9, trap 15: PIL's is an approximation
            ("the last epoch, not the best", True),  # sheet 4: theirs picks the best on val
            ("kNN", imagenet.knn_k > 0)):  # sheet 4: the official repository has none
        assert (words in code) == differs, words


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
    for wrong in (unit.std(1).mean(), z.std(0).mean(), unit.std()):  # wrong axis, not normalised
        assert abs(wrong * math.sqrt(7) - slow_std(z)) > 0.02


def test_feature_std_is_one_for_isotropic_and_zero_for_collapsed_outputs():  # Sec. 4.1, sheet 6
    torch.manual_seed(0)
    z = torch.randn(512, 256)
    std = simsiam.feature_std(z)
    assert isinstance(std, float) and std == pytest.approx(1, abs=0.01)
    assert simsiam.feature_std(z[:1].expand(512, -1)) == pytest.approx(0, abs=1e-5)
    scales = torch.rand(512, 1) + 0.1  # one direction at many lengths is still one point
    assert simsiam.feature_std(z[:1] * scales) == pytest.approx(0, abs=1e-5)
    shifted = simsiam.feature_std(z + 3 * z[:1])
    assert 0.1 < shifted < 0.6


def slow_rank(z):
    values = torch.linalg.svdvals(z.double() - z.double().mean(0)) ** 2
    shares = [v / sum(values.tolist()) for v in values.tolist()]
    return math.exp(-sum(v * math.log(v) for v in shares if v > 0))


def test_effective_rank_equals_that_of_the_singular_values():
    torch.manual_seed(0)
    for n, d, power in ((100, 12, 0.0), (100, 12, 1.0), (10, 40, 0.5), (300, 64, 2.0)):
        z = torch.randn(n, d) * torch.arange(1, d + 1) ** -power + torch.randn(d)
        assert simsiam.effective_rank(z) == pytest.approx(slow_rank(z), rel=1e-3)
        assert simsiam.effective_rank(50 * z) == pytest.approx(slow_rank(z), rel=1e-3)
    skewed = torch.randn(100, 12) * torch.arange(1, 13) ** -1.0 + 5  # mistakes differ:
    values = torch.linalg.svdvals(skewed - skewed.mean(0))
    shares = values / values.sum()  # not squared
    assert abs((-(shares * shares.log()).sum()).exp() - slow_rank(skewed)) > 0.5
    values = torch.linalg.svdvals(skewed) ** 2  # not centred
    shares = values / values.sum()
    assert abs((-(shares * shares.log()).sum()).exp() - slow_rank(skewed)) > 0.5


def test_effective_rank_takes_the_whole_batch():  # of 4096, say (Table 2)
    torch.manual_seed(0)
    z = torch.randn(1024, 64)
    assert simsiam.effective_rank(z) == pytest.approx(slow_rank(z), rel=1e-3)


def test_effective_rank_sees_the_blind_spot_of_the_std():  # sheet 6: rank 1 passes for healthy
    torch.manual_seed(0)
    signs = torch.randint(0, 2, (1, 128)) * 2.0 - 1
    two_points = torch.cat([signs.expand(256, -1), -signs.expand(256, -1)])
    assert simsiam.feature_std(two_points) == pytest.approx(1, abs=0.01)
    assert simsiam.effective_rank(two_points) == pytest.approx(1, abs=0.01)
    outlier = torch.cat([signs.expand(511, -1), -signs])
    assert simsiam.feature_std(outlier) == pytest.approx(2 / math.sqrt(512), rel=0.01)  # .09
    line = torch.randn(512, 1) * signs + torch.randn(128)
    assert simsiam.effective_rank(line) == pytest.approx(1, abs=0.01)
    isotropic = torch.randn(512, 40)
    assert isinstance(simsiam.effective_rank(isotropic), float)
    assert 0.9 * 40 < simsiam.effective_rank(isotropic) <= 40.001
    assert math.isfinite(simsiam.effective_rank(torch.ones(64, 8)))  # a log line must not be NaN


# ---------------------------------------------------------------------------------------------- kNN


def slow_knn(bank, bank_labels, queries, labels, k, temperature, weighted=True, normalised=True):
    """Weighted vote of the k nearest by cosine, weights exp(cos / T) (sheet 4: InstDisc)."""
    right = 0
    for query, label in zip(queries.double(), labels.tolist()):
        neighbours = []
        for row, row_label in zip(bank.double(), bank_labels.tolist()):
            length = (query.norm() * row.norm()) if normalised else 1.0
            neighbours.append(((query @ row / length).item(), row_label))
        votes, nearest = {}, sorted(neighbours, reverse=True)[:k]
        for cosine, row_label in nearest:
            weight = math.exp((cosine - nearest[0][0]) / temperature) if weighted else 1.0
            votes[row_label] = votes.get(row_label, 0.0) + weight
        right += max(votes, key=votes.get) == label
    return right / len(labels)


@pytest.fixture(scope="module")
def clusters():
    """Noisy classes of unequal size and length, so that every choice in the vote matters."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(5, 6, generator=generator)

    def sample(n):
        labels = (torch.rand(n, generator=generator) ** 2 * 5).long()
        noise = 1.2 * torch.randn(n, 6, generator=generator)
        lengths = torch.exp(torch.randn(n, 1, generator=generator))
        return (centres[labels] + noise) * lengths, labels

    return *sample(90), *sample(60)


@pytest.mark.parametrize("k", [1, 5, 40, 90, 200])
def test_knn_equals_a_slow_loop_even_when_k_exceeds_the_bank(clusters, k):
    accuracy = simsiam.knn_accuracy(*clusters, k, 0.1)
    assert accuracy == pytest.approx(slow_knn(*clusters, k, 0.1), abs=1e-9)
    assert 0.3 < accuracy < 0.95  # neither chance nor trivial


def test_knn_is_a_weighted_vote_of_cosines(clusters):
    right = simsiam.knn_accuracy(*clusters, 40, 0.1)
    assert slow_knn(*clusters, 40, 0.1, weighted=False) != right
    assert slow_knn(*clusters, 40, 0.1, normalised=False) != right
    assert slow_knn(*clusters, 40, 10.0) != right  # the temperature matters,
    assert simsiam.knn_accuracy(*clusters, 40, 10.0) == pytest.approx(  # and it arrives
        slow_knn(*clusters, 40, 10.0), abs=1e-9)


def test_knn_ignores_the_length_of_features(clusters):
    bank, bank_labels, queries, labels = clusters
    torch.manual_seed(0)
    accuracy = simsiam.knn_accuracy(bank, bank_labels, queries, labels, 20, 0.1)
    for b, q in ((100.0, 0.01), (torch.rand(90, 1) + 0.1, torch.rand(60, 1) + 0.1)):
        assert simsiam.knn_accuracy(b * bank, bank_labels, q * queries, labels, 20, 0.1) == accuracy


def test_knn_counts_every_query_once():  # B22: exact, whatever the chunks
    bank = torch.eye(4)
    queries = torch.eye(4).repeat(700, 1)[:2501]
    labels = torch.arange(4).repeat(700)[:2501]
    wrong = labels.clone()
    wrong[-3:] = (wrong[-3:] + 1) % 4
    assert simsiam.knn_accuracy(bank, torch.arange(4), queries, labels, 1, 0.1) == 1
    accuracy = simsiam.knn_accuracy(bank, torch.arange(4), queries, wrong, 1, 0.1)
    assert accuracy == pytest.approx(2498 / 2501, abs=1e-9)
    unseen = torch.full((2501,), 9)  # a class that the bank does not have
    assert simsiam.knn_accuracy(bank, torch.arange(4), queries, unseen, 1, 0.1) == 0
