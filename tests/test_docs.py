"""The README tells the truth about commands, options and files, in two languages."""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
import torch.distributed.run
import tyro
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import compare

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README_zh.md").read_text(encoding="utf-8")
BOTH = README, CHINESE
RESULTS = ROOT / "benchmarks" / "results"
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
    results = RESULTS / "compare-digits.jsonl"
    lines = compare.read(results)
    columns = [(False, "held_loss"), (True, "held_loss")]
    rows = compare.readme_rows(lines, 0, columns)
    assert len(rows) == len(compare.ARMS)
    for row in rows:
        assert row in README.splitlines() and row in CHINESE.splitlines()
    text = results.with_suffix(".txt").read_text()
    for decay in (False, True):
        assert compare.table(lines, 0, decay) in text


@pytest.mark.parametrize("name, steps", [("mnist", 500), ("faces16", 2000)])
def test_the_tables_of_larger_images_are_what_was_measured(name, steps):
    results = RESULTS / f"compare-{name}.jsonl"
    lines = compare.read(results)
    rows = compare.readme_rows(
        lines, steps, [(True, "held_loss"), (True, "frechet net")]
    )
    assert len(rows) >= 5
    for row in rows:
        assert row in README.splitlines() and row in CHINESE.splitlines()
    floor = next(line["floor"] for line in lines if "floor" in line)["frechet net"]
    assert f"{floor:.3f}" in README
    assert compare.table(lines, steps, True) in results.with_suffix(".txt").read_text()


def test_ci_does_what_the_readme_says():
    lines = (ROOT / ".ci" / "run").read_text().replace("python3", "python")
    lines = lines.replace("install -q", "install").splitlines()
    assert next(line for line in COMMANDS if "pip install" in line) in lines
    assert any(line.startswith("python -m pytest") for line in lines)
    assert "python -m pytest" in COMMANDS


def test_every_link_of_the_documents_leads_somewhere():
    names = "README.md README_zh.md CONTRIBUTING.md tests/README.md benchmarks/SCALE.md"
    for name in names.split():
        text, folder = (ROOT / name).read_text(encoding="utf-8"), (ROOT / name).parent
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("https://") or (folder / link).exists(), link


def test_the_table_of_tests_names_tests_options_and_every_script():
    text = (ROOT / "tests" / "README.md").read_text()
    sources = (path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    there = set(re.findall(r"^def (test_\w+)", "".join(sources), re.M))
    rows = re.findall(r"^\| ([A-E]\d+) \|(.*)\|(.*)\|(.*)\|$", text, re.M)
    assert len({row[0] for row in rows}) == 45
    for number, _, where, tests in rows:
        named = set(re.findall(r"`(test_\w+)`", tests))
        assert named and named <= there, (number, named - there)
        for span in re.findall(r"`([^`]+)`", where):
            name = span.split()[0].rstrip("/")
            assert (ROOT / name).exists() or name in "metrics.csv loss_curves.png"
            if script := SCRIPT.search(span):
                fields = importlib.import_module(script[1]).Config.__dataclass_fields__
                said = {o.replace("-", "_") for o in re.findall(r"--([\w-]+)", span)}
                assert said <= {*fields, "help"}, (number, said - {*fields})
    assert set(SCRIPT.findall(text)) == {path.stem for path in ROOT.glob("super*.py")}


def test_every_requirement_has_a_lower_bound_and_a_reason():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    for line in (line for line in lines if line and not line.startswith("#")):
        assert re.fullmatch(r"[a-z-]+>=[\d.]+\s+# .+", line), line


# ---- benchmarks/SCALE.md -----------------------------------------------------------

SCALE = (ROOT / "benchmarks" / "SCALE.md").read_text(encoding="utf-8")
SHELL = re.findall(r"```sh\n(.*?)```", SCALE, re.S)
AT_SCALE = [
    line for line in "".join(SHELL).replace("\\\n", " ").splitlines() if ".py" in line
]


@pytest.mark.parametrize("line", AT_SCALE)
def test_every_command_of_the_page_on_scale_parses(line):
    """Those of the scripts, of the benchmarks, and torchrun's own options."""
    words = shlex.split(line)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, options = words[at].split("/")[-1].removesuffix(".py"), words[at + 1 :]
    if SCRIPT.search(line):
        keep = [
            k for k, o in enumerate(options) if "--resume" not in (o, options[k - 1])
        ]
        assert importlib.import_module(script).parse([options[k] for k in keep])
    else:
        tyro.cli(importlib.import_module(script).Options, args=options)
    if "torchrun" in words:
        own = words[words.index("torchrun") + 1 :]
        args = torch.distributed.run.get_args_parser().parse_args(own)
        assert args.training_script == words[at]


def test_the_page_on_scale_has_commands_to_check_and_bash_reads_its_job(tmp_path):
    assert len(AT_SCALE) >= 8 and sum("torchrun" in line for line in AT_SCALE) == 3
    [job] = [block for block in SHELL if block.startswith("#!/bin/bash")]
    (tmp_path / "job").write_text(job)
    assert subprocess.run(["bash", "-n", tmp_path / "job"]).returncode == 0
    nodes = re.search(r"gpus-per-node=(\d+)", job)[1]
    assert f"--nproc_per_node={nodes} " in job and "--ntasks-per-node=1\n" in job


def test_the_costs_on_paper_are_those_of_cost_py():
    """As stored, and as counted anew."""
    cost = importlib.import_module("cost")
    text = (RESULTS / "cost.txt").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "\n".join(rows) in SCALE and len(rows) == 14
    sizes = cost.SIZES[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "SIZES", sizes)
        assert cost.table((32, 64, 128), 0) == rows[:5]


def test_the_table_of_speed_is_what_was_measured():
    result = json.loads((RESULTS / "speed.json").read_text())
    [pair] = result["pairs"]
    row = f"| {result['device']} | {pair['n_feat']} | {pair['batch']} |"
    for kind in ("loop", "bare, eager", "plain"):
        one = next(one for one in pair["rows"] if one["what"] == kind)
        row += f" {one['images_per_s']:.1f} |"
    row += " {:.1%} ({:.1%} to {:.1%}) |".format(*pair["rows"][0]["cost"])
    assert row in SCALE.splitlines()
    figures = row.split(f"| {pair['batch']} |")[1]
    assert any(line.endswith(figures) for line in README.splitlines())
    assert (
        SCALE.count("| GPU | ") == 4 == SCALE.count("| not measured | not measured |")
    )


# ---- README_zh.md says the same as README.md ---------------------------------------

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
LINK = re.compile(r"\]\(([^)]+)\)")
SPAN = re.compile(r"`[^`]+`")
HAN = re.compile(r"[\u4e00-\u9fff]")


def blocks(text):
    """Return all headings, paragraphs, items, tables and code blocks as (kind, text).

    The kind is what the block begins with: "##", "-", "1.", "|", "```sh"; else "text".
    """
    found, start = [], 0
    for fence in [*FENCE.finditer(text), None]:
        prose = text[start : fence.start() if fence else len(text)]
        # a heading or an item ends what stands above it, as an empty line does
        for block in re.split(r"\n\s*\n|\n(?=#+ |- |\d+\. )", prose):
            if block := block.strip():
                mark = re.match(r"(#+|-|\d+\.)(?= )|\|", block)
                found.append((mark[0] if mark else "text", block))
        if fence:
            found.append((f"```{fence[1]}", fence[2]))
            start = fence.end()
    return found


def code(text, language):
    return [block for kind, block in blocks(text) if kind == f"```{language}"]


def tables(text):
    """Return the cells of every row of every table."""
    found = [block.splitlines() for kind, block in blocks(text) if kind == "|"]
    return [[row.strip()[1:-1].split("|") for row in table] for table in found]


def commands(text):
    """Return the lines of all sh blocks without comments and empty lines."""
    lines = "".join(code(text, "sh")).splitlines()
    lines = [re.sub(r"(^|\s+)#.*", "", line) for line in lines]
    return [line for line in lines if line]


def numbers(text):
    return sorted(re.findall(r"\d+(?:[.,]\d+)*", text))


def test_the_two_readmes_lead_to_each_other():
    assert README.startswith("# superminddpm\n\n[中文版](README_zh.md)\n\n")
    assert CHINESE.startswith("# superminddpm\n\n[English](README.md)\n\n")


def test_the_chinese_readme_has_the_same_commands():
    english, chinese = map(commands, BOTH)
    assert chinese == english and len(english) >= len(SCRIPTS)


def test_the_chinese_readme_has_the_same_python():
    english, chinese = (
        [ast.dump(ast.parse(c)) for c in code(t, "python")] for t in BOTH
    )
    assert chinese == english != []


def test_the_chinese_readme_has_the_same_links_and_images():
    english, chinese = (sorted(LINK.findall(text)) for text in BOTH)
    english.remove("README_zh.md")
    chinese.remove("README.md")
    assert chinese == english
    english, chinese = (re.findall(r"!\[[^]]*\]\(([^)]+)\)", text) for text in BOTH)
    assert chinese == english != []


def test_the_chinese_readme_is_built_the_same_way():
    """The same headings, paragraphs, items, tables and code in the same order."""
    english, chinese = ([kind for kind, _ in blocks(text)] for text in BOTH)
    assert chinese == english
    english, chinese = ([[len(r) for r in table] for table in tables(t)] for t in BOTH)
    assert chinese == english != []


def test_the_chinese_readme_has_the_same_figures_and_names():
    """Cell by cell in the tables, paragraph by paragraph elsewhere; code in `` too."""
    for english, chinese in zip(*map(tables, BOTH), strict=True):
        for row, other in zip(english, chinese, strict=True):
            for cell, same in zip(row, other, strict=True):
                assert numbers(same) == numbers(cell), other
                assert sorted(SPAN.findall(same)) == sorted(SPAN.findall(cell)), other
    for (kind, block), (_, same) in zip(*map(blocks, BOTH), strict=True):
        if not kind.startswith(("`", "|")):
            assert numbers(same) == numbers(block), same
            assert sorted(SPAN.findall(same)) == sorted(SPAN.findall(block)), same


def test_nothing_in_the_chinese_readme_is_left_in_english():
    for kind, block in blocks(CHINESE):
        if kind.startswith("`"):
            continue
        text = LINK.sub("]", SPAN.sub("``", block))
        assert not re.search(r"([A-Za-z]+[,.:;]? +){6}[A-Za-z]", text), block
        if kind != "|" and len(block) > 60:
            assert HAN.search(text), block
    source = code(CHINESE, "sh") + code(CHINESE, "python")
    comments = re.findall(r"#.*", "".join(source))
    assert comments and all(map(HAN.search, comments))
