"""The documents tell the truth about commands, options and files, in two languages."""

import ast
import importlib
import re
import runpy
import shlex
import sys

import numpy as np
import pytest
import torch.distributed.run
import tyro
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.append(str(ROOT / "notebooks"))
import compare

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README_zh.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
SCALE = (ROOT / "benchmarks" / "SCALE.md").read_text(encoding="utf-8")
BOTH = README, CHINESE
STORED = ROOT / "benchmarks" / "results"


def shell(text):
    """Return the commands in a document, one a line, without comments."""
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, re.S)).replace("\\\n", " ")
    return [line.split("#")[0].strip() for line in blocks.splitlines()]


def typed(script):
    """Return the commands in the docstring of a script, without their comments."""
    text = ast.get_docstring(ast.parse((ROOT / script).read_text()))
    found = re.findall(r"^    ((?:python|torchrun) .*?)(?:  .*)?$", text, re.M)
    return [line.replace("FILE", "last.pt") for line in found]


PYTHON = [line for text in (README, SCALE) for line in shell(text) if ".py" in line]
SCRIPTS = [*sorted(path.name for path in ROOT.glob("*.py")), "benchmarks/compare.py"]
PYTHON += [line for script in SCRIPTS for line in typed(script)]


@pytest.mark.parametrize("line", [x for x in PYTHON if "git diff" not in x])
def test_every_command_parses(line):
    """Those of the scripts, of prepare.py and the benchmarks, and torchrun's own."""
    words = shlex.split(line)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    module = importlib.import_module(words[at].split("/")[-1].removesuffix(".py"))
    options = [word.replace("$", "") for word in words[at + 1 :]]
    known = getattr(module, "Config", None) or getattr(module, "Options", None)
    if known is not None:
        tyro.cli(known, args=options)
    if "torchrun" in words:
        own = words[words.index("torchrun") + 1 :]
        args = torch.distributed.run.get_args_parser().parse_args(own)
        assert args.training_script == words[at]


def test_the_readme_is_short_and_shows_every_script_and_notebook():
    assert len(README.split()) <= 1500
    assert len([row for row in README.splitlines() if row.startswith("| [")]) <= 26
    links = set(re.findall(r"\]\(([^)#]+)\)", README))
    wanted = [*ROOT.glob("super*.py"), *ROOT.glob("notebooks/*.ipynb")]
    assert {str(path.relative_to(ROOT)) for path in wanted} <= links


@pytest.mark.parametrize(
    "name, steps, n", [("digits", 0, 16), ("faces16", 1800, 8), ("mnist28", 1500, 6)]
)
def test_the_tables_of_the_ideas_are_what_was_measured(name, steps, n):
    lines = compare.read(STORED / f"compare-{name}.jsonl")
    rows = compare.readme_rows(lines, steps, ("log frechet net", "nats"))
    assert len(rows) == n
    for row in rows:
        assert row in RESULTS.splitlines()


def test_ci_does_what_the_readme_says():
    lines = (ROOT / ".ci" / "run").read_text().replace("python3", "python")
    lines = lines.replace("install -q", "install").replace(" --all -q", " --all")
    lines = [line.split(" --durations")[0] for line in lines.splitlines()]
    wanted = [line for line in shell(README) if "pip" in line or "--all" in line]
    assert len(wanted) == 3 and {*wanted} <= {*lines}


def test_every_link_of_the_documents_leads_somewhere():
    names = "README.md README_zh.md RESULTS.md CONTRIBUTING.md tests/README.md "
    for name in (names + "benchmarks/SCALE.md").split():
        text, folder = (ROOT / name).read_text(encoding="utf-8"), (ROOT / name).parent
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("https://") or (folder / link).exists(), link


def test_the_table_of_tests_names_tests_options_and_every_script():
    text = (ROOT / "tests" / "README.md").read_text()
    sources = (path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    there = set(re.findall(r"^def (test_\w+)", "".join(sources), re.M))
    rows = re.findall(r"^\| ([A-F]\d+) \|(.*)\|(.*)\|(.*)\|$", text, re.M)
    assert len({row[0] for row in rows}) >= 45
    for number, _, where, tests in rows:
        named = set(re.findall(r"`(test_\w+)`", tests))
        assert named and named <= there, (number, named - there)
        for span in re.findall(r"`([^`]+)`", where):
            words = span.split()
            assert (ROOT / words[0]).exists() or words[0] == "metrics.csv", span
            if script := re.match(r"(super\w+|prepare)\.py", words[0]):
                fields = importlib.import_module(script[1]).Config.__dataclass_fields__
                said = {o.replace("-", "_") for o in re.findall(r"--([\w-]+)", span)}
                assert said <= {*fields, "help"}, (number, said - {*fields})
    scripts = {path.name for path in ROOT.glob("super*.py")}
    assert scripts <= set(re.findall(r"super\w+\.py", text))


def test_every_requirement_has_a_lower_bound_and_a_reason():
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = (ROOT / name).read_text().splitlines()
        for line in (line for line in lines if line and line[0] not in "#-"):
            assert re.fullmatch(r"[a-z-]+>=[\d.]+\s+# .+", line), line


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


def test_the_table_of_the_toy_is_what_was_measured():
    toy = runpy.run_path(str(ROOT / "benchmarks" / "toy.py"))
    runs = toy["read"](STORED / "toy.jsonl").values()
    final = {(run["arm"], run["H"], run["steps"]): run for run in runs if "F2" in run}
    found = re.search(r"^\| .*stuck.*\n(?:\|.*\n)+", RESULTS, re.M)[0]
    head, _, *rows = found.splitlines()
    cases = re.findall(r"(\d+) channels, (\d+),(\d+) steps", head)
    cases = [(int(H), int(a + b)) for H, a, b in cases]
    assert len(cases) == 5 and len(rows) == len(final) / 5
    for row in rows:
        arm, *cells = row.strip("| ").split(" | ")
        for case, cell in zip(cases, cells, strict=True):
            run, plain = (final[name, *case] for name in (arm, "uniform"))
            word = f" {toy['compare'](run['excess'], plain['excess'])[2]}"
            stuck = sum(share < 0.5 for share in run["F2"])
            mean = f"{np.mean(run['excess']):.3f}{word if arm != 'uniform' else ''}"
            assert cell == f"{mean}, {stuck}", (arm, case)


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
    assert chinese == english and len(english) >= 15


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
    source = code(CHINESE, "sh")
    comments = re.findall(r"#.*", "".join(source))
    assert comments and all(map(HAN.search, comments))
