"""What the recorders share: weights drawn by numpy, summaries of a state, the file they write.

numpy's RandomState gives the same numbers in every version, so a recording stores no weights: the
test draws them again.
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import torch


def parameters(shapes: dict, random: np.random.RandomState) -> dict[str, torch.Tensor]:
    """Parameters by our names, drawn in sorted order, in float64."""
    drawn = {}
    for name in sorted(shapes):
        x = random.standard_normal(tuple(shapes[name]))
        if x.ndim > 1:
            x *= np.sqrt(2 / np.prod(x.shape[1:]))  # He et al., arXiv:1502.01852
        elif name.endswith("weight"):  # of a norm
            x = 1 + 0.1 * x
        else:
            x *= 0.1
        drawn[name] = torch.from_numpy(x)
    return drawn


def views(random: np.random.RandomState, *shape: int) -> torch.Tensor:
    """[steps, 2, B, 3, S, S] for a shape (steps, B, 3, S, S). Both views show the same images."""
    steps, *images = shape
    x = random.standard_normal((steps, 1, *images))
    return torch.from_numpy(x + 0.5 * random.standard_normal((steps, 2, *images)))


def summary(state: dict, names: tuple, when: str) -> dict:
    """Of a state dict with our names: the norm of every tensor, the first numbers of some."""
    return {f"norms {when}": {name: [x.double().norm().item()] for name, x in state.items()},
            f"numbers {when}": {name: state[name].flatten()[:8].tolist() for name in names}}


def commit(path: Path) -> str:
    """Of the checkout at path."""
    return subprocess.check_output(["git", "--git-dir", path / ".git", "rev-parse", "HEAD"],
                                   text=True).strip()


def write(method: str, **result) -> None:
    """method.json, beside this file."""
    text = json.dumps(result, separators=(",", ":")).replace('},"', '},\n"')
    file = Path(__file__).with_name(f"{method}.json")
    file.write_text(text + "\n")
    print(f"{file.name}: {file.stat().st_size} bytes, {result['commit']}, {result['versions']}")
    for name, case in result["cases"].items():
        print(name, {key: case[key] for key in ("loss", "lr") if key in case})
