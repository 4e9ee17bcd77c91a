"""common.vit against MoCo v3's paper and code: sizes, positions, initialization, the forward pass.

slow_vit is the forward pass written out from a state dict. What is `wrong` is a mistake that an
oracle must tell apart.
"""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import DOUBLE, count, furthest, uniform
from torch import nn

from common import VITS, sincos_table, vit


def on_meta(*args, **kwargs):
    """A network without memory, for counting."""
    with torch.device("meta"):
        return vit(*args, **kwargs)


def shapes(module):
    return {name: tuple(x.shape) for name, x in module.state_dict().items()}


def images(n=3, size=(16, 24), seed=5):
    return 4 * uniform(n, 3, *size, seed=seed) - 2


def mini(size=(16, 24), patch=8, seed=0, **options):
    """The smallest ViT; a grid of 2 x 3 tells rows from columns."""
    torch.manual_seed(seed)
    return vit("mini", size, patch, **options).double()


@torch.no_grad()
def randomized(model):
    """Every parameter and statistic at random, the fixed table aside."""
    for i, (name, x) in enumerate(model.double().state_dict().items()):
        if name.endswith("running_var"):
            x.copy_(uniform(*x.shape, seed=i) + 0.5)
        elif x.is_floating_point() and (name != "pos_embed" or model.position == "learned"):
            fan_in = x[0].numel() if x.dim() in (2, 4) else 4
            x.copy_(math.sqrt(12 / fan_in) * (uniform(*x.shape, seed=i) - 0.5))
            if re.search(r"norm\w*\.weight|proj\.(1|4|7|10)\.weight", name):
                x.add_(1)
    return model


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(3)
    return vit("small", patch_projection="frozen")


# -------------------------------------------------------------------------------------------- sizes


def backbone_count(dim, depth, patch, tokens):
    """Weights of a ViT by arithmetic: class token, table, projection, blocks, last norm."""
    block = 2 * 2 * dim + (3 * dim * dim + 3 * dim) + (dim * dim + dim) + (8 * dim * dim + 5 * dim)
    return dim + (1 + tokens) * dim + (3 * patch * patch + 1) * dim + depth * block + 2 * dim


@pytest.mark.parametrize("size, patch, expected, tokens, millions, frozen", [  # MoCo v3, Table 2
    ("mini", 16, (96, 3, 3), 196, None, None), ("tiny", 16, (192, 12, 3), 196, None, None),
    ("small", 16, (384, 12, 12), 196, 21.666, 0.371),
    ("base", 16, (768, 12, 12), 196, 85.799, 0.742),
    ("large", 16, (1024, 24, 16), 196, 303.302, 0.989),
    ("base", 7, (768, 12, 12), 1024, None, None),
    ("huge", 14, (1280, 32, 16), 256, 630.765, 1.083)])
def test_sizes_are_the_papers(size, patch, expected, tokens, millions, frozen):
    model, (dim, depth, _) = on_meta(size, patch_size=patch, patch_projection="frozen"), expected
    assert VITS[size] == expected and len(model.blocks) == depth and model.feature_dim == dim
    assert model.pos_embed.shape == (1, 1 + tokens, dim)
    assert count(model) == backbone_count(dim, depth, patch, tokens)
    assert millions in (None, round(count(model) / 1e6, 3))
    assert frozen in (None, round(count(model, trainable=False) / 1e6, 3))


@pytest.mark.parametrize("size, millions", [("small", 20.617), ("base", 82.200)])
def test_the_convolutional_stem_is_the_authors(size, millions):
    model = on_meta(size, stem="conv")
    assert round(count(model) / 1e6, 3) == millions and len(model.blocks) == 11
    stem, dim = model.patch_embed.proj, VITS[size][0]
    widths = [3, dim // 8, dim // 4, dim // 2, dim]
    for i in range(4):
        convolution, norm, relu = stem[3 * i:3 * i + 3]
        assert convolution.weight.shape == (widths[i + 1], widths[i], 3, 3)
        assert convolution.stride == (2, 2) and convolution.bias is None
        assert isinstance(norm, nn.BatchNorm2d) and isinstance(relu, nn.ReLU)
    names = [name for name in shapes(model) if name.startswith("patch_embed")]
    assert len(names) == 5 + 1 + 4 * 5 and "patch_embed.proj.12.bias" in names


# ------------------------------------------------------------------------------- position embedding


def slow_table(rows, columns, dim, order="rows first", base=10000.0, spacing=4):
    """[sin(row w) | cos(row w) | sin(col w) | cos(col w)], one number at a time."""
    table = [[function(coordinate * base ** (-j * spacing / dim))
              for coordinate in ((row, column) if order == "rows first" else (column, row))
              for function in (math.sin, math.cos) for j in range(dim // 4)]
             for row in range(rows) for column in range(columns)]
    return torch.tensor(table, dtype=DOUBLE)


@pytest.mark.parametrize("rows, columns, dim", [(14, 14, 96), (2, 3, 8), (3, 2, 12), (1, 1, 4),
                                                (1, 5, 384), (8, 8, 192), (14, 14, 384)])
def test_table_equals_a_loop_over_numbers(rows, columns, dim):
    table = sincos_table(rows, columns, dim)
    assert furthest([table.double()], [slow_table(rows, columns, dim)]) < 2e-6  # float32


@pytest.mark.parametrize("wrong", [dict(order="columns first"), dict(base=1e3), dict(spacing=2)],
                         ids=str)
@pytest.mark.parametrize("rows, columns", [(4, 4), (2, 3)])
def test_the_loop_tells_other_tables_apart(rows, columns, wrong):  # columns first: MAE's
    other = slow_table(rows, columns, 32, **wrong)
    assert furthest([sincos_table(rows, columns, 32).double()], [other]) > 0.1


@pytest.mark.parametrize("size, grid", [((16, 24), (2, 3)), ((24, 16), (3, 2)), (32, (4, 4))])
def test_table_in_the_network_is_fixed_saved_and_zero_for_the_class_token(size, grid):
    model = mini(size)
    assert not model.pos_embed.requires_grad and "pos_embed" in model.state_dict()
    assert not model.pos_embed[0, 0].any()
    assert furthest([model.pos_embed[0, 1:]], [slow_table(*grid, 96)]) < 2e-6


# ----------------------------------------------------------------------------------- initialization


def assert_uniform(x, bound, name):
    assert 0.99 * bound < x.abs().max() <= bound * (1 + 1e-6), name
    assert x.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name
    assert abs(x.mean().item()) < 6 * bound / math.sqrt(3 * x.numel()), name


def test_every_tensor_starts_as_the_authors_do(small):
    dim, seen = 384, set()
    bounds = {"qkv": math.sqrt(6 / (dim + dim)), "attn.proj": math.sqrt(6 / (dim + dim)),
              "fc1": math.sqrt(6 / (dim + 4 * dim)), "fc2": math.sqrt(6 / (dim + 4 * dim)),
              "patch_embed.proj": math.sqrt(6 / (3 * 16 * 16 + dim))}
    for name, p in small.named_parameters():
        layer = next((layer for layer in bounds if f"{layer}." in name), None)
        if layer and name.endswith("weight"):  # queries, keys and values are three matrices
            for part in p.detach().chunk(3 if layer == "qkv" else 1):
                assert_uniform(part.flatten(), bounds[layer], name)
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
    blocks = [block.attn.qkv.weight for block in small.blocks]
    assert not torch.equal(blocks[0], blocks[1])


def test_the_convolutional_stem_and_learned_positions_start_as_pytorchs_and_timms():
    torch.manual_seed(0)
    model = vit("tiny", 32, stem="conv", position="learned")
    for i in (0, 3, 6, 9, 12):
        fan_in = model.patch_embed.proj[i].weight[0].numel()  # Kaiming-uniform with a = sqrt(5)
        std = model.patch_embed.proj[i].weight.std().item()
        assert std == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.1)
    assert model.patch_embed.proj[12].bias.any()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("options, fixed", [
    ({}, ["pos_embed"]), (dict(position="learned"), []),
    (dict(position="none", pooling="mean"), []),
    (dict(patch_projection="frozen"),
     ["pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"])])
def test_frozen_parts_get_no_gradient_and_all_else_does(options, fixed):
    model, twin, other = mini(**options), mini(), mini(seed=1)
    model(images()).sin().sum().backward()  # a sum alone: LayerNorm makes it 0
    for name, p in model.named_parameters():
        assert p.requires_grad == (name not in fixed) == (p.grad is not None), name
        assert p.grad is None or p.grad.any(), name
        assert name == "pos_embed" or torch.equal(p, twin.state_dict()[name])  # the same start
    assert not torch.equal(twin.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)


# ------------------------------------------------------------------------------------------ forward


def slow_vit(state, x, heads=3, training=False, wrong=""):
    """Features of images x from the state dict of any ViT here, in elementary operations."""
    def norm(x, name):
        if f"{name}.running_mean" in state:  # ViT-BN: over images and tokens
            mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
            if training:
                mean, var = x.mean((0, 1)), x.var((0, 1), unbiased=False)
            y = (x - mean) / (var + 1e-5).sqrt()
        else:
            var = x.var(-1, unbiased=False, keepdim=True)
            y = (x - x.mean(-1, keepdim=True)) / (var + (1e-5 if wrong == "eps" else 1e-6)).sqrt()
        return y * state[f"{name}.weight"] + state[f"{name}.bias"]

    def fc(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def attention(x, name):
        qkv = fc(x, f"{name}.qkv")
        q, k, v = qkv.chunk(3, 2)
        if wrong == "heads before q, k, v":
            q, k, v = (y.flatten(2) for y in qkv.unflatten(2, (heads, 3, -1)).unbind(3))
        out = []
        for q, k, v in zip(*(y.chunk(heads, 2) for y in (q, k, v))):
            scale = x.shape[-1] if wrong == "scale of the whole width" else q.shape[-1]
            out.append(torch.softmax(q @ k.mT / math.sqrt(scale), dim=2) @ v)
        return fc(torch.cat(out, 2), f"{name}.proj")

    proj = "patch_embed.proj"
    for i in (0, 3, 6, 9) if f"{proj}.weight" not in state else ():
        x = F.conv2d(x, state[f"{proj}.{i}.weight"], stride=2, padding=1)
        names = ("running_mean", "running_var", "weight", "bias")
        x = F.batch_norm(x, *(state[f"{proj}.{i + 1}.{name}"] for name in names)).relu()
        proj = proj if i < 9 else f"{proj}.12"
    kernel = state[f"{proj}.weight"]
    h = F.unfold(x, kernel.shape[-1], stride=kernel.shape[-1]).mT  # [n, tokens, 3 * patch^2]
    if wrong == "columns first":
        h = h.unflatten(1, (-1, x.shape[3] // kernel.shape[-1])).transpose(1, 2).flatten(1, 2)
    h = h @ kernel.flatten(1).T + state[f"{proj}.bias"]
    if "cls_token" in state:
        token = state["cls_token"].expand(len(x), -1, -1)
        h = torch.cat([h, token] if wrong == "class token last" else [token, h], 1)
    h = h + state.get("pos_embed", 0)
    for i in range(sum(name.endswith("norm1.bias") for name in state)):
        block = f"blocks.{i}"
        if wrong == "norm after":
            h = norm(h + attention(h, f"{block}.attn"), f"{block}.norm1")
        else:
            h = h + attention(norm(h, f"{block}.norm1"), f"{block}.attn")
        y = F.gelu(fc(norm(h, f"{block}.norm2"), f"{block}.mlp.fc1"),
                   approximate="tanh" if wrong == "tanh in GELU" else "none")
        h = h + fc(y, f"{block}.mlp.fc2")
    h = norm(h, "norm") if "norm.weight" in state and wrong != "no last norm" else h
    return h[:, 0] if "cls_token" in state else h.mean(1)


@pytest.mark.parametrize("options", [
    *(dict(position=position, pooling=pooling) for position in ("sincos", "learned", "none")
      for pooling in ("class", "mean", "mean-no-norm")),  # Sec. 6.2
    dict(heads=1), dict(heads=6), dict(size=(24, 16)), dict(size=(8, 40)), dict(size=16),
    dict(mlp_norm="batch"), dict(size=(32, 48), patch=16, stem="conv")], ids=str)
def test_features_equal_the_forward_pass_written_out(options):
    model = randomized(mini(**options))
    x = images(3, model.image_size)
    expected = [slow_vit(model.state_dict(), x, options.get("heads") or 3, training)
                for training in ([False] if "stem" in options else [False, True])]
    assert furthest([model.eval()(x)], expected[:1]) < 1e-9
    assert "stem" in options or furthest([model.train()(x)], expected[1:]) < 1e-9
    assert ("cls_token" in model.state_dict()) == (options.get("pooling", "class") == "class")
    assert ("norm.weight" in model.state_dict()) == (options.get("pooling") != "mean-no-norm")
    assert furthest([model.eval()(x)[2:]], [model(x[2:])]) < 1e-12
    with pytest.raises((ValueError, RuntimeError)):  # as many patches, and another meaning
        model(x.mT if x.shape[2] != x.shape[3] else x[..., :8])


@pytest.mark.parametrize("wrong", [
    "heads before q, k, v", "scale of the whole width", "tanh in GELU", "eps", "columns first",
    "class token last", "norm after", "no last norm"])
def test_the_written_out_pass_tells_mistakes_apart(wrong):
    model, x = randomized(mini()), images()
    assert furthest([model(x)], [slow_vit(model.state_dict(), x, wrong=wrong)]) > 1e-6


def test_small_has_12_heads_and_no_tensor_shows_it(small):  # timm's and DeiT's has 6
    assert shapes(on_meta("small", heads=6)) == shapes(small)  # that is the trap
    x, state = images(1, (224, 224)).float(), small.state_dict()
    with torch.no_grad():
        assert furthest([small(x)], [slow_vit(state, x, 12)]) < 1e-5
        assert furthest([small(x)], [slow_vit(state, x, 6)]) > 1e-2


# ------------------------------------------------------------------- gradient checkpoint and errors


@pytest.mark.parametrize("options", [{}, dict(patch_projection="frozen"), dict(position="none"),
                                     dict(pooling="mean"), dict(size=32, patch=16, stem="conv")],
                         ids=str)
def test_computing_blocks_again_changes_no_bit(options):
    plain, again, calls = mini(**options), mini(**options, grad_checkpoint=True), []
    x = images(4, (32, 32) if "stem" in options else (16, 24))
    for model in (plain, again):
        model.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
        model(x).sin().sum().backward()
    assert len(calls) == 1 + 2  # really again
    for (name, a), (_, b) in zip(plain.named_parameters(), again.named_parameters()):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name
    for (name, a), (_, b) in zip(plain.named_buffers(), again.named_buffers()):
        assert torch.equal(a, b), name  # statistics counted once
    with torch.no_grad():
        again(x)
    assert len(calls) == 4  # only for gradients


@pytest.mark.parametrize("size, image_size, patch, options", [
    ("giant", 32, 8, {}), ("mini", 30, 8, {}), ("mini", (32, 30), 8, {}), ("mini", (30, 32), 8, {}),
    ("mini", 0, 8, {}), ("mini", -32, 8, {}), ("mini", 8, 16, {}), ("mini", 32, 0, {}),
    ("mini", 32, -8, {}), ("mini", (32,), 8, {}), ("mini", 32, 8, dict(heads=5)),
    ("mini", 32, 8, dict(heads=-1)), ("mini", 32, 8, dict(stem="stem")),
    ("mini", 32, 8, dict(mlp_norm="group")), ("mini", 32, 8, dict(position="rotary")),
    ("mini", 32, 8, dict(pooling="max")), ("mini", 32, 8, dict(patch_projection="thawed")),
    ("mini", 32, 8, dict(stem="conv")),  # it makes patches of 16 pixels
    ("mini", 32, 16, dict(stem="conv", patch_projection="frozen")),  # not ignored
    ("mini", 32, 8, dict(mlp_norm="batch", grad_checkpoint=True))])  # would count twice
def test_values_that_do_not_fit_are_errors(size, image_size, patch, options):
    with pytest.raises(ValueError):
        vit(size, image_size, patch, **options)


# --------------------------------------------------------------------------------------------- timm


@pytest.mark.parametrize("size, patch, heads", [
    ("tiny", 16, 3), ("small", 16, 12), ("base", 16, 12), ("large", 16, 16), ("huge", 14, 16)])
def test_names_shapes_and_features_are_timms(size, patch, heads):
    timm = pytest.importorskip("timm")
    with torch.device("cpu" if size in ("tiny", "small") else "meta"):
        theirs = timm.create_model(f"vit_{size}_patch{patch}_224", num_classes=0, num_heads=heads)
        ours = vit(size, patch_size=patch)
    assert shapes(ours) == shapes(theirs)
    if size in ("tiny", "small"):
        theirs.load_state_dict(ours.state_dict())  # strictly
        x = images(2, (224, 224)).float()
        with torch.no_grad():
            assert furthest([ours(x)], [theirs.eval()(x)]) < 1e-5
