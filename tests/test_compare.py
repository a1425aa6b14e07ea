"""benchmarks/compare.py: fair pairs, resumable, verdicts by the stated rule."""

import csv
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, command_line, start
from scipy.stats import ttest_rel

sys.path.insert(0, str(ROOT / "benchmarks"))
import compare
import measures

import superminddpm

SHORT = "--n-feat 8 --steps 30 --seeds 2 --decay True --arms base curriculum"
DRAW = f"{SHORT} --n-samples 24"


def call(folder, line):
    """Run a comparison that writes into folder; return its exit code or message."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "ROOT", folder)
        patch.setattr(measures, "STEPS", 20)  # a worse net, but soon trained
        patch.chdir(folder)
        (folder / "benchmarks" / "results").mkdir(parents=True, exist_ok=True)
        return command_line(compare, line)


def results(folder):
    return compare.read(folder / "benchmarks" / "results" / "compare-digits.jsonl")


def runs(folder):
    """Return the lines of runs by (arm, seed), without their times."""
    lines = [{**line, "train_seconds": 0} for line in results(folder) if "arm" in line]
    return {(line["arm"], line["seed"]): line for line in lines}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A short comparison, run from beginning to end."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    assert call(folder, DRAW) == 0
    return folder


def test_every_run_has_its_line_and_a_second_call_adds_none(whole):
    assert len(runs(whole)) == 4
    before = results(whole)
    assert call(whole, DRAW) == 0
    assert results(whole) == before


def test_base_is_what_the_script_itself_trains(whole):
    options = "--n-feat 8 --steps 30 --seed 1 --sample-every 1000 --quiet --out run"
    assert command_line(superminddpm, options) == 0
    with open("run/metrics.csv") as f:
        last = list(csv.DictReader(f))[-1]
    line = runs(whole)["base", 1]
    assert float(last["held_loss"]) == line["held_loss"]
    assert [float(last[f"held_t{t}"]) for t in range(50, 1000, 100)] == [
        line[f"held_t{t}"] for t in range(50, 1000, 100)
    ]


@pytest.mark.slow
def test_a_killed_comparison_goes_on_and_ends_alike(whole, tmp_path):
    for _ in range(2):  # once in the first run, once in a later one
        had = len(runs(tmp_path))
        (worker,) = start(call, tmp_path, SHORT)
        while len(runs(tmp_path)) < had + 1 and worker.is_alive():
            time.sleep(0.02)
        worker.kill()
        worker.join()
    assert 2 <= len(runs(tmp_path)) < 4
    assert call(tmp_path, SHORT) == 0
    for run, line in runs(whole).items():  # the same but for the pictures' distances
        assert runs(tmp_path)[run].items() <= line.items()


def test_pictures_are_measured_and_kept(whole):
    lines, kept = (
        results(whole),
        np.load(whole / "benchmarks" / "results" / "compare-digits.npz"),
    )
    floor = next(line["floor"] for line in lines if "floor" in line)
    for line in runs(whole).values():
        assert floor["frechet pca"] < line["frechet pca"] != line["raw frechet pca"]
    assert kept["base 30"].shape == (16, 1, 8, 8)
    assert kept["curriculum 30 stages"].shape[1:] == (8, 1, 8, 8)
    assert (kept["base 30"] != kept["curriculum 30"]).any()


def test_another_protocol_gets_a_file_of_its_own(whole):
    assert "--name gives" in call(whole, f"{SHORT} --batch 32")


def test_verdicts_are_those_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    words = set()
    for shift in np.linspace(-2, 2, 21):
        a, b = rng.normal(size=(2, 5))
        mean, _, word = compare.verdict(list(a + shift - b))
        p = ttest_rel(a + shift, b).pvalue
        assert (word == "tied") == (p >= 0.05)
        assert word == "tied" or word == ("better" if mean < 0 else "worse")
        words.add(word)
    assert words == {"tied", "better", "worse"}


def lines(**seconds):
    """Return made-up lines of three arms with these times, three seeds each."""
    loss = {"base": 1.0, "reverse": 0.9, "shuffled": 1.1}
    return [
        {"arm": arm, "seed": seed, "decay": True, "steps": 100, "equal": "images"}
        | {"held_loss": loss[arm] + seed / 100, "step": 100, "train_seconds": time}
        for arm, times in seconds.items()
        for seed, time in enumerate(times)
    ]


def test_at_equal_time_an_arm_that_costs_more_gets_fewer_steps():
    known = lines(base=[10, 20, 40], reverse=[12.5, 25, 90], shuffled=[10.1, 20.2, 40])
    options = compare.Options(steps=100, equal="time")
    key = {"seed": 0, "decay": True, "steps": 100, "equal": "time"}
    assert compare.plan(options, known, {"arm": "reverse", **key}) == 80
    assert compare.plan(options, known, {"arm": "shuffled", **key}) is None  # 1 % more
    own = known[3] | {"equal": "time", "held_loss": 2.0, "step": 80}
    assert compare.plan(options, [*known, own], {"arm": "reverse", **key}) is None
    at_time = compare.pick([*known, own], 100, True, "time")
    assert at_time["reverse"][0]["held_loss"] == 2.0
    assert at_time["shuffled"] == compare.pick(known, 100, True)["shuffled"]
    for line in known:
        line["train_seconds"] = None
    with pytest.raises(ValueError, match="--equal images first"):
        compare.plan(options, known, {"arm": "reverse", **key})


def test_a_table_says_what_its_lines_say():
    known = lines(base=[1, 1, 1], reverse=[2, 2, 2], shuffled=[1, 1, 1])
    text = compare.table(known, 100, True)
    said = ("reverse", 0.91, -0.1, "better"), ("shuffled", 1.11, 0.1, "worse")
    for arm, mean, d, word in said:
        row = next(row for row in text.splitlines() if row.startswith(f"{arm} "))
        assert f"{mean:.4f}" in row and f"{d:+.4f}" in row and row.endswith(word)


def test_stored_results_say_how_they_were_made():
    """So that the same command goes on with them and another one is refused."""
    for path in (ROOT / "benchmarks" / "results").glob("compare-*.jsonl"):
        (protocol,) = [x["protocol"] for x in compare.read(path) if "protocol" in x]
        assert protocol.keys() == {"data", "device", *compare.FIXED}, path


def test_every_arm_is_a_script_with_options_that_fit():
    options = compare.Options()
    for arm in compare.ARMS:
        key = {"arm": arm, "seed": 3, "decay": False, "steps": 7, "equal": "images"}
        module, cfg = compare.configure(options, key, 7)
        assert (cfg.seed, cfg.lr_decay, cfg.steps) == (3, False, 7)
        own = {name: getattr(cfg, name) for name in compare.ARMS[arm][1]}
        assert own == compare.ARMS[arm][1]
        assert compare.ARMS[arm][0] == module.SCRIPT
