"""measures.py, quality.py, curves.py: against closed forms, loops and scipy."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command_line
from scipy import linalg, ndimage
from scipy.stats import wasserstein_distance
from sklearn.datasets import load_digits

import superminddpm as base
import superobjective

sys.path.insert(0, str(ROOT / "benchmarks"))
import curves
import measures
import quality


def normal(seed, n, d):
    return np.random.default_rng(seed).standard_normal((n, d))


def digits():
    train, held = base.load_images(base.Config())
    labels, held_labels = measures.load_labels("digits")
    sets = {"train": train, "held": held}
    return sets | {"labels": labels, "held_labels": held_labels}


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


def test_worse_digits_are_farther_by_every_measure(monkeypatch):
    monkeypatch.setattr(measures, "STEPS", 150)
    data = digits()
    found = measures.Measures(**data)
    held, own = data["held"], data["held_labels"]
    assert found.n == 359 and found.accuracy > 0.85
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


def test_the_damage_is_what_its_class_says():
    x = clouds(0, 200) / 127.5 - 1
    damaged, classes = measures.damage(x, torch.Generator().manual_seed(0))
    for own, y, k in zip(x, damaged, classes.tolist(), strict=True):
        turn, kind = divmod(k, 5)
        own = own.rot90(turn, (1, 2))
        far = (own - y).abs().amax().item()
        assert (far == 0) == (kind == 0)
        if kind == 1:  # blur: never beyond what is there
            assert own.amin() <= y.amin() and y.amax() <= own.amax()
        if kind in (3, 4):
            swapped = own.roll((8, 8), (1, 2)) if kind == 3 else own.flip(0)
            assert torch.equal(y, swapped)
    assert set(classes.tolist()) == set(range(20))


def test_the_net_repeats_bit_for_bit_and_leaves_other_random_numbers(monkeypatch):
    monkeypatch.setattr(measures, "STEPS", 5)
    data, before = digits(), torch.random.get_rng_state()
    first = measures.Measures(**data, n=50)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(5)
    again = measures.Measures(**data, n=50)
    assert again.floor == first.floor
    for a, b in zip(first.net.parameters(), again.net.parameters(), strict=True):
        assert torch.equal(a, b)
    other = measures.Measures(**{**data, "labels": 9 - data["labels"]}, n=50)
    assert other.floor["frechet net"] != first.floor["frechet net"]


def test_wrong_images_get_one_clear_line(monkeypatch):
    monkeypatch.setattr(measures, "STEPS", 2)
    data = digits()
    found = measures.Measures(**data, n=50)
    held = data["held"]
    for images in (held[:49], held[:, :, :4], held.repeat(1, 3, 1, 1)):
        with pytest.raises(ValueError, match=r"\(50, 1, 8, 8\)"):
            found.distances(images)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        measures.Measures(data["train"], held.float())
    with pytest.raises(ValueError, match="not as many images"):  # clips
        measures.Measures(data["train"][:, None], held[:, None])
    with pytest.raises(ValueError, match="9 images are too few"):
        measures.Measures(data["train"], held[:9])


# ---- the command lines ---------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The last checkpoint of a short run of a child."""
    torch.set_num_threads(1)
    out = str(tmp_path_factory.mktemp("run"))
    superobjective.train(superobjective.Config(n_feat=8, steps=3, out=out, quiet=True))
    return f"{out}/last.pt"


def test_the_table_of_a_checkpoint(monkeypatch, capsys, checkpoint):
    monkeypatch.setattr(measures, "STEPS", 5)
    measures.main(checkpoint, n=40)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "40 images, digits 1 x 8 x 8, drawn by DDIM with 50 steps"
    assert lines[1] == "against 1438 training images; sliced Wasserstein: against 40"
    found = measures.Measures(**digits(), n=40)
    for place, ema in ((-2, True), (-1, False)):
        drawn = measures.draw(superobjective.load(checkpoint, ema), 40)
        far = found.distances(drawn)
        for line, name in zip(lines[-5:], far, strict=True):
            assert line.startswith(name)
            floor, own = line.split()[-3], line.split()[place]
            assert float(floor) == pytest.approx(found.floor[name], rel=1e-3)
            assert float(own) == pytest.approx(far[name], rel=1e-3)


def test_a_prepared_folder_may_have_moved_and_have_no_labels(tiny, capsys, monkeypatch):
    monkeypatch.setattr(measures, "STEPS", 2)
    options = f"--data {tiny} --steps 1 --quiet --out run"
    assert command_line(base, options) == 0
    for file in Path(tiny).glob("*labels.npy"):
        file.unlink()
    moved = Path(tiny).rename("moved")
    with pytest.raises(OSError, match="tiny"):
        measures.main("run/last.pt")
    measures.main("run/last.pt", data=str(moved))
    assert "net: tells the damage of" in capsys.readouterr().out


def test_what_is_no_checkpoint_is_said_in_words(tmp_path):
    Path("text").write_text("no checkpoint")
    torch.save({"script": "elsewhere"}, "foreign")
    for path in ("nowhere", "text", "foreign"):
        with pytest.raises(ValueError, match=path):
            measures.script_of(path)


# ---- quality.py ----------------------------------------------------------------------


def judged():
    """Return the digits in [-1, 1], held-out labels, and a judge that knows nothing."""
    data = digits()
    train, held = (data[name] / 127.5 - 1 for name in ("train", "held"))
    judge = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    return train, held, data["held_labels"], judge


def test_labels_belong_to_the_images():
    data, known = digits(), load_digits()
    names = map(bytes, known.images.astype(np.uint8))
    labels = dict(zip(names, known.target, strict=True))
    for images, given in (("train", "labels"), ("held", "held_labels")):
        images = (data[images][:, 0].float() * 16 / 255).round().byte().numpy()
        assert [labels[bytes(x)] for x in images] == data[given].tolist()


def test_real_digits_score_as_real_and_copies_are_seen():
    train, held, labels, judge = judged()
    real = quality.score(held, train, held, labels, judge)
    own = "Frechet distance / floor, held-out"
    assert real["Frechet distance / floor"] == real[own]
    assert 0.7 < real["Frechet distance / floor"] < 1.3  # 1 on average
    assert real["nearest neighbour / held-out"] == pytest.approx(1)
    assert real["nearer than 95 % of held-out"] == pytest.approx(0.05, abs=0.003)
    some = torch.cat([train[:108], held[:252]])  # three in ten are copies
    found = quality.score(some, train, held, labels, judge)
    assert found["nearer than 95 % of held-out"] == pytest.approx(0.335, abs=0.02)
    assert found["nearest neighbour / held-out"] == pytest.approx(0.7, abs=0.05)


def test_the_frechet_ratio_does_not_fall_with_the_number_of_drawings():
    """More images than are held out are scored in groups of as many."""
    train, held, labels, judge = judged()
    soft = noisy((train + 1) * 127.5, 60) / 127.5 - 1
    name = "Frechet distance / floor"
    one, other = soft[:359], soft[359:718]
    far = [quality.score(x, train, held, labels, judge)[name] for x in (one, other)]
    both = quality.score(soft[:718], train, held, labels, judge)[name]
    assert both == pytest.approx(np.mean(far))
    few = quality.score(held[:100], train, held, labels, judge)[name]
    assert 0.7 < few < 1.3  # the floor is that of 100, too: of 359 it would be over 3


def test_the_judge_learns_and_what_it_sees_is_counted():
    train, held, labels, _ = judged()
    judge = quality.train_judge(train, digits()["labels"], epochs=4)
    ones = held[labels == 1]
    found = quality.score(ones, train, held, labels, judge)
    assert found["judge: accuracy, held-out"] > 0.9
    seen = judge(ones).softmax(1).max(1)
    top = seen.values.mean().item()
    assert found["judge: top probability, drawn"] == pytest.approx(top)
    share = np.unique(seen.indices, return_counts=True)[1] / len(ones)
    assert found["classes"] == len(share)
    entropy = -(share * np.log(share)).sum() / np.log(10)
    assert found["entropy of classes / log 10"] == pytest.approx(entropy, abs=1e-6)


def test_quality_draws_from_a_checkpoint_with_eta_1(monkeypatch, capsys, checkpoint):
    calls, seen = [], []

    def sample(self, shape, steps=50, eta=0.0, generator=None, xt=None):
        calls.append((shape, steps, eta, generator.initial_seed()))
        return torch.rand(shape, generator=generator) * 2 - 1

    def score(drawn, train, held, held_labels, judge):
        assert judge == [len(train)] * 2 and len(held_labels) == len(held) == 359
        seen.append(drawn)
        return {"measure": float(len(seen))}

    monkeypatch.setattr(superobjective.DDPM, "sample", sample)
    monkeypatch.setattr(quality, "train_judge", lambda *sets: [*map(len, sets)])
    monkeypatch.setattr(quality, "score", score)
    quality.main(checkpoint)
    assert calls == [((360, 1, 8, 8), 50, 1.0, seed) for seed in range(8)]
    assert all(torch.equal(x, ((x + 1) * 127.5).round() / 127.5 - 1) for x in seen)
    *_, row, real = capsys.readouterr().out.splitlines()
    assert row.split() == ["measure", "4.500", f"{np.std(range(8)):.3f}"]
    assert real in (ROOT / "benchmarks/results/quality.txt").read_text()


def test_quality_is_for_digits_only():
    state = {"script": "superminddpm", "config": {"n_feat": 8}, "shape": (3, 8, 8)}
    ddpm = base.build(base.Config(n_feat=8), (3, 8, 8))
    torch.save({**state, "ema": ddpm.state_dict(), "net": ddpm.state_dict()}, "faces")
    with pytest.raises(ValueError, match="faces draws"):
        quality.main("faces")


# ---- curves.py -----------------------------------------------------------------------


def made_up_run(folder, epochs):
    """Write metrics.csv of a run whose losses are known; return its folder."""
    Path(folder).mkdir()
    with open(Path(folder, "metrics.csv"), "w") as f:
        rows = csv.writer(f)
        rows.writerow("step epoch loss held_loss held_t50 held_t150 stage".split())
        for k, epoch in enumerate(epochs):
            rows.writerow([10 * epoch, epoch, 1 / epoch, 2 / epoch, k + 1, k + 2, 0])
    return folder


def lines(axes):
    return [(x.get_label(), *(v.tolist() for v in x.get_data())) for x in axes.lines]


def test_real_ones_of_other_splits_score_their_floor():
    x = np.random.default_rng(0).standard_normal((2000, 20))
    found = quality.other_splits(x, 400, splits=20)
    assert abs(found.mean() - 1) < 0.1 and len({*found}) == 20


def test_curves_of_one_run_are_those_of_its_table():
    run = made_up_run("run", [1, 2, 4, 5, 8, 10, 16])
    left, right = curves.draw({run: curves.read(run)}).axes
    (own, x, y), (held, _, z) = lines(left)
    assert (own, held) == ("training", "held out, averaged weights")
    assert x == [1, 2, 4, 5, 8, 10, 16] and y == [1 / e for e in x]
    assert z == [2 / e for e in x]
    places = {"epoch 1": 0, "epoch 4": 2, "epoch 8": 4, "epoch 16": 6}
    assert lines(right) == [
        (label, [50, 150], [k + 1, k + 2]) for label, k in places.items()
    ]


def test_curves_of_several_runs_compare_their_ends(capsys):
    runs = made_up_run("a", [1, 2]), made_up_run("b", [1, 4, 5])
    figure = curves.draw({run: curves.read(run) for run in runs})
    left, right = figure.axes
    assert lines(left)[1] == ("b", [1, 4, 5], [2, 0.5, 0.4])
    assert lines(right) == [("a", [50, 150], [2, 3]), ("b", [50, 150], [3, 4])]
    looks = [(x.get_color(), x.get_linestyle()) for x in left.lines]
    assert len(set(looks)) == len({colour for colour, _ in looks}) == 2


def test_curves_write_a_picture_beside_the_table():
    curves.main((made_up_run("a", [3]),))
    curves.main(("a", made_up_run("b", [1])))
    for name in ("loss_curves.png", "compared.png"):
        assert Path("a", name).stat().st_size > 10_000
    for runs, said in (((), "Name the folder"), (("nowhere",), "nowhere/metrics.csv")):
        with pytest.raises(ValueError, match=said):
            curves.main(runs)
