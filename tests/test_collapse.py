"""What prevents collapse, by training: the demo's own images and recipe, a narrower network."""

import json

import pytest

import simsiam

RUNS = {"healthy": [], "no stop-gradient": ["--no-stop-grad"], "no predictor": ["--predictor", "none"]}


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    found = {}
    for name, flags in RUNS.items():
        out = tmp_path_factory.mktemp("run")
        assert simsiam.main(["--width", "0.125", "--precision", "fp32", "--steps", "111", "--log-every",
                             "10", "--knn-every", "0", "--device", "cpu", "--out", str(out), *flags]) == 0
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        found[name] = [line for line in lines if "loss" in line and line["step"] >= 90]
    return found


def mean(lines, name):
    return sum(line[name] for line in lines) / len(lines)


@pytest.mark.parametrize("broken", ["no stop-gradient", "no predictor"])
def test_without_stop_gradient_or_predictor_the_rank_falls_to_1(broken, logs):  # Sec. 4.1, 4.2
    assert len(logs[broken]) == len(logs["healthy"]) == 3
    assert mean(logs["healthy"], "rank") > 3 and mean(logs[broken], "rank") < 1.5
    # The loss alone would call the broken one better (Sec. 4.1, footnote 4), and the std is blind.
    assert mean(logs[broken], "loss") < mean(logs["healthy"], "loss")
    assert mean(logs[broken], "std") > 0.4
