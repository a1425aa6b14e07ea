"""benchmarks/large_space.py: its map, its loss and its sampler, on closed forms."""

import sys

import pytest
import torch
from conftest import ROOT
from sklearn.decomposition import PCA

sys.path.insert(0, str(ROOT / "benchmarks"))
import large_space

import superminddpm

STORED = ROOT / "benchmarks" / "results" / "large_space.txt"


def test_the_points_are_the_components_that_scikit_learn_finds():
    points, mean, basis = large_space.load_points()
    pixels = superminddpm.load_images(superminddpm.Config())[0].flatten(1) / 127.5 - 1
    pca = PCA(16, random_state=0).fit(pixels)
    want = torch.from_numpy(pca.inverse_transform(pca.transform(pixels))).float()
    torch.testing.assert_close(mean + points @ basis, want, atol=1e-4, rtol=0)
    assert points.square().mean().item() == pytest.approx(1, abs=1e-5)


def test_the_map_keeps_lengths_and_what_is_off_it_is_measured():
    points, rows = large_space.load_points()[0], large_space.embedding(64, 1)
    torch.testing.assert_close((points @ rows).norm(dim=1), points.norm(dim=1))
    far, off = large_space.measure(points @ rows, points, rows)
    assert far == pytest.approx(0, abs=1e-3) and off < 1e-5
    noise = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert large_space.measure(noise, points, rows)[1] == pytest.approx(
        3**0.5, rel=0.02
    )


@pytest.mark.parametrize("phi", [0.1, 0.7, 1.4])
def test_one_wrong_guess_costs_the_same_in_each_form(phi):
    phi, g = torch.tensor(phi).double(), torch.Generator().manual_seed(0)
    x0, eps, guess = torch.randn(3, 9, 20, generator=g).double()
    xt = phi.cos() * x0 + phi.sin() * eps
    noise = (xt - phi.cos() * guess) / phi.sin()
    forms = {"x0": guess, "eps": noise, "v": (phi.cos() * xt - guess) / phi.sin()}
    snr = float(phi.cos() ** 2 / phi.sin() ** 2)
    for kind, out in forms.items():
        cost = large_space.loss_of(kind, out, x0, eps, phi).item()
        want = min(snr, 5) * (guess - x0).square().mean().item()
        assert cost == pytest.approx(want, rel=1e-6), kind


def test_exact_networks_of_all_kinds_draw_the_same_and_the_right_gaussian():
    """For x0 of variance 0.25 in each dimension, DDIM scales noise to 0.5 of it."""
    xt = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()

    def exact(kind):
        def net(x, phi):
            c, s = phi.cos(), phi.sin()
            x0 = 0.25 * c / (0.25 * c**2 + s**2) * x
            return large_space.target(kind, x0, (x - c * x0) / s, phi)

        return large_space.draw(kind, net, xt, steps=2000)

    start = large_space.HIGH
    spread = (
        0.25 * torch.tensor(start).cos() ** 2 + torch.tensor(start).sin() ** 2
    ).sqrt()
    for kind in large_space.KINDS:
        want = 0.5 / spread.double() * xt
        torch.testing.assert_close(exact(kind), want, rtol=5e-3, atol=5e-3)


def test_the_stored_runs_are_those_of_the_script():
    """The shortest of them, trained again."""
    lines = [line.split() for line in STORED.read_text().splitlines() if line[0] != "#"]
    assert len(lines) == 54 and len({(*line[:5],) for line in lines}) == 54
    stored = {(*line[:5],): [*map(float, line[5:])] for line in lines}
    torch.set_num_threads(1)
    far, off = large_space.run("v", 128, 64, 500, 0)[1]
    assert stored["128", "64", "500", "v", "0"] == pytest.approx([far, off], rel=0.1)
