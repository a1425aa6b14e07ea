"""Draw the walk from noise to digits of a run of superminddpm.py as a moving picture.

    python superminddpm.py
    python benchmarks/walk.py runs/superminddpm-digits/last.pt

Writes results/walk.webp, an animation that repeats. The upper row shows x_t, where the
walk is, and the lower row x0_hat, the cleaned images at that moment. There is a frame
before each step of DDIM. The last frame, which stays for two seconds, has the finished
digits in both rows.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import tyro
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from superminddpm import load, rng

RESULT = Path(__file__).parent / "results" / "walk.webp"


@torch.no_grad()
def walk(ddpm, xt, steps):
    """Return x_t and x0_hat before each DDIM step, then the finished images twice."""
    frames, times = [], torch.linspace(ddpm.T, 0, steps + 1).round().long()
    for t, s in zip(times[:-1], times[1:], strict=True):
        t, s = t.expand(len(xt)), s.expand(len(xt))
        frames.append((xt, ddpm.predict(xt, t)[0]))
        xt = ddpm.p_sample(xt, t, s, 0.0, 0.0)
    return [*frames, (xt.clamp(-1, 1),) * 2]


def picture(xt, x0_hat):
    """Return a PIL picture of x_t above x0_hat, both (N, C, S, S), enlarged 7 times."""
    images = (torch.cat([xt, x0_hat]).clamp(-1, 1) + 1) / 2
    grid = make_grid(images, len(xt), padding=1)
    return to_pil_image(grid.repeat_interleave(7, 1).repeat_interleave(7, 2))


def main(checkpoint: tyro.conf.Positional[Path], out: Path = RESULT):
    """Draw the walk of a checkpoint, such as last.pt, into out."""
    ddpm = load(checkpoint)
    noise = torch.randn(10, *ddpm.shape, generator=rng("cpu", 0, 3))
    first, *rest = [picture(*pair) for pair in walk(ddpm, noise, 40)]
    times = [100] * len(rest) + [2000]  # milliseconds
    options = {"duration": times, "loop": 0, "lossless": True, "method": 6}
    first.save(out, save_all=True, append_images=rest, **options)
    print(f"{out}: {len(times)} frames, {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (ValueError, OSError) as error:
        sys.exit(f"walk.py: {error}")
