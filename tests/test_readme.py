"""README promises nothing that no log has, and shows no command that does not parse."""

import ast
import functools
import importlib
import json
import re
import shlex
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_copies import SCRIPTS
from test_copies import definitions as parsed

definitions = functools.cache(parsed)
METHODS = {name: importlib.import_module(name.removesuffix(".py")) for name in SCRIPTS
           if (ROOT / name).exists()}
README = (ROOT / "README.md").read_text()
NOTES = (ROOT / "results" / "README.md").read_text()
LOGS = sorted((ROOT / "results").rglob("*.jsonl"))


def lines(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


# ---------------------------------------------------------------------------- tables and their logs


NUMBER = r"\d+(?:\.\d+)?"
ACCURACY = re.compile(rf"{NUMBER}(?=(?: (?:/|and|to) {NUMBER})* %)")  # 41.6 and 40.7 %: two


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


def same(shown, values):
    """As numbers with one digit: 41.55 is 41.5 or 41.6."""
    return len(shown) == len(values) and all(
        re.fullmatch(r"\d+\.\d", x) and abs(float(x) - y) < 0.0501 for x, y in zip(shown, values))


def wrong_in_row(line, cells, root):
    """What this row says and its log does not, a sentence each."""
    shown = {column: ACCURACY.findall(cell) for column, cell in cells
             if re.match(r"(untrained|trained|ours)\b", column)}
    links = re.findall(r"\[log\]\(([^)]*)\)", line)
    if not links:
        return ["has a number of ours, but no log"] if any(shown.values()) else []
    if len(links) > 1 or not (root / links[0]).is_file():
        return [f"there is no {link}" for link in links if not (root / link).is_file()] or [
            "has more than one log"]
    log, wrong = lines(root / links[0]), []
    kinds = [kind for kind in ("knn", "top1") if any(kind in record for record in log)]
    for column, found in shown.items():
        named = [kind for kind, word in (("knn", "kNN"), ("top1", "top-1"))
                 if word in column or word in cells[0][1]] or kinds
        values = [100 * record[named[0]] for record in log if named[0] in record] \
            if len(named) == 1 else []
        if not values:
            wrong.append(f"kNN or top-1? The log has {' and '.join(kinds) or 'neither'}")
            continue
        first, last = values[:1] * (len(values) > 1), values[-1:]  # once: the first is not known
        allowed = {"untrained": [first], "trained": [last]}.get(column.split(",")[0],
                                                                [last, first + last])
        if not any(same(found, expected) for expected in allowed):
            wrong.append(f"{column} is {' and '.join(found) or 'empty'}; the log has "
                         f"{' and '.join(map('{:.1f}'.format, allowed[0])) or 'none'}")
    if not any(shown.values()):
        wrong.append("has a log, but no accuracy of it")
    for found in re.findall(rf"raw pixels: ({NUMBER}) %", line):
        if not same([found], [100 * x["knn_pixels"] for x in log if "knn_pixels" in x]):
            wrong.append(f"raw pixels {found} is not the log's")
    for column, cell in cells:
        if column.endswith(" at the end"):
            end = [record for record in log if "loss" in record][-1]
            for name, found in zip(column.removesuffix(" at the end").split(", "), cell.split(", "),
                                   strict=True):
                if found != f"{end[name]:.{len(found.partition('.')[2])}f}":
                    wrong.append(f"{name} is {found}; the log has {end[name]}")
    command = bare(log[0]["command"])
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


def wrong_rows(text, root=ROOT):
    return [f"{line}\n    {sentence}" for line, cells in rows(text)
            for sentence in wrong_in_row(line, cells, root)]


def test_every_number_of_ours_in_a_table_is_its_logs():
    if wrong := wrong_rows(README):
        pytest.fail("README.md:\n" + "\n".join(wrong), pytrace=False)
    assert sum("[log](" in line for line, _ in rows(README)) == README.count("[log](") >= 40


TRUE = """| | setting | untrained | trained | rank, std at the end | log |
|---|---|---|---|---|---|
| kNN | `python x.py`, `--lr 1` (raw pixels: 14.8 %) | 30.8 % | 81.2 % | 3.8, 0.94 | \
[log](results/a.jsonl) |
| top-1 | once | | 50.0 % | 3.8, 0.94 | [log](results/b.jsonl) |
| top-1 | elsewhere | | not run | | |

| method | paper | ours | command | log |
|---|---|---|---|---|
| X | 91.8 % | 81.2 % | `python x.py` | [log](results/a.jsonl) |
| X | 91 % | 30.8 to 81.2 % | `torchrun x.py --lr 1 --data y --out o` | [log](results/a.jsonl) |
"""


@pytest.mark.parametrize("true, false, sentence", [
    ("81.2 % | 3.8", "81.3 % | 3.8", "trained is 81.3; the log has 81.2"),
    ("30.8 % |", "30.9 % |", "untrained is 30.9; the log has 30.8"),
    ("30.8 % |", "|", "untrained is empty; the log has 30.8"),
    ("once | |", "once | 50.0 % |", "untrained is 50.0; the log has none"),
    ("| kNN", "| top-1", "kNN or top-1? The log has knn"),
    ("14.8", "14.9", "raw pixels 14.9 is not"),
    ("3.8, 0.94 | [log](results/a", "3.8, 0.95 | [log](results/a", "std is 0.95; the log has 0.94"),
    ("`--lr 1`", "`--lr 2`", "`--lr 2` is not in the log's command, x.py --lr 1 --data"),
    ("`python x.py`", "`python y.py`", "`python y.py` is not in the log's command"),
    ("`python x.py`", "`python x.py --data cifar10`", "is not in the log's command"),
    ("--out o", "--seed 1", "is not in the log's command"),
    ("91.8 % | 81.2", "91.8 % | 91.8", "ours is 91.8; the log has 81.2"),
    ("30.8 to 81.2", "30.9 to 81.2", "ours is 30.9 and 81.2; the log has 81.2"),
    ("b.jsonl", "c.jsonl", "there is no results/c.jsonl"),
    ("[log](results/b.jsonl)", "", "has a number of ours, but no log"),
    ("50.0 %", "much", "has a log, but no accuracy of it"),
    ("[log](results/b.jsonl)", "[log](results/b.jsonl) [log](results/a.jsonl)", "more than one"),
])
def test_a_table_that_is_not_true_is_told_with_its_row(true, false, sentence, tmp_path):
    (tmp_path / "results").mkdir()
    end = {"loss": 1, "rank": 3.8123, "std": 0.9412}
    knn = [{"knn": value} for value in (0.308, 0.5, 0.812)]
    for name, records in (("a", [{"knn_pixels": 0.148}, *knn]), ("b", [{"top1": 0.5}])):
        first = {"command": "/home/me/x.py --lr 1 --data /tmp/here --out runs/1"}
        (tmp_path / "results" / f"{name}.jsonl").write_text("\n".join(map(json.dumps,
                                                                         [first, end, *records])))
    assert wrong_rows(TRUE, tmp_path) == [] and true in TRUE
    wrong = "\n".join(wrong_rows(TRUE.replace(true, false, 1), tmp_path))
    assert sentence in wrong
    row = next(new for old, new in zip(TRUE.splitlines(), TRUE.replace(true, false, 1).splitlines())
               if old != new)
    assert row in wrong


def test_the_numbers_before_numbered_links_are_those_of_the_logs():
    """41.6 and 40.7 % ([1](...), [2](...)): the last of the numbers, one a log."""
    found, count = re.findall(rf"({NUMBER}(?:(?: / | and ){NUMBER})*) %\s*"
                              r"\(((?:\[\d\]\([^)]*\)[,\s]*)+)\)", README), 0
    for numbers, links in found:
        logs = re.findall(r"\((results/[^)]*)\)", links)
        last = [[100 * x["top1"] for x in lines(ROOT / log) if "top1" in x][-1] for log in logs]
        assert same(re.findall(NUMBER, numbers)[-len(logs):], last), (numbers, last, logs)
        count += len(logs)
    assert count == len(re.findall(r"\[\d\]\(results/", README)) > 0


def test_the_speeds_are_the_benchmarks():
    """A ratio's numbers stand in one line of a benchmark, the rows of a table as they are in it."""
    text = "\n".join(file.read_text() for file in (ROOT / "results").glob("benchmark*.txt"))
    measured = [[*map(float, re.findall(r" (\d+(?:\.\d+)?(?:e\+\d+)?)(?![\d.])", line))]
                for line in text.replace(",", "").splitlines()]
    ratios, whole = 0, 0
    for line, cells in rows(README):
        head = [column for column, _ in cells]
        if head in (["", "ours", "other", "ratio"], ["", "ours", "lightly", "ratio"]):
            shown = [re.findall(NUMBER, cell.replace(",", ""))[-1] for _, cell in cells[1:]]
            halves = [0.501 * 10.0 ** -len(x.partition(".")[2]) for x in shown]
            assert any(all(any(abs(float(x) - y) <= half for y in found)
                           for x, half in zip(shown, halves)) for found in measured), line
            ratios += 1
        elif head[:2] == ["method", "kNN: ours"]:
            shown = [float(re.search(NUMBER, cell)[0]) for _, cell in cells[1:]]
            assert any({*shown} <= {*found} for found in measured), line
            whole += 1
        elif head[:2] == ["script", "images/s"]:
            assert line in text.splitlines(), line
            whole += 1
    assert ratios >= 15 and whole >= 14


@pytest.mark.parametrize("text", [README, NOTES], ids=["README.md", "results/README.md"])
def test_the_study_of_batch_sizes_is_its_logs_mean_and_spread_over_seeds(text):
    found = re.findall(r"^\| (InfoNCE|DCL|DCLW) \| (\d+) \| (\S+) ± (\S+) \((\d)\) "
                       r"\| (\S+) ± (\S+) \| (\S+) ± (\S+) \|$", text, re.M)
    assert len(found) == 7 == text.count("(3) |")
    for loss, batch, knn, knn_std, seeds, *q in found:
        runs = [lines(log) for log in sorted((ROOT / "results" / "dcl-study").glob(
            f"{loss.lower()}-{batch}-*.jsonl"))]
        assert len(runs) == int(seeds) and {run[0]["config"]["seed"] for run in runs} == {0, 1, 2}
        for name, scale, digits, shown in (("knn", 100, 1, [knn, knn_std]), ("q_mean", 1, 2, q[:2]),
                                           ("q_cv", 1, 2, q[2:])):
            values = [[line[name] for line in run if name in line][-1] for run in runs]
            assert shown == [f"{scale * f(values):.{digits}f}" for f in (np.mean, functools.partial(
                np.std, ddof=1))], (loss, batch, name)


# ----------------------------------------------------------------------------------------- commands


def settings(method, words):
    """What a command runs with. Folders of images and the files of --init need not exist."""
    args = method.parse_args(words)
    if hasattr(method, "settle"):  # the new form
        args.init, args.data = "none", args.data or "demo"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.path.isdir", lambda path: "/" in path)
            config = method.settle(args).config
        if not config.get("queue", 1):
            del config["ema_momentum"]  # no queue, no such encoder
        return config
    method.check(args)  # settles what the flags leave open
    return {name: getattr(args, name) for name in args.fields if not (
        name == "ema_momentum" and not getattr(args, "queue", 1)  # no queue, no such encoder
        or args.stage == "distill" and name not in args.given and name in (
            *method.ENCODER, "labels", "temperature"))}  # the teacher has brought it


@pytest.mark.parametrize("log", LOGS, ids=lambda log: log.name)
def test_every_log_says_how_it_was_made_and_can_be_made_again(log):
    first = lines(log)[0]
    assert {"config", "versions", "hardware", "command", "commit"} <= first.keys()
    script, *words = shlex.split(first["command"])
    method = METHODS[script.rsplit("/")[-1]]
    options = [[]]
    if hasattr(method, "settle") and "--init" in words and "--recipe" not in words:
        options = [["--recipe", name] for name in method.RECIPES["linear"]]  # --init's: unknown
    wrong = []
    for more in options:  # a recipe that has changed needs a new run
        now = {name: [*x] if isinstance(x, tuple) else x
               for name, x in settings(method, words + more).items()
               if name not in ("data", "init") and not (more and name in method.ENCODER)}
        wrong.append([name for name in now if first["config"].get(name, "not there") != now[name]])
    assert [] in wrong, wrong
    folder = log.parent.relative_to(ROOT)
    assert log.name in README + NOTES or str(folder) != "results" and str(folder) in README + NOTES


def study():
    """The study's commands as the shell would see them, by run."""
    text = (ROOT / "results" / "dcl_study.sh").read_text()
    for name, value in reversed(re.findall(r'^(\w+)="(.*)"$', text, re.M)):
        text = re.sub(rf"\${name}\b", lambda match, value=value: value, text)
    text = re.sub(r"\$\{DATA[^}]*\}", "/tmp/data/cifar10-10k", text)
    found = re.findall(r"^python (?!results).*$", text, re.M)
    return {command.rsplit("/", 1)[1]: command.removeprefix("python ") for command in found}


def test_the_commands_of_the_study_are_those_of_its_logs():
    logs = {log.stem: lines(log)[0]["command"] for log in LOGS if log.parent.name == "dcl-study"}
    assert study().keys() == logs.keys() and len(logs) == 39
    for name, command in study().items():  # the order of the flags is the script's own
        assert sorted(shlex.split(command)) == sorted(shlex.split(logs[name])), name


def commands():
    """What README, results/README, docstrings and the study tell to run: {command: where}."""
    texts = {"README.md": README, "results/README.md": NOTES,
             **{name: method.__doc__ for name, method in METHODS.items()}}
    scripts, found = "|".join(METHODS).replace(".", r"\."), {}
    for place, text in texts.items():
        for command in re.findall(rf"(?:python|torchrun[^\n]*?) ((?:{scripts})\b[^\n`#|]*)",
                                  re.sub(r"\\\n\s*", " ", text)):
            found.setdefault(command.strip(), place)
    return found | dict.fromkeys(study().values(), "results/dcl_study.sh")


def refusal(method, words):
    """What the script's parser and its checks of values have against this command."""
    try:
        settings(method, words)
    except (getattr(method, "UserError", SystemExit), SystemExit) as error:
        return str(error) or "refused"


@pytest.mark.parametrize("command", commands())
def test_every_command_shown_parses(command):
    script, *words = shlex.split(command)
    if (error := refusal(METHODS[script], words)) is not None:
        pytest.fail(f"{commands()[command]}: {command}\n    {error}", pytrace=False)


@pytest.mark.parametrize("script", METHODS)
def test_enough_commands_were_found(script):
    assert sum(command.startswith(script) for command in commands()) >= 5


@pytest.mark.parametrize("words", ["--nothing 1", "--recipe nothing", "--arch resnet51",
                                   "--epochs many", "nothing", "--seed", "--epochs 0"])
@pytest.mark.parametrize("script", METHODS)
def test_a_command_that_does_not_parse_is_told(script, words):
    assert refusal(METHODS[script], words.split()) and refusal(METHODS[script], []) is None


def flags():
    """The flags in the tables of each script's section: (script, flags)."""
    for section in re.split(r"^## ", README, flags=re.M):
        scripts = re.findall(r"^python (\w+\.py)", section, re.M)
        for line, _ in rows(section) if scripts else ():
            for quoted in re.findall(r"`([^`]*)`", line):
                if "--" in quoted and ".py" not in quoted:
                    yield scripts[0], quoted


@pytest.mark.parametrize("script, words", [*dict.fromkeys(flags())])
def test_every_flag_in_a_table_is_one_of_its_script(script, words):
    method, errors = METHODS[script], []
    for stage in getattr(method, "STAGES", 0) or method.TABLES:
        needs = {"pretrain": [], "distill": ["--teacher", "x"]}.get(stage, ["--init", "none"])
        try:
            method.parse_args([*([stage] if words.startswith("--") else []), "--data",
                               "/data/imagenet", *needs, *words.split()])
            return
        except (getattr(method, "UserError", SystemExit), SystemExit) as error:
            errors.append(str(error))
    pytest.fail(f"README.md: {script} {words}\n    " + "\n    ".join(errors), pytrace=False)


# ---------------------------------------------------------------------------- the map, and the rest


def test_the_names_in_the_map_are_defined_where_it_says():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", README)
    assert {script for _, script in links} - {"common.py"} == set(METHODS) and len(links) >= 40
    assert [] == [(name, script) for name, script in links if name not in definitions(ROOT / script)]


def test_the_files_named_exist():
    for name in re.findall(r"\]\(((?:results/|\w+\.py)[^)#]*)", README):
        assert (ROOT / name).exists(), name


def test_the_scripts_stay_self_contained():
    """Nothing but the standard library, torch, torchvision, numpy and common: to be pasted."""
    ours = {"torch", "torchvision", "numpy", "common"}
    for script, extra in (*((name, ours) for name in METHODS), ("common.py", {"torch"})):
        for node in ast.walk(ast.parse((ROOT / script).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in extra | set(sys.stdlib_module_names), (script, name)
