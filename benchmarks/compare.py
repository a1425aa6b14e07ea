"""Do the ideas help? Train every arm on the same images, with the same noise and seeds.

    python benchmarks/compare.py                 digits, 3 seeds: about an hour on a CPU
    python benchmarks/compare.py --arms base curriculum --seeds 5
    python benchmarks/compare.py --steps 550     another budget: a third of the recipe
    python benchmarks/compare.py --steps 550 --decay True --equal time \\
        --arms curriculum "sparse gradient" "reg prox"
    python benchmarks/compare.py --data celeba --decay True --n-samples 1000 --curve 4

An arm is a script with options. At the same step all arms see the same images with the
same noise; for one seed they start from equal weights. So runs with one seed form a
pair. What is compared is the held-out loss of the averaged weights, the mean over ten
fixed noise levels, each with fixed noise, and by noise level; and with --n-samples the
distances of drawn to real images by measures.py, with averaged and with raw weights.
They are drawn by DDIM with 50 calls, for one seed from the same x_T in all arms. Beside
them stands the floor, what as many held-out images score.

All arms get equally many images, and with --equal time the steps that take as long as
base: those of base over the cost of the arm. The cost is the time of its training over
that of base, the median of the pairs at equal images (processor time; with a GPU wall
time, so leave the machine alone). A cost within 2 % of 1 counts as 1.

Each finished run is a line of benchmarks/results/compare-NAME.jsonl, where NAME is the
data set or --name; a second call does only what is missing, also after a kill. The
tables go to compare-NAME.txt, and some images that the runs of seed 0 drew, never real
ones, to compare-NAME.npz.

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
from dataclasses import dataclass, replace
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
from story import picture
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


MEASURES = {  # what is judged, and how differences are written
    "held_loss": ("held-out loss, averaged weights", ".4f"),
    "frechet net": ("Frechet distance, features of a trained net", ".3f"),
    "kernel net": ("kernel distance, features of a trained net", ".4f"),
    "frechet pca": ("Frechet distance, principal components", ".3f"),
    "kernel pca": ("kernel distance, principal components", ".4f"),
    "sliced wasserstein": ("sliced Wasserstein distance of patches", ".2f"),
}
FIXED = "image_size n_feat n_train batch lr".split()  # as long as a results file lasts
LIMIT = 0.02  # costs that differ by less are called equal


@dataclass(frozen=True)
class Options:
    """Options of the comparison; 0 stands for what the recipe of the data says."""

    data: str = "digits"  # data set, as in the scripts
    data_dir: str = ""  # where it lies
    name: str = ""  # of the results (empty: the data set)
    image_size: int = 0  # pixels a side
    n_feat: int = 0  # width of the network
    n_train: int = 0  # use the first N training images (0: all)
    batch: int = 0  # images a step
    lr: float = 0.0  # highest learning rate
    steps: int = 0  # the budget: optimizer steps of base (0: the recipe's epochs)
    equal: Literal["images", "time"] = "images"  # what an arm and base have in common
    seeds: int = 3  # seeds 0 .. N - 1 of every arm
    arms: tuple[str, ...] = tuple(ARMS)  # which of them
    decay: tuple[bool, ...] = (False, True)  # learning rate constant, falling to 0
    n_samples: int = 0  # images drawn from each run, to be measured (0: none)
    curve: int = 0  # epochs between the points of a kept loss curve (0: keep none)
    only_table: bool = False  # train nothing, write the tables anew


def configure(options, key, steps=0):
    """Return the script of an arm, and its Config for one run."""
    script, own = ARMS[key["arm"]]
    module = importlib.import_module(script)
    asked = {name: getattr(options, name) for name in (*FIXED, "data", "data_dir")}
    asked = {name: value for name, value in asked.items() if value}
    words = [options.name or options.data, *map(str, key.values())]
    name = "-".join(word for word in words if word != "images").replace(" ", "-")
    how = {"seed": key["seed"], "lr_decay": key["decay"], "steps": steps}
    how |= {"out": str(ROOT / "runs" / "compare" / name), "resume": "auto"}
    how |= {"sample_every": options.curve or 10**6, "save_every": 10**6}
    return module, replace(module.Config(**asked), **own, **how, quiet=True)


def clock():
    """Return seconds of CPU time, or with a GPU of wall time."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def train(module, cfg):
    """Train a run, unless it is finished; return its seconds, None after a kill.

    Held-out losses, curves and grids do not count: arms with stages have more of them.
    """
    out, apart = Path(cfg.out), []

    def timed(function):
        def call(*args, **options):
            start = clock()
            result = function(*args, **options)
            apart.append(clock() - start)
            return result

        return call

    fresh = not (out / "last.pt").exists()
    with ExitStack() as stack:
        for owner, name in (
            (module, "held_out_loss"),
            (module, "plot_history"),
            (module.DDPM, "sample"),
        ):
            new = timed(getattr(owner, name))
            stack.enter_context(patch.object(owner, name, new))
        start = clock()
        module.train(cfg)
        seconds = clock() - start - sum(apart)
    if fresh:
        (out / "seconds.json").write_text(json.dumps(round(seconds, 2)))
    kept = out / "seconds.json"
    return json.loads(kept.read_text()) if kept.exists() else None


def draw(module, out, n, seed, ema=True):
    """Return n images of a run, uint8 (n, C, S, S); x_T depends on the seed alone."""
    return measures.draw(module.load(Path(out, "last.pt"), ema), n, seed=1000 + seed)


def draw_stages(module, out):
    """Return 8 images for each end of a stage, uint8 (stages, 8, C, S, S).

    The net of that moment leads pure noise down to the lowest t that it has been
    trained on; what is shown is x0_hat there. A checkpoint is kept for each epoch that
    a stage ends in, so a run of few epochs has fewer rows than stages.
    """
    last, rows = module.read_checkpoint(Path(out, "last.pt")), []
    for path in sorted(Path(out).glob("checkpoint_epoch_*.pt")):
        ddpm, step = module.load(path), module.read_checkpoint(path)["step"]
        course = module.Curriculum(last["config"], last["step"], ddpm.alphabar)
        low = int(course.density(step - 1).nonzero()[0]) + 1
        xt = torch.randn(8, *ddpm.shape, generator=torch.Generator().manual_seed(1000))
        rows.append(((picture(ddpm, low, xt) + 1) * 127.5).round().byte())
    return torch.stack(rows)


def run(options, key, steps, scores):
    """Train and score one run; return its line of the results."""
    module, cfg = configure(options, key, steps)
    seconds = train(module, cfg)
    history = module.read_checkpoint(Path(cfg.out, "last.pt"))["history"]
    row = history[-1]
    line = {**key, "held_loss": row["held_loss"], "train_loss": row["loss"]}
    line |= {name: value for name, value in row.items() if name.startswith("held_t")}
    line |= {"step": row["step"], "train_seconds": seconds}
    for ema in (True, False) if scores else ():
        drawn = draw(module, cfg.out, options.n_samples, key["seed"], ema)
        found = scores.distances(drawn)
        line |= {name if ema else f"raw {name}": d for name, d in found.items()}
    if options.curve:
        line["curve"] = [
            [row[x] for x in ("step", "loss", "held_loss")] for row in history
        ]
    return line


def verdict(difference):
    """Return mean, standard error and verdict of differences to base, by the rule."""
    n = len(difference)
    mean, se = np.mean(difference), np.std(difference, ddof=1) / math.sqrt(n)
    if abs(mean) <= student.ppf(0.975, n - 1) * se:
        return mean, se, "tied"
    return mean, se, "better" if mean < 0 else "worse"


def pick(lines, steps, decay, equal="images"):
    """Return {arm: {seed: line}} of a budget and learning rate.

    At equal time, an arm that costs what base does keeps its runs at equal images; one
    whose cost is not known is left out.
    """
    runs = {}
    for kind in ("images", "time") if equal == "time" else ("images",):
        for line in (line for line in lines if "arm" in line):
            about = (line["steps"], line["decay"], line.get("equal", "images"))
            if about == (steps, decay, kind):
                runs.setdefault(line["arm"], {})[line["seed"]] = line
    if equal == "time":
        base = runs.get("base", {})
        timed = {line["arm"] for line in lines if line.get("equal") == "time"}
        for arm in runs.keys() - timed:
            ratio = cost(runs[arm], base)
            if arm != "base" and (ratio is None or abs(ratio - 1) > LIMIT):
                del runs[arm]
    return {arm: runs[arm] for arm in ARMS if arm in runs}


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


def readme_rows(lines, steps, columns):
    """Return a table's rows in Markdown; columns: (learning rate falls, measure)."""
    runs = [pick(lines, steps, decay) for decay, _ in columns]
    rows = []
    for arm in (arm for arm in ARMS if all(arm in each for each in runs)):
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
        se = np.std(found, ddof=1) / math.sqrt(len(found)) if len(found) > 1 else 0
        row = f"{arm:27}{len(found):6}{np.mean(found):11{form}} +- {se:{form}}"
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


def table(lines, steps, decay, equal="images"):
    """Return the tables, as text, of all runs of a budget and learning rate."""
    runs = pick(lines, steps, decay, equal)
    base = runs.get("base", {})
    how = "falls to 0" if decay else "is constant"
    total = next(iter(base.values()), {"step": steps})["step"]
    text = [f"{total} steps of base, equal {equal}, the learning rate {how}", ""]
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
            losses = [1000 * line[key] for line in own.values()]
            se = np.std(losses, ddof=1) / math.sqrt(len(losses)) if own else 0
            row += f"{np.mean(losses):7.4g}+-{se:<4.2g}"
        text.append(row.rstrip())
    costs = {arm: cost(own, base) for arm, own in runs.items()}
    if any(costs.values()):
        text += ["", "time of training over that of base; steps"]
    for arm, ratio in costs.items():
        if ratio:
            step = next(iter(runs[arm].values()))["step"]
            text.append(f"{arm:27}{ratio:12.2f}{step:12}")
    return "\n".join(text)


def read(results):
    """Return the lines of a results file."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text().splitlines()]


def add(results, line):
    """Append a line to a results file, in one piece."""
    with open(results, "a") as f:
        f.write(json.dumps(line) + "\n")


def agree(options, results):
    """Write down what holds for all lines of a results file, or compare with it.

    Returns the measures, or None without --n-samples. ValueError: they differ.
    """
    module, cfg = configure(options, {"arm": "base", "seed": 0, "decay": True})
    kept = {name: value for line in read(results) for name, value in line.items()}
    protocol = {name: getattr(cfg, name) for name in ("data", *FIXED)}
    protocol["device"] = "cuda" if torch.cuda.is_available() else "cpu"  # other noise
    if kept.get("protocol", protocol) != protocol:
        other = f"{results.name} was made with {kept['protocol']}"
        raise ValueError(f"{other}: --name gives this one a file of its own")
    if "protocol" not in kept:
        add(results, {"protocol": protocol})
    if not options.n_samples:
        return None
    images, labels, held, held_labels = module.load_images(cfg)
    scores = measures.Measures(images, held, labels, held_labels, options.n_samples)
    if kept.get("n_samples", options.n_samples) != options.n_samples:
        raise ValueError(f"{results.name} was made with {kept['n_samples']} samples")
    if "floor" not in kept:
        add(results, {"n_samples": options.n_samples, "floor": scores.floor})
    return scores


def plan(options, lines, key):
    """Return the steps of a run, or None if there is nothing to do."""
    if any(key.items() <= ({"equal": "images"} | line).items() for line in lines):
        return None
    if options.equal == "images":
        return options.steps
    runs = pick(lines, key["steps"], key["decay"])
    base = runs.get("base", {})
    ratio = cost(runs.get(key["arm"], {}), base)
    if ratio is None:
        raise ValueError(f"what {key['arm']} costs is not known: --equal images first")
    if abs(ratio - 1) <= LIMIT:
        return None
    return round(next(iter(base.values()))["step"] / ratio)


def keep_pictures(options, path):
    """Add to an npz file what the runs of seed 0 draw, where their folders are left."""
    kept = dict(np.load(path)) if path.exists() else {}
    for arm in options.arms:
        key = {"arm": arm, "seed": 0, "decay": True, "steps": options.steps}
        module, cfg = configure(options, key | {"equal": "images"}, options.steps)
        if not Path(cfg.out, "last.pt").exists():
            continue
        name = f"{arm} {options.steps}"
        kept[name] = draw(module, cfg.out, 16, 0).numpy()
        if hasattr(module, "Curriculum"):
            kept[f"{name} stages"] = draw_stages(module, cfg.out).numpy()
    np.savez_compressed(path, **kept)


def compare(options):
    """Make the runs that are missing, write the tables and print them."""
    name = options.name or options.data
    results = ROOT / "benchmarks" / "results" / f"compare-{name}.jsonl"
    todo = []
    if not options.only_table:
        scores = agree(options, results)
        todo = list(product(options.decay, range(options.seeds), options.arms))
    for decay, seed, arm in tqdm(todo, "runs"):
        key = {"arm": arm, "seed": seed, "decay": decay, "steps": options.steps}
        key["equal"] = options.equal
        if (steps := plan(options, read(results), key)) is not None:
            add(results, run(options, key, steps, scores))
    if options.n_samples and options.equal == "images":
        keep_pictures(options, results.with_suffix(".npz"))
    lines = read(results)
    kinds = {
        (x["steps"], x["decay"], x.get("equal", "images")) for x in lines if "arm" in x
    }
    kept = {name: value for line in lines for name, value in line.items()}
    about = kept.get("protocol", {}) | {"images drawn": kept.get("n_samples", 0)}
    text = [", ".join(f"{name} {value}" for name, value in about.items())]
    text += [table(lines, *kind) for kind in sorted(kinds)]
    text = "\n\n\n".join(text) + "\n"
    results.with_suffix(".txt").write_text(text)
    print(text)


def main():
    try:
        compare(tyro.cli(Options, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"compare.py: {error}")


if __name__ == "__main__":
    main()
