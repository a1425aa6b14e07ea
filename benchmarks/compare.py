"""Do the ideas help? Train every arm on the same images, with the same noise and seeds.

    python benchmarks/compare.py --name mine     digits, 3 seeds: half an hour on a CPU
    python benchmarks/compare.py --name mine --arms base curriculum --seeds 5
    python benchmarks/compare.py --data data/celeba32 --n-samples 1000 --curve 4

An arm is a script with options. At the same step all arms see the same images with the
same noise; for one seed they start from equal weights. So runs with one seed form a
pair. What is compared is the held-out loss of the averaged weights, the mean over ten
fixed noise levels, each with fixed noise, and by noise level; and with --n-samples the
distances of drawn to real images by measures.py, with averaged and with raw weights.
They are drawn by DDIM in 50 steps, for one seed from the same x_T in all arms. Beside
them stands the floor, what as many held-out images score. What an arm costs is the time
of its training over that of base, the median of the pairs (processor time; with a GPU
time by the clock, so leave the machine alone).

Each finished run is a line of benchmarks/results/compare-NAME.jsonl, where NAME is
--name or the data. A second call does only what is missing, also after a kill, and one
with another protocol is refused. The tables go to compare-NAME.txt, and some images
that the runs of seed 0 drew, never real ones, to compare-NAME.npz. The stored digits,
mnist and faces16 are of an earlier base, so give your own runs another name.

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
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import measures
import numpy as np
import torch
import tyro
from scipy.stats import t as student
from story import picture, stages
from tqdm.auto import tqdm

import superminddpm as base

ARMS = {
    "base": ("superminddpm", {}),
    "curriculum": ("supercurriculum", {}),
    "reverse": ("supercurriculum", {"order": "reverse"}),
    "shuffled": ("supercurriculum", {"order": "none"}),  # the curriculum's t unordered
    "sparse gradient": ("supersparse", {}),
    "sparse random": ("supersparse", {"regrow": "random"}),
    "sparse without curriculum": ("supersparse", {"stages": (0.0,) * 5}),
    "reg penalty": ("superreg", {"reg": "penalty"}),
    "reg prox": ("superreg", {"reg": "prox"}),
    "curriculum in log-SNR": ("supercurriculum", {"stage_axis": "logsnr"}),
    "Min-SNR": ("superobjective", {"objective": "eps", "weighting": "min-snr"}),
}

PAIRS = (  # what else is compared: the first less the second
    ("curriculum", "shuffled"),
    ("curriculum in log-SNR", "curriculum"),
    ("sparse gradient", "curriculum"),
    ("sparse gradient", "sparse random"),
    ("reg penalty", "curriculum"),
    ("reg prox", "curriculum"),
)

MEASURES = {  # what is judged, and how differences are written
    "held_loss": ("held-out loss, averaged weights", ".4f"),
    "frechet net": ("Frechet distance, features of a trained net", ".3f"),
    "kernel net": ("kernel distance, features of a trained net", ".4f"),
    "frechet pca": ("Frechet distance, principal components", ".3f"),
    "kernel pca": ("kernel distance, principal components", ".4f"),
    "sliced wasserstein": ("sliced Wasserstein distance of patches", ".2f"),
}
FREE = "data seed steps every device compile out resume wandb quiet".split()


@dataclass(frozen=True)
class Options:
    """Options of the comparison; 0 stands for what the recipe of the data says."""

    data: str = "digits"  # digits, or a folder made by prepare.py
    name: str = ""  # of the results (empty: that of the data)
    n_feat: int = 0  # width of the network
    batch: int = 0  # images a step
    lr: float = 0.0  # highest learning rate
    steps: int = 0  # the budget: optimizer steps of base (0: the recipe's epochs)
    seeds: int = 3  # seeds 0 .. N - 1 of every arm
    arms: tuple[Literal[tuple(ARMS)], ...] = tuple(ARMS)  # which of them
    n_samples: int = 0  # images drawn from each run, to be measured (0: none)
    curve: int = 0  # epochs between the points of a kept loss curve (0: keep none)

    def __post_init__(self):
        object.__setattr__(self, "name", self.name or Path(self.data).name)


# ---- Runs --------------------------------------------------------------------------
def configure(options, key):
    """Return the script of an arm, and its Config for one run."""
    script, own = ARMS[key["arm"]]
    module, recipe = importlib.import_module(script), {}
    if options.data != "digits":
        file = Path(options.data, "recipe.json").expanduser()
        if not file.exists():
            raise ValueError(f"no {file}: `python prepare.py celeba` makes one")
        recipe = json.loads(file.read_text())
    asked = {name: getattr(options, name) for name in ("n_feat", "batch", "lr")}
    recipe |= {name: value for name, value in asked.items() if value}
    words = "-".join([options.name, *map(str, key.values())]).replace(" ", "-")
    how = {"data": options.data, "seed": key["seed"], "steps": key["steps"]}
    how |= {"out": str(ROOT / "runs" / "compare" / words), "resume": True}
    how |= {"every": options.curve or 10**6, "quiet": True}
    return module, module.Config(**(recipe | own | how))


def train(module, cfg):
    """Train a run, unless it is finished; return its seconds, None if it went on.

    Held-out losses, grids and checkpoints do not count: arms with stages have more.
    """
    gpu = torch.accelerator.current_accelerator(check_available=True)
    clock = time.perf_counter if gpu else time.process_time
    fresh, apart, begin = not Path(cfg.out, "last.pt").exists(), [], clock()

    def timed(function):
        def call(*args):
            start = clock()
            result = function(*args)
            apart.append(clock() - start)
            return result

        return call

    with ExitStack() as stack:
        for name in ("held_out_loss", "save_grid", "save_run"):
            new = timed(getattr(module, name))
            stack.enter_context(patch.object(module, name, new))
        module.train(cfg)
    return round(clock() - begin - sum(apart), 2) if fresh else None


def draw(module, out, n, seed, ema=True):
    """Return n images of a run, uint8 (n, C, S, S); x_T depends on the seed alone."""
    return measures.draw(module.load(Path(out, "last.pt"), ema), n, seed=1000 + seed)


def draw_stages(module, out):
    """Return 8 images for each end of a stage, uint8 (stages, 8, C, S, S).

    The net of that moment leads pure noise down to the lowest t that it has been
    trained on; what is shown is x0_hat there.
    """
    rows = []
    for _, _, low, path in (stage for stage in stages(module, out) if stage[-1]):
        ddpm, g = module.load(path), torch.Generator().manual_seed(1000)
        xt = torch.randn(8, *ddpm.shape, generator=g)
        rows.append(((picture(ddpm, low, xt) + 1) * 127.5).round().byte())
    return torch.stack(rows)


def run(options, key, scores):
    """Train and score one run; return its line of the results."""
    module, cfg = configure(options, key)
    seconds = train(module, cfg)
    history = module.read_checkpoint(Path(cfg.out, "last.pt"))["history"]
    row = history[-1]
    line = {**key, "decay": True, "held_loss": row["held_loss"]}
    line["train_loss"] = row["loss"]
    line |= {name: value for name, value in row.items() if name.startswith("held_t")}
    line |= {"step": row["step"], "train_seconds": seconds}
    for ema in (True, False) if scores else ():
        drawn = draw(module, cfg.out, options.n_samples, key["seed"], ema)
        found = scores.distances(drawn)
        line |= {name if ema else f"raw {name}": d for name, d in found.items()}
    if options.curve:
        names = ("step", "loss", "held_loss")
        line["curve"] = [[row[name] for name in names] for row in history]
    return line


# ---- Verdicts and tables -----------------------------------------------------------
def verdict(difference):
    """Return mean, standard error and verdict of differences to base, by the rule."""
    n = len(difference)
    mean, se = np.mean(difference), np.std(difference, ddof=1) / math.sqrt(n)
    if abs(mean) <= student.ppf(0.975, n - 1) * se:
        return mean, se, "tied"
    return mean, se, "better" if mean < 0 else "worse"


def pick(lines, steps, decay=True):
    """Return {arm: {seed: line}} of a budget.

    decay: whether the learning rate falls, as it always does now. The stored runs of
    the earlier base had it both ways, and some of them equal time, not equal images.
    """
    runs = {}
    for line in (line for line in lines if "arm" in line):
        if kind_of(line) == (steps, decay) and line.get("equal") != "time":
            runs.setdefault(line["arm"], {})[line["seed"]] = line
    return runs


def kind_of(line):
    """Return which other lines a line may be compared with."""
    return line["steps"], line["decay"]


def values(own, measure):
    """Return the values of a measure over the seeds of an arm, where they are known."""
    return [line[measure] for line in own.values() if measure in line]


def differences(own, base, measure="held_loss"):
    """Return the differences of two arms in a measure, in pairs."""
    pairs = sorted(own.keys() & base.keys())
    pairs = [(own[seed], base[seed]) for seed in pairs]
    return [a[measure] - b[measure] for a, b in pairs if measure in a and measure in b]


def cost(own, base):
    """Return the time of an arm over that of base, the median of the pairs, or None."""
    pairs = [(own[seed], base[seed]) for seed in own.keys() & base.keys()]
    pairs = [(a.get("train_seconds"), b.get("train_seconds")) for a, b in pairs]
    ratios = [a / b for a, b in pairs if a and b]
    return float(np.median(ratios)) if ratios else None


def mean_se(found):
    """Return mean and standard error of values; that of one value is given as 0."""
    se = np.std(found, ddof=1) / math.sqrt(len(found)) if len(found) > 1 else 0
    return np.mean(found), se


def readme_rows(lines, steps, columns):
    """Return a table's rows in Markdown; columns: (learning rate falls, measure)."""
    runs = [pick(lines, steps, decay) for decay, _ in columns]
    rows = []
    for arm in (arm for arm in runs[0] if all(arm in each for each in runs)):
        row = f"| {arm} |"
        for (_, measure), each in zip(columns, runs, strict=True):
            form = MEASURES[measure][1]
            row += f" {np.mean(values(each[arm], measure)):{form}} |"
            if arm == "base":
                row += " | |"
            else:
                d = differences(each[arm], each["base"], measure)
                mean, se, word = verdict(d)
                row += f" {mean:+{form}} ± {se:{form}} | {word} |"
        rows.append(row)
    return rows


def judged(runs, measure, floor):
    """Return the lines of a table: what the arms score in a measure, and less base."""
    title, form = MEASURES[measure]
    base, raw = runs.get("base", {}), f"raw {measure}"
    head = f"{'arm':27}{'seeds':>6}{'mean':>11}{'less base':>26}     verdict"
    text = [title, head + "     raw weights" * (measure in floor)]
    text.append("-" * len(text[1]))
    for arm, own in runs.items():
        if not (found := values(own, measure)):
            continue
        mean, se = mean_se(found)
        row = f"{arm:27}{len(found):6}{mean:11{form}} +- {se:{form}}"
        d = differences(own, base, measure)
        if arm != "base" and len(d) > 1:
            mean, se, word = verdict(d)
            row = f"{row:56}{mean:+{form}} +- {se:{form}}"
            row = f"{row:75}{word}"
        if measure in floor:
            row = f"{row:82}{np.mean(values(own, raw)):12{form}}"
        text.append(row)
    if measure in floor:
        text.append(f"{'(held-out images)':33}{floor[measure]:11{form}}")
    return [*text, ""]


def table(lines, steps, decay=True):
    """Return the tables, as text, of all runs of a budget."""
    runs = pick(lines, steps, decay)
    base = runs.get("base", {})
    how = "falls to 0" if decay else "is constant"
    total = next(iter(base.values()), {"step": steps})["step"]
    text = [f"{total} steps of base, equal images, the learning rate {how}", ""]
    floor = next((line["floor"] for line in lines if "floor" in line), {})
    for measure in MEASURES:
        if any(values(own, measure) for own in runs.values()):
            text += judged(runs, measure, floor)
    for one, other in PAIRS:
        d = differences(runs.get(one, {}), runs.get(other, {}))
        if len(d) > 1:
            mean, se, word = verdict(d)
            what = f"{one} less {other}"
            text.append(f"{what:53}{mean:+12.4f} +- {se:.4f}  {word}")
    levels = [key for key in next(iter(base.values()), {}) if key.startswith("held_t")]
    text += ["", "held-out loss by noise level t, mean and standard error, in 1/1000"]
    text.append(" " * 27 + "".join(f"{key[6:]:>13}" for key in levels))
    for arm, own in runs.items():
        row = f"{arm:27}"
        for key in levels:
            mean, se = mean_se([1000 * line[key] for line in own.values()])
            row += f"{mean:7.4g}+-{se:<4.2g}"
        text.append(row.rstrip())
    costs = {arm: cost(own, base) for arm, own in runs.items()}
    if any(costs.values()):
        text += ["", "time of training over that of base; steps"]
    for arm, ratio in costs.items():
        if ratio:
            step = next(iter(runs[arm].values()))["step"]
            text.append(f"{arm:27}{ratio:12.2f}{step:12}")
    return "\n".join(text)


# ---- The comparison ----------------------------------------------------------------
def read(results):
    """Return the lines of a results file."""
    text = results.read_text() if results.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def add(results, line):
    """Append a line to a results file, in one piece."""
    with open(results, "a") as f:
        f.write(json.dumps(line) + "\n")


def agree(options, results):
    """Write down what holds for all lines of a results file, or compare with it.

    ValueError: they differ. untrained is the held-out loss of eps_hat = x_t, where
    training starts: another schedule, split or content of the data would change it.
    """
    _, cfg = configure(options, {"arm": "base", "seed": 0, "steps": 0})
    gpu = torch.accelerator.current_accelerator(check_available=True)
    held = base.load_images(cfg)[1] / 127.5 - 1
    start = base.DDPM(lambda xt, t: torch.zeros_like(xt), cfg.T)
    new = {name: value for name, value in asdict(cfg).items() if name not in FREE}
    new |= {"data": Path(options.data).name, "n_samples": options.n_samples}
    new["device"] = gpu.type if gpu else "cpu"  # another kind draws other noise
    new["untrained"] = round(base.held_out_loss(start, held)["held_loss"], 5)
    old = [line["protocol"] for line in read(results) if "protocol" in line]
    if not old:
        add(results, {"protocol": new})
    elif other := [x for x in {**old[0], **new} if old[0].get(x) != new.get(x)]:
        why = f"{results.name} has runs with another {', '.join(other)}"
        raise ValueError(f"{why}: --name gives these a file of their own")


def judge(options, results):
    """Return the Measures of the data, or None without --n-samples."""
    if not options.n_samples:
        return None
    parts, labels = base.load_images(options), measures.load_labels(options.data)
    scores = measures.Measures(*parts, *labels, options.n_samples)
    if not any("floor" in line for line in read(results)):
        add(results, {"floor": scores.floor})
    return scores


def keep_pictures(options, path):
    """Add to an npz file what the runs of seed 0 draw, where their folders are left."""
    kept = dict(np.load(path)) if path.exists() else {}
    for arm in options.arms:
        key = {"arm": arm, "seed": 0, "steps": options.steps}
        module, cfg = configure(options, key)
        if not Path(cfg.out, "last.pt").exists():
            continue
        name = f"{arm} {options.steps}"
        kept[name] = draw(module, cfg.out, 16, 0).numpy()
        if hasattr(module, "stage_density"):
            kept[f"{name} stages"] = draw_stages(module, cfg.out).numpy()
    np.savez_compressed(path, **kept)


def compare(options):
    """Make the runs that are missing, write the tables and print them."""
    results = ROOT / "benchmarks" / "results" / f"compare-{options.name}.jsonl"
    agree(options, results)
    todo = [
        {"arm": arm, "seed": seed, "steps": options.steps}
        for seed, arm in product(range(options.seeds), options.arms)
    ]
    lines = read(results)
    todo = [key for key in todo if not any(key.items() <= x.items() for x in lines)]
    scores = judge(options, results) if todo else None
    for key in tqdm(todo, "runs"):
        add(results, run(options, key, scores))
    if options.n_samples:
        keep_pictures(options, results.with_suffix(".npz"))
    lines = read(results)
    about = next(line["protocol"] for line in lines if "protocol" in line)
    text = [", ".join(f"{name} {value}" for name, value in about.items())]
    kinds = sorted({kind_of(line) for line in lines if "arm" in line})
    text = "\n\n\n".join([*text, *(table(lines, *kind) for kind in kinds)]) + "\n"
    results.with_suffix(".txt").write_text(text)
    print(text)


def main():
    try:
        compare(tyro.cli(Options, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"compare.py: {error}")


if __name__ == "__main__":
    main()
