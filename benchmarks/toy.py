"""Which way to train is better on the coarse/fine toy?

    python benchmarks/toy.py                      everything
    python benchmarks/toy.py --cases 64 3000 --out runs/toy      one of the cases

Every arm of notebooks/toy.py gets the same steps, the same samples and the same grid of
learning rates. Its rate is the one with the least mean excess risk over tuning seeds,
which are not used again; it then trains on the paired seeds 0, 1, 2 ... of the table.

The widths are ample (128 channels), in between (64) and starved (16). results/toy.jsonl
has one line for each finished (arm, width, steps, rate), with the measures of every
seed, and a run that was interrupted goes on from it (delete it after a change of
notebooks/toy.py). results/toy.txt is the table, and says by which rule it calls an arm
better, worse or tied.
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from scipy.stats import t as student

sys.path.insert(0, str(Path(__file__).parents[1] / "notebooks"))
import toy as lab

TUNING = 1000  # the first tuning seed
KEY = "part arm H lr steps seeds".split()
MEASURES = "excess R1 R2 rest F1 F2 G1 G2".split()
PAIRS = [  # beside uniform: each idea against what it adds to or is a control of
    ("curriculum", "shuffled"),
    ("curriculum", "reversed"),
    ("curriculum-mask-gradient", "curriculum"),
    ("curriculum-mask-gradient", "curriculum-mask-random"),
    ("curriculum-mask-gradient", "uniform-mask-gradient"),
    ("uniform-mask-gradient", "uniform-redraw"),
    ("curriculum-penalty-weak", "curriculum"),
    ("curriculum-penalty-strong", "curriculum"),
    ("curriculum-prox-weak", "curriculum"),
    ("curriculum-prox-strong", "curriculum"),
]
CLAIMS = [  # "the mask makes channels cleaner", "the curriculum is why they are not"
    ("mixed", "curriculum-mask-gradient", "curriculum"),
    ("mixed", "curriculum-mask-gradient", "curriculum-mask-random"),
    ("mixed", "uniform-mask-gradient", "uniform"),
    ("mixed", "uniform-redraw", "uniform"),
    ("mixed", "uniform-mask-gradient", "uniform-redraw"),
    ("mixed", "curriculum", "uniform"),
    ("early", "curriculum-mask-gradient", "uniform-mask-gradient"),
    ("late", "curriculum-mask-gradient", "uniform-mask-gradient"),
]


@dataclass(frozen=True)
class Options:
    """What to run."""

    seeds: int = 16  # paired seeds of the table
    tuning_seeds: int = 8  # other seeds, which choose the learning rate
    cases: tuple[tuple[int, int], ...] = (
        (128, 3000),
        (16, 3000),
        (64, 3000),
        (64, 4000),
        (128, 12_000),
    )
    """hidden channels and steps of 128 samples, in pairs"""
    lrs: tuple[float, ...] = (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2)
    arms: tuple[Literal[tuple(lab.ARMS)], ...] = tuple(lab.ARMS)
    out: Path = Path(__file__).parent / "results"


def listed(values):
    """Return the tensors of a dict as lists that json can write, rounded."""
    return {k: np.round(v.double().numpy(), 5).tolist() for k, v in values.items()}


def measure(nets, risk, toy):
    """Return all measures of trained Nets, lists over seeds if not said otherwise."""
    linear = toy.linear_excess(torch.tensor([0.7, 0.3]))
    rises = lab.serves(nets, toy)  # (S, H, 2)
    hurts = rises > 0.01 * linear[[0, 1], [0, 1]]
    both = hurts.all(-1)
    parts = [risk.sum(-1).mean(1), *risk.mean(1).unbind(-1)]
    parts += lab.captured(risk, toy).unbind(-1)
    parts += lab.spread(lab.generate(nets, toy), toy).unbind(-1)
    values = dict(zip(MEASURES, parts, strict=True))
    values |= {"only_M1": (hurts[..., 0] & ~both).sum(1)}
    values |= {"only_M2": (hurts[..., 1] & ~both).sum(1), "both": both.sum(1)}
    values |= {"mixed": both.sum(1) / hurts.any(-1).sum(1).clamp(min=1)}
    values |= {"zero_rows": (nets.rows == 0).all(-1).sum(1)}
    values |= {"risk": risk.mean(0)}  # over seeds, by t of lab.GRID: (25, 3)
    values |= {"risk_error": risk.std(0) / len(risk) ** 0.5}
    stages = nets.birth.unique()  # only 0 without a mask
    if len(stages) > 1:
        serve = rises.clamp(min=0) / linear[[0, 1], [0, 1]]
        for name, born in (("early", nets.birth < 2), ("late", nets.birth >= 2)):
            share = (serve * born[..., None]).sum(1)
            values |= {name: share[:, 1] / share.sum(1)}
    rises = [rises[nets.birth == stage].mean(0) for stage in stages]
    return values | {"rise_by_birth": torch.stack(rises)}  # (stages, 2)


def read(path):
    """Return {key: line} of finished runs; a line that was cut short is taken away."""
    done = {}
    if path.exists():
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        os.truncate(path, len(whole.encode()))
        for line in map(json.loads, whole.splitlines()):
            done[tuple(line[name] for name in KEY)] = line
    return done


def run(opt, part, arm, H, steps, lr, done, path):
    """Return the measures of an arm, from done or by training it."""
    first, n = (TUNING, opt.tuning_seeds) if part == "tune" else (0, opt.seeds)
    key = (part, arm, H, lr, steps, n)
    if key not in done:
        toy, start = lab.Toy(), time.process_time()
        seeds = range(first, first + n)
        nets = lab.train(arm, toy, seeds, H=H, steps=steps, lr=lr)
        risk = lab.excess(nets, toy)
        values = {"excess": risk.sum(-1).mean(1)}
        values |= measure(nets, risk, toy) if part == "final" else {}
        line = dict(zip(KEY, key, strict=True)) | listed(values)
        line["seconds"] = round(time.process_time() - start, 1)
        with open(path, "a") as f:
            f.write(json.dumps(line) + "\n")
        done[key] = line
        mean = np.mean(line["excess"])
        name = f"{part} {arm} H={H} steps={steps} lr={lr:g}"
        print(f"{name}: excess {mean:.4f}", flush=True)
    return done[key]


def best_rate(runs):
    """Return the rate of {lr: line} with the least mean excess; nan is the worst."""
    means = {lr: np.mean(line["excess"]) for lr, line in runs.items()}
    return min(means, key=lambda lr: means[lr] if math.isfinite(means[lr]) else np.inf)


def compare(a, b):
    """Return mean and standard error of a - b over paired seeds, and the verdict.

    For measures of which less is better. Beyond the 97.5 % quantile of Student's t,
    in standard errors, the sign counts; else the two are tied.
    """
    off = np.subtract(a, b)
    mean, error = off.mean(), off.std(ddof=1) / len(off) ** 0.5
    if abs(mean) > student.ppf(0.975, len(off) - 1) * error:
        return mean, error, "better" if mean < 0 else "worse"
    return mean, error, "tied"


def pm(values):
    """Return mean and standard error over seeds as text."""
    return f"{np.mean(values):.3f} {np.std(values, ddof=1) / len(values) ** 0.5:.3f}"


def table(opt, H, steps, tuned, final):
    """Return the lines of one case.  tuned: {arm: {lr: line}}; final: {arm: line}."""
    toy, lines = lab.Toy(), [f"H = {H} channels, {steps} steps"]
    risk = lab.excess(toy.linear, toy)
    blob = lab.spread(lab.generate(toy.linear, toy), toy)[0]
    lines += [
        f"  best linear denoiser: excess {risk.sum(-1).mean():.3f}, "
        f"G1 {blob[0]:.3f}, G2 {blob[1]:.3f}; Bayes: all 0",
        "",
        f"  {'':26}{'lr':>7}  {'excess':13}{'minus uniform':15}{'':8}"
        f"{'R1':20}{'R2':20}{'rest':20}{'G1':20}G2",
    ]
    for arm, line in final.items():
        edge = "*" if line["lr"] in (min(opt.lrs), max(opt.lrs)) else " "
        text = f"  {arm:26}{line['lr']:7g}{edge} {pm(line['excess']):13}"
        versus = {
            name: compare(line[name], final["uniform"][name]) for name in MEASURES
        }
        off, error, verdict = versus["excess"]
        text += f"{off:+.3f} {error:.3f}   " if arm != "uniform" else " " * 15
        text += f"{verdict if arm != 'uniform' else '':8}"
        for name in ("R1", "R2", "rest", "G1", "G2"):
            verdict = versus[name][2] if arm != "uniform" else ""
            text += f"{pm(line[name]):13}{verdict:7}"
        lines.append(text.rstrip())
    lines += ["", f"  {'excess of':26}{'minus that of':26}"]
    for a, b in PAIRS:
        if a in final and b in final:
            off, error, verdict = compare(final[a]["excess"], final[b]["excess"])
            lines.append(f"  {a:26}{b:26}{off:+.3f} {error:.3f}   {verdict}")
    lines += [
        "",
        f"  {'channels that serve':26}{'only M1':>9}{'only M2':>9}{'both':>9}"
        f"{'neither':>9}{'exactly 0':>11}{'captured: F1':>15}{'F2':>8}{'stuck':>8}",
    ]
    for arm, line in final.items():
        counts = [np.mean(line[name]) for name in ("only_M1", "only_M2", "both")]
        text = "".join(f"{n:9.1f}" for n in (*counts, H - sum(counts)))
        text += f"{np.mean(line['zero_rows']):11.1f}"
        text += f"{np.mean(line['F1']):15.3f}{np.mean(line['F2']):8.3f}"
        text += f"{sum(f < 0.5 for f in line['F2']):8d}"
        lines.append(f"  {arm:26}{text}")
    lines += ["", f"  {'share':8}{'of':26}{'minus that of':26}"]
    for name, a, b in CLAIMS:
        if a in final and b in final:
            off, error, word = compare(final[a][name], final[b][name])
            word = {"better": "less", "worse": "more"}.get(word, word)
            own = f"{np.mean(final[a][name]):.2f} - {np.mean(final[b][name]):.2f}"
            lines.append(
                f"  {name:8}{a:26}{b:26}{own} = {off:+.3f} {error:.3f}   {word}"
            )
    masked = [arm for arm in final if lab.ARMS[arm].regrow]
    lines += ["", "  mean rise of R1 / R2 without a channel, by its stage of birth"]
    for arm in masked:
        text = "".join(f"{a:9.4f} /{b:7.4f}" for a, b in final[arm]["rise_by_birth"])
        lines.append(f"  {arm:26}{text}")
    lines += ["", "  mean excess over the tuning seeds, by learning rate"]
    lines.append(f"  {'':26}" + "".join(f"{lr:9g}" for lr in opt.lrs))
    for arm, runs in tuned.items():
        text = "".join(f"{np.mean(runs[lr]['excess']):9.3f}" for lr in opt.lrs)
        lines.append(f"  {arm:26}{text}")
    return [*lines, ""]


def main(opt: Options):
    torch.set_num_threads(1)
    arms = list(dict.fromkeys(("uniform", *opt.arms)))
    opt.out.mkdir(parents=True, exist_ok=True)
    path = opt.out / "toy.jsonl"
    done, used, tables = read(path), [], []
    for H, steps in opt.cases:
        tuned, final = {}, {}
        for arm in arms:
            tuned[arm] = {
                lr: run(opt, "tune", arm, H, steps, lr, done, path) for lr in opt.lrs
            }
            lr = best_rate(tuned[arm])
            final[arm] = run(opt, "final", arm, H, steps, lr, done, path)
            used += [*tuned[arm].values(), final[arm]]
        tables += table(opt, H, steps, tuned, final)
    quantile, n = student.ppf(0.975, opt.seeds - 1), len(arms) - 1
    minutes = sum(line["seconds"] for line in used) / 60
    head = f"""\
The coarse/fine toy; a step has 128 samples, an arm {opt.seeds} paired seeds.
Made by benchmarks/toy.py in {minutes:.0f} minutes of one core; notebooks/toy.py
defines the arms (ARMS) and the measures.

excess: E||eps_hat - eps*||^2, mean over t in [0.01, 1]; R1, R2 and rest are its parts
  in M1, M2 and the complement. G1, G2: E(|y| - a)^2 / a^2 of samples by 40 DDIM steps.
  Of all these, less is better. Two numbers are mean and standard error over seeds.
lr: the best of {len(opt.lrs)} by mean excess over {opt.tuning_seeds} other seeds; \
a star marks an end of the grid.
better, worse: the paired difference to uniform is beyond {quantile:.2f} of its standard
  errors (Student's t, {opt.seeds - 1} degrees of freedom, 5 %, two-sided); else tied.
  Of the {n} comparisons in a column, {0.05 * n:.1f} fall outside by chance alone.
serve: without the channel, R1 at t = 0.7 (R2 at t = 0.3) rises by more than 1 % of the
  best linear denoiser's. Mean numbers of channels.
stuck: seeds that captured less than half of the fine feature (F2 < 0.5).
mixed: the share that serves both features among the channels that serve any. early,
  late: the share of the fine feature in all that channels born in the first two stages,
  or in the last three, contribute.

"""
    (opt.out / "toy.txt").write_text(head + "\n".join(tables).rstrip() + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except KeyboardInterrupt:
        sys.exit(130)
    except ValueError as error:
        sys.exit(f"benchmarks/toy.py: {error}")
