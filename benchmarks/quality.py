"""Are the digits any good?  python benchmarks/quality.py runs/superminddpm-digits/last.pt

Draws 360 images by DDIM with 50 calls from the averaged weights, and scores them against
the real digits: the 1,438 that a run trains on and the 359 that it never sees.

 - classifier: a multilayer perceptron trained on the real training digits; its accuracy
   on held-out ones, and its mean top probability on held-out and on generated digits
 - classes: how many of the ten occur, and the entropy of their histogram over log 10
 - Frechet distance to the training digits in their first 16 principal components, over
   that of as many held-out digits ("floor")
 - distance to the nearest training digit, over that of held-out digits: far below 1
   means copies
"""

import sys
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import sqrtm
from sklearn.decomposition import PCA
from sklearn.neural_network import MLPClassifier

sys.path.insert(0, str(Path(__file__).parents[1]))
import superminddpm as base  # noqa: E402  (found only by the line above)


def frechet(a, b):
    """Return the Frechet distance of the Gaussians fitted to a and b, (N, D) arrays."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    mixed = sqrtm(cov_a @ cov_b).real
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * mixed)


def nearest(a, b):
    """Return the mean distance of the rows of a to their nearest rows of b."""
    return (
        torch.cdist(torch.from_numpy(a), torch.from_numpy(b))
        .min(1)
        .values.mean()
        .item()
    )


def score(images, train, held, labels, held_labels):
    """Return the scores of images as a dict; images, train, held: (N, D) in [-1, 1]."""
    judge = MLPClassifier((128,), max_iter=400, random_state=0).fit(train, labels)
    chances = judge.predict_proba(images)
    share = np.bincount(chances.argmax(1), minlength=10) / len(images)
    axes = PCA(16, random_state=0).fit(train)
    floor = frechet(axes.transform(held), axes.transform(train))
    return {
        "classifier accuracy, held-out": judge.score(held, held_labels),
        "top probability, held-out": judge.predict_proba(held).max(1).mean(),
        "top probability": chances.max(1).mean(),
        "classes": int((share > 0).sum()),
        "entropy of classes / log 10": -np.sum(share * np.log(share + 1e-12))
        / np.log(10),
        "Frechet distance / floor": frechet(
            axes.transform(images), axes.transform(train)
        )
        / floor,
        "nearest neighbour / held-out": nearest(images, train) / nearest(held, train),
    }


def main():
    ddpm = base.load(sys.argv[1])
    images, labels, held, held_labels = base.load_images(base.Config())
    train, held = ((x / 127.5 - 1).flatten(1).numpy() for x in (images, held))
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        images = ddpm.sample((360, *ddpm.shape), steps=50, generator=g)
        images = ((images + 1) * 127.5).round() / 127.5 - 1
        print(f"noise seed {seed}")
        scores = score(images.flatten(1).numpy(), train, held, labels, held_labels)
        for name, value in scores.items():
            print(f"  {name:32} {value:.3f}")


if __name__ == "__main__":
    main()
