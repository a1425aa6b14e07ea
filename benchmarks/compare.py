"""Do the ideas help? Train every arm on the same images, with the same noise and seeds.

    python benchmarks/compare.py --name mine          the digits: 16 arms, 8 seeds
    python benchmarks/compare.py --name mine --arms base curriculum --seeds 5
    python benchmarks/compare.py --data data/celeba32 --seeds 3 --curve 4

An arm is a script with options, and for some a density of t of its own (DENSITIES). At
the same step all arms see the same images with the same noise; for one seed they start
from equal weights. So runs with one seed form a pair.

What decides is what the averaged weights draw (DDIM, 50 steps, for one seed from the
same x_T in all arms): the log of the Frechet distance to the training images in the
features of a net that tells their classes, over the distance that as many real ones
would have. Beside it stand the same in principal components, a bound on the negative
log-likelihood in nats, and the held-out loss by noise level, a mean over 8 draws of the
noise, with what could be known at that level (gauge.py). The mean over the levels is
but one more column: low noise dominates it. What an arm costs is the time of its
training over that of base, the median of the pairs (processor time; with a GPU time
by the clock, so leave the machine alone).

Each finished run is a line of benchmarks/results/compare-NAME.jsonl, where NAME is
--name or the data. A second call does only what is missing, also after a kill, and one
with another protocol is refused. The tables go to compare-NAME.txt, and some images
that the runs of seed 0 drew, never real ones, to compare-NAME.npz. Give your own runs
another name than those stored here, such as digits, faces16 and mnist28.

The verdict on an arm, by a rule fixed beforehand: better or worse if the interval of
its mean difference to base leaves out 0, else tied. With 95 % all intervals of a table
are right at once (Bonferroni); their variance is pooled over arms and seeds. PAIRS of
arms, such as the curriculum and its shuffled control, are judged in the same way.
"""

import importlib
import json
import math
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import gauge
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
    "reverse, shuffled": ("supercurriculum", {"order": "reverse"}),
    "high noise first": ("supercurriculum", {}),  # both: all t equally often in the run
    "low noise first": ("supercurriculum", {}),
    "sparse gradient": ("supersparse", {}),
    "sparse random": ("supersparse", {"regrow": "random"}),
    "sparse without curriculum": ("supersparse", {"stages": (0.0,) * 5}),
    "reg penalty": ("superreg", {"reg": "penalty"}),
    "reg prox": ("superreg", {"reg": "prox"}),
    "curriculum in log-SNR": ("supercurriculum", {"stage_axis": "logsnr"}),
    "Min-SNR": ("superobjective", {"objective": "eps", "weighting": "min-snr"}),
    "SpeeD": ("supercurriculum", {"stages": (0.0,), "epochs_per_stage": (1.0,)}),
    "logit-normal": ("supercurriculum", {"stages": (0.0,), "epochs_per_stage": (1.0,)}),
}


def unordered(cfg, p):
    """Return for each stage the average of all stages' densities p (stages, T)."""
    shares = torch.tensor(cfg.epochs_per_stage)
    return (shares / shares.sum() @ p).expand_as(p)


def tilted(cfg, p, sign):
    """Return densities that prefer high t at first, low t at last; sign -1: reversed.

    They are linear in t, and their average over the run is uniform: only the order of
    the noise levels differs from base, not how often each of them comes.
    """
    shares = torch.tensor(cfg.epochs_per_stage) / sum(cfg.epochs_per_stage)
    middle = (shares.cumsum(0) - shares / 2)[:, None]  # of each stage, as a share
    t = torch.arange(1, cfg.T + 1)
    return (1 + sign * (1 - 2 * middle) * (2 * t - cfg.T - 1) / cfg.T) / cfg.T


def asymmetric(cfg, p):
    """Return SpeeD's density: t up to 0.7 T five times as often as others.

    Wang et al. 2024, arXiv:2405.17403.
    """
    weight = torch.where(torch.arange(1, cfg.T + 1) <= 0.7 * cfg.T, 5.0, 1.0)
    return (weight / weight.sum()).expand_as(p)


def logit_normal(cfg, p):
    """Return the density of t / T = sigmoid(z), z normal (Esser et al. 2024)."""
    place = (torch.arange(1, cfg.T + 1) - 0.5) / cfg.T
    weight = torch.exp(-(place.logit() ** 2) / 2) / place / (1 - place)
    return (weight / weight.sum()).expand_as(p)


DENSITIES = {  # how often each t is drawn, in place of what the script's options say
    "reverse, shuffled": unordered,
    "high noise first": partial(tilted, sign=1),
    "low noise first": partial(tilted, sign=-1),
    "SpeeD": asymmetric,
    "logit-normal": logit_normal,
}

PAIRS = (  # what else is compared: the first minus the second
    ("curriculum", "shuffled"),
    ("reverse", "reverse, shuffled"),
    ("high noise first", "low noise first"),
    ("curriculum in log-SNR", "curriculum"),
    ("sparse gradient", "curriculum"),
    ("sparse gradient", "sparse random"),
    ("reg penalty", "curriculum"),
    ("reg prox", "curriculum"),
)

MEASURES = {  # what is judged, and how differences are written
    "log frechet net": ("log(Frechet distance / floor), features of a net", ".3f"),
    "log frechet pca": ("log(Frechet distance / floor), principal components", ".3f"),
    "nats": ("bound on the negative log-likelihood, nats a dimension", ".4f"),
    "held_loss": ("held-out loss, averaged weights", ".4f"),
    "frechet net": ("Frechet distance, features of a trained net", ".3f"),
    "kernel net": ("kernel distance, features of a trained net", ".4f"),
    "frechet pca": ("Frechet distance, principal components", ".3f"),
    "kernel pca": ("kernel distance, principal components", ".4f"),
    "sliced wasserstein": ("sliced Wasserstein distance of patches", ".2f"),
}
DRAWS = 8  # of the held-out noise, for each loss
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
    seeds: int = 8  # seeds 0 .. N - 1 of every arm
    arms: tuple[Literal[tuple(ARMS)], ...] = tuple(ARMS)  # which of them
    n_samples: int = 0  # drawn from each run (0: as many as there are to train on)
    compile: bool = False  # compile the loss: a slow start, then faster
    bf16: bool = False  # bfloat16 autocast in training
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
    how |= {"compile": options.compile, "bf16": options.bf16}
    return module, module.Config(**(recipe | own | how))


def train(module, cfg, density=None):
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
        if density:
            own = module.stage_density

            def stage_density(cfg, alphabar):
                return density(cfg, own(cfg, alphabar))

            stack.enter_context(patch.object(module, "stage_density", stage_density))
        module.train(cfg)
    return round(clock() - begin - sum(apart), 2) if fresh else None


def draw(module, out, n, seed):
    """Return n images of a run, uint8 (n, C, S, S); x_T depends on the seed alone."""
    return measures.draw(module.load(Path(out, "last.pt")), n, seed=1000 + seed)


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
    seconds = train(module, cfg, DENSITIES.get(key["arm"]))
    path = Path(cfg.out, "last.pt")
    gpu = torch.accelerator.current_accelerator(check_available=True)
    ddpm = module.load(path).to(gpu or "cpu")
    history = module.read_checkpoint(path)["history"]
    row, held = history[-1], module.load_images(cfg)[1]
    levels = [int(name[6:]) for name in row if name.startswith("held_t")]
    losses = [gauge.net_loss(ddpm, held, t, DRAWS) for t in levels]
    line = {**key, "held_loss": float(np.mean(losses))}
    line |= {"train_loss": row["loss"], "nats": gauge.nats(ddpm, held)}
    line |= {f"held_t{t}": x for t, x in zip(levels, losses, strict=True)}
    line |= {"step": row["step"], "train_seconds": seconds}
    drawn = draw(module, cfg.out, number(options), key["seed"])
    line |= scores.log_ratios(drawn) | scores.distances(drawn)
    if options.curve:
        names = ("step", "loss", "held_loss")
        line["curve"] = [[row[name] for name in names] for row in history]
    return line


# ---- Verdicts and tables -----------------------------------------------------------
def intervals(runs, measure, pairs):
    """Return {pair: (mean, low, high, verdict)} of the first arm minus the second.

    Over the seeds that all arms have. All arms share one variance, that of the values
    less the mean of their arm and of their seed. With 95 % all intervals are right at
    once (Bonferroni); a pair is tied if 0 is inside its own. {}: too few runs.
    """
    seeds = sorted(set.intersection(*(set(own) for own in runs.values())))
    pairs = [(one, other) for one, other in pairs if one in runs and other in runs]
    if len(seeds) < 2 or not pairs:
        return {}
    y = np.array([[own[seed][measure] for seed in seeds] for own in runs.values()])
    rest = y - y.mean(1, keepdims=True) - y.mean(0) + y.mean()
    free = (len(y) - 1) * (len(seeds) - 1)
    se = math.sqrt(2 * (rest**2).sum() / free / len(seeds))
    width = student.ppf(1 - 0.025 / len(pairs), free) * se
    found, means = {}, dict(zip(runs, y.mean(1), strict=True))
    for one, other in pairs:
        mean = means[one] - means[other]
        word = "tied" if abs(mean) <= width else "better" if mean < 0 else "worse"
        found[one, other] = mean, mean - width, mean + width, word
    return found


def ranking(runs, measure):
    """Return {arm: (mean, low, high, verdict)} of the differences to base."""
    pairs = [(arm, "base") for arm in runs if arm != "base"]
    return {arm: row for (arm, _), row in intervals(runs, measure, pairs).items()}


def pick(lines, steps):
    """Return {arm: {seed: line}} of a budget."""
    runs = {}
    for line in (line for line in lines if line.get("steps") == steps):
        runs.setdefault(line["arm"], {})[line["seed"]] = line
    return runs


def values(own, measure):
    """Return the values of a measure over the seeds of an arm, where they are known."""
    return [line[measure] for line in own.values() if measure in line]


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


def readme_rows(lines, steps, chosen):
    """Return a table's rows in Markdown: mean, minus base, and verdict, by measure."""
    runs, rows = pick(lines, steps), []
    ranks = {measure: ranking(runs, measure) for measure in chosen}
    for arm, own in runs.items():
        row = f"| {arm} |"
        for measure, found in ranks.items():
            form = MEASURES[measure][1]
            row += f" {np.mean(values(own, measure)):{form}} |"
            if arm not in found:
                row += " | |"
                continue
            mean, low, high, word = found[arm]
            row += f" {mean:+{form}} ({low:+{form}} to {high:+{form}}) | {word} |"
        rows.append(row)
    return rows


def judged(runs, measure, floor):
    """Return the lines of a table: what the arms score in a measure, and minus base."""
    title, form = MEASURES[measure]
    head = f"{'arm':27}{'seeds':>6}{'mean':>11}{'minus base, 95 %':>34}       verdict"
    text, ranks = [title, head, "-" * len(head)], ranking(runs, measure)
    for arm, own in runs.items():
        found = values(own, measure)
        mean, se = mean_se(found)
        row = f"{arm:27}{len(found):6}{mean:11{form}} +- {se:{form}}"
        if arm in ranks:
            mean, low, high, word = ranks[arm]
            row = f"{row:56}{mean:+{form}} ({low:+{form}} to {high:+{form}})"
            row = f"{row:85}{word}"
        text.append(row)
    if measure in floor:
        text.append(f"{'(held-out images)':33}{floor[measure]:11{form}}")
    return [*text, ""]


def table(lines, steps):
    """Return the tables, as text, of all runs of a budget."""
    runs = pick(lines, steps)
    base = runs.get("base", {})
    total = next(iter(base.values()), {"step": steps})["step"]
    text = [f"{total} steps of base, equal images", ""]
    floor = next((line["floor"] for line in lines if "floor" in line), {})
    for measure in MEASURES:
        if all(values(own, measure) for own in runs.values()):
            text += judged(runs, measure, floor)
    for measure in ("log frechet net", "nats"):
        for pair, row in intervals(runs, measure, PAIRS).items():
            what = f"{measure}: {' minus '.join(pair)}"
            mean, low, high = (f"{x:+{MEASURES[measure][1]}}" for x in row[:3])
            text.append(f"{what:62}{mean} ({low} to {high})  {row[3]}")
    levels = [key for key in next(iter(base.values()), {}) if key.startswith("held_t")]
    text += ["", "held-out loss by noise level t, mean and standard error, in 1/1000"]
    text.append(" " * 27 + "".join(f"{key[6:]:>13}" for key in levels))
    known = next((line["references"] for line in lines if "references" in line), {})
    for name, row in known.items():
        text.append(
            f"{name:27}" + "".join(f"{1000 * x:7.4g}      " for x in row).rstrip()
        )
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


def agree(options, results, todo=True):
    """Write down what holds for all lines of a results file, or compare with it.

    ValueError: they differ; in their device only if there is anything to do. untrained
    is the held-out loss of eps_hat = x_t, where training starts: another schedule,
    split or content of the data would change it.
    """
    _, cfg = configure(options, {"arm": "base", "seed": 0, "steps": 0})
    gpu = torch.accelerator.current_accelerator(check_available=True)
    held = base.load_images(cfg)[1] / 127.5 - 1
    start = base.DDPM(lambda xt, t: torch.zeros_like(xt), cfg.T)
    new = {name: value for name, value in asdict(cfg).items() if name not in FREE}
    new |= {"data": Path(options.data).name, "n_samples": number(options)}
    new["device"] = gpu.type if gpu else "cpu"  # another kind draws other noise
    new["untrained"] = round(base.held_out_loss(start, held)["held_loss"], 5)
    old = [line["protocol"] for line in read(results) if "protocol" in line]
    if old and not todo:  # nothing is drawn, so any device will do
        new["device"] = old[0].get("device")
    if not old:
        add(results, {"protocol": new})
    elif other := [x for x in {**old[0], **new} if old[0].get(x) != new.get(x)]:
        why = f"{results.name} has runs with another {', '.join(other)}"
        raise ValueError(f"{why}: --name gives these a file of their own")


def number(options):
    """Return how many images are drawn from each run."""
    return options.n_samples or min(len(base.load_images(options)[0]), measures.REAL)


def judge(options, results):
    """Return the Measures of the data; write down the floor and what could be known."""
    parts, labels = base.load_images(options), measures.load_labels(options.data)
    scores = measures.Measures(*parts, *labels, number(options))
    if not any("floor" in line for line in read(results)):
        ddpm = base.DDPM(None)
        levels = [round((k + 0.5) * ddpm.T / 10) for k in range(10)]
        known = gauge.references(*parts, ddpm.alphabar, levels, DRAWS)
        add(results, {"floor": scores.floor, "references": known})
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
    if kept:
        np.savez_compressed(path, **kept)


def compare(options):
    """Make the runs that are missing, write the tables and print them."""
    results = ROOT / "benchmarks" / "results" / f"compare-{options.name}.jsonl"
    todo = [
        {"arm": arm, "seed": seed, "steps": options.steps}
        for seed, arm in product(range(options.seeds), options.arms)
    ]
    lines = read(results)
    todo = [key for key in todo if not any(key.items() <= x.items() for x in lines)]
    agree(options, results, todo)
    scores = judge(options, results) if todo else None
    for key in tqdm(todo, "runs"):
        add(results, run(options, key, scores))
    keep_pictures(options, results.with_suffix(".npz"))
    lines = read(results)
    about = next(line["protocol"] for line in lines if "protocol" in line)
    text = [", ".join(f"{name} {value}" for name, value in about.items())]
    budgets = sorted({line["steps"] for line in lines if "arm" in line})
    text = "\n\n\n".join([*text, *(table(lines, steps) for steps in budgets)]) + "\n"
    results.with_suffix(".txt").write_text(text)
    print(text)


def main():
    try:
        compare(tyro.cli(Options, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"compare.py: {error}")


if __name__ == "__main__":
    main()
