"""A training step makes no GPU wait, seen on a GPU that is not there (fake_gpu.py)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

NVRTC = Path(torch.__file__).parent / "lib/libcaffe2_nvrtc.so"
pytestmark = pytest.mark.skipif(
    not (sys.platform == "linux" and torch.version.cuda and NVRTC.exists()
         and shutil.which("gcc") and shutil.which("nm")),
    reason="needs Linux, a CUDA build of torch, gcc and nm")
MOST = {  # launches of a step
    "simsiam": 760, "simsiam, photos": 1400, "simsiam of 4 processes": 1900, "simsiam linear": 180,
    "simsiam linear of 4 processes": 180}


def fake_gpu(*flags):
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "fake_gpu.py"), *flags], text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return {line["run"]: line for line in map(json.loads, done.stdout.splitlines())}


def test_a_step_waits_for_nothing_and_launches_little():
    runs = fake_gpu()
    assert MOST.keys() | {"simsiam, evaluated and saved"} == runs.keys()
    for name, most in MOST.items():
        assert runs[name]["waits"] == {} and most / 2 < runs[name]["launches"] <= most, runs[name]


def test_a_planted_wait_is_told():
    assert "reads a value" in str(fake_gpu("--plant")["simsiam"]["waits"])
