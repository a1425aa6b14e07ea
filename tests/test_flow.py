"""superflow.py against diffusers' flow schedulers, closed forms and the base."""

import csv

import pytest
import torch
from conftest import command_line
from diffusers import FlowMatchEulerDiscreteScheduler
from test_diffusion import Fixed, normal, wave

import superflow
from superflow import DDPM, Config, build, rng, solve_by_heun, straighten

M, S = 0.3, 0.2  # the mean and spread of the Gaussian that the exact network knows


def straight(T=1000):
    ddpm = DDPM(None, T).double()
    straighten(ddpm)
    return ddpm


class Gaussian(torch.nn.Module):
    """A network whose DDPM answers E[eps | x_tau] for x_0 ~ N(M, S^2)."""

    def __init__(self, ddpm):
        super().__init__()
        self.alphabar, self.tau = ddpm.alphabar, ddpm.tau

    def forward(self, xt, t):
        ab, tau = (x[t].view(-1, 1, 1, 1) for x in (self.alphabar, self.tau))
        exact = (1 - ab).sqrt() * (xt - ab.sqrt() * M) / (ab * S**2 + 1 - ab)
        return (exact - xt) / (1 - tau)


def unclipped(ddpm, monkeypatch):
    """Let predict clip nothing, since a Gaussian has tails."""

    def predict(xt, t):
        ab, eps_hat = ddpm.alphabar[t, None, None, None], ddpm.eps_hat(xt, t)
        return (xt - (1 - ab).sqrt() * eps_hat) / ab.sqrt(), eps_hat

    monkeypatch.setattr(ddpm, "predict", predict)


def norm(tau):
    return (tau**2 + (1 - tau) ** 2).sqrt()


def test_the_path_is_a_straight_line_over_its_norm():
    ddpm, t = straight(), torch.tensor([1, 2, 300, 999, 1000])
    x0, eps = normal(0, 5, 1, 4, 4).double(), normal(1, 5, 1, 4, 4).double()
    tau = ((t - 0.5) / 1000).double().view(-1, 1, 1, 1)
    line = (1 - tau) * x0 + tau * eps
    torch.testing.assert_close(
        norm(tau) * ddpm.q_sample(x0, t, eps), line, atol=1e-6, rtol=0
    )
    assert ddpm.alphabar[0] == 1 and ddpm.tau[0] == 0
    kept = (1 - ddpm.beta).cumprod(0)
    torch.testing.assert_close(kept, ddpm.alphabar, atol=1e-6, rtol=0)


def test_a_fine_schedule_ends_in_an_image():
    """At t = 1 of 3000, 1 - alphabar is less than half the spacing of float32."""
    ddpm, one = build(Config(n_feat=8, T=3000), (1, 8, 8)), torch.tensor([1])
    x = ddpm.p_sample(normal(0, 1, 1, 8, 8), one, one - 1, 0, 0)
    assert ddpm.alphabar[1] < 1 and x.isfinite().all()


def test_the_loss_is_the_squared_error_of_the_velocity():
    ddpm, t = straight(), torch.tensor([1, 40, 500, 990])
    ddpm.net = Fixed(wave)
    x0, eps = normal(0, 4, 1, 4, 4).double(), normal(1, 4, 1, 4, 4).double()
    tau = ddpm.tau[t].view(-1, 1, 1, 1)
    x = (1 - tau) * x0 + tau * eps
    u_hat = (ddpm.eps_hat(x / norm(tau), t) - x) / (1 - tau)  # eps = x + (1 - tau) u
    want = (u_hat - (eps - x0)).square().mean()
    torch.testing.assert_close(ddpm(x0, t, eps), want, rtol=1e-4, atol=0)
    plain = (ddpm.eps_hat(x / norm(tau), t) - eps).square().mean()
    torch.testing.assert_close(ddpm.eval()(x0, t, eps), plain, rtol=1e-4, atol=0)


def test_the_output_is_the_velocity_but_for_a_multiple_of_x():
    """So a network that answers 0 says that all of it is noise, as in the base."""
    ddpm, t = straight(), torch.tensor([10, 600])
    xt, out = normal(0, 2, 1, 4, 4).double(), normal(1, 2, 1, 4, 4).double()
    tau, answers = ddpm.tau[t].view(-1, 1, 1, 1), []
    for answer in (0 * out, out):
        ddpm.net = Fixed(lambda xt, t, answer=answer: xt + answer)
        answers.append((ddpm.eps_hat(xt, t) - norm(tau) * xt) / (1 - tau))
    torch.testing.assert_close(answers[1] - answers[0], out, atol=1e-9, rtol=0)
    torch.testing.assert_close(answers[0] * (1 - tau), (1 - norm(tau)) * xt)


@pytest.mark.parametrize("n", [4, 20])
def test_a_step_of_the_base_is_that_of_diffusers_euler(monkeypatch, n):
    """p_sample, DDIM, on x over its norm; theirs on x itself, from the velocity."""
    ddpm, xt = straight(), normal(0, 8, 1, 4, 4).double()
    ddpm.net = Gaussian(ddpm)
    unclipped(ddpm, monkeypatch)
    times = torch.linspace(1000, 0, n + 1).round().long()
    theirs, x = FlowMatchEulerDiscreteScheduler(), xt * norm(ddpm.tau[1000])
    theirs.set_timesteps(sigmas=ddpm.tau[times[:-1]].tolist())
    for t, s, time in zip(times[:-1], times[1:], theirs.timesteps, strict=True):
        u = (ddpm.eps_hat(x / norm(ddpm.tau[t]), t.expand(8)) - x) / (1 - ddpm.tau[t])
        x = theirs.step(u, time, x).prev_sample
        xt = ddpm.p_sample(xt, t.expand(8), s.expand(8), 0.0, 0.0)
        torch.testing.assert_close(xt * norm(ddpm.tau[s]), x, atol=1e-5, rtol=0)


def test_heun_is_of_second_order_and_euler_of_first(monkeypatch):
    """A Gaussian stays one on the path: x less its mean, over its spread, is kept."""
    ddpm = straight()
    ddpm.net = Gaussian(ddpm)
    unclipped(ddpm, monkeypatch)
    z, last = normal(0, 200, 1, 1, 1).double(), ddpm.tau[100]  # before the last step

    def spread(tau):
        return ((1 - tau) ** 2 * S**2 + tau**2).sqrt()

    first = ddpm.tau[1000]
    exact = (1 - last) * M + spread(last) * (first * z - (1 - first) * M) / spread(
        first
    )
    errors = {"heun": [], "euler": []}
    for n in (9, 18, 36):
        times = torch.linspace(1000, 100, n + 1).round().long()
        xt = z * first / norm(first)
        for t, s in zip(times[:-1], times[1:], strict=True):
            xt = ddpm.p_sample(xt, t.expand(200), s.expand(200), 0.0, 0.0)
        drawn = {"heun": solve_by_heun(ddpm, z, times), "euler": xt * norm(last)}
        for name, x in drawn.items():
            errors[name].append((x - exact).square().mean().sqrt().item())
    for name, low, high in (("euler", 1.7, 2.3), ("heun", 3.2, 5)):
        for coarse, fine in zip(errors[name], errors[name][1:], strict=False):
            assert low < coarse / fine < high, (name, errors[name])
    assert errors["heun"][0] < 0.5 * errors["euler"][0]


def test_heun_asks_twice_a_step_but_at_the_end(monkeypatch):
    ddpm, calls = build(Config(n_feat=8, heun=True), (1, 8, 8)), []
    predict = ddpm.predict
    monkeypatch.setattr(
        ddpm, "predict", lambda x, t: calls.append(t[0]) or predict(x, t)
    )
    images = ddpm.sample((2, 1, 8, 8), steps=5, generator=rng("cpu", 0))
    assert calls == [1000, 800, 800, 600, 600, 400, 400, 200, 200]
    assert images.abs().max() <= 1


def test_tau_is_logit_normal():
    cfg = Config(batch=200_000)
    t = superflow.logit_normal(cfg, 3, "cpu")
    assert t.min() >= 1 and t.max() <= 1000 and t.dtype == torch.int64
    z = (t / 1000).clamp(max=1 - 1e-4).logit()
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
    assert torch.equal(t, superflow.logit_normal(cfg, 3, "cpu"))
    assert not torch.equal(t, superflow.logit_normal(cfg, 4, "cpu"))


def test_both_densities_train_and_the_held_out_loss_has_no_weight(tiny, monkeypatch):
    monkeypatch.setattr(superflow, "save_grid", lambda *_: None)
    rows = []
    for k, density in enumerate(("uniform", "logit-normal")):
        line = f"--data {tiny} --steps 10 --t-density {density} --out {k} --quiet"
        assert command_line(superflow, line) == 0
        with open(f"{k}/metrics.csv") as f:
            rows.append(list(csv.DictReader(f))[-1])
    assert rows[0]["loss"] != rows[1]["loss"]
    ddpm = superflow.load("0/last.pt")
    _, held = superflow.load_images(Config(data=tiny))
    x0, t = held / 127.5 - 1, torch.full((40,), 450)
    eps = torch.randn(x0.shape, generator=rng("cpu", 450))
    with torch.no_grad():
        plain = (ddpm.eps_hat(ddpm.q_sample(x0, t, eps), t) - eps).square().mean()
    assert float(rows[0]["held_t450"]) == pytest.approx(plain.item(), rel=1e-5)


def test_a_run_goes_on_with_another_solver_for_its_grids(tiny):
    short = "--data tiny --out run --quiet --steps"
    assert command_line(superflow, f"{short} 2") == 0
    assert command_line(superflow, f"{short} 3 --heun --resume") == 0
    assert superflow.read_checkpoint("run/last.pt")["step"] == 3


def test_heun_needs_the_flow(capsys):
    assert command_line(superflow, "--heun --no-flow --steps 1") == 2
    assert "--heun is for --flow" in capsys.readouterr().err.replace("│", " ")
