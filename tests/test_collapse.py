"""What prevents collapse, by training: the demo's own images and recipe, a narrower network."""

import pytest
from conftest import finish, records, start

RUNS = {"healthy": ("simsiam", ""), "no stop-gradient": ("simsiam", "--no-stop-grad"),
        "no predictor": ("simsiam", "--predictor none"), "byol": ("byol", ""),
        "byol, no predictor": ("byol", "--predictor none")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The last three log lines, ten steps apart, of the demo stopped early; and what it printed."""
    folder, done = tmp_path_factory.mktemp("runs"), {}
    running = {name: start(f"{method}.py", *flags.split(), "--width", 0.125, "--precision", "fp32",
                           "--steps", 120 if method == "simsiam" else 100, "--log-every", 10,
                           "--knn-every", 0, "--device", "cpu", "--out", folder / name, fork=True)
               for name, (method, flags) in RUNS.items()}
    for name, process in running.items():
        codes, said = finish(process)
        assert codes == [0], said
        done[name] = records(folder / name)[-3:], said
    return done


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


def test_byol_without_its_predictor_ends_in_fewer_dimensions(runs):  # BYOL, Table 5b
    healthy, broken = runs["byol"][0], runs["byol, no predictor"][0]
    assert len(healthy) == len(broken) == 3
    assert mean(healthy, "rank") > 4 > 2.5 > mean(broken, "rank")
    assert mean(healthy, "std") > mean(broken, "std") + 0.3  # BYOL's output is free to shrink
    assert mean(broken, "loss") < mean(healthy, "loss") - 1
