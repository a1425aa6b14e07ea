"""Noise, image, or v? The same digits with each objective, schedules and weights.

    python benchmarks/objectives.py              7 ways, 3 seeds: about 18 minutes
    python benchmarks/objectives.py eps v        some of them

Trains superobjective.py with its defaults. In the last way eps_hat is the output of the
network alone, not x_t plus the output, so training starts from 0 and not from x_t. Runs
with one seed start from equal weights and see the same images, t and noise. Scores:

 - held-out error of eps_hat: comparable for equal schedules only
 - held-out error of x0_hat, clipped as in sampling, at ten log-SNRs from -8 to 6, the
   same for every schedule: each at the t that is nearest to it
 - 718 drawn images (DDIM, 50 steps), scored as in benchmarks/quality.py, in two groups

Each run is a line of benchmarks/results/objectives.jsonl, and a run that is there is
not made again; the table goes to objectives.txt.
"""

import json
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Literal
from unittest.mock import patch

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all runs on one kind of device

import numpy as np
import torch
import tyro
from scipy.stats import t as student

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from quality import score, train_judge

import superguide
import superobjective
from superobjective import DDPM, Config, load_images, rng

LINEAR = {"schedule": "linear", "weighting": "none"}
BASE = {"objective": "eps", "schedule": "cosine", "weighting": "none"}
ARMS = {
    "eps": {"objective": "eps", **LINEAR},
    "x0": {"objective": "x0", **LINEAR},
    "v": {"objective": "v", **LINEAR},
    "eps, cosine": BASE,
    "v, cosine": {"objective": "v", "schedule": "cosine", "weighting": "none"},
    "default": {},  # v, cosine, min-snr
    "eps alone, cosine": BASE,
}
COSINE = [*ARMS][3:]  # their held_loss is over other noise levels
SCORES = {
    "held_loss": "error of eps_hat",
    "x0": "error of x0_hat",
    "Frechet distance / floor": "Frechet / floor",
    "judge: top probability, drawn": "judge's top prob.",
}


@torch.no_grad()
def x0_error(ddpm, held):
    """Return the mean squared error of x0_hat over ten log-SNRs with fixed noise."""
    ab, errors = ddpm.alphabar[1:].double(), []
    for k, level in enumerate(torch.linspace(-8, 6, 10)):
        t = int((ab.logit() - level).abs().argmin()) + 1
        t = torch.full((len(held),), t)
        eps = torch.randn(held.shape, generator=rng("cpu", k, 11))
        x0_hat, _ = ddpm.predict(ddpm.q_sample(held, t, eps), t)
        errors.append((x0_hat - held).square().mean().item())
    return sum(errors) / len(errors)


def run(arm, seed, data, judge):
    """Train one run; return its line of the results."""
    images, held, held_labels = data
    with ExitStack() as stack:
        if "alone" in arm:
            alone = patch.object(DDPM, "eps_hat", lambda self, xt, t: self.net(xt, t))
            stack.enter_context(alone)
        out = stack.enter_context(tempfile.TemporaryDirectory())
        cfg = Config(out=out, seed=seed, every=10**6, quiet=True, **ARMS[arm])
        ddpm = superobjective.train(cfg)
        row = superobjective.read_checkpoint(f"{out}/last.pt")["history"][-1]
        g = torch.Generator().manual_seed(seed)
        xt = torch.randn(718, *ddpm.shape, generator=g)
        drawn = ((ddpm.sample(xt.shape, xt=xt) + 1) * 127.5).round() / 127.5 - 1
        x0 = x0_error(ddpm, held)
    scores = score(drawn, images, held, held_labels, judge)
    line = {"arm": arm, "seed": seed, "held_loss": row["held_loss"], "x0": x0}
    return line | scores


def table(lines):
    """Return the means over seeds, and the paired differences to eps, as text."""
    text = [f"{'mean of the seeds':18}" + "".join(f"{v:>22}" for v in SCORES.values())]
    text += [f"{'(minus eps, paired)':18}", ""]
    runs = {arm: [line for line in lines if line["arm"] == arm] for arm in ARMS}
    for arm, own in runs.items():
        row, less = f"{arm:18}", f"{'':18}"
        for key in SCORES if own else ():
            row += f"{np.mean([line[key] for line in own]):22.4f}"
            base = {line["seed"]: line[key] for line in runs["eps"]}
            d = [line[key] - base[line["seed"]] for line in own if line["seed"] in base]
            if arm == "eps" or len(d) < 2 or key == "held_loss" and arm in COSINE:
                less += f"{'':22}"
                continue
            se = np.std(d, ddof=1) / len(d) ** 0.5
            sure = abs(np.mean(d)) > student.ppf(0.975, len(d) - 1) * se
            less += f"{np.mean(d):+13.4f}+-{se:.4f}{'*' if sure else ' '}"
        text += [row, less.rstrip()] if own else []
    counts = ", ".join(f"{arm}: {len(own)}" for arm, own in runs.items() if own)
    text += ["", f"seeds {counts}"]
    text += ["*: beyond chance (Student's t, 5 %, two-sided)"]
    return "\n".join(["python benchmarks/objectives.py", "", *text, ""])


def main(arms: tyro.conf.Positional[tuple[Literal[tuple(ARMS)], ...]] = ()):
    """Make the runs that are missing; arms: the ways to train (none: all)."""
    torch.set_num_threads(1)
    results = ROOT / "benchmarks" / "results" / "objectives.jsonl"
    text = results.read_text() if results.exists() else ""
    lines, judge = [json.loads(line) for line in text.splitlines()], None
    images, held = (x / 127.5 - 1 for x in load_images(Config()))
    labels, held_labels = superguide.load_labels(superguide.Config())
    data = images, held, held_labels
    done = {(line["arm"], line["seed"]) for line in lines}
    for seed in range(3):
        for arm in arms or ARMS:
            if (arm, seed) not in done:
                judge = judge or train_judge(images, labels)
                lines.append(run(arm, seed, data, judge))
                with open(results, "a") as f:
                    f.write(json.dumps(lines[-1]) + "\n")
    results.with_suffix(".txt").write_text(table(lines))
    print(table(lines))


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (ValueError, OSError) as error:
        sys.exit(f"objectives.py: {error}")
