"""benchmarks/compare.py: fair pairs, resumable, verdicts by the stated rule."""

import csv
import dataclasses
import shutil
import sys
import time
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command_line, start
from scipy.stats import t as student
from scipy.stats import ttest_rel

sys.path.insert(0, str(ROOT / "benchmarks"))
import compare
import gauge
import measures
import story

import supercurriculum
import superminddpm
import supersparse

SHORT = "--name mine --n-feat 8 --steps 16 --seeds 2 --arms base curriculum"
SHORT += " --n-samples 16"


def call(folder, line):
    """Run a comparison that writes into folder; return its exit code or message."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "ROOT", folder)
        patch.setattr(measures, "STEPS", 20)  # a worse net, but soon trained
        patch.setattr(compare, "DRAWS", 1)
        patch.setattr(gauge, "nats", lambda *_: 1.0)  # test_gauge.py has it
        for script in (superminddpm, supercurriculum):
            patch.setattr(script, "save_grid", lambda *_: None)
        patch.chdir(folder)
        (folder / "benchmarks" / "results").mkdir(parents=True, exist_ok=True)
        return command_line(compare, line)


def results(folder):
    return compare.read(folder / "benchmarks" / "results" / "compare-mine.jsonl")


def runs(folder):
    """Return the lines of runs by (arm, seed), without their times."""
    lines = [{**line, "train_seconds": 0} for line in results(folder) if "arm" in line]
    return {(line["arm"], line["seed"]): line for line in lines}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A short comparison, run from beginning to end."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    assert call(folder, SHORT) == 0
    return folder


def test_every_run_has_its_line_and_a_second_call_adds_none(whole):
    assert len(runs(whole)) == 4
    before = results(whole)
    assert call(whole, SHORT) == 0
    assert results(whole) == before


def test_base_is_what_the_script_itself_trains(whole, monkeypatch):
    monkeypatch.setattr(superminddpm, "save_grid", lambda *_: None)
    options = "--n-feat 8 --steps 16 --seed 1 --every 1000 --quiet --out run"
    assert command_line(superminddpm, options) == 0
    with open("run/metrics.csv") as f:
        last = list(csv.DictReader(f))[-1]
    line, ddpm = runs(whole)["base", 1], superminddpm.load("run/last.pt")
    assert float(last["loss"]) == line["train_loss"]
    held = superminddpm.load_images(superminddpm.Config())[1]
    assert line["held_t450"] == gauge.net_loss(ddpm, held, 450, 1)
    levels = [line[f"held_t{t}"] for t in range(50, 1000, 100)]
    assert line["held_loss"] == pytest.approx(np.mean(levels))


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
    assert runs(tmp_path) == runs(whole)


def test_pictures_are_measured_and_kept(whole):
    file = whole / "benchmarks" / "results" / "compare-mine.npz"
    lines, kept = results(whole), np.load(file)
    floor = next(line["floor"] for line in lines if "floor" in line)
    for line in runs(whole).values():
        assert floor["frechet pca"] < line["frechet pca"]
    assert kept["base 16"].shape == (16, 1, 8, 8)
    assert kept["curriculum 16 stages"].shape == (2, 8, 1, 8, 8)
    assert (kept["base 16"] != kept["curriculum 16"]).any()
    # by the averaged weights, and from one x_T in both arms
    for arm, script in (("base", superminddpm), ("curriculum", supercurriculum)):
        path = whole / f"runs/compare/mine-{arm}-0-16/last.pt"
        drawn = measures.draw(script.load(path, ema=True), 16, seed=1000)
        assert (kept[f"{arm} 16"] == drawn.numpy()).all()


def test_the_time_of_a_run_is_that_of_its_training_alone(monkeypatch):
    """By a clock that only these functions move on. None: the run had begun before."""
    now, cost = [0], {"build": 5, "held_out_loss": 10, "save_grid": 20, "save_run": 40}
    own = {name: getattr(superminddpm, name) for name in cost}
    own["save_grid"] = lambda *_: None

    def slow(name, *args):
        now[0] += cost[name]
        return own[name](*args)

    for name in cost:
        monkeypatch.setattr(superminddpm, name, partial(slow, name))
    clock = types.SimpleNamespace(process_time=lambda: now[0])
    clock.perf_counter = clock.process_time
    monkeypatch.setattr(compare, "time", clock)
    cfg = superminddpm.Config(n_feat=8, steps=1, out="run", quiet=True, resume=True)
    assert compare.train(superminddpm, cfg) == 5
    assert compare.train(superminddpm, dataclasses.replace(cfg, steps=2)) is None


def test_the_stages_of_a_run_are_read_from_its_folder(whole):
    """Of 11 steps an epoch; four stages end in the first, so only the last has one."""
    told = story.stages(supercurriculum, whole / "runs/compare/mine-curriculum-0-16")
    starts, ends, lows, paths = zip(*told, strict=True)
    assert starts == (0, 1, 3, 6, 10) and ends == (1, 3, 6, 10, 16)
    assert lows == (800, 600, 400, 200, 1)
    names = [path and path.name for path in paths]
    assert names == [
        None,
        None,
        None,
        "checkpoint_epoch_001.pt",
        "checkpoint_epoch_002.pt",
    ]


def test_another_protocol_gets_a_file_of_its_own(whole):
    before = results(whole)
    assert "--name gives" in call(whole, f"{SHORT} --batch 32")
    assert results(whole) == before


def test_stored_results_are_not_mixed_with_runs_of_another_schedule(monkeypatch):
    """What agrees goes on with the file; another schedule shows before the training."""
    shutil.copy(ROOT / "benchmarks" / "results" / "compare-digits.jsonl", "stored")
    before = Path("stored").read_text()
    compare.agree(compare.Options(), Path("stored"))
    less_noise, build = (
        superminddpm.DDPM(None).alphabar.sqrt(),
        superminddpm.DDPM.__init__,
    )

    def other(self, *args):
        build(self, *args)
        self.alphabar.copy_(less_noise)

    monkeypatch.setattr(superminddpm.DDPM, "__init__", other)
    with pytest.raises(ValueError, match="untrained.*--name gives"):
        compare.agree(compare.Options(), Path("stored"))
    assert Path("stored").read_text() == before


def arms(y):
    """Return runs as compare.py has them, for values y (arms, seeds); base is first."""
    names = ["base", *map(str, range(1, len(y)))]
    rows = [{seed: {"m": value} for seed, value in enumerate(row)} for row in y]
    return dict(zip(names, rows, strict=True))


def test_the_verdict_on_two_arms_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    words = set()
    for shift in np.linspace(-2, 2, 21):
        a, b = rng.normal(size=(2, 5))
        ((mean, *bounds, word),) = compare.ranking(arms([b, a + shift]), "m").values()
        test = ttest_rel(a + shift, b)
        assert bounds == pytest.approx([*test.confidence_interval()])
        assert (word == "tied") == (test.pvalue >= 0.05)
        assert word == "tied" or word == ("better" if mean < 0 else "worse")
        words.add(word)
    assert words == {"tied", "better", "worse"}


def test_the_ranking_is_the_least_squares_fit_of_arms_and_seeds():
    y = np.random.default_rng(0).normal(size=(4, 6))
    found = compare.ranking(arms(y), "m")
    design = [
        [*(arm == k for k in range(1, 4)), *(seed == k for k in range(6))]
        for arm in range(4)
        for seed in range(6)
    ]
    x = np.array(design, float)
    fit, rest, *_ = np.linalg.lstsq(x, y.ravel(), rcond=None)
    se = np.sqrt(rest[0] / (24 - 9) * np.linalg.inv(x.T @ x)[0, 0])
    width = student.ppf(1 - 0.05 / 2 / 3, 15) * se
    for k, (mean, low, high, _) in enumerate(found.values()):
        assert (mean, low, high) == pytest.approx(
            (fit[k], fit[k] - width, fit[k] + width)
        )
    pairs = [("2", "1"), ("1", "3"), ("2", "no such arm")]  # two that can be compared
    found = compare.intervals(arms(y), "m", pairs)
    width *= student.ppf(1 - 0.05 / 2 / 2, 15) / student.ppf(1 - 0.05 / 2 / 3, 15)
    assert [*found] == pairs[:2]
    for gap, (mean, low, high, _) in zip(
        (fit[1] - fit[0], fit[0] - fit[2]), found.values(), strict=True
    ):
        assert (mean, low, high) == pytest.approx((gap, gap - width, gap + width))


def test_where_nothing_helps_one_table_in_twenty_has_a_word_that_is_not_tied():
    rng, wrong, n = np.random.default_rng(0), 0, 1000
    for _ in range(n):
        y = rng.normal(size=(13, 8)) + rng.normal(size=8)  # seeds differ, arms do not
        found = compare.ranking(arms(y), "m")
        wrong += any(word != "tied" for *_, word in found.values())
    assert 0.02 < wrong / n < 0.06  # at most 5 %, and not far below
    y[3] += 3
    y[5] -= 3
    words = [word for *_, word in compare.ranking(arms(y), "m").values()]
    assert words[2] == "worse" and words[4] == "better" and words.count("tied") == 10


def test_the_densities_of_the_arms_are_what_they_are_called():
    """In each stage a density; over the run that of another arm, or a uniform one."""
    total, mean = {}, {}
    for arm in compare.ARMS:
        key = {"arm": arm, "seed": 0, "steps": 0}
        module, cfg = compare.configure(compare.Options(), key)
        if hasattr(module, "stage_density"):
            p = module.stage_density(cfg, superminddpm.DDPM(None).alphabar)
            change = compare.DENSITIES.get(arm, lambda _, p: p)
            p = change(cfg, p).double()
            shares = torch.tensor(cfg.epochs_per_stage).double()
            assert (p >= 0).all() and p.sum(1).tolist() == pytest.approx([1] * len(p))
            total[arm] = (shares / shares.sum()) @ p
            mean[arm] = p @ torch.arange(1, 1001.0).double()
    for one, other in (("shuffled", "curriculum"), ("reverse, shuffled", "reverse")):
        torch.testing.assert_close(total[one], total[other], rtol=1e-5, atol=0)
        assert mean[one].std() < 1e-3 < mean[other].std()
    for arm, sign in (("high noise first", -1), ("low noise first", 1)):
        uniform = torch.full((1000,), 1e-3).double()
        torch.testing.assert_close(total[arm], uniform, rtol=1e-4, atol=0)
        assert (sign * mean[arm].diff() > 10).all()
    speed, normal = total["SpeeD"], total["logit-normal"]
    assert speed[699] == pytest.approx(5 * speed[700].item(), rel=1e-5)
    z = torch.sigmoid(torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    for low in (0, 0.1, 0.4, 0.8):
        seen = ((z > low) & (z <= low + 0.1)).double().mean().item()
        assert normal[round(1000 * low) :][:100].sum().item() == pytest.approx(
            seen, abs=2e-3
        )


def test_an_arm_trains_with_its_own_density(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        supercurriculum, "draw_t", lambda c, t, p, *_: seen.append(p) or t
    )
    monkeypatch.setattr(supercurriculum, "save_grid", lambda *_: None)
    monkeypatch.setattr(gauge, "nats", lambda *_: 1.0)
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    scores = types.SimpleNamespace(log_ratios=lambda x: {}, distances=lambda x: {})
    options = compare.Options(name="mine", n_feat=8, n_samples=1)
    compare.run(options, {"arm": "SpeeD", "seed": 0, "steps": 2}, scores)
    assert len(seen) == 2 and seen[0][0] == pytest.approx(5 * seen[0][-1].item())


def lines(**seconds):
    """Return made-up lines of three arms with these times, three seeds each."""
    loss = {"base": 1.0, "reverse": 0.9, "shuffled": 1.1}
    return [
        {"arm": arm, "seed": seed, "steps": 100, "step": 100}
        | {"held_loss": loss[arm] + seed / 100, "train_seconds": time}
        for arm, times in seconds.items()
        for seed, time in enumerate(times)
    ]


def test_a_table_says_what_its_lines_say():
    known = lines(base=[1, 2, 3], reverse=[2, 4, 9], shuffled=[1, 2, None])
    text = compare.table(known, 100)
    said = ("reverse", 0.91, -0.1, "better"), ("shuffled", 1.11, 0.1, "worse")
    for arm, mean, d, word in said:
        row = next(row for row in text.splitlines() if row.startswith(f"{arm} "))
        assert f"{mean:.4f}" in row and f"{d:+.4f}" in row and row.endswith(word)
    costs = [row.split() for row in text.split("over that of base; steps")[1:]]
    assert costs == ["base 1.00 100 reverse 2.00 100 shuffled 1.00 100".split()]
    apart = [{**line, "held_loss": 7.0, "steps": 50} for line in known]
    assert compare.table(known + apart, 100) == text


def test_every_arm_is_a_script_with_options_that_fit():
    for arm, (script, own) in compare.ARMS.items():
        key = {"arm": arm, "seed": 3, "steps": 7}
        module, cfg = compare.configure(compare.Options(), key)
        assert (module.SCRIPT, cfg.seed, cfg.steps) == (script, 3, 7)
        assert {name: getattr(cfg, name) for name in own} == own


def test_a_prepared_folder_brings_its_recipe(tiny):
    key = {"arm": "curriculum", "seed": 0, "steps": 0}
    _, cfg = compare.configure(compare.Options(data=tiny, batch=16), key)
    assert (cfg.data, cfg.n_feat, cfg.epochs, cfg.batch) == (tiny, 8, 2, 16)
    assert cfg.every == 10**6 and cfg.resume
    assert Path(cfg.out).name == "tiny-curriculum-0-0"
    with pytest.raises(ValueError, match=r"recipe.json: `python prepare.py"):
        compare.configure(compare.Options(data="nowhere"), key)


@pytest.mark.slow
def test_the_story_is_told(capsys, monkeypatch):
    monkeypatch.setattr(supersparse, "save_grid", lambda *_: None)
    assert command_line(supersparse, "--n-feat 8 --steps 30 --quiet --out run") == 0
    story.main(Path("run"))
    assert Path("run/story.png").stat().st_size > 20_000
    assert "story.png" in capsys.readouterr().out
