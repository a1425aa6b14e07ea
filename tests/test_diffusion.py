"""The schedule, the loss and the samplers, against diffusers and closed forms."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from superminddpm import DDPM


class Fixed(torch.nn.Module):
    """A network that answers with a given function of (xt, t)."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, xt, t):
        return self.answer(xt, t)


def wave(xt, t):
    """Return some smooth, bounded guess of the noise that depends on xt and on t."""
    return torch.sin(3 * xt + t.view(-1, 1, 1, 1) / 100)


def peer(kind, T, **options):
    """Return a scheduler of diffusers with our betas."""
    scale = 1000 / T
    betas = {"beta_start": 1e-4 * scale, "beta_end": 0.02 * scale}
    return kind(num_train_timesteps=T, beta_schedule="linear", **betas, **options)


@pytest.mark.parametrize("T", [100, 200, 500, 1000])
def test_schedule_equals_diffusers(T):
    ddpm, theirs = DDPM(None, T), peer(DDPMScheduler, T)
    torch.testing.assert_close(
        ddpm.alphabar[1:], theirs.alphas_cumprod, atol=1e-6, rtol=1e-4
    )
    torch.testing.assert_close(ddpm.beta[1:], theirs.betas, atol=1e-7, rtol=1e-5)
    assert ddpm.alphabar[0] == 1 and ddpm.beta[0] == 0 and len(ddpm.alpha) == T + 1
    assert ddpm.alphabar[-1] < 1e-4  # x_T is noise, whatever T


def test_q_sample_has_the_moments_of_eq_4():
    ddpm = DDPM(None, 1000)
    x0 = torch.full((200_000, 1, 1, 1), 0.7)
    for step in (1, 250, 1000):
        t = torch.full((len(x0),), step)
        xt = ddpm.q_sample(x0, t, torch.randn(x0.shape, generator=torch.manual_seed(0)))
        ab = ddpm.alphabar[step].item()
        assert xt.mean().item() == pytest.approx(0.7 * ab**0.5, abs=4 / 200_000**0.5)
        assert xt.var().item() == pytest.approx(1 - ab, rel=0.02)
    assert torch.equal(ddpm.q_sample(x0, torch.zeros(len(x0), dtype=int), x0 * 9), x0)


@pytest.mark.parametrize("step", [1000, 999, 500, 2, 1])
def test_p_sample_equals_diffusers_ddpm(step):
    ddpm = DDPM(Fixed(wave), 1000)
    theirs = peer(DDPMScheduler, 1000, variance_type="fixed_large", clip_sample=True)
    torch.manual_seed(0)
    xt, t = torch.randn(4, 3, 8, 8), torch.full((4,), step)
    ours = ddpm.p_sample(xt, t, generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(1)
    want = theirs.step(wave(xt, t), step - 1, xt, generator=g).prev_sample
    # at t = 1, float32 knows 1 - alphabar = 1e-4 to 6e-4 of itself
    torch.testing.assert_close(ours, want, atol=6e-4 if step == 1 else 2e-5, rtol=1e-4)


def test_p_sample_has_variance_beta_and_adds_nothing_at_the_last_step():
    ddpm = DDPM(Fixed(wave), 1000)
    xt = torch.full((100_000, 1, 1, 1), 0.3)
    for step in (1000, 400, 2):
        noisy = ddpm.p_sample(xt, torch.full((len(xt),), step))
        assert noisy.var().item() == pytest.approx(ddpm.beta[step].item(), rel=0.03)
    last = [ddpm.p_sample(xt[:5], torch.ones(5, dtype=int)) for _ in range(2)]
    assert torch.equal(*last)


@pytest.mark.parametrize("steps", [4, 10, 50])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_trajectory_equals_diffusers(steps, eta):
    ddpm = DDPM(Fixed(wave), 1000)
    theirs = peer(DDIMScheduler, 1000, timestep_spacing="trailing", clip_sample=True)
    theirs.set_timesteps(steps)
    xt = torch.randn(4, 3, 8, 8, generator=torch.manual_seed(0))
    g, want = torch.Generator().manual_seed(1), xt
    for time in theirs.timesteps:
        z = torch.randn(xt.shape, generator=g)
        options = {"eta": eta, "use_clipped_model_output": True, "variance_noise": z}
        eps_hat = wave(want, torch.full((4,), time + 1))
        want = theirs.step(eps_hat, time, want, **options).prev_sample
    g = torch.Generator().manual_seed(1)
    ours = ddpm.sample(xt.shape, steps, eta=eta, generator=g, xt=xt)
    torch.testing.assert_close(ours, want.clamp(-1, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_ddim_with_the_true_noise_returns_x0(steps):
    x0 = torch.rand(5, 1, 8, 8, generator=torch.manual_seed(0)) * 1.8 - 0.9
    eps = torch.randn_like(x0)
    ddpm = DDPM(Fixed(lambda xt, t: eps), 1000)
    xt = ddpm.q_sample(x0, torch.full((5,), 1000), eps)
    found = ddpm.sample(x0.shape, steps, xt=xt)
    torch.testing.assert_close(found, x0, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_exact_denoiser_of_a_gaussian_gives_that_gaussian(sampler):
    """For x0 ~ N(m, s^2), E[eps | x_t] is linear in x_t: no training error is left."""
    m, s = 0.3, 0.2
    ddpm = DDPM(None, 1000)

    def exact(xt, t):
        ab = ddpm.alphabar[t].view(-1, 1, 1, 1)
        return (1 - ab).sqrt() * (xt - ab.sqrt() * m) / (ab * s**2 + 1 - ab)

    ddpm.net = Fixed(exact)
    g = torch.Generator().manual_seed(0)
    x = ddpm.sample((40_000, 1, 1, 1), steps=1000, sampler=sampler, generator=g)
    assert x.mean().item() == pytest.approx(m, abs=0.005)
    assert x.std().item() == pytest.approx(s, rel=0.015)


def test_the_loss_draws_every_t_and_no_other():
    seen = []
    ddpm = DDPM(Fixed(lambda xt, t: seen.append(t) or torch.zeros_like(xt)), 30)
    ddpm(torch.zeros(20_000, 1, 1, 1))
    counts = torch.bincount(seen[0], minlength=31)
    assert counts[0] == 0 and len(counts) == 31
    assert counts[1:].min() > 500 and counts[1:].max() < 850  # 667 expected


def test_the_loss_is_the_mean_squared_error_of_eps():
    ddpm = DDPM(Fixed(lambda xt, t: xt), 1000)
    x0 = torch.rand(6, 3, 4, 4, generator=torch.manual_seed(0))
    eps, t = torch.randn_like(x0), torch.tensor([1, 10, 100, 500, 999, 1000])
    a = ddpm.alphabar[t].double().view(-1, 1, 1, 1)
    by_hand = ((a.sqrt() * x0 + (1 - a).sqrt() * eps - eps) ** 2).mean()
    assert ddpm(x0, t, eps).item() == pytest.approx(by_hand.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("steps", "sampler", "want"),
    [
        (1, "ddim", [1000]),
        (3, "ddim", [1000, 667, 333]),
        (5000, "ddim", [*range(1000, 0, -1)]),
        (7, "ddpm", [*range(1000, 0, -1)]),
    ],
)
def test_the_network_is_called_from_T_downwards(steps, sampler, want):
    seen = []
    ddpm = DDPM(Fixed(lambda xt, t: seen.append(t[0].item()) or xt), 1000)
    ddpm.sample((2, 1, 8, 8), steps, sampler)
    assert seen == want


def test_samples_depend_on_the_generator_alone():
    ddpm = DDPM(Fixed(wave), 50)
    for sampler in ("ddim", "ddpm"):
        draws = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed + 7)
            g = torch.Generator().manual_seed(seed)
            draws.append(ddpm.sample((2, 1, 8, 8), 10, sampler, 1.0, g))
        assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
        assert draws[0].abs().max() <= 1
