"""Where the scripts are not about their method they are copies of each other; this keeps them so.

A copy carries the comment `# same as simsiam.py` (the script that has the first) above it and must
equal it to the letter, comments included. To change a function, edit the first and run

    python tests/test_copies.py --fix
"""

import ast
import difflib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("simsiam.py", "moco_v3.py", "byol.py", "dcl.py", "simclr_v2.py")  # first come, first kept
DIFFERENT = {  # names that mean the same in every script and are each script's own
    "SCRIPT", "RECIPE_NAMES", "PRETRAIN", "LINEAR", "FINETUNE", "TABLES", "CHOICES", "ENCODER", "augment",
    "build_encoder", "build_optimizer", "read_official", "check", "train_step", "pretrain", "main",
}
MARK = re.compile(r"# same as (\w+\.py)$")


def definitions(path: Path) -> dict[str, tuple[str, int, int, str | None]]:
    """Top-level functions, classes and constants: name -> (source, first line, last line, mark)."""
    lines, found = path.read_text().splitlines(), {}
    for node in ast.parse(path.read_text()).body:
        name = getattr(node, "name", None)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
        if name:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
            mark = MARK.match(lines[first - 1]) if first else None
            found[name] = ("\n".join(lines[first:node.end_lineno]), first, node.end_lineno,
                           mark and mark[1])
    return found


def problems(folder: Path, fix: bool = False) -> list[str]:
    """What is wrong with the copies in this folder's scripts, a diff or a sentence each."""
    wrong = []
    scripts = {name: folder / name for name in SCRIPTS if (folder / name).exists()}
    found = {name: definitions(path) for name, path in scripts.items()}
    for number, (script, names) in enumerate(found.items()):
        lines = scripts[script].read_text().splitlines()
        for name, (source, first, last, mark) in reversed(names.items()):
            earlier = [other for other in list(found)[:number] if name in found[other]]
            if mark is None:
                if earlier and name not in DIFFERENT:
                    wrong.append(f"{script}: {name} stands in {earlier[0]} too; mark it "
                                 f"`# same as {earlier[0]}`, or give it a name of its own")
                continue
            if earlier[:1] != [mark]:
                wrong.append(f"{script}: {name} is marked as {mark}'s, which is not the first to "
                             "have it")
                continue
            original = found[mark][name][0]
            if source != original and fix:
                lines[first:last] = original.splitlines()
                scripts[script].write_text("\n".join(lines) + "\n")
            elif source != original:
                wrong.append("\n".join(difflib.unified_diff(
                    original.splitlines(), source.splitlines(), mark, script, lineterm="")))
    return wrong


def sections(path: Path) -> list[str]:
    return re.findall(r"^# -{20,} (.+)$", path.read_text(), re.M)


def test_copies_are_the_same_to_the_letter():
    if wrong := problems(ROOT):
        pytest.fail("\n".join(wrong), pytrace=False)


@pytest.mark.parametrize("script", [name for name in SCRIPTS if (ROOT / name).exists()])
def test_sections_come_in_one_order(script):
    order = sections(ROOT / "simsiam.py")
    shared = [name for name in sections(ROOT / script) if name in order]
    assert shared == [name for name in order if name in shared] and len(shared) >= 10


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "simsiam.py").write_text("A = 1\n\n\ndef f(x):\n    return x  # why\n")
    return tmp_path


def test_a_true_copy_passes_and_a_drifted_one_is_shown_and_mended(folder):
    copy = folder / "byol.py"
    copy.write_text("B = 1\n\n\n# same as simsiam.py\ndef f(x):\n    return x  # why\n\n\nC = 2\n")
    assert problems(folder) == []
    copy.write_text(copy.read_text().replace("# why", "# because"))  # a comment is a difference
    assert len(problems(folder)) == 1 and "-    return x  # why" in problems(folder)[0]
    problems(folder, fix=True)
    assert problems(folder) == [] and copy.read_text().endswith("# why\n\n\nC = 2\n")


def test_an_unmarked_twin_is_reported(folder):
    (folder / "byol.py").write_text("def f(x):\n    return -x\n\n\ndef main():\n    return 3\n")
    (folder / "dcl.py").write_text("def main():\n    return 4\n")  # meant to differ
    assert [w for w in problems(folder) if "f stands in simsiam.py too" in w] == problems(folder) != []


def test_a_mark_that_names_the_wrong_script_is_reported(folder):
    (folder / "byol.py").write_text("# same as dcl.py\ndef f(x):\n    return x  # why\n")
    assert "not the first" in problems(folder)[0]


if __name__ == "__main__":
    left = problems(ROOT, fix="--fix" in sys.argv)
    print("\n".join(left) or "all copies are the same")
    sys.exit(bool(left))
