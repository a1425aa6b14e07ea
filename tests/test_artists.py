"""benchmarks/artists.py: machines against loops, linear algebra and each other."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.special import softmax

sys.path.insert(0, str(ROOT / "benchmarks"))
import artists
import gauge

import superminddpm as base

IMAGES, HELD = base.load_images(base.Config())
X, Y = gauge.flat(IMAGES), gauge.flat(HELD)
TABLE = base.DDPM(None).alphabar


def noisy(level, n=3):
    """Return x_t (n, 64) of held-out digits, and abar."""
    ab = TABLE[level]
    eps = torch.randn(n, 64, generator=torch.Generator().manual_seed(level))
    return ab.sqrt() * Y[:n] + (1 - ab).sqrt() * eps, ab


def by_loops(xt, x, ab, p, anywhere):
    """The patch machine on images in a frame of zeros, patch by patch."""
    images = (z.double().numpy().reshape(-1, 8, 8) for z in (xt, x))
    frame = [np.pad(z, ((0, 0), (8, 8), (8, 8))) for z in images]
    inside = np.zeros((24, 24), bool)
    inside[8:16, 8:16] = True
    r, ab, out = p // 2, ab.item(), np.zeros((len(xt), 8, 8))

    def cut(z, i, j):
        return z[..., 8 + i - r : 9 + i + r, 8 + j - r : 9 + j + r]

    for i in range(8):
        for j in range(8):
            here = cut(inside, i, j)
            places = [(i, j)]
            if anywhere:
                places = [(a, b) for a in range(8) for b in range(8)]
            d, pixels = [], []
            for a, b in places:
                if (cut(inside, a, b) == here).all():
                    miss = cut(frame[0], i, j)[:, None] - ab**0.5 * cut(frame[1], a, b)
                    d.append((miss**2).sum((-1, -2)) / 2 / (1 - ab))
                    pixels.append(frame[1][:, 8 + a, 8 + b])
            weight = softmax(-np.concatenate(d, 1), 1)
            out[:, i, j] = weight @ np.concatenate(pixels)
    return torch.tensor(out.reshape(len(xt), 64))


@pytest.mark.parametrize("anywhere", [False, True])
@pytest.mark.parametrize("p", [1, 3, 5, 9])
def test_the_patch_machine_equals_loops_over_framed_images(p, anywhere):
    for level in (150, 500, 950):
        xt, ab = noisy(level)
        got = artists.patch_x0(xt, X[:60], ab, p, anywhere).double()
        want = by_loops(xt, X[:60], ab, p, anywhere)
        torch.testing.assert_close(got, want, atol=2e-4, rtol=0)


def test_a_patch_as_large_as_the_image_is_the_copier():
    xt, ab = noisy(450, 8)
    copier = gauge.exact_x0(xt, X, ab)
    for anywhere in (False, True):
        got = artists.patch_x0(xt, X[:1438], ab, 15, anywhere)
        torch.testing.assert_close(got, copier, atol=1e-4, rtol=0)
    assert (artists.patch_x0(xt, X, ab, 13) - copier).abs().max() > 0.1


def test_from_9_on_the_border_tells_every_place():
    for p in range(1, 16, 2):
        alone = all(len(places) == 1 for places in artists.patches(p).values())
        assert alone == (p >= 9)


@pytest.mark.parametrize("level", [50, 450, 1000])
def test_the_gaussian_equals_a_linear_solve(level):
    xt, ab = noisy(level, 5)
    xt, x, ab = xt.double(), X.double(), ab.double()
    mean, cov = x.mean(0), torch.cov(x.T)
    rest = xt - ab.sqrt() * mean
    seen = ab * cov + (1 - ab) * torch.eye(64)
    want = mean + ab.sqrt() * rest @ torch.linalg.solve(seen, cov)
    got = artists.gaussian_x0(xt, gauge.principal(x), ab)
    torch.testing.assert_close(got, want, atol=1e-8, rtol=0)


def test_with_one_training_image_every_machine_draws_it():
    """Except for patches from anywhere, of which it makes another image."""
    one = X[7:8].repeat(2, 1)
    for name, machine in artists.machines(one).items():
        gap = (artists.draw(machine, 2) - one).abs().max()
        if "anywhere" not in name:
            assert gap < 1e-4, name
        elif name == "anywhere 3":
            assert gap > 0.5


def test_permuting_changes_the_patches_and_nothing_else():
    xt, ab = noisy(300, 4)
    made = artists.machines(X[:200])
    for name, same in (("copier", True), ("Gaussian", True), ("patch 3", False)):
        own = artists.machines(X[:200][:, artists.ORDER])[name]
        gap = (artists.permuted(own)(xt, ab) - made[name](xt, ab)).abs().max()
        assert (gap < 1e-3) == same, name
        if not same:
            want = made[f"{name}, permuted"](xt, ab)
            torch.testing.assert_close(artists.permuted(own)(xt, ab), want)


def test_a_local_network_depends_on_its_patch_and_on_nothing_else():
    torch.manual_seed(0)
    for arch, local in (("5x5", True), ("resnet", False)):
        cfg = artists.Config(arch="resnet")
        ddpm = artists.make(cfg, arch).eval()
        with torch.no_grad():  # it begins with zeros
            ddpm.net.out.weight.normal_(std=30)
        sens = artists.sensitivity(artists.x0_hat(ddpm), Y[:2], (400,))
        shares = [artists.inside(sens, p).item() for p in (3, 5)]
        assert shares[0] < 1 - 1e-4 and (shares[1] > 1 - 1e-6) == local


def test_sensitivity_of_the_gaussian_is_its_matrix():
    machine = artists.machines(X)["Gaussian"]
    sens = artists.sensitivity(machine, Y[:2], (350,))[0]
    ab = TABLE[350]
    matrix = machine(torch.eye(64), ab) - machine(torch.zeros(1, 64), ab)
    torch.testing.assert_close(sens, matrix.T.abs(), atol=1e-5, rtol=0)


def test_r2_is_1_for_equals_and_0_for_the_mean():
    mean, g = X.mean(0), torch.Generator().manual_seed(0)
    net = mean + torch.randn(4000, 64, generator=g)
    other = mean + torch.randn(4000, 64, generator=g)
    assert (artists.r2(net, net, mean) == 1).all()
    assert (artists.r2(net, mean.expand_as(net), mean) == 0).all()
    half = artists.r2(net, (net + mean) / 2, mean)
    torch.testing.assert_close(half, torch.full((4000,), 0.75))
    assert artists.r2(net, other, mean).mean().item() == pytest.approx(-1, abs=0.1)


def test_the_calibrated_machine_takes_the_best_size_at_each_level():
    fits = {p: torch.zeros(len(artists.LEVELS)) for p in (1, 3)}
    fits[1][:4], fits[3][4:] = 1, 1
    made = {"patch 1": lambda xt, ab: 1, "patch 3": lambda xt, ab: 3}
    machine = artists.calibrated(fits, made)
    assert [machine(None, TABLE[t]) for t in (1, 350, 450, 1000)] == [1, 1, 3, 3]
