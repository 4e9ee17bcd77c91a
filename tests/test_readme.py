"""README promises nothing that no log has, and shows no command that does not parse."""

import functools
import importlib
import json
import re
import shlex
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_copies import SCRIPTS, definitions

METHODS = {name: importlib.import_module(name.removesuffix(".py")) for name in SCRIPTS
           if (ROOT / name).exists()}
README = (ROOT / "README.md").read_text()
LOGS = sorted((ROOT / "results").rglob("*.jsonl"))


def lines(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_every_accuracy_that_is_ours_is_the_logs():
    rows = re.findall(r"^\| (\w+).*?\| (?:([\d.]+) % )?\| ([\d.]+) % \|.*?\]\((results/[^)]+)\)", README,
                      re.M)
    assert len(rows) == README.count("| [log](results/") >= 40
    for kind, first, last, log in rows:
        values = [line["knn" if kind == "kNN" else "top1"] for line in lines(ROOT / log)
                  if ("knn" if kind == "kNN" else "top1") in line]
        assert first == (f"{100 * values[0]:.1f}" if len(values) > 1 else ""), log
        assert last == f"{100 * values[-1]:.1f}", log


@pytest.mark.parametrize("log", LOGS, ids=lambda log: log.name)
def test_every_log_says_how_it_was_made_and_can_be_made_again(log):
    first = lines(log)[0]
    assert {"config", "versions", "hardware", "command", "commit"} <= first.keys()
    script, *words = shlex.split(first["command"])
    method = METHODS[script.rsplit("/")[-1]]
    args = method.parse_args(words)
    method.check(args)  # settles what the flags leave open
    for name in args.fields:  # a recipe that has changed since needs a new run
        if name == "ema_momentum" and not getattr(args, "queue", 1):
            continue  # without a queue there is no such encoder
        if args.stage == "distill" and name not in args.given and name in (
                *method.ENCODER, "labels", "temperature"):
            continue  # the teacher has brought it
        value = getattr(args, name)
        assert first["config"][name] == (list(value) if isinstance(value, tuple) else value), name
    folder = log.parent.relative_to(ROOT)
    known = README + (ROOT / "results" / "README.md").read_text()
    assert log.name in known or str(folder) != "results" and str(folder) in known


def test_the_study_of_batch_sizes_is_its_logs_mean_and_spread_over_seeds():
    rows = re.findall(r"^\| (InfoNCE|DCL|DCLW) \| (\d+) \| (\S+) ± (\S+) \((\d)\) \| (\S+) ± (\S+) \| "
                      r"(\S+) ± (\S+) \|$", README, re.M)
    assert len(rows) == 7
    for loss, batch, knn, knn_std, seeds, *q in rows:
        runs = [lines(log) for log in sorted((ROOT / "results" / "dcl-study").glob(
            f"{loss.lower()}-{batch}-*.jsonl"))]
        assert len(runs) == int(seeds) and {run[0]["config"]["seed"] for run in runs} == {0, 1, 2}
        for name, scale, digits, found in (("knn", 100, 1, [knn, knn_std]), ("q_mean", 1, 2, q[:2]),
                                           ("q_cv", 1, 2, q[2:])):
            values = [[line[name] for line in run if name in line][-1] for run in runs]
            assert found == [f"{scale * f(values):.{digits}f}" for f in (np.mean, functools.partial(
                np.std, ddof=1))], (loss, batch, name)


def test_the_commands_of_the_study_are_those_of_its_logs():
    text = (ROOT / "results" / "dcl_study.sh").read_text()
    for name, value in reversed(re.findall(r'^(\w+)="(.*)"$', text, re.M)):
        text = re.sub(rf"\${name}\b", lambda match, value=value: value, text)
    text = re.sub(r"\$\{DATA[^}]*\}", "/tmp/data/cifar10-10k", text)
    listed = {command.rsplit("/", 1)[1]: shlex.split(command)[1:] for command in re.findall(
        r"^python (?!results).*$", text, re.M)}
    logs = {log.stem: shlex.split(lines(log)[0]["command"]) for log in LOGS
            if log.parent.name == "dcl-study"}
    assert listed.keys() == logs.keys() and len(logs) == 39
    for name, words in logs.items():  # the order of the flags is the script's own
        assert sorted(words) == sorted(listed[name]), name


def commands():
    text = README + "".join(method.__doc__ for method in METHODS.values())
    scripts = "|".join(METHODS).replace(".", r"\.")
    found = re.findall(rf"(?:python|torchrun[^\n]*?) ((?:{scripts})\b[^\n`#]*)",
                       re.sub(r"\\\n\s*", " ", text))
    return sorted({command.strip() for command in found})


@pytest.mark.parametrize("command", commands())
def test_every_command_shown_parses(command):
    script, *words = shlex.split(command)
    assert (ROOT / script).exists()
    METHODS[script].parse_args(words)


@pytest.mark.parametrize("script", METHODS)
def test_enough_commands_were_found(script):
    assert len([command for command in commands() if command.startswith(script)]) >= 5


LINK = re.compile(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)-L(\d+)\)")


def true_lines(match) -> str:
    """A link to the lines of a definition, as they are now."""
    name, script = match.group(1, 2)
    _, first, last, _ = definitions(ROOT / script)[name]
    return f"[`{name}`]({script}#L{first + 1}-L{last})"


def test_the_map_from_paper_to_lines_is_true():
    """`python tests/test_readme.py --fix` renews it."""
    links = [*LINK.finditer(README)]
    assert {match[2] for match in links} == set(METHODS) and len(links) >= 40
    assert [match[0] for match in links] == [true_lines(match) for match in links]


def test_the_files_named_exist():
    for name in re.findall(r"\]\(((?:results/|\w+\.py)[^)#]*)", README):
        assert (ROOT / name).exists(), name


def test_the_scripts_stay_self_contained():
    """Nothing but the standard library, torch, torchvision, numpy and common: to be pasted."""
    import ast
    import sys
    ours = {"torch", "torchvision", "numpy", "common"}
    for script, extra in (*((name, ours) for name in METHODS), ("common.py", {"torch"})):
        for node in ast.walk(ast.parse((ROOT / script).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in extra | set(sys.stdlib_module_names), (script, name)


if __name__ == "__main__" and "--fix" in sys.argv:
    (ROOT / "README.md").write_text(LINK.sub(true_lines, README))
