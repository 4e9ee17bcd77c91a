"""dcl.py as a program, in short: ranks, kill and resume, q_B in the log, the queue, mistakes."""


import pytest
import torch
from conftest import (
    assert_close_runs, assert_one_sentence, assert_same_weights, kill_at_step, losses, program,
    records, run, weights)

import dcl

SMALL = ["--recipe", "demo", "--width", "0.125", "--image-size", "16", "--dim", "8", "--hidden-dim",
         "16", "--batch-size", "16", "--workers", "0", "--knn-every", "0", "--precision", "fp32",
         "--log-every", "1"]
main = program(dcl)


@pytest.fixture(scope="module")
def trained(classes, tmp_path_factory):
    """Two epochs of three steps on 48 images of three classes, 16 px."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main("--data", classes, *SMALL, "--epochs", 2, "--knn-every", 1, "--out", out) == 0
    return out


@pytest.mark.parametrize("flags", [["--loss", "dclw"], ["--queue", "32", "--loss", "infonce"]],
                         ids=["dclw", "queue"])
def test_two_processes_are_the_same_run_as_one(flags, classes, tmp_path):
    args = ["--data", classes, *SMALL, *flags, "--precision", "fp64", "--steps", "4"]
    assert main(*args, "--out", tmp_path / "one") == 0
    run("dcl.py", *args, "--out", tmp_path / "two", processes=2)
    assert_close_runs(tmp_path / "one", tmp_path / "two", 4, "q_mean", "q_cv", "q_below_0.1", "dcl",
                      "infonce")


def test_local_negatives_are_another_run_and_their_number_is_said(classes, tmp_path, capfd):
    args = ["--data", classes, *SMALL, "--precision", "fp64", "--steps", "1", "--negatives"]
    for which, count in (("local", 14), ("global", 30)):
        said = run("dcl.py", *args, which, "--out", tmp_path / which, processes=2)
        assert f"dcl: {count} negatives an anchor, batch 16" in said
    assert losses(tmp_path / "local") != losses(tmp_path / "global")


@pytest.mark.parametrize("flags", [[], ["--queue", "32"]], ids=["batch", "queue"])
def test_a_killed_run_ends_with_the_same_bits(flags, classes, tmp_path):
    args = ["--data", classes, *SMALL, "--epochs", "12", *flags]
    if flags:  # the queue is in the checkpoint: a pause shows it as a kill does
        assert main(*args, "--steps", 17, "--out", tmp_path / "killed") == 0
    else:
        assert 0 < kill_at_step(10, "dcl.py", *args, out=tmp_path / "killed", fork=True) < 36
    for name in ("killed", "whole"):
        assert main(*args, "--out", tmp_path / name) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 36
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    assert [line["step"] for line in records(tmp_path / "killed", "q_histogram")] == [1, 4, 18, 36]


def test_the_log_holds_q_and_both_losses_whatever_is_trained(classes, tmp_path):
    for loss in ("infonce", "dcl", "dclw"):
        assert main("--data", classes, *SMALL, "--loss", loss, "--steps", 2, "--out",
                    tmp_path / loss) == 0
    first = {loss: records(tmp_path / loss)[0] for loss in ("infonce", "dcl", "dclw")}
    for name in ("q_mean", "q_std", "q_cv", "q_below_0.1", "dcl", "infonce"):
        assert len({line[name] for line in first.values()}) == 1, name  # one network, one batch
    assert first["dcl"]["loss"] == pytest.approx(first["dcl"]["dcl"], abs=1e-5)
    assert first["infonce"]["loss"] == pytest.approx(first["infonce"]["infonce"], abs=1e-5)
    assert len({line["loss"] for line in first.values()}) == 3


def test_histograms_of_q_count_every_anchor_so_far(trained):
    lines = records(trained, "q_histogram")
    assert [(line["step"], line["share"]) for line in lines] == [(1, 0.1), (3, 0.5), (6, 1.0)]
    assert all(len(line["q_histogram"]) == 50 and sum(line["q_histogram"]) == 32 * line["step"]
               for line in lines)


def test_a_histogram_covers_the_last_steps_of_its_window():
    coupling = dcl.CouplingMonitor(window=2)
    for q in (0.01, 0.31, 0.99):
        coupling.add(torch.full((4,), q).logit())
    counts = coupling.histogram()
    assert sum(counts) == 8 and counts[15] == counts[49] == 4


def test_histograms_of_a_run_cover_4096_anchors_at_least(tmp_path, monkeypatch, capsys):
    def show(window):
        raise dcl.UserError(f"window {window}")

    monkeypatch.setattr(dcl, "CouplingMonitor", show)
    for queue, window in ((0, 22), (96, 43)):  # 4096 / 192 and 4096 / 96, rounded up
        out = ["--out", tmp_path / f"{queue}"]
        assert main(*SMALL, "--batch-size", 96, "--queue", queue, *out) == 2
        assert f"window {window}\n" in capsys.readouterr().err


def test_q_in_the_log_is_the_mean_of_the_steps_since_the_line_before(classes, tmp_path):
    args = ["--data", classes, *SMALL, "--epochs", 3, "--steps", 7]
    assert main(*args, "--out", tmp_path / "each") == 0
    assert main(*args, "--log-every", 100, "--out", tmp_path / "epoch") == 0
    each = [line["q_cv"] for line in records(tmp_path / "each")]
    found = {line["step"]: line["q_cv"] for line in records(tmp_path / "epoch")}
    assert found[5] == pytest.approx(sum(each[3:6]) / 3) and found[0] == pytest.approx(each[0])


def test_later_stages_take_the_runs_architecture(trained, classes, photos, tmp_path):
    assert main("linear", "--init", trained / "last.pt", "--data", classes, "--batch-size", 24,
                "--epochs", 1, "--workers", 0, "--out", tmp_path / "linear") == 0
    assert records(tmp_path / "linear", "top1")
    assert main("embed", "--init", trained / "encoder.pt", "--data", photos, "--workers", 0, "--out",
                tmp_path / "embed") == 0
    assert torch.load(tmp_path / "embed" / "features.pt")["features"].shape == (40, 64)


def test_pretraining_from_an_encoder_alone_starts_the_momentum_encoder_as_its_copy(
        trained, classes, tmp_path):
    assert main("--data", classes, *SMALL, "--queue", 32, "--steps", 1, "--base-lr", 1e-9, "--init",
                trained / "encoder.pt", "--out", tmp_path) == 0
    state = weights(tmp_path)
    for name in ("conv1.weight", "layer4.0.bn2.weight"):
        torch.testing.assert_close(state[f"key_encoder.{name}"], state[f"encoder.{name}"])


MISTAKES = {
    "a queue of no whole batches": ("--queue 70 --batch-size 64", "a multiple of --batch-size 64"),
    "a queue as long as an epoch": ("--queue 4096 --batch-size 64", "no less than an epoch"),
    "a queue just as long": ("--queue 3968 --batch-size 64", "no less than an epoch"),  # 62 steps
    "a weight for the queue": ("--queue 128 --loss dclw", "has no form for a queue"),
    "sigma of another loss": ("--sigma 0.3", "would change nothing here"),
    "negatives of a queue": ("--queue 128 --negatives local", "would change nothing here"),
    "momentum without a queue": ("--ema-momentum 0.9", "would change nothing here"),
    "a head without a hidden layer": ("--hidden-dim 0", "without a hidden layer"),
    "one image": ("--batch-size 1", "2 at least"),
    "an unknown loss": ("--loss ntxent", "invalid choice: 'ntxent'"),
    "temperature of 0": ("--temperature 0", "above 0"),
    "another method's official file": ("linear --init {r}/official.pth", "none of DCL"),
    "too narrow": ("--width 0.0625", "0.125 is the least"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence_and_exit_code_2(mistake, trained, tmp_path, capsys):
    flags, sentence = MISTAKES[mistake]
    if "official" in flags:
        torch.save({"arch": "resnet50", "state_dict": {}}, trained / "official.pth")
    assert main(*flags.format(r=trained).split(), "--out", tmp_path / "out") == 2
    assert_one_sentence(capsys, sentence)


def test_stl10_has_a_recipe_of_its_own():
    args = dcl.parse_args(["--data", "stl10"])
    assert (args.recipe, args.image_size) == ("stl10", 96)


def test_the_weights_of_dclw_are_in_the_log_and_1_on_average_of_all_processes(classes, tmp_path):
    args = ["--data", classes, *SMALL, "--loss", "dclw", "--precision", "fp64", "--steps", "2"]
    for negatives in ("global", "local"):
        run("dcl.py", *args, "--negatives", negatives, "--out", tmp_path / negatives, processes=2)
        for line in records(tmp_path / negatives):
            assert line["w_min"] < line["w_mean"] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("flags", [["--head-bn"], ["--no-head-bn"]])
def test_the_head_and_the_queue_are_those_of_the_flags(flags, classes, tmp_path):
    assert main("--data", classes, *SMALL, *flags, "--hidden-dim", 24, "--dim", 6, "--queue", 32,
                "--steps", 1, "--out", tmp_path) == 0
    state = weights(tmp_path)
    head = {name: tuple(x.shape) for name, x in state.items() if name.startswith("projector")
            and name.endswith("weight")}
    assert [*head.values()] == ([(24, 64), (24,), (6, 24)] if flags == ["--head-bn"]
                                else [(24, 64), (6, 24)])
    assert state["queue"].shape == (32, 6) and state["oldest"] == 16


def test_linear_evaluation_takes_its_flags(trained, classes, tmp_path, monkeypatch):
    args = ["linear", "--init", trained / "last.pt", "--data", classes, "--batch-size", 24,
            "--epochs", 1, "--workers", 0, "--log-every", 1]
    runs = {"plain": [], "crop": ["--crop-min", 1], "larc": ["--optimizer", "larc"],
            "parts": ["--accumulate", 3],
            "sgd": ["--momentum", 0.5, "--weight-decay", 0.25, "--base-lr", 2]}
    real, sizes = dcl.LinearProbe.forward, {name: [] for name in runs}
    for name, flags in runs.items():
        monkeypatch.setattr(dcl.LinearProbe, "forward", lambda net, x, name=name: (
            sizes[name].append(len(x)), real(net, x))[1])
        assert main(*args, *flags, "--out", tmp_path / name) == 0
    assert sizes["plain"] == [24] * 2 and sizes["parts"] == [8] * 6
    group = torch.load(tmp_path / "sgd" / "last.pt")["optimizer"]["param_groups"][0]
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.25)
    assert records(tmp_path / "sgd")[0]["lr"] == 2 * 24 / 256
    assert losses(tmp_path / "crop")[0] != losses(tmp_path / "plain")[0]
    assert losses(tmp_path / "larc")[0] == losses(tmp_path / "plain")[0]  # the first step's weights
    assert losses(tmp_path / "larc")[1:] != losses(tmp_path / "plain")[1:]


def test_flags_of_the_machinery_reach_it(classes, photos, tmp_path, monkeypatch):
    votes, saved, compiled, workers = [], [], [], []
    accuracy, save, loader = dcl.knn_accuracy, dcl.Run.save, dcl.DataLoader
    monkeypatch.setattr(dcl, "knn_accuracy", lambda bank, there, queries, here, k, temperature: (
        votes.append((k, temperature)), accuracy(bank, there, queries, here, k, temperature))[1])
    monkeypatch.setattr(dcl.Run, "save", lambda *a, **state: (
        saved.append(state["step"]), save(*a, **state)))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compiled.append(net))
    monkeypatch.setattr(dcl, "DataLoader", lambda *a, **how: (
        workers.append(how["num_workers"]), loader(*a, **how))[1])
    args = ["--data", classes, *SMALL, "--steps", 2, "--base-lr", 1e-30]
    assert main(*args, "--knn-every", 1, "--knn-k", 3, "--knn-temperature", 0.5, "--save-every", 0,
                "--compile", "--out", tmp_path / "a") == 0
    assert (votes, saved, len(compiled)) == ([(3, 0.5)], [1, 2, 2], 1)
    assert main(*args, "--seed", 1, "--out", tmp_path / "b") == 0
    assert (len(votes), saved[3:], len(compiled)) == (1, [2, 2], 1)  # without the flags
    name = "encoder.conv1.weight"
    assert not torch.equal(weights(tmp_path / "a")[name], weights(tmp_path / "b")[name])
    assert workers == []  # these images live in memory
    assert main("embed", "--init", tmp_path / "a" / "encoder.pt", "--data", photos, "--workers", 1,
                "--out", tmp_path / "c") == 0
    assert workers == [1]
