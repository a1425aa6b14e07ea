"""Network, schedule, loss and sampler, against diffusers and formulas."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from superminddpm import DDPM, UNet


class Fixed(torch.nn.Module):
    """A network whose eps_hat, x_t plus its output, is a function of (xt, t)."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, xt, t):
        return self.answer(xt, t) - xt


def wave(xt, t):
    """Return some smooth, bounded guess of the noise that depends on xt and on t."""
    return torch.sin(3 * xt + t.view(-1, 1, 1, 1) / 100)


def peer(kind, T, **options):
    """Return a scheduler of diffusers with our betas."""
    schedule = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True}
    return kind(num_train_timesteps=T, **schedule, **options)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the network ---------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 12), (1, 28), (4, 32)])
def test_an_untrained_network_says_that_all_of_it_is_noise(channels, size):
    xt = normal(0, 2, channels, size, size)
    ddpm = DDPM(UNet(channels, 8))
    assert torch.equal(ddpm.eps_hat(xt, torch.tensor([1, 1000])), xt)


def test_the_time_reaches_every_block_and_the_bottleneck():
    net, alike = UNet(1, 8), normal(0, 1, 1, 8, 8).expand(2, -1, -1, -1)
    torch.nn.init.normal_(net.out.weight)
    early, late = net(alike, torch.tensor([3, 700]))
    assert not torch.allclose(early, late, rtol=0.1)
    (early - late).square().sum().backward()
    films = [p for name, p in net.named_parameters() if "film.weight" in name]
    assert len(films) == 6
    assert all(p.grad.abs().sum() > 0 for p in [*films, net.vec_time.weight])


def test_the_bottleneck_is_a_vector_that_matters():
    net = UNet(3, 8)
    torch.nn.init.normal_(net.out.weight)
    xt, t, shapes = normal(0, 2, 3, 16, 16), torch.tensor([5, 5]), []
    net.to_vec.register_forward_hook(lambda *given: shapes.append(given[-1].shape))
    before = net(xt, t)
    torch.nn.init.zeros_(net.up0.weight)
    assert not torch.allclose(before, net(xt, t))
    assert shapes == [(2, 2 * 8, 1, 1)] * 2


def test_images_of_a_batch_do_not_mix():
    net = UNet(1, 8)
    torch.nn.init.normal_(net.out.weight)
    xt, t = normal(0, 3, 1, 8, 8), torch.tensor([1, 50, 900])
    alone = net(xt[1:2], t[1:2])
    torch.testing.assert_close(net(xt, t)[1:2], alone, atol=1e-5, rtol=1e-4)


def test_it_stays_about_as_small_as_the_plain_one():
    assert 0.5e6 < sum(p.numel() for p in UNet(3, 32).parameters()) < 1.1e6


# ---- the schedule and the loss -------------------------------------------------------


@pytest.mark.parametrize("T", [100, 200, 500, 1000])
def test_schedule_equals_diffusers(T):
    ddpm, theirs = DDPM(None, T), peer(DDPMScheduler, T)
    torch.testing.assert_close(ddpm.beta[1:], theirs.betas, atol=1e-6, rtol=1e-4)
    ab = theirs.alphas_cumprod.double()
    torch.testing.assert_close(ddpm.alphabar[1:].double(), ab, atol=1e-6, rtol=2e-4)
    assert ddpm.alphabar[0] == 1 and ddpm.beta[0] == 0 and len(ddpm.beta) == T + 1
    assert 0 < ddpm.alphabar[-1] < 1e-6  # x_T is noise, whatever T


def test_q_sample_has_the_moments_of_eq_4():
    ddpm = DDPM(None, 1000)
    x0 = torch.full((200_000, 1, 1, 1), 0.7)
    for step in (1, 250, 1000):
        xt = ddpm.q_sample(x0, torch.full((len(x0),), step), normal(0, *x0.shape))
        ab = ddpm.alphabar[step].item()
        assert xt.mean().item() == pytest.approx(0.7 * ab**0.5, abs=4 / 200_000**0.5)
        assert xt.var().item() == pytest.approx(1 - ab, rel=0.02)
    assert torch.equal(ddpm.q_sample(x0, torch.zeros(len(x0), dtype=int), x0 * 9), x0)


def test_the_loss_is_the_mean_squared_error_of_eps():
    ddpm = DDPM(Fixed(lambda xt, t: 0.5 * xt), 1000)
    x0, eps = normal(0, 6, 3, 4, 4).tanh(), normal(1, 6, 3, 4, 4)
    t = torch.tensor([1, 10, 100, 500, 999, 1000])
    a = ddpm.alphabar[t].double().view(-1, 1, 1, 1)
    by_hand = ((0.5 * (a.sqrt() * x0 + (1 - a).sqrt() * eps) - eps) ** 2).mean()
    assert ddpm(x0, t, eps).item() == pytest.approx(by_hand.item(), rel=1e-6)


# ---- sampling ------------------------------------------------------------------------


@pytest.mark.parametrize("step", [999, 500, 2, 1])
def test_eta_1_from_t_to_t_minus_1_is_algorithm_2(step):
    """The formula as the paper prints it, and diffusers, both with beta-tilde."""
    ddpm = DDPM(Fixed(wave), 1000)
    xt, z, t = normal(0, 4, 3, 8, 8), normal(1, 4, 3, 8, 8), torch.full((4,), step)
    ours = ddpm.p_sample(xt, t, t - 1, 1.0, z)
    theirs = peer(DDPMScheduler, 1000, variance_type="fixed_small")
    g = torch.Generator().manual_seed(1)
    want = theirs.step(wave(xt, t), step - 1, xt, generator=g).prev_sample
    # at t = 1, float32 knows 1 - alphabar to about 1e-3 of itself
    near = {"atol": 2e-3 if step == 1 else 5e-5, "rtol": 1e-4}
    torch.testing.assert_close(ours, want, **near)
    beta, ab, before = ddpm.beta[step], ddpm.alphabar[step], ddpm.alphabar[step - 1]
    _, eps_hat = ddpm.predict(xt, t)
    mean = (xt - beta / (1 - ab).sqrt() * eps_hat) / (1 - beta).sqrt()
    paper = mean + (beta * (1 - before) / (1 - ab)).sqrt() * z
    torch.testing.assert_close(ours, paper, **near)


@pytest.mark.parametrize("steps", [4, 50])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_trajectory_equals_diffusers(steps, eta):
    ddpm = DDPM(Fixed(wave), 1000)
    theirs = peer(DDIMScheduler, 1000, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    xt = normal(0, 4, 3, 8, 8)
    g, want = torch.Generator().manual_seed(1), xt
    for time in theirs.timesteps:
        z = torch.randn(xt.shape, generator=g)
        options = {"eta": eta, "use_clipped_model_output": True, "variance_noise": z}
        eps_hat = wave(want, torch.full((4,), time + 1))
        want = theirs.step(eps_hat, time, want, **options).prev_sample
    g = torch.Generator().manual_seed(1)
    ours = ddpm.sample(xt.shape, steps, eta=eta, generator=g, xt=xt)
    torch.testing.assert_close(ours, want.clamp(-1, 1), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [2, 10])
def test_ddim_with_the_true_noise_returns_x0(steps):
    x0, eps = normal(0, 5, 1, 8, 8).tanh() * 0.9, normal(1, 5, 1, 8, 8)
    ddpm = DDPM(Fixed(lambda xt, t: eps), 1000)
    start = torch.full((5,), 900)
    found = ddpm.q_sample(x0, start, eps)
    times = torch.linspace(900, 0, steps + 1).round().long()
    for t, s in zip(times[:-1], times[1:], strict=True):
        found = ddpm.p_sample(found, t.expand(5), s.expand(5), 0.0, eps)
    torch.testing.assert_close(found, x0, atol=1e-4, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_exact_denoiser_of_a_gaussian_gives_that_gaussian(eta):
    """For x0 ~ N(m, s^2), E[eps | x_t] is linear in x_t: no training error is left."""
    m, s = 0.3, 0.2
    ddpm = DDPM(None, 1000)

    def exact(xt, t):
        ab = ddpm.alphabar[t].view(-1, 1, 1, 1)
        return (1 - ab).sqrt() * (xt - ab.sqrt() * m) / (ab * s**2 + 1 - ab)

    ddpm.net = Fixed(exact)
    g = torch.Generator().manual_seed(0)
    x = ddpm.sample((40_000, 1, 1, 1), steps=1000, eta=eta, generator=g)
    assert x.mean().item() == pytest.approx(m, abs=0.005)
    assert x.std().item() == pytest.approx(s, rel=0.015)


@pytest.mark.parametrize(
    ("steps", "want"),
    [(1, [1000]), (3, [1000, 667, 333]), (1000, [*range(1000, 0, -1)])],
)
def test_the_network_is_called_from_T_downwards(steps, want):
    seen = []
    ddpm = DDPM(Fixed(lambda xt, t: seen.append(t[0].item()) or xt), 1000)
    ddpm.sample((2, 1, 8, 8), steps)
    assert seen == want


def test_samples_depend_on_the_generator_alone():
    ddpm, draws = DDPM(Fixed(wave), 50), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed + 7)
        g = torch.Generator().manual_seed(seed)
        draws.append(ddpm.sample((2, 1, 8, 8), 10, 1.0, g))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].abs().max() <= 1
