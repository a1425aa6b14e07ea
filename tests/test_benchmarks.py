"""The command lines of benchmarks/: help, wrong words, and stored tables."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.append(str(ROOT / "notebooks"))
import compare
import samplers

import superarch
import superguide
import superminddpm

STORED = ROOT / "benchmarks" / "results"
SOURCES = {path.name: path.read_text() for path in sorted(STORED.parent.glob("*.py"))}
PROGRAMS = [name for name, text in SOURCES.items() if "__main__" in text]


@pytest.fixture
def call(monkeypatch):
    """A function that runs a copy of a benchmark, and returns what it exits with."""
    Path("notebooks").symlink_to(ROOT / "notebooks")
    Path("benchmarks").mkdir()
    for name, text in SOURCES.items():
        Path("benchmarks", name).write_text(text)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(superarch, "ARCHS", {**superarch.ARCHS})  # archs.py adds one

    def run(name, *words):
        path = str(Path("benchmarks", name).absolute())
        monkeypatch.setattr(sys, "argv", [path, *words])
        with pytest.raises(SystemExit) as leave:
            runpy.run_path(path, run_name="__main__")
        return leave.value.code

    return run


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_benchmark_explains_itself_and_writes_nothing(name, call, capsys):
    assert call(name, "--help") == 0
    said = "".join(capsys.readouterr().out.split())
    about = SOURCES[name].split('"""')[1]
    assert "".join(about.split()) in said
    written = {path for path in Path().rglob("*") if path.is_file()}
    assert written == {Path("benchmarks", name) for name in SOURCES}


def checkpoint(path, script, shape=(1, 8, 8), **options):
    """Write the checkpoint of a script that has trained nothing."""
    cfg = {"n_feat": 8, **options}
    net = script.build(script.Config(**cfg), shape).state_dict()
    state = {"script": script.SCRIPT, "config": cfg, "shape": shape, "net": net}
    torch.save({**state, "ema": net}, path)


@pytest.mark.parametrize(
    "line, says",
    [
        ("guidance.py nowhere.pt", "nowhere.pt is no checkpoint of superguide.py"),
        ("guidance.py base.pt", "base.pt is no checkpoint of superguide.py"),
        ("guidance.py plain.pt", "plain.pt does not draw digits of 8x8 by their label"),
        ("samplers.py faces.pt", "faces.pt draws (3, 8, 8), not digits of 8x8"),
        ("samplers.py base.pt --calls 0", "--seeds and --calls are 1 or more"),
        ("archs.py --steps -1", "--steps and --seeds are 1 or more"),
        ("video.py --steps -1", "--steps cannot be -1"),
        ("who.py --cases 64 100", "100 steps are too few for five stages"),
    ],
)
def test_wrong_words_get_one_clear_line(line, says, call, capsys):
    checkpoint("base.pt", superminddpm)
    checkpoint("faces.pt", superminddpm, (3, 8, 8))
    checkpoint("plain.pt", superguide, class_cond=False)
    name, *words = line.split()
    code = call(name, *words)
    assert code.startswith(f"{name}: {says}") and "\n" not in code
    assert capsys.readouterr().out == ""


def test_words_that_nobody_knows_get_the_usage(call):
    for line in ("guidance.py", "objectives.py nothing", "clock.py fast"):
        assert call(*line.split()) == 2


def test_the_tables_of_samplers_have_the_calls_that_were_made():
    rows = [json.loads(x) for x in (STORED / "samplers.jsonl").read_text().splitlines()]
    text = (STORED / "samplers.txt").read_text()
    few = [row | {"calls": 3} for row in rows if row["calls"] == 50]
    for score in samplers.SCORES:
        assert "\n".join(samplers.table(rows, score)) in text
        head, *lines = samplers.table(few, score)
        assert head.split()[-1] == "3" and all("±" in line for line in lines)
    samplers.picture(few, "few.png")


def test_a_finished_comparison_is_shown_on_any_device(monkeypatch, capsys):
    folder = Path("benchmarks/results")
    folder.mkdir(parents=True)
    shutil.copy(STORED / "compare-digits.jsonl", folder)
    monkeypatch.setattr(compare, "ROOT", Path().absolute())
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda")
    )
    compare.compare(compare.Options())
    stored = (STORED / "compare-digits.txt").read_text()
    assert capsys.readouterr().out == f"{stored}\n"
    with pytest.raises(ValueError, match="runs with another device:"):
        compare.compare(compare.Options(seeds=99))
