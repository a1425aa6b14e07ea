"""Does a drawn digit show the label that was asked for, and what does that cost?

    python superguide.py
    python benchmarks/guidance.py runs/superguide-digits/last.pt

Takes a checkpoint of superguide.py. For each strength w draws 1000 digits by DDIM with
50 steps, 100 of each label, from the same noise for every w. Writes
benchmarks/results/guidance.txt.

 - agrees: share in which a classifier (that of benchmarks/quality.py, trained on real
   digits) sees the label that was asked for
 - variety: standard deviation of the pixels within a label, over that of real digits
 - Frechet / floor: as in benchmarks/quality.py, all labels together, in groups of 359
"""

import sys
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from quality import score, train_judge

import superguide

STRENGTHS = (0, 0.5, 1, 1.5, 2, 3, 5, 8)


def variety(images, labels):
    """Return the standard deviation within labels, root mean square over pixels."""
    parts = [images[labels == y].var(0).mean() for y in labels.unique()]
    return (sum(parts) / len(parts)).sqrt()


@torch.no_grad()
def main(path: tyro.conf.Positional[str]):
    """Score digits of each strength; path: a checkpoint of superguide.py."""
    torch.set_num_threads(1)
    ddpm, cfg = superguide.load(path), superguide.Config()
    images, held = (x / 127.5 - 1 for x in superguide.load_images(cfg))
    if ddpm.shape != images.shape[1:] or not hasattr(ddpm.net, "classes"):
        raise ValueError(f"{path} does not draw digits of 8x8 by their labels")
    labels, held_labels = superguide.load_labels(cfg)
    with torch.enable_grad():
        judge = train_judge(images, labels)
    right = (judge(held).argmax(1) == held_labels).float().mean()
    own = variety(held, held_labels) / variety(images, labels)
    far = score(held, images, held, held_labels, judge)["Frechet distance / floor"]
    lines = ["python superguide.py", f"python benchmarks/guidance.py {path}", ""]
    row = f"agrees {right:.3f}, variety {own:.2f}, Frechet / floor {far:.2f}"
    lines.append(f"real: {row} (held-out digits)")
    y, g = torch.arange(1000) % 10, torch.Generator().manual_seed(0)
    xt = torch.randn(len(y), *ddpm.shape, generator=g)
    for w in STRENGTHS:
        superguide.condition(ddpm, y, w)
        drawn = ((ddpm.sample(xt.shape, xt=xt) + 1) * 127.5).round() / 127.5 - 1
        agrees = (judge(drawn).argmax(1) == y).float().mean()
        spread = variety(drawn, y) / variety(images, labels)
        scores = score(drawn, images, held, held_labels, judge)
        far = scores["Frechet distance / floor"]
        row = f"agrees {agrees:.3f}, variety {spread:.2f}, Frechet / floor {far:.2f}"
        lines.append(f"w ={w:4}: {row}")
    text = "\n".join([*lines, ""])
    (Path(__file__).parent / "results" / "guidance.txt").write_text(text)
    print(text)


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (ValueError, OSError) as error:
        sys.exit(f"guidance.py: {error}")
