"""common.vit against MoCo v3's paper, formulas written out, and timm.

"sheet" is the fact sheet of arXiv 2104.02057 and its released code: 2.1 sizes, 2.2 positions,
2.3 initialisation, 2.4 frozen projection, 2.5 convolutional stem, 7 names in the checkpoints.
"""
import copy
import math
import re

import pytest
import torch
from torch import nn

from common import VITS, sincos_table, vit
from helpers import DOUBLE, count


def on_meta(*args, **kwargs):
    """A network without memory, for counting."""
    with torch.device("meta"):
        return vit(*args, **kwargs)


def shapes(module):
    return {name: tuple(x.shape) for name, x in module.state_dict().items()}


def randomized(model, seed=0):
    """Every parameter and statistic at random, the fixed table aside; in float64."""
    g = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "pos_embed" or p.requires_grad:
                fan_in = p[0].numel() if p.dim() in (2, 4) else 4
                p.copy_(torch.randn(p.shape, generator=g, dtype=DOUBLE) / math.sqrt(fan_in))
                if re.search(r"norm\w*\.weight|proj\.(1|4|7|10)\.weight", name):
                    p.add_(1)
        for name, b in model.named_buffers():
            if b.is_floating_point():
                b.copy_(torch.rand(b.shape, generator=g, dtype=DOUBLE) + 0.5)
    return model


def images(n=3, size=(16, 24), seed=5, dtype=DOUBLE):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, *size, generator=g, dtype=DOUBLE).to(dtype)


def mini(size=(16, 24), patch=8, seed=0, **options):
    """The smallest ViT; a grid of 2 x 3 tells rows from columns."""
    torch.manual_seed(seed)
    return vit("mini", size, patch, **options)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(3)
    return vit("small", patch_projection="frozen")


# -------------------------------------------------------------------------------------------- sizes


def backbone_count(dim, depth, patch, tokens):
    """Weights of a ViT by arithmetic: class token, table, projection, blocks, last norm."""
    block = 2 * 2 * dim + (3 * dim * dim + 3 * dim) + (dim * dim + dim) + (8 * dim * dim + 5 * dim)
    return dim + (1 + tokens) * dim + (3 * patch * patch + 1) * dim + depth * block + 2 * dim


@pytest.mark.parametrize("size, patch, dim, depth, heads, tokens, millions, frozen", [  # sheet 2.1
    ("small", 16, 384, 12, 12, 196, 21.666, 0.371), ("base", 16, 768, 12, 12, 196, 85.799, 0.742),
    ("large", 16, 1024, 24, 16, 196, 303.302, 0.989),
    ("huge", 14, 1280, 32, 16, 256, 630.765, 1.083)])
def test_sizes_are_the_papers(size, patch, dim, depth, heads, tokens, millions, frozen):  # Table 2
    model = on_meta(size, patch_size=patch, patch_projection="frozen")
    assert VITS[size] == (dim, depth, heads)
    assert len(model.blocks) == depth and model.feature_dim == dim
    assert model.pos_embed.shape == (1, 1 + tokens, dim)
    assert count(model) == backbone_count(dim, depth, patch, tokens)
    assert round(count(model) / 1e6, 3) == millions
    assert round(count(model, trainable=False) / 1e6, 3) == frozen


def test_our_small_networks_have_their_sizes():
    assert VITS["mini"] == (96, 3, 3) and VITS["tiny"] == (192, 12, 3)
    assert count(on_meta("tiny")) == backbone_count(192, 12, 16, 196)
    assert count(on_meta("mini", 32, 4)) == backbone_count(96, 3, 4, 64)


@pytest.mark.parametrize("size, millions", [("small", 20.617), ("base", 82.200)])  # sheet 2.5
def test_sizes_with_a_convolutional_stem_are_the_authors(size, millions):
    model = on_meta(size, stem="conv")
    assert round(count(model) / 1e6, 3) == millions
    assert len(model.blocks) == 11


def test_smaller_patches_change_the_projection_and_the_table_alone():  # sheet 2.1: /7, 1024 tokens
    there, here = shapes(on_meta("base")), shapes(on_meta("base", patch_size=7))
    assert {name for name in there if there[name] != here[name]} == {
        "pos_embed", "patch_embed.proj.weight"}
    assert here["pos_embed"] == (1, 1025, 768) and there.keys() == here.keys()


def test_options_must_be_named():
    with pytest.raises(TypeError):
        vit("mini", 16, 8, 3)


# ------------------------------------------------------------------------------- position embedding


def slow_table(rows, columns, dim, order="rows first", base=10000.0, spacing=4):
    """[sin(row w) | cos(row w) | sin(col w) | cos(col w)], one number at a time (sheet 2.2)."""
    quarter, table = dim // 4, []
    for row in range(rows):
        for column in range(columns):
            vector = []
            for coordinate in (row, column) if order == "rows first" else (column, row):
                for function in (math.sin, math.cos):
                    for j in range(quarter):
                        vector.append(function(coordinate * base ** (-j * spacing / dim)))
            table.append(vector)
    return torch.tensor(table, dtype=DOUBLE)


@pytest.mark.parametrize("rows, columns, dim", [(14, 14, 96), (2, 3, 8), (3, 2, 12), (1, 1, 4),
                                                (1, 5, 384), (8, 8, 192)])
def test_table_equals_a_loop_over_numbers(rows, columns, dim):
    table = sincos_table(rows, columns, dim)
    assert table.shape == (rows * columns, dim) and not table.requires_grad
    difference = (table.double() - slow_table(rows, columns, dim)).abs().max()
    assert difference < 2e-6  # float32 of angles up to 13


@pytest.mark.parametrize("mistake", [dict(order="columns first"), dict(base=1000.0), dict(spacing=2)],
                         ids=str)
@pytest.mark.parametrize("rows, columns", [(4, 4), (2, 3)])
def test_the_loop_tells_other_tables_apart(rows, columns, mistake):  # columns first: MAE's
    difference = sincos_table(rows, columns, 32).double() - slow_table(rows, columns, 32, **mistake)
    assert difference.abs().max() > 0.1


def test_maes_table_is_this_one_with_its_halves_swapped():  # sheet 2.2, trap 10
    table = sincos_table(5, 5, 16)
    swapped = torch.cat([table[:, 8:], table[:, :8]], 1)
    expected = slow_table(5, 5, 16, "columns first")
    torch.testing.assert_close(swapped.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size, grid", [((16, 24), (2, 3)), ((24, 16), (3, 2)), (32, (4, 4))])
def test_table_in_the_network_is_fixed_saved_and_zero_for_the_class_token(size, grid):
    model = mini(size)
    assert not model.pos_embed.requires_grad and "pos_embed" in model.state_dict()
    assert not model.pos_embed[0, 0].any()
    expected = slow_table(*grid, 96)
    torch.testing.assert_close(model.pos_embed[0, 1:].double(), expected, rtol=0, atol=2e-6)


def test_table_of_small_at_224_pixels_is_the_formula(small):
    assert small.pos_embed.shape == (1, 197, 384)
    expected = slow_table(14, 14, 384)
    torch.testing.assert_close(small.pos_embed[0, 1:].double(), expected, rtol=0, atol=2e-6)


def test_learned_positions_are_trained_and_no_positions_are_none():  # Sec. 6.2
    learned, none = mini(position="learned"), mini(position="none")
    assert learned.pos_embed.requires_grad and learned.pos_embed.shape == (1, 7, 96)
    learned(images(dtype=torch.float32)).sin().sum().backward()  # a sum alone: LayerNorm makes it 0
    assert learned.pos_embed.grad.abs().amax(2).gt(0).all()
    assert not [name for name in none.state_dict() if "pos" in name]
    assert (learned.pos_embed[0, 1:].detach().double() - slow_table(2, 3, 96)).abs().max() > 0.5


# ----------------------------------------------------------------------------------- initialisation


def assert_uniform(x, bound, name):
    assert x.abs().max() <= bound * (1 + 1e-6), name
    assert x.abs().max() > 0.99 * bound, name
    assert x.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name
    assert abs(x.mean().item()) < 6 * bound / math.sqrt(3 * x.numel()), name


def test_every_tensor_starts_as_the_authors_do(small):  # sheet 2.3
    dim, seen = 384, set()
    bounds = {"qkv": math.sqrt(6 / (dim + dim)), "attn.proj": math.sqrt(6 / (dim + dim)),
              "fc1": math.sqrt(6 / (dim + 4 * dim)), "fc2": math.sqrt(6 / (dim + 4 * dim)),
              "patch_embed.proj": math.sqrt(6 / (3 * 16 * 16 + dim))}
    assert round(bounds["qkv"], 4) == 0.0884 and round(bounds["patch_embed.proj"], 4) == 0.0722
    for name, p in small.named_parameters():
        p = p.detach()
        layer = next((layer for layer in bounds if f"{layer}." in name), None)
        if layer and name.endswith("weight"):
            assert_uniform(p.flatten(), bounds[layer], name)
        elif name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert p.eq(1).all(), name
        elif name == "cls_token":
            assert 0.85e-6 < p.std() < 1.15e-6 and p.abs().max() < 5e-6
        else:
            assert name == "pos_embed"
        seen.add(layer)
    assert seen == {*bounds, None}


def test_queries_keys_and_values_are_three_matrices_not_one():  # sheet 2.3, trap 8
    fused = math.sqrt(6 / (96 + 3 * 96))
    for part in mini().blocks[0].attn.qkv.weight.detach().chunk(3):
        assert_uniform(part.flatten(), math.sqrt(6 / (96 + 96)), "qkv")
        assert part.abs().max() > 1.3 * fused  # Xavier on the fused matrix would end there


def test_base_starts_within_the_authors_bounds():  # sheet 2.3: .0625, twice
    with torch.device("meta"):
        assert vit("base").blocks[0].attn.qkv.weight.shape == (3 * 768, 768)
    assert math.sqrt(6 / (768 + 768)) == math.sqrt(6 / (3 * 16 * 16 + 768)) == 0.0625


def test_convolutional_stem_keeps_pytorchs_initialisation():  # sheet 2.5
    torch.manual_seed(0)
    stem = vit("tiny", 32, stem="conv").patch_embed.proj
    for i in (0, 3, 6, 9, 12):
        fan_in = stem[i].weight[0].numel()  # Kaiming-uniform with a = sqrt(5): 1 / sqrt(fan in)
        assert stem[i].weight.abs().max() <= 1 / math.sqrt(fan_in)
        assert stem[i].weight.std().item() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.1)
    assert stem[12].bias.abs().max() > 0  # the layer's own default, not zero
    for i in (1, 4, 7, 10):
        assert stem[i].weight.eq(1).all() and not stem[i].bias.any()


def test_same_seed_same_network_other_seed_another():
    a, b, c = (mini(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["patch_embed.proj.weight"], c["patch_embed.proj.weight"])
    assert not torch.equal(a["blocks.0.attn.qkv.weight"], a["blocks.1.attn.qkv.weight"])


# -------------------------------------------------------------------------------- frozen projection


def test_frozen_projection_gets_no_gradient_and_all_else_does():  # sheet 2.4
    model = mini(patch_projection="frozen")
    model(images(dtype=torch.float32)).sin().sum().backward()
    for name, p in model.named_parameters():
        fixed = name.startswith("patch_embed.") or name == "pos_embed"
        assert p.requires_grad != fixed, name
        assert (p.grad is None) == fixed, name
        assert fixed or p.grad.any(), name


def test_frozen_and_learned_start_with_the_same_weights():
    frozen, learned = mini(patch_projection="frozen"), mini(patch_projection="learned")
    assert learned.patch_embed.proj.weight.requires_grad and learned.patch_embed.proj.bias.requires_grad
    for name, x in frozen.state_dict().items():
        assert torch.equal(x, learned.state_dict()[name]), name
    bare = mini()  # learned unless asked for
    assert bare.patch_embed.proj.weight.requires_grad


# ------------------------------------------------------------------------------------------ forward


def slow_layer_norm(x, weights, name, eps=1e-6):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def slow_batch_norm(x, weights, name, training, eps=1e-5):
    """Over images and tokens, per channel."""
    rows = x.reshape(-1, x.shape[-1])
    mean, variance = rows.mean(0), rows.var(0, unbiased=False)
    if not training:
        mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    return (x - mean) / (variance + eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def slow_attention(x, weights, name, heads, mistake):
    """One image, one head and one query at a time."""
    n, tokens, dim = x.shape
    width, out = dim // heads, torch.zeros_like(x)
    qkv = x @ weights[f"{name}.qkv.weight"].T + weights[f"{name}.qkv.bias"]
    for i in range(n):
        for h in range(heads):
            def part(which):
                if mistake == "heads before q, k, v":
                    return qkv[i, :, (3 * h + which) * width:(3 * h + which + 1) * width]
                return qkv[i, :, which * dim + h * width:which * dim + (h + 1) * width]

            q, k, v = part(0), part(1), part(2)
            for t in range(tokens):
                scale = dim if mistake == "scale of the whole width" else width
                scores = torch.stack([(q[t] * k[s]).sum() / math.sqrt(scale) for s in range(tokens)])
                shares = scores.exp() / scores.exp().sum()
                out[i, t, h * width:(h + 1) * width] = sum(shares[s] * v[s] for s in range(tokens))
    return out @ weights[f"{name}.proj.weight"].T + weights[f"{name}.proj.bias"]


def gelu(x, mistake):
    if mistake == "tanh in GELU":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def slow_vit(model, x, patch=8, heads=3, pooling="class", position=True, mlp_norm="layer",
             training=True, mistake=""):
    """The forward pass of sheet 2.1 from the state dict, patch by patch. Also: mistakes to tell."""
    weights = model.state_dict()
    eps = 1e-5 if mistake == "LayerNorm's default eps" else 1e-6
    kernel = weights["patch_embed.proj.weight"].flatten(1)
    tokens = []
    rows, columns = x.shape[2] // patch, x.shape[3] // patch
    places = [(r, c) for r in range(rows) for c in range(columns)]
    if mistake == "columns first":
        places = [(r, c) for c in range(columns) for r in range(rows)]
    for r, c in places:
        pixels = x[:, :, r * patch:(r + 1) * patch, c * patch:(c + 1) * patch].flatten(1)
        tokens.append(pixels @ kernel.T + weights["patch_embed.proj.bias"])
    table = weights["pos_embed"][0] if position else 0
    if pooling == "class":
        tokens.insert(len(tokens) if mistake == "class token last" else 0,
                      weights["cls_token"][0].expand(len(x), -1))
    h = torch.stack(tokens, 1) + table
    for i in range(3):
        name = f"blocks.{i}"
        if mistake == "norm after":
            h = slow_layer_norm(h + slow_attention(h, weights, f"{name}.attn", heads, mistake),
                                weights, f"{name}.norm1")
        else:
            h = h + slow_attention(slow_layer_norm(h, weights, f"{name}.norm1", eps), weights,
                                   f"{name}.attn", heads, mistake)
        y = (slow_layer_norm(h, weights, f"{name}.norm2", eps) if mlp_norm == "layer"
             else slow_batch_norm(h, weights, f"{name}.norm2", training))
        y = gelu(y @ weights[f"{name}.mlp.fc1.weight"].T + weights[f"{name}.mlp.fc1.bias"], mistake)
        h = h + y @ weights[f"{name}.mlp.fc2.weight"].T + weights[f"{name}.mlp.fc2.bias"]
    if pooling != "mean-no-norm" and mistake != "no last norm":
        h = slow_layer_norm(h, weights, "norm", eps)
    return h[:, 0] if pooling == "class" else h.mean(1)


def test_features_equal_a_slow_forward_pass():
    model, x = randomized(mini()), images()
    features = model(x)
    assert features.shape == (3, 96) and features.dtype == DOUBLE
    torch.testing.assert_close(features.detach(), slow_vit(model, x), rtol=0, atol=1e-9)
    torch.testing.assert_close(model.eval()(x).detach(), slow_vit(model, x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("mistake", [
    "heads before q, k, v", "scale of the whole width", "tanh in GELU", "LayerNorm's default eps",
    "columns first", "class token last", "norm after", "no last norm"])
def test_the_slow_pass_tells_mistakes_apart(mistake):
    model, x = randomized(mini()), images()
    assert (model(x).detach() - slow_vit(model, x, mistake=mistake)).abs().max() > 1e-6


@pytest.mark.parametrize("pooling", ["class", "mean", "mean-no-norm"])
@pytest.mark.parametrize("position", ["sincos", "learned", "none"])
def test_every_position_and_pooling_equals_the_slow_pass(position, pooling):  # Sec. 6.2
    model, x = randomized(mini(position=position, pooling=pooling)), images(2)
    expected = slow_vit(model, x, pooling=pooling, position=position != "none")
    torch.testing.assert_close(model(x).detach(), expected, rtol=0, atol=1e-9)
    assert ("cls_token" in model.state_dict()) == (pooling == "class")
    assert ("norm.weight" in model.state_dict()) == (pooling != "mean-no-norm")  # no dead weights
    if position != "none":
        assert model.pos_embed.shape == (1, 6 + (pooling == "class"), 96)


def test_poolings_differ_by_the_place_of_the_last_norm():  # sheet 8, trap 12: 69.7 against 76.3
    x = images(2)
    after = randomized(mini(pooling="mean"))
    before = mini(pooling="mean-no-norm").double()
    assert before.load_state_dict(after.state_dict(), strict=False).missing_keys == []
    assert (after(x) - before(x)).abs().max() > 0.1


@pytest.mark.parametrize("flag, heads", [(0, 3), (3, 3), (1, 1), (6, 6)])
def test_number_of_heads_is_the_sizes_unless_given(flag, heads):
    model, x = randomized(mini(heads=flag)), images(2)
    torch.testing.assert_close(model(x).detach(), slow_vit(model, x, heads=heads), rtol=0, atol=1e-9)


def test_small_has_12_heads_and_no_tensor_shows_it(small):  # sheet 2.1, trap 9
    assert VITS["small"][2] == 12
    assert shapes(on_meta("small", heads=6)) == shapes(small)  # that is the trap
    tokens = torch.randn(2, 5, 384, generator=torch.Generator().manual_seed(0))
    weights = small.state_dict()
    output = small.blocks[0].attn(tokens).detach()
    twelve, six = (slow_attention(tokens, weights, "blocks.0.attn", heads, "") for heads in (12, 6))
    torch.testing.assert_close(output, twelve, rtol=0, atol=1e-5)
    assert (output - six).abs().max() > 1e-2


def test_an_image_does_not_depend_on_its_batch():
    model, x = randomized(mini()), images(4)
    torch.testing.assert_close(model(x)[2:3], model(x[2:3]), rtol=0, atol=1e-12)


def test_tokens_know_their_place_only_through_the_embedding():
    x = images(2)
    swapped = torch.cat([x[..., 8:16], x[..., :8], x[..., 16:]], -1)  # two columns of patches
    for position, same in (("none", True), ("sincos", False), ("learned", False)):
        model = randomized(mini(position=position))
        difference = (model(x) - model(swapped)).abs().max().item()
        assert (difference < 1e-9) == same, position


@pytest.mark.parametrize("height, width", [(16, 24), (24, 16), (8, 40)])
def test_images_need_not_be_square(height, width):
    model, x = randomized(mini((height, width))), images(2, (height, width))
    torch.testing.assert_close(model(x).detach(), slow_vit(model, x), rtol=0, atol=1e-9)
    with pytest.raises((ValueError, RuntimeError)):  # as many patches, and another meaning
        model(x.transpose(2, 3))


def test_one_number_is_a_square():
    assert shapes(mini(16)) == shapes(mini((16, 16)))


def test_bfloat16_autocast_stays_near_float32():
    model, x = mini(32), images(4, (32, 32), dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    with torch.no_grad():
        high = model(x)
    assert low.isfinite().all() and (low.float() - high).abs().max() < 0.1


# ------------------------------------------------------------------------------------ ViT-BN, stem


def test_vit_bn_normalises_the_mlp_over_images_and_tokens():  # Sec. 6.3; the axes are our reading
    model = randomized(mini(mlp_norm="batch"))
    for block in model.blocks:
        assert isinstance(block.norm1, nn.LayerNorm)  # attention keeps it
        assert isinstance(block.norm2, nn.modules.batchnorm._BatchNorm)
    assert isinstance(model.norm, nn.LayerNorm)
    x = images(4)
    before = copy.deepcopy(model)
    torch.testing.assert_close(model(x).detach(), slow_vit(before, x, mlp_norm="batch"),
                               rtol=0, atol=1e-9)
    assert not torch.equal(before.blocks[1].norm2.running_mean, model.blocks[1].norm2.running_mean)
    model.eval()
    torch.testing.assert_close(model(x).detach(), slow_vit(model, x, mlp_norm="batch", training=False),
                               rtol=0, atol=1e-9)
    assert count(model) == count(mini())  # scale and shift, as LayerNorm


def test_convolutional_stem_has_the_authors_layers_and_names():  # sheet 2.5, 7
    model = vit("mini", 32, stem="conv")
    stem = model.patch_embed.proj
    assert len(model.blocks) == 2 and len(stem) == 13
    widths = [3, 12, 24, 48, 96]
    for i in range(4):
        convolution, norm, relu = stem[3 * i:3 * i + 3]
        assert (convolution.in_channels, convolution.out_channels) == (widths[i], widths[i + 1])
        assert convolution.kernel_size == (3, 3) and convolution.stride == (2, 2)
        assert convolution.padding == (1, 1) and convolution.bias is None
        assert isinstance(norm, nn.BatchNorm2d) and isinstance(relu, nn.ReLU)
    last = stem[12]
    assert last.kernel_size == (1, 1) and last.stride == (1, 1) and last.bias is not None
    names = {name for name in shapes(model) if name.startswith("patch_embed")}
    assert names == (
        {f"patch_embed.proj.{i}.weight" for i in (0, 3, 6, 9, 12)} | {"patch_embed.proj.12.bias"}
        | {f"patch_embed.proj.{i}.{name}" for i in (1, 4, 7, 10) for name in (
            "weight", "bias", "running_mean", "running_var", "num_batches_tracked")})


def test_convolutional_stem_computes_what_its_layers_say():
    model = randomized(vit("mini", (32, 48), stem="conv"))
    x = images(3, (32, 48))
    grid = copy.deepcopy(model.patch_embed.proj)(x)
    assert grid.shape == (3, 96, 2, 3)
    tokens = [model.cls_token[0].expand(3, -1)]
    tokens += [grid[:, :, r, c] for r in range(2) for c in range(3)]
    h = torch.stack(tokens, 1) + model.pos_embed
    torch.testing.assert_close(model(x), model.norm(model.blocks(h))[:, 0], rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------ gradient checkpoint


@pytest.mark.parametrize("options", [{}, dict(patch_projection="frozen"), dict(position="none"),
                                     dict(pooling="mean"), dict(size=(32, 48), patch=16, stem="conv")],
                         ids=str)
def test_computing_blocks_again_changes_no_bit(options):
    plain, again = mini(**options).double(), mini(**options, grad_checkpoint=True).double()
    x = images(4, options.get("size", (16, 24)))
    outputs = []
    for model in (plain, again):
        outputs.append(model(x))
        outputs[-1].sin().sum().backward()
    assert torch.equal(*outputs)
    for (name, a), (_, b) in zip(plain.named_parameters(), again.named_parameters()):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name
    for (name, a), (_, b) in zip(plain.named_buffers(), again.named_buffers()):
        assert torch.equal(a, b), name  # statistics counted once


def test_computing_blocks_again_is_refused_where_batch_norm_would_count_twice():
    with pytest.raises(ValueError, match="running statistics"):
        mini(mlp_norm="batch", grad_checkpoint=True)


def test_blocks_are_really_computed_again_and_only_for_gradients():
    calls = []
    for grad_checkpoint, expected in ((False, 1), (True, 2)):
        model = mini(grad_checkpoint=grad_checkpoint)
        calls.clear()
        model.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
        model(images(dtype=torch.float32)).sum().backward()
        assert len(calls) == expected
    with torch.no_grad():
        calls.clear()
        model(images(dtype=torch.float32))
    assert len(calls) == 1


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("args, options", [
    (("giant",), {}), (("mini", 30, 8), {}), (("mini", (32, 30), 8), {}), (("mini", (30, 32), 8), {}),
    (("mini", 0, 8), {}), (("mini", -32, 8), {}), (("mini", 8, 16), {}), (("mini", 32, 0), {}),
    (("mini", 32, -8), {}), (("mini", (32,), 8), {}),
    (("mini", 32, 8), dict(heads=5)), (("mini", 32, 8), dict(heads=-1)),
    (("mini", 32, 8), dict(stem="stem")), (("mini", 32, 8), dict(mlp_norm="group")),
    (("mini", 32, 8), dict(position="rotary")), (("mini", 32, 8), dict(pooling="max")),
    (("mini", 32, 8), dict(patch_projection="thawed")),
    (("mini", 32, 8), dict(stem="conv")),  # it makes patches of 16 pixels
    (("mini", 32, 16), dict(stem="conv", patch_projection="frozen"))])  # sheet 2.5: not ignored
def test_values_that_do_not_fit_are_errors(args, options):
    with pytest.raises(ValueError):
        vit(*args, **options)


@pytest.mark.parametrize("size", [(40, 40), (16, 16), (8, 72), (24, 16)])
def test_an_image_of_another_size_is_an_error(size):
    with pytest.raises((ValueError, RuntimeError)):
        mini((16, 24))(images(2, size, dtype=torch.float32))


def wrong_tables(table):
    """pos_embed as others make it; the first row is the class token's."""
    halves = torch.cat([table[..., 48:], table[..., :48]], -1)
    quarters = torch.cat([table[..., 24:48], table[..., :24], table[..., 72:], table[..., 48:72]], -1)
    torch.manual_seed(0)
    return {"MAE's": halves, "cos before sin": quarters, "scaled": table * 1.01,
            "learned": 0.02 * torch.randn_like(table), "class token first": table.roll(1, 1),
            "class token not zero": table + 0.01 * (torch.arange(table.shape[1]) == 0)[None, :, None]}


@pytest.mark.parametrize("name", ["MAE's", "cos before sin", "scaled", "learned", "class token first",
                                  "class token not zero"])
@pytest.mark.parametrize("strict", [True, False])
def test_another_table_is_refused(name, strict):  # sheet 7; trap 10
    model = mini()
    state = {**model.state_dict()}
    state["pos_embed"] = wrong_tables(state["pos_embed"])[name]
    with pytest.raises(RuntimeError, match="pos_embed"):
        mini(seed=1).load_state_dict(state, strict=strict)
    with pytest.raises(RuntimeError, match="pos_embed"):  # also as a part of something
        nn.ModuleDict({"encoder": mini(seed=1)}).load_state_dict(
            {f"encoder.{k}": v for k, v in state.items()}, strict=strict)
    learned = mini(position="learned")  # where it is learned anything goes
    learned.load_state_dict(state)
    assert torch.equal(learned.pos_embed, state["pos_embed"])


def test_the_right_table_loads_whatever_its_rounding():
    model = mini(seed=0)
    state = {**model.state_dict()}
    state["pos_embed"] = torch.cat([torch.zeros(1, 96, dtype=DOUBLE), slow_table(2, 3, 96)])[None]
    other = mini(seed=1)
    other.load_state_dict(state)
    assert torch.equal(other.cls_token, model.cls_token)
    state["pos_embed"] = state["pos_embed"].float() + 1e-6
    mini(seed=1).load_state_dict(state)
    mini(seed=1).double().load_state_dict(state)


def test_a_missing_table_and_one_of_another_grid_are_refused():
    state = mini().state_dict()
    without = {name: x for name, x in state.items() if name != "pos_embed"}
    with pytest.raises(RuntimeError, match="pos_embed"):
        mini().load_state_dict(without)
    with pytest.raises(RuntimeError, match="pos_embed"):
        mini((24, 24)).load_state_dict(state)
    with pytest.raises(RuntimeError, match="pos_embed"):  # as many tokens
        mini((24, 16)).load_state_dict(state)


def test_a_copy_is_a_network_of_its_own():
    model = mini()
    twin = copy.deepcopy(model)
    assert torch.equal(model(images(dtype=torch.float32)), twin(images(dtype=torch.float32)))
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert model.pos_embed.any() and model.blocks[0].attn.qkv.weight.any()


# --------------------------------------------------------------------------------------------- timm


TIMM = [("tiny", 16, 3), ("small", 16, 12), ("base", 16, 12), ("large", 16, 16), ("huge", 14, 16)]


def timm_vit(size, patch, heads):
    timm = pytest.importorskip("timm")
    return timm.create_model(f"vit_{size}_patch{patch}_224", num_classes=0, num_heads=heads)


@pytest.mark.parametrize("size, patch, heads", TIMM)
def test_names_and_shapes_are_timms(size, patch, heads):
    with torch.device("meta"):
        theirs = timm_vit(size, patch, heads)
    ours = on_meta(size, patch_size=patch)
    assert shapes(ours) == shapes(theirs)
    assert theirs.blocks[0].attn.num_heads == VITS[size][2] == heads


def test_features_of_tiny_equal_timms_with_the_same_weights():
    torch.manual_seed(4)
    ours, theirs = vit("tiny"), timm_vit("tiny", 16, 3).eval()
    theirs.load_state_dict(ours.state_dict())  # strictly
    x = images(2, (224, 224), dtype=torch.float32)
    with torch.no_grad():
        assert (ours(x) - theirs(x)).abs().max() < 1e-5


def test_features_of_small_equal_timms_with_12_heads_and_not_with_its_6(small):  # sheet 8, trap 9
    theirs, x = timm_vit("small", 16, 12).eval(), images(1, (224, 224), dtype=torch.float32)
    theirs.load_state_dict(small.state_dict())
    with torch.no_grad():
        ours = small(x)
        assert (ours - theirs(x)).abs().max() < 1e-5
        for block in theirs.blocks:  # timm's own number: it loads without an error
            block.attn.num_heads, block.attn.head_dim, block.attn.scale = 6, 64, 64 ** -0.5
        assert (ours - theirs(x)).abs().max() > 1e-2
    with torch.device("meta"):
        assert timm_vit("small", 16, 6).blocks[0].attn.head_dim == 64


@pytest.mark.parametrize("pooling, options", [
    ("class", {}), ("mean", dict(global_pool="avg", class_token=False, fc_norm=False)),
    ("mean-no-norm", dict(global_pool="avg", class_token=False, fc_norm=False, final_norm=False))])
def test_random_weights_of_every_pooling_equal_timms(pooling, options):
    timm = pytest.importorskip("timm")
    ours = randomized(mini(position="learned", pooling=pooling)).eval()
    theirs = timm.models.vision_transformer.VisionTransformer(
        (16, 24), 8, embed_dim=96, depth=3, num_heads=3, num_classes=0, **options).double().eval()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=0, atol=1e-9)
