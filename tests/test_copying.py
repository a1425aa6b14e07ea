"""benchmarks/copying.py: copies are found, originals are not, steps are right."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import copying
import gauge

import superminddpm as base

IMAGES, HELD = base.load_images(base.Config())
X, Y = gauge.flat(IMAGES), gauge.flat(HELD)


def test_a_copy_is_three_times_nearer_to_one_image_than_to_all_others():
    train = X[:40]
    samples = 0.8 * X[:20].repeat(5, 1) + 0.2 * X[100:200]  # some near, some not
    want = []
    for row in samples.double():
        first, second, *_ = sorted((row - y).norm() for y in train.double())
        want.append(bool(3 * first < second))
    assert copying.copies(samples, train).tolist() == want
    assert 0.1 < np.mean(want) < 0.9


@pytest.mark.parametrize("n", [25, 400, 1438])
def test_all_that_the_exact_denoiser_draws_are_copies_and_no_held_out_digit_is(n):
    ddpm, rows = base.DDPM(None), X[:n]

    def eps_hat(xt, t):
        ab = ddpm.alphabar[t[0]]
        x0 = gauge.exact_x0(xt.flatten(1), rows, ab).view(xt.shape)
        return (xt - ab.sqrt() * x0) / (1 - ab).sqrt()

    ddpm.eps_hat = eps_hat
    assert copying.copies(copying.draw(ddpm, 50).flatten(1), rows).all()
    assert copying.copies(Y, rows).float().mean() < 0.01


def test_seeds_have_images_of_their_own_if_there_are_enough():
    parts = [copying.part(torch.arange(1438), 400, p).tolist() for p in range(3)]
    assert len({k for own in parts for k in own}) == 1200
    assert all(len(copying.part(IMAGES, 1438, p)) == 1438 for p in range(3))


def test_the_step_of_a_crossing_is_found_between_two_looks():
    steps = np.array([10, 100, 1000])
    assert copying.crossing(steps, [0, 0.2, 0.2], 0.1) == pytest.approx(10**1.5)
    assert copying.crossing(steps, [0.3, 0, 1], 0.1) == 10
    assert np.isnan(copying.crossing(steps, [0, 0.01, 0.05], 0.1))


def test_the_times_are_read_off_the_right_columns():
    """Columns: copies, nearer, far, then the loss at four levels, own and held-out."""
    looks, numbers = np.array([10, 100, 1000]), np.ones((1, 3, 11))
    numbers[0, :, 0] = 0, 0.05, 1
    numbers[0, :, 4] = 1, 1, 0.6
    numbers[0, :, 7:] = np.array([2, 1, 1])[:, None]
    numbers[0, :, 8] = 1
    held = np.array([7, 4, 4]) / 4  # its mean falls to 1.1 on the way from 10 to 100
    mem, gap, gen = copying.times(looks, numbers)[0]
    assert (mem, gap) == pytest.approx((100, 10**2.5))
    assert gen == pytest.approx(10 ** (1 + (held[0] - 1.1) / (held[0] - 1)))


def test_alike_is_the_correlation_less_the_mean():
    g, mean = torch.Generator().manual_seed(0), X.mean(0)
    a = mean + torch.randn(2000, 64, generator=g)
    b = mean + 0.6 * (a - mean) + 0.8 * torch.randn(2000, 64, generator=g)
    assert copying.alike(a, b, mean).item() == pytest.approx(0.6, abs=0.01)
    assert abs(copying.alike(a, b.roll(1, 0), mean)) < 0.01


def test_the_networks_of_the_looks_have_learned():
    """Three images: better on them than eps_hat = x_t, with which they begin."""
    course = copying.train(IMAGES[:3], [1, 50], n_feat=8, batch=16)
    loss = [(step, gauge.net_loss(net, IMAGES[:3], 450, 8)) for step, net in course]
    assert [step for step, _ in loss] == [1, 50]
    assert loss[1][1] < 0.7 * loss[0][1]
