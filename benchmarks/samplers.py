"""How good are the digits for how many network calls?

    python superminddpm.py
    python benchmarks/samplers.py runs/superminddpm-digits/last.pt

Takes a checkpoint that supersample.py can sample. For each sampler and each number of
calls draws 360 digits from the same noise and scores them as benchmarks/quality.py
does: their Frechet distance to the training digits over that of the real held-out ones
(1 is as good as real), and a classifier's mean top probability. One noise seed;
`--seeds 3` shows how much of it is chance, as the range. Writes samplers.txt and
samplers.png into benchmarks/results.
"""

import itertools
import sys
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from quality import score, train_judge

import supersample

CALLS = (5, 10, 20, 50, 100, 250, 1000)
WAYS = {  # sampler, variance, spacing; a line of the picture each
    "ddpm, beta": ("ddpm", "beta", "trailing", "o:", "#D55E00"),
    "ddpm, beta-tilde": ("ddpm", "beta-tilde", "trailing", "s:", "#E69F00"),
    "ddim": ("ddim", "beta", "trailing", "o-", "#0072B2"),
    "heun": ("heun", "beta", "trailing", "^-", "#009E73"),
    "dpmpp": ("dpmpp", "beta", "trailing", "v-", "#CC79A7"),
    "ddim, quadratic": ("ddim", "beta", "quadratic", "o--", "#0072B2"),
    "heun, quadratic": ("heun", "beta", "quadratic", "^--", "#009E73"),
    "dpmpp, quadratic": ("dpmpp", "beta", "quadratic", "v--", "#CC79A7"),
}
FRECHET, TOP = "Frechet distance / floor", "judge: top probability, drawn"


def cell(runs, key):
    """Return a score of some runs as text, a range where they differ."""
    values = [scores[key] for scores in runs]
    low, high = min(values, default=0), max(values, default=0)
    return "" if not runs else f"{low:.2f}" if high == low else f"{low:.2f}-{high:.2f}"


def report(table, command):
    """Write table, {(way, calls): list of scores}, as text and as a picture."""
    lines = [command]
    for key in (FRECHET, TOP):
        lines += ["", f"{key:32}" + "".join(f"{calls:>11}" for calls in CALLS)]
        for name in WAYS:
            cells = (cell(table.get((name, calls), []), key) for calls in CALLS)
            lines.append(f"{name:32}" + "".join(f"{text:>11}" for text in cells))
    results = Path(__file__).parent / "results"
    (results / "samplers.txt").write_text("\n".join(lines) + "\n")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, (*_, line, color) in WAYS.items():
        x = [calls for calls in CALLS if (name, calls) in table]
        runs = [[scores[FRECHET] for scores in table[name, calls]] for calls in x]
        y = [sum(values) / len(values) for values in runs]
        axes.plot(x, y, line, color=color, label=name)
        low, high = [*map(min, runs)], [*map(max, runs)]
        axes.fill_between(x, low, high, color=color, alpha=0.15)
    axes.axhline(1, color="grey", lw=1)
    axes.set(xscale="log", yscale="log", xlabel="network calls")
    axes.set_xticks(CALLS, CALLS)
    axes.set_ylabel("Frechet distance to digits, over that of real ones")
    figure.legend(loc="outside right")
    figure.savefig(results / "samplers.png", dpi=110)
    return lines


def main(path: tyro.conf.Positional[str], seeds: int = 1):
    ddpm = supersample.load(path)
    images, labels, held, held_labels = supersample.load_images(supersample.Config())
    images, held = images / 127.5 - 1, held / 127.5 - 1
    judge, table = train_judge(images, labels), {}
    for calls, (name, way) in itertools.product(CALLS, WAYS.items()):
        sampler, ddpm.variance, ddpm.spacing, *_ = way
        if calls == 1000 and ddpm.spacing != "trailing":
            continue  # T calls leave no choice
        for seed in range(seeds):
            g = torch.Generator().manual_seed(seed)
            drawn = ddpm.sample((360, *ddpm.shape), calls, sampler, generator=g)
            drawn = ((drawn + 1) * 127.5).round() / 127.5 - 1
            scores = score(drawn, images, held, held_labels, judge)
            table.setdefault((name, calls), []).append(scores)
        lines = report(table, f"python benchmarks/samplers.py {path} --seeds {seeds}")
    print("\n".join(lines))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
