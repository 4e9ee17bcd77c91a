"""Prints a Markdown table of runs: python results/table.py LOG.jsonl ... [--show std rank]

Logs whose names differ only in "-seedN" share a row: mean and range over the seeds. "untrained" is
the first kNN accuracy of a run, "trained" its last accuracy: top-1 where it has labels, else kNN.
--show adds the last value of other quantities of the log. "minutes" is one run's training time.
"""

import argparse
import json
import re
from pathlib import Path


def read(log: Path, show: list[str]) -> dict[str, float]:
    """The numbers of one run's row."""
    first, *lines = map(json.loads, log.read_text().splitlines())
    metric = "top1" if any("top1" in line for line in lines) else "knn"
    accuracies = [100 * line[metric] for line in lines if metric in line]
    found = {metric: accuracies[-1]} if accuracies else {}
    if metric == "knn" and accuracies:
        found["untrained"] = accuracies[0]
    steps, before, minutes = [line for line in lines if "images_per_s" in line], 0, 0.0
    for line in steps:
        images = first["config"]["batch_size"] * (line["step"] - before)
        minutes += images / line["images_per_s"] / 60
        before = line["step"]
    return found | {name: steps[-1][name] for name in show if name in steps[-1]} | {
        "minutes": minutes}


def cell(runs: list[dict], name: str, digits: int, unit: str = "") -> str:
    values = [run[name] for run in runs if name in run]
    if not values:
        return ""
    text = f"{sum(values) / len(values):.{digits}f}{unit}"
    if len(values) == 1:
        return text
    return f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", metavar="LOG", type=Path)
    parser.add_argument("--show", nargs="+", default=[], metavar="QUANTITY")
    args = parser.parse_args()
    args.show = [name for name in args.show if name not in ("knn", "top1")]  # shown in any case
    rows: dict[str, list[Path]] = {}
    for log in args.logs:
        rows.setdefault(re.sub(r"-seed\d+$", "", str(log.with_suffix(""))), []).append(log)
    head = ["run", "untrained", "trained", *args.show, "minutes", "logs"]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for name, logs in rows.items():
        runs = [read(log, args.show) for log in logs]
        metric = "top1" if "top1" in runs[0] else "knn"
        links = [f"[{i if len(logs) > 1 else 'log'}]({log.parent.name}/{log.name})"
                 for i, log in enumerate(logs, 1)]
        cells = [f"{Path(name).name}, {'kNN' if metric == 'knn' else 'top-1'}",
                 cell(runs, "untrained", 1, " %"), cell(runs, metric, 1, " %"),
                 *(cell(runs, quantity, 2) for quantity in args.show), cell(runs, "minutes", 0),
                 ", ".join(links)]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
