"""Makes every picture in results/ from the run logs there: python results/figures.py

Needs matplotlib, which the project itself does not.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent


def curve(log: str, name: str) -> tuple[list, list]:
    """Steps and values of one quantity in a log."""
    lines = [json.loads(line) for line in (HERE / log).read_text().splitlines()]
    points = [(line["step"], line[name]) for line in lines if name in line and "step" in line]
    return [step for step, _ in points], [value for _, value in points]


def save(figure, name: str) -> None:
    figure.savefig(HERE / name, dpi=110, bbox_inches="tight")
    plt.close(figure)
    print(HERE / name)


def stability() -> None:
    """MoCo v3, Sec. 4: patch projection learned and frozen, a column a learning rate."""
    rates = sorted({path.stem.split("-")[-1] for path in HERE.glob("moco_v3-stability-*.jsonl")},
                   key=float)
    figure, axes = plt.subplots(3, len(rates), figsize=(5 * len(rates), 7), sharex=True, sharey="row",
                                squeeze=False)
    for column, rate in zip(axes.T, rates):
        for kind, colour in (("learned", "tab:red"), ("frozen", "tab:blue")):
            log = f"moco_v3-stability-{kind}-{rate}.jsonl"
            column[0].plot(*(curve(log, "knn_queue")), color=colour, label=f"{kind} projection")
            column[1].semilogy(*curve(log, "grad_first"), color=colour, linewidth=0.8)
            column[2].semilogy(*curve(log, "grad_last"), color=colour, linewidth=0.8)
        column[0].set_title(f"base lr {rate}")
        column[2].set_xlabel("step")
    axes[0, 0].set_ylabel("kNN within epochs (knn_queue)")
    axes[1, 0].set_ylabel("gradient norm, first layer\n(frozen: first attention)")
    axes[2, 0].set_ylabel("gradient norm, last block")
    axes[0, 0].legend()
    save(figure, "moco_v3-stability.png")


def training() -> None:
    """MoCo v3 on CIFAR-10 JPEG: exact kNN at the ends of epochs, the queue's within them, the loss."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5))
    for log, colour in (("moco_v3-cifar10-jpeg-vit.jsonl", "tab:orange"),
                        ("moco_v3-cifar10-jpeg-resnet18.jsonl", "tab:green")):
        name = log.removeprefix("moco_v3-cifar10-jpeg-").removesuffix(".jsonl")
        axes[0].plot(*curve(log, "knn_queue"), color=colour, alpha=0.4)
        axes[0].plot(*curve(log, "knn"), "o-", color=colour, label=name)
        axes[1].plot(*curve(log, "loss"), color=colour, label=name)
    for axis, label in zip(axes, ("kNN accuracy (pale: queue)", "loss")):
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.legend()
    save(figure, "moco_v3-cifar10-jpeg.png")


COLLAPSE = (("byol", "BYOL", "black"), ("no-predictor", "no predictor", "tab:red"),
            ("tau-0", "tau 0 (no memory)", "tab:orange"),
            ("tau-0-fast-predictor", "tau 0, predictor 10 times faster", "tab:green"),
            ("tau-1", "tau 1 (fixed random target)", "tab:blue"),
            ("negatives", "no predictor, online target, negatives", "tab:purple"),
            ("official-head", "BYOL without the demo's output BN", "tab:gray"))


def collapse() -> None:
    """BYOL, Tables 5, 19, 21 on the built-in images: what keeps the output from collapsing."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True)
    for run, label, colour in COLLAPSE:
        log = f"byol-collapse-{run}.jsonl"
        for axis, name in zip(axes.flat, ("rank", "std", "loss", "knn")):
            axis.plot(*curve(log, name), "o-" if name == "knn" else "-", color=colour, label=label,
                      linewidth=1.2)
    for axis, label in zip(axes.flat, ("effective rank of the projections", "std of the projections",
                                       "loss (with negatives: their term too)", "kNN accuracy")):
        axis.set_ylabel(label)
    axes[0, 0].set_yscale("log")
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=3,
                  bbox_to_anchor=(0.5, -0.06))
    save(figure, "byol-collapse.png")


def byol_training() -> None:
    """BYOL on CIFAR-10 JPEG."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.2))
    for axis, name, label in zip(axes, ("knn", "loss", "rank", "target_distance"), (
            "kNN accuracy", "loss", "effective rank", "|online - target| / |online|, weights")):
        axis.plot(*curve("byol-cifar10-jpeg.jsonl", name), "o-" if name == "knn" else "-")
        axis.set_xlabel("step")
        axis.set_ylabel(label)
    figure.tight_layout()
    save(figure, "byol-cifar10-jpeg.png")


STUDY = HERE / "dcl-study"
LOSSES = {"infonce": ("InfoNCE", "tab:red"), "dcl": ("DCL", "tab:blue"), "dclw": ("DCLW", "tab:green")}
BATCHES = (16, 64, 256)


def study_values(loss: str, batch: int, name: str) -> list[float]:
    """The last value of a quantity in the runs of each seed."""
    return [curve(f"dcl-study/{path.name}", name)[1][-1]
            for path in sorted(STUDY.glob(f"{loss}-{batch}-*.jsonl"))]


def spread(values: list[float], scale: float = 1, digits: int = 1) -> str:
    """Mean and standard deviation over seeds, as the table has them."""
    mean = sum(values) / len(values)
    std = (sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)) ** 0.5
    return f"{scale * mean:.{digits}f} ± {scale * std:.{digits}f}"


def dcl_table() -> str:
    """The study in Markdown: kNN in %, and q_B's mean and coefficient of variation at the end."""
    rows = ["| loss | batch | kNN, % (seeds) | q_B, mean | q_B, std / mean |", "|---|---|---|---|---|"]
    for batch in BATCHES:
        for loss in LOSSES:
            if knn := study_values(loss, batch, "knn"):
                rows.append(f"| {LOSSES[loss][0]} | {batch} | {spread(knn, 100)} ({len(knn)}) | "
                            f"{spread(study_values(loss, batch, 'q_mean'), 1, 2)} | "
                            f"{spread(study_values(loss, batch, 'q_cv'), 1, 2)} |")
    return "\n".join(rows) + "\n"


def dcl_study() -> None:
    """DCL: kNN against batch size; q_B's distribution, mean and variation; and one checkpoint of each
    loss asked at many batch sizes, which separates counting from training."""
    figure, axes = plt.subplots(1, 4, figsize=(19, 4))
    for loss, (label, colour) in LOSSES.items():
        points = [(batch, values) for batch in BATCHES if (values := study_values(loss, batch, "knn"))]
        for batch, values in points:
            axes[0].plot([batch] * len(values), [100 * v for v in values], ".", color=colour, alpha=0.5)
        axes[0].plot([batch for batch, _ in points], [100 * sum(v) / len(v) for _, v in points], "o-",
                     color=colour, label=label)
    for batch, colour in zip(BATCHES, ("tab:orange", "tab:olive", "tab:cyan")):
        for loss, style in (("infonce", "-"), ("dcl", "--")):
            logs = [[json.loads(line) for line in path.read_text().splitlines()]
                    for path in STUDY.glob(f"{loss}-{batch}-*.jsonl")]
            counts = [sum(column) for column in zip(*(
                line["q_histogram"] for log in logs for line in log if line.get("share") == 1.0))]
            axes[1].stairs([50 * count / sum(counts) for count in counts], [i / 50 for i in range(51)],
                           color=colour, linestyle=style, label=f"{LOSSES[loss][0]}, {batch}")
    for axis, kind in ((axes[2], ""), (axes[3], "ask-")):
        for loss in ("infonce", "dcl"):
            batches = BATCHES if not kind else tuple(2**k for k in range(4, 11))
            for name, style in (("q_mean", "o-"), ("q_cv", "s--")):
                values = [[curve(f"dcl-study/{path.name}", name)[1][-1]
                           for path in STUDY.glob(f"{kind}{loss}-{batch}{'' if kind else '-*'}.jsonl")]
                          for batch in batches]
                axis.plot(batches, [sum(v) / len(v) for v in values], style, color=LOSSES[loss][1],
                          label=f"{LOSSES[loss][0]}, {'mean' if name == 'q_mean' else 'std / mean'}")
    titles = ("kNN, % (dots: seeds)", "density of q_B, last 4096 anchors or more of a run",
              "q_B at the end of training", "one checkpoint (batch 64), asked at many batch sizes")
    for axis, title in zip(axes, titles):
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8)
    for axis in (axes[0], axes[2], axes[3]):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("batch size")
    axes[1].set_xlabel("q_B")
    figure.tight_layout()
    save(figure, "dcl-study.png")


def simclr() -> None:
    """SimCLR v2 on CIFAR-10 JPEG: pre-training, and what its network is worth with few labels."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 4))
    for axis, name, label in zip(axes, ("knn", "loss"), ("kNN accuracy", "loss (twice NT-Xent's mean)")):
        axis.plot(*curve("simclr_v2-cifar10-jpeg.jsonl", name), "o-" if name == "knn" else "-")
        axis.set_xlabel("step")
        axis.set_ylabel(label)
    bars = [(f"{share} % labels, {label}", f"{kind.format(share=share / 100)}", colour)
            for share in (1, 10) for label, kind, colour in (
                ("from scratch", "scratch-{share:g}", "tab:gray"),
                ("fine-tuned from layer 0", "finetune-{share:g}-layer-0", "tab:orange"),
                ("fine-tuned from layer 1", "finetune-{share:g}-layer-1", "tab:red"))]
    bars += [("10 %, half as wide, from scratch", "scratch-0.1-half", "tab:gray"),
             ("half as wide, distilled, no labels", "distill-half", "tab:blue")]
    for place, (label, run, colour) in enumerate(reversed(bars)):
        logs = HERE.glob(f"simclr_v2-cifar10-jpeg-{run}*.jsonl") if "0.01" in run else [
            HERE / f"simclr_v2-cifar10-jpeg-{run}.jsonl"]
        values = [100 * curve(path.name, "top1")[1][-1] for path in logs]
        axes[2].barh(place, sum(values) / len(values), color=colour, alpha=0.6)
        axes[2].plot(values, [place] * len(values), "k.")
    axes[2].set_yticks(range(len(bars)), [label for label, *_ in reversed(bars)], fontsize=8)
    axes[2].set_xlabel("top-1, % (dots: seeds)")
    figure.tight_layout()
    save(figure, "simclr_v2-cifar10-jpeg.png")


FIVE = (("simclr_v2", "SimCLR v2", "tab:purple"), ("dcl", "DCL", "tab:blue"),
        ("moco_v3", "MoCo v3", "tab:green"), ("byol", "BYOL", "tab:orange"),
        ("simsiam", "SimSiam", "tab:red"))


def five() -> None:
    """kNN of the five methods on the same images with the same network and batch, and at home: on the
    built-in images, each with its own recipe."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    for axis, place, title in zip(axes, ("five/{}.jsonl", "demo/{}-seed0.jsonl"), (
            "CIFAR-10 JPEG, 10,000 images, ResNet-18 at width 0.25, batch 64",
            "built-in images, each script's demo")):
        for name, label, colour in FIVE:
            lines = [json.loads(line) for line in (HERE / place.format(name)).read_text().splitlines()]
            points = [(line["epoch"], 100 * line["knn"]) for line in lines if "knn" in line]
            axis.plot(*zip(*points), "o-", markersize=3, color=colour, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch")
        axis.set_ylabel("kNN accuracy, %")
    axes[0].legend()
    figure.tight_layout()
    save(figure, "five.png")


if __name__ == "__main__":
    five()
    stability()
    training()
    collapse()
    byol_training()
    dcl_study()
    simclr()
    print(dcl_table())
