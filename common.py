"""Building blocks of all scripts. Nothing here knows about flags, files or training loops.

    resnet, vit: backbones with torchvision's and timm's parameter names. LARS: the optimizer.
    all_gather, gather_with_grad, sync_batch_norm: several processes. generator, draws: randomness.
    crop_boxes, resized_crop, color_jitter, grayscale, gaussian_blur, solarize, normalize:
        torchvision's transforms for batches; u holds uniform random numbers, one row per image.
    knn_accuracy, feature_std, effective_rank: quality of features. demo_images: the built-in data.
"""

import hashlib
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
            raise ValueError("selective kernels need ResNet-50 or deeper")
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
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)  # no-op after a selective kernel: >= 0
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class SelectiveKernel(nn.Module):
    """Two 3x3 convolutions u1, u2, mixed per channel by weights computed from u1 + u2 (Li et al.,
    arXiv:1903.06586; both 3x3 as in SimCLR v2's code). [B, dim, H, W] -> the same, or half H, W."""

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
    """The 2x2 average pooling of a ResNet-D shortcut (He et al., arXiv:1812.01187), padded as in
    SimCLR v2's code: at stride 1 by repeating the border, at stride 2 with zeros."""

    def __init__(self, stride: int):
        pad = nn.ReplicationPad2d if stride == 1 else nn.ZeroPad2d
        super().__init__(pad((0, 1, 0, 1)), nn.AvgPool2d(2, stride))


def shortcut(in_dim: int, out_dim: int, stride: int, sk_ratio: float = 0.0) -> nn.Sequential | None:
    if stride == 1 and in_dim == out_dim:
        return None
    pool = []
    if sk_ratio:  # ResNet-D, used together with selective kernels
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
        elif sk_ratio:  # ResNet-D's stem
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
    """Builds a ResNet; its state dict has torchvision's names, without fc.

    width multiplies all channel counts. sk_ratio (SimCLR v2: 0.0625): selective kernels with
    ResNet-D's stem and shortcuts, for ResNet-50 and deeper. small_images: 3x3 stem, no pooling.
    zero_init_residual: every block starts as its shortcut (Goyal et al., arXiv:1706.02677, 5.1).
    Raises ValueError for an unknown depth, a width below 0.125 and sk_ratio on basic blocks.
    """
    if depth not in BLOCKS:
        raise ValueError(f"no ResNet of depth {depth}: choose {', '.join(map(str, BLOCKS))}")
    if width < 0.125:  # with 4 to 7 channels oneDNN corrupts memory on AVX2 (torch 2.15)
        raise ValueError(f"width {width} is too small: 0.125 is the minimum")
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
    """Attention and MLP, each pre-norm and with a residual connection. [B, N, D] -> the same."""

    def __init__(self, dim: int, heads: int, mlp_norm: str):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        batch = mlp_norm == "batch"  # statistics over images and tokens
        self.norm2 = nn.BatchNorm1d(dim) if batch else nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x.flatten(0, 1)).view_as(x))  # flattened for batch norm


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
    """Fixed 2-D position embedding [rows * columns, dim]: sin(w row), cos(w row), sin(w column),
    cos(w column), w = 10000^(-4j / dim), j = 0, 1, .. (MoCo v3's order; MAE: columns first)."""
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
            raise ValueError(f"images are {[*x.shape[2:]]}, but the ViT takes {[*self.image_size]}")
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


VITS = {  # dim, depth, heads. MoCo v3, Table 2; tiny: timm's; mini: ours, for the demo
    "mini": (96, 3, 3), "tiny": (192, 12, 3), "small": (384, 12, 12),  # timm's small has 6 heads
    "base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16),
}


def vit(size: str, image_size: int | tuple[int, int] = 224, patch_size: int = 16, *, heads: int = 0,
        stem: str = "patch", mlp_norm: str = "layer", position: str = "sincos",
        pooling: str = "class", patch_projection: str = "learned",
        grad_checkpoint: bool = False) -> ViT:
    """Builds a ViT (arXiv:2010.11929), initialized as in MoCo v3; names are timm's.

    size: one of VITS. image_size: one number or (height, width). heads: 0 for the size's default.
    stem: "patch" or "conv", which replaces one block (arXiv:2106.14881). mlp_norm: "layer" or
    "batch", MoCo v3's ViT-BN (Sec. 6.3). position: "sincos" (fixed), "learned" or "none".
    pooling: "class" token, "mean" of all tokens, or "mean-no-norm". patch_projection: "learned" or
    "frozen". grad_checkpoint: recompute each block in the backward pass, to save memory.
    Raises ValueError for unknown values and for values that do not work together.
    """
    for value, allowed in ((size, VITS), (stem, ("patch", "conv")), (mlp_norm, ("layer", "batch")),
                           (position, ("sincos", "learned", "none")),
                           (pooling, ("class", "mean", "mean-no-norm")),
                           (patch_projection, ("learned", "frozen"))):
        if value not in allowed:
            raise ValueError(f"{value!r} is not one of {', '.join(allowed)}")
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    dim, depth, own_heads = VITS[size]
    heads = heads or own_heads
    if heads < 0 or dim % heads:
        raise ValueError(f"heads {heads} does not divide the {dim} channels")
    if patch_size < 1 or any(side % patch_size or side < patch_size for side in sides):
        raise ValueError(f"image size {sides[0]} x {sides[1]} is not divisible by patch size "
                         f"{patch_size}")
    if stem == "conv" and (patch_size != 16 or patch_projection == "frozen"):
        raise ValueError("the conv stem needs patch_size 16 and a learned patch_projection")
    if grad_checkpoint and mlp_norm == "batch":
        raise ValueError("grad_checkpoint would update the running statistics of batch norm twice")
    model = ViT(dim, depth - (stem == "conv"), heads, sides, patch_size, stem, mlp_norm, position,
                pooling, grad_checkpoint)
    for name, module in model.blocks.named_modules():  # MoCo v3, authors' code
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith("qkv"):  # q, k, v as three D x D matrices, not one
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


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv:1708.03888), as used in SSL code.

    For a weight w with gradient g, trust coefficient t and momentum m:

        u = g + weight_decay * w
        r = t * |w| / |u|                              # 1 if either norm is 0
        lr_in_momentum=False:  b = m * b + r * u;       w = w - lr * b      (BYOL, MoCo v3)
        lr_in_momentum=True:   b = m * b + lr * r * u;  w = w - b           (SimCLR)

    Biases and norms (1-D parameters) use u = g, r = 1, unless exclude_1d=False. The latter without
    weight decay is apex's LARC (SimSiam's linear evaluation). trust_coefficient=None: r = 1.
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
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            params.sort(key=lambda p: p.ndim <= 1 and group["exclude_1d"])  # 1-D ones last
            weights = [p for p in params if p.ndim > 1 or not group["exclude_1d"]]
            u, n = [p.grad for p in params], len(weights)
            if weights:
                u[:n] = torch._foreach_add(u[:n], weights, alpha=group["weight_decay"])
            if weights and group["trust_coefficient"] is not None:
                w_norm = torch.stack(torch._foreach_norm(weights))
                u_norm = torch.stack(torch._foreach_norm(u[:n]))
                ratio = group["trust_coefficient"] * w_norm / u_norm
                ratio = torch.where((w_norm > 0) & (u_norm > 0), ratio, 1.0)
                torch._foreach_mul_(u[:n], list(ratio.unbind()))
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            b = [self.state[p]["momentum_buffer"] for p in params]
            lr_u, lr_b = (group["lr"], 1) if group["lr_in_momentum"] else (1, group["lr"])
            torch._foreach_mul_(b, group["momentum"])
            torch._foreach_add_(b, u, alpha=lr_u)
            torch._foreach_add_(params, b, alpha=-lr_b)
        return loss


# --------------------------------------------------------------------------------------- processes


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def generator(*key) -> torch.Generator:
    """A random number generator seeded by the key alone, for example (seed, "crop", step)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draws(seed: int, name: str, step: int, batch_size: int, *shape: int) -> Tensor:
    """Uniform random numbers [b, *shape] for this process's images of a step. They are drawn for
    the global batch, so they do not depend on the number of processes."""
    u = torch.rand(batch_size, *shape, dtype=torch.float64, generator=generator(seed, name, step))
    return u.chunk(world_size())[rank()]


def print0(message: str) -> None:
    if rank() == 0:
        print(message, flush=True)


@torch.no_grad()
def all_gather(x: Tensor) -> Tensor:
    """x [b, ...] of each process -> [world_size * b, ...], rank 0 first; without gradient."""
    if world_size() == 1:
        return x.detach()
    out = x.new_empty(world_size() * len(x), *x.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before 2.14
    gather(out, x.contiguous())
    return out


class GatherWithGrad(torch.autograd.Function):
    """all_gather in the forward pass, all-reduce (sum) of the gradient in the backward pass: each
    process's loss depends on the x of all processes."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(world_size())[rank()]


def gather_with_grad(x: Tensor) -> Tensor:
    """x [b, ...] of each process -> [world_size * b, ...], rank 0 first; with gradient."""
    return GatherWithGrad.apply(x) if world_size() > 1 else x


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Move x from the CPU, asynchronously on CUDA. Not on MPS, which may read x after its memory
    was reused (pytorch #139550)."""
    return x.to(device, non_blocking=device.type == "cuda")


class SyncNormalize(torch.autograd.Function):
    """Batch norm of x [b, C, ...] with mean and var [C] over all processes' n values per channel,
    using torch's batch norm in eval mode. With y = (x - mean) / s, s^2 = var + eps, and sums over
    all processes: dx = weight / s * (dout - sum(dout) / n - y * sum(dout * y) / n)."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, n: int, eps: float):
        ctx.save_for_backward(x, weight, mean, var)
        ctx.n, ctx.eps = n, eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx, dout):
        x, weight, mean, var = ctx.saved_tensors
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dout, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True])
        sums = torch.stack([dweight, dbias])  # of dout * y, and of dout
        dist.all_reduce(sums)
        sums *= -weight * (var + ctx.eps).rsqrt() / ctx.n
        dx = dx + F.batch_norm(x, mean, var, sums[0], sums[1], eps=ctx.eps)
        return dx, dweight, dbias, None, None, None, None


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """torch.nn.SyncBatchNorm for any device; all processes need inputs of one shape. torch's own
    rejects CPU tensors, and on CUDA it waits for the GPU in every layer."""

    _check_input_dim = nn.SyncBatchNorm._check_input_dim  # at least two dimensions

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and world_size() > 1):
            return super().forward(x)
        self._check_input_dim(x)
        with torch.no_grad():
            y = x.float() if x.element_size() == 2 else x  # statistics not in half precision
            mine = torch.var_mean(y, [d for d in range(x.ndim) if d != 1], correction=0)
            var, mean = all_gather(torch.stack(mine)[None]).unbind(dim=1)  # [world_size, C] each
            var, mean = (var + (mean - mean.mean(dim=0)).square()).mean(dim=0), mean.mean(dim=0)
            n = world_size() * x.numel() // x.shape[1]
            if self.track_running_stats:
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                self.running_var.lerp_((var * n / (n - 1)).to(self.running_var), self.momentum)
        weight, bias = ((self.weight, self.bias) if self.affine else
                        (torch.ones_like(mean), torch.zeros_like(mean)))
        return SyncNormalize.apply(x, weight, bias, mean, var, n, self.eps)


def sync_batch_norm(model: nn.Module) -> nn.Module:
    """Converts every batch norm in place."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = SyncBatchNorm  # same attributes, different forward
    return model


# -------------------------------------------------------------------------------- image operations

GRAY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue


def crop_boxes(u: Tensor, height: int, width: int, crop_min: float,
               flip_prob: float = 0.5) -> tuple[Tensor, ...]:
    """torchvision's RandomResizedCrop.get_params, and a flip, for each row of u [B, 23].

    The area is crop_min to 1 of the image's, the aspect ratio 3/4 to 4/3. Takes the first of ten
    tries that fits, or a center crop. Returns top, left, height, width, flip; [B] each.
    """
    area = height * width * (crop_min + (1 - crop_min) * u[:, 0:10])
    ratio = torch.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * u[:, 10:20])
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w <= width) & (h <= height) & (w > 0) & (h > 0)
    first, found = fits.int().argmax(dim=1, keepdim=True), fits.any(dim=1)
    w = torch.where(found, w.gather(1, first)[:, 0], min(width, round(height * 4 / 3))).long()
    h = torch.where(found, h.gather(1, first)[:, 0], min(height, round(width / (3 / 4)))).long()
    top = torch.where(found, u[:, 20] * (height - h + 1), (height - h) // 2).long()
    left = torch.where(found, u[:, 21] * (width - w + 1), (width - w) // 2).long()
    return top, left, h, w, u[:, 22] < flip_prob


def resample(start: Tensor, length: Tensor, in_size: int, out_size: int,
             flip: Tensor | None = None) -> Tensor:
    """Matrices [B, out_size, in_size] that resize pixels [start, start + length) to out_size:
    bilinear and antialiased, like torchvision. flip [B]: mirror where true."""
    start, length = start[:, None, None], length[:, None, None]
    out = torch.arange(out_size, device=start.device)[:, None]
    if flip is not None:
        out = torch.where(flip[:, None, None], out_size - 1 - out, out)
    pixel = torch.arange(in_size, device=start.device)
    scale = length / out_size
    offset = start + (out + 0.5) * scale - (pixel + 0.5)
    weight = (1 - offset.abs() / scale.clamp(min=1)).clamp(min=0)
    weight = weight * ((pixel >= start) & (pixel < start + length))
    return weight / weight.sum(dim=2, keepdim=True)


def resized_crop(x: Tensor, boxes: tuple[Tensor, ...], size: int) -> Tensor:
    """Crops x [B, 3, H, W] to boxes and resizes to [B, 3, size, size], by matrix products."""
    boxes = torch.stack([box.to(x.dtype) for box in boxes])
    top, left, height, width, flip = to_device(boxes, x.device)
    rows = resample(top, height, x.shape[2], size)
    columns = resample(left, width, x.shape[3], size, flip > 0)
    return rows[:, None] @ x @ columns[:, None].mT


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotates the hue of x [B, 3, P] by a fraction of the circle, -0.5 to 0.5. shift [B, 1, 1]"""
    r, g, b = x.unbind(dim=1)  # sort the channels with min and max: faster than torch.where
    low, high, sector = torch.minimum(g, b), torch.maximum(g, b), (g < b).to(x.dtype).mul_(-6)
    sector -= (2 + 2 * sector).mul_(r < high)
    value, middle = torch.maximum(r, high), torch.minimum(r, high)
    chroma = value - torch.minimum(middle, low)
    hue = middle.sub_(low).div_(chroma.clamp(min=1e-12)).add_(sector).abs_() / 6 + shift[:, 0]
    k = torch.stack([hue + 9 / 6, hue + 7 / 6, hue + 5 / 6], dim=1)
    k = k.frac_().sub_(0.5).abs_().mul_(6).sub_(1).clamp_(0, 1)
    return torch.addcmul(value[:, None], k, chroma[:, None], value=-1)


def color_jitter(x: Tensor, u: Tensor, strength: tuple, prob: float) -> Tensor:
    """torchvision's ColorJitter with probability prob, in random order per image, on x [B, 3, S, S]
    in [0, 1]. u [B, 9]: 1 for whether to apply it, 4 for the strengths, 4 for the order."""
    # On a CPU, process half a million values at a time so that they stay in its cache.
    n = max(1, 2**19 // x[0].numel()) if x.device.type == "cpu" else len(x)
    x = x.clone()
    for part in zip(x.split(n), u.split(n)):
        jitter_(*part, strength, prob)
    return x


def jitter_(x: Tensor, u: Tensor, strength: tuple, prob: float) -> None:
    """color_jitter of all images at once, in place. Images are sorted by the position of hue: at
    each position, those whose hue shift is still to come form a slice, those past it another."""
    i = (u[:, 0] < prob).nonzero()[:, 0]
    order = u[i, 5:9].argsort(dim=1)  # 0: brightness, 1: contrast, 2: saturation, 3: hue
    hue_place, by = (order == 3).int().argmax(dim=1).sort()
    i, order = i[by], order[by]
    factor = (1 + (2 * u[i, 1:5] - 1) * torch.tensor(strength, dtype=u.dtype)).clamp(min=0)
    shift, factor = factor[:, 3:] - 1, factor.gather(1, order)
    rest = 1 - factor
    numbers = torch.cat([shift, factor, rest * (order == 1), rest * (order == 2)], dim=1)
    numbers = to_device(numbers.to(x.dtype), x.device)[..., None, None]
    shift, factor, contrast, saturation = numbers.split([1, 4, 4, 4], dim=1)
    # Operations other than hue map pixel p to A p + C (mean pixel); [n, 3, 3] per position.
    eye, gray = to_device(torch.tensor([[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [GRAY] * 3],
                                       dtype=x.dtype), x.device)
    A, C = factor * eye + saturation * gray, contrast * gray
    i = to_device(i, x.device)
    y = x.index_select(0, i).flatten(2)  # [n, 3, S * S]

    def blend(images: slice, place: int) -> None:
        z = y[images]
        mean = C[images, place] @ z.mean(dim=2, keepdim=True)
        torch.clamp(torch.baddbmm(mean, A[images, place], z), 0, 1, out=z)

    n = [int((hue_place < place).sum()) for place in range(4)]
    for place in (0, 1, 2):
        blend(slice(n[place + 1], None), place)
    y = shift_hue(y, shift[:, 0])
    for place in (1, 2, 3):
        blend(slice(n[place]), place)
    x.index_copy_(0, i, y.view(-1, *x.shape[1:]))


def grayscale(x: Tensor, u: Tensor, prob: float) -> Tensor:
    """Converts each image to grayscale with probability prob. x [B, 3, S, S], u [B]."""
    i = to_device((u < prob).nonzero()[:, 0], x.device)
    r, g, b = x.index_select(0, i).split(1, dim=1)
    y = (GRAY[0] * r).add_(g, alpha=GRAY[1]).add_(b, alpha=GRAY[2])
    return x.index_copy(0, i, y.expand(-1, 3, -1, -1))


def gaussian_blur(x: Tensor, u: Tensor, prob: float, sigma: tuple[float, float]) -> Tensor:
    """Blurs each image with probability prob and its own sigma (pixels), uniform in the range. The
    kernel spans a tenth of the side: 23 taps at 224 px (SimCLR, arXiv:2002.05709, App. A).
    x [B, 3, S, S]; u [B, 2]: whether to blur, sigma."""
    i = to_device((u[:, 0] < prob).nonzero()[:, 0], x.device)
    if len(i) == 0:
        return x
    half = x.shape[-1] // 20
    s = to_device((sigma[0] + (sigma[1] - sigma[0]) * u[:, 1]).to(x.dtype), x.device)[i]
    taps = torch.arange(-half, half + 1, device=x.device, dtype=x.dtype)
    kernel = torch.softmax(-0.5 * (taps / s[:, None]) ** 2, dim=1).repeat_interleave(3, dim=0)
    y = x.index_select(0, i).flatten(0, 1)[None]  # one image, one kernel per channel
    y = F.pad(y, (half, half, half, half), mode="reflect")
    y = F.conv2d(y, kernel[:, None, None, :], groups=len(kernel))
    y = F.conv2d(y, kernel[:, None, :, None], groups=len(kernel))
    return x.index_copy(0, i, y[0].unflatten(0, (-1, 3)))


def solarize(x: Tensor, u: Tensor, prob: float) -> Tensor:
    """Inverts the bright pixels of each image with probability prob. x [B, 3, S, S], u [B]."""
    i = to_device((u < prob).nonzero()[:, 0], x.device)
    y = x.index_select(0, i)
    return x.index_copy(0, i, torch.where(y >= 128 / 255, 1 - y, y))  # PIL's threshold of 128


def normalize(x: Tensor, mean: tuple, std: tuple) -> Tensor:
    """(x - mean) / std per channel. x [B, 3, S, S]."""
    values = torch.tensor([mean, std], dtype=torch.float64)[:, :, None, None].to(x.dtype)
    mean, std = to_device(values, x.device)
    return (x - mean).div_(std)


# ---------------------------------------------------------------------------- quality of features


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int,
                 temperature: float) -> float:
    """Weighted kNN (Wu et al., arXiv:1805.01978, Sec. 3.4): vote weights exp(cosine / temperature).

    bank [n, d], bank_labels [n], queries [m, d], labels [m] -> accuracy in [0, 1].
    """
    if not (bank.isfinite().all() and queries.isfinite().all()):
        return math.nan
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    right = 0
    for query, label in zip(queries.split(1024), labels.split(1024)):
        cosine, nearest = (query @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(query), int(bank_labels.max()) + 1, device=query.device)
        weight = torch.exp((cosine - cosine[:, :1]) / temperature)  # the largest is 1: no overflow
        votes.scatter_add_(1, bank_labels[nearest], weight)
        right += (votes.argmax(dim=1) == label).sum().item()
    return right / len(labels)


@torch.no_grad()
def feature_std(z: Tensor) -> float:
    """Std of z / |z| over the batch z [B, d], times sqrt(d) (SimSiam, arXiv:2011.10566, Fig. 2): 1
    for an isotropic output, 0 if all images map to a point. It misses collapse to a line."""
    return F.normalize(z.float(), dim=1).std(dim=0).mean().item() * z.shape[1] ** 0.5


@torch.no_grad()
def effective_rank(z: Tensor) -> float:
    """Effective rank of z [B, d]: exp(entropy) of the normalized covariance spectrum
    (Roy & Vetterli, EUSIPCO 2007). 1 if all images lie on a line."""
    z = z.double() - z.double().mean(dim=0)
    gram = z @ z.T if len(z) < z.shape[1] else z.T @ z  # the same nonzero eigenvalues
    share = torch.linalg.eigvalsh(gram).clamp(min=0)
    share = share / share.sum().clamp(min=1e-300)
    return torch.special.entr(share).sum().exp().item()


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
    """n generated images, uint8 [n, 3, 32, 32], and their classes, int64 [n], of ten shapes.

    Every image shows four copies of one shape, with random position, size, angle and tint. The
    copies have only the shape in common, which is hard to tell from raw pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(n, 29 + 3 * 32 * 32, generator=generator)  # one row per image
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
    # Two light and two dark copies on gray, with little tint. If brightness or color identified the
    # image, a network would learn them instead of the shape.
    sign = torch.tensor([1, -1, -1, 1]) * torch.where(u[:, :1] < 0.5, -1, 1)
    cells = (0.3 + 0.1 * torch.stack(tint, 1)) * (sign.view(n, 4, 1, 1) * mask)[:, None]
    images = cells.view(n, 3, 2, 2, 16, 16).transpose(3, 4).reshape(n, 3, 32, 32)
    noise = u[:, 29:].view(n, 3, 32, 32) - 0.5
    images = (0.5 + images + 0.3 * noise).clamp(0, 1)
    return (images * 255).round().to(torch.uint8), labels
