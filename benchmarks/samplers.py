"""How good are the digits for how many network evaluations?

    python superminddpm.py
    python benchmarks/samplers.py runs/superminddpm-digits/last.pt

Takes a checkpoint of any script, trained on digits. For each sampler and each number
of evaluations draws 360 digits, from the same noise for all, and scores them as
benchmarks/quality.py does: their Frechet distance to the training digits over its floor
(1 is as good as real), and a classifier's mean top probability.
Three noise seeds; the table has their mean and half their range. Writes samplers.jsonl,
samplers.txt and samplers.png into benchmarks/results.
"""

import itertools
import json
import sys
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from measures import load_labels
from quality import score, train_judge

import superminddpm as base
import supersample

RESULTS = Path(__file__).parent / "results"
CALLS = (5, 10, 20, 50, 100, 250, 1000)
WAYS = {  # sampler, eta, and a line of the picture
    "ddpm": ("ddpm", 1.0, "s:", "#E69F00"),
    "ddim": ("ddim", 0.0, "o-", "#0072B2"),
    "ddim, eta 0.5": ("ddim", 0.5, "o--", "#56B4E9"),
    "heun": ("heun", 0.0, "^-", "#009E73"),
    "dpmpp": ("dpmpp", 0.0, "v-", "#CC79A7"),
}
SCORES = {
    "frechet": "Frechet distance / floor",
    "top": "judge: top probability, drawn",
}


def cell(values):
    """Return the mean and half the range of scores as text."""
    return f"{sum(values) / len(values):.2f} ±{(max(values) - min(values)) / 2:.2f}"


def table(rows, score):
    """Return lines of text: a line a way, a column a number of calls."""
    numbers = sorted({row["calls"] for row in rows})
    lines = [f"{SCORES[score]:32}" + "".join(f"{calls:>12}" for calls in numbers)]
    for name in WAYS:
        cells = ""
        for calls in numbers:
            here = [r for r in rows if (r["way"], r["calls"]) == (name, calls)]
            cells += f"{cell([row[score] for row in here]):>12}"
        lines.append(f"{name:32}{cells}".rstrip())
    return lines


def picture(rows, path):
    """Draw the Frechet distances over the calls as a PNG."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for name, (*_, line, color) in WAYS.items():
        mine = [row for row in rows if row["way"] == name]
        calls = sorted({row["calls"] for row in mine})
        runs = [[r["frechet"] for r in mine if r["calls"] == n] for n in calls]
        means = [sum(values) / len(values) for values in runs]
        axes.plot(calls, means, line, color=color, label=name)
        low, high = [*map(min, runs)], [*map(max, runs)]
        axes.fill_between(calls, low, high, color=color, alpha=0.15)
    axes.axhline(1, color="grey", lw=1)
    axes.set(xscale="log", yscale="log", xlabel="network evaluations")
    axes.set_xticks(calls, calls)
    axes.set_yticks((1, 2, 5, 10), (1, 2, 5, 10))
    axes.minorticks_off()
    axes.set_ylabel("Frechet distance to digits, over its floor")
    figure.legend(loc="outside right")
    figure.savefig(path, dpi=110)


def main(
    path: tyro.conf.Positional[str],
    seeds: int = 3,
    calls: tuple[int, ...] = CALLS,
    out: Path = RESULTS,
):
    if not calls or min(seeds, *calls) < 1:
        raise ValueError("--seeds and --calls are 1 or more")
    _, ddpm = supersample.open_model(path, ema=True)
    images, held = (x / 127.5 - 1 for x in base.load_images(base.Config()))
    if ddpm.shape != images.shape[1:]:
        raise ValueError(f"{path} draws {ddpm.shape}, not digits of 8x8")
    labels, held_labels = load_labels("digits")
    out.mkdir(parents=True, exist_ok=True)
    judge, rows = train_judge(images, labels), []
    for seed, n, name in itertools.product(range(seeds), calls, WAYS):
        sampler, eta, *_ = WAYS[name]
        g = torch.Generator().manual_seed(seed)
        xt = torch.randn(360, *ddpm.shape, generator=g)

        def noise(k, g=g, shape=xt.shape):
            return torch.randn(shape, generator=g)

        with torch.no_grad():
            drawn = supersample.solve(ddpm, xt, sampler, n, eta, noise)
        drawn = ((drawn + 1) * 127.5).round() / 127.5 - 1
        found = score(drawn, images, held, held_labels, judge)
        row = {"way": name, "calls": n, "seed": seed}
        rows.append(row | {key: round(float(found[SCORES[key]]), 4) for key in SCORES})
    lines = [f"python benchmarks/samplers.py {path}, {seeds} seeds of noise"]
    for key in SCORES:
        lines += ["", *table(rows, key)]
    text = "\n".join(json.dumps(row) for row in rows)
    (out / "samplers.jsonl").write_text(text + "\n")
    (out / "samplers.txt").write_text("\n".join(lines) + "\n")
    picture(rows, out / "samplers.png")
    print("\n".join(lines))


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (ValueError, OSError) as error:
        sys.exit(f"samplers.py: {error}")
