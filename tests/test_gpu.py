"""A training step never waits for the GPU, seen on a GPU that does not exist (fake_gpu.py)."""

import json

import pytest
from conftest import CAN_FAKE_A_GPU

pytestmark = pytest.mark.skipif(
    not CAN_FAKE_A_GPU, reason="needs Linux, a CUDA build of torch 2.14 or newer, cc and nm")
MOST = {  # launches of a step
    "simsiam": 760, "simsiam photos": 1400, "simsiam of 4 processes": 1900, "simsiam linear": 170,
    "simsiam linear larc": 180,
    "byol": 1150, "byol linear": 170, "byol finetune": 560,
    "moco_v3": 1400, "moco_v3 learned, clipped": 1450,
    "moco_v3 ResNet": 1250, "moco_v3 linear": 350,
    "simclr_v2": 560, "simclr_v2 queue": 720,
    "simclr_v2 linear": 170, "simclr_v2 finetune": 310, "simclr_v2 distill": 460,
    "dcl": 480, "dcl queue": 590}


@pytest.fixture(scope="module")
def runs(fake_gpu):
    output, errors = fake_gpu.communicate()
    assert fake_gpu.returncode == 0, errors[-3000:]
    return {title: json.loads(found) for title, found in (
        line.split(": ", 1) for line in output.splitlines())}


@pytest.mark.parametrize("title", MOST)
def test_a_step_waits_for_nothing_and_launches_little(runs, title):
    assert runs[title]["waits"] == {}
    launches = sum(runs[title]["launches"].values())
    assert MOST[title] / 2 < launches <= MOST[title], runs[title]["launches"]


def test_every_run_is_tested(runs):
    assert runs.keys() == {*MOST, "simsiam planted"}


def test_batch_norm_is_synchronized(runs):
    layers = 2 * (20 + 3)  # of ResNet-18 and the heads, for each view
    assert runs["simsiam of 4 processes"]["launches"]["collectives"] == 2 * layers  # and backward
    assert "collectives" not in runs["simsiam"]["launches"]


def test_planted_waits_are_told(runs):
    waits = runs["simsiam planted"]["waits"]
    assert len(waits) == 4 and set(waits.values()) == {1}, waits
    for reason in ("reads a value", "copies to the GPU, blocking", "131072 bytes", "index"):
        assert reason in str(waits)
