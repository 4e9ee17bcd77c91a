"""common.vit against MoCo v3's paper and code: sizes, positions, initialization, the forward pass.

slow_vit is the forward pass written out from a state dict. What is `wrong` is a mistake that an
oracle must tell apart.
"""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import DOUBLE, count, furthest, same, uniform

from common import VITS, sincos_table, vit


def images(n=3, size=(16, 24)):
    return 4 * uniform(n, 3, *size, seed=5) - 2


def mini(size=(16, 24), patch=8, **options):
    """The smallest ViT; a grid of 2 x 3 tells rows from columns."""
    torch.manual_seed(0)
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


@pytest.mark.parametrize("size, patch, expected, tokens, millions, frozen", [  # MoCo v3, Table 2
    ("mini", 16, (96, 3, 3), 196, None, None), ("tiny", 16, (192, 12, 3), 196, None, None),
    ("small", 16, (384, 12, 12), 196, 21.666, 0.371), ("base", 7, (768, 12, 12), 1024, None, None),
    ("base", 16, (768, 12, 12), 196, 85.799, 0.742),
    ("large", 16, (1024, 24, 16), 196, 303.302, 0.989),
    ("huge", 14, (1280, 32, 16), 256, 630.765, 1.083)])
def test_sizes_are_the_papers(size, patch, expected, tokens, millions, frozen):
    with torch.device("meta"):  # without memory
        model = vit(size, patch_size=patch, patch_projection="frozen")
    assert VITS[size] == expected and (model.feature_dim, len(model.blocks)) == expected[:2]
    assert model.pos_embed.shape == (1, 1 + tokens, expected[0])
    assert millions in (None, round(count(model) / 1e6, 3))
    assert frozen in (None, round(count(model, trainable=False) / 1e6, 3))


@pytest.mark.parametrize("size, millions", [("small", 20.617), ("base", 82.200)])
def test_the_convolutional_stem_is_the_authors(size, millions):
    with torch.device("meta"):
        model = vit(size, stem="conv")
    assert round(count(model) / 1e6, 3) == millions and len(model.blocks) == 11


@pytest.mark.parametrize("size, patch, heads", [
    ("tiny", 16, 3), ("small", 16, 12), ("base", 16, 12), ("large", 16, 16), ("huge", 14, 16)])
def test_names_shapes_and_features_are_timms(size, patch, heads):
    timm = pytest.importorskip("timm")
    with torch.device("cpu" if size in ("tiny", "small") else "meta"):
        theirs = timm.create_model(f"vit_{size}_patch{patch}_224", num_classes=0, num_heads=heads)
        ours = vit(size, patch_size=patch)
    shapes, others = ({name: x.shape for name, x in model.state_dict().items()}
                      for model in (ours, theirs))
    assert shapes == others
    if size in ("tiny", "small"):
        theirs.load_state_dict(ours.state_dict())  # strictly
        x = images(2, (224, 224)).float()
        with torch.no_grad():
            assert furthest([ours(x)], [theirs.eval()(x)]) < 1e-5


@pytest.mark.parametrize("wrong", [
    dict(size="giant"), dict(image_size=30), dict(image_size=(32, 30)), dict(image_size=(30, 32)),
    dict(image_size=0), dict(image_size=-32), dict(image_size=(32,)), dict(patch_size=0),
    dict(patch_size=-8), dict(image_size=8, patch_size=16), dict(heads=5), dict(heads=-1),
    dict(stem="stem"), dict(mlp_norm="group"), dict(position="rotary"), dict(pooling="max"),
    dict(patch_projection="thawed"), dict(stem="conv"),  # which makes patches of 16 pixels
    dict(patch_size=16, stem="conv", patch_projection="frozen"),  # not ignored
    dict(mlp_norm="batch", grad_checkpoint=True)], ids=str)  # would count twice
def test_values_that_do_not_fit_are_errors(wrong):
    with pytest.raises(ValueError):
        vit(**{"size": "mini", "image_size": 32, "patch_size": 8, **wrong})


def slow_table(rows, columns, dim, order="rows first", base=10000.0, spacing=4):
    """[sin(row w) | cos(row w) | sin(col w) | cos(col w)], one number at a time."""
    table = [[function(coordinate * base ** (-j * spacing / dim))
              for coordinate in ((row, column) if order == "rows first" else (column, row))
              for function in (math.sin, math.cos) for j in range(dim // 4)]
             for row in range(rows) for column in range(columns)]
    return torch.tensor(table, dtype=DOUBLE)


@pytest.mark.parametrize("rows, columns, dim", [
    (14, 14, 96), (2, 3, 8), (3, 2, 12), (1, 1, 4), (1, 5, 384), (8, 8, 192), (14, 14, 384),
    (2, 3, 96), (3, 2, 96), (2, 3, 32), (4, 4, 32)])
def test_table_equals_a_loop_over_numbers(rows, columns, dim):
    table = sincos_table(rows, columns, dim)
    assert furthest([table.double()], [slow_table(rows, columns, dim)]) < 2e-6  # float32
    for wrong in (dict(order="columns first"), dict(base=1e3), dict(spacing=2)):  # MAE's is first
        other = slow_table(rows, columns, dim, **wrong)
        assert dim != 32 or furthest([table.double()], [other]) > 0.1, wrong
    if dim == 96:  # that of the smallest ViT
        in_network = mini((8 * rows, 8 * columns)).float().pos_embed[0]
        assert not in_network[0].any() and torch.equal(in_network[1:], table)


@pytest.mark.parametrize("projection", ["learned", "frozen"])
def test_every_tensor_starts_as_the_authors_do(projection):
    torch.manual_seed(3)
    small, dim, seen = vit("small", patch_projection=projection), 384, set()
    bounds = {"qkv": math.sqrt(6 / (dim + dim)), "attn.proj": math.sqrt(6 / (dim + dim)),
              "fc1": math.sqrt(6 / (dim + 4 * dim)), "fc2": math.sqrt(6 / (dim + 4 * dim)),
              "patch_embed.proj": math.sqrt(6 / (3 * 16 * 16 + dim))}
    for name, p in small.named_parameters():
        layer = next((layer for layer in bounds if f"{layer}." in name), None)
        if layer and name.endswith("weight"):  # queries, keys and values are three matrices
            for x in p.detach().chunk(3 if layer == "qkv" else 1):
                bound = bounds[layer]  # of a uniform distribution
                assert 0.99 * bound < x.abs().max() <= bound * (1 + 1e-6), name
                assert x.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name
                assert abs(x.mean().item()) < 6 * bound / math.sqrt(3 * x.numel()), name
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
    assert not torch.equal(small.blocks[0].attn.qkv.weight, small.blocks[1].attn.qkv.weight)


def test_the_convolutional_stem_and_learned_positions_start_as_pytorchs_and_timms():
    torch.manual_seed(0)
    model = vit("tiny", 32, stem="conv", position="learned")
    for i in (0, 3, 6, 9, 12):
        fan_in = model.patch_embed.proj[i].weight[0].numel()  # Kaiming-uniform with a = sqrt(5)
        std = model.patch_embed.proj[i].weight.std().item()
        assert std == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.1)
    assert model.patch_embed.proj[12].bias.any()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)


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
    for training in (False,) if "stem" in options else (False, True):
        expected = slow_vit(model.state_dict(), x, options.get("heads") or 3, training)
        assert furthest([model.train(training)(x)], [expected]) < 1e-9
    assert ("cls_token" in model.state_dict()) == (options.get("pooling", "class") == "class")
    assert ("norm.weight" in model.state_dict()) == (options.get("pooling") != "mean-no-norm")
    with pytest.raises((ValueError, RuntimeError)):  # as many patches, and another meaning
        model(x.mT if x.shape[2] != x.shape[3] else x[..., :8])


@pytest.mark.parametrize("wrong", [
    "heads before q, k, v", "scale of the whole width", "tanh in GELU", "eps", "columns first",
    "class token last", "norm after", "no last norm"])
def test_the_written_out_pass_tells_mistakes_apart(wrong):
    model, x = randomized(mini()), images()
    assert furthest([model(x)], [slow_vit(model.state_dict(), x, wrong=wrong)]) > 1e-6


def test_small_has_12_heads_and_no_tensor_shows_it():  # timm's and DeiT's has 6
    torch.manual_seed(3)
    small = vit("small")
    vit("small", heads=6).load_state_dict(small.state_dict())  # strictly: that is the trap
    x, state = images(1, (224, 224)).float(), small.state_dict()
    with torch.no_grad():
        assert furthest([small(x)], [slow_vit(state, x, 12)]) < 1e-5
        assert furthest([small(x)], [slow_vit(state, x, 6)]) > 1e-2


@pytest.mark.parametrize("options, fixed", [
    ({}, ["pos_embed"]), (dict(position="learned"), []), (dict(position="none"), []),
    (dict(pooling="mean"), ["pos_embed"]), (dict(position="none", pooling="mean"), []),
    (dict(size=32, patch=16, stem="conv"), ["pos_embed"]), (dict(patch_projection="frozen"), [
        "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"])], ids=str)
def test_all_but_what_is_fixed_learns_and_computing_blocks_again_changes_no_bit(options, fixed):
    plain, again, calls = mini(**options), mini(**options, grad_checkpoint=True), []
    x = images(4, plain.image_size)
    for model in (plain, again):
        model.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
        model(x).sin().sum().backward()  # a sum alone: LayerNorm makes it 0
    assert len(calls) == 1 + 2  # really again
    for (name, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert a.requires_grad == b.requires_grad == (name not in fixed), name
        assert (name in fixed) == (a.grad is None) == (b.grad is None), name
        assert name in fixed or (a.grad.any() and torch.equal(a.grad, b.grad)), name
    assert same(plain.buffers(), again.buffers())  # statistics counted once
    with torch.no_grad():
        again(x)
    assert len(calls) == 4  # only for gradients
