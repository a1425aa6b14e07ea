"""The clock of features: closed forms against autograd, sampling and enumeration."""

import itertools
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.stats import multivariate_normal

sys.path.insert(0, str(ROOT / "benchmarks"))
import clock
import toy as lab

ARMS = [
    clock.Toy(),
    clock.Toy(noise=(3.0, 1.0)),
    clock.Toy(noise=(3.0, 1 / 3), rho=0.6),
    clock.Toy(rho=0.9),
    clock.Toy(rho=-0.5, alphabar=lab.cosine),
]


def noisy(toy, n, t, seed=0):
    """Return x0 and x_t (1, n, d), and t (1, n)."""
    g, t = torch.Generator().manual_seed(seed), torch.full((1, n), t)
    x0 = toy.draw(1, n, generator=g)
    return x0, toy.q_sample(x0, t, torch.randn(x0.shape, generator=g)), t


@pytest.mark.parametrize("noise", [(1.0, 1.0), (3.0, 1 / 3)])
def test_the_learning_curve_equals_gradient_descent_by_autograd(noise):
    toy, lr, steps = clock.Toy(noise=noise), 0.004, 60
    t = lab.TMIN + (1 - lab.TMIN) * (torch.arange(4000) + 0.5).double() / 4000
    ab, M = toy.alphabar(t)[:, None, None], toy.M.double()
    cov = M @ torch.diag(toy.a.double() ** 2) @ M.T  # of x0, and then of x_t
    seen = ab * cov + (1 - ab) * (M @ torch.diag(toy.n.double() ** 2) @ M.T)
    W = torch.zeros(17, 12, 12, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        B = torch.einsum("tw,wij->tij", clock.phi(t), W)  # x0_hat = B(t) x_t
        loss = (B @ seen * B).sum() - 2 * (ab.sqrt() * cov * B).sum()
        (grad,) = torch.autograd.grad(loss / len(t), W)
        W.data -= lr * grad
    levels, own = clock.windows(toy)
    for k in range(4):
        level = levels[own[k]].double()
        B = torch.einsum("w,wij->ij", clock.phi(level), W)
        snr = toy.alphabar(level) * toy.a[k] ** 2 / (1 - toy.alphabar(level))
        assert abs(snr / toy.n[k] ** 2 - 1) < 1e-5
        best = snr / (snr + toy.n[k] ** 2) / toy.alphabar(level).sqrt()
        want = M[:, k] @ B @ M[:, k] / best
        got = clock.theory(toy, lr, [1, steps])[-1, k]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_training_follows_the_learning_curve():
    toy = clock.Toy()
    looks, seen = clock.train(
        "linear", toy, range(8), 150, "SGD", 0.005, clock.weight_look(toy)
    )
    off = seen[..., :4, 0].mean(1) - clock.theory(toy, 0.005, looks)[:, :4]
    assert off.abs().max() < 0.06


@pytest.mark.parametrize("toy", ARMS)
def test_bayes_equals_an_enumeration_with_dense_gaussians(toy):
    _, xt, t = noisy(toy, 40, 0.45)
    ab, M = toy.alphabar(t[0, 0]).item(), toy.M.double().numpy()
    a, n = toy.a.double().numpy(), toy.n.double().numpy()
    total, mean = 0, 0
    for z in itertools.product((-1, 1), repeat=4):
        prior = np.prod([1 + toy.rho * z[i] * z[i + 2] for i in (0, 1)]) / 16
        atom = M[:, :4] @ (a[:4] * np.array(z))
        spread = (1 - ab) * M @ np.diag(n**2) @ M.T
        p = prior * multivariate_normal(ab**0.5 * atom, spread).pdf(xt[0].numpy())
        total, mean = total + p[:, None], mean + p[:, None] * atom
    got = toy.best(xt, t)[0].double()
    torch.testing.assert_close(got, torch.tensor(mean / total), atol=2e-4, rtol=0)


def test_equal_snr_makes_both_features_vanish_together():
    """There, M1 is M2 times three, and each bit is a tanh of its own coordinate."""
    toy = clock.Toy(noise=(3.0, 1.0))
    _, xt, t = noisy(toy, 1000, 0.4)
    y = (xt @ toy.M)[..., :4]
    z = torch.tanh(0.6**0.5 * y / toy.a[:4] / 0.4)
    torch.testing.assert_close(
        (toy.best(xt, t) @ toy.M)[..., :4] / toy.a[:4], z, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("toy", ARMS)
def test_samples_and_the_best_linear_denoiser_equal_a_regression(toy):
    x0, xt, t = noisy(toy, 200_000, 0.45)
    z = (x0 @ toy.M)[0, :, :4] / toy.a[:4]
    torch.testing.assert_close(z.abs(), torch.ones_like(z), atol=1e-4, rtol=0)
    want = torch.eye(4)
    want[[0, 1, 2, 3], [2, 3, 0, 1]] = toy.rho
    torch.testing.assert_close(z.T @ z / len(z), want, atol=0.01, rtol=0)
    B = torch.linalg.lstsq(xt[0].double(), x0[0].double()).solution
    best = toy.linear_best(xt, t[:, :1])[0].double()
    assert (xt[0].double() @ B - best).square().mean().sqrt() < 0.01


def test_the_looks_know_the_best_denoisers():
    for data, k in ((clock.Toy(noise=(3.0, 1.0)), 4), (clock.Digits(), 32)):
        weight, known = clock.weight_look(data)(data.linear_best)[0, :k].unbind(-1)
        torch.testing.assert_close(weight, torch.ones(k), atol=1e-5, rtol=0)
        assert (known - 1).abs().max() < 0.2
    for toy in (clock.Toy(), clock.Toy(rho=0.6)):
        look = clock.risk_look(toy)
        torch.testing.assert_close(look(toy.best), torch.ones(1, 2, 3))
        linear = look(toy.linear_best)[..., 1]
        torch.testing.assert_close(linear, torch.zeros(1, 2), atol=1e-5, rtol=0)


def test_half_times_and_slopes_of_a_known_law():
    variance = torch.tensor([4.0, 1.0, 0.25])
    looks = np.unique(np.geomspace(1, 5000, 500).round())
    curve = 1 - (-0.01 * variance * torch.tensor(looks)[:, None]).exp()
    times = clock.half_time(looks, curve)
    want = np.log(2) / (0.01 * variance.double())
    torch.testing.assert_close(times, want, rtol=1e-3, atol=0)
    assert clock.half_time(looks, curve * 0.4).isnan().all()
    assert abs(clock.slope(variance.double(), times[None]) + 1).max() < 1e-3


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("kind", ["linear", "deep linear", "MLP", "UNet"])
def test_seeds_that_train_side_by_side_do_not_touch(kind, optimizer):
    data = clock.Digits() if kind == "UNet" else clock.Toy()
    xt, t = torch.randn(1, 8, data.d), torch.rand(1, 8)
    many, alone = (
        clock.train(kind, data, s, 8, optimizer, 1e-3, lambda net: net(xt, t))[1]
        for s in ([3, 4], [4])
    )
    torch.testing.assert_close(many[:, 1:], alone, atol=2e-5, rtol=0)
    assert (many[-1, 0] - many[-1, 1]).abs().max() > 1e-4


def test_the_second_table_fits_only_components_that_all_runs_learned():
    times = np.random.default_rng(0).uniform(1, 99, (2, 3, 32))  # runs, seeds
    times[0, 1, 7] = times[1, 2, 20] = np.nan
    kept = {f"digits, {k}": {"times": times[k].tolist()} for k in (0, 1)}
    found = list(clock.alike({**kept, "toy, 0": {"times": [[np.nan] * 4]}}))
    x = np.delete(2 * clock.Digits().a[:32].double().log().numpy(), [7, 20])
    for k, (name, numbers, _) in enumerate(found):
        y = np.delete(np.log(times[k]), [7, 20], axis=1)
        want = np.polyfit(x, y.T, 1)[0]
        assert name == f"digits, {k}, 30"
        np.testing.assert_allclose(numbers["slope"], want, rtol=1e-5)
