"""Distances of image sets: against closed forms, loops, scipy, torchmetrics."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage
from scipy.stats import wasserstein_distance

import superminddpm as base

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
measures = importlib.import_module("measures")


def normal(seed, n, d):
    return np.random.default_rng(seed).standard_normal((n, d))


def digits():
    train, labels, held, held_labels = base.load_images(base.Config())
    return {
        **{"train": train, "held": held},
        **{"labels": labels, "held_labels": held_labels},
    }


def clouds(seed, n):
    """Return smooth colour images, uint8 (n, 3, 16, 16), darker at the bottom."""
    g = torch.Generator().manual_seed(seed)
    wave = torch.randn(n, 3, 3, 3, generator=g)
    x = torch.nn.functional.interpolate(wave, (16, 16), mode="bicubic")
    x = (
        x
        + torch.linspace(1, -1, 16)[:, None]
        + torch.tensor([0.8, 0, -0.5])[:, None, None]
    )
    edge = torch.randint(0, 16, (n, 1, 1, 1), generator=g) > torch.arange(16)
    return ((x + edge) * 40 + 110).clamp(0, 255).byte()


def blurred(x, sigma):
    return torch.from_numpy(ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma)))


def noisy(x, std):
    g = torch.Generator().manual_seed(0)
    return (x + std * torch.randn(x.shape, generator=g)).round().clamp(0, 255).byte()


# ---- the distances -------------------------------------------------------------------


def test_frechet_is_its_closed_form():
    a, b = normal(0, 300, 6), normal(1, 200, 6) * [1, 2, 3, 1, 1, 0.5] + 0.3
    cov = [np.cov(x.T) for x in (a, b)]
    shift = ((a.mean(0) - b.mean(0)) ** 2).sum()
    root = linalg.sqrtm(cov[0] @ cov[1]).real
    expected = shift + np.trace(cov[0] + cov[1] - 2 * root)
    assert measures.frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert measures.frechet(b, a) == pytest.approx(expected, rel=1e-9)
    assert measures.frechet(a, a) == pytest.approx(0, abs=1e-9)
    # columns that are orthogonal have diagonal covariances: the closed form
    q = linalg.qr(np.c_[np.ones(64), normal(2, 64, 3)], mode="economic")[0][:, 1:]
    s, u = np.array([1.0, 2, 3]), np.array([2.0, 2, 0.5])
    expected = 3 * 0.25 + ((s - u) ** 2).sum()
    far = measures.frechet(q * s * 63**0.5, q * u * 63**0.5 + 0.5)
    assert far == pytest.approx(expected, rel=1e-9)


def test_quality_measures_with_the_same_function():
    assert importlib.import_module("quality").frechet is measures.frechet


def test_kernel_is_that_of_a_double_loop():
    a, b = normal(0, 23, 4), normal(1, 1017, 4) + 0.2  # more than one chunk of rows
    k = [[[(x @ y / 4 + 1) ** 3 for y in q] for x in p] for p, q in ((a, a), (a, b))]
    k_bb = (b @ b.T / 4 + 1) ** 3
    own = (np.sum(k[0]) - np.trace(k[0])) / (23 * 22)
    other = (k_bb.sum() - np.trace(k_bb)) / (1017 * 1016)
    expected = own + other - 2 * np.mean(k[1])
    assert measures.kernel(a, b) == pytest.approx(expected, rel=1e-9)
    assert measures.kernel(b, a) == pytest.approx(expected, rel=1e-9)
    assert measures.kernel(a, b, measures.likeness(b)) == measures.kernel(a, b)


def test_kernel_has_no_bias():
    """The mean over many equal draws is 0 within its error, and some are below 0."""
    far = [
        measures.kernel(normal(k, 40, 3), normal(1000 + k, 60, 3)) for k in range(300)
    ]
    assert abs(np.mean(far)) < 3 * np.std(far) / 300**0.5
    assert min(far) < 0


def test_sliced_wasserstein_in_one_dimension_is_scipys():
    a, b = normal(0, 500, 1), normal(1, 500, 1) * 2 + 1
    p, q = ([measures.projected(x)] for x in (a, b))
    expected = 1000 * wasserstein_distance(a[:, 0], b[:, 0])
    assert measures.sliced_wasserstein(p, q) == pytest.approx(expected, rel=1e-5)
    assert measures.sliced_wasserstein(q, p) == measures.sliced_wasserstein(p, q)
    assert measures.sliced_wasserstein(p, p) == 0


def test_sliced_wasserstein_of_a_shift_in_many_dimensions():
    """A shift v moves each projection by v.u: the mean of |v.u| over the sphere."""
    a, v = normal(0, 400, 3), np.array([0.0, 3.0, 4.0])
    far = measures.sliced_wasserstein(*([measures.projected(x)] for x in (a, a + v)))
    assert far == pytest.approx(1000 * 5 / 2, rel=0.1)  # E|u_1| = 1/2 in 3-D


def test_the_pyramid_is_scipys_and_adds_up_to_the_image():
    x = np.float32(clouds(0, 3).repeat(1, 1, 2, 2))
    levels = measures.pyramid(x)
    assert [level.shape[-1] for level in levels] == [32, 16, 8]
    w = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    small = ndimage.convolve(x[1, 2], w, mode="mirror")[::2, ::2]
    up = np.zeros((32, 32))
    up[::2, ::2] = 4 * small
    finest = x[1, 2] - ndimage.convolve(up, w, mode="mirror")
    np.testing.assert_allclose(levels[0][1, 2], finest, atol=1e-3)
    flat = measures.pyramid(np.full((1, 1, 32, 32), 7, np.float32))
    assert abs(flat[0]).max() < 1e-4 and abs(flat[2] - 7).max() < 1e-4
    for side, sides in ((8, [8]), (28, [28, 14]), (12, [12]), (36, [36, 18, 9])):
        found = measures.pyramid(np.zeros((1, 1, side, side), np.float32))
        assert [level.shape[-1] for level in found] == sides


def test_patches_are_7x7_windows_normalised_per_channel(monkeypatch):
    monkeypatch.setattr(measures, "projected", lambda rows: rows)
    x = clouds(0, 5)
    (finest, coarse), plain = measures.patches(x.numpy()), measures.pyramid
    assert finest.shape == coarse.shape == (5 * 32, 3 * 49)
    channel = coarse.reshape(-1, 3, 49)
    np.testing.assert_allclose(channel.mean((0, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(channel.std((0, 2)), 1, atol=1e-4)
    image = plain(np.float32(x))[1][4]  # 8x8: only four windows
    windows = [image[:, i : i + 7, j : j + 7] for i in (0, 1) for j in (0, 1)]
    last = channel[-1].reshape(3, 7, 7)
    same = [np.corrcoef(w.mean(0).ravel(), last.mean(0).ravel())[0, 1] for w in windows]
    assert any(
        all(np.corrcoef(w[c].ravel(), last[c].ravel())[0, 1] > 0.999 for c in range(3))
        for w in windows
    ), same


# ---- all of them on images -----------------------------------------------------------


def test_worse_digits_are_farther_by_every_measure():
    data = digits()
    found = measures.Measures(**data)
    held, own = data["held"], data["held_labels"]
    assert found.n == 359 and found.accuracy > 0.95
    assert found.distances(held) == found.floor
    few = {y: held[own > y].repeat(9, 1, 1, 1)[:359] for y in (1, 4, 7)}
    series = {
        "blur": [blurred(held, s) for s in (0.6, 0.9, 1.5)],
        "noise": [noisy(held, s) for s in (40, 56, 72)],
        "dropped classes": few.values(),
    }
    for what, sets in series.items():
        rows = [found.floor, *(found.distances(x) for x in sets)]
        for name in found.floor:
            values = [row[name] for row in rows]
            assert values == sorted(values), (what, name, values)
    mean = {name: abs(x).mean() for name, x in found.real.items()}
    assert all(0.3 < value <= 1 for value in mean.values())


def test_worse_colours_are_farther_without_labels(monkeypatch):
    monkeypatch.setattr(measures, "STEPS", 150)
    found = measures.Measures(clouds(0, 600), clouds(1, 300), n=200)
    held = clouds(1, 300)
    assert found.n == 200 and found.accuracy > 0.3  # chance: 1 of 20
    series = {
        "blur": [blurred(held, s) for s in (2, 3, 5)],
        "noise": [noisy(held, s) for s in (40, 60, 80)],
        "swapped colours": [held.flip(1)],
        "swapped quadrants": [held.roll((8, 8), (2, 3))],
    }
    for what, sets in series.items():
        rows = [found.floor, *(found.distances(x) for x in sets)]
        for name in found.floor:
            values = [row[name] for row in rows]
            assert values == sorted(values), (what, name, values)


def test_the_net_is_trained_once_and_repeats_bit_for_bit(monkeypatch):
    monkeypatch.setattr(measures, "STEPS", 30)
    trained, train_net = [], measures.train_net
    count = lambda *x: trained.append(1) or train_net(*x)  # noqa: E731
    monkeypatch.setattr(measures, "train_net", count)
    data, before = digits(), torch.random.get_rng_state()
    first = measures.Measures(**data)
    assert len(trained) == 1
    again = measures.Measures(**data)
    assert len(trained) == 1 and again.floor == first.floor
    torch.manual_seed(5)
    elsewhere = measures.Measures(**data, folder="other")
    assert len(trained) == 2 and elsewhere.floor == first.floor
    torch.random.set_rng_state(before)
    [kept], [other] = Path("runs/features").iterdir(), Path("other").iterdir()
    assert kept.name == other.name
    a, b = (torch.load(path, weights_only=True) for path in (kept, other))
    assert all(torch.equal(a[key], b[key]) for key in a)
    measures.Measures(**{**data, "train": 255 - data["train"]})  # another net
    measures.Measures(**{**data, "labels": 9 - data["labels"]})
    assert len(trained) == 4 and len([*Path("runs/features").iterdir()]) == 3
    assert torch.equal(torch.random.get_rng_state(), before)


def test_wrong_images_get_one_clear_line(monkeypatch):
    monkeypatch.setattr(measures, "STEPS", 2)
    data = digits()
    found = measures.Measures(**data, n=50)
    held = data["held"]
    for images in (held[:49], held[:, :, :4], held.repeat(1, 3, 1, 1), held / 255):
        with pytest.raises(ValueError, match=r"\(50, 1, 8, 8\)"):
            found.distances(images)
    with pytest.raises(ValueError, match="torch.float32"):
        measures.Measures(data["train"], held.float())
    with pytest.raises(ValueError, match="9 images are too few"):
        measures.Measures(data["train"], held[:9])


# ---- Inception, and the command line -------------------------------------------------


class Stub(torch.nn.Module):
    num_features = 12

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x / 64, 2).flatten(1)


def test_inception_is_torchmetrics_with_our_own_distances():
    """With a stand-in for Inception; torchmetrics' FID and KID check ours."""
    pytest.importorskip("torchmetrics")
    data = digits()
    drawn, real = data["held"][:200], data["train"][:200]
    found = measures.inception(drawn, real, Stub())
    a, b = (Stub()(x.expand(-1, 3, -1, -1)).double().numpy() for x in (drawn, real))
    # three equal channels: frechet of singular covariances
    assert found["FID"] == pytest.approx(measures.frechet(a, b), rel=1e-3)
    assert found["KID"] == pytest.approx(measures.kernel(a, b), rel=1e-2)


def test_inception_says_what_it_wants(monkeypatch):
    x = digits()["held"]
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ValueError, match="pip install torchmetrics torch-fidelity"):
        measures.inception(x, x, "weights.pth")
    monkeypatch.undo()
    pytest.importorskip("torchmetrics")
    with pytest.raises(ValueError, match=r"no file weights\.pth"):
        measures.inception(x, x, "weights.pth")


def test_the_table_of_a_checkpoint(monkeypatch, capsys):
    monkeypatch.setattr(measures, "STEPS", 5)
    script = importlib.import_module("superobjective")
    script.train(script.Config(steps=2, out="run", quiet=True))
    measures.main("run/last.pt", n=40)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "40 images, digits 1 x 8 x 8, drawn by DDIM with 50 calls"
    assert lines[1] == "against 1438 training images; sliced Wasserstein: against 40"
    found = measures.Measures(**digits(), n=40)
    drawn = measures.draw(script.load("run/last.pt", ema=False), 40)
    far = found.distances(drawn)
    for line, name in zip(lines[-5:], far, strict=True):
        floor, raw = line.split()[-3], line.split()[-1]
        assert line.startswith(name)
        assert float(floor) == pytest.approx(found.floor[name], rel=1e-3)
        assert float(raw) == pytest.approx(far[name], rel=1e-3)
