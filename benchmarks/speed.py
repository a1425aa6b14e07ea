"""How fast is the training loop, and what holds it back?  On a CPU or a GPU.

    python benchmarks/speed.py                     32x32 in colour, the recipe of celeba
    python benchmarks/speed.py --data digits       8x8, n-feat 16: the default run
    python benchmarks/speed.py superreg --reg prox         another script, its options
    python benchmarks/speed.py --json speed.json           the same figures as JSON

Measures images per second, in turns, so that what disturbs one row disturbs all:
 - loop: train() of the script as it is, on random images (digits: the real ones);
 - bare: forward, backward and optimizer step of the same network on fixed tensors,
   eager, compiled, or compiled into CUDA graphs, channels first or last;
 - plain: the loop of plain.py, as people write it, on files like CelebA's.

A step is what lies between two calls of AdamW.step, so one clock stands in all of them.
The first steps of a turn, where things are compiled, do not count. On a CPU the cost of
the loop is by how much its whole time exceeds that of forward, backward, zero_grad and
step inside it; both come from the same steps. On a GPU calls return before the work is
done: there the clock waits, at the first and the last step only, and the loop is
compared to bare.
"recipe" is the time of the whole recipe at that rate, without its grids and held-out
losses: for celeba 80 epochs of 162,770 images, 13.0 million.

The roofline is what the machine would allow if nothing else took time: FLOPs (counted
as in cost.py) at the rate of a large matrix product, and bytes at that of a large copy,
both measured in the same run. The bytes of a step are those that eager autograd cannot
avoid: the activations that it keeps, written once and read once, and ten float32
numbers a weight (read forward and backward; the gradient written and read; AdamW reads
and writes the weight and two moments). Idle is the time under no kernel: the kernels as
seen by torch.profiler, against a step without the profiler. Memory is the peak of what
torch reserves; of the loop the images are part of it.
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
from typing import Annotated
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import plain
import torch
import tyro
from cost import activations, flops

N_TRAIN = {"mnist": 60_000, "fashion": 60_000, "cifar10": 50_000, "celeba": 162_770}
N_TRAIN["folder"] = 20_000  # for want of a better guess


@dataclass(frozen=True)
class Options:
    """Options of the measurement; those of the script may follow."""

    script: Annotated[str, tyro.conf.Positional] = "superminddpm"  # whose loop
    data: str = "celeba"  # whose recipe
    n_feats: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--n-feat"])] = ()
    """widths (empty: 32 and 128 on a GPU, the recipe's on a CPU)"""
    batches: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--batch"])] = ()
    """images a step (empty: 256 and 1024 on a GPU, 64 on a CPU)"""
    turns: int = 5  # of each row
    steps: int = 0  # timed steps a turn (0: 100 on a GPU, 10 on a CPU)
    n_images: int = 0  # random images to train on (0: as many as the data set has)
    n_samples: int = 0  # images to draw by DDIM (0: 10,000 on a GPU, 16 on a CPU)
    workers: int = os.cpu_count()  # processes that decode for the plain loop
    compiled: bool = False  # compiled rows also on a CPU; they want a C++ compiler
    json: str = ""  # file for the figures


# ---- The clock ---------------------------------------------------------------------
def sync():
    """Wait until the GPU, if there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Watch:
    """Inside this context, time the steps from one call of AdamW.step to another.

    marks: (seconds, seconds inside forward, backward, zero_grad and step) at the calls
    number first and last, from 0. profiler: started at the one, stopped at the other.
    """

    def __init__(self, script, first, last, profiler=None):
        self.first, self.last, self.profiler = first, last, profiler
        self.calls, self.inside, self.marks, self.stack = 0, 0.0, [], ExitStack()
        adamw = torch.optim.AdamW
        self.parts = [(script.DDPM, "forward"), (torch.Tensor, "backward")]
        self.parts += [(adamw, "zero_grad"), (adamw, "step")]

    def timed(self, function, is_step):
        def call(*args, **options):
            if is_step:
                self.tick()
            start = time.perf_counter()
            result = function(*args, **options)
            self.inside += time.perf_counter() - start
            return result

        return call

    def tick(self):
        if self.calls in (self.first, self.last):
            sync()
            self.marks.append((time.perf_counter(), self.inside))
            if self.profiler:
                (self.profiler.stop if self.marks[1:] else self.profiler.start)()
        self.calls += 1

    def __enter__(self):
        for owner, name in self.parts:
            new = self.timed(getattr(owner, name), name == "step")
            self.stack.enter_context(patch.object(owner, name, new))
        return self

    def __exit__(self, *error):
        self.stack.close()


def step_time(script, run, first, count):
    """Return seconds a step of run, and of them inside its bare calls."""
    with Watch(script, first, first + count) as watch:
        run(first + count + 1)
    (start, inside), (end, inside_too) = watch.marks
    return (end - start) / count, (inside_too - inside) / count


def covered(spans):
    """Return the length of the union of spans (start, end)."""
    total, reach = 0, -math.inf
    for start, end in sorted(spans):
        total += max(0, end - max(start, reach))
        reach = max(reach, end)
    return total


def busy_time(script, run, first, count):
    """Return seconds a step in which the GPU runs any kernel; None: none was seen."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    with Watch(script, first, first + count, profiler):
        run(first + count + 1)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in kinds]
    return covered(spans) / 1e6 / count or None


# ---- The loops: each is a function run(n) that makes n optimizer steps --------------
def loop(script, cfg, images, n):
    """Make n steps of the script's own loop, on images as of load_images."""
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(script, "load_images", lambda cfg: images),
        patch.object(script, "held_out_loss", lambda *_: {1: 1.0}),
        patch.object(script, "plot_history", lambda *_: None),
        patch.object(script.DDPM, "sample", lambda self, shape, *_, xt, **__: xt),
    ):
        script.train(replace(cfg, steps=n, out=f"{folder}/run"))


def new(script, cfg, shape, device):
    torch.manual_seed(0)
    return script.build(cfg, shape).to(device)


def bare(script, cfg, shape, device, mode, last, n):
    """Make n steps on fixed tensors.  mode: of torch.compile, or eager."""
    ddpm = new(script, cfg, shape, device)
    x0, eps = torch.randn(2, cfg.batch, *shape, device=device)
    t = torch.randint(1, cfg.T + 1, (cfg.batch,), device=device)
    if last:
        ddpm = ddpm.to(memory_format=torch.channels_last)
        x0, eps = (x.to(memory_format=torch.channels_last) for x in (x0, eps))
    if mode != "eager":
        ddpm.net.compile(mode=mode)
    opt = torch.optim.AdamW(ddpm.parameters(), betas=(0.9, 0.99), fused=True)
    for _ in range(n):
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()  # graphs reuse their memory
        opt.zero_grad()
        ddpm(x0, t, eps).backward()
        opt.step()


# ---- What the machine allows -------------------------------------------------------
def rate(function, work, times):
    """Return work a second of function, the best of some goes of several calls."""
    best = math.inf
    for _ in range(4):
        sync()
        start = time.perf_counter()
        for _ in range(times):
            function()
        sync()
        best = min(best, (time.perf_counter() - start) / times)
    return work / best


def machine(device, dtype):
    """Return bytes a second of a large copy, FLOP/s of a large matrix product."""
    gpu = device.type == "cuda"
    a = torch.empty(2**30 if gpu else 2**27, dtype=torch.uint8, device=device)
    b = torch.zeros_like(a)
    side = 8192 if gpu else 1024
    m = torch.randn(side, side, device=device, dtype=dtype)
    times = 10 if gpu else 2  # in a row, so that waiting for a GPU does not count
    copying = rate(lambda: a.copy_(b), 2 * a.nbytes, times)
    return copying, rate(lambda: m @ m, 2 * side**3, times)


def draw(ddpm, shape, n, batch):
    """Return images a second of DDIM with 50 network calls."""
    batch = min(n, batch)
    ddpm.sample((batch, *shape), 2)
    sync()
    start = time.perf_counter()
    for k in range(0, n, batch):
        ddpm.sample((min(batch, n - k), *shape), 50)
    sync()
    return n / (time.perf_counter() - start)


# ---- The measurement ---------------------------------------------------------------
def rows_of(script, cfg, images, files, options, device):
    """Return {what: run} of all rows for one network and batch."""
    shape, gpu = images[0].shape[1:], device.type == "cuda"
    step = partial(bare, script, cfg, shape, device)
    runs = {"loop": partial(loop, script, replace(cfg, compile=False), images)}
    if gpu or options.compiled:
        whole = replace(cfg, compile=True)
        runs["loop, --compile"] = partial(loop, script, whole, images)
        runs["bare, compiled"] = partial(step, "default", False)
    runs["bare, eager"] = partial(step, "eager", False)
    if gpu:
        runs["bare, eager, channels last"] = partial(step, "eager", True)
        runs["bare, compiled, channels last"] = partial(step, "default", True)
    if options.data in ("celeba", "folder") and len(shape) == 3:  # files; no clips
        precise = replace(cfg, bf16=False)

        def run_plain(n):
            ddpm = new(script, precise, shape, device)
            plain.train_on_files(ddpm, files, shape, cfg.batch, options.workers, n)

        runs["plain"] = run_plain
    if gpu:  # last, since their memory stays reserved
        graph = partial(step, "reduce-overhead")
        runs["bare, CUDA graphs"] = partial(graph, False)
        runs["bare, CUDA graphs, channels last"] = partial(graph, True)
    return runs


def roofline(script, cfg, shape, device, allowed):
    """Return FLOPs and bytes an image, and the images/s that they allow."""
    ddpm = new(script, cfg, shape, device)
    weights = list(ddpm.parameters())

    def loss(n):
        x0, eps = (torch.randn(n, *shape, device=device) for _ in range(2))
        return ddpm(x0, torch.ones(n, dtype=torch.long, device=device), eps)

    size, one = sum(w.nbytes for w in weights), flops(loss)
    moved = 2 * activations(loss) + 10 * size / cfg.batch
    return {
        **{"weights": size // 4, "flop_image": one, "bytes_image": moved},
        **{"bound_bytes": allowed[0] / moved, "bound_flop": allowed[1] / one},
    }


def forget_compiled():
    """Drop compiled code: a second batch size would be compiled for any size."""
    torch.compiler.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # not silently eager


def times_of(script, cfg, runs, spans, options, gpu):
    """Return {what: [step_time]} over the turns, and {what: peak of the memory}.

    What cannot be compiled or does not fit into the memory is named and left out.
    """
    times, peak = {what: [] for what in runs}, {}
    for turn in range(-1 if gpu else 0, options.turns):  # -1: to warm up
        for what in list(times):
            gc.collect()
            if gpu and turn < 0:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                both = step_time(script, runs[what], *spans[what])
            except Exception as error:  # compilers raise nearly anything
                needed = "compile" not in what and "graphs" not in what
                if needed and not isinstance(error, torch.OutOfMemoryError):
                    raise
                why = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
                print(f"n-feat {cfg.n_feat}, batch {cfg.batch}, {what}: {why}")
                del times[what]
                continue
            if turn >= 0:
                times[what].append(both)
            elif gpu:
                peak[what] = torch.cuda.max_memory_reserved()
    return times, peak


def measure(script, cfg, images, files, options, device, allowed):
    """Return the figures of one network and batch, as a dict for JSON.

    And functions {what: busy_time}, to be called when all pairs have been timed: a GPU
    may be slower once the profiler has run.
    """
    gpu, shape = device.type == "cuda", images[0].shape[1:]
    if gpu or options.compiled:
        forget_compiled()
    runs = rows_of(script, cfg, images, files, options, device)
    first, count = (20, options.steps or 100) if gpu else (2, options.steps or 10)
    several = max(1, options.workers)  # they deliver in bursts: time whole rounds
    spans = dict.fromkeys(runs, (first, count))
    spans["plain"] = max(first, several), math.ceil(count / several) * several
    times, peak = times_of(script, cfg, runs, spans, options, gpu)
    recipe = script.Config(data=options.data)
    due = recipe.epochs * (len(images[0]) // recipe.batch * recipe.batch)
    rows, busy = [], {}
    for what, pairs in times.items():
        rates = sorted(cfg.batch / whole for whole, _ in pairs)
        middle = statistics.median(rates)
        row = {"what": what, "images_per_s": middle, "low": rates[0], "high": rates[-1]}
        row |= {"ms": 1000 * cfg.batch / middle, "hours": due / middle / 3600}
        if gpu:
            row |= {"idle": None, "peak": peak[what]}
            busy[what] = partial(busy_time, script, runs[what], spans[what][0], 20)
        elif what.startswith("loop"):
            costs = sorted(whole / inside - 1 for whole, inside in pairs)
            row["cost"] = statistics.median(costs), costs[0], costs[-1]
        rows.append(row)
    n = options.n_samples or (10_000 if gpu else 16)
    ddpm = new(script, cfg, shape, device)
    pair = {"n_feat": cfg.n_feat, "batch": cfg.batch, "images": due, "rows": rows}
    pair |= roofline(script, cfg, shape, device, allowed)
    pair |= {"n_samples": n, "samples_per_s": draw(ddpm, shape, n, cfg.batch)}
    return pair, busy


def best(pair, kind):
    """Return the most images/s among the rows of a kind: loop, bare or plain."""
    rows = (row for row in pair["rows"] if row["what"].startswith(kind))
    return max((row["images_per_s"] for row in rows), default=math.nan)


def report(result):
    """Return the figures of a whole run as text."""
    copied, product = result["copy_bytes_per_s"], result["matmul_flop_per_s"]
    lines = ["$ {command}", "{script}, {data}, {shape}, {device}, torch {torch}"]
    lines = [line.format(**result) for line in lines]
    lines.append(f"copy {copied / 1e9:.3g} GB/s, matrices {product / 1e12:.3g} TFLOP/s")
    for pair in result["pairs"]:
        lines += ["", "n-feat {n_feat}, batch {batch}".format(**pair)]
        head = f"{'':32}{'images/s':>10}{'(range)':>22}{'ms a step':>11}{'recipe':>11}"
        lines.append(head + ("    idle      memory" if result["gpu"] else ""))
        for row in pair["rows"]:
            spread = "({low:,.1f} to {high:,.1f})".format(**row)
            line = f"{row['what']:32}{row['images_per_s']:10,.1f}{spread:>22}"
            line += f"{row['ms']:11.2f}{row['hours']:9.3g} h"
            if result["gpu"]:
                idle = row["idle"]
                line += f"{idle:8.0%}" if idle is not None else f"{'?':>8}"
                line += f"{row['peak'] / 2**30:8.2f} GiB"
            if "cost" in row:
                line += "   cost {:.1%} ({:.1%} to {:.1%})".format(*row["cost"])
            lines.append(line)
        quick, bound = best(pair, "loop"), min(pair["bound_flop"], pair["bound_bytes"])
        against = f"{quick / best(pair, 'bare'):.0%} of the best bare, "
        if not math.isnan(best(pair, "plain")):
            against += f"{quick / best(pair, 'plain'):.2f} times plain, "
        lines += [
            f"loop: {against}{quick / bound:.0%} of the roofline",
            f"roofline: {pair['bound_flop']:,.0f} images/s by FLOPs, "
            f"{pair['bound_bytes']:,.0f} by bytes (an image: "
            f"{pair['flop_image'] / 1e9:.3g} GFLOP, "
            f"{pair['bytes_image'] / 1e6:.3g} MB)",
            f"DDIM, 50 calls: {pair['samples_per_s']:.3g} images/s, "
            f"{pair['n_samples']:,} drawn",
        ]
    return "\n".join(lines)


def random_images(n, channels, size):
    """Return what load_images returns: n random images, and some as held out."""
    images = torch.randint(256, (n, size, size, channels), dtype=torch.uint8)
    images = images.permute(0, 3, 1, 2)  # the layout in memory of real ones
    labels = torch.arange(n) % 10
    return images, labels, images[:64], labels[:64]


def main():
    options, rest = tyro.cli(Options, description=__doc__, return_unknown_args=True)
    script = importlib.import_module(options.script)
    cfg = script.parse(["--data", options.data, *rest])
    cfg = replace(cfg, quiet=True, sample_every=10**6, save_every=10**6)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    if options.data == "digits":
        images = script.load_images(cfg)
    else:
        channels = 1 if options.data in ("mnist", "fashion") else 3
        n = options.n_images or N_TRAIN[options.data]
        images = random_images(n, channels, cfg.image_size)
    shape = tuple(images[0].shape[1:])
    fast = gpu and new(script, cfg, shape, device).bf16
    allowed = machine(device, torch.bfloat16 if fast else torch.float32)
    where = torch.cuda.get_device_name() if gpu else "CPU"
    threads = "" if gpu else f", threads: {torch.get_num_threads()}"
    result = {
        "command": " ".join(["python benchmarks/speed.py", *sys.argv[1:]]),
        **{"script": options.script, "data": options.data},
        **{"shape": "x".join(map(str, shape)), "device": where + threads, "gpu": gpu},
        "torch": torch.__version__.split("+")[0],
        **{"copy_bytes_per_s": allowed[0], "matmul_flop_per_s": allowed[1]},
        "pairs": [],
    }
    keep = Path(options.json).write_text if options.json else lambda text: None
    with tempfile.TemporaryDirectory() as folder:
        files, later = plain.write_files(folder, 256), []
        for n_feat in options.n_feats or ((32, 128) if gpu else (cfg.n_feat,)):
            for batch in options.batches or ((256, 1024) if gpu else (64,)):
                one = replace(cfg, n_feat=n_feat, batch=batch)
                pair, busy = measure(
                    script, one, images, files, options, device, allowed
                )
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
    main()
