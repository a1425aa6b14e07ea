"""Labels and guidance: the formula, the drop, the pairing, what a judge sees."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command_line
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

import superguide
import superminddpm
from superguide import NO_LABEL, Config, build, condition, dropped, load_labels, rng

SMALL = Config(n_feat=8, batch=32, steps=4, every=1, device="cpu", quiet=True)
FIELDS = superminddpm.Config.__dataclass_fields__  # that the base has, too


def model(T=1000):
    """Return a DDPM that sees labels, with random weights everywhere."""
    torch.manual_seed(0)
    ddpm = build(Config(n_feat=8, T=T), (1, 8, 8))
    torch.nn.init.normal_(ddpm.net.out.weight)
    return ddpm.eval()


def drawn(n=6):
    g = rng("cpu", 1)
    t = torch.randint(1, 1001, (n,), generator=g)
    return torch.randn(n, 1, 8, 8, generator=g), t, torch.arange(n) % 10


@torch.no_grad()
def both(ddpm, xt, t, y):
    """Return eps_u and eps_c."""
    return xt + ddpm.net(xt, t), xt + ddpm.net(xt, torch.stack([t, y], 1))


def rows(run):
    with open(f"{run}/metrics.csv") as f:
        return [{k: float(x) for k, x in row.items()} for row in csv.DictReader(f)]


@torch.no_grad()
def test_guidance_is_its_formula():
    ddpm, (xt, t, y) = model(), drawn()
    eps_u, eps_c = both(ddpm, xt, t, y)
    assert (eps_u - eps_c).abs().amax((1, 2, 3)).min() > 1e-2
    mixed = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0, 1.0])
    for w in (-1.0, 0.3, 3.0, 7.5, mixed):
        condition(ddpm, y, w)
        want = eps_u + torch.as_tensor(w).view(-1, 1, 1, 1) * (eps_c - eps_u)
        torch.testing.assert_close(ddpm.eps_hat(xt, t), want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_w_0_and_w_1_are_the_two_models_exactly():
    """And w = 1, like no label, takes one call of the network; other w take two."""
    ddpm, (xt, t, y), calls = model(), drawn(), []
    eps_u, eps_c = both(ddpm, xt, t, y)
    ddpm.net.register_forward_hook(lambda net, args, out: calls.append(len(out)))
    asked = [(y, 0, eps_u, 2), (y.tolist(), 1, eps_c, 1), (None, 1, eps_u, 1)]
    for labels, w, want, n in asked:
        condition(ddpm, labels, w)
        assert torch.equal(ddpm.eps_hat(xt, t), want)
        assert calls == [len(y)] * n
        calls.clear()
    condition(ddpm, y)
    assert torch.equal(ddpm.eps_hat(xt, t), eps_c)  # w is 1 unless it is said
    none = torch.full_like(y, NO_LABEL)
    assert torch.equal(both(ddpm, xt, t, none)[1], eps_u)  # a dropped label is none


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_depend_on_label_and_strength(eta):
    """From the same noise: w = 0 ignores the label, w = 1 and 3 do not."""
    ddpm, xt = model(T=50), torch.randn(2, 1, 8, 8, generator=rng("cpu", 2))

    def images(y, w=1.0):
        condition(ddpm, y, w)
        return ddpm.sample(xt.shape, 5, eta, generator=rng("cpu", 3), xt=xt)

    plain = images(None)
    assert torch.equal(images([4, 7], 0.0), plain)
    one, other, loud = images([4, 7]), images([4, 2]), images([4, 7], 3.0)
    assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])
    assert not torch.equal(one, plain) and not torch.equal(one, loud)


def test_labels_are_dropped_by_seed_and_step():
    cfg = Config(p_uncond=0.1, batch=20_000)
    gone = dropped(cfg, 5, "cpu")
    assert gone.float().mean().item() == pytest.approx(0.1, abs=4 * 0.0022)
    assert torch.equal(gone, dropped(cfg, 5, "cpu"))
    for other in (dropped(cfg, 6, "cpu"), dropped(replace(cfg, seed=1), 5, "cpu")):
        both = (other & gone).float().mean().item()
        assert both == pytest.approx(0.01, abs=4 * 0.0008)  # independent
    for stream in range(1, 10):  # nor is it what the order, t or noise are drawn from
        same = torch.rand(cfg.batch, generator=rng("cpu", 0, 5, stream)) < 0.1
        assert (same & gone).float().mean() < 0.02
    assert not dropped(replace(cfg, p_uncond=0.0), 5, "cpu").any()
    assert dropped(replace(cfg, p_uncond=1.0), 5, "cpu").all()


def known_digits():
    """Return {pixels: label} of scikit-learn's digits, all of which differ."""
    digits = load_digits()
    pixels = (digits.images * 255 / 16).round().astype(np.uint8)
    return {x.tobytes(): y for x, y in zip(pixels, digits.target.tolist(), strict=True)}


def test_the_labels_of_the_digits_are_those_of_the_images():
    known = known_digits()
    assert len(known) == 1797
    parts = zip(superguide.load_images(Config()), load_labels(Config()), strict=True)
    for images, labels in parts:
        assert [known[x.numpy().tobytes()] for x in images] == labels.tolist()


@pytest.mark.parametrize("p_uncond", [0.2, 0.0])
def test_training_pairs_each_image_with_its_label(monkeypatch, p_uncond):
    """Every image of every step is looked up in the data by its pixels."""
    known, seen, forward = known_digits(), [], superguide.DDPM.forward

    def spy(self, x0, t, eps):
        if self.training:
            pixels = ((x0 + 1) * 127.5).round().byte()
            want = [known[image.numpy().tobytes()] for image in pixels]
            seen.extend(zip(want, self.y.tolist(), strict=True))
            assert self.w is None
        return forward(self, x0, t, eps)

    monkeypatch.setattr(superguide.DDPM, "forward", spy)
    superguide.train(replace(SMALL, out="run", steps=10, p_uncond=p_uncond))
    kept = [(want, y) for want, y in seen if y != NO_LABEL]
    assert len(seen) == 320 and all(want == y for want, y in kept)
    assert len(kept) == 320 if p_uncond == 0 else 230 < len(kept) < 280


def test_without_any_label_the_base_is_trained():
    """--p-uncond 1 drops all. Nor does a label stay behind for the grid of samples."""
    shared = {name: getattr(SMALL, name) for name in FIELDS}
    superminddpm.train(superminddpm.Config(**{**shared, "out": "base", "lr": 5e-3}))
    superguide.train(replace(SMALL, out="own", lr=5e-3, p_uncond=1.0))
    base, own = (torch.load(f"{run}/last.pt") for run in ("base", "own"))
    for name, weight in base["net"].items():
        assert torch.equal(weight, own["net"][name]), name
    embedding = own["net"]["net.classes.weight"]
    assert embedding.shape == (11, 32) and (embedding[NO_LABEL] == 0).all()
    grids = [Path(run, "samples_epoch_001.png") for run in ("base", "own")]
    assert grids[0].read_bytes() == grids[1].read_bytes()


def test_a_run_learns_labels_and_logs_what_they_are_worth():
    ddpm = superguide.train(replace(SMALL, out="run", lr=5e-3))
    new = ddpm.net.classes.weight
    torch.manual_seed(0)
    old = build(SMALL, (1, 8, 8)).net.classes.weight
    assert (new[NO_LABEL] == 0).all() and (new[:10] != old[:10]).any(1).all()
    held, y = superguide.load_images(SMALL)[1] / 127.5 - 1, load_labels(SMALL)[1]
    total = {"held_loss": 0, "held_loss_with_label": 0}
    for level in range(50, 1000, 100):
        t = torch.full((len(held),), level)
        eps = torch.randn(held.shape, generator=rng("cpu", level))
        found = both(ddpm, ddpm.q_sample(held, t, eps), t, y)
        for name, eps_hat in zip(total, found, strict=True):
            total[name] += (eps_hat - eps).square().mean().item() / 10
    (row,) = rows("run")
    assert {name: row[name] for name in total} == pytest.approx(total, rel=1e-5)
    assert total["held_loss"] != pytest.approx(total["held_loss_with_label"], rel=1e-4)
    assert ddpm.y is None


def test_the_grid_has_a_row_a_class_and_equal_noises_for_each_strength():
    ddpm, cfg = model(T=50), Config(n_feat=8, guidance=(0.0, 3.0))
    superguide.save_classes(ddpm, cfg, "grid.png")
    assert ddpm.y is None
    image = torch.from_numpy(np.array(Image.open("grid.png").convert("L")))
    assert image.shape == (10 * 66 + 2, 8 * 66 + 2)
    cells = image[2:, 2:].unfold(0, 64, 66).unfold(1, 64, 66)[:, :, ::8, ::8]
    xt = torch.randn(4, 1, 8, 8, generator=rng("cpu", 0, 10))
    for y in (0, 7):
        for k, w in enumerate(cfg.guidance):
            condition(ddpm, [y] * 4, w)
            want = (ddpm.sample(xt.shape, xt=xt)[:, 0] + 1) * 127.5
            gap = cells[y, 4 * k : 4 * k + 4] - want
            assert gap.abs().max() <= 1


LINE = "--data tiny --epochs 1 --out run --quiet --device cpu"


def test_the_labels_of_a_folder(tiny):
    digits = load_digits().target.tolist()
    assert torch.cat(load_labels(Config(data=tiny))).tolist() == digits[:200]
    assert command_line(superguide, f"{LINE} --guidance 0 2.5") == 0
    assert superguide.read_checkpoint("run/last.pt")["config"].guidance == (0, 2.5)
    assert Image.open("run/classes_epoch_001.png").size == (8 * 66 + 2, 10 * 66 + 2)
    more = LINE.replace("epochs 1", "epochs 2 --resume")  # other strengths in the grids
    assert command_line(superguide, f"{more} --guidance 1") == 0
    assert Image.open("run/classes_epoch_002.png").size == (4 * 66 + 2, 10 * 66 + 2)


@pytest.mark.parametrize("part", ["train", "held"])
@pytest.mark.parametrize("fault", ["has no labels", "has labels above 9"])
def test_data_without_usable_labels_is_refused_in_a_line(tiny, fault, part, capsys):
    file = Path(tiny, f"{part}_labels.npy")
    labels = np.load(file)
    file.unlink()
    if "above" in fault:
        np.save(file, np.append(labels[1:], 10))
    assert command_line(superguide, LINE) == 2
    how = "change CLASSES" if "above" in fault else "add --no-class-cond"
    assert capsys.readouterr().err == f"superguide.py: tiny {fault}: {how}\n"
    assert not Path("run").exists()
    assert command_line(superguide, f"{LINE} --no-class-cond") == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"guidance": ()},
        {"guidance": (1.0, float("nan"))},
        {"p_uncond": 1.5},
        {"p_uncond": -0.1},
    ],
)
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ValueError, match="--p-uncond"):
        Config(**wrong)


@pytest.mark.slow
def test_a_judge_sees_the_digit_that_was_asked_for():
    """At w = 3 a classifier agrees for 95 of 100; at w = 0 it cannot.

    The judge is an SVM of scikit-learn, trained on all real digits.
    """
    digits = load_digits()
    judge = SVC(gamma=0.001).fit(digits.images.reshape(-1, 64), digits.target)
    cfg = Config(out="run", batch=64, steps=400, every=100, quiet=True, device="cpu")
    ddpm, y, right = superguide.train(cfg), torch.arange(200) % 10, {}
    xt = torch.randn(200, 1, 8, 8, generator=rng("cpu", 5))
    for w in (0.0, 1.0, 3.0):
        condition(ddpm, y, w)
        found = judge.predict((ddpm.sample(xt.shape, 25, xt=xt).flatten(1) + 1) * 8)
        right[w] = (found == y.numpy()).mean()
    assert right[3.0] >= 0.95 and right[1.0] > 0.7 and right[0.0] < 0.3, right
