"""Draw the losses of a run, or of several beside one another.

    python benchmarks/curves.py runs/superminddpm-digits
    python benchmarks/curves.py runs/superminddpm-digits runs/supercurriculum-digits

For one run it writes loss_curves.png into its folder, from metrics.csv: over epochs the
loss in training and the held-out loss of the averaged weights, and for up to four of
the epochs the held-out loss by noise level. For several it writes compared.png into the
first folder: the held-out loss over epochs, and by noise level at the end.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind; the lines differ as well
STYLES = [("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":")]
STYLES += [("#E69F00", (0, (5, 1, 1, 1, 1, 1))), ("#56B4E9", (0, (3, 1)))]


def read(run):
    """Return the columns of metrics.csv of a run, {name: array}."""
    file = Path(run, "metrics.csv")
    if not file.exists():
        raise ValueError(f"no {file}: is {run} the folder of a run?")
    with open(file) as f:
        rows = list(csv.DictReader(f))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def by_level(x, row):
    """Return the noise levels t, and the held-out losses at them in a row."""
    names = [name for name in x if name.startswith("held_t")]
    return [int(name[6:]) for name in names], [x[name][row] for name in names]


def draw(runs):
    """Return the figure of one run or several, {name: columns}."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    if len(runs) == 1:
        (x,) = runs.values()
        kinds = {"loss": "training", "held_loss": "held out, averaged weights"}
        curves = {label: (x["epoch"], x[name]) for name, label in kinds.items()}
        rows = np.unique(np.linspace(0, len(x["epoch"]) - 1, 4).round().astype(int))
        levels = {f"epoch {x['epoch'][row]:.0f}": by_level(x, row) for row in rows}
    else:
        curves = {name: (x["epoch"], x["held_loss"]) for name, x in runs.items()}
        levels = {name: by_level(x, -1) for name, x in runs.items()}
    for axes, lines in ((left, curves), (right, levels)):
        for k, (label, line) in enumerate(lines.items()):
            colour, dashes = STYLES[k % len(STYLES)]
            axes.plot(*line, color=colour, ls=dashes, marker="o", ms=4, label=label)
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    left.set(xlabel="epoch", ylabel="loss" if len(runs) == 1 else "held-out loss")
    right.set(xlabel="noise level t", ylabel="held-out loss")
    return figure


def main(runs: tyro.conf.Positional[tuple[str, ...]]):
    """Draw the losses of runs, folders with a metrics.csv."""
    if not runs:
        raise ValueError("whose losses? Name the folder of a run, or of several")
    path = Path(runs[0], "loss_curves.png" if len(runs) == 1 else "compared.png")
    draw({run: read(run) for run in runs}).savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (ValueError, OSError) as error:
        sys.exit(f"curves.py: {error}")
