"""Building blocks that every script here uses: networks, LARS, batch norm across processes, images.

Nothing in this file trains anything, and it imports nothing but torch. Contents:

    resnet              ResNet-18 to -200 of any width, torchvision's parameter names; with
                        selective kernels as SimCLR v2 has them
    vit                 Vision Transformers as MoCo v3 has them, timm's parameter names
    LARS                layer-wise adaptive rates, as in BYOL's and MoCo v3's or as in SimCLR's code
    SyncBatchNorm       batch norm over all processes that also runs on a CPU
    demo_images         the built-in data set: small generated pictures of ten shapes
"""

import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------ ResNet


def conv(in_dim: int, out_dim: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_dim, out_dim, kernel, stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ResNet-18, -34 (He et al., arXiv:1512.03385, Fig. 5)."""

    expansion = 1

    def __init__(self, in_dim: int, dim: int, stride: int, sk_ratio: float = 0.0):
        super().__init__()
        if sk_ratio:
            raise ValueError("selective kernels replace the 3x3 of ResNet-50 and deeper")
        self.conv1, self.bn1 = conv(in_dim, dim, 3, stride), nn.BatchNorm2d(dim)
        self.conv2, self.bn2 = conv(dim, dim, 3), nn.BatchNorm2d(dim)
        self.downsample = shortcut(in_dim, dim, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1: ResNet-50 and deeper. The stride is on the 3x3, as in torchvision ("v1.5").
    With sk_ratio the 3x3 and its norm are a selective kernel."""

    expansion = 4

    def __init__(self, in_dim: int, dim: int, stride: int, sk_ratio: float = 0.0):
        super().__init__()
        self.conv1, self.bn1 = conv(in_dim, dim, 1), nn.BatchNorm2d(dim)
        if sk_ratio:
            self.conv2, self.bn2 = SelectiveKernel(dim, stride, sk_ratio), nn.Identity()
        else:
            self.conv2, self.bn2 = conv(dim, dim, 3, stride), nn.BatchNorm2d(dim)
        self.conv3, self.bn3 = conv(dim, 4 * dim, 1), nn.BatchNorm2d(4 * dim)
        self.downsample = shortcut(in_dim, 4 * dim, stride, sk_ratio)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)  # a selective kernel's is 0 at the least
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class SelectiveKernel(nn.Module):
    """Two 3x3 convolutions u1, u2, mixed channel by channel by weights that both decide: Li et al.,
    arXiv:1903.06586, as in SimCLR v2's code, where both see 3x3 pixels. [B, dim, H, W] -> the same,
    or half the size."""

    def __init__(self, dim: int, stride: int, sk_ratio: float):
        super().__init__()
        self.conv, self.bn = conv(dim, 2 * dim, 3, stride), nn.BatchNorm2d(2 * dim)
        squeezed = max(int(dim * sk_ratio), 32)
        self.squeeze, self.squeeze_bn = conv(dim, squeezed, 1), nn.BatchNorm2d(squeezed)
        self.select = conv(squeezed, 2 * dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        u = F.relu(self.bn(self.conv(x)), inplace=True).unflatten(1, (2, -1))  # [B, 2, dim, H, W]
        s = u.sum(dim=1).mean(dim=(2, 3), keepdim=True)
        s = self.select(F.relu(self.squeeze_bn(self.squeeze(s)), inplace=True))
        return (s.unflatten(1, (2, -1)).softmax(dim=1) * u).sum(dim=1)


class ShortcutPool(nn.Sequential):
    """The 2x2 mean of a ResNet-D's shortcut (He et al., arXiv:1812.01187), as in SimCLR v2's code:
    at stride 1 the border counts the pixels that there are, at stride 2 an odd one's are 0."""

    def __init__(self, stride: int):
        pad = nn.ReplicationPad2d if stride == 1 else nn.ZeroPad2d
        super().__init__(pad((0, 1, 0, 1)), nn.AvgPool2d(2, stride))


def shortcut(in_dim: int, out_dim: int, stride: int, sk_ratio: float = 0.0) -> nn.Sequential | None:
    if stride == 1 and in_dim == out_dim:
        return None
    pool = []
    if sk_ratio:  # ResNet-D, which comes along with selective kernels
        pool, stride = [ShortcutPool(stride)], 1
    return nn.Sequential(*pool, conv(in_dim, out_dim, 1, stride), nn.BatchNorm2d(out_dim))


class ResNet(nn.Module):
    """Images [B, 3, S, S] -> features [B, feature_dim]: torchvision's ResNet without its fc."""

    def __init__(self, block: type, blocks: tuple, width: float, sk_ratio: float,
                 small_images: bool):
        super().__init__()
        dim = int(64 * width)
        if small_images:  # 3x3 stem without pooling (SimCLR, arXiv:2002.05709, App. B.9)
            self.conv1, self.maxpool = conv(3, dim, 3), nn.Identity()
        elif sk_ratio:  # ResNet-D's
            half, self.maxpool = dim // 2, nn.MaxPool2d(3, 2, padding=1)
            self.conv1 = nn.Sequential(
                conv(3, half, 3, stride=2), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
                conv(half, half, 3), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
                conv(half, dim, 3))
        else:
            self.conv1, self.maxpool = conv(3, dim, 7, stride=2), nn.MaxPool2d(3, 2, padding=1)
        self.bn1 = nn.BatchNorm2d(dim)
        in_dim = dim
        for i, n in enumerate(blocks):
            layers = []
            for j in range(n):
                layers.append(block(in_dim, dim * 2**i, 2 if i > 0 and j == 0 else 1, sk_ratio))
                in_dim = dim * 2**i * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*layers))
        self.feature_dim = in_dim

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3))


BLOCKS = {  # He et al., Table 1; 200: arXiv:1603.05027; 10 is ours, for the demo
    10: (BasicBlock, (1, 1, 1, 1)), 18: (BasicBlock, (2, 2, 2, 2)), 34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)), 101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)), 200: (Bottleneck, (3, 24, 36, 3)),
}


def resnet(depth: int, width: float = 1, sk_ratio: float = 0.0, small_images: bool = False, *,
           zero_init_residual: bool = False) -> ResNet:
    """Builds a ResNet whose state dict has torchvision's names (all but fc.*; with sk_ratio ours).

    width multiplies every channel count and may be a fraction (0.25: a stem of 16 channels).
    sk_ratio: selective kernels and ResNet-D's stem and shortcuts where it is not 0; SimCLR v2's
    is 0.0625. Not for ResNet-10, -18, -34, whose blocks are basic.
    small_images: for 32 px, a 3x3 stem with stride 1 and no pooling.
    zero_init_residual: every block starts as the identity (Goyal et al., arXiv:1706.02677, 5.1).
    Raises ValueError for a depth that is not in BLOCKS, or that sk_ratio does not fit.
    """
    if depth not in BLOCKS:
        raise ValueError(f"no ResNet of depth {depth}; there are {', '.join(map(str, BLOCKS))}")
    if int(64 * width) < 1:
        raise ValueError(f"width {width} leaves the stem without a channel; 1/64 is the least")
    model = ResNet(*BLOCKS[depth], width, sk_ratio, small_images)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # as torchvision
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
            nn.init.zeros_((module.bn3 if isinstance(module, Bottleneck) else module.bn2).weight)
    return model


# ---------------------------------------------------------------------------- Vision Transformer


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al., arXiv:1706.03762, Sec. 3.2), on x [B, N, D]."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)  # [B, heads, N, D / heads]
        return self.proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a shortcut. [B, N, D] -> the same."""

    def __init__(self, dim: int, heads: int, mlp_norm: str):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        batch = mlp_norm == "batch"  # statistics over images and tokens
        self.norm2 = nn.BatchNorm1d(dim) if batch else nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x.flatten(0, 1)).view_as(x))  # flat: for a batch norm


class PatchEmbed(nn.Module):
    """Images [B, 3, H, W] -> tokens [B, N, D], row by row: one projection of each patch, or four
    3x3 convolutions of stride 2 and a 1x1 (the stem of Xiao et al., arXiv:2106.14881)."""

    def __init__(self, dim: int, patch_size: int, stem: str):
        super().__init__()
        if stem == "patch":
            self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        else:
            widths = (3, dim // 8, dim // 4, dim // 2, dim)
            layers = [layer for i, o in zip(widths, widths[1:])
                      for layer in (conv(i, o, 3, 2), nn.BatchNorm2d(o), nn.ReLU(inplace=True))]
            self.proj = nn.Sequential(*layers, nn.Conv2d(dim, dim, 1))
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x)).flatten(2).mT


def sincos_table(rows: int, columns: int, dim: int) -> Tensor:
    """Fixed 2-D position embedding [rows * columns, dim]: a quarter each for sin and cos of the row
    times 10000^(-4j / dim), j = 0, 1, .., then of the column (MoCo v3's; MAE has columns first)."""
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [x.flatten()[:, None] * omega for x in (row, column)]
    return torch.cat([f(x) for x in angles for f in (torch.sin, torch.cos)], dim=1).float()


class ViT(nn.Module):
    """Images [B, 3, H, W] -> features [B, feature_dim]: a Vision Transformer without classifier."""

    def __init__(self, dim: int, depth: int, heads: int, image_size: tuple, patch_size: int,
                 stem: str, mlp_norm: str, position: str, pooling: str, grad_checkpoint: bool):
        super().__init__()
        self.feature_dim, self.heads, self.pooling, self.position = dim, heads, pooling, position
        self.grad_checkpoint, self.image_size = grad_checkpoint, image_size
        self.patch_embed = PatchEmbed(dim, patch_size, stem)
        rows, columns = (side // patch_size for side in image_size)
        extra = int(pooling == "class")
        if extra:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if position == "sincos":
            table = torch.cat([torch.zeros(extra, dim), sincos_table(rows, columns, dim)])
            self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        elif position == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, extra + rows * columns, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_norm) for _ in range(depth)))
        self.norm = nn.Identity() if pooling == "mean-no-norm" else nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != self.image_size:
            raise ValueError(f"images of {[*x.shape[2:]]} for a ViT of {[*self.image_size]}")
        x = self.patch_embed(x)
        if self.pooling == "class":
            x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        if self.position != "none":
            x = x + self.pos_embed
        for block in self.blocks:
            again = self.grad_checkpoint and self.training and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        if self.pooling == "class":
            return self.norm(x[:, 0])
        return self.norm(x).mean(dim=1)

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        theirs, ours = state.get(prefix + "pos_embed"), getattr(self, "pos_embed", None)
        if self.position == "sincos" and theirs is not None and theirs.shape == ours.shape:
            difference = theirs.cpu().double() - ours.detach().cpu().double()
            if not difference.abs().max() <= 1e-3:  # float16 rounds by 2.4e-4
                errors.append(f"{prefix}pos_embed is not the fixed sin-cos table (rows before "
                              "columns) of this ViT: it was learned, or made as MAE makes it")
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)


VITS = {  # dim, depth, heads. MoCo v3, Table 2; tiny: timm's; mini: ours, for the demo
    "mini": (96, 3, 3), "tiny": (192, 12, 3), "small": (384, 12, 12),  # timm's small has 6 heads
    "base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16),
}


def vit(size: str, image_size: int | tuple[int, int] = 224, patch_size: int = 16, *, heads: int = 0,
        stem: str = "patch", mlp_norm: str = "layer", position: str = "sincos",
        pooling: str = "class", patch_projection: str = "learned",
        grad_checkpoint: bool = False) -> ViT:
    """Builds a ViT (arXiv:2010.11929) as MoCo v3 initialises it; the state dict has timm's names.

    size: one of VITS. image_size: pixels, one number or (height, width). heads: 0: the size's own.
    stem: "patch", or "conv", which takes the place of one block (arXiv:2106.14881).
    mlp_norm: "layer", or "batch" for MoCo v3's ViT-BN (Sec. 6.3; axes and eps are our reading).
    position: "sincos" (fixed, saved with the weights), "learned" or "none".
    pooling: "class" token, "mean" of all tokens behind the last LayerNorm, or "mean-no-norm".
    patch_projection: "learned", or "frozen" at its random initialisation.
    grad_checkpoint: computes each block again in the backward pass, to save memory.
    Raises ValueError for values that do not fit together.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    options = {"size": (size, tuple(VITS)), "stem": (stem, ("patch", "conv")),
               "mlp_norm": (mlp_norm, ("layer", "batch")),
               "position": (position, ("sincos", "learned", "none")),
               "pooling": (pooling, ("class", "mean", "mean-no-norm")),
               "patch_projection": (patch_projection, ("learned", "frozen"))}
    for name, (value, allowed) in options.items():
        if value not in allowed:
            raise ValueError(f"{name} {value!r} is none of {', '.join(allowed)}")
    dim, depth, own_heads = VITS[size]
    heads = heads or own_heads
    if heads < 0 or dim % heads:
        raise ValueError(f"{heads} heads do not share {dim} channels evenly")
    if patch_size < 1 or any(side % patch_size or side < patch_size for side in sides):
        raise ValueError(f"an image of {sides[0]} x {sides[1]} pixels has no whole number of "
                         f"patches of {patch_size}")
    if stem == "conv" and (patch_size != 16 or patch_projection == "frozen"):
        raise ValueError("the conv stem makes patches of 16 pixels, without projection to freeze")
    if grad_checkpoint and mlp_norm == "batch":
        raise ValueError("grad_checkpoint would count each batch twice in the running statistics "
                         "of the batch norms in the MLP blocks")
    model = ViT(dim, depth - (stem == "conv"), heads, sides, patch_size, stem, mlp_norm, position,
                pooling, grad_checkpoint)
    for name, module in model.blocks.named_modules():  # MoCo v3, authors' code
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith("qkv"):  # as three matrices side by side, not as one of 3D x D
                bound = math.sqrt(6 / (dim + dim))
                nn.init.uniform_(module.weight, -bound, bound)
    if stem == "patch":  # as a Linear on the pixels of a patch; a conv stem keeps PyTorch's default
        bound = math.sqrt(6 / (3 * patch_size**2 + dim))
        nn.init.uniform_(model.patch_embed.proj.weight, -bound, bound)
        nn.init.zeros_(model.patch_embed.proj.bias)
    if pooling == "class":
        nn.init.normal_(model.cls_token, std=1e-6)
    if position == "learned":
        nn.init.trunc_normal_(model.pos_embed, std=0.02)  # ViT's and timm's; MoCo v3 does not say
    model.patch_embed.proj.requires_grad_(patch_projection == "learned")
    return model


# -------------------------------------------------------------------------------------------- LARS


def in_cache(params: list[Tensor], size: int = 2**17) -> list[list[Tensor]]:
    """The tensors to update at once. On a GPU all, for few launches; on a CPU about `size` numbers,
    half a megabyte, which stay in a core's cache from one operation to the next: ours, measured."""
    parts, numbers = [[]], 0
    for p in params:
        if p.device.type == "cpu" and parts[-1] and numbers + p.numel() > size:
            parts.append([])
            numbers = 0
        parts[-1].append(p)
        numbers += p.numel()
    return parts if params else []


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al., arXiv:1708.03888) as the SSL papers' code has them.

    For a weight w (two or more dimensions) with gradient g, trust coefficient t and momentum m:

        u = g + weight_decay * w                       # the decayed gradient
        r = t * |w| / |u|                              # 1 where either norm is 0
        lr_in_momentum=False:  b = m * b + r * u;       w = w - lr * b      (BYOL, MoCo v3)
        lr_in_momentum=True:   b = m * b + lr * r * u;  w = w - b           (SimCLR)

    The two differ only while lr changes. One-dimensional parameters (biases, norms) are neither
    decayed nor adapted: u = g, r = 1. A group whose trust_coefficient is None is decayed, but not
    adapted. exclude_1d=False treats one-dimensional ones like weights; without weight decay that is
    apex's LARC, which SimSiam's linear evaluation uses. With weight decay LARC, lightning-bolts,
    solo-learn and lightly divide by |g| + weight_decay * |w|, and this does not.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.9,
                 trust_coefficient: float = 0.001, lr_in_momentum: bool = False,
                 exclude_1d: bool = True):
        super().__init__(params, dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, lr_in_momentum=lr_in_momentum,
            trust_coefficient=trust_coefficient, exclude_1d=exclude_1d))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for part in in_cache([p for p in group["params"] if p.grad is not None]):
                self.update(part, group)
        return loss

    def update(self, used: list[Tensor], group: dict) -> None:
        weights = [p for p in used if p.ndim > 1 or not group["exclude_1d"]]
        biases = [p for p in used if p.ndim <= 1 and group["exclude_1d"]]
        params, u = [*weights, *biases], []
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        if weights:
            u = torch._foreach_add([p.grad for p in weights], weights, alpha=group["weight_decay"])
            if group["trust_coefficient"] is not None:
                w_norm = torch.stack(torch._foreach_norm(weights))
                u_norm = torch.stack(torch._foreach_norm(u))
                ratio = group["trust_coefficient"] * w_norm / u_norm
                ratio = torch.where((w_norm > 0) & (u_norm > 0), ratio, 1.0)
                torch._foreach_mul_(u, list(ratio.unbind()))
        in_buffer, outside = (group["lr"], 1) if group["lr_in_momentum"] else (1, group["lr"])
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, [*u, *(p.grad for p in biases)], alpha=in_buffer)
        torch._foreach_add_(params, buffers, alpha=-outside)


# ------------------------------------------------------------------- batch norm over all processes


class AllReduceSum(torch.autograd.Function):
    """Sum over processes; so is its gradient, for each process's loss depends on every input."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """torch.nn.SyncBatchNorm for any device (torch's own refuses CPU tensors).

    In training mode mean and variance are taken over the images of all processes, which may hold
    different numbers of them; half-precision inputs are normalised in float32. It is written with
    plain tensor operations, so on CUDA torch's own is the faster one.
    """

    _check_input_dim = nn.SyncBatchNorm._check_input_dim  # two dimensions at least

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        self._check_input_dim(x)
        shape = [1, -1] + [1] * (x.ndim - 2)
        dims = [d for d in range(x.ndim) if d != 1]
        y = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        count = y.new_full([1], x.numel() // x.shape[1])
        total = AllReduceSum.apply(torch.cat([y.sum(dims), count]))
        n = total[-1].detach()
        mean = total[:-1] / n
        # The second pass costs one more reduction; E[x^2] - E[x]^2 would lose digits instead.
        y = y - mean.view(shape)
        var = AllReduceSum.apply(y.square().sum(dims)) / n
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                plain = self.momentum is None  # the average of all batches
                momentum = 1 / self.num_batches_tracked.item() if plain else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean), momentum)
                self.running_var.lerp_((var * (n / (n - 1))).to(self.running_var), momentum)
        y = y * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


def synchronize_batch_norm(model: nn.Module) -> nn.Module:
    """Makes every batch norm in `model` a SyncBatchNorm, in place; parameters and buffers stay."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = SyncBatchNorm  # same attributes, another forward
    return model


# ------------------------------------------------------------------------------- the demo's images

# Signed distance to the outline, negative inside, from Cartesian and polar coordinates.
SHAPES = (
    lambda x, y, r, a: r - 0.85,  # disk
    lambda x, y, r, a: (r - 0.72).abs() - 0.2,  # ring
    lambda x, y, r, a: torch.maximum((x.abs() - 0.5).abs() - 0.2, y.abs() - 0.9),  # two bars
    lambda x, y, r, a: torch.maximum(x.abs() - 0.22, y.abs() - 1.0),  # bar
    lambda x, y, r, a: torch.minimum(x.abs(), y.abs()).maximum(r - 0.78) - 0.2,  # cross
    lambda x, y, r, a: torch.hypot(x.abs() - 0.58, y) - 0.36,  # two dots
    lambda x, y, r, a: torch.maximum(r - 0.95, 0.72 - torch.hypot(x - 0.5, y)),  # crescent
    lambda x, y, r, a: torch.maximum(x.abs() * 0.866 + y * 0.5, -y) - 0.5,  # triangle
    lambda x, y, r, a: (x.abs().maximum(y.abs()) - 0.66).abs() - 0.17,  # square outline
    lambda x, y, r, a: r - 0.6 - 0.4 * torch.cos(5 * a),  # star
)


def demo_images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n generated images, uint8 [n, 3, 32, 32], of ten shapes, and their classes, int64 [n].

    Every image holds four copies of one shape, each with its own place, size, angle and tint: the
    shape is the one thing that two crops of an image have in common, and pixels hardly betray it.
    Image i depends on seed and i alone.
    """
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(n, 29 + 3 * 32 * 32, generator=generator)  # a row an image
    labels = torch.arange(n) % 10
    angle, size, cx, cy, *tint = u[:, 1:29].view(n, 7, 4, 1, 1).unbind(1)
    size = 5 + 2.5 * size
    grid = torch.arange(16) - 7.5
    x, y = grid + 4 * cx - 2, grid[:, None] + 4 * cy - 2
    cos, sin = torch.cos(2 * math.pi * angle), torch.sin(2 * math.pi * angle)
    x, y = (cos * x + sin * y) / size, (cos * y - sin * x) / size
    r, a = torch.hypot(x, y), torch.atan2(y, x)
    distance = torch.empty_like(r)
    for k, shape in enumerate(SHAPES):
        distance[k::10] = shape(x[k::10], y[k::10], r[k::10], a[k::10])
    mask = (0.5 - distance * size).clamp(0, 1)
    # Two light and two dark copies on one grey, hardly tinted: a network that could tell images
    # apart by brightness or colour would learn these instead of the shape.
    sign = torch.tensor([1, -1, -1, 1]) * torch.where(u[:, :1] < 0.5, -1, 1)
    cells = (0.3 + 0.1 * torch.stack(tint, 1)) * (sign.view(n, 4, 1, 1) * mask)[:, None]
    images = cells.view(n, 3, 2, 2, 16, 16).transpose(3, 4).reshape(n, 3, 32, 32)
    noise = u[:, 29:].view(n, 3, 32, 32) - 0.5
    images = (0.5 + images + 0.3 * noise).clamp(0, 1)
    return (images * 255).round().to(torch.uint8), labels
