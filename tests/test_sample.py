"""The samplers against diffusers and closed forms; images from checkpoints."""

import csv
import importlib
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command_line, finish, start, state
from diffusers import DPMSolverMultistepScheduler as DPMSolver
from PIL import Image
from test_diffusion import Fixed, normal, wave

import superminddpm as base
import supersample
from superminddpm import DDPM
from supersample import solve

SAMPLERS = ["ddpm", "ddim", "heun", "dpmpp"]
M, S = 0.3, 0.2  # the mean and spread of the Gaussian that the exact denoiser knows


def gaussian(T=1000):
    """Return a DDPM in double precision that knows E[eps | x_t] of x_0 ~ N(M, S^2)."""
    ddpm = DDPM(None, T).double()

    def exact(xt, t):
        ab = ddpm.alphabar[t].view(-1, 1, 1, 1)
        return (1 - ab).sqrt() * (xt - ab.sqrt() * M) / (ab * S**2 + 1 - ab)

    ddpm.net = Fixed(exact)
    return ddpm


def walk(monkeypatch, ddpm, xt, *options):
    """Return the (t, x_t) at which a sampler calls the network, and its images."""
    calls, predict = [], ddpm.predict

    def spy(x, t):
        calls.append((t[0].item(), x))
        return predict(x, t)

    monkeypatch.setattr(ddpm, "predict", spy)
    images = solve(ddpm, xt, *options)
    monkeypatch.undo()
    return calls, images


@pytest.mark.parametrize("n", [5, 10, 50])
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmpp", 2)])
def test_dpmpp_and_ddim_trajectories_equal_diffusers(monkeypatch, sampler, order, n):
    """DDIM is the first order of DPM-Solver++."""
    ddpm, xt = gaussian(), normal(0, 16, 1, 4, 4).double()
    calls, images = walk(monkeypatch, ddpm, xt, sampler, n)
    times = [t - 1 for t, _ in calls]
    options = {"solver_order": order, "lower_order_final": order == 2}
    theirs = DPMSolver(**options, euler_at_final=order == 2)
    theirs.alphas_cumprod = ddpm.alphabar[1:]
    theirs.set_timesteps(timesteps=times)
    assert len(times) == n
    want = xt
    for (t, mine), time in zip(calls, theirs.timesteps, strict=True):
        torch.testing.assert_close(mine, want, atol=1e-4, rtol=0)
        eps_hat = ddpm.predict(want, torch.full((16,), t))[1]
        want = theirs.step(eps_hat, time, want).prev_sample
    torch.testing.assert_close(images, want.clamp(-1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("steps", [2, 3, 10])
def test_heun_is_algorithm_1_of_karras(monkeypatch, steps):
    """As the paper prints it, for sigma(phi) = tan phi and s(phi) = cos phi."""
    ddpm, xt = gaussian(), normal(0, 16, 1, 4, 4).double()
    calls, images = walk(monkeypatch, ddpm, xt, "heun", 2 * steps - 1)
    times = torch.linspace(1000, 0, steps + 1).round().long()
    phi, x, path = ddpm.alphabar[times].sqrt().acos(), xt, []

    def slope(x, i):
        sigma, s = phi[i].tan(), phi[i].cos()
        dsigma, ds = 1 + sigma**2, -phi[i].sin()
        path.append((times[i].item(), x))
        denoised = ddpm.predict(x, times[i].expand(16))[0]  # D(x / s; sigma)
        return (dsigma / sigma + ds / s) * x - dsigma * s / sigma * denoised

    for i in range(steps - 1):
        d = slope(x, i)
        euler = x + (phi[i + 1] - phi[i]) * d
        x = x + (phi[i + 1] - phi[i]) * (d / 2 + slope(euler, i + 1) / 2)
    path.append((times[-2].item(), x))
    last = ddpm.predict(x, times[-2].expand(16))[0]
    for (t, mine), (time, other) in zip(calls, path, strict=True):
        assert t == time
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=0)
    torch.testing.assert_close(images, last, atol=1e-6, rtol=0)


ORDER = {"ddim": (1.7, 2.1), "heun": (2.5, 4), "dpmpp": (4, 16)}


@pytest.mark.parametrize("sampler", ORDER)
def test_with_twice_the_steps_second_order_gains_more(sampler):
    """In the distance to the ODE's exact solution: a Gaussian keeps its shape on it."""
    ddpm, xt = gaussian(), normal(0, 500, 1, 1, 1).double()
    exact, errors = (M + S * xt).clamp(-1, 1), []  # abar_T is 0, but for 2e-9
    for n in (20, 40, 80):
        images = solve(ddpm, xt, sampler, 2 * n - 1 if sampler == "heun" else n)
        errors.append((images - exact).square().mean().sqrt().item())
    least, most = ORDER[sampler]
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        assert least < coarse / fine < most, errors


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_steps_are_calls_of_the_network(monkeypatch, sampler, n):
    ddpm, xt = gaussian(), normal(0, 2, 1, 4, 4).double()
    calls, images = walk(monkeypatch, ddpm, xt, sampler, n, 0.0, lambda k: 0 * xt)
    assert len(calls) == n and calls[0][0] == 1000 and images.abs().max() <= 1


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0), ("ddim", 0.4), ("ddpm", 1)])
def test_ddim_and_ddpm_are_the_sample_of_the_base_bit_for_bit(sampler, eta):
    """Fresh noise k is that of step k. test_diffusion.py compares with Algorithm 2."""
    ddpm, xt = base.DDPM(Fixed(wave), 1000), normal(0, 2, 3, 8, 8)
    g, asked = torch.Generator().manual_seed(1), []

    def noise(k):
        asked.append(k)
        return torch.randn(xt.shape, generator=g)

    images = solve(ddpm, xt, sampler, 12, eta if sampler == "ddim" else 0.0, noise)
    again = torch.Generator().manual_seed(1)
    assert torch.equal(images, ddpm.sample(xt.shape, 12, eta, again, xt))
    assert asked == ([*range(1, 13)] if eta else [])


# ---- checkpoints ---------------------------------------------------------------------


def make(script="superminddpm", shape=(1, 8, 8), **options):
    """Write run/last.pt as a script does, with random weights; return the script."""
    module, weights = importlib.import_module(script), []
    cfg = module.Config(n_feat=8, **options)
    for seed in (0, 1):
        torch.manual_seed(seed)
        ddpm = module.build(cfg, shape)
        for weight in ddpm.parameters():
            weight.data += 0.1 * torch.randn(weight.shape)
        weights.append(ddpm.state_dict())
    content = {"script": script, "config": asdict(cfg), "shape": shape}
    Path("run").mkdir(exist_ok=True)
    torch.save({**content, "net": weights[0], "ema": weights[1]}, "run/last.pt")
    return module


def draw(out, options="", file="run/last.pt", n=5):
    line = f"--sample {file} --out {out} --n-samples {n} --sampling-steps 4 --quiet"
    return command_line(supersample, f"{line} {options}")


def pictures(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def pixels(folder, n=5):
    files = [Path(folder, f"{i:06}.png") for i in range(n)]
    return np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)


def start_noise(model, seed, i):
    """Return the noise that image i starts from, (1, C, S, S)."""
    return torch.randn(1, *model.shape, generator=base.rng("cpu", seed, i, 0, 4))


def test_samples_are_files_and_a_grid_and_repeat():
    make()
    assert draw("a") == draw("b") == 0 and pictures("a") == pictures("b")
    assert sorted(pictures("a")) == [*(f"{i:06}.png" for i in range(5)), "grid.png"]
    assert len({*pictures("a").values()}) == 6
    image, grid = Image.open("a/000004.png"), Image.open("a/grid.png")
    assert image.size == (8, 8) and image.mode == "L"
    assert grid.size == (2 * 66 + 2, 3 * 66 + 2)  # eight times as large, and borders
    corner = np.asarray(grid)[2 + 66 * 2 : 2 + 66 * 2 + 64 : 8, 2:66:8, 0]
    assert (corner == np.asarray(image)).all()
    assert command_line(supersample, "--sample run/last.pt --quiet") == 0
    assert len(pictures("run/samples")) == 64 + 1


def test_every_option_changes_the_images():
    make()
    options = ["", "--no-ema", "--eta 1", "--sampler ddpm", "--sampler heun", "--bf16"]
    options += ["--sampler dpmpp", "--seed 1", "--sampling-steps 7", "--eta 0.5"]
    for k, option in enumerate(options):
        assert draw(str(k), option) == 0
    drawn = [pictures(str(k))["000001.png"] for k in range(len(options))]
    assert drawn[2] == drawn[3] and len({*drawn}) == len(options) - 1


def test_an_image_depends_on_the_seed_and_its_number_alone():
    """So does its fresh noise: not on the batch, the number of images or processes."""
    make()
    assert draw("one", "--eta 1 --batch 2") == draw("all", "--eta 1", n=9) == 0
    one, more = pictures("one"), pictures("all")
    assert all(one[f"{i:06}.png"] == more[f"{i:06}.png"] for i in range(5))
    workers = start(draw, "two", "--eta 1 --batch 2", world=2)
    assert finish(workers) == [0, 0] and pictures("two") == one
    model, seen = supersample.open_model("run/last.pt")[1], []
    for k in range(5):  # all noises of image 3, drawn alone
        g = base.rng("cpu", 0, 3, k, 4)
        seen.append(torch.randn(1, 1, 8, 8, generator=g))
    image = solve(model, seen[0], "ddim", 4, 1.0, lambda k: seen[k])[0, 0]
    assert (pixels("one")[3] == ((image + 1) * 127.5).round().numpy()).all()


OTHERS = {
    "superminddpm": {},
    "supercurriculum": {},
    "supersparse": {},
    "superreg": {},
    "superobjective": {"objective": "v", "schedule": "linear", "T": 200},
    "superguide": {"class_cond": False},
    "superflow": {},
    "superarch": {"arch": "naive"},
    "supervideo": {"seq_len": 3, "shape": (9, 8, 8)},
}


@pytest.mark.parametrize("script", OTHERS)
def test_a_checkpoint_of_any_script_is_drawn_from(script):
    """As that script itself draws; raw and averaged weights, frames side by side."""
    module = make(script, **OTHERS[script])
    for ema, option in ((True, ""), (False, "--no-ema")):
        assert draw(f"{ema}", f"{option} --seed 3") == 0
        model = module.load("run/last.pt", ema)
        xt = torch.cat([start_noise(model, 3, i) for i in range(5)])
        want = ((model.sample(xt.shape, 4, xt=xt) + 1) * 127.5).round()
        frames = want.split(3, dim=1) if script == "supervideo" else [want]
        want = torch.cat(frames, dim=3).squeeze(1).numpy()
        want = want.transpose(0, 2, 3, 1) if want.ndim == 4 else want
        assert (pixels(f"{ema}") == want).all() and want.std() > 20


def test_clips_are_a_film_with_noise_that_frames_share():
    options = {"shape": (3, 8, 8), "seq_len": 3, "temporal": False}
    make("supervideo", noise="shared", **options)
    assert draw("still", "--eta 1") == 0
    strips = pixels("still")
    assert strips.shape == (5, 8, 24)
    assert (strips[..., :8] == strips[..., 16:]).all()  # one noise in all, at each step
    make("supervideo", noise="independent", **options)
    assert draw("film", "--eta 1") == 0
    assert not (pixels("film")[..., :8] == pixels("film")[..., 16:]).all()
    film, grid = Image.open("film/grid.webp"), Image.open("film/grid.png")
    assert film.n_frames == 3 and film.size == (66 + 2, 5 * 66 + 2)
    assert grid.size == (3 * 64 + 4, 5 * 66 + 2)
    film.seek(2)
    last = np.asarray(film.convert("L")).astype(int)[2:66:8, 2:66:8]  # lossy: nearly
    assert np.abs(last - pixels("film")[0][:, 16:]).mean() < 15


def test_labels_and_strengths_of_superguide():
    """Images that differ in their strength alone stand in one row of the grid."""
    guide = make("superguide")
    assert draw("a", "--labels 3 7 --guidance 0 1 3 --batch 4", n=12) == 0
    with open("a/labels.csv") as f:
        rows = [[float(x) for x in list(row.values())[1:]] for row in csv.DictReader(f)]
    assert rows == [[y, w] for y in (3, 7, 3, 7) for w in (0, 1, 3)]
    model, found = guide.load("run/last.pt"), pixels("a", 12)
    for i, (y, w) in enumerate(rows):
        guide.condition(model, torch.tensor([int(y)]), w)
        xt = start_noise(model, 0, i // 3)
        image = ((model.sample(xt.shape, 4, xt=xt)[0, 0] + 1) * 127.5).round()
        assert np.abs(found[i] - image.numpy()).max() <= 1  # w = 1: another rounding
    assert len(np.unique(found, axis=0)) == 12
    assert Image.open("a/grid.png").size == (3 * 66 + 2, 4 * 66 + 2)


def test_without_labels_all_classes_take_turns():
    make("superguide")
    assert draw("all", n=12) == draw("named", "--labels 0 1 2 3 4 5 6 7 8 9", n=12) == 0
    assert pictures("all") == pictures("named")
    assert "000011.png,1,1\n" in Path("all/labels.csv").read_text()
    assert Image.open("all/grid.png").size == (10 * 66 + 2, 2 * 66 + 2)


# ---- what is refused -----------------------------------------------------------------

BAD = {
    "--n-samples 0": "other numbers 1 or more",
    "--sampling-steps 0": "other numbers 1 or more",
    "--batch 0": "other numbers 1 or more",
    "--guidance": "other numbers 1 or more",
    "--guidance nan": "--guidance takes numbers",
    "--eta 1.5": "--eta is 0 to 1",
    "--seed -1": "--seed 0 or more",
    "--sampling-steps 2000": "--sampling-steps is at most 1000",
    "--sampler euler": "euler",
    "--labels 3": "run/last.pt has no labels",
    "--guidance 3": "run/last.pt has no labels",
    "--n-feat 24": "--n-feat",
    "--sampler heun --eta 1": "--eta is for --sampler ddim",
}


@pytest.mark.parametrize("options", BAD)
def test_what_is_impossible_or_has_no_effect_is_refused(capsys, options):
    make()
    assert draw("a", options) == 2 and not Path("a").exists()
    said = capsys.readouterr()
    assert BAD[options] in re.sub(r"[│─╭╮╰╯\s]+", " ", said.out + said.err)


def test_labels_that_are_not_there_and_full_folders_are_refused(capsys):
    make("superguide")
    assert draw("a", "--labels 3 10") == 2 and not Path("a").exists()
    assert "run/last.pt has labels 0 to 9" in capsys.readouterr().err
    Path("full").mkdir()
    Path("full/mine.txt").write_text("")
    assert draw("full") == 2 and len([*Path("full").iterdir()]) == 1
    assert "full is not empty" in capsys.readouterr().err


class Foreign:
    pass


@pytest.mark.parametrize("kind", ["none", "text", "object", "keys", "script", "width"])
def test_a_broken_or_foreign_checkpoint_gets_one_line(capsys, kind):
    make()
    whole = state("run")
    contents = {"object": Foreign(), "keys": {"x": 1}, "script": {"script": "other"}}
    contents["width"] = {**whole, "config": {**whole["config"], "n_feat": 16}}
    if kind == "text":
        Path("x.pt").write_text("hello")
    elif kind != "none":
        torch.save(contents[kind], "x.pt")
    assert draw("a", file="x.pt") == 2 and not Path("a").exists()
    said = capsys.readouterr().err
    assert "cannot draw from x.pt: " in said and said.count("\n") == 1
    assert len(said) < 300


def test_bare_it_draws_from_the_run_of_the_base_which_it_trains_first(monkeypatch):
    train, seen = base.train, []

    def short(cfg):
        seen.append(cfg)
        return train(replace(cfg, steps=2, n_feat=8))

    monkeypatch.setattr(base, "train", short)
    line = "--n-samples 3 --sampling-steps 4 --quiet"
    assert command_line(supersample, line) == 0 and seen == [base.Config(quiet=True)]
    run = Path("runs/superminddpm-digits")
    assert draw("own", file=run / "last.pt", n=3) == 0
    assert pictures(run / "samples") == pictures("own") and len(pictures("own")) == 4
    assert command_line(supersample, f"{line} --out again") == 0 and len(seen) == 1
