"""Whom does a network resemble? A copier, a Gaussian, a patch machine; from one noise.

    python benchmarks/artists.py        everything; about 10 minutes of one core

Machines are denoisers in closed form, made of the 1,438 training digits: they map x_t
to x0_hat and need no training. They and the networks make samples from the same noise,
by the same 20 steps of DDIM, and answer to the same noisy held-out digits.

 - copier: the exact denoiser, a softmax over the training digits
 - Gaussian: the best linear denoiser, from their mean and covariance
 - patch p: what a pixel is, given only the p x p patch of x_t around it and its place:
   the local score machine (LS) of Kamb and Ganguli 2025 (arXiv:2412.20292)
 - anywhere p: the same, but patches may come from any place that the border cuts in the
   same way: their equivariant machine (ELS)
 - calibrated: patch, for each network with the p that fits its x0_hat best at each t

Networks: three of superarch.py; "5x5", a resnet in which a pixel depends on the 5 x 5
pixels around it and on nothing else; and two that were trained on digits whose pixels
are all permuted in one and the same way (Lukoianov et al. 2025, arXiv:2509.09672). For
these, "patch p, permuted" looks at neighbours in the permuted image, as the network's
convolutions do. All else is compared after the permutation is undone.

r2 is 1 - |network - machine|^2 / |network - mean digit|^2 for each image: 1 if they are
equal, 0 if the machine is no better than the mean digit. sens is the rms of the
derivatives of x0_hat by x_t, (level, pixel of x0_hat, pixel of x_t).

notebooks/predictions.md says what was expected before the first run. artists.txt is the
table, artists.npz has the r2 and some of the samples for lesson 17.
"""

import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import tyro
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from gauge import exact_x0, flat, noise, principal

import superarch
from superarch import DDPM, Config, load_images, rng

SIDE, N, STEPS = 8, 100, 600
SIZES = (1, 3, 5, 7, 9, 11, 13)
LEVELS = tuple(range(50, 1000, 100))
SENSED = (150, 350, 550, 750)
# (arch, whether its pixels are permuted)
ARMS = {
    "base": ("base", False),
    "resnet": ("resnet", False),
    "attention": ("attention", False),
    "5x5": ("5x5", False),
    "base, permuted": ("base", True),
    "resnet, permuted": ("resnet", True),
}
ORDER = torch.randperm(SIDE**2, generator=rng("cpu", 0, 17))  # the permutation
BACK = ORDER.argsort()


# ---- Machines: x_t (B, 64) and abar to x0_hat (B, 64) --------------------------------
def gaussian_x0(xt, parts, ab):
    """Return E[x_0 | x_t] if x_0 is Gaussian, from principal(); (B, D)."""
    mean, values, vectors = (part.to(xt) for part in parts)
    keep = ab.sqrt() * values / (ab * values + 1 - ab)
    return mean + (xt - ab.sqrt() * mean) @ vectors * keep @ vectors.T


def patches(p, side=SIDE):
    """Return {cut: [(pixel, pixels of the p x p patch around it)]}, p odd.

    The image ends at its border, which cuts some patches. The cut says at which of
    their p x p places those have pixels.
    """
    found = defaultdict(list)
    for i in range(side):
        for j in range(side):
            square = [
                (i + a, j + b)
                for a in range(-(p // 2), p // 2 + 1)
                for b in range(-(p // 2), p // 2 + 1)
            ]
            cut = tuple(0 <= a < side and 0 <= b < side for a, b in square)
            inside = [a * side + b for (a, b), c in zip(square, cut, strict=True) if c]
            found[cut].append((i * side + j, inside))
    return found


def patch_x0(xt, x, ab, p, anywhere=False):
    """Return for each pixel its mean given the p x p patch of x_t around it; (B, 64).

    x: the training images as rows. Their patches are from the same place, or from
    anywhere with the same cut. It is the exact denoiser of the patches, of whose answer
    only the pixel in the middle is kept.
    """
    x0 = torch.empty_like(xt)
    for places in patches(p).values():
        pixels, inside = (torch.tensor(part) for part in zip(*places, strict=True))
        middle = (inside[0] == pixels[0]).nonzero().item()
        if anywhere:
            every = x[:, inside].flatten(0, 1)
            found = exact_x0(xt[:, inside].flatten(0, 1), every, ab)
            x0[:, pixels] = found[:, middle].view(len(xt), -1)
        else:
            for pixel, own in places:
                x0[:, pixel] = exact_x0(xt[:, own], x[:, own], ab)[:, middle]
    return x0


def permuted(machine):
    """Return a machine that does in permuted pixels what machine does."""
    return lambda xt, ab: machine(xt[:, ORDER], ab)[:, BACK]


def artist(machine):
    """Return a DDPM that answers with x0_hat = machine(x_t, abar)."""
    ddpm = DDPM(None)

    def eps_hat(xt, t):
        ab = ddpm.alphabar[t[0]]
        x0 = machine(xt.flatten(1), ab).view(xt.shape)
        return (xt - ab.sqrt() * x0) / (1 - ab).sqrt()

    ddpm.eps_hat = eps_hat
    return ddpm


def machines(x):
    """Return {name: machine} of the training images x, rows."""
    parts = principal(x)
    made = {
        "copier": lambda xt, ab: exact_x0(xt, x, ab),
        "Gaussian": lambda xt, ab: gaussian_x0(xt, parts, ab),
    }
    for p in SIZES:
        made[f"patch {p}"] = lambda xt, ab, p=p: patch_x0(xt, x, ab, p)
    for p in SIZES[1:4]:  # from 9 on no two patches have the same cut
        made[f"anywhere {p}"] = lambda xt, ab, p=p: patch_x0(xt, x, ab, p, True)
    own = x[:, ORDER]
    for p in SIZES:
        one = permuted(lambda xt, ab, p=p: patch_x0(xt, own, ab, p))
        made[f"patch {p}, permuted"] = one
    return made


# ---- Networks ------------------------------------------------------------------------
class PixelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel: no pixel knows of the others."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def localize(net, p):
    """Make x0_hat of a resnet depend on p x p pixels; later convolutions are 1 x 1."""
    convs = 0
    for name, old in [*net.named_modules()]:
        place, _, leaf = name.rpartition(".")
        if isinstance(old, nn.GroupNorm):
            new = PixelNorm(old.num_channels)
            setattr(net.get_submodule(place), leaf, new)
        elif isinstance(old, nn.Conv2d):
            convs += 1
            if convs > p // 2:
                new = nn.Conv2d(old.in_channels, old.out_channels, 1)
                setattr(net.get_submodule(place), leaf, new)
    nn.init.zeros_(net.out.weight)
    nn.init.zeros_(net.out.bias)


build = superarch.build  # train() puts make() in its place


def make(cfg, arch):
    """Return a new DDPM; arch: one of superarch.py, or "5x5" and the like."""
    ddpm = build(cfg, (1, SIDE, SIDE))
    if "x" in arch:
        localize(ddpm.net, int(arch.split("x")[0]))
    return ddpm


def train(arch, seed=0, steps=STEPS, permute=False):
    """Return a DDPM trained by superarch.py on the digits, permuted or not."""
    options = {"arch": "resnet" if "x" in arch else arch, "steps": steps}
    options |= {"seed": seed, "every": 10**6, "quiet": True}
    with tempfile.TemporaryDirectory() as folder:
        for name, part in zip(("train", "held"), load_images(Config()), strict=True):
            rows = part.flatten(1)[:, ORDER] if permute else part
            np.save(f"{folder}/{name}.npy", rows.view(part.shape).numpy())
        cfg = Config(data=folder, out=f"{folder}/run", **options)
        with (
            mock.patch.object(superarch, "build", lambda cfg, shape: make(cfg, arch)),
            mock.patch.object(superarch, "save_grid"),
        ):
            ddpm = superarch.train(cfg)
    return ddpm.eval()


def x0_hat(ddpm, permute=False):
    """Return the machine that a DDPM is, without the clip; it may be differentiated."""

    def machine(xt, ab):
        t = (ddpm.alphabar - ab).abs().argmin().expand(len(xt))
        eps_hat = ddpm.eps_hat(xt.view(-1, 1, SIDE, SIDE), t).flatten(1)
        return (xt - (1 - ab).sqrt() * eps_hat) / ab.sqrt()

    return permuted(machine) if permute else machine


# ---- Measures ------------------------------------------------------------------------
def r2(net, machine, mean):
    """Return how much of each row of net a machine predicts, (..., N)."""
    return 1 - (net - machine).square().sum(-1) / (net - mean).square().sum(-1)


@torch.no_grad()
def draw(machine, n=N):
    """Return n samples (n, 64) of a machine in [-1, 1], always from the same noise."""
    ddpm = artist(machine)
    shape = n, 1, SIDE, SIDE
    return ddpm.sample(shape, 20, generator=rng("cpu", 0, 15)).flatten(1)


@torch.no_grad()
def answers(machine, y, levels=LEVELS):
    """Return x0_hat, clipped, of a machine for rows y at each level, (L, N, 64)."""
    table, found = DDPM(None).alphabar, []
    for level in levels:
        ab = table[level]
        xt = ab.sqrt() * y + (1 - ab).sqrt() * noise(y, level, 0)
        found.append(machine(xt, ab).clamp(-1, 1))
    return torch.stack(found)


def sensitivity(machine, y, levels=SENSED):
    """Return the rms of d x0_hat / d x_t over rows y, (L, 64 of x0_hat, 64 of x_t)."""
    table, found = DDPM(None).alphabar, []
    for level in levels:
        ab = table[level]
        xt = (ab.sqrt() * y + (1 - ab).sqrt() * noise(y, level, 0)).requires_grad_()
        out = machine(xt, ab).sum(0)
        grads = [torch.autograd.grad(one, xt, retain_graph=True)[0] for one in out]
        found.append(torch.stack(grads).square().mean(1).sqrt())
    return torch.stack(found)


def inside(sens, p):
    """Return the share of the squared sensitivity from the p x p patch, (L,)."""
    near = torch.zeros(SIDE**2, SIDE**2)
    for pixel, own in (place for places in patches(p).values() for place in places):
        near[pixel, own] = 1
    power = torch.as_tensor(sens).float().square()
    return (power * near).sum((-1, -2)) / power.sum((-1, -2))


def calibrated(fits, made):
    """Return a machine that has at each level the patch size with the best fit.

    fits: {p: (L,)}; made: {name: machine}.
    """
    table, sizes = DDPM(None).alphabar[list(LEVELS)], [*fits]
    best = torch.stack([*fits.values()]).argmax(0)

    def machine(xt, ab):
        k = (table - ab).abs().argmin()
        return made[f"patch {sizes[best[k]]}"](xt, ab)

    return machine


def spread(x):
    """Return the mean and the standard error over the first axis, as text."""
    x = np.asarray(x, float)
    return f"{x.mean():.2f} +- {x.std(ddof=1) / len(x) ** 0.5:.2f}"


def sens_row(name, sens):
    """Return a line: the share inside 5 x 5, and that of others inside 3 x 3."""
    others = sens * (1 - np.eye(SIDE**2, dtype=sens.dtype))
    parts = inside(sens, 5), inside(others, 3)
    cells = ["".join(f"{x:6.2f}" for x in part) for part in parts]
    return f"{name:42}{cells[0]}{'':18}{cells[1]}"


HEAD = f"""Made by benchmarks/artists.py in {{:.0f}} minutes of one core.
Networks: {STEPS} steps, 3 seeds. r2: mean over {N} images; mean and standard error
over seeds. * marks the best patch size of each kind. In the neighbours' share of sens
the pixel itself does not count."""


def report(kept):
    """Return the table of what main() keeps."""
    names, lines = [*kept["machines"]], [HEAD.format(kept["minutes"])]
    for arm, (_, permute) in ARMS.items():
        own, level = kept[f"{arm}: r2"].mean(-1), kept[f"{arm}: levels"]
        lines += ["", f"{arm:22}r2 of samples r2 of x0_hat at t ="]
        lines[-1] += "".join(f"{t:6}" for t in LEVELS)
        rows = {name: (own[:, k], level[:, k]) for k, name in enumerate(names)}
        best = {}
        for ending in ("", ", permuted"):
            sizes = [f"patch {p}{ending}" for p in SIZES]
            best[ending] = max(sizes, key=lambda name: rows[name][0].mean())
        for name, (whole, parts) in rows.items():
            if "permuted" in name and not permute:
                continue
            mark = "*" if name in best.values() else " "
            cells = "".join(f"{x:6.2f}" for x in parts.mean(0))
            lines.append(f"  {name:19}{mark}{spread(whole):33}{cells}")
        whole, parts = kept[f"{arm}: calibrated"].mean(-1), kept[f"{arm}: sizes"]
        cells = "".join(f"{p:6}" for p in parts)
        lines.append(f"  {'calibrated: p':20}{spread(whole):33}{cells}")
        lines.append(f"  {'another seed':20}{spread(kept[f'{arm}: seeds'].mean(-1))}")
        if permute:
            lines.append(
                f"  {'not permuted':20}{spread(kept[f'{arm}: twin'].mean(-1))}"
            )
    where = "".join(f"{t:6}" for t in SENSED)
    lines += [
        "",
        f"{'share of sens':28}in 5 x 5 at t ={where}   in 8 neighbours{where}",
    ]
    for arm in ["Gaussian", *ARMS]:
        lines.append(sens_row(arm, kept[f"{arm}: sens"]))
        if "permuted" in arm:
            own = kept[f"{arm}: sens"][:, ORDER][:, :, ORDER]
            lines.append(sens_row("  in permuted pixels", own))
    return "\n".join(lines) + "\n"


def main():
    torch.set_num_threads(1)
    start = time.process_time()
    images, held = load_images(Config())
    x, y = flat(images), flat(held)[:N]
    mean, made = x.mean(0), machines(x)
    drawn = {name: draw(machine) for name, machine in made.items()}
    seen = {name: answers(machine, y) for name, machine in made.items()}
    kept = {"machines": np.array([*made])}
    kept["Gaussian: sens"] = sensitivity(made["Gaussian"], y[:2]).half().numpy()
    own = {}
    for arm, (arch, permute) in ARMS.items():
        nets = [x0_hat(train(arch, k, permute=permute), permute) for k in range(3)]
        samples = own[arm] = torch.stack([draw(net) for net in nets])
        guess = torch.stack([answers(net, y) for net in nets])
        whole = torch.stack([r2(samples, drawn[name], mean) for name in made], 1)
        parts = torch.stack([r2(guess, seen[name], mean).mean(-1) for name in made], 1)
        kept |= {f"{arm}: r2": whole.numpy(), f"{arm}: levels": parts.numpy()}
        at = {name: k for k, name in enumerate(made)}
        fits = {p: parts[:, at[f"patch {p}"]].mean(0) for p in SIZES}
        again = draw(calibrated(fits, made))
        kept[f"{arm}: calibrated"] = r2(samples, again, mean).numpy()
        best = torch.stack([*fits.values()]).argmax(0)
        kept[f"{arm}: sizes"] = np.array(SIZES)[best]
        kept[f"{arm}: seeds"] = r2(samples, samples.roll(1, 0), mean).numpy()
        if permute:
            kept[f"{arm}: twin"] = r2(samples, own[arch], mean).numpy()
        sens = torch.stack([sensitivity(net, y[:20]) for net in nets])
        kept[f"{arm}: sens"] = sens.square().mean(0).sqrt().half().numpy()
        kept[f"{arm}: samples"] = ((samples[0, :10] + 1) * 127.5).byte().numpy()
        print(arm, f"{time.process_time() - start:.0f} s", flush=True)
    kept["minutes"] = (time.process_time() - start) / 60
    out = Path(__file__).parent / "results"
    np.savez_compressed(out / "artists.npz", **kept)
    (out / "artists.txt").write_text(report(kept))
    print(report(kept))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
