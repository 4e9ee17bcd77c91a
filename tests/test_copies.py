"""Where the scripts are not about their method they are copies of each other; this keeps them so.

A top-level name that stands in two scripts must be the same to the letter, comments included,
unless it is one of DIFFERENT. To change a copy, edit it in the first script and run

    python tests/test_copies.py --fix
"""

import ast
import difflib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("simsiam.py", "dcl.py", "byol.py", "moco_v3.py", "simclr_v2.py")
DIFFERENT = {  # names that mean the same in every script, with each script's own content
    "SCRIPT", "RECIPES", "STAGES", "ENCODER", "ARCHS", "Pretrain", "Linear", "CIFAR", "DEMO",
    "CIFAR_LINEAR", "COLOR_DRAWS", "augment", "build_encoder", "build_optimizer", "train_step",
    "pretrain"}
OWN = {  # and two stages that only some scripts have alike: names by script
    "byol.py": {"linear", "finetune"}, "simclr_v2.py": {"linear", "finetune"}}


def definitions(path: Path) -> dict[str, tuple[str, int, int]]:
    """Top-level functions, classes and constants: name -> (source, line before it, last line)."""
    lines, found = path.read_text().splitlines(), {}
    for node in ast.parse(path.read_text()).body:
        name = getattr(node, "name", None)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
        if name:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
            found[name] = ("\n".join(lines[first:node.end_lineno]), first, node.end_lineno)
    return found


def problems(folder: Path, fix: bool = False) -> list[str]:
    """The copies in the scripts of this folder that are not the same, a diff each."""
    wrong, first_to_have = [], {}
    for script in filter(lambda name: (folder / name).exists(), SCRIPTS):
        lines = (folder / script).read_text().splitlines()
        for name, (source, first, last) in reversed(definitions(folder / script).items()):
            if name in DIFFERENT | OWN.get(script, set()):
                continue
            original, owner = first_to_have.setdefault(name, (source, script))
            if source == original:
                continue
            if fix:
                lines[first:last] = original.splitlines()
                (folder / script).write_text("\n".join(lines) + "\n")
            else:
                wrong.append("\n".join(difflib.unified_diff(
                    original.splitlines(), source.splitlines(), owner, script, lineterm="")))
    return wrong


def sections(path: Path) -> list[str]:
    return re.findall(r"^# -{20,} (.+)$", path.read_text(), re.M)


def test_copies_are_the_same_to_the_letter():
    if wrong := problems(ROOT):
        pytest.fail("\n".join(wrong), pytrace=False)


def test_sections_come_in_one_order():
    order = sections(ROOT / SCRIPTS[0])
    for script in SCRIPTS:
        shared = [name for name in sections(ROOT / script) if name in order]
        assert shared == [name for name in order if name in shared] and len(shared) >= 10, script


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_below_the_plumbing_line_is_about_the_method(script):
    method, plumbing = re.split(r"^# -+ plumbing$", (ROOT / script).read_text(), flags=re.M)
    words = re.findall(r"simsiam|byol|moco|simclr|dcl|predictor|projector", plumbing, re.I)
    assert words == [] and len(plumbing.splitlines()) > 300


@pytest.mark.parametrize("name", [*SCRIPTS, "common.py"])
def test_lines_have_at_most_100_columns(name):
    long = [line for line in (ROOT / name).read_text().splitlines() if len(line) > 100]
    assert long == []


def test_a_true_copy_passes_and_a_drifted_one_is_shown_and_renewed(tmp_path):
    one, two = tmp_path / "simsiam.py", tmp_path / "byol.py"
    one.write_text("A = 1\n\n\ndef f(x):\n    return x  # why\n\n\ndef augment():\n    return 3\n")
    true = "B = 1\n\n\ndef f(x):\n    return x  # why\n\n\ndef augment():\n    return 4\n"
    two.write_text(true)
    assert problems(tmp_path) == []  # augment is meant to differ
    two.write_text(true.replace("# why", "# because"))  # a comment is a difference
    wrong, = problems(tmp_path)
    assert "-    return x  # why" in wrong and "+    return x  # because" in wrong
    problems(tmp_path, fix=True)
    assert problems(tmp_path) == [] and two.read_text() == true


if __name__ == "__main__":
    left = problems(ROOT, fix="--fix" in sys.argv)
    print("\n".join(left) or "all copies are the same")
    sys.exit(bool(left))
