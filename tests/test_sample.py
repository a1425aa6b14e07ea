"""The samplers, against diffusers and closed forms, and other scripts' checkpoints."""

import csv
import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command_line, finish, start
from diffusers import DPMSolverMultistepScheduler as DPMSolver
from diffusers import HeunDiscreteScheduler as HeunScheduler
from PIL import Image
from test_diffusion import Fixed, normal
from test_family import train

import supersample
from supersample import DDPM, solve

M, S = 0.3, 0.2  # the mean and spread of the Gaussian that the exact denoiser knows


def gaussian(T=1000):
    """Return a DDPM in double precision that knows E[eps | x_t] of x_0 ~ N(M, S^2).

    Its betas are linear: with the cosine schedule sigma is 20,000 at first, too much
    for the single precision of diffusers.
    """
    ddpm = DDPM(None, T).double()
    beta = torch.linspace(1e-4, 0.02, T).double() * 1000 / T
    ddpm.alphabar[1:] = (1 - beta).cumprod(0)

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


def theirs(scheduler, ddpm, xt, calls):
    """Return every x_t that a scheduler of diffusers comes through, and its images."""
    scheduler.alphas_cumprod = ddpm.alphabar[1:]  # theirs is rounded elsewhere
    scheduler.set_timesteps(timesteps=[*dict.fromkeys(t - 1 for t, _ in calls)])
    path, x = [], xt
    if isinstance(scheduler, HeunScheduler):  # its x is x_t / sqrt(abar)
        x = xt / ddpm.alphabar[1000].sqrt()
    for time in scheduler.timesteps:
        path.append(scheduler.scale_model_input(x, time))
        t = torch.full((len(xt),), round(float(time)) + 1)
        x = scheduler.step(ddpm.predict(path[-1], t)[1], time, x).prev_sample
    return path, x.clamp(-1, 1)


@pytest.mark.parametrize("n", [5, 10, 50])
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmpp", 2)])
def test_dpmpp_and_ddim_trajectories_equal_diffusers(monkeypatch, sampler, order, n):
    """DDIM is the first order of DPM-Solver++."""
    ddpm, xt = gaussian(), normal(0, 16, 1, 4, 4).double()
    calls, images = walk(monkeypatch, ddpm, xt, sampler, n)
    options = {"solver_order": order, "lower_order_final": order == 2}
    options |= {"euler_at_final": order == 2}
    path, last = theirs(DPMSolver(**options), ddpm, xt, calls)
    assert len(path) == len(calls) == n
    for (_, mine), other in zip(calls, path, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)
    torch.testing.assert_close(images, last, atol=1e-4, rtol=0)


@pytest.mark.parametrize("steps", [3, 10])
def test_heun_trajectory_equals_diffusers(monkeypatch, steps):
    """2 n - 1 calls make n steps."""
    ddpm, xt = gaussian(), normal(0, 16, 1, 4, 4).double()
    calls, images = walk(monkeypatch, ddpm, xt, "heun", 2 * steps - 1)
    scheduler = HeunScheduler()
    path, last = theirs(scheduler, ddpm, xt, calls)
    assert len(path) == len(calls) == 2 * steps - 1
    for (_, mine), other in zip(calls, path, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(images, last, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("sampler", "least"), [("ddim", 1.7), ("heun", 2.4), ("dpmpp", 2.4)]
)
def test_twice_the_steps_divide_the_error_by_2_or_by_more(sampler, least):
    """To the exact solution of the ODE: a Gaussian keeps its shape on the way.

    Second order would be 4, but for the last step, to log-SNR = infinity.
    """
    ddpm, xt = gaussian(64_000), 0.7 * torch.ones(1, 1, 1, 1).double()
    ab = ddpm.alphabar[64_000]
    start_at = (xt - ab.sqrt() * M) / (ab * S**2 + 1 - ab).sqrt()
    exact, errors = M + S * start_at, []
    for n in (16, 32, 64):
        calls = 2 * n - 1 if sampler == "heun" else n
        errors.append((solve(ddpm, xt, sampler, calls) - exact).abs().item())
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        assert least < coarse / fine < 4.5, errors


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun", "dpmpp"])
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_steps_are_calls_of_the_network(monkeypatch, sampler, n):
    ddpm, xt = gaussian(), normal(0, 2, 1, 4, 4).double()

    def noise(k):
        return torch.zeros_like(xt)

    calls, images = walk(monkeypatch, ddpm, xt, sampler, n, 0.0, noise)
    assert len(calls) == n and calls[0][0] == 1000 and images.abs().max() <= 1


def test_ddpm_is_ddim_with_all_its_noise_and_asks_for_it_once_a_step():
    ddpm, xt, asked = gaussian(), normal(0, 2, 1, 4, 4).double(), []

    def noise(k):
        asked.append(k)
        return normal(k + 1, 2, 1, 4, 4).double()

    ddpm_images = solve(ddpm, xt, "ddpm", 10, 0.0, noise)
    assert asked == [*range(10)]
    assert torch.equal(ddpm_images, solve(ddpm, xt, "ddim", 10, 1.0, noise))
    assert not torch.equal(ddpm_images, solve(ddpm, xt, "ddim", 10))


# ---- checkpoints ---------------------------------------------------------------------


def pictures(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def draw(out, options="", file="run/last.pt", n=5):
    line = f"--sample {file} --out {out} --n-samples {n} --sampling-steps 4 --quiet"
    return command_line(supersample, f"{line} {options}")


@pytest.fixture
def run(tiny):
    train("superminddpm", "run", steps=3)


def test_samples_are_files_and_a_grid_and_repeat(run):
    assert draw("a") == draw("b") == 0 and pictures("a") == pictures("b")
    assert sorted(pictures("a")) == [*(f"{i:06}.png" for i in range(5)), "grid.png"]
    assert len({*pictures("a").values()}) == 6
    image = Image.open("a/000004.png")
    assert image.size == (8, 8) and image.mode == "L"
    assert draw("a") == 2  # never into a full folder


def test_every_option_changes_the_images(run):
    options = ["", "--no-ema", "--eta 1", "--sampler ddpm", "--sampler heun"]
    options += ["--sampler dpmpp", "--seed 1", "--sampling-steps 7"]
    for k, option in enumerate(options):
        assert draw(str(k), option) == 0
    drawn = {pictures(str(k))["000001.png"] for k in range(len(options))}
    assert len(drawn) == len(options) - 1  # ddpm is ddim with eta 1


def test_an_image_depends_on_the_seed_and_its_number_alone(run):
    assert draw("one", "--eta 1 --batch 2") == 0
    assert draw("more", "--eta 1 --batch 7", n=9) == 0
    one, more = pictures("one"), pictures("more")
    assert all(one[f"{i:06}.png"] == more[f"{i:06}.png"] for i in range(5))
    workers = start(draw, "two", "--eta 1 --batch 2", world=2)
    assert finish(workers) == [0, 0] and pictures("two") == one


def test_the_first_noise_and_the_model_are_those_of_the_checkpoint(run):
    """Against the same sampler of the script that wrote it, by hand."""
    import superminddpm as base

    ddpm, images = base.load("run/last.pt"), []
    for i in range(5):
        xt = torch.randn(1, 1, 8, 8, generator=base.rng("cpu", 0, i, 0, 4))
        images.append(ddpm.sample(xt.shape, steps=4, xt=xt))
    assert draw("a") == 0
    for i, image in enumerate(images):
        found = np.asarray(Image.open(f"a/{i:06}.png"))
        assert (found == ((image[0, 0] + 1) * 127.5).round().numpy()).all()


@pytest.mark.parametrize(
    "script", sorted({path.stem for path in ROOT.glob("super*.py")})
)
def test_a_checkpoint_of_any_script_is_drawn_from(tiny, script):
    train(script, "run", steps=2)
    assert draw("a") == 0
    side = 8 if script != "supervideo" else Image.open("a/000000.png").size[1]
    strip = 2 if script == "supervideo" else 1  # two frames beside one another
    assert Image.open("a/000000.png").size == (strip * side, side)
    assert Path("a/grid.webp").exists() is (script == "supervideo")
    assert Path("a/labels.csv").exists() is (script == "superguide")


def test_labels_and_strengths_of_superguide(tiny):
    train("superguide", "run", steps=8)
    assert draw("a", "--labels 3 7 --guidance 0 1 3", n=12) == 0
    with open("a/labels.csv") as f:
        rows = [(int(r["label"]), float(r["strength"])) for r in csv.DictReader(f)]
    assert rows == [(y, w) for y in (3, 7, 3, 7) for w in (0.0, 1.0, 3.0)]
    guide, seen = importlib.import_module("superguide"), []
    model = guide.load("run/last.pt")
    for i, (y, w) in enumerate(rows[:6]):
        guide.condition(model, torch.tensor([y]), w)
        xt = torch.randn(1, 1, 8, 8, generator=guide.rng("cpu", 0, i // 3, 0, 4))
        image = model.sample(xt.shape, steps=4, xt=xt)[0, 0]
        found = np.asarray(Image.open(f"a/{i:06}.png")).astype(int)
        assert np.abs(found - ((image + 1) * 127.5).round().numpy()).max() <= 1
        seen.append(found)
    assert not (seen[0] == seen[2]).all()


BAD = {
    "--n-samples 0": "the numbers above 0",
    "--eta 1.5": "--eta is 0 to 1",
    "--sampling-steps 2000": "--sampling-steps is at most 1000",
    "--sampler euler": "euler",
    "--labels 3": "run/last.pt knows no labels",
    "--n-feat 24 --lr 3": "there is no use for n_feat, lr",
}


@pytest.mark.parametrize("options", BAD)
def test_what_has_no_sense_or_no_effect_is_refused(run, capsys, options):
    assert draw("a", options) == 2 and not Path("a").exists()
    told = capsys.readouterr()
    assert BAD[options] in re.sub(r"[│─╭╮╰╯\s]+", " ", told.out + told.err)


@pytest.mark.parametrize("kind", ["missing", "text", "foreign", "unknown"])
def test_a_broken_or_foreign_checkpoint_gets_one_line(tiny, capsys, kind):
    path = Path("x.pt")
    if kind == "text":
        path.write_text("hello")
    elif kind != "missing":
        torch.save({"script": "superother"} if kind == "unknown" else {"x": 1}, path)
    assert draw("a", file="x.pt") == 2 and not Path("a").exists()
    told = capsys.readouterr().err
    assert "cannot use the checkpoint x.pt" in told and told.count("\n") == 1


def test_without_a_file_it_trains_as_the_base_and_draws(tiny):
    line = "--data tiny --steps 2 --out run --n-samples 3 --sampling-steps 2 --quiet"
    assert command_line(supersample, line) == 0
    assert len(pictures("run/samples")) == 4
