"""What prevents collapse, by training: the demo's own images and recipe, a narrower network."""

import contextlib
import io

import pytest
from conftest import program, records

import byol
import simsiam

RUNS = {"healthy": [], "no stop-gradient": ["--no-stop-grad"],
        "no predictor": ["--predictor", "none"]}


def train(script, steps, out, flags):
    """The last three log lines, ten steps apart, of the demo stopped early; and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert program(script)("--width", 0.125, "--precision", "fp32", "--steps", steps,
                               "--log-every", 10, "--knn-every", 0, "--device", "cpu", "--out", out,
                               *flags) == 0
    return records(out)[-3:], said.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {name: train(simsiam, 120, tmp_path_factory.mktemp("run"), flags)
            for name, flags in RUNS.items()}


def mean(lines, name):
    return sum(line[name] for line in lines) / len(lines)


@pytest.mark.parametrize("broken", ["no stop-gradient", "no predictor"])
def test_without_stop_gradient_or_predictor_the_rank_falls_to_1(broken, runs):  # Sec. 4.1, 4.2
    logs = {name: lines for name, (lines, _) in runs.items()}
    assert [line["step"] for line in logs[broken]] == [100, 110, 120]
    assert mean(logs["healthy"], "rank") > 3 and mean(logs[broken], "rank") < 1.5
    # The loss alone would call the broken one better (Sec. 4.1, footnote 4), and the std is blind.
    assert mean(logs[broken], "loss") < mean(logs["healthy"], "loss")
    assert mean(logs[broken], "std") > 0.4
    assert "The output has collapsed" in runs[broken][1]
    assert "collapsed" not in runs["healthy"][1]


def test_byol_without_its_predictor_ends_in_fewer_dimensions(tmp_path):  # BYOL, Table 5b
    fast = ["--batch-size", "50", "--base-lr", "4", "--warmup-epochs", "0.3"]
    healthy, broken = (train(byol, 61, tmp_path / name, [*fast, *flags])[0] for name, flags in (
        ("with", []), ("without", ["--predictor", "none"])))
    assert len(healthy) == len(broken) == 3
    assert mean(healthy, "rank") > 5 > 2.5 > mean(broken, "rank")
    assert mean(healthy, "std") > mean(broken, "std") + 0.2  # BYOL's output is free to shrink
    assert mean(broken, "loss") < mean(healthy, "loss") - 0.5
