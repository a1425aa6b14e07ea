"""The README tells the truth about commands, options and files."""

import re
import shlex

import pytest
from conftest import ROOT

from superminddpm import parse

README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S)).replace("\\\n", " ")
COMMANDS = [line.split("#")[0].strip() for line in BLOCKS.splitlines()]
SCRIPTS = [line for line in COMMANDS if "superminddpm.py" in line]


@pytest.mark.parametrize("line", SCRIPTS)
def test_every_command_of_the_readme_parses(line):
    """Its options exist and fit together; its files are left out."""
    words = shlex.split(line)
    options = words[words.index("superminddpm.py") + 1 :]
    missing = ("--sample", "--resume", "--init")
    keep = [k for k, o in enumerate(options) if {o, options[k - 1]}.isdisjoint(missing)]
    try:
        assert parse([options[k] for k in keep])
    except SystemExit as leave:
        assert leave.code == 0 and "--help" in line


def test_the_readme_has_commands_to_check():
    assert len(SCRIPTS) >= 10


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
