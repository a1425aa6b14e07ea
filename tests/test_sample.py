"""The samplers, against diffusers and closed forms, and other scripts' checkpoints."""

import csv
import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command_line
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers import DPMSolverMultistepScheduler as DPMSolver
from diffusers import HeunDiscreteScheduler as HeunScheduler
from PIL import Image
from sklearn.decomposition import PCA
from test_diffusion import Fixed, peer, wave
from test_family import train
from test_train import state

import superminddpm as base
import supersample
from supersample import DDPM, Solver, spaced

SAMPLERS = ["ddim", "ddpm", "heun", "dpmpp"]
SPACINGS = ["linear", "quadratic", "trailing"]
M, S = 0.3, 0.2  # the mean and spread of the Gaussian that the exact denoisers know


def spread(ab):
    return (ab * S**2 + 1 - ab).sqrt()


def gaussian(T=1000, clip=False):
    """Return a DDPM that knows E[eps | x_t] of x_0 ~ N(M, S^2), and notes its calls."""
    ddpm, calls = DDPM(None, T), []

    def exact(xt, t):
        calls.append((t[0].item(), xt))
        ab = ddpm.alphabar[t].view(-1, 1, 1, 1)
        return (1 - ab).sqrt() * (xt - ab.sqrt() * M) / spread(ab) ** 2

    ddpm.net, ddpm.clip = Fixed(exact), clip
    return ddpm, calls


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def theirs(scheduler, eps_of, xt, times, scale=1.0):
    """Return every x_t that a scheduler of diffusers comes through, in our scale.

    times: ours, 1..T, without the last 0. eps_of(xt, t): the guess of the noise.
    scale: what the scheduler's x is divided by at the start, as its sigma is noise over
    signal.
    """
    path, x = [], xt * scale  # in double: sigma, and x with it, is 158 at first
    for time in times:
        seen = scheduler.scale_model_input(x, time).float()
        path.append(seen)
        t = torch.full((len(xt),), round(float(time)) + 1)
        x = scheduler.step(eps_of(seen, t), time, x).prev_sample
    return path, x.float()


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("n", [5, 10, 50])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp"])
def test_dpmpp_and_ddim_trajectories_equal_diffusers(sampler, n, spacing, clip):
    """DDIM is the first order of DPM-Solver++; theirs takes any list of times."""
    ddpm, calls = gaussian(clip=clip)
    ddpm.spacing = spacing
    xt = noise(64, 1, 4, 4)
    ours = ddpm.sample(xt.shape, n, sampler, xt=xt)
    order = {"ddim": 1, "dpmpp": 2}[sampler]
    options = {"solver_order": order, "lower_order_final": False}
    scheduler = peer(DPMSolver, 1000, **options)
    times = [t - 1 for t, _ in calls]
    scheduler.alphas_cumprod = ddpm.alphabar[1:]  # theirs is rounded elsewhere
    scheduler.set_timesteps(timesteps=times)
    path = [x for _, x in calls]

    def eps_of(x, t):
        return ddpm.predict(x, t)[1]

    want, last = theirs(scheduler, eps_of, xt, scheduler.timesteps)
    assert len(want) == len(path) == n and path[0] is xt
    for mine, other in zip(path, want, strict=False):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours, last.clamp(-1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [6, 10, 25])
def test_heun_trajectory_equals_diffusers(steps, spacing, clip):
    """2 n - 1 calls make n steps; x in their scale is x_t / sqrt(abar).

    Three steps, the first from sigma 158, blow up the rounding of float32 to 8e-4.
    """
    ddpm, calls = gaussian(clip=clip)
    ddpm.spacing = spacing
    xt = noise(64, 1, 4, 4)
    ours = ddpm.sample(xt.shape, 2 * steps - 1, "heun", xt=xt)
    path = list(calls)
    scheduler = peer(HeunScheduler, 1000)
    times = [*dict.fromkeys(t - 1 for t, _ in path)]
    assert len(times) == steps
    scheduler.alphas_cumprod = ddpm.alphabar[1:]  # theirs is rounded elsewhere
    scheduler.set_timesteps(timesteps=times)
    scale = ddpm.alphabar[1000].rsqrt()

    def eps_of(x, t):
        return ddpm.predict(x, t)[1]

    options = (scheduler, eps_of, xt.double(), scheduler.timesteps, scale)
    want, last = theirs(*options)
    assert len(want) == len(path) == 2 * steps - 1
    for (_, mine), other in zip(path, want, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours, last.clamp(-1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ddim_with_noise_equals_diffusers(eta):
    ddpm, calls = gaussian()
    scheduler = peer(DDIMScheduler, 1000, timestep_spacing="trailing")
    scheduler.config.clip_sample = False
    scheduler.set_timesteps(20)
    xt = noise(64, 1, 4, 4)
    ours = ddpm.sample(xt.shape, 20, "ddim", eta, torch.Generator().manual_seed(1), xt)
    path, want = list(calls), xt
    g = torch.Generator().manual_seed(1)
    for (t, mine), time in zip(path, scheduler.timesteps, strict=True):
        assert t == time + 1
        torch.testing.assert_close(mine, want, atol=1e-4, rtol=0)
        z = torch.randn(xt.shape, generator=g)
        eps_hat = ddpm.eps_hat(want, torch.full((64,), t))
        options = {"eta": eta, "variance_noise": z}
        want = scheduler.step(eps_hat, time, want, **options).prev_sample
    torch.testing.assert_close(ours, want.clamp(-1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    ("variance", "kind"), [("beta", "fixed_large"), ("beta-tilde", "fixed_small")]
)
@pytest.mark.parametrize("n", [10, 50, 1000])
def test_ddpm_on_fewer_times_equals_diffusers(n, variance, kind, clip):
    ddpm, calls = gaussian(clip=clip)
    ddpm.variance = variance
    options = {"variance_type": kind, "timestep_spacing": "trailing"}
    scheduler = peer(DDPMScheduler, 1000, clip_sample=clip, **options)
    scheduler.set_timesteps(n)
    xt = noise(16, 1, 4, 4)
    ddpm.sample(xt.shape, n, "ddpm", generator=torch.Generator().manual_seed(1), xt=xt)
    path, want = list(calls), xt
    g = torch.Generator().manual_seed(1)
    for (t, mine), time in zip(path, scheduler.timesteps, strict=True):
        assert t == time + 1
        torch.testing.assert_close(mine, want, atol=1e-3, rtol=0)
        eps_hat = ddpm.eps_hat(want, torch.full((16,), t))
        want = scheduler.step(eps_hat, time, want, generator=g).prev_sample


def test_the_last_step_of_ddpm_adds_no_noise():
    ddpm, _ = gaussian()
    xt, t, s = noise(9, 1, 4, 4), torch.ones(9, dtype=int), torch.zeros(9, dtype=int)
    solver = Solver(ddpm, "ddpm", 10)
    assert torch.equal(solver.step(xt, t, s), solver.step(xt, t, s))
    noisy = [solver.step(xt, t + 5, s + 2) for _ in range(2)]
    assert not torch.equal(*noisy)


def test_ddpm_with_all_calls_is_the_base_bit_for_bit():
    own, old = DDPM(Fixed(wave), 100), base.DDPM(Fixed(wave), 100)
    xt = noise(4, 1, 4, 4)
    g, h = (torch.Generator().manual_seed(1) for _ in range(2))
    mine = own.sample(xt.shape, 100, "ddpm", generator=g, xt=xt)
    assert torch.equal(mine, old.sample(xt.shape, 1, "ddpm", generator=h, xt=xt))


def test_ddpm_with_the_beta_between_neighbours_is_the_base_up_to_rounding():
    own, old = DDPM(Fixed(wave), 1000), base.DDPM(Fixed(wave), 1000)
    xt = noise(4, 1, 4, 4)
    for t in (1000, 600, 40):
        t = torch.full((4,), t)
        mine = Solver(own, "ddpm", 10, torch.Generator().manual_seed(1))
        want = old.p_sample(xt, t, torch.Generator().manual_seed(1))
        torch.testing.assert_close(mine.step(xt, t, t - 1), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("n", [4, 30])
def test_ddim_with_all_its_noise_is_ddpm_with_beta_tilde(n):
    """Song, Meng and Ermon, Sec. 4.1: both draw from q(x_s | x_t, x0_hat)."""
    ddpm, _ = gaussian()
    ddpm.variance, xt = "beta-tilde", noise(9, 1, 4, 4)
    g, h = (torch.Generator().manual_seed(1) for _ in range(2))
    ddim = ddpm.sample(xt.shape, n, "ddim", 1.0, g, xt)
    ours = ddpm.sample(xt.shape, n, "ddpm", generator=h, xt=xt)
    torch.testing.assert_close(ddim, ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("heun", 2), ("dpmpp", 2)])
def test_the_order_of_convergence(sampler, order):
    """Against the exact solution of the ODE, from T to T/10, where log-SNR is finite.

    A Gaussian keeps its shape: (x_t - sqrt(abar_t) M) / spread(abar_t) is constant.
    """
    T, errors = 64_000, []
    ddpm, _ = gaussian(T)
    xt = noise(200, 1, 2, 2)
    start, end = ddpm.alphabar[T], ddpm.alphabar[T // 10]
    exact = (xt - start.sqrt() * M) / spread(start) * spread(end) + end.sqrt() * M
    for n in (16, 32, 64):
        solver, x = Solver(ddpm, sampler, 2 * n), xt
        times = torch.linspace(T, T // 10, n + 1).round().long()
        solver.second = n
        for t, s in zip(times[:-1], times[1:], strict=True):
            t, s = t.expand(len(xt)), s.expand(len(xt))
            x = (solver.step or ddpm.ddim_step)(x, t, s)
        errors.append((x - exact).square().mean().sqrt().item())
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        found = torch.tensor(coarse / fine).log2().item()
        assert found == pytest.approx(order, abs=0.3), errors


@pytest.mark.parametrize("sampler", ["heun", "dpmpp"])
def test_second_order_gets_nearer_with_the_same_calls(sampler):
    """To the noise's own image under the ODE, the last step to t = 0 included.

    Not so with equal steps in t: there the last step, of first order, decides.
    """
    ddpm, _ = gaussian()
    ddpm.spacing = "quadratic"
    xt = noise(200, 1, 2, 2)
    start = ddpm.alphabar[1000]
    exact = (xt - start.sqrt() * M) / spread(start) * S + M
    for n in (20, 50, 100):
        error = {}
        for name in ("ddim", sampler):
            x0 = ddpm.sample(xt.shape, n, name, xt=xt)
            error[name] = (x0 - exact.clamp(-1, 1)).square().mean().sqrt().item()
        assert error[sampler] < 0.4 * error["ddim"], error


@pytest.mark.parametrize("T", [25, 100, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_times_fall_from_T_to_0(spacing, T):
    for n in range(1, T + 1):
        times = spaced(T, n, spacing)
        assert times[0] == T and times[-1] == 0 and len(times) == n + 1
        assert (times.diff() < 0).all(), n
    assert spaced(T, T, spacing).tolist() == [*range(T, -1, -1)]


def test_times_of_each_spacing():
    assert spaced(1000, 4, "trailing").tolist() == [1000, 750, 500, 250, 0]
    assert spaced(1000, 4, "linear").tolist() == [1000, 667, 334, 1, 0]
    assert spaced(1000, 4, "quadratic").tolist() == [1000, 562, 250, 62, 0]
    assert spaced(1000, 1, "linear").tolist() == [1000, 0]
    g = torch.Generator().manual_seed(0)
    for n in torch.randint(1, 1001, (50,), generator=g).tolist():
        scheduler = peer(DDIMScheduler, 1000, timestep_spacing="linspace")
        scheduler.set_timesteps(n)
        ours = spaced(1000, n, "linear")[:-1] - 1
        assert (ours - scheduler.timesteps).abs().max() <= 1  # they round otherwise


@pytest.mark.parametrize("n", [1, 2, 3, 10, 49, 50, 200])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_network_is_called_as_often_as_asked(sampler, n):
    ddpm, calls = gaussian(T=100)
    ddpm.sample((2, 1, 4, 4), n, sampler)
    assert len(calls) == min(n, 100)
    assert calls[0][0] == 100 and min(t for t, _ in calls) >= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_exact_denoiser_of_a_gaussian_gives_that_gaussian(sampler):
    ddpm, _ = gaussian(clip=True)
    g = torch.Generator().manual_seed(0)
    x = ddpm.sample((20_000, 1, 1, 1), 250, sampler, generator=g)
    assert x.mean().item() == pytest.approx(M, abs=0.006)
    assert x.std().item() == pytest.approx(S, rel=0.04)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clipping_rederives_eps_and_can_be_left_out(sampler):
    """A guess of no noise puts x0_hat at x_t / sqrt(abar), far out unless clipped."""
    xt, t = noise(4, 1, 4, 4), torch.full((4,), 900)
    ddpm = DDPM(Fixed(lambda xt, t: torch.zeros_like(xt)), 1000)
    x0_hat, eps_hat = ddpm.predict(xt, t)
    assert x0_hat.abs().max() == 1 and eps_hat.abs().max() > 0.01
    back = ddpm.q_sample(x0_hat, t, eps_hat)
    torch.testing.assert_close(back, xt, atol=1e-5, rtol=0)
    seen = []
    for ddpm.clip in (True, False):
        solver = Solver(ddpm, sampler, 9, torch.Generator().manual_seed(1))
        seen.append((solver.step or ddpm.ddim_step)(xt, t, t - 400))
    assert seen[0].abs().max() < 5 < seen[1].abs().max()
    x0_hat, eps_hat = ddpm.predict(xt, t)
    assert x0_hat.abs().max() > 10 and (eps_hat == 0).all()


def test_ddim_as_the_base_does_it_is_the_base_bit_for_bit():
    own, old = DDPM(Fixed(wave), 1000), base.DDPM(Fixed(wave), 1000)
    xt = noise(4, 1, 4, 4)
    for steps, eta in ((1, 0.0), (7, 0.0), (50, 0.5), (1000, 1.0)):
        g, h = (torch.Generator().manual_seed(1) for _ in range(2))
        mine = own.sample(xt.shape, steps, "ddim", eta, g, xt)
        assert torch.equal(mine, old.sample(xt.shape, steps, "ddim", eta, h, xt))


# ---- checkpoints and the command line ------------------------------------------------


def main(line):
    return command_line(supersample, line)


def pictures(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def shake(path):
    """Make the weights of a short run large enough to tell samples apart."""
    state = torch.load(path, weights_only=True)
    g = torch.Generator().manual_seed(0)
    for weights in (state["net"], state["ema"]):
        for name, weight in weights.items():
            if re.fullmatch(r"net\..*(weight|bias)", name):
                weight += torch.randn(weight.shape, generator=g) * 0.1
    torch.save(state, path)


@pytest.fixture
def checkpoint():
    train("superminddpm", "run", steps=3)
    shake("run/last.pt")
    return Path("run/last.pt")


CHOICES = [
    "",
    "--sampler ddpm",
    "--sampler ddpm --variance beta-tilde",
    "--sampler heun",
    "--sampler dpmpp",
    "--spacing linear",
    "--spacing quadratic",
    "--no-clip",
    "--eta 0.5",
    "--sampling-steps 8",
    "--seed 1",
]


def test_every_option_changes_the_images_and_one_seed_repeats_them(checkpoint):
    for k, options in enumerate(CHOICES):
        for out in (f"{k}", f"{k}-again"):
            line = f"--sample {checkpoint} --n-samples 6 --batch 3 --out {out} --quiet"
            assert main(f"{line} --sampling-steps 7 {options}") == 0
        assert pictures(f"{k}") == pictures(f"{k}-again")
        files = [Path(str(k), f"{i:06}.png").read_bytes() for i in range(6)]
        assert len(set(files)) == 6  # the second batch of three is no copy of the first
    grids = [Path(str(k), "grid.png").read_bytes() for k in range(len(CHOICES))]
    assert len(set(grids)) == len(CHOICES)


OTHERS = [(path.stem, {}) for path in sorted(ROOT.glob("super*.py"))]
OTHERS += [
    ("supersparse", {"sparsity": "0.8,0.5,0.5"}),
    ("supersparse", {"sparsity": "0.8,0.5,0.5", "mask_at": "seed"}),
    ("superobjective", {"objective": "x0", "schedule": "sigmoid"}),
    ("superarch", {"arch": "attention"}),
    ("superarch", {"arch": "naive", "T": 200}),
]


def short_run(script, **options):
    """Write run/last.pt, with weights that tell images apart, and no pictures."""
    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.DDPM, "sample", lambda self, shape, xt: xt)
        for name in "plot_history plot_mask plot_norms class_grid compare".split():
            patch.setattr(module, name, lambda *_: "", raising=False)
        train(script, "run", steps=5, **options)
    shake("run/last.pt")
    return module


@pytest.mark.parametrize(("script", "options"), OTHERS)
def test_a_checkpoint_of_any_script_draws_what_that_script_draws(script, options):
    module = short_run(script, **options)
    for ema in (True, False):
        theirs = module.load("run/last.pt", ema)
        xt = noise(3, *theirs.shape)
        want = theirs.sample(xt.shape, 5, xt=xt)
        ours = supersample.load("run/last.pt", ema)
        found = ours.sample(xt.shape, 5, xt=xt)
        assert torch.equal(found, want) and found.std() > 0.01
    drawn = [ours.sample(xt.shape, 5, name, xt=xt) for name in ("heun", "dpmpp")]
    assert not torch.equal(*drawn) and not torch.equal(drawn[1], found)
    command = "--sample run/last.pt --n-samples 2 --sampling-steps 3 --quiet"
    assert main(f"{command} --sampler dpmpp") == 0
    width, height = Image.open("run/samples/000001.png").size  # of clips: all frames
    assert height == xt.shape[-1] and width * height == xt[0].numel()


class Clips:
    """What a script of clips has beside load: correlated noise, channels of a frame."""

    @staticmethod
    def correlate(z, channels, correlation):
        return z[:, :channels].repeat(1, z.shape[1] // channels, 1, 1) * correlation


def test_noise_and_files_of_clips_are_those_of_their_script():
    """Start, ddim, ddpm and the base's ddpm: all noise goes through correlate."""
    model = base.DDPM(Fixed(wave), 100)
    model.channels, model.correlation = 1, 1.0
    ddpm = DDPM(supersample.Guest(Clips, model), 100)
    for options in ((6, "ddim", 0.0), (6, "ddim", 1.0), (6, "ddpm"), (100, "ddpm")):
        clips = ddpm.sample((2, 3, 4, 4), *options)
        assert torch.equal(clips, clips[:, :1].expand_as(clips)), options
    clips = torch.arange(2.0 * 6 * 4 * 4).view(2, 6, 4, 4)
    model.channels = 2
    strips = supersample.as_strips(ddpm.net, clips)
    assert strips.shape == (2, 2, 4, 12)
    for k in range(3):
        assert torch.equal(strips[..., 4 * k : 4 * k + 4], clips[:, 2 * k : 2 * k + 2])
    assert torch.equal(supersample.as_strips(None, clips), clips)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp"])
def test_labels_ask_the_network_of_superguide(sampler):
    """Image i gets the i-th label, in turn; so do the batches after the first."""
    superguide = short_run("superguide")
    line = f"--sample run/last.pt --n-samples 3 --batch 2 --sampler {sampler} --quiet"
    assert main(f"{line} --sampling-steps 4 --out own --labels 7,2,5 --guidance 2") == 0
    ours = supersample.load("run/last.pt")
    xt = torch.stack(
        [torch.randn(ours.shape, generator=base.rng("cpu", 0, i, 4)) for i in range(3)]
    )
    for labels, same in (([7, 2, 5], True), ([7, 2, 7], False), (None, False)):
        superguide.condition(ours.net.model, labels, 2.0)
        want = ((ours.sample(xt.shape, 4, sampler, xt=xt) + 1) * 127.5).round()
        found = [np.asarray(Image.open(f"own/{i:06}.png")) for i in range(3)]
        far = np.abs(np.stack(found) - want[:, 0].numpy()).max((1, 2))
        assert (far <= 1).all() if same else (far > 1).any()
    assert main(f"{line} --out eleven --labels 10") == 2
    assert main(f"{line} --out words --labels seven") == 2


def spoil(path, **changes):
    content = torch.load(path, weights_only=True)
    for name, value in changes.items():
        if name == "net":
            content["net"], content["ema"] = (
                value(content["net"]),
                value(content["ema"]),
            )
        elif name == "options":
            content["config"] |= value
        else:
            content[name] = value
    torch.save(content, path)


REFUSED = {
    "another width": (
        {"options": {"n_feat": 16}},
        "is from another model: size mismatch for net.time1.weight",
    ),
    "a layer more": (
        {"net": lambda net: {**net, "net.label.weight": torch.zeros(3)}},
        'is from another model: Unexpected key(s) in state_dict: "net.label.weight"',
    ),
    "a layer less": (
        {"net": lambda net: {k: net[k] for k in net if k != "net.out.bias"}},
        'is from another model: Missing key(s) in state_dict: "net.out.bias"',
    ),
    "no script of ours": (
        {"script": "elsewhere"},
        "was written by elsewhere.py, which is not beside supersample.py",
    ),
    "no name of a script": (
        {"script": "tests/conftest"},
        "was written by tests/conftest.py, which is not beside supersample.py",
    ),
    "another script's name": (
        {"script": "superguide"},
        'is from another model: Missing key(s) in state_dict: "net.classes.weight"',
    ),
    "an option gone bad": ({"config": 3}, "is no checkpoint, or cut short"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_foreign_checkpoint_is_refused_with_what_differs(checkpoint, capsys, kind):
    changes, words = REFUSED[kind]
    spoil(checkpoint, **changes)
    before = sorted(Path().rglob("*"))
    assert main(f"--sample {checkpoint} --quiet") == 2
    told = capsys.readouterr().err
    assert f"{checkpoint} {words}" in told and told.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


def test_broken_and_missing_files_are_refused_in_a_line(capsys):
    Path("noise.pt").write_bytes(b"noise")
    for name, words in (("noise.pt", "is no checkpoint"), ("none.pt", "there is no")):
        assert main(f"--sample {name}") == 2
        told = capsys.readouterr().err
        assert words in told and name in told and told.count("\n") == 1


def test_labels_are_refused_where_there_are_none(checkpoint, capsys):
    for path in (checkpoint, "own/last.pt"):
        if path != checkpoint:
            train("supersample", "own", steps=1)
        assert main(f"--sample {path} --labels 3 --quiet --out pictures") == 2
        assert f"{path} knows no labels" in capsys.readouterr().err
        assert not [*Path("pictures").glob("*.png")]


def test_only_own_checkpoints_are_gone_on_with(checkpoint, capsys):
    before = checkpoint.read_bytes()
    assert main(f"--resume {checkpoint} --steps 9 --quiet") == 2
    told = capsys.readouterr().err
    assert "was written by superminddpm.py, not supersample.py" in told
    assert told.count("\n") == 1 and checkpoint.read_bytes() == before


def test_delete_keys_leaves_weights_of_another_script_out(checkpoint):
    """The rest is taken, whoever wrote it."""
    options = "--n-feat 8 --n-train 64 --batch 32 --steps 1 --lr 0 --calls= --quiet"
    assert main(f"--init {checkpoint} --delete-keys out,up3 --out new {options}") == 0
    old, new = state("run")["ema"], state("new")["net"]
    kept = {k for k in old if k.startswith("net.") and torch.equal(old[k], new[k])}
    left = {k for k in old if k.startswith(("net.out.", "net.up3."))}
    assert left and not kept & left and len(kept | left) == len(old) - 3


# ---- the comparison at the end of a run ----------------------------------------------


def test_a_run_ends_with_a_table_and_a_picture_of_all_samplers():
    """The scores, computed anew with scikit-learn's PCA and numpy."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    quality = importlib.import_module("quality")
    train("supersample", "run", steps=5, calls="3,2", seed=4)
    with open("run/samplers.csv") as f:
        rows = list(csv.DictReader(f))
    asked = [(name, calls) for name in supersample.SAMPLERS for calls in "32"]
    assert [(row["sampler"], row["calls"]) for row in rows] == asked
    width, height = Image.open("run/samplers.png").size
    assert abs(width - 460) <= 1 and height == 560  # matplotlib's rounding changed
    images, _, held, _ = base.load_images(base.Config(n_train=160))
    real, held = (x.flatten(1) / 127.5 - 1 for x in (images, held[:256]))
    pca = PCA(16, svd_solver="full").fit(real)
    floor = quality.frechet(pca.transform(held), pca.transform(real))
    ddpm = supersample.load("run/last.pt")
    xt = torch.randn(256, 1, 8, 8, generator=base.rng("cpu", 4, 11))
    for row in rows:
        calls, g = int(row["calls"]), base.rng("cpu", 4, int(row["calls"]), 11)
        x0 = ddpm.sample(xt.shape, calls, row["sampler"], generator=g, xt=xt)
        far = quality.frechet(pca.transform(x0.flatten(1)), pca.transform(real))
        assert float(row["score"]) == pytest.approx(far / floor, rel=1e-3)


def test_the_comparison_can_be_left_out_and_knows_when_it_cannot_be_made():
    ddpm = train("supersample", "run", steps=1, calls="")
    assert not [*Path("run").glob("samplers*")]
    images = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    cfg = supersample.Config()
    line = supersample.compare(ddpm, cfg, images, images[:31], Path("run"))
    assert line.startswith("too few") and not [*Path("run").glob("samplers*")]


def test_the_comparison_samples_as_asked():
    """Spacing, variance and clipping change the table; one seed repeats it."""
    tables = []
    for k, own in enumerate(
        ({}, {}, {"spacing": "linear"}, {"variance": "beta-tilde"})
    ):
        train("supersample", f"{k}", steps=1, calls="3", **own)
        tables.append(Path(f"{k}/samplers.csv").read_text().splitlines()[1:])
    assert tables[0] == tables[1]
    assert all(a != b for a, b in zip(tables[0], tables[2], strict=True))
    differ = [a != b for a, b in zip(tables[0], tables[3], strict=True)]
    assert differ == [True, False, False, False]


def test_impossible_options_are_refused(capsys):
    for line in (
        *("--sampler euler", "--spacing log", "--variance learned"),
        *("--sampling-steps 0", "--calls five", "--calls 5,-1", "--labels 1.5"),
        *("--calls 0,5", "--guidance -1"),
    ):
        assert main(f"{line} --quiet") == 2, line
    assert not Path("runs").exists()
