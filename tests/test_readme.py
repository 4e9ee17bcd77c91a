"""README and results/README.md promise nothing that no log has, and show no command that fails."""

import ast
import functools
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, program, write_images
from test_copies import SCRIPTS
from test_copies import definitions as parsed

definitions = functools.cache(parsed)
METHODS = {name: importlib.import_module(name.removesuffix(".py")) for name in SCRIPTS}
README = (ROOT / "README.md").read_text()
NOTES = (ROOT / "results" / "README.md").read_text()
LOGS = sorted((ROOT / "results").rglob("*.jsonl"))


def lines(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def rows(text):
    """Every row of every table: the line, and its cells by column."""
    for table in re.findall(r"(?:^\|.*\n)+", text + "\n", re.M):
        head, _, *cells = [[cell.strip() for cell in line.strip().strip("|").split("|")]
                           for line in table.splitlines()]
        for line, found in zip(table.splitlines()[2:], cells):
            yield line, [*zip(head, found, strict=True)]


def bare(command):
    """A command's words without what differs from place to place: launcher, folder, --out."""
    words = shlex.split(command)
    if not any(word.endswith(".py") for word in words):
        return words
    words = words[[word.endswith(".py") for word in words].index(True):]
    words[0] = words[0].rsplit("/")[-1]
    for flag in {"--data", "--out"} & {*words}:
        place = words.index(flag)
        words[place:place + 2] = [flag] * (flag == "--data")
    return words


def wrong_in_row(line, cells, root):
    """What this row says and its logs do not, a sentence each. With several logs (seeds): the mean
    and the range of each number."""
    shown = {column: re.findall(r"\d+\.\d", cell) for column, cell in cells
             if re.match(r"(untrained|trained|ours)\b", column)}
    links = re.findall(r"\[(?:log|\d)\]\(([^)]*)\)", line)
    if not links:
        return ["has a number of ours, but no log"] if any(shown.values()) else []
    if missing := [link for link in links if not (root / link).is_file()]:
        return [f"there is no {link}" for link in missing]
    logs, wrong = [lines(root / link) for link in links], []
    word = "top1" if "top-1" in line else "knn"
    values = [[100 * x[word] for x in log if word in x] for log in logs]
    if not all(values):
        return [f"has a log without {word}"]
    for column, found in shown.items():
        ends = np.array([x[0 if column == "untrained" else -1] for x in values])
        expected = [ends.mean(), ends.min(), ends.max()] if len(logs) > 1 else [*ends]
        if not found and column == "untrained":
            continue
        if len(found) != len(expected) or not all(
                abs(float(x) - y) < 0.0501 for x, y in zip(found, expected)):
            wrong.append(f"{column} is {found}; the logs have {np.round(expected, 1).tolist()}")
    for column, cell in cells:  # monitors, at the end of a run
        ends = [x[-1] for x in ([line[column] for line in log[1:] if column in line]
                                for log in logs) if x]
        expected = [np.mean(ends), min(ends), max(ends)][:3 if len(ends) > 1 else 1] if ends else []
        if [f"{x:.2f}" for x in expected] != re.findall(r"-?\d+\.\d\d", cell) and ends:
            wrong.append(f"{column} is {cell}; the logs have {np.round(expected, 2).tolist()}")
    command = bare(logs[0][0]["command"])
    for quoted in re.findall(r"`([^`]*)`", line):
        words = bare(quoted)
        if quoted.startswith(("python ", "torchrun ")):
            found = command[:len(words)] == words
        else:
            found = not quoted.startswith("--") or any(command[i:i + len(words)] == words
                                                       for i in range(len(command)))
        if not found:
            wrong.append(f"`{quoted}` is not in the log's command, {' '.join(command)}")
    return wrong


def wrong_rows(text, root):
    return [f"{line}\n    {sentence}" for line, cells in rows(text)
            for sentence in wrong_in_row(line, cells, root)]


@pytest.mark.parametrize("text, root", [(README, ROOT), (NOTES, ROOT / "results")],
                         ids=["README.md", "results/README.md"])
def test_every_number_of_ours_in_a_table_is_its_logs(text, root):
    if wrong := wrong_rows(text, root):
        pytest.fail("\n".join(wrong), pytrace=False)
    assert sum("jsonl)" in line for line, _ in rows(NOTES)) >= 40


TRUE = """| | setting | untrained | trained | log |
|---|---|---|---|---|
| kNN | `python x.py`, `--lr 1` | 30.8 % | 81.2 % | [log](a.jsonl) |
| kNN | three | 30.8 % (30.8 to 30.8) | 71.2 % (61.2 to 81.2) | [1](a.jsonl), [2](c.jsonl) |
| top-1 | once | | 50.0 % | [log](b.jsonl) |
| top-1 | elsewhere | | not run | |
"""


@pytest.mark.parametrize("true, false, sentence", [
    ("81.2 % | [log", "81.3 % | [log", "trained is ['81.3']; the logs have [81.2]"),
    ("30.8 % | 81", "30.9 % | 81", "untrained is ['30.9']"),
    ("71.2 %", "71.4 %", "trained is ['71.4', '61.2', '81.2']"), ("61.2", "61.9", "trained is"),
    ("`--lr 1`", "`--lr 2`", "`--lr 2` is not in the log's command, x.py --lr 1 --data"),
    ("`python x.py`", "`python y.py`", "`python y.py` is not in the log's command"),
    ("b.jsonl", "d.jsonl", "there is no d.jsonl"), ("top-1 | once", "kNN | once", "without knn"),
    ("[log](b.jsonl)", "", "has a number of ours, but no log")])
def test_a_table_that_is_not_true_is_told_with_its_row(true, false, sentence, tmp_path):
    for name, records in (("a", [{"knn": 0.308}, {"knn": 0.812}]), ("b", [{"top1": 0.5}]),
                          ("c", [{"knn": 0.308}, {"knn": 0.612}])):
        first = {"command": "/home/me/x.py --lr 1 --data /tmp/here --out runs/1"}
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, [first, *records])))
    assert wrong_rows(TRUE, tmp_path) == [] and true in TRUE
    assert sentence in "\n".join(wrong_rows(TRUE.replace(true, false, 1), tmp_path))


def settings(method, words):
    """What a command runs with. Folders of images and the files of --init need not exist."""
    args = method.parse_args(words)
    args.init, args.data = "none", args.data or "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.path.isdir", lambda path: "/" in path)
        config = method.settle(args).config
    if not config.get("queue", 1):
        config.pop("ema_momentum", None)  # no queue, no such encoder
    return config


@pytest.mark.parametrize("log", LOGS, ids=lambda log: log.name)
def test_every_log_says_how_it_was_made_and_can_be_made_again(log):
    first = lines(log)[0]
    assert {"config", "versions", "hardware", "command", "commit"} <= first.keys()
    script, *words = shlex.split(first["command"])
    method = METHODS[script.rsplit("/")[-1]]
    options, wrong, loaded = [[]], [], {"--init", "--teacher"} & {*words}
    given = {"data", "init"} | ({"temperature", "labels"} if "--teacher" in words else set())
    if loaded and "--recipe" not in words:
        options = [["--recipe", name] for name in method.RECIPES["linear"]]  # the file's: unknown
    for more in options if "recipe" not in first["config"] else ():  # a changed recipe: a new run
        now = {name: [*x] if isinstance(x, tuple) else x
               for name, x in settings(method, words + more).items()
               if name not in given and not (loaded and name in method.ENCODER)}
        wrong.append([name for name in now if first["config"].get(name, "not there") != now[name]])
    if "recipe" in first["config"]:  # of an older form, whose recipes its commit has
        assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", first["commit"]) and settings(method, words)
    else:
        assert [] in wrong, wrong
    folder = log.parent.relative_to(ROOT)
    assert log.name in README + NOTES or str(folder) != "results" and folder.name in README + NOTES


@functools.cache
def reproduced():
    """The commands of results/reproduce.sh, by log: {"five/dcl": "dcl.py --recipe cifar ..."}."""
    found = {}
    for section in ("cpu", "gpu") if shutil.which("bash") else ():
        done = subprocess.run(["bash", ROOT / "results" / "reproduce.sh", section, "--commands"],
                              text=True, capture_output=True, check=True)
        for command in re.findall(r"^python (\w+\.py .*)$", done.stdout, re.M):
            found[command.rsplit(" runs/", 1)[1]] = command
    return found


def test_the_logs_are_of_the_commands_that_reproduce_them():
    logs = {name: ROOT / "results" / f"{name}.jsonl" for name in reproduced()}
    run = [name for name, log in logs.items() if log.is_file()]
    assert len(run) >= 60 or not reproduced()
    for name in run:
        made, told = (settings(METHODS[script.rsplit("/")[-1]], words) for script, *words in map(
            shlex.split, (lines(logs[name])[0]["command"], reproduced()[name])))
        assert made | {"data": told["data"], "init": told["init"]} == told, name


def commands():
    """What README, results/README, docstrings and reproduce.sh tell to run: {command: where}."""
    texts = {"README.md": README, "results/README.md": NOTES,
             **{name: method.__doc__ for name, method in METHODS.items()}}
    scripts, found = "|".join(METHODS).replace(".", r"\."), {}
    for place, text in texts.items():
        for command in re.findall(rf"(?:python|torchrun[^\n]*?) ((?:{scripts})\b[^\n`#|]*)",
                                  re.sub(r"\\\n\s*", " ", text)):
            found.setdefault(command.strip(), place)
    return found | dict.fromkeys(reproduced().values(), "results/reproduce.sh")


@pytest.mark.parametrize("command", commands())
def test_every_command_shown_parses(command):
    script, *words = shlex.split(command)
    assert settings(METHODS[script], words)
    assert sum(other.startswith(script) for other in commands()) >= 5
    with pytest.raises(SystemExit):
        settings(METHODS[script], [*words, "--nothing"])


def flags():
    """The flags in the tables of each method's section: (script, flags)."""
    names = {module.__doc__.split(":")[0].lower(): name for name, module in METHODS.items()}
    for section in re.split(r"^#+ ", NOTES, flags=re.M):
        if script := names.get(section.split("\n")[0].lower()):
            for line, _ in rows(section):
                for quoted in re.findall(r"`([^`]*)`", line):
                    if "--" in quoted and ".py" not in quoted:
                        yield script, quoted


@pytest.mark.parametrize("script, words", [*dict.fromkeys(flags())])
def test_every_flag_in_a_table_is_one_of_its_script(script, words, capsys):
    for stage in METHODS[script].STAGES:
        needs = ["--teacher" if stage == "distill" else "--init", "x"] * (stage != "pretrain")
        own = [] if words.startswith(tuple(METHODS[script].STAGES)) else [stage]
        try:
            METHODS[script].parse_args([*own, *words.split(), *needs])
            return
        except SystemExit:
            pass
    pytest.fail(f"{script} {words}\n{capsys.readouterr().err}", pytrace=False)


def test_the_names_in_the_map_are_defined_where_it_says():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", README)
    assert {script for _, script in links} - {"common.py"} == set(METHODS) and len(links) >= 40
    assert [] == [link for link in links if link[0] not in definitions(ROOT / link[1])]


def test_the_files_named_exist():
    for text, root in ((README, ROOT), (NOTES, ROOT / "results")):
        for name in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (root / name).exists(), name
    assert all((ROOT / "tests" / name).exists() for name in re.findall(r"`(test_\w+\.py)`", README))


@pytest.mark.parametrize("number", range(README.count("```python")))
def test_every_snippet_runs(number, tmp_path):
    code = re.findall(r"```python\n(.*?)```", README, re.S)[number]
    if "timm" in code:
        pytest.importorskip("timm")
    write_images(tmp_path / "photos", 9)
    run = re.search(r"runs/(\w+)-photos", code)
    flags = {"simsiam": "--arch resnet50 --width 1 --no-small-images",
             "moco_v3": "--arch vit_small --image-size 224 --patch-size 16"}[run[1]]
    program(METHODS[f"{run[1]}.py"])(
        *"--recipe demo --workers 0 --batch-size 2 --steps 1 --knn-every 0".split(),
        *(flags.split() if "common" not in code else []), "--out", tmp_path / run[0])
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True,
                          cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "neighbors" not in code or (tmp_path / "neighbors.png").stat().st_size > 1000


def test_the_scripts_stay_self_contained():
    """Nothing but the standard library, torch, torchvision, numpy and common: to be pasted."""
    ours = {"torch", "torchvision", "numpy", "common"}
    for script, extra in (*((name, ours) for name in METHODS), ("common.py", {"torch"})):
        for node in ast.walk(ast.parse((ROOT / script).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in extra | set(sys.stdlib_module_names), (script, name)
