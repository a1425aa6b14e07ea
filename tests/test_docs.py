"""The README tells the truth about commands, options and files."""

import importlib
import json
import re
import shlex
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S)).replace("\\\n", " ")
COMMANDS = [line.split("#")[0].strip() for line in BLOCKS.splitlines()]
SCRIPT = re.compile(r"\b(super\w+)\.py\b")
SCRIPTS = [line for line in COMMANDS if SCRIPT.search(line) and "diff" not in line]


@pytest.mark.parametrize("line", SCRIPTS)
def test_every_command_of_the_readme_parses(line):
    """Its options exist and fit together; its files are left out."""
    words, script = shlex.split(line), SCRIPT.search(line)[1]
    options = words[words.index(f"{script}.py") + 1 :]
    missing = ("--sample", "--resume", "--init")
    keep = [k for k, o in enumerate(options) if {o, options[k - 1]}.isdisjoint(missing)]
    try:
        assert importlib.import_module(script).parse([options[k] for k in keep])
    except SystemExit as leave:
        assert leave.code == 0 and "--help" in line


def test_the_readme_has_commands_to_check():
    assert len(SCRIPTS) >= 20
    named = {SCRIPT.search(line)[1] for line in SCRIPTS}
    assert named == {path.stem for path in ROOT.glob("super*.py")}


def test_the_table_of_the_ideas_is_what_was_measured():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    compare = importlib.import_module("compare")
    results = ROOT / "benchmarks" / "results" / "compare-digits.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    rows = compare.readme_rows(lines, 1650)
    assert len(rows) == len(compare.ARMS)
    for row in rows:
        assert row in README.splitlines()
    text = results.with_suffix(".txt").read_text()
    for decay in (False, True):
        assert compare.table(lines, 1650, decay) in text


def test_ci_does_what_the_readme_says():
    lines = (ROOT / ".ci" / "run").read_text().replace("python3", "python")
    lines = lines.replace("install -q", "install").splitlines()
    assert next(line for line in COMMANDS if "pip install" in line) in lines
    assert any(line.startswith("python -m pytest") for line in lines)
    assert "python -m pytest" in COMMANDS


def test_every_link_of_the_documents_leads_somewhere():
    for name in ("README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
            assert link.startswith("https://") or (ROOT / link).exists(), link


def test_every_requirement_has_a_lower_bound_and_a_reason():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    for line in (line for line in lines if line and not line.startswith("#")):
        assert re.fullmatch(r"[a-z-]+>=[\d.]+\s+# .+", line), line
