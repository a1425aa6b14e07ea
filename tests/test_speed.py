"""speed.py, plain.py, cost.py, data.py: what they count, time and print is true."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn

import prepare
import superminddpm as base

sys.path.insert(0, str(ROOT / "benchmarks"))
import cost
import data
import plain
import speed

TINY = "--n-feat 8 --batch 4 --steps 2 --turns 2 --n-samples 1"


def measured(monkeypatch, capsys, options):
    """Run speed.py with options as on one core; return its JSON and its text."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    write = plain.write_files
    monkeypatch.setattr(plain, "write_files", lambda folder, n: write(folder, 8))
    words = ["speed.py", *options.split(), "--json", "speed.json"]
    monkeypatch.setattr(sys, "argv", words)
    speed.main()
    return json.loads(Path("speed.json").read_text()), capsys.readouterr().out


# ---- what is counted ---------------------------------------------------------------


@pytest.mark.parametrize("asks", [False, True])
def test_flops_of_one_convolution_are_those_of_the_closed_form(asks):
    """Two for each pixel, tap and pair of channels; the weights' gradient as many, and
    so the input's, where it is asked for."""
    conv = nn.Conv2d(3, 5, 3, padding=1)
    x = torch.randn(1, 3, 8, 8, requires_grad=asks)
    once = 2 * 8 * 8 * 9 * 3 * 5
    assert cost.flops(lambda n: conv(x).sum()) == once * (3 if asks else 2)


def test_activations_of_a_small_net_are_those_counted_by_hand():
    """conv keeps its input, SiLU its own, the second conv the SiLU's answer, square its
    input; the weights are not among them, and views count once."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Conv2d(8, 2, 1))
    by_hand = 4 * 4 * 4 * (3 + 8 + 8 + 2)

    def loss(n):
        return net(torch.zeros(n, 3, 4, 4)).square().mean()

    def with_views(n):
        x = net(torch.zeros(n, 3, 4, 4))
        return (x * x.flip(-1)[:]).mean() + (x.view(-1) * x.flatten()).mean()

    assert cost.activations(loss) == by_hand
    # x itself, once for all that keep it, and its mirror image
    assert cost.activations(with_views) == by_hand + 4 * 4 * 4 * 2


def test_the_count_without_data_is_the_count_with_data():
    net = base.UNet(3, 8)
    with torch.device("meta"):
        empty = base.UNet(3, 8)
    loss, other = (cost.bare_loss(n, (3, 16, 16)) for n in (net, empty))
    assert cost.flops(loss) == cost.flops(other) > 0
    kept = cost.activations(loss)
    assert kept == cost.activations(other) > 0


def test_the_model_has_the_bytes_of_what_training_holds():
    ddpm = base.build(base.Config(n_feat=8), (3, 8, 8))
    weights, ema = list(ddpm.parameters()), base.copy.deepcopy(ddpm)
    opt = torch.optim.Adam(weights, fused=True)
    x, t = torch.zeros(2, 3, 8, 8), torch.ones(2, dtype=int)
    ddpm(x, t, x + 1).backward()
    opt.step()
    held = [*weights, *(w.grad for w in weights), *ema.parameters()]
    held += [x for state in opt.state.values() for x in state.values()]
    assert cost.model_bytes(weights) == sum(x.nbytes for x in held)


def test_hours_follow_from_the_rate(monkeypatch):
    monkeypatch.setattr(cost, "SIZES", cost.SIZES[:1])
    rows = cost.table((8,), 2.0)
    cells = [cell.strip() for cell in rows[2].split("|")[1:-1]]
    with torch.device("meta"):
        net = base.UNet(3, 8)
    images = 80 * 162_770
    work = images * cost.flops(cost.bare_loss(net, (3, 32, 32)))
    assert float(cells[-2]) == pytest.approx(work / 1e18, rel=5e-3)
    assert float(cells[-1]) == pytest.approx(work / 2e12 / 3600, rel=0.05)
    assert cost.in_hours(2.5e7) == "6,944"
    assert cost.table((8,), 0)[2].endswith("| not measured |")


def test_the_union_of_spans():
    rng = np.random.default_rng(0)
    for _ in range(20):
        starts = rng.integers(0, 90, 12)
        spans = [
            (s, s + d) for s, d in zip(starts, rng.integers(1, 9, 12), strict=True)
        ]
        ticks = {tick for start, end in spans for tick in range(start, end)}
        assert speed.covered(spans) == len(ticks)
    assert speed.covered([]) == 0


# ---- what is timed -----------------------------------------------------------------


def test_the_clock_times_the_steps_between_its_marks():
    """2 steps before, 4 timed, 1 after; 30 ms of each of the 4 are not bare calls."""
    ddpm = base.build(base.Config(n_feat=8), (1, 8, 8))
    before, made = (base.DDPM.__call__, torch.Tensor.backward), []
    x, t = torch.zeros(1, 1, 8, 8), torch.ones(1, dtype=int)

    def run(n):
        made.append(n)
        opt = torch.optim.Adam(ddpm.parameters())
        for i in range(n):
            time.sleep(0.03 if 2 < i <= 6 else 0.3)
            loss = ddpm(x, t, x + 1)
            opt.zero_grad()
            loss.backward()
            opt.step()

    whole, inside = speed.step_time(base, run, 2, 4)
    assert made == [7]
    assert 0.03 < whole < 0.3 and 0 < inside < whole
    assert 0.03 <= whole - inside < 0.1
    assert before == (base.DDPM.__call__, torch.Tensor.backward)


def test_the_loop_and_the_bare_steps_make_the_steps_that_are_asked_for(monkeypatch):
    steps, step = [], torch.optim.Adam.step
    cfg = base.Config(n_feat=8, batch=4, quiet=True)
    images, device = torch.zeros(40, 1, 8, 8, dtype=torch.uint8), torch.device("cpu")

    def counted(self, *args):
        steps.append(sum(len(g["params"]) for g in self.param_groups))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    speed.loop(base, cfg, (images, images[:4]), 7)
    speed.bare(base, cfg, (1, 8, 8), device, None, False, 5)
    weights = len(list(base.build(cfg, (1, 8, 8)).parameters()))
    assert steps == [weights] * 12


def test_the_plain_loop_equals_the_same_steps_by_hand():
    """Adam and the average are written out here; the weights must agree.

    With n-feat 8 a group of GroupNorm is one channel, the bias before it has a gradient
    of rounding errors only, and Adam makes whole steps of them.
    """
    ddpm = base.build(base.Config(n_feat=16), (1, 8, 8))
    torch.nn.init.normal_(ddpm.net.out.weight)
    own, batches = base.copy.deepcopy(ddpm), torch.rand(3, 4, 1, 8, 8) * 2 - 1
    torch.manual_seed(1)
    ema, losses = plain.train(ddpm, batches, lr=1e-3, decay=0.9)

    torch.manual_seed(1)
    weights = list(own.parameters())
    average = [w.detach().clone() for w in weights]
    m, v = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for k, x0 in enumerate(batches, 1):
        t = torch.randint(1, 1001, (4,))
        loss = own(x0, t, torch.randn(4, 1, 8, 8))
        assert loss.item() == pytest.approx(losses[k - 1], rel=1e-4)
        grads = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for w, g, a, one, two in zip(weights, grads, average, m, v, strict=True):
                one.copy_(0.9 * one + 0.1 * g)
                two.copy_(0.999 * two + 0.001 * g * g)
                scale = (two / (1 - 0.999**k)).sqrt() + 1e-8
                w.copy_(w - 1e-3 * one / (1 - 0.9**k) / scale)
                a.copy_(0.9 * a + 0.1 * w)
    for a, b in zip(ddpm.parameters(), weights, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    for a, b in zip(ema.parameters(), average, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


@pytest.mark.slow
def test_the_plain_loop_learns_from_files(tmp_path):
    files = plain.write_files(tmp_path, 8)
    assert {Image.open(file).size for file in files} == {(178, 218)}
    assert 5000 < np.mean([Path(file).stat().st_size for file in files]) < 9000
    ddpm = base.build(base.Config(n_feat=8), (3, 8, 8))
    torch.manual_seed(0)
    _, losses = plain.train_on_files(ddpm, files, (3, 8, 8), 16, 1, 40)
    assert len(losses) == 40
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_a_file_becomes_the_picture_that_prepare_decodes(tmp_path):
    """But for the filter of the resize; the mirror image counts as well."""
    file = plain.write_files(tmp_path, 1)[0]
    cfg = prepare.Config("celeba", image_size=32)
    own = torch.tensor(prepare.decode(file, cfg, {})) / 127.5 - 1
    x = plain.Files([file], 3, 32)[2]
    nearest = min((x - own).abs().mean(), (x.flip(-1) - own).abs().mean())
    assert x.shape == own.shape and nearest < 0.05


# ---- what is printed ---------------------------------------------------------------


@pytest.mark.parametrize(
    "options", ["--data digits", "superreg --n-images 300 --reg prox"]
)
def test_table_and_json_hold_the_same_figures(monkeypatch, capsys, options):
    options += f" {TINY}"
    result, text = measured(monkeypatch, capsys, options)
    assert text == speed.report(result) + "\n"
    [pair] = result["pairs"]
    rows = ["loop", *["plain"] * ("digits" not in options), "bare, eager"]
    assert [row["what"] for row in pair["rows"]] == rows
    for row in pair["rows"]:
        line = next(s for s in text.splitlines() if s.startswith(row["what"] + "  "))
        shown = line[37:].replace(",", "").split()
        assert float(shown[0]) == pytest.approx(row["images_per_s"], abs=0.06)
        assert row["low"] <= row["images_per_s"] <= row["high"]
        assert row["ms"] == pytest.approx(4000 / row["images_per_s"])
        hours = pair["images"] / row["images_per_s"] / 3600
        assert row["hours"] == pytest.approx(hours)
        assert f"{hours:.3g} h" in line
    middle, low, high = pair["rows"][0]["cost"]
    assert 0 < low <= middle <= high and f"cost {middle:.1%}" in text
    assert pair["samples_per_s"] > 0
    face = "superreg" in options
    net, shape = base.UNet(3 if face else 1, 8), (3, 32, 32) if face else (1, 8, 8)
    assert pair["flop_image"] == cost.flops(cost.bare_loss(net, shape))
    assert pair["images"] == (80 * 300 if face else 180 * 1436)  # whole batches of 4
    tflops = pair["rows"][0]["images_per_s"] * pair["flop_image"] / 1e12
    assert cost.measured_rate("speed.json") == pytest.approx(tflops)
    assert f"{tflops:.3g} TFLOP/s" in text


def test_the_recipe_and_the_options_of_the_script_reach_its_loop(tiny):
    options = speed.Options("superreg", data=tiny)
    script, cfg, (images, held) = speed.set_up(options, ["--reg", "prox", "--T", "50"])
    assert (script.SCRIPT, cfg.reg, cfg.T, cfg.data) == ("superreg", "prox", 50, tiny)
    assert (cfg.n_feat, cfg.lr, len(images), len(held)) == (8, 5e-3, 160, 40)
    _, cfg, (images, _) = speed.set_up(speed.Options(n_images=100), [])
    assert (cfg.n_feat, cfg.epochs, cfg.batch, cfg.flip) == (32, 80, 256, True)
    assert images.shape == (100, 3, 32, 32)
    assert speed.Options().n_images == 162_770  # so the recipe has 13.0 million images


def test_every_pair_of_width_and_batch_is_measured(monkeypatch, capsys):
    def measure(script, cfg, *_):
        return {"n_feat": cfg.n_feat, "batch": cfg.batch, "rows": []}, {}

    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(speed, "report", lambda result: "")
    options = "--data digits --n-feat 8 16 --batch 2 3"
    result, _ = measured(monkeypatch, capsys, options)
    pairs = [(pair["n_feat"], pair["batch"]) for pair in result["pairs"]]
    assert pairs == [(8, 2), (8, 3), (16, 2), (16, 3)]


def test_stored_figures_and_counts_are_told_alike_everywhere():
    results = ROOT / "benchmarks" / "results"
    scale = (ROOT / "benchmarks" / "SCALE.md").read_text()
    stored, told = (results / "speed-h200.txt").read_text(), 0
    for batch in (256, 1024):
        result = json.loads((results / f"speed-h200-{batch}.json").read_text())
        assert speed.report(result) in stored
        for row in result["pairs"][0]["rows"]:
            told += f" {row['images_per_s']:,.0f} |" in scale
    assert told >= 14
    tflops = cost.measured_rate(results / "speed-h200-1024.json")
    for row in cost.table((32,), tflops):
        assert row in scale and row in (results / "cost.txt").read_text()


@pytest.mark.slow
def test_the_rows_of_a_gpu():
    """In a process of its own, as the others see no GPU."""
    own = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    python = partial(subprocess.run, env=own, capture_output=True, text=True)
    ask = "import torch; print(torch.cuda.is_available())"
    if "True" not in python([sys.executable, "-c", ask]).stdout:
        pytest.skip("no GPU: speed.py's rows, idle time and memory there are untried")
    command = [sys.executable, str(ROOT / "benchmarks" / "speed.py"), *TINY.split()]
    done = python([*command, "--n-images", "300", "--json", "speed.json"])
    assert done.returncode == 0, done.stderr
    result = json.loads(Path("speed.json").read_text())
    [pair] = result["pairs"]
    assert len(pair["rows"]) == 5 + len(speed.BARE)
    for row in pair["rows"]:
        assert row["images_per_s"] > 0 and row["peak"] > 0
        assert row["idle"] is None or -0.1 < row["idle"] < 1


# ---- data.py -------------------------------------------------------------------------

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks at Linux's memory")


@LINUX
def test_a_set_of_zeros_takes_no_place_and_is_mapped():
    Path("zeros").mkdir()
    n = data.make_zeros(Path("zeros"), 2**36)
    assert 3072 * n <= 2**36 < 3072 * (n + 1)
    images, held = base.load_images(base.Config(data="zeros"))
    assert images.shape == (n, 3, 32, 32) and len(held) == 64
    assert images[n // 2].sum() == 0
    assert Path("zeros/train.npy").stat().st_blocks * 512 < 2**20


@LINUX
def test_a_script_is_watched():
    work = "import time; x = b'x' * 10**8; time.sleep(0.2)"
    Path("work.py").write_text(work)
    seconds, used, total, own = data.watch(str(Path("work.py").resolve()))
    assert seconds > 0 and used > 0 and 90 < own <= total
    Path("fails.py").write_text("raise SystemExit(3)")
    with pytest.raises(ValueError, match="exit code 3"):
        data.watch(str(Path("fails.py").resolve()))


@LINUX
@pytest.mark.slow
def test_the_memory_of_preparing_and_of_a_large_set_is_measured(monkeypatch, capsys):
    """A thousandth of the set of the benchmark."""
    real = data.memory

    def few(process, name):
        return real(process, name) / (1000 if process == "meminfo" else 1)

    monkeypatch.setattr(data, "memory", few)
    data.main(files=3000)
    text = capsys.readouterr().out
    assert "prepare.py celeba: 3000 images of 3000 files, 9 MB" in text
    assert "training on" in text and "own memory at its peak" in text
