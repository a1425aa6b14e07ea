"""What should a network predict in a space much larger than the data?

    python benchmarks/large_space.py        54 short trainings: about 5 minutes

Li and He (2025, arXiv:2511.13720) argue that a network should predict the image: images
fill a small part of their space, but noise fills all of it, and so does v. Here the
digits are their first 16 principal components, which a fixed random orthonormal map
takes into a space of D dimensions, where they are noised. An MLP predicts x0, eps or v.
The loss is one and the same for all three, that of Min-SNR: min(SNR, 5) times the
squared error of x0_hat. D = 16, which they fill, is a control; so is a wide MLP.

Each run draws 718 points (DDIM, 50 steps, nothing clipped) and maps them back:

 - frechet: Frechet distance to the training digits over its floor (measures.py)
 - off: root mean square distance from the subspace of the digits, over that of the
   digits from 0. Pure noise of variance 1 has sqrt((D - 16) / 16): 2.65 for D = 128

Writes benchmarks/results/large_space.txt, a run a line.
"""

import sys
from pathlib import Path

import torch
import tyro
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from measures import frechet, frechet_floor

import superminddpm

KINDS = ("x0", "v", "eps")
SIZES = ((16, 64), (128, 64), (128, 512))  # D, and the width of the MLP
LOW, HIGH = 0.03, 1.45  # of the angle phi in training; SNR = 1 / tan(phi)^2


def load_points():
    """Return 16 principal components of the training digits, (1438, 16), and two more.

    Their mean square is 1. The two others are the map back to pixels in [-1, 1],
    mean (64,) + points @ basis (16, 64).
    """
    pixels = superminddpm.load_images(superminddpm.Config())[0].flatten(1) / 127.5 - 1
    mean = pixels.mean(0)
    axes = torch.linalg.svd(pixels - mean, full_matrices=False).Vh[:16]
    points = (pixels - mean) @ axes.T
    scale = points.square().mean().sqrt()
    return points / scale, mean, scale * axes


def embedding(D, seed):
    """Return a random map from 16 to D dimensions, (16, D) with orthonormal rows."""
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(D, 16, generator=g)).Q.T


class MLP(nn.Module):
    """Three hidden layers; sees x (B, D) and the angle phi (B, 1) as Fourier terms."""

    def __init__(self, D, width):
        super().__init__()
        sizes = [D + 16, width, width, width]
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        layers = [part for a, b in pairs for part in (nn.Linear(a, b), nn.ReLU())]
        self.body = nn.Sequential(*layers, nn.Linear(width, D))

    def forward(self, x, phi):
        angles = phi * torch.arange(1, 9)
        return self.body(torch.cat([x, angles.sin(), angles.cos()], 1))


def target(kind, x0, eps, phi):
    """Return what a network of this kind should predict."""
    return {"x0": x0, "eps": eps, "v": phi.cos() * eps - phi.sin() * x0}[kind]


def loss_of(kind, out, x0, eps, phi):
    """Return the loss of a prediction, min(SNR, 5) times the squared error of x0."""
    snr = 1 / phi.tan() ** 2
    per_x0 = {"x0": 1, "eps": snr, "v": snr + 1}[kind]  # its error for one of x0
    error = (out - target(kind, x0, eps, phi)).square()
    return (snr.clamp(max=5) / per_x0 * error).mean()


def train(kind, x, width, steps, seed, batch=128, lr=1e-3):
    """Return an MLP that predicts x0, eps or v of noisy rows of x (N, D)."""
    torch.manual_seed(seed)
    net = MLP(x.shape[1], width)
    opt = torch.optim.Adam(net.parameters(), lr, betas=(0.9, 0.99), fused=True)
    for step in range(steps):
        x0 = x[torch.randint(len(x), (batch,))]
        phi = LOW + (HIGH - LOW) * torch.rand(batch, 1)
        eps = torch.randn(x0.shape)
        out = net(phi.cos() * x0 + phi.sin() * eps, phi)
        loss = loss_of(kind, out, x0, eps, phi)
        opt.zero_grad()
        loss.backward()
        opt.step()
        opt.param_groups[0]["lr"] = lr * (1 - step / steps)
    return net


@torch.no_grad()
def draw(kind, net, xt, steps=50):
    """Return points (N, D) from the noise xt, by DDIM in equal steps of the angle."""
    times = torch.linspace(HIGH, 0, steps + 1)
    for phi, after in zip(times[:-1], times[1:], strict=True):
        c, s = phi.cos(), phi.sin()
        out = net(xt, phi.expand(len(xt), 1))
        x0 = {"x0": out, "eps": (xt - s * out) / c, "v": c * xt - s * out}[kind]
        xt = after.cos() * x0 + after.sin() * (xt - c * x0) / s
    return xt


def measure(drawn, points, rows):
    """Return the Frechet distance over its floor, and the distance off the subspace."""
    back, known = drawn @ rows.T, points.numpy()
    far = frechet(back.numpy(), known) / frechet_floor(known, len(back))
    off = (drawn - back @ rows).square().sum(1).mean() / points.square().sum(1).mean()
    return float(far), float(off.sqrt())


def run(kind, D, width, steps, seed):
    """Train one network and return what it draws (718, D), and its two measures."""
    points, rows = load_points()[0], embedding(D, seed)
    net = train(kind, points @ rows, width, steps, seed)
    g = torch.Generator().manual_seed(seed)
    drawn = draw(kind, net, torch.randn(718, D, generator=g))
    return drawn, measure(drawn, points, rows)


def main():
    torch.set_num_threads(1)
    lines = [
        "# python benchmarks/large_space.py",
        "# D width steps kind seed frechet off",
    ]
    for D, width in SIZES:
        for steps in (500, 2000):
            for kind in KINDS:
                for seed in range(3):
                    _, (far, off) = run(kind, D, width, steps, seed)
                    lines.append(
                        f"{D} {width} {steps} {kind} {seed} {far:.2f} {off:.3f}"
                    )
                    print(lines[-1], flush=True)
    file = ROOT / "benchmarks" / "results" / "large_space.txt"
    file.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
