"""Are the digits any good?

    python benchmarks/quality.py runs/superminddpm-digits/last.pt

Takes a checkpoint of any script that draws digits. Draws 360 from the averaged weights,
eight times, in 50 steps with eta = 1, and scores them beside the real digits: the 1,438
that a run trains on and the 359 that it never sees. Prints the mean of the eight and
their spread (standard deviation), since one drawing alone can be lucky.

 - judge: a small convolutional classifier, trained here on the real training digits;
   its accuracy on held-out ones, its mean top probability on held-out and drawn ones
 - classes: how many of the ten occur; the entropy of their histogram over log 10
 - Frechet distance to the training digits in their first 16 principal components, over
   its floor: what equally many real digits would score on average, in closed form
   (measures.frechet_floor); the same for the real held-out digits, and for as many
   real ones in 300 other splits of all
 - distance to the nearest training digit, over the same for held-out digits; and the
   share of drawn digits that lie nearer to a training digit than 95 % of the held-out
   ones do: 0.05 would be as if real, much more would be copies
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from sklearn.decomposition import PCA
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from measures import frechet, frechet_floor, load_labels, script_of

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


def other_splits(x, n, splits=300):
    """Return Frechet distances over floor (splits,) of n of the rows x to the rest."""
    found = []
    for seed in range(splits):
        rest, own = np.split(np.random.default_rng(seed).permutation(x), [-n])
        pca = PCA(16, random_state=0).fit(rest)
        own, rest = pca.transform(own), pca.transform(rest)
        found.append(frechet(own, rest) / frechet_floor(rest, n))
    return np.array(found)


def nearest(a, b):
    """Return the distance of each row of a to its nearest row of b."""
    return torch.cdist(a, b).min(1).values


@torch.no_grad()
def score(drawn, train, held, held_labels, judge):
    """Return the scores of drawn images; all images are (N, 1, 8, 8) in [-1, 1].

    The Frechet distance falls as the number of images grows. So if more are drawn than
    are held out, it is the mean over groups of as many.
    """
    right = (judge(held).argmax(1) == held_labels).float().mean().item()
    real_top = judge(held).softmax(1).amax(1).mean().item()
    top, classes = judge(drawn).softmax(1).max(1)
    share = torch.bincount(classes, minlength=10) / len(drawn)
    drawn, train, held = (x.flatten(1) for x in (drawn, train, held))
    n, pca = min(len(drawn), len(held)), PCA(16, random_state=0).fit(train)
    groups = [x for x in (held[:n], *drawn.split(n)) if len(x) == n]
    real, *far = (frechet(pca.transform(x), pca.transform(train)) for x in groups)
    floor = frechet_floor(pca.transform(train), n)
    near, near_held = nearest(drawn, train), nearest(held, train)
    return {
        "judge: accuracy, held-out": right,
        "judge: top probability, held-out": real_top,
        "judge: top probability, drawn": top.mean().item(),
        "classes": (share > 0).sum().item(),
        "entropy of classes / log 10": torch.special.entr(share).sum().item()
        / math.log(10),
        "Frechet distance / floor, held-out": float(real / floor),
        "Frechet distance / floor": float(np.mean(far) / floor),
        "nearest neighbour / held-out": (near.mean() / near_held.mean()).item(),
        "nearer than 95 % of held-out": (near < near_held.quantile(0.05))
        .float()
        .mean()
        .item(),
    }


def main(path: tyro.conf.Positional[str], drawings: int = 8):
    """Score what a checkpoint draws.

    Args:
        path: the checkpoint, of any script that draws digits
        drawings: sets of 360 digits that are drawn and scored
    """
    ddpm = script_of(path).load(path)
    images, held = (x / 127.5 - 1 for x in base.load_images(base.Config()))
    if ddpm.shape != images.shape[1:]:
        raise ValueError(f"{path} draws {ddpm.shape}, not digits of 8x8")
    labels, held_labels = load_labels("digits")
    judge, scores = train_judge(images, labels), []
    for seed in range(drawings):
        g = torch.Generator().manual_seed(seed)
        drawn = ddpm.sample((360, *ddpm.shape), eta=1.0, generator=g)
        drawn = ((drawn + 1) * 127.5).round() / 127.5 - 1
        scores.append(score(drawn, images, held, held_labels, judge))
    print(f"{f'360 digits, {drawings} times':36}{'mean':>8}{'spread':>8}")
    rows = {name: [row[name] for row in scores] for name in scores[0]}
    real = torch.cat([images, held]).flatten(1).numpy()
    rows["Frechet distance / floor, 300 splits"] = other_splits(real, len(held))
    for name, found in rows.items():
        print(f"{name:36}{np.mean(found):8.3f}{np.std(found):8.3f}")


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (ValueError, OSError) as error:
        sys.exit(f"quality.py: {error}")
