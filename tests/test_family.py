"""What holds for every script that is its parent plus lines."""

import ast
import csv
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, finish, start
from test_train import SMALL, assert_same_run, state

PARENT = {
    "supercurriculum": "superminddpm",
    "supersparse": "supercurriculum",
    "superreg": "supercurriculum",
    "superobjective": "superminddpm",
    "superguide": "superminddpm",
    "supersample": "superminddpm",
    "superarch": "superminddpm",
    "supervideo": "superminddpm",
}
OFF = {  # the options that switch an idea off
    "supercurriculum": {"stages": "0", "epochs_per_stage": "1"},
    "supersparse": {"sparsity": "0"},
    "superreg": {"lambda_max": 0.0},
    "superobjective": {"objective": "eps", "schedule": "linear", "weighting": "none"},
    "superguide": {"class_cond": False},
    "supersample": {},
    "superarch": {"arch": "base"},
    "supervideo": {"seq_len": 1},
}
CHILDREN = sorted(PARENT)
children = pytest.mark.parametrize("child", CHILDREN)
TRAINED = sorted({*CHILDREN} - {"supersample"})  # which only samples otherwise
STAGED = [c for c in CHILDREN if "supercurriculum" in (c, PARENT[c])]  # has stages


def source(script):
    return (ROOT / f"{script}.py").read_text()


def body(text, idea=None):
    """Return a script without its docstring, and without the lines of an idea."""
    lines = text.splitlines(keepends=True)[ast.parse(text).body[0].end_lineno :]
    kept, inside = [], False
    for line in lines:
        if line.startswith("# ---- "):
            inside = line.startswith(f"# ---- Idea: {idea} ")
        if not inside and not line.rstrip().endswith(f"  # + {idea}"):
            kept.append(line)
    return "".join(kept)


def law(parent, child, idea):
    return body(child, idea) == body(parent)


@children
def test_a_child_is_its_parent_plus_lines(child):
    idea = child.removeprefix("super")
    assert law(source(PARENT[child]), source(child), idea)
    assert source(child).count(f"# ---- Idea: {idea} ---") == 1
    assert source(child).count(f"  # + {idea}\n") >= 10


@pytest.mark.parametrize("fault", ["edited", "lost", "moved", "added"])
def test_the_law_sees_every_fault(fault):
    parent, child = source("superminddpm"), source("supercurriculum")
    line, other = "        opt.zero_grad()\n", "        loss.backward()\n"
    assert child.count(line) == child.count(other) == 1
    wrong = {
        "edited": child.replace(line, line.replace("()", "(True)")),
        "lost": child.replace(line, ""),
        "moved": child.replace(line, "").replace(other, other + line),
        "added": child.replace(line, line + "        x0 = x0\n"),
    }
    assert law(parent, child, "curriculum")
    assert not law(parent, wrong[fault], "curriculum")


def names(text):
    """Return the names that the top level of a script defines or imports."""
    found = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {
                (alias.asname or alias.name).split(".")[0] for alias in node.names
            }
        elif isinstance(node, ast.Assign):
            found |= {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}
    return found


def find(text, function):
    tree = ast.parse(text)
    return next(x for x in ast.walk(tree) if getattr(x, "name", "") == function)


def own_locals(text, function):
    """Return the names that a function of a script assigns to."""
    stores = (x for x in ast.walk(find(text, function)) if isinstance(x, ast.Name))
    return {x.id for x in stores if isinstance(x.ctx, ast.Store)}


@children
def test_an_idea_shadows_no_name_of_its_parent(child):
    idea = child.removeprefix("super")
    text, parent = source(child), source(PARENT[child])
    section = text[text.index(f"# ---- Idea: {idea} ") :]
    section = section[: section.index("\n# ---- ")]
    assert names(section) and not names(section) & names(parent)
    # nor does an inserted line of the loop take a name that the loop itself uses,
    # unless it means to change that very thing
    meant = {"t", "loss", "show", "keep", "ends", "done", "row", "state", "vec", "net"}
    for function in ("train", "build"):
        own = ast.get_source_segment(text, find(text, function))
        inserted = re.findall(rf"^ +([\w, ]+?) \|?= .*  # \+ {idea}$", own, re.M)
        inserted = {name for targets in inserted for name in targets.split(", ")}
        used = own_locals(parent, function)
        assert not inserted & used - meant


@children
def test_the_diff_shows_nothing_but_the_idea(child):
    """As a reader sees it: diff prints no line of the parent but its docstring."""
    files = [ROOT / f"{PARENT[child]}.py", ROOT / f"{child}.py"]
    diff = subprocess.run(["diff", *files], capture_output=True, text=True).stdout
    gone = [line[2:] for line in diff.splitlines() if line.startswith("< ")]
    text = source(PARENT[child])
    doc = text.splitlines()[: ast.parse(text).body[0].end_lineno]
    assert gone and set(gone) <= set(doc)


# ---- runs ----------------------------------------------------------------------------


def small(script, out, steps=12, **changes):
    """Return the Config of a short run of a script, 5 steps an epoch.

    Stages, where there are any, begin at steps 0, 4 and 8.
    """
    options = {**SMALL, "save_every": 1, "sample_every": 100}
    config = importlib.import_module(script).Config
    short = {
        "stages": "0.8,0.4,0",
        "epochs_per_stage": "4,4,4",
        "sparsity": "0.8,0.4,0",
        "calls": "2",
        "seq_len": 2,
        "canvas": 12,
    }
    known = config.__dataclass_fields__
    options |= {name: value for name, value in short.items() if name in known}
    return config(out=str(out), steps=steps, **{**options, **changes})


def train(script, *args, **changes):
    cfg = small(script, *args, **changes)
    return importlib.import_module(script).train(cfg)


@pytest.fixture
def plain(monkeypatch):
    """Leave out the pictures, which take most of the time of a short run."""
    for script in {*PARENT, *PARENT.values()}:
        module = importlib.import_module(script)
        for name in "plot_history plot_mask plot_norms class_grid compare".split():
            monkeypatch.setattr(module, name, lambda *_, **__: None, raising=False)
        monkeypatch.setattr(module.DDPM, "sample", lambda self, shape, xt: xt)


@children
def test_switched_off_a_child_is_its_parent_bit_for_bit(plain, child):
    off = {}
    for script in (PARENT[child], child):
        off |= OFF.get(script, {}) if script == child else {}
        train(script, script, lr=5e-3, **off)
    parent, own = state(PARENT[child]), state(child)
    for key in ("net", "ema"):
        for name, weight in parent[key].items():
            assert torch.equal(weight, own[key][name]), name
    for i, moments in parent["opt"]["state"].items():
        assert all(
            torch.equal(value, own["opt"]["state"][i][k])
            for k, value in moments.items()
        )
    assert parent["losses"] == own["losses"]


@pytest.mark.parametrize("child", TRAINED)
def test_switched_on_a_child_differs(plain, child):
    train(PARENT[child], "parent", steps=10)
    train(child, "child", steps=10)
    old, own = state("parent")["net"], state("child")["net"]
    same = [x for x in old if x in own and old[x].shape == own[x].shape]
    weights = [x for x in same if x.startswith("net.")]
    assert any(not torch.equal(old[x], own[x]) for x in weights)


VARIANTS = [
    ("supercurriculum", {}),
    ("supercurriculum", {"patience": 1, "lr": 1e-9}),
    ("supercurriculum", {"soft": True, "order": "reverse"}),
    ("supersparse", {}),
    ("supersparse", {"regrow": "random", "order": "none"}),
    ("superreg", {}),
    ("superreg", {"reg": "prox", "lambda_max": 1e-3}),
    ("superobjective", {}),
    ("superobjective", {"objective": "x0", "loss": "l1", "early_stop": 2}),
    ("superguide", {}),
    ("supersample", {}),
    ("superarch", {"arch": "naive"}),
    ("superarch", {"arch": "attention", "dropout": 0.2, "mults": "1,1"}),
    ("supervideo", {"flow_weight": True}),
    ("supervideo", {"noise": "shared", "temporal": False}),
]


class Interrupt(Exception):
    pass


@pytest.mark.parametrize(("script", "options"), VARIANTS)
def test_stopped_at_every_save_a_run_goes_on_bit_for_bit(
    plain, monkeypatch, script, options
):
    """A save stands at the end of each epoch and at each border of two stages."""
    saves = {4, 5, 8, 10, 12} if script in STAGED else {5, 10, 12}
    module = importlib.import_module(script)
    train(script, "whole", **options)
    save = module.save_checkpoint

    def save_and_die(path, content):
        save(path, content)
        if path.name == "last.pt":
            raise Interrupt

    monkeypatch.setattr(module, "save_checkpoint", save_and_die)
    stops = []
    while not stops or stops[-1] < 12:
        with pytest.raises(Interrupt):
            train(script, "parts", resume="auto", **options)
        stops.append(state("parts")["step"])
    assert saves == set(stops) or options.get("patience")
    assert_same_run("whole", "parts")
    for key in set(module.STATE) - {"config", "net", "ema", "opt", "history"}:
        assert state("whole")[key] == state("parts")[key]


def work(script, cfg, die_at=()):
    """Train as a worker of two; rank 0 dies right after saving one of these steps."""
    module = importlib.import_module(script)
    save = module.save_checkpoint

    def save_and_die(path, content):
        save(path, content)
        if path.name == "last.pt" and content["step"] in die_at:
            os._exit(7)

    module.save_checkpoint = save_and_die
    module.train(cfg)
    torch.distributed.destroy_process_group()


@children
def test_two_processes_resume_across_a_border_bit_for_bit(child):
    """Rank 0 dies at the end of an epoch; of the first stage, and in the second."""
    assert finish(start(work, child, small(child, "whole"), world=2)) == [0, 0]
    for at in (4, 5) if child in STAGED else (5,):
        cfg = small(child, "parts", resume="auto")
        assert finish(start(work, child, cfg, (at,), world=2))[0] == 7
        assert state("parts")["step"] == at
    cfg = small(child, "parts", resume="auto")
    assert finish(start(work, child, cfg, world=2)) == [0, 0]
    assert_same_run("whole", "parts")


@children
def test_torchrun_gives_what_one_process_gives(child):
    options = "--n-feat 8 --batch 32 --n-train 160 --steps 6 --quiet --lr 0.002"
    own = {"stages": "0.5,0", "epochs_per_stage": "1,1"} if child in STAGED else {}
    own |= {"sparsity": "0.5,0"} if child == "supersparse" else {}
    own |= {"calls": "2"} if child == "supersample" else {}
    own |= {"seq_len": 2, "canvas": 12} if child == "supervideo" else {}
    for name, value in {"out": "two", **own}.items():
        options += f" --{name.replace('_', '-')} {value}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", str(ROOT / f"{child}.py"), *options.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    train(child, "one", steps=6, lr=2e-3, **own)
    for name, weight in state("one")["net"].items():
        two = state("two")["net"][name]
        torch.testing.assert_close(weight, two, atol=1e-4, rtol=0)


@pytest.mark.parametrize("child", STAGED)
def test_a_run_says_its_stages_and_its_table_has_them(child, capsys):
    train(child, "run", quiet=False)
    said = capsys.readouterr().out
    for k, (low, count) in enumerate([(800, 201), (400, 601), (1, 1000)]):
        assert f"stage {k} of 0..2: t {low} to 1000, {count} values, SNR" in said
    assert said.count("33% of the steps") == 3
    with open("run/metrics.csv") as f:
        rows = list(csv.DictReader(f))
    stages = [(row["step"], row["stage"]) for row in rows]
    assert stages == [("4", "0"), ("8", "1"), ("12", "2")]
    for row in rows:
        assert len([key for key in row if key.startswith("held_t")]) == 10


@children
def test_a_checkpoint_of_a_child_samples_and_is_refused_by_its_parent(child):
    module = importlib.import_module(child)
    parent = importlib.import_module(PARENT[child])
    train(child, "run", steps=5)
    images = module.load("run/last.pt").sample((2, 1, 8, 8), steps=2)
    assert images.shape == (2, 1, 8, 8)
    with pytest.raises(
        ValueError, match=f"was written by {child}.py, not {parent.SCRIPT}"
    ):
        parent.load("run/last.pt")
    train(PARENT[child], "tuned", steps=1, lr=0.0, init="run/last.pt")
    tuned, old = state("tuned")["net"], state("run")["ema"]
    assert torch.equal(tuned["net.time1.weight"], old["net.time1.weight"])


@children
def test_help_explains_every_option_and_shows_no_mark(child):
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{child}.py"), "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "# +" not in done.stdout.split("options")[-1]
    base = set(importlib.import_module(PARENT[child]).Config.__dataclass_fields__)
    new = set(importlib.import_module(child).Config.__dataclass_fields__) - base
    assert new and not Path("runs").exists()
    for name in new:
        assert f"--{name.replace('_', '-')}" in done.stdout
