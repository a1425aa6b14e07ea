"""Which loss is good? What anyone could know at each noise level, and what a run does.

    python benchmarks/gauge.py runs/superminddpm-digits
    python benchmarks/gauge.py runs/one runs/two --figure gauge.png

A loss says little on its own: nobody can tell all of the noise from the image. So the
held-out loss of the averaged weights stands between two answers that are known in
closed form from the training images, at the same ten noise levels:

 - linear: the best linear denoiser, from their mean and covariance (a Wiener filter in
   their principal components). A network that is not below it has learned nothing else.
 - exact: the best denoiser of all for the training images and no others, their average
   weighted by how well each explains x_t (a softmax over them). On the training images
   its loss is the least possible, but it can only copy: on held-out images it fails
   where there is little noise.

And eps_hat = x_t, "all of it is noise", is where the base starts. A run that is on
training images far below its loss on held-out ones has begun to copy.

What depends on noise is the mean of --draws draws, the same for all rows. Schedule and
data are those of the runs, so runs with others have a table of their own. Both answers
are for white noise: clips of supervideo.py have it under --noise independent only.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from curves import STYLES
from measures import script_of

from superminddpm import rng

HEAD = "loss * 1000 at t ="


def flat(images):
    """Return uint8 images (N, ...) as rows (N, D) in [-1, 1], float32."""
    return images.flatten(1) / 127.5 - 1


def principal(x):
    """Return mean (D,), variances (D,) and directions (D, D) of rows x, float64."""
    mean, total = x.mean(0, dtype=torch.float64), 0.0
    for part in x.split(4096):
        total = total + (part - mean).T @ (part - mean)
    values, vectors = torch.linalg.eigh(total / (len(x) - 1))
    return mean, values.clamp(min=0), vectors


def linear_loss(parts, y, ab):
    """Return the expected loss of the best linear denoiser on rows y, from principal().

    Per direction x0_hat = mean + keep (x_t / sqrt(abar) - mean), keep the share of the
    variance of x_t that is the image's.
    """
    mean, values, vectors = parts
    power = ((y - mean) @ vectors).square().mean(0)
    keep = ab * values / (ab * values + 1 - ab)
    error = (1 - keep).square() * power + keep.square() * (1 - ab) / ab
    return (ab / (1 - ab) * error.mean()).item()


def exact_x0(xt, x, ab):
    """Return E[x_0 | x_t] if x_0 is one of the rows of x, each as likely; (B, D)."""
    norm, top, total = x.square().sum(1), None, None
    for part, own in zip(x.split(8192), norm.split(8192), strict=True):
        fit = (ab.sqrt() * xt @ part.T - ab / 2 * own) / (1 - ab)  # log-likelihood + c
        new = fit.max(1, keepdim=True).values
        new = new if top is None else torch.maximum(new, top)
        weight = (fit - new).exp()
        found = torch.cat([weight @ part, weight.sum(1, keepdim=True)], 1)
        total = found if top is None else total * (top - new).exp() + found
        top = new
    return total[:, :-1] / total[:, -1:]


def noise(y, level, k):
    """Return draw k of the noise at a level for rows y."""
    return torch.randn(y.shape, generator=rng("cpu", level, k, 13))


def exact_loss(x, y, ab, level, draws):
    """Return the loss of the exact denoiser of rows x on rows y, a mean over draws."""
    found = []
    for k in range(draws):
        xt = ab.sqrt() * y + (1 - ab).sqrt() * noise(y, level, k).to(y)
        # the error of eps_hat is that of x0_hat times abar / (1 - abar)
        error = torch.cat([exact_x0(part, x, ab) for part in xt.split(256)]) - y
        found.append((ab / (1 - ab) * error.square().mean()).item())
    return float(np.mean(found))


@torch.no_grad()
def net_loss(ddpm, images, level, draws):
    """Return the loss of a DDPM on uint8 images at one level, a mean over draws."""
    x0, found = images / 127.5 - 1, []
    t = torch.full((len(x0),), level)
    for k in range(draws):
        eps = noise(x0.flatten(1), level, k).view(x0.shape)
        parts = (x.to(ddpm.beta.device).split(256) for x in (x0, t, eps))
        errors = (len(x[0]) * ddpm(*x).item() for x in zip(*parts, strict=True))
        found.append(sum(errors) / len(x0))
    return float(np.mean(found))


@torch.no_grad()
def nats(ddpm, images, n=100):
    """Return a bound on the negative log-likelihood of uint8 images, nats a dimension.

    Up to a constant, and without what happens at t = 1: half the integral over log-SNR
    of the error of eps_hat (Kingma et al. 2021, arXiv:2107.00630), by n values of t,
    about equally far apart in log-SNR, each with one draw of the noise.
    """
    logsnr = ddpm.alphabar.cpu().double().logit()  # infinite at 0
    even = torch.linspace(logsnr[ddpm.T], logsnr[2], n)
    ts = (ddpm.T - torch.searchsorted(logsnr.flip(0), even)).clamp(2).unique()
    loss = torch.tensor([net_loss(ddpm, images, t, 1) for t in ts.tolist()])
    return (-torch.trapezoid(loss.double(), logsnr[ts]) / 2).item()


def references(images, held, alphabar, levels, draws=8):
    """Return {answer: [loss at each level]} of the answers that need no training."""
    where = "cuda" if torch.cuda.is_available() else "cpu"  # others lack float64
    x, y = flat(images).to(where), flat(held).to(where)
    seen, parts = x[: len(y)], principal(x)
    table = {"eps_hat = x_t": [], "linear": [], "exact, held out": []}
    table["exact, training images"] = []
    for level in levels:
        ab = alphabar[level]
        trivial = ab * y.square().mean() + ((1 - ab).sqrt() - 1) ** 2
        exact = [exact_loss(x, z, ab, level, draws) for z in (y, seen)]
        row = [trivial.item(), linear_loss(parts, y.double(), ab.double()), *exact]
        for name, value in zip(table, row, strict=True):
            table[name].append(value)
    return table


def gauge(runs, draws=8):
    """Return the noise levels and {answer or run: [loss at each level]}."""
    table, first, levels = {}, None, None
    for run in runs:
        path = Path(run, "last.pt")
        script = script_of(path)
        ddpm, cfg = script.load(path), script.read_checkpoint(path)["config"]
        images, held = script.load_images(cfg)
        if getattr(ddpm, "correlation", 0):
            raise ValueError(f"{run}: its frames share noise; this is for white noise")
        own = {"schedule": ddpm.alphabar, "images": images, "held-out images": held}
        first = first or own
        if other := [x for x in own if not torch.equal(own[x], first[x])]:
            why = f"{run} differs in its {', '.join(other)}"
            raise ValueError(f"{why}: give it a table of its own")
        if not table:
            levels = [round((k + 0.5) * ddpm.T / 10) for k in range(10)]
            table = references(images, held, ddpm.alphabar, levels, draws)
        for name, part in ((run, held), (f"{run}, training images", images)):
            part = part[: len(held)]
            table[name] = [net_loss(ddpm, part, level, draws) for level in levels]
    return levels, table


def read(path):
    """Return what gauge() returned, from a file of what was printed; losses * 1000."""
    rows = (HEAD + Path(path).read_text().split(HEAD)[1]).splitlines()
    table = {row[:40].strip(): np.array(row[40:].split(), float) for row in rows}
    return table.pop(HEAD).astype(int), table


def draw(levels, table):
    """Return a figure: by noise level, each loss over that of the linear denoiser."""
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    axes, base = figure.subplots(), np.array(table["linear"])
    for k, (name, row) in enumerate(table.items()):
        colour, dashes = STYLES[k % len(STYLES)]
        row = np.array(row) / base
        axes.plot(levels, row, color=colour, ls=dashes, marker="o", ms=4, label=name)
    axes.set(xlabel="noise level t", ylabel="loss / loss of the best linear denoiser")
    axes.set(yscale="log", ylim=(0.1, 20))
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper")
    return figure


def main(runs: tyro.conf.Positional[tuple[str, ...]], draws: int = 8, figure: str = ""):
    """Print the losses of runs beside what could be known, in 1/1000.

    Args:
        runs: folders of runs on the same data
        draws: draws of the noise that are averaged
        figure: file to draw them into, each over that of the linear denoiser
    """
    if not runs or draws < 1:
        raise ValueError(
            "name the folder of a run, or of several; --draws is 1 or more"
        )
    levels, table = gauge(runs, draws)
    print(f"{HEAD:40}" + "".join(f"{t:9}" for t in levels))
    for name, row in table.items():
        print(f"{name:40}" + "".join(f"{1000 * x:9.3g}" for x in row))
    if figure:
        draw(levels, table).savefig(figure, dpi=110)


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (ValueError, OSError) as error:
        sys.exit(f"gauge.py: {error}")
