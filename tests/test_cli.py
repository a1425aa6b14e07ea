"""The command line: recipes, help, bad input in one line, sampling, logging."""

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command_line, finish, start
from PIL import Image

import superminddpm as base
from superminddpm import Config, parse

TINY = "--n-feat 8 --batch 32 --n-train 64 --steps 2 --quiet"


def main(line):
    return command_line(base, line)


@pytest.fixture
def checkpoint():
    assert main(f"{TINY} --out run") == 0
    return Path("run/last.pt")


def test_an_option_wins_over_the_recipe():
    assert parse([]) == Config()
    celeba = parse(["--data", "celeba", "--batch", "64"])
    assert (celeba.n_feat, celeba.epochs, celeba.batch) == (32, 80, 64)
    assert Config(data="celeba", batch=64) == celeba
    assert parse(["--data=mnist", "--no-ema", "--T", "100"]).T == 100
    for data in base.RECIPES:
        assert None not in dataclasses.astuple(Config(data=data))


def test_a_checkpoint_brings_its_own_options(checkpoint):
    again = parse(["--resume", str(checkpoint), "--steps", "9"])
    assert (again.n_feat, again.n_train, again.steps) == (8, 64, 9)
    assert parse(["--resume", "auto", "--out", "run"]).n_feat == 8
    assert parse(["--sample", str(checkpoint)]).n_feat == 8


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as leave:
        parse(["--data", "celeba", "--help"])
    text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert leave.value.code == 0 and "arXiv:2006.11239" in text
    for field in dataclasses.fields(Config):
        name = field.name.replace("_", "-")
        assert re.search(rf"--{name}[ ,].{{10,200}}\(default: ", text), name
    assert "together (default: 256)" in text  # the batch of celeba's recipe


BAD = {
    "--bogus 3": "--bogus",
    "--data imagenet": "imagenet",
    "--lr much": "--lr",
    "--sampler euler": "euler",
    "--batch 0": "--batch cannot be 0",
    "--batch -4": "--batch cannot be -4",
    "--epochs -1": "--epochs cannot be -1",
    "--lr -0.1": "--lr cannot be -0.1",
    "--lr nan": "--lr cannot be nan",
    "--lr inf": "--lr cannot be inf",
    "--n-samples 0": "--n-samples cannot be 0",
    "--image-size 10": "--image-size is 8, 12, 16",
    "--n-feat 20": "--n-feat is 8, 16, 24",
    "--T 10": "--T is 25 or more",
    "--ema-decay 1": "--ema-decay below 1",
    "--eta 1.5": "--eta at most 1",
    "--batch 2000": "--batch 2000 is above the 1438 images",
    "--data mnist": "no usable MNIST in data: --data-dir says where it lies",
    "--data folder --data-dir nowhere": "too few images in nowhere",
    "--data celeba": "mmlab.ie.cuhk.edu.hk/projects/CelebA",
    "--resume nowhere/last.pt": "there is no checkpoint nowhere/last.pt",
    "--sample nowhere.pt": "there is no checkpoint nowhere.pt",
    "--init nowhere.pt": "there is no checkpoint nowhere.pt",
    "--log wandb": "pip install wandb",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_gets_one_clear_line(line, capsys, tmp_path, monkeypatch):
    find_spec = base.find_spec
    monkeypatch.setattr(
        base, "find_spec", lambda n: None if n == "wandb" else find_spec(n)
    )
    assert main(line) == 2
    told = capsys.readouterr()
    words = re.sub(r"[│─╭╮╰╯\s]+", " ", told.out + told.err)
    assert BAD[line] in words and "Traceback" not in words
    if "superminddpm.py:" in told.err:  # ours, not tyro's box
        assert told.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("use", ["--sample {}", "--resume {}", "--init {}"])
@pytest.mark.parametrize("kind", ["cut", "text", "foreign", "cousin", "empty"])
def test_a_broken_checkpoint_is_refused(checkpoint, capsys, kind, use):
    path = Path("broken.pt")
    if kind == "cut":
        path.write_bytes(checkpoint.read_bytes()[:-1000])
    elif kind == "foreign":
        torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, path)
    elif kind == "cousin":
        torch.save({"config": {"T": 1000, "n_feat": 8}, "model": {}}, path)
    else:
        path.write_text("hello" if kind == "text" else "")
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert main(f"{use.format(path)} --quiet") == 2
    told = capsys.readouterr().err
    assert "broken.pt is no checkpoint, or cut short" in told and told.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("change", ["--n-feat 16", "--T 500"])
def test_going_on_with_another_model_is_refused(checkpoint, capsys, change):
    before = checkpoint.read_bytes()
    assert main(f"--resume {checkpoint} --steps 4 {change}") == 2
    told = capsys.readouterr().err
    assert "run/last.pt is from another model" in told and told.count("\n") == 1
    assert checkpoint.read_bytes() == before


def pictures(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_samples_are_files_and_a_grid_and_repeat(checkpoint):
    for out in ("a", "b"):
        line = f"--sample {checkpoint} --n-samples 40 --sampling-steps 5 --out {out}"
        assert main(line) == 0
    assert sorted(pictures("a")) == [*(f"{i:06}.png" for i in range(40)), "grid.png"]
    assert pictures("a") == pictures("b")
    assert len(set(pictures("a").values())) == 41  # no batch repeats another
    image = Image.open("a/000039.png")
    assert image.size == (8, 8) and image.mode == "L"
    assert main(f"--sample {checkpoint} --n-samples 3 --sampling-steps 5") == 0
    assert pictures("run/samples")["000002.png"] == pictures("a")["000002.png"]
    assert main(f"--sample {checkpoint} --n-samples 3 --sampling-steps 5") == 0
    assert Path("run/samples-2/grid.png").exists()  # and nothing is overwritten


def test_sampling_options_do_something():
    assert main("--n-feat 8 --T 100 --steps 100 --quiet --out run") == 0
    options = (
        "",
        "--no-ema",
        "--eta 1",
        "--sampler ddpm",
        "--sampling-steps 3",
        "--seed 1",
    )
    for k, option in enumerate(options):
        line = f"--sample run/last.pt --n-samples 2 --out {k} --sampling-steps 9"
        assert main(f"{line} {option}") == 0
    assert len({pictures(str(k))["000001.png"] for k in range(len(options))}) == len(
        options
    )


def test_two_processes_draw_the_same_images(checkpoint):
    line = f"--sample {checkpoint} --n-samples 9 --sampling-steps 5 --batch 4 --out"
    assert main(f"{line} one") == 0
    assert finish(start(main, f"{line} two", world=2)) == [0, 0]
    assert pictures("one") == pictures("two")


def tell(line):
    """Draw as a worker whose clock goes a quarter of a second with each file."""
    files = Path(line.split()[-1]).glob
    base.time = types.SimpleNamespace(perf_counter=lambda: len([*files("0*.png")]) / 4)
    with (
        open(f"said{os.environ['RANK']}", "w") as said,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        main(line)


@pytest.mark.parametrize("world", [1, 2])
def test_drawing_says_how_fast_all_processes_are_together(checkpoint, world):
    line = f"--sample {checkpoint} --n-samples 9 --sampling-steps 5 --batch 4 --out a"
    assert finish(start(tell, line, world=world)) == [0] * world
    said = [Path(f"said{rank}").read_text() for rank in range(world)]
    assert said[0].endswith("9 images in a, 4.0 images/s\n")
    assert "9/9" in said[0] and "img/s" in said[0]
    assert not any(said[1:])


def test_tensorboard_gets_the_metrics():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(f"{TINY} --out run --log tensorboard") == 0
    events = EventAccumulator("run")
    events.Reload()
    assert {"loss", "held_loss", "held_t50", "lr"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("held_loss")] == [2]


def test_wandb_gets_the_metrics(monkeypatch):
    rows = []
    run = types.SimpleNamespace(
        log=lambda row, step: rows.append((step, row["held_loss"]))
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(base, "find_spec", lambda name: True)
    assert main(f"{TINY} --out run --log wandb") == 0
    assert rows[0][0] == 2 and rows[0][1] > 0


def test_importing_does_nothing():
    code = """
import os, sys, random
sys.argv = ["x", "--bogus"]
import torch
before = torch.initial_seed(), torch.get_rng_state().tolist(), os.listdir()
import superminddpm
assert before == (torch.initial_seed(), torch.get_rng_state().tolist(), os.listdir())
assert not torch.cuda.is_initialized() and "wandb" not in sys.modules
assert not {"tensorboard", "matplotlib.pyplot", "diffusers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_more_epochs_win_over_the_steps_of_the_checkpoint(checkpoint):
    assert main(f"--resume {checkpoint} --epochs 3 --quiet") == 0
    assert torch.load(checkpoint)["step"] == 6


def test_samples_never_go_into_a_full_folder(checkpoint, capsys):
    before = pictures("run")
    assert main(f"--sample {checkpoint} --n-samples 2 --out run") == 2
    assert "run is not empty" in capsys.readouterr().err and pictures("run") == before


def test_quiet_is_quiet(capfd):
    assert main(f"{TINY} --out run") == 0
    assert main("--sample run/last.pt --n-samples 2 --quiet") == 0
    assert capfd.readouterr() == ("", "")


def test_the_script_itself_runs_and_talks():
    """As a user does it, in a process of its own."""
    options = TINY.replace(" --quiet", "").split()
    command = [sys.executable, str(ROOT / "superminddpm.py"), *options]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "img/s" in run.stderr and "loss=" in run.stderr
    assert "64 images" in run.stdout and "held-out loss" in run.stdout
    assert Path("runs/superminddpm-digits/last.pt").exists()
