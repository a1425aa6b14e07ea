"""What holds for every script that is its parent plus lines."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_run, command_line, finish, start, state
from torch._dynamo.utils import counters

PARENT = {
    "supercurriculum": "superminddpm",
    "supersparse": "supercurriculum",
    "superreg": "supercurriculum",
    "superobjective": "superminddpm",
    "superguide": "superminddpm",
    "superflow": "superminddpm",
    "superarch": "superminddpm",
    "supervideo": "superminddpm",
}
OFF = {  # the options that switch an idea off
    "supercurriculum": {"stages": (0.0,), "epochs_per_stage": (1.0,)},
    "supersparse": {"sparsity": (0.0, 0.0, 0.0)},
    "superreg": {"lambda_max": 0.0},
    "superobjective": {"objective": "eps", "weighting": "none"},
    "superguide": {"class_cond": False},
    "superflow": {"flow": False},
    "superarch": {"arch": "base"},
    "supervideo": {"seq_len": 1},
}
BOUND = {"superminddpm": 400, "supercurriculum": 440}  # lines; all others 510
CHILDREN = sorted(PARENT)
children = pytest.mark.parametrize("child", CHILDREN)
STAGED = [c for c in CHILDREN if "supercurriculum" in (c, PARENT[c])]


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
    assert source(child).count(f"  # + {idea}\n") >= 5


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


def test_every_script_is_read_in_one_sitting():
    lines = {path.stem: 0 for path in [*ROOT.glob("super*.py"), ROOT / "prepare.py"]}
    for name in lines:
        lines[name] = source(name).count("\n")
        docstring = ast.parse(source(name)).body[0].end_lineno
        assert lines[name] <= BOUND.get(name, 510) and docstring <= 30, name
    assert {*lines} == {*PARENT, "superminddpm", "supersample", "prepare"}
    assert sum(lines.values()) <= 5000


def names(text):
    """Return the names that the top level of a script defines or imports."""
    found = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            aliases = (alias.asname or alias.name for alias in node.names)
            found |= {alias.split(".")[0] for alias in aliases}
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
    meant = {"t", "loss", "show", "row", "state", "eps", "index", "images", "held"}
    own = ast.get_source_segment(text, find(text, "train"))
    inserted = re.findall(rf"^ +([\w, ]+?) \|?= .*  # \+ {idea}$", own, re.M)
    inserted = {name for targets in inserted for name in targets.split(", ")}
    assert not inserted & own_locals(parent, "train") - meant


# ---- runs ----------------------------------------------------------------------------


def small(script, out, steps=12, **changes):
    """Return the Config of a short run of a script on the folder tiny.

    It has 5 steps an epoch; stages, where there are any, begin at steps 0, 4 and 8.
    """
    own = {"data": "tiny", "n_feat": 8, "batch": 32, "lr": 5e-3, "every": 1}
    own |= {"ema_decay": 0.9, "quiet": True, "warmup": 0}
    config = importlib.import_module(script).Config
    staged = {
        "stages": (0.8, 0.4, 0.0),
        "epochs_per_stage": (4.0, 4.0, 4.0),
        "sparsity": (0.8, 0.4, 0.0),
        "seq_len": 2,
    }
    known = config.__dataclass_fields__
    own |= {name: value for name, value in staged.items() if name in known}
    return config(out=str(out), steps=steps, **{**own, **changes})


def train(script, *args, **changes):
    importlib.import_module(script).train(small(script, *args, **changes))


@pytest.fixture
def plain(tiny, monkeypatch):
    """Leave out the pictures, which take most of the time of a short run."""
    for script in {*PARENT, *PARENT.values()}:
        module = importlib.import_module(script)
        monkeypatch.setattr(module, "save_grid", lambda *_, **__: None)


@children
def test_switched_off_a_child_is_its_parent_bit_for_bit(plain, child):
    train(PARENT[child], "parent")
    train(child, "child", **OFF[child])
    old, own = state("parent"), state("child")
    for key in ("net", "ema"):
        for name, weight in old[key].items():
            assert torch.equal(weight, own[key][name]), name
    for i, moments in old["opt"]["state"].items():
        theirs = own["opt"]["state"][i]
        assert all(torch.equal(value, theirs[k]) for k, value in moments.items())
    for row, other in zip(old["history"], own["history"], strict=True):
        assert row.items() <= {**other, "stage": row.get("stage")}.items()


@children
def test_switched_on_a_child_differs(plain, child):
    train(PARENT[child], "parent", steps=6)
    train(child, "child", steps=6)
    old, own = state("parent")["net"], state("child")["net"]
    same = [x for x in old if x in own and old[x].shape == own[x].shape]
    weights = [x for x in same if x.startswith("net.")]
    assert any(not torch.equal(old[x], own[x]) for x in weights)


class Interrupt(Exception):
    pass


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("superminddpm", {}),
        *((child, {}) for child in CHILDREN),
        ("supersparse", {"regrow": "random", "order": "none"}),
        ("superreg", {"reg": "prox", "lambda_max": 1e-3}),
        ("superobjective", {"objective": "x0", "loss": "l1", "schedule": "linear"}),
        ("superarch", {"arch": "naive"}),
        ("superarch", {"arch": "attention", "dropout": 0.2}),
        ("supervideo", {"noise": "shared", "temporal": False, "flow_weight": True}),
    ],
)
def test_stopped_at_every_save_a_run_goes_on_bit_for_bit(
    plain, monkeypatch, script, options
):
    """A save stands at the end of each epoch and at each border of two stages."""
    module = importlib.import_module(script)
    train(script, "whole", **options)
    save = module.save_run

    def save_and_die(out, epoch, content):
        save(out, epoch, content)
        raise Interrupt

    monkeypatch.setattr(module, "save_run", save_and_die)
    stops = [0]
    while stops[-1] < 12:
        with pytest.raises(Interrupt):
            train(script, "parts", resume=True, **options)
        stops.append(state("parts")["step"])
        assert stops[-1] > stops[-2]  # it does not start over
    assert stops == ([0, 4, 5, 8, 10, 12] if script in STAGED else [0, 5, 10, 12])
    assert_same_run("whole", "parts")


def work(script, cfg):
    importlib.import_module(script).train(cfg)
    torch.distributed.destroy_process_group()


def test_two_processes_grow_the_channels_of_one(tiny):
    cfg = small("supersparse", "two", lr=2e-3)
    assert finish(start(work, "supersparse", cfg, world=2)) == [0, 0]
    train("supersparse", "one", lr=2e-3)
    for name, weight in state("one")["net"].items():
        two = state("two")["net"][name]
        torch.testing.assert_close(weight, two, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["superminddpm", *CHILDREN])
def test_one_graph_is_compiled_for_a_whole_run(tiny, monkeypatch, script):
    """Not another for samples in the grids, held-out losses or gradients of gates."""
    compiled = torch.nn.Module.compile

    def eager(module, mode):
        compiled(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    torch.compiler.reset()
    counters.clear()
    train(script, "fast", compile=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["superminddpm", *CHILDREN])
def test_torchrun_trains_every_script(tiny, script):
    """As a user types it; a line of each, killed runs and all, is in test_train.py."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", str(ROOT / f"{script}.py"), "--data", "tiny"]
    command += ["--steps", "6", "--lr", "0.002", "--out", "two"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert state("two")["step"] == 6 and "Warning:" not in done.stderr
    command = [sys.executable, str(ROOT / f"{script}.py"), *command[-8:-1], "one"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ})
    for name, weight in state("one")["net"].items():
        two = state("two")["net"][name]
        torch.testing.assert_close(weight, two, atol=1e-4, rtol=0)


@children
def test_a_checkpoint_of_a_child_samples_and_is_refused_by_its_parent(plain, child):
    module = importlib.import_module(child)
    parent = importlib.import_module(PARENT[child])
    train(child, "run", steps=2)
    ddpm = module.load("run/last.pt")
    images = ddpm.sample((2, *ddpm.shape), steps=2)
    assert images.shape == (2, *ddpm.shape) and images.abs().max() <= 1
    with pytest.raises(ValueError, match=f"of {parent.SCRIPT}.py: it is of {child}.py"):
        parent.load("run/last.pt")


@children
def test_help_explains_every_option_and_shows_no_mark(child, capsys):
    module = importlib.import_module(child)
    assert command_line(module, "--help") == 0
    text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert "# +" not in text.split("options")[-1] and not Path("runs").exists()
    for name in module.Config.__dataclass_fields__:
        option = name.replace("_", "-")
        assert re.search(rf"--{option}[ ,].{{15,400}}\(default: ", text), option
