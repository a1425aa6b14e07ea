"""Are the digits any good?

    python benchmarks/quality.py runs/superminddpm-digits/last.pt

Takes a checkpoint of any script. Draws 360 images by DDIM with 50 calls from the
averaged weights and scores them beside the real digits: the 1,438 that a run trains on
and the 359 that it never sees.

 - judge: a small convolutional classifier, trained here on the real training digits;
   its accuracy on held-out ones, its mean top probability on held-out and drawn ones
 - classes: how many of the ten occur; the entropy of their histogram over log 10
 - Frechet distance to the training digits in their first 16 principal components, over
   the same for the real held-out digits (the floor)
 - distance to the nearest training digit, over the same for held-out digits: copies of
   the training set would give a ratio far below 1
"""

import importlib
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from measures import frechet

import superminddpm as base


def train_judge(images, labels, epochs=25):
    """Return a classifier of digits, trained on images (N, 1, 8, 8) in [-1, 1]."""
    torch.manual_seed(0)
    judge = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )
    opt = torch.optim.AdamW(judge.parameters(), 2e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(judge(images[index]), labels[index])
            opt.zero_grad()
            loss.backward()
            opt.step()
    return judge


def nearest(a, b):
    """Return the mean distance of the rows of a to their nearest rows of b."""
    return torch.cdist(a, b).min(1).values.mean().item()


@torch.no_grad()
def score(drawn, train, held, held_labels, judge):
    """Return the scores of drawn images; all images are (N, 1, 8, 8) in [-1, 1]."""
    right = (judge(held).argmax(1) == held_labels).float().mean()
    top, classes = judge(drawn).softmax(1).max(1)
    share = torch.bincount(classes, minlength=10) / len(drawn)
    drawn, train, held, real = drawn.flatten(1), train.flatten(1), held.flatten(1), held
    pca = PCA(16, random_state=0).fit(train)
    drawn_16, train_16, held_16 = (pca.transform(x) for x in (drawn, train, held))
    return {
        "judge: accuracy, held-out": right.item(),
        "judge: top probability, held-out": judge(real)
        .softmax(1)
        .amax(1)
        .mean()
        .item(),
        "judge: top probability, drawn": top.mean().item(),
        "classes": (share > 0).sum().item(),
        "entropy of classes / log 10": torch.special.entr(share).sum().item()
        / np.log(10),
        "Frechet distance / floor": frechet(drawn_16, train_16)
        / frechet(held_16, train_16),
        "nearest neighbour / held-out": nearest(drawn, train) / nearest(held, train),
    }


def main():
    script = base.read_checkpoint(sys.argv[1], script="")["script"]
    ddpm = importlib.import_module(script).load(sys.argv[1])
    images, labels, held, held_labels = base.load_images(base.Config())
    images, held = images / 127.5 - 1, held / 127.5 - 1
    judge = train_judge(images, labels)
    scores = []
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        drawn = ddpm.sample((360, *ddpm.shape), steps=50, generator=g)
        drawn = ((drawn + 1) * 127.5).round() / 127.5 - 1
        scores.append(score(drawn, images, held, held_labels, judge))
    print(f"{'360 images each, noise seed':34}{0:8}{1:8}{2:8}")
    for name in scores[0]:
        print(f"{name:34}" + "".join(f"{row[name]:8.3f}" for row in scores))


if __name__ == "__main__":
    main()
