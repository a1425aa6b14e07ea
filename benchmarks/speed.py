"""How fast is the training loop, and what holds it back?  On a CPU or a GPU.

    python benchmarks/speed.py                     32x32 in colour, the recipe of celeba
    python benchmarks/speed.py --data digits       8x8, n-feat 16: the default run
    python benchmarks/speed.py superreg --reg prox         another script, its options
    python benchmarks/speed.py --json speed.json           the same figures as JSON

Measures images per second, in turns, so that what disturbs one row disturbs all:
 - loop: train() of the script as it is, on made-up images for celeba, else real ones;
   on a GPU also with --compile and --bf16, and with images that stay on the host;
 - bare: forward, backward and optimizer step of the same network on fixed tensors,
   eager, compiled (with combo kernels, or into CUDA graphs), in bf16, channels last;
 - plain: the loop of plain.py, as people write it, on files like CelebA's.

A step is what lies between two calls of Adam.step, so one clock stands in all of them.
The first steps of a turn, where things are compiled, do not count. On a CPU the cost of
the loop is by how much its whole time exceeds that of forward, backward, zero_grad and
step inside it; both come from the same steps. On a GPU calls return before the work is
done: there the clock waits, at the first and the last step only, and the loop is
compared to bare. Idle is the time under no kernel: the kernels as seen by
torch.profiler, against a step without the profiler. Memory is the peak of what torch
reserves; of the loop the images are part of it.

"recipe" is the time of all epochs at that rate, without grids and held-out losses: for
celeba 80 epochs of 162,770 images, 13.0 million. TFLOP/s is the rate of convolutions
and matrix products, counted as in cost.py, in the fastest row of the loop.
"""

import gc
import importlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import plain
import torch
import tyro
from cost import CELEBA, N_TRAIN, flops


@dataclass(frozen=True)
class Options:
    """Options of the measurement; those of the script may follow."""

    script: tyro.conf.Positional[str] = "superminddpm"  # whose loop
    data: str = "celeba"  # celeba (made up), digits, or a folder made by prepare.py
    n_feat: tuple[int, ...] = ()  # widths (empty: 32 128 on a GPU, else the recipe's)
    batch: tuple[int, ...] = ()  # images a step (empty: 256 1024 on a GPU, else 64)
    turns: int = 5  # of each row
    steps: int = 0  # timed steps a turn (0: 100 on a GPU, 10 on a CPU)
    n_images: int = N_TRAIN["CelebA"]  # made-up images
    n_samples: int = 0  # images to draw by DDIM (0: 10,000 on a GPU, 16 on a CPU)
    compiled: bool = False  # compiled rows also on a CPU; they want a C++ compiler
    rows: tuple[str, ...] = ()  # only these rows, by name (empty: all)
    json: str = ""  # file for the figures


# ---- The clock ---------------------------------------------------------------------
def sync():
    """Wait until the GPU, if there is one, has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step_time(script, run, first, count, profiler=None):
    """Return seconds a step of run, and of them inside its bare calls.

    A step lasts from one call of Adam.step to the next. The calls number first and
    first + count, from 0, are where the clock, and the profiler, start and stop.
    """
    calls, inside, marks, adam = [], [0.0], [], torch.optim.Adam

    def timed(function, is_step):
        def call(*args, **options):
            if is_step and len(calls) in (first, first + count):
                sync()
                marks.append((time.perf_counter(), inside[0]))
                if profiler:
                    (profiler.stop if marks[1:] else profiler.start)()
            calls.extend([1] * is_step)
            start = time.perf_counter()
            result = function(*args, **options)
            inside[0] += time.perf_counter() - start
            return result

        return call

    parts = [(script.DDPM, "__call__"), (torch.Tensor, "backward")]
    with ExitStack() as stack:
        for owner, name in [*parts, (adam, "zero_grad"), (adam, "step")]:
            new = timed(getattr(owner, name), name == "step")
            stack.enter_context(patch.object(owner, name, new))
        run(first + count + 1)
    (start, before), (end, after) = marks
    return (end - start) / count, (after - before) / count


def covered(spans):
    """Return the length of the union of spans (start, end)."""
    total, reach = 0, -math.inf
    for start, end in sorted(spans):
        total += max(0, end - max(start, reach))
        reach = max(reach, end)
    return total


def busy_time(script, run, first, count=20):
    """Return seconds a step in which the GPU runs any kernel; None: none was seen."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    step_time(script, run, first, count, profiler)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in kinds]
    return covered(spans) / 1e6 / count or None


# ---- The loops: each is a function run(n) that makes n optimizer steps --------------
def loop(script, cfg, images, n):
    """Make n steps of the script's own loop, on images as of load_images."""
    fakes = {
        "load_images": lambda _: images,
        "held_out_loss": lambda *_: {"held_loss": 0},
    }
    fakes |= dict.fromkeys(("save_grid", "save_run"), lambda *_: None)
    with tempfile.TemporaryDirectory() as folder, patch.multiple(script, **fakes):
        cfg = replace(cfg, steps=n, out=f"{folder}/run", every=10**6, quiet=True)
        script.train(cfg)


def new(script, cfg, shape, device):
    torch.manual_seed(0)
    return script.build(cfg, shape).to(device)


class OnHost:
    """Images that say they are 4 GiB, so that the loop leaves them on the host."""

    def __init__(self, images):
        self.images, self.nbytes = images, 2**32

    def __getattr__(self, name):
        return getattr(self.images, name)

    def __getitem__(self, index):
        return self.images[index]

    def __len__(self):
        return len(self.images)


def bare(script, cfg, shape, device, how, last, n):
    """Make n steps on fixed tensors.  how: options of torch.compile; None: eager."""
    ddpm = new(script, cfg, shape, device)
    x0, eps = torch.randn(2, cfg.batch, *shape, device=device)
    t = torch.randint(1, cfg.T + 1, (cfg.batch,), device=device)
    if last:
        ddpm = ddpm.to(memory_format=torch.channels_last)
        x0, eps = (x.to(memory_format=torch.channels_last) for x in (x0, eps))
    if how is not None:
        ddpm.compile(**how)
    opt = torch.optim.Adam(ddpm.parameters(), betas=(0.9, 0.99), fused=True)
    for _ in range(n):
        if how:
            torch.compiler.cudagraph_mark_step_begin()  # graphs reuse their memory
        opt.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
            loss = ddpm(x0, t, eps)
        loss.backward()
        opt.step()


def plain_loop(script, cfg, shape, device, files, n):
    ddpm = new(script, cfg, shape, device)
    plain.train_on_files(ddpm, files, shape, cfg.batch, os.cpu_count(), n)


BARE = {  # options of torch.compile (None: eager), bf16, channels last
    "bare, eager": (None, False, False),
    "bare, compiled": ({}, False, False),
    "bare, eager, channels last": (None, False, True),
    "bare, compiled, channels last": ({}, False, True),
    "bare, eager, bf16": (None, True, False),
    "bare, compiled, bf16": ({}, True, False),
    "bare, compiled, bf16, channels last": ({}, True, True),
    "bare, combo kernels": ({"options": {"combo_kernels": True}}, False, False),
    "bare, CUDA graphs": ({"mode": "reduce-overhead"}, False, False),
    "bare, CUDA graphs, bf16": ({"mode": "reduce-overhead"}, True, False),
}


def rows_of(script, cfg, images, files, options, device):
    """Return {what: run} of all rows for one network and batch.

    What captures CUDA graphs comes last, since their memory stays reserved.
    """
    shape, gpu = images[0].shape[1:], device.type == "cuda"
    runs = {"loop": partial(loop, script, cfg, images)}
    if gpu:
        host = OnHost(images[0]), images[1]
        runs["loop, images on the host"] = partial(loop, script, cfg, host)
    if options.data == "celeba":
        runs["plain"] = partial(plain_loop, script, cfg, shape, device, files)
    for what in list(BARE)[: len(BARE) if gpu else 1 + options.compiled]:
        how, bf16, last = BARE[what]
        one = replace(cfg, bf16=bf16)
        runs[what] = partial(bare, script, one, shape, device, how, last)
    if gpu or options.compiled:
        one = replace(cfg, compile=True)
        runs["loop, --compile"] = partial(loop, script, one, images)
    if gpu:
        one = replace(one, bf16=True)
        runs["loop, --compile --bf16"] = partial(loop, script, one, images)
    if unknown := set(options.rows) - set(runs):
        raise ValueError(f"no row {unknown}: there are {', '.join(runs)}")
    return {what: run for what, run in runs.items() if what in (options.rows or runs)}


def drawing_rate(ddpm, shape, n, batch):
    """Return images a second of DDIM in 50 steps."""
    batch = min(n, batch)
    ddpm.sample((batch, *shape), 2)
    sync()
    start = time.perf_counter()
    for k in range(0, n, batch):
        ddpm.sample((min(batch, n - k), *shape), 50)
    sync()
    return n / (time.perf_counter() - start)


# ---- The measurement ---------------------------------------------------------------
def times_of(script, runs, spans, turns, gpu):
    """Return {what: [step_time]} over the turns, and {what: peak of the memory}.

    What cannot be compiled or does not fit into the memory is named and left out.
    """
    times, peak = {what: [] for what in runs}, {}
    for turn in range(-1 if gpu else 0, turns):  # -1: to warm up
        for what in list(times):
            gc.collect()
            if gpu and turn < 0:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                both = step_time(script, runs[what], *spans[what])
            except Exception as error:  # compilers raise nearly anything
                compiled = "compile" in what or BARE.get(what, [None])[0] is not None
                if not compiled and not isinstance(error, torch.OutOfMemoryError):
                    raise
                print(f"{what}: {type(error).__name__}: {str(error).splitlines()[:1]}")
                del times[what]
                continue
            if turn >= 0:
                times[what].append(both)
            elif gpu:
                peak[what] = torch.cuda.max_memory_reserved()
    return times, peak


def forget_compiled():
    """Drop compiled code: a second batch size would be compiled for any size."""
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 2 * len(BARE)  # all share one function
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # not silently eager


def measure(script, cfg, images, files, options, device):
    """Return the figures of one network and batch, as a dict for JSON.

    And functions {what: busy_time}, to be called when all pairs have been timed: a GPU
    may be slower once the profiler has run.
    """
    gpu, shape = device.type == "cuda", images[0].shape[1:]
    if gpu or options.compiled:
        forget_compiled()
    runs = rows_of(script, cfg, images, files, options, device)
    first, count = (20, options.steps or 100) if gpu else (2, options.steps or 10)
    several = os.cpu_count()  # workers deliver in bursts: time whole rounds
    spans = dict.fromkeys(runs, (first, count))
    if "plain" in runs:
        spans["plain"] = max(first, several), math.ceil(count / several) * several
    times, peak = times_of(script, runs, spans, options.turns, gpu)
    due = cfg.epochs * (len(images[0]) // cfg.batch * cfg.batch)
    rows, busy = [], {}
    for what, pairs in times.items():
        rates = sorted(cfg.batch / whole for whole, _ in pairs)
        middle = statistics.median(rates)
        row = {"what": what, "images_per_s": middle, "low": rates[0], "high": rates[-1]}
        row |= {"ms": 1000 * cfg.batch / middle, "hours": due / middle / 3600}
        if gpu:
            row |= {"idle": None, "peak": peak[what]}
            busy[what] = partial(busy_time, script, runs[what], spans[what][0])
        elif what.startswith("loop"):
            costs = sorted(whole / inside - 1 for whole, inside in pairs)
            row["cost"] = statistics.median(costs), costs[0], costs[-1]
        rows.append(row)
    n = options.n_samples or (10_000 if gpu else 16)
    ddpm = new(script, cfg, shape, device)
    pair = {"n_feat": cfg.n_feat, "batch": cfg.batch, "images": due, "rows": rows}
    x0, t = torch.zeros(1, *shape, device=device), torch.tensor([1], device=device)
    pair |= {"flop_image": flops(lambda n: ddpm(x0, t, x0)), "n_samples": n}
    pair |= {"samples_per_s": drawing_rate(ddpm, shape, n, cfg.batch)}
    return pair, busy


def best(pair, kind):
    """Return the most images/s among the rows of a kind: loop, bare or plain."""
    rows = (row for row in pair["rows"] if row["what"].startswith(kind))
    return max((row["images_per_s"] for row in rows), default=math.nan)


def report(result):
    """Return the figures of a whole run as text."""
    lines = ["$ {command}", "{script}, {data}, {shape}, {device}, torch {torch}"]
    lines = [line.format(**result) for line in lines]
    for pair in result["pairs"]:
        lines += ["", "n-feat {n_feat}, batch {batch}".format(**pair)]
        head = f"{'':37}{'images/s':>10}{'(range)':>25}{'ms a step':>11}{'recipe':>11}"
        lines.append(head + ("    idle      memory" if result["gpu"] else ""))
        for row in pair["rows"]:
            spread = "({low:,.1f} to {high:,.1f})".format(**row)
            line = f"{row['what']:37}{row['images_per_s']:10,.1f}{spread:>25}"
            line += f"{row['ms']:11.2f}{row['hours']:9.3g} h"
            if result["gpu"]:
                idle = "?" if row["idle"] is None else f"{row['idle']:.0%}"
                line += f"{idle:>8}{row['peak'] / 2**30:8.2f} GiB"
            if "cost" in row:
                line += "   cost {:.1%} ({:.1%} to {:.1%})".format(*row["cost"])
            lines.append(line)
        quick, against = best(pair, "loop"), best(pair, "plain")
        line = f"loop: {quick / best(pair, 'bare'):.0%} of the best bare, "
        line += "" if math.isnan(against) else f"{quick / against:.2f} times plain, "
        lines.append(f"{line}{quick * pair['flop_image'] / 1e12:.3g} TFLOP/s")
        drawn = "DDIM in 50 steps: {samples_per_s:.3g} images/s, {n_samples:,} drawn"
        lines.append(drawn.format(**pair))
    return "\n".join(lines)


def set_up(options, rest):
    """Return the script, its Config, and images as of load_images."""
    script = importlib.import_module(options.script)
    recipe, data = CELEBA, options.data
    if data != "celeba":
        file = Path(data, "recipe.json").expanduser()
        recipe = {"data": data} if data == "digits" else json.loads(file.read_text())
        recipe["data"] = data
    cfg = tyro.cli(script.Config, args=rest, default=script.Config(**recipe))
    if data != "celeba":
        return script, cfg, script.load_images(cfg)
    images = torch.randint(256, (options.n_images, 3, 32, 32), dtype=torch.uint8)
    return script, cfg, (images, images[:64])


def main():
    options, rest = tyro.cli(Options, description=__doc__, return_unknown_args=True)
    script, cfg, images = set_up(options, rest)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    where = torch.cuda.get_device_name() if gpu else "CPU"
    threads = "" if gpu else f", threads: {torch.get_num_threads()}"
    result = {
        "command": " ".join(["python benchmarks/speed.py", *sys.argv[1:]]),
        **{"script": options.script, "data": options.data},
        **{"shape": "x".join(map(str, images[0].shape[1:]))},
        **{"device": where + threads, "gpu": gpu},
        **{"torch": torch.__version__.split("+")[0], "pairs": []},
    }
    keep = Path(options.json).write_text if options.json else lambda text: None
    with tempfile.TemporaryDirectory() as folder:
        files = plain.write_files(folder, 256) if options.data == "celeba" else []
        later = []
        for n_feat in options.n_feat or ((32, 128) if gpu else (cfg.n_feat,)):
            for batch in options.batch or ((256, 1024) if gpu else (64,)):
                one = replace(cfg, n_feat=n_feat, batch=batch)
                pair, busy = measure(script, one, images, files, options, device)
                result["pairs"].append(pair)
                later.append(busy)
                keep(json.dumps(result, indent=1) + "\n")
        for pair, busy in zip(result["pairs"], later, strict=True):
            if gpu:
                forget_compiled()
            for row in (row for row in pair["rows"] if row["what"] in busy):
                seconds, rate = busy[row["what"]](), row["images_per_s"]
                row["idle"] = seconds and 1 - seconds * rate / pair["batch"]
    print(report(result))
    keep(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"speed.py: {error}")
