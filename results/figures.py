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


if __name__ == "__main__":
    stability()
    training()
