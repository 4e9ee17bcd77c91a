"""What the tests of several methods need beside their oracles: inputs, a small network, ranks."""

import math

import torch
import torch.distributed as dist
from torch import nn

DOUBLE = torch.float64


def settled(method, *flags, precision="fp64", dtype=DOUBLE):
    """A script's settings for this command line, ready for a step on this machine's CPU."""
    words = [word for flag in flags for word in str(flag).split()]
    args = method.settle(method.parse_args([*words, "--precision", precision]))
    args.device, args.dtype = torch.device("cpu"), dtype
    return args


def assert_fields(args, expected):
    for name, value in expected.items():
        parsed = getattr(args, name)
        parsed = tuple(parsed) if isinstance(parsed, list) else parsed
        assert parsed == value, f"{name}: {parsed}, expected {value}"


def count(module, trainable=None):
    return sum(p.numel() for p in module.parameters() if trainable in (None, p.requires_grad))


def furthest(a, b):
    """The largest difference between the tensors of two lists; infinite if one is not a number."""
    pairs = [*zip(a, b, strict=True)]
    assert all(x.shape == y.shape for x, y in pairs), [(x.shape, y.shape) for x, y in pairs]
    errors = [(x - y).abs().max().item() for x, y in pairs]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def same(a, b):
    """Equal to the bit, tensor by tensor."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def embedding_pairs(n=7, dim=5, dtype=DOUBLE, seed=0, noise=0.7):
    """Two views of very different lengths, rows of one index near each other in direction."""
    g = torch.Generator().manual_seed(seed)
    x, more = (torch.randn(n, dim, generator=g, dtype=DOUBLE) for _ in range(2))
    lengths = torch.logspace(-1, 1, n, dtype=DOUBLE)[:, None]
    pair = x * lengths, (x + noise * more) * lengths.flip(0)
    return [y.to(dtype).requires_grad_() for y in pair]


def joined_views(n=8, seed=1):
    """First views of n images, then second ones with other statistics."""
    g = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(n, 3, 6, 6, generator=g, dtype=DOUBLE) for _ in range(2))
    return torch.cat([x, 1.5 * x + noise + 0.5])


class Tiny(nn.Module):
    """A backbone with a bias and a batch norm."""
    feature_dim = 8

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(self.conv(x)).relu().mean((2, 3))


# --------------------------------------------------------------------- several processes equal one


class Gather(torch.autograd.Function):
    """The gradient is the sum over processes, or a mistake that other implementations made."""

    @staticmethod
    def forward(ctx, x, which):
        ctx.which, parts = which, [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        if ctx.which != "local slice":
            dist.all_reduce(grad)
        mine = grad.chunk(dist.get_world_size())[dist.get_rank()]
        return mine * {"no gradient": 0, "times W": dist.get_world_size()}.get(ctx.which, 1), None


def part(x, rank, world):
    """This process's images of both views."""
    return torch.cat([view.chunk(world)[rank] for view in x.chunk(2)])


def record_gradients(model, optimizer, record):
    """Each step notes the gradients it takes; call what it returns when two steps are done."""
    step = optimizer.step

    def recorded(*rest):
        record.update({f"each gradient {len(record)} {path}": p.grad.clone()
                       for path, p in model.named_parameters() if p.grad is not None})
        return step(*rest)

    def complete():
        return sum("gradient" in key for key in record) == 2 * sum(
            len(group["params"]) for group in optimizer.param_groups)

    optimizer.step = recorded
    return complete


def differs(ranks, reference, world, *key):
    """The largest differences of ranks from one process, by kind of entry, as its first word says:
    "mean" over the ranks, "rows" side by side, "split" (gradients: side by side), "each" alike."""
    worst = {"mean": 0.0, "rows": 0.0, "gradient": 0.0, "each": 0.0}
    parts = [ranks[rank][world][key] for rank in range(world)]
    assert all(found.keys() == reference.keys() for found in parts)
    for entry, expected in reference.items():
        kind, values = entry.split()[0], [found[entry] for found in parts]
        if kind != "each":
            values = [sum(values) / world if kind == "mean" else torch.cat(values)]
        kind = "gradient" if "gradient" in entry or kind == "split" else kind
        worst[kind] = max(worst[kind], *(furthest([value], [expected]) for value in values))
    return worst
