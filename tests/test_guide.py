"""Labels and guidance: the identities, the drop, the layout, what a judge says."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from test_family import train
from test_train import state

import superguide
from superguide import Config, build, condition, rng


def model(seed=0, **options):
    """Return a DDPM that hears labels, with random weights everywhere."""
    torch.manual_seed(seed)
    ddpm = build(Config(n_feat=8, **options), (1, 8, 8))
    torch.nn.init.normal_(ddpm.net.out.weight)
    return ddpm.eval()


def drawn(n=6):
    g = rng("cpu", 1)
    t = torch.randint(1, 1001, (n,), generator=g)
    return torch.randn(n, 1, 8, 8, generator=g), t, torch.arange(n) % 10


def calls(ddpm):
    """Return a list that gets the batch size of each call of the network."""
    seen = []
    ddpm.net.register_forward_hook(lambda net, args, out: seen.append(len(args[0])))
    return seen


@torch.no_grad()
def test_guidance_is_its_formula():
    """eps_u + w (eps_c - eps_u), from one network call for both."""
    ddpm, (xt, t, y) = model(), drawn()
    eps_u = ddpm.net(xt, t)
    eps_c = ddpm.net(xt, torch.stack([t, y], 1))
    assert (eps_u - eps_c).abs().amax((1, 2, 3)).min() > 1e-2
    for w in (-1.0, 0.3, 1.0, 3.0, 7.5):
        condition(ddpm, y, w)
        want = eps_u + w * (eps_c - eps_u)
        torch.testing.assert_close(ddpm.eps_hat(xt, t), want, atol=1e-4, rtol=1e-4)
    w = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0, 1.0])
    condition(ddpm, y, w)
    want = eps_u + w.view(-1, 1, 1, 1) * (eps_c - eps_u)
    seen = calls(ddpm)
    torch.testing.assert_close(ddpm.eps_hat(xt, t), want, atol=1e-4, rtol=1e-4)
    assert seen == [12]


@torch.no_grad()
def test_w_0_and_w_1_are_the_two_models_exactly_in_one_call():
    ddpm, (xt, t, y) = model(), drawn()
    eps_u, eps_c = ddpm.net(xt, t), ddpm.net(xt, torch.stack([t, y], 1))
    seen = calls(ddpm)
    condition(ddpm, y, 0.0)
    assert torch.equal(ddpm.eps_hat(xt, t), eps_u)
    condition(ddpm, y, 1.0)
    assert torch.equal(ddpm.eps_hat(xt, t), eps_c)
    condition(ddpm, y)
    assert torch.equal(ddpm.eps_hat(xt, t), eps_c)
    condition(ddpm)
    assert torch.equal(ddpm.eps_hat(xt, t), eps_u)
    assert seen == [6, 6, 6, 6]
    labels = [torch.stack([t, torch.full_like(t, k)], 1) for k in (10, 3)]
    assert torch.equal(ddpm.net(xt, labels[0]), eps_u)  # a dropped label is none
    condition(ddpm, 3)
    assert torch.equal(ddpm.eps_hat(xt, t), ddpm.net(xt, labels[1]))  # one for all
    condition(ddpm, 3, 0)  # a whole number does as well
    assert torch.equal(ddpm.eps_hat(xt, t), eps_u)


@torch.no_grad()
def test_sampling_hears_the_label_with_either_sampler():
    """From the same noise: w = 0 ignores the label, w = 1 and 3 do not."""
    ddpm = model()
    ddpm = superguide.DDPM(ddpm.net, 50)
    xt = torch.randn(2, 1, 8, 8, generator=rng("cpu", 2))
    for sampler in ("ddim", "ddpm"):

        def images(y, w, sampler=sampler):
            condition(ddpm, y, w)
            return ddpm.sample(xt.shape, 5, sampler, generator=rng("cpu", 3), xt=xt)

        plain = images(None, 1.0)
        assert torch.equal(images(4, 0.0), plain) and torch.equal(images(7, 0.0), plain)
        for w in (1.0, 3.0):
            assert not torch.equal(images(4, w), images(7, w))
        assert not torch.equal(images(4, 1.0), images(4, 3.0))


def test_labels_are_dropped_by_seed_and_step():
    y = torch.arange(20_000) % 10
    cfg = Config(p_uncond=0.1)
    kept = superguide.drop_labels(y, cfg, 5)
    gone = kept == superguide.NO_LABEL
    assert gone.float().mean().item() == pytest.approx(0.1, abs=4 * 0.0022)
    assert torch.equal(kept[~gone], y[~gone])
    assert torch.equal(kept, superguide.drop_labels(y, cfg, 5))
    for other in (
        superguide.drop_labels(y, cfg, 6),
        superguide.drop_labels(y, Config(seed=1), 5),
    ):
        both = ((other == superguide.NO_LABEL) & gone).float().mean().item()
        assert both == pytest.approx(0.01, abs=4 * 0.0008)  # independent
    for stream in range(1, 6):  # nor is it what the order, t or noise are drawn from
        same = torch.rand(len(y), generator=rng("cpu", 0, 5, stream)) < 0.1
        assert (same & gone).float().mean() < 0.02
    assert torch.equal(superguide.drop_labels(y, Config(p_uncond=0.0), 5), y)
    assert (superguide.drop_labels(y, Config(p_uncond=1.0), 5) == 10).all()


def test_training_pairs_each_image_with_its_label(monkeypatch):
    """Every image of every step is looked up in the data by its pixels."""
    images, labels, *_ = superguide.load_images(Config(n_train=160))
    known = {
        image.numpy().tobytes(): int(y) for image, y in zip(images, labels, strict=True)
    }
    seen, forward = [], superguide.DDPM.forward

    def spy(self, x0, t, eps):
        pixels = ((x0 + 1) * 127.5).round().byte()
        want = [known[image.numpy().tobytes()] for image in pixels]
        seen.extend(zip(want, self.y.tolist(), strict=True))
        assert self.w == 1.0
        return forward(self, x0, t, eps)

    monkeypatch.setattr(superguide.DDPM, "forward", spy)
    train("superguide", "run", steps=10, p_uncond=0.2)
    heard = [(want, y) for want, y in seen if y != 10]
    assert len(seen) == 320 and 200 < len(heard) < 300
    assert all(want == y for want, y in heard)


@pytest.mark.parametrize("child", ["superguide"])
def test_without_any_label_the_base_is_trained(child):
    """--p-uncond 1: all is dropped, and the vectors of the labels stay as they were."""
    train("superminddpm", "base", lr=5e-3)
    train("superguide", "all", lr=5e-3, p_uncond=1.0)
    base, own = state("base"), state("all")
    for name, weight in base["net"].items():
        assert torch.equal(weight, own["net"][name]), name
    assert base["losses"] == own["losses"]
    vectors = own["net"]["net.classes.weight"]
    assert vectors.shape == (11, 32) and (vectors[10] == 0).all()


def test_the_vector_of_no_label_stays_0_and_the_others_learn():
    train("superguide", "run")
    old = build(state_config := Config(n_feat=8), (1, 8, 8)).net.classes.weight
    assert state_config.class_cond and old.shape == (11, 32)
    new = state("run")["net"]["net.classes.weight"]
    assert (new[10] == 0).all() and not torch.equal(new[:10], old[:10])


def rows(run):
    with open(f"{run}/metrics.csv") as f:
        return list(csv.DictReader(f))


@torch.no_grad()
def test_the_held_out_loss_with_labels_is_held_out_loss_with_labels():
    """Where labels say nothing the two are equal; else each image hears its own."""
    ddpm = model()
    _, _, held, labels = superguide.load_images(Config())
    total = 0
    for level in range(50, 1000, 100):
        g, t = rng("cpu", level), torch.full((len(held),), level)
        eps = torch.cat([torch.randn(x0.shape, generator=g) for x0 in held.split(256)])
        xt = ddpm.q_sample(held / 127.5 - 1, t, eps)
        error = ddpm.net(xt, torch.stack([t, labels], 1)) - eps
        total += error.square().mean().item() / 10
    found = superguide.loss_with_label(ddpm, held, labels)
    assert found == pytest.approx(total, rel=1e-4) and ddpm.y is None
    without = sum(superguide.held_out_loss(ddpm, held).values()) / 10
    assert found != pytest.approx(without, rel=1e-2)
    ddpm.net.classes.weight.zero_()
    found = superguide.loss_with_label(ddpm, held, labels)
    assert found == pytest.approx(without, rel=1e-5)


@pytest.mark.parametrize("n", [1, 10, 29, 64, 120])
@pytest.mark.parametrize("ws", [[3.0], [0.0, 1.0, 3.0]])
def test_any_number_of_images_is_laid_out(n, ws):
    """As many labels as images, in turn; each image once; a row a class."""
    asked = [superguide.label_and_strength(i, ws) for i in range(n)]
    assert [y for y, *_ in asked] == [i % 10 for i in range(n)]
    cells, columns = superguide.table(n, ws)
    assert sorted(i for i in cells if i is not None) == list(range(n))
    if len(ws) == 1:
        assert columns == 10 and [z for *_, z in asked] == list(range(n))
        return
    for at, i in enumerate(cells):
        if i is not None:
            assert asked[i][0] == at // columns
            assert asked[i][1] == at % columns // (columns // len(ws))
    noises = {}
    for y, k, z in asked:
        noises.setdefault(z, []).append((y, k))
    for same in noises.values():  # one noise, one label, each strength once
        assert len({y for y, _ in same}) == 1
        assert len({k for _, k in same}) == len(same)


def test_sample_writes_64_labels_and_w_0_and_1_as_asked():
    """--sample against the sampler called by hand with each image's label and w."""
    train("superguide", "run", steps=5)
    for w in ("0,1,3", "1"):
        cfg = Config(sample="run/last.pt", guidance=w, n_feat=8, quiet=True, batch=32)
        superguide.draw(superguide.replace(cfg, out=w, sampling_steps=4))
        assert len(list(Path(w).glob("0*.png"))) == 64
    ddpm = superguide.load("run/last.pt")
    for i, (w, z) in {0: (0.0, 0), 13: (1.0, 3), 27: (3.0, 7), 34: (0.0, 14)}.items():
        xt = torch.randn(1, 1, 8, 8, generator=rng("cpu", 0, z, 4))
        condition(ddpm, torch.tensor([i % 10]), w)
        x0 = ddpm.sample(xt.shape, 4, xt=xt)
        pixels = torch.from_numpy(np.array(Image.open(f"0,1,3/{i:06}.png")))
        gap = pixels - (x0[0, 0] + 1) * 127.5
        assert gap.abs().max() < 1
    with open("0,1,3/labels.csv") as f:
        told = list(csv.DictReader(f))
    assert [row["label"] for row in told] == [str(i % 10) for i in range(64)]
    assert [row["w"] for row in told] == list(("0" * 10 + "1" * 10 + "3" * 10) * 3)[:64]
    assert all(Path("0,1,3", row["file"]).exists() for row in told)
    size = Image.open("0,1,3/grid.png").size
    assert size == (9 * 66 + 2, 10 * 66 + 2)  # 3 strengths of 3 turns, 10 classes
    assert Image.open("1/grid.png").size == (10 * 66 + 2, 7 * 66 + 2)


def test_a_run_writes_a_grid_of_classes():
    train("superguide", "run", steps=5, guidance="0,1")
    assert Image.open("run/classes_epoch_001.png").size == (4 * 66 + 2, 10 * 66 + 2)
    row = rows("run")[-1]
    assert float(row["held_loss_with_label"]) > 0


def call(*options):
    return subprocess.run(
        [sys.executable, str(ROOT / "superguide.py"), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_data_without_labels_is_refused_in_a_line():
    for data in ("celeba", "folder"):
        with pytest.raises(ValueError, match=f"--data {data} has no labels: add --no-"):
            superguide.train(Config(data=data))
    done = call("--data", "folder")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "has no labels" in done.stderr and not Path("runs").exists()
    # and so is a request for labels from a model that knows none
    train("superguide", "run", steps=2, class_cond=False)
    with pytest.raises(ValueError, match="knows no labels: add --no-class-cond"):
        superguide.draw(Config(sample="run/last.pt", class_cond=True))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"guidance": "1,loud"}, "--guidance wants numbers like 0,1,3, not '1,loud'"),
        ({"guidance": ""}, "--guidance wants numbers"),
        ({"guidance": "nan"}, "--guidance wants numbers"),
        ({"p_uncond": 1.5}, "--p-uncond is a share"),
        ({"p_uncond": -0.1}, "--p-uncond cannot be"),
    ],
)
def test_impossible_values_are_refused(wrong, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        Config(**wrong)


def test_labels_can_be_added_to_a_trained_base():
    """--init from superminddpm: at first the network without labels is the base's."""
    train("superminddpm", "base", lr=5e-3)
    train("superguide", "own", steps=1, lr=0.0, init="base/last.pt")
    old, new = state("base")["ema"], state("own")["net"]
    assert set(new) - set(old) == {"net.classes.weight"}
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_judge_sees_the_digit_that_was_asked_for():
    """At the best w a classifier agrees for 95 of 100; at w = 0 it cannot.

    The judge is an SVM of scikit-learn, trained on all real digits.
    """
    digits = load_digits()
    judge = SVC(gamma=0.001).fit(digits.images.reshape(-1, 64), digits.target)
    options = {"n_feat": 16, "batch": 64, "n_train": 0, "lr": 1.2e-2, "epochs": 15}
    options |= {"save_every": 1000, "sample_every": 1000, "steps": 0}
    ddpm = train("superguide", "run", **options)
    y, right = torch.arange(200) % 10, {}
    xt = torch.randn(200, 1, 8, 8, generator=rng("cpu", 5))
    for w in (0.0, 1.0, 3.0):
        condition(ddpm, y, w)
        found = judge.predict((ddpm.sample(xt.shape, 25, xt=xt).flatten(1) + 1) * 8)
        right[w] = (found == y.numpy()).mean()
    assert right[3.0] >= 0.95 and right[1.0] > 0.7 and right[0.0] < 0.3, right
