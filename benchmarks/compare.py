"""Do the ideas help? Train every arm on the same images, with the same noise and seeds.

    python benchmarks/compare.py                 digits, 3 seeds: about an hour on a CPU
    python benchmarks/compare.py --arms base curriculum --seeds 5

An arm is a script with options. Arms see equally many images, and at the same step the
same ones with the same noise; for one seed they start from equal weights. So runs with
one seed form a pair. What is compared is the held-out loss of the averaged weights, the
mean over ten fixed noise levels, each with fixed noise, and by noise level.

Each finished run is a line of benchmarks/results/compare-DATA.jsonl; a second call does
only what is missing, also after a kill. The tables go to compare-DATA.txt.

The verdict on an arm, by a rule fixed beforehand: with d the difference to base within
pairs, an arm is better or worse if |mean d| > q se(d), where q is the 97.5 % quantile
of Student's t with (seeds - 1) degrees of freedom, and tied otherwise. Over many arms
some such verdicts are chance: one in 20 where nothing helps.
"""

import importlib
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import tyro
from scipy.stats import t as student
from tqdm.auto import tqdm

MIN_SNR = {"objective": "eps", "schedule": "linear", "weighting": "min-snr"}
ARMS = {
    "base": ("superminddpm", {}),
    "curriculum": ("supercurriculum", {}),
    "reverse": ("supercurriculum", {"order": "reverse"}),
    "shuffled": ("supercurriculum", {"order": "none"}),
    "sparse gradient": ("supersparse", {}),
    "sparse random": ("supersparse", {"regrow": "random"}),
    "sparse without curriculum": ("supersparse", {"stages": "0,0,0,0,0"}),
    "reg penalty": ("superreg", {"reg": "penalty"}),
    "reg prox": ("superreg", {"reg": "prox"}),
    "curriculum in log-SNR": ("supercurriculum", {"stage_axis": "logsnr"}),
    "curriculum, soft": ("supercurriculum", {"soft": True}),
    "sparse, mask at seed": ("supersparse", {"mask_at": "seed"}),
    "Min-SNR": ("superobjective", MIN_SNR),
}

PAIRS = (  # what else is compared: the first less the second
    ("curriculum", "shuffled"),
    ("curriculum in log-SNR", "curriculum"),
    ("sparse gradient", "curriculum"),
    ("sparse gradient", "sparse random"),
    ("sparse gradient", "sparse, mask at seed"),
    ("reg penalty", "curriculum"),
    ("reg prox", "curriculum"),
)


@dataclass(frozen=True)
class Options:
    """Options of the comparison."""

    data: str = "digits"  # data set, as in the scripts
    data_dir: str = ""  # where it lies
    image_size: int = 0  # pixels a side (0: the recipe's)
    steps: int = 0  # optimizer steps of a run (0: the epochs of the recipe)
    seeds: int = 3  # seeds 0 .. N - 1 of every arm
    arms: tuple[str, ...] = tuple(ARMS)  # which of them
    decay: tuple[bool, ...] = (False, True)  # learning rate constant, falling to 0
    only_table: bool = False  # train nothing, write the tables anew


def run(script, changes, options, seed, decay, out):
    """Train one run; return its line of the results."""
    module = importlib.import_module(script)
    cfg = module.Config(data=options.data)
    chosen = {"data_dir": options.data_dir, "seed": seed, "lr_decay": decay}
    if options.steps:
        chosen["steps"] = options.steps
    if options.image_size:
        chosen["image_size"] = options.image_size
    cadence = {"out": str(out), "resume": "auto", "quiet": True}
    cadence |= {"sample_every": 10**6, "save_every": 10**6}
    cfg = replace(cfg, **chosen, **changes, **cadence)
    start = time.perf_counter()
    module.train(cfg)
    seconds = time.perf_counter() - start
    row = module.read_checkpoint(out / "last.pt")["history"][-1]
    return {"held_loss": row["held_loss"], "train_loss": row["loss"]} | {
        **{key: value for key, value in row.items() if key.startswith("held_t")},
        **{"step": row["step"], "seconds": round(seconds, 1)},
    }


def verdict(difference):
    """Return mean, standard error and verdict of differences to base, by the rule."""
    n = len(difference)
    mean, se = np.mean(difference), np.std(difference, ddof=1) / math.sqrt(n)
    if abs(mean) <= student.ppf(0.975, n - 1) * se:
        return mean, se, "tied"
    return mean, se, "better" if mean < 0 else "worse"


def pick(lines, steps, decay):
    """Return {arm: {seed: line}} of all runs of one length and learning rate."""
    runs = {}
    for line in lines:
        if (line["step"], line["decay"]) == (steps, decay):
            runs.setdefault(line["arm"], {})[line["seed"]] = line
    return runs


def differences(own, base):
    """Return the differences of the held-out losses of two arms, in pairs."""
    pairs = sorted(own.keys() & base.keys())
    return [own[seed]["held_loss"] - base[seed]["held_loss"] for seed in pairs]


def readme_rows(lines, steps):
    """Return the rows of the README's table: constant learning rate, then falling."""
    both = [pick(lines, steps, decay) for decay in (False, True)]
    rows = []
    for arm in (arm for arm in ARMS if all(arm in runs for runs in both)):
        row = f"| {arm} |"
        for runs in both:
            loss = np.mean([line["held_loss"] for line in runs[arm].values()])
            row += f" {loss:.4f} |"
            if arm == "base":
                row += " | |"
            else:
                mean, se, word = verdict(differences(runs[arm], runs["base"]))
                row += f" {mean:+.4f} ± {se:.4f} | {word} |"
        rows.append(row)
    return rows


def table(lines, steps, decay):
    """Return the tables, as text, of all runs of one length and learning rate."""
    runs = pick(lines, steps, decay)
    base = runs.get("base", {})
    how = "falls to 0" if decay else "is constant"
    text = [f"{steps} steps, the learning rate {how}", ""]
    head = f"{'arm':27}{'seeds':>6}{'held-out loss':>18}{'less base':>22}  verdict"
    text += [head, "-" * len(head)]
    for arm, own in runs.items():
        losses = [line["held_loss"] for line in own.values()]
        se = np.std(losses, ddof=1) / math.sqrt(len(losses)) if len(losses) > 1 else 0
        row = f"{arm:27}{len(own):6}{np.mean(losses):10.4f} +- {se:.4f}"
        d = differences(own, base)
        if arm != "base" and len(d) > 1:
            mean, se, word = verdict(d)
            row += f"{mean:+12.4f} +- {se:.4f}  {word}"
        text.append(row)
    text.append("")
    for one, other in PAIRS:
        d = differences(runs.get(one, {}), runs.get(other, {}))
        if len(d) > 1:
            mean, se, word = verdict(d)
            what = f"{one} less {other}"
            text.append(f"{what:51}{mean:+12.4f} +- {se:.4f}  {word}")
    levels = [key for key in next(iter(base.values()), {}) if key.startswith("held_t")]
    text += ["", "held-out loss by noise level t, mean and standard error, in 1/1000"]
    text.append(" " * 27 + "".join(f"{key[6:]:>13}" for key in levels))
    for arm, own in runs.items():
        row = f"{arm:27}"
        for key in levels:
            losses = [1000 * line[key] for line in own.values()]
            se = np.std(losses, ddof=1) / math.sqrt(len(losses))
            row += f"{np.mean(losses):7.4g}+-{se:<4.2g}"
        text.append(row.rstrip())
    return "\n".join(text)


def main():
    options = tyro.cli(Options, description=__doc__)
    results = ROOT / "benchmarks" / "results" / f"compare-{options.data}.jsonl"
    lines = []
    if results.exists():
        lines = [json.loads(line) for line in results.read_text().splitlines()]
    todo = [
        (decay, arm, seed)
        for decay in options.decay
        for arm in options.arms
        for seed in range(options.seeds)
    ]
    for decay, arm, seed in tqdm([] if options.only_table else todo, "runs"):
        script, changes = ARMS[arm]
        key = {"arm": arm, "seed": seed, "decay": decay, "steps": options.steps}
        if any(key.items() <= line.items() for line in lines):
            continue
        name = "-".join(str(value) for value in key.values()).replace(" ", "-")
        out = ROOT / "runs" / "compare" / f"{options.data}-{name}"
        lines.append(key | run(script, changes, options, seed, decay, out))
        with open(results, "a") as f:
            f.write(json.dumps(lines[-1]) + "\n")
    kinds = sorted({(line["step"], line["decay"]) for line in lines})
    text = [f"python benchmarks/compare.py --data {options.data}"]
    text += [table(lines, *kind) for kind in kinds]
    text = "\n\n\n".join(text) + "\n"
    results.with_suffix(".txt").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
