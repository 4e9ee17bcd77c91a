"""Twelve steps in float64 against recorded ones: what is not meant to change a run does not.

recorded_steps.json holds, for each run, the flags, the losses and the norm of every weight at the
end, recorded at the commit that it names. `python tests/test_recorded_steps.py CHECKOUT`, with a
checkout of that commit, records what is missing.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

FILE = Path(__file__).with_name("recorded_steps.json")
COMMON = "--device cpu --precision fp64 --knn-every 0 --log-every 1 --steps 12 --workers 0"
MOCO = "--epochs 2 --warmup-epochs 0.1"
RUNS = {
    "simsiam": "simsiam.py --epochs 3",
    "simsiam, small images in a folder":
        "simsiam.py --data FOLDER --recipe demo --batch-size 16 --epochs 8",
    "simsiam without stop-gradient": "simsiam.py --epochs 3 --no-stop-grad",
    "byol": "byol.py --batch-size 32 --base-tau 0.8 --warmup-epochs 1 --base-lr 2",
    "byol, blur and solarization, small images in a folder":
        "byol.py --data FOLDER --recipe demo --batch-size 16 --base-tau 0.8 --warmup-epochs 1 "
        "--epochs 8 --blur-prob 1 0.1 --solarize-prob 0 0.2 --base-lr 2",
    "byol with negatives":
        "byol.py --batch-size 20 --base-tau 0.8 --warmup-epochs 1 --beta 1 --base-lr 2",
    "byol, ViT": "byol.py --batch-size 20 --base-tau 0.8 --warmup-epochs 1 --arch vit_mini "
                 "--patch-size 8 --optimizer adamw --base-lr 1e-3 --weight-decay 0.03",
    "byol finetune": "byol.py finetune --init none --data demo --batch-size 20 --base-lr 0.5",
    "moco_v3": f"moco_v3.py --batch-size 100 {MOCO}",
    "moco_v3, ResNet": "moco_v3.py --recipe cifar-resnet --arch resnet10 --width 0.25 "
                       f"--hidden-dim 256 --batch-size 20 {MOCO}",
    "moco_v3, learned patch projection": "moco_v3.py --patch-projection learned --batch-size 20 "
                                         f"--clip-patch-grad 0.01 {MOCO}",
    "moco_v3, ViT-BN": f"moco_v3.py --mlp-norm batch --batch-size 20 {MOCO}",
    "simclr_v2": "simclr_v2.py --epochs 3 --base-lr 0.2 --batch-size 32",
    "simclr_v2 with a memory": "simclr_v2.py --epochs 3 --base-lr 0.2 --batch-size 16 --queue 128",
    "simclr_v2 with selective kernels": "simclr_v2.py --epochs 3 --sk --arch resnet50 --width 0.25 "
                                        "--batch-size 8 --base-lr 0.05",
    "simclr_v2 with v1's head and lr": "simclr_v2.py --epochs 3 --head-layers 2 --lr-rule linear "
                                       "--batch-size 16 --base-lr 0.3 --blur-prob 0.5",
    "simclr_v2 finetune": "simclr_v2.py finetune --init none --data demo --labels 0.02",
    "dcl": "dcl.py --epochs 3 --batch-size 32",
    "dclw": "dcl.py --epochs 3 --loss dclw --batch-size 16",
    "dcl queue": "dcl.py --epochs 3 --loss infonce --queue 64 --batch-size 16",
}


def write_folder(root: Path) -> Path:
    """40 images of 32 px from numpy's frozen RandomState."""
    random = np.random.RandomState(0)
    root.mkdir()
    for i in range(40):
        coarse = random.randint(0, 256, (3, 4, 4)).repeat(8, 1).repeat(8, 2)
        x = np.clip(coarse + random.randint(-20, 21, (3, 32, 32)), 0, 255).astype(np.uint8)
        torchvision.io.write_png(torch.from_numpy(x), str(root / f"{i:02}.png"))
    return root


def result(out: Path) -> tuple[list[float], dict[str, float]]:
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    model = torch.load(out / "last.pt")["model"]
    return ([line["loss"] for line in lines if "loss" in line],
            {name: x.double().norm().item() for name, x in model.items()})


@pytest.mark.parametrize("name", RUNS)
def test_twelve_steps_are_the_recorded_ones(name, tmp_path):
    from conftest import program
    script, *flags = f"{RUNS[name]} {COMMON}".split()
    flags = [str(write_folder(tmp_path / "images")) if x == "FOLDER" else x for x in flags]
    assert program(importlib.import_module(script[:-3]))(*flags, "--out", tmp_path / "run") == 0
    losses, norms = result(tmp_path / "run")
    file = json.loads(FILE.read_text())
    recorded = file["runs"][name]
    # A queue's first keys are drawn in float32, and other versions of torch round them otherwise.
    near = 1e-7 if "--queue" in RUNS[name] and file["torch"][:4] != torch.__version__[:4] else 1e-9
    assert recorded["command"] == RUNS[name] and len(losses) == 12
    assert losses == pytest.approx(recorded["losses"], rel=0, abs=near)
    assert norms.keys() == recorded["norms"].keys() and len(norms) > 40
    for key, norm in norms.items():  # Adam makes weights of 1e-10 of gradients that are rounding
        assert norm == pytest.approx(recorded["norms"][key], rel=near, abs=near), key


if __name__ == "__main__":
    checkout = Path(sys.argv[1]).resolve()
    commit = subprocess.check_output(["git", "-C", checkout, "rev-parse", "HEAD"], text=True)
    runs = json.loads(FILE.read_text())["runs"] if FILE.exists() else {}
    runs = {name: run for name, run in runs.items() if run["command"] == RUNS.get(name)}
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder, "images"))
        for number, (name, command) in enumerate(RUNS.items()):
            if name in runs:  # delete the file to record all again
                continue
            script, *flags = f"{command} {COMMON}".replace("FOLDER", f"{folder}/images").split()
            out = Path(folder, str(number))
            subprocess.run([sys.executable, checkout / script, *flags, "--out", out], check=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
            losses, norms = result(out)
            runs[name] = {"command": command, "losses": losses, "norms": norms}
    FILE.write_text(json.dumps({"commit": commit.strip(), "torch": torch.__version__, "runs": runs},
                               separators=(",", ":")).replace('},"', '},\n"') + "\n")
