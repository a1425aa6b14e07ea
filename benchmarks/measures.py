"""How far are drawn images from the training images?

    python benchmarks/measures.py runs/superminddpm-digits/last.pt
    python benchmarks/measures.py FILE --n 500 --data data/celeba32

Takes a checkpoint of any script that draws images. Draws 1000 by DDIM with 50 steps,
from the averaged and from the raw weights, and prints their distances to the training
images. The floor is what as many held-out images score: as good as real.
(benchmarks/quality.py asks more, but of digits only: what a classifier sees in them,
which classes occur, copies of training images.)

 - frechet: Frechet distance of the Gaussians fitted to features; it falls as the number
   of images grows, so only equal numbers compare
 - kernel: squared maximum mean discrepancy of features, with a polynomial kernel; free
   of bias, so that chance can take it below 0
 - pca: the first 64 principal components of the training images (a quarter of all, if
   that is less), pixels in [-1, 1]: what is large, layout and brightness
 - net: 84 features of a small classifier trained here on the labels; without labels 64
   of one that learned which of 4 quarter turns and which damage (none, blur, noise,
   swapped quadrants, swapped colours) an image has had: what is small as well
 - sliced wasserstein: of 7x7 patches from each level of a Laplacian pyramid, mean over
   levels, times 1000; each set of patches is normalized by its own mean and spread

Features are divided by one number, the root mean square of the training images'.
Nothing is downloaded, so these are not the FID and KID of papers, which want Inception:
compare numbers within one data set only. For an FID, supersample.py writes files that
every tool for it reads.
"""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from scipy.ndimage import convolve1d
from sklearn.decomposition import PCA
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import superguide
from superminddpm import rng

REAL = 10_000  # training images that are compared with, at most
STEPS, EPOCHS = 1000, 12  # to train the net: the steps, of 64 images, or fewer epochs
PATCHES, DIRECTIONS = 32, 256  # patches an image, random directions


def frechet(a, b):
    """Return the Frechet distance of the Gaussians fitted to the rows of a and b.

    Heusel et al. 2017, arXiv:1706.08500, Eq. 6.
    """
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    mixed = np.linalg.eigvals(cov_a @ cov_b).real.clip(0)
    shift = np.sum((a.mean(0) - b.mean(0)) ** 2)
    return shift + np.trace(cov_a + cov_b) - 2 * np.sqrt(mixed).sum()


def frechet_floor(x, n):
    """Return the expected Frechet distance of n more images of the kind of rows x to x.

    To first order in 1/n for Gaussian rows, v the eigenvalues of their covariance:
    (1/n + 1/len(x)) (5/4 sum_i v_i + 1/2 sum_ij v_i v_j / (v_i + v_j)).
    """
    v = np.linalg.eigvalsh(np.cov(x.T)).clip(1e-12)
    pairs = np.outer(v, v) / (v[:, None] + v)
    return (1 / n + 1 / len(x)) * (5 / 4 * v.sum() + pairs.sum() / 2)


def likeness(a, b=None):
    """Return the mean of (x.y / d + 1)^3 over rows x of a, y of b; None: other x."""
    other, total = a if b is None else b, 0.0
    for start in range(0, len(a), 1000):
        z = a[start : start + 1000] @ other.T / a.shape[1] + 1
        total += (z * z * z).sum()
    if b is None:
        total -= (((a**2).sum(1) / a.shape[1] + 1) ** 3).sum()
    return total / len(a) / (len(other) - (b is None))


def kernel(a, b, b_alone=None):
    """Return the squared maximum mean discrepancy of the rows of a and b, unbiased.

    Binkowski et al. 2018, arXiv:1801.01401, Eq. 4. b_alone: likeness(b), if known.
    """
    b_alone = likeness(b) if b_alone is None else b_alone
    return likeness(a) + b_alone - 2 * likeness(a, b)


def blur(x):
    """Return x (N, C, H, W), a numpy array, blurred by the 5x5 binomial filter."""
    for axis in (2, 3):
        x = convolve1d(x, np.float32([1, 4, 6, 4, 1]) / 16, axis, mode="mirror")
    return x


def pyramid(x):
    """Return the Laplacian pyramid of x (N, C, S, S): halves, of 8 pixels at least."""
    levels = []
    while x.shape[-1] >= 16 and x.shape[-1] % 2 == 0:
        small, spread = blur(x)[..., ::2, ::2], np.zeros_like(x)
        spread[..., ::2, ::2] = 4 * small
        levels.append(x - blur(spread))
        x = small
    return [*levels, x]


def projected(rows):
    """Return rows (N, D) along fixed random directions, each sorted (float32)."""
    way = np.random.default_rng(0).standard_normal((DIRECTIONS, rows.shape[1]))
    way /= np.linalg.norm(way, axis=1, keepdims=True)
    return np.sort(way.astype(np.float32) @ np.float32(rows).T, axis=1)


def patches(images):
    """Return per level of the pyramid of uint8 images, patches (32 N, 49 C), sorted."""
    draw, found = np.random.default_rng(1), []
    for level in pyramid(np.float32(images)):
        windows = np.lib.stride_tricks.sliding_window_view(level, (7, 7), (2, 3))
        n, c, side = windows.shape[:3]
        at = draw.integers(0, side, (2, n, PATCHES))
        rows = windows[np.arange(n)[:, None], :, at[0], at[1]].reshape(-1, c, 49)
        mean, std = rows.mean((0, 2)), rows.std((0, 2)) + 1e-8
        rows = (rows - mean[:, None]) / std[:, None]
        found.append(projected(rows.reshape(len(rows), -1)))
    return found


def sliced_wasserstein(a, b):
    """Return 1000 times the distance of two results of patches(), of equal size.

    Karras et al. 2018, arXiv:1710.10196, Sec. 5: the mean over directions of the
    distance in one dimension, which sorting solves; there 128 patches, 512 directions.
    """
    far = [np.abs(x - y).mean(dtype=float) for x, y in zip(a, b, strict=True)]
    return float(1e3 * np.mean(far))


class Net(nn.Module):
    """A small LeNet: features of x (B, C, S, S) in [-1, 1], and classes from them."""

    def __init__(self, channels, features, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.full = nn.Linear(64 * 16, features)
        self.head = nn.Linear(features, classes)

    def features(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(self.conv2(x))
        x = F.max_pool2d(x, 2) if x.shape[-1] > 8 else x
        x = F.adaptive_avg_pool2d(F.relu(self.conv3(x)), 4)
        return self.full(x.flatten(1))

    def forward(self, x):
        return self.head(F.relu(self.features(x)))


def damage(x, g):
    """Return x (B, C, S, S) in [-1, 1], turned and damaged at random, and how (B,)."""
    turn, kind = (torch.randint(0, n, (len(x),), generator=g) for n in (4, 5))
    much = torch.rand(len(x), 1, 1, 1, generator=g) * 0.8 + 0.2
    x = torch.stack([y.rot90(int(k), (1, 2)) for y, k in zip(x, turn, strict=True)])
    soft = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    noise = torch.randn(x.shape, generator=g)
    half = x.shape[-1] // 2
    ways = [
        x,
        x.lerp(soft, much),
        (x + much / 2 * noise).clamp(-1, 1),
        x.roll((half, half), (2, 3)),
        x.flip(1) if x.shape[1] > 1 else -x,
    ]
    return torch.stack(ways)[kind, torch.arange(len(x))], 5 * turn + kind


def task(images, labels, index, g):
    """Return what the net sees of images[index], and the classes it must tell apart."""
    x = images[index] / 127.5 - 1
    return damage(x, g) if labels is None else (x, labels[index])


@torch.random.fork_rng([])  # the caller's random numbers stay as they are
def train_net(images, labels):
    """Return a Net that tells the labels of images, or for None their damage."""
    classes, g = 20 if labels is None else int(labels.max()) + 1, rng("cpu", 0, 8)
    steps, threads = min(STEPS, EPOCHS * len(images) // 64 + 1), torch.get_num_threads()
    torch.manual_seed(0)
    net = Net(images.shape[1], 64 if labels is None else 84, classes)
    opt = torch.optim.AdamW(net.parameters(), 3e-3)
    fall = torch.optim.lr_scheduler.LinearLR(opt, 1, 0.01, steps)
    torch.set_num_threads(1)  # sums in one order: the same net every time
    with torch.enable_grad():
        for _ in range(steps):
            index = torch.randint(0, len(images), (64,), generator=g)
            x, y = task(images, labels, index, g)
            loss = F.cross_entropy(net(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            fall.step()
    torch.set_num_threads(threads)
    return net.requires_grad_(False)


class Measures:
    """Distances of drawn images to the training images, by a fixed protocol.

    train, held: uint8 (N, C, S, S); labels, held_labels: int64 (N,), or None. n images
    are compared, but never more than are held out. floor: the distances of the first n
    held-out images; accuracy: share of held-out images that the net gets right. Raises
    ValueError for what it cannot measure.
    """

    def __init__(self, train, held, labels=None, held_labels=None, n=1000):
        self.n = n = min(n, len(held), len(train))
        if n < 16:
            raise ValueError(f"{n} images are too few to measure distances: 16 or more")
        self.shape = tuple(train.shape[1:])
        self.check(train)
        self.check(held)
        pick = torch.randperm(len(train), generator=rng("cpu", 0, 7))[:REAL]
        self.net = train_net(train, labels)
        real = train[pick]
        flat = real.flatten(1).numpy() / np.float32(127.5) - 1
        few = min(64, flat.shape[1] // 4, len(flat))
        self.pca = PCA(few, random_state=0).fit(flat)
        found = self.features(real)
        self.scale = {name: (x**2).mean() ** 0.5 for name, x in found.items()}
        self.real = self.scaled(found)
        self.alone = {name: likeness(x) for name, x in self.real.items()}
        self.patches = patches(real[:n].numpy())
        x, y = task(held, held_labels, torch.arange(len(held)), rng("cpu", 0, 9))
        self.accuracy = (self.net(x).argmax(1) == y).float().mean().item()
        self.floor = self.distances(held)

    def check(self, images):
        """Raise ValueError unless images are n or more, uint8, of the right shape."""
        kind, shape, wanted = images.dtype, tuple(images.shape), (self.n, *self.shape)
        if len(shape) != 4 or shape[1:] != self.shape or shape[0] < self.n:
            raise ValueError(f"{shape} are not as many images as {wanted}")
        if kind != torch.uint8:
            raise ValueError(f"images are {kind}, not torch.uint8")

    @torch.no_grad()
    def features(self, images):
        """Return the features of uint8 images, {name: float64 (N, features)}."""
        x = images / 127.5 - 1
        net = torch.cat([self.net.features(part) for part in x.split(500)])
        pca = self.pca.transform(x.flatten(1).numpy())
        return {"pca": pca.astype(np.float64), "net": net.double().numpy()}

    def scaled(self, features):
        return {name: x / self.scale[name] for name, x in features.items()}

    def log_ratios(self, drawn):
        """Return {measure: log of the Frechet distance over its floor} of uint8 images.

        As many as there are, also more than are held out; 0 is as good as real.
        """
        far = {}
        for name, own in self.scaled(self.features(drawn)).items():
            floor = frechet_floor(self.real[name], len(drawn))
            far[f"log frechet {name}"] = float(
                np.log(frechet(own, self.real[name]) / floor)
            )
        return far

    def distances(self, drawn):
        """Return {measure: distance} of the first n of drawn, uint8 (N, C, S, S)."""
        self.check(drawn)
        drawn, far = drawn[: self.n].cpu(), {}
        for name, own in self.scaled(self.features(drawn)).items():
            real, alone = self.real[name], self.alone[name]
            far[f"frechet {name}"] = float(frechet(own, real))
            far[f"kernel {name}"] = float(kernel(own, real, alone))
        drawn = patches(drawn.numpy())
        return far | {"sliced wasserstein": sliced_wasserstein(drawn, self.patches)}


def draw(ddpm, n, steps=50, seed=0):
    """Return n images by DDIM, uint8 (n, C, S, S); one seed is one x_T for all."""
    ddpm = ddpm.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    xt = torch.randn(n, *ddpm.shape, generator=torch.Generator().manual_seed(seed))
    parts = xt.to(ddpm.beta.device).split(250)
    x0 = torch.cat([ddpm.sample(part.shape, steps, xt=part) for part in parts])
    return ((x0 + 1) * 127.5).round().byte().cpu()


def load_labels(data):
    """Return the labels of digits or a prepared folder, (N,) twice, or None twice."""
    try:
        return superguide.load_labels(superguide.Config(data=data))
    except ValueError:
        return None, None


def script_of(path):
    """Return the script that wrote a checkpoint, as a module.  ValueError: none did."""
    try:
        script = torch.load(path, map_location="cpu", weights_only=True)["script"]
    except Exception as error:  # torch.load raises nearly anything on a foreign file
        raise ValueError(f"{path} is no checkpoint: {error}") from None
    if not (ROOT / f"{script}.py").exists():
        raise ValueError(f"{path} was written by {script}.py, which is not here")
    return importlib.import_module(script)


def main(path: tyro.conf.Positional[str], n: int = 1000, data: str = ""):
    """Measure what a checkpoint draws.

    Args:
        path: the checkpoint, of any script that draws images
        n: images that are compared, at most as many as are held out
        data: where the training data are now (empty: where they were)
    """
    script = script_of(path)
    cfg = script.read_checkpoint(path)["config"]
    cfg = replace(cfg, data=data or cfg.data)
    train, held = script.load_images(cfg)
    labels, held_labels = load_labels(cfg.data)
    measures = Measures(train, held, labels, held_labels, n)
    columns = {"held-out": measures.floor}
    for name, ema in (("drawn, averaged", True), ("drawn, raw", False)):
        drawn = draw(script.load(path, ema), measures.n)
        columns[name] = measures.distances(drawn)
    real, net = len(measures.real["pca"]), "damage" if labels is None else "labels"
    size = " x ".join(map(str, measures.shape))
    print(f"{measures.n} images, {cfg.data} {size}, drawn by DDIM with 50 steps")
    print(f"against {real} training images; sliced Wasserstein: against {measures.n}")
    print(f"net: tells the {net} of {measures.accuracy:.1%} of held-out images\n")
    print(f"{'':20}" + "".join(f"{name:>18}" for name in columns))
    for name in measures.floor:
        print(f"{name:20}" + "".join(f"{x[name]:18.4g}" for x in columns.values()))


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (ValueError, OSError) as error:
        sys.exit(f"measures.py: {error}")
