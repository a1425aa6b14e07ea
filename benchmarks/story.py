"""Draw the story of a run of supersparse.py: stages, noise, channels, pictures.

    python supersparse.py
    python benchmarks/story.py runs/supersparse-digits

Writes story.png into the run folder. Above, over the steps of the run: the noise levels
that a stage trains on, and the channels that are active. Below, for the end of each
stage: a real image at the least noise of that stage, and what the network of that
moment, with its averaged weights, makes of pure noise by then. DDIM leads it from t = T
down to the lower edge of the stage and no further, since the network has not been
trained below it; what is shown is x0_hat there. A stage that ends in the same epoch as
the next has left no checkpoint, so in a very short run its place stays empty.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import tyro
from matplotlib.figure import Figure
from torchvision.utils import make_grid

import supersparse

BLUE, SKY, ORANGE = "#0072B2", "#56B4E9", "#D55E00"


def stages(script, run):
    """Return (first step, end, least t, checkpoint of the end) of each stage of a run.

    A checkpoint is kept for each epoch in which a stage ends, so of two stages that end
    in one epoch only the second has one; the other's is None.
    """
    last, kept = script.read_checkpoint(Path(run, "last.pt")), {}
    for path in Path(run).glob("checkpoint_epoch_*.pt"):
        kept[script.read_checkpoint(path)["step"]] = path
    p = script.stage_density(last["config"], script.load(Path(run, "last.pt")).alphabar)
    lows = [int(row.nonzero()[0]) + 1 for row in p]
    ends = [*last["starts"][1:], last["step"]]
    each = zip(last["starts"], ends, lows, strict=True)
    return [(start, end, low, kept.get(end)) for start, end, low in each]


@torch.no_grad()
def picture(ddpm, low, xt):
    """Return x0_hat at t = low, where DDIM has led xt from t = T."""
    times = torch.linspace(ddpm.T, low, 26).round().long()
    for t, s in zip(times[:-1], times[1:], strict=True):
        xt = ddpm.p_sample(xt, t.expand(len(xt)), s.expand(len(xt)), 0, 0)
    return ddpm.predict(xt, times[-1:].expand(len(xt)))[0]


def show(axes, images, title):
    """Show images (N, C, S, S) in [-1, 1] as a square of tiles."""
    grid = make_grid((images + 1) / 2, nrow=round(len(images) ** 0.5), pad_value=1)
    axes.imshow(grid.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()


def main(run: tyro.conf.Positional[Path]):
    """Draw the story of run, a folder that supersparse.py wrote."""
    told = stages(supersparse, run)
    last = supersparse.read_checkpoint(run / "last.pt")
    ddpm, total = supersparse.load(run / "last.pt"), last["step"]
    with open(run / "metrics.csv") as f:
        active = {int(x["stage"]): int(x["active_channels"]) for x in csv.DictReader(f)}

    figure = Figure(figsize=(11, 7), layout="constrained")
    grid = figure.add_gridspec(3, len(told), height_ratios=(1.5, 1, 1))
    axes = figure.add_subplot(grid[0, :])
    axes.set(xlim=(0, total), ylim=(0, ddpm.T), xlabel="step")
    axes.set_ylabel("noise levels t in training", color=BLUE)
    right = axes.twinx()
    right.set_ylim(0, len(ddpm.net.channel_mask) * 1.1)
    right.set_ylabel("active bottleneck channels", color=ORANGE)
    held = supersparse.load_images(last["config"])[1][:9] / 127.5 - 1
    noise = torch.randn(9, *ddpm.shape, generator=supersparse.rng("cpu", 0, 1))
    for k, (start, end, low, path) in enumerate(told):
        tint = BLUE if k % 2 else SKY
        axes.fill_between([start, end], low, ddpm.T, color=tint, alpha=0.5, lw=0)
        snr = ddpm.alphabar[low].logit().exp()
        text, at = f"stage {k}\nSNR to\n{snr:.2g}", ((start + end) / 2, ddpm.T * 1.02)
        axes.text(*at, text, ha="center", va="bottom", fontsize=9)
        right.hlines(active[k], start, end, color=ORANGE, lw=3)
        right.text(end, active[k] + 0.5, f"{active[k]} ", color=ORANGE, ha="right")
        real = ddpm.q_sample(held, torch.full((9,), low), noise).clamp(-1, 1)
        show(figure.add_subplot(grid[1, k]), real, f"real, t = {low}")
        if path:
            drawn = picture(supersparse.load(path), low, noise)
            show(figure.add_subplot(grid[2, k]), drawn, f"drawn down to t = {low}")
    figure.savefig(run / "story.png", dpi=110)
    print(run / "story.png")


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (ValueError, OSError) as error:
        sys.exit(f"story.py: {error}")
