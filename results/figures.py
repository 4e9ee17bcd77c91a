"""Draws the logs of runs side by side. Needs matplotlib, which the project itself does not.

    python results/figures.py runs/simsiam-demo runs/collapse
    python results/figures.py results/batch-sizes/*.jsonl --show knn q_histogram --out dcl.png

A panel for each quantity, a line for each run: its folder, or its log.jsonl. Quantities are those of
the log; a histogram is drawn as it was last. Names that differ only in "-seedN" have one color.
"""

import argparse
import json
import os
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def read(run: str) -> tuple[str, list[dict]]:
    """The run's name, and the lines of its log."""
    path = Path(run)
    name, path = (path.name, path / "log.jsonl") if path.is_dir() else (path.stem, path)
    return name, [json.loads(line) for line in path.read_text().splitlines()]


def draw(axis, lines: list[dict], quantity: str, **style) -> None:
    """One quantity of one run: against the epoch, or a histogram over 0 to 1."""
    points = [(line["epoch"], line[quantity]) for line in lines if quantity in line]
    if points and isinstance(points[-1][1], list):
        counts = points[-1][1]
        density = [len(counts) * count / sum(counts) for count in counts]
        axis.stairs(density, [i / len(counts) for i in range(len(counts) + 1)], **style)
    elif points:
        axis.plot(*zip(*points), "o-" if len(points) < 40 else "-", markersize=3, **style)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--show", nargs="+", default=["loss", "knn", "rank", "std"],
                        metavar="QUANTITY", help="default: loss knn rank std")
    parser.add_argument("--log-scale", nargs="+", default=[], metavar="QUANTITY")
    parser.add_argument("--out", default="curves.png")
    args = parser.parse_args()
    figure, axes = plt.subplots(1, len(args.show), figsize=(4.5 * len(args.show), 3.6))
    axes = [axes] if len(args.show) == 1 else axes
    names, logs = zip(*map(read, args.runs))
    names = [re.sub(r"-seed\d+$", "", name) for name in names]
    colors = [*dict.fromkeys(names)]
    prefix = os.path.commonprefix(colors).rpartition("-")[0]
    for name, lines in zip(names, logs):
        for axis, quantity in zip(axes, args.show):
            draw(axis, lines, quantity, color=f"C{colors.index(name)}",
                 label=name.removeprefix(prefix).strip("-"), alpha=0.8)
    for axis, quantity in zip(axes, args.show):
        axis.set_title(quantity)
        axis.set_xlabel("value" if quantity.endswith("histogram") else "epoch")
        if quantity in args.log_scale:
            axis.set_yscale("log")
    shown = {}  # each label once
    for axis in axes:
        shown |= zip(*reversed(axis.get_legend_handles_labels()))
    figure.legend(shown.values(), shown, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 0))
    figure.tight_layout()
    figure.savefig(args.out, dpi=110, bbox_inches="tight")
    print(args.out)


if __name__ == "__main__":
    main()
