"""Every script on a GPU: on a pretended one everywhere, on a real one where it is.

A pretended GPU (pretended.py) shows tensors on the wrong device and what makes Python
wait for the GPU. It cannot show a kernel that is missing, wrong or slow.
"""

import copy  # noqa: F401  (a line of DOES)
import importlib
import json
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import isfinite
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same_run, command_line, state
from PIL import Image
from pretended import pretended

import supersample

STAGES = "--stages 0.8 0.4 0 --epochs-per-stage 4 4 4"
RUNS = {
    "base": "superminddpm",
    "curriculum": f"supercurriculum {STAGES}",
    "sparse": f"supersparse {STAGES} --sparsity 0.8 0.4 0",
    "penalty": f"superreg {STAGES}",
    "prox": f"superreg {STAGES} --reg prox --lambda-max 1e-3",
    "objective": "superobjective --schedule linear --loss l1",
    "guide": "superguide",
    "attention": "superarch --arch attention --widths 1 1 --dropout 0.2",
    "naive": "superarch --arch naive --bf16",
    "flow": "superflow --t-density logit-normal --heun",
    "video": "supervideo --seq-len 2 --flow-weight",
}
COMPILED = "base objective guide video".split()  # the latter keep tensors at hand
REAL = {**RUNS, "base-bf16": "superminddpm --bf16"}  # only on a real GPU
REAL |= {f"{run}-compile": f"{RUNS[run]} --compile" for run in COMPILED}
EPOCH, STEPS = 5, 10  # steps; the second epoch of two ends with a row of metrics


def lines(run, device, *draws):
    """Return what a user types to train, to go on, and to draw 4 images on devices."""
    train = f"{REAL[run]} --data tiny --every 2 --warmup 0 --out {run} --quiet"
    train += f" --device {device} --steps"
    draw = f"supersample --sample {run}/last.pt --n-samples 4 --sampling-steps 8"
    draw += " --quiet --guidance" + (" 0 3" if run.startswith("guide") else " 1")
    drawn = [f"{draw} --out {run}-{place} --device {place}" for place in draws]
    return [f"{train} {STEPS}", f"{train} {STEPS + 2} --resume", *drawn]


def type_in(lines, total):
    """Run command lines; return total(), the waits so far, at the end of each step."""
    counts, step = [], torch.optim.Adam.step

    def spy(self):
        step(self)
        counts.append(total())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", spy)
        for line in lines:
            script, _, options = line.partition(" ")
            assert command_line(importlib.import_module(script), options) == 0, line
    return counts


def steps_that_wait(run, counts):
    """Return {step: waits from its end to the end of the next one}, but for zeros.

    Steps with a row of metrics are left out, and the wait as an epoch begins, when the
    order of its images is sent.
    """
    rows = {row["step"] for row in state(run)["history"]}
    waits = {k: counts[k] - counts[k - 1] - (k % EPOCH == 0) for k in range(1, STEPS)}
    return {k: n for k, n in waits.items() if k not in rows and n > 0}


# What a line does on a GPU: x (3,) and i (2,) lie there, c and j on the CPU.
DOES = {
    "raises": """x + c
        torch.cat([x, c])
        torch.stack([x.sum(), c.sum()])
        c[i]
        x.index_put_((i,), c[:2])
        x.numpy()
        torch.nn.Linear(3, 3)(x)
        (x * weight).sum().backward() or weight.grad + c
        torch.randn(3, device=gpu, generator=torch.Generator())
        torch.rand(3, generator=torch.Generator(gpu))""",
    "waits": """x.sum().item()
        bool((x > 0).all())
        range(i[0])
        x[i[0]]
        x[x > 0]
        x[j]
        x[[0, 1]]
        x.nonzero()
        x.tolist()
        torch.equal(x, x + 0)
        x.to("cpu", torch.float16)
        c.to(x)
        x.copy_(c)
        x.__setitem__(i, 1)
        x.repeat_interleave(x.long())
        torch.tensor([1.0, 2.0], device=gpu)""",
    "neither": """x * c[0]
        x[i] + x[1]
        x.masked_fill_(x > 0, 1)
        c.to(gpu, non_blocking=True) + x
        x.to(x) + x.new_zeros(3) + torch.zeros_like(x) + copy.deepcopy(weight)
        x.repeat_interleave(2)
        torch.arange(3, device=x.device) + x
        torch.randn(3, device=gpu, generator=torch.Generator(gpu)) + x
        torch.stack([*x]).mean() + x
        torch.nn.utils.clip_grad_norm_([weight], 1.0) + x
        torch.optim.Adam([weight], fused=True).step()""",
}
DOES = {x.strip(): what for what, text in DOES.items() for x in text.split("\n")}


def try_out(lines, total):
    """Return {line: what it does}."""
    did, gpu = {}, torch.accelerator.current_accelerator()
    for line in lines:
        c, j = torch.ones(3), torch.tensor([0, 1])
        x, i, weight = c.to(gpu), j.to(gpu), torch.nn.Parameter(c.to(gpu))
        weight.grad = x.clone()
        before = total()
        try:
            eval(line, globals(), locals())
            did[line] = "waits" if total() > before else "neither"
        except (RuntimeError, TypeError, ValueError):
            did[line] = "raises"
    return did


# ---- a pretended GPU -----------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    """Draw the grids in four steps: what is wrong on a device is wrong in each."""
    for run in RUNS.values():
        sample = importlib.import_module(run.split()[0]).DDPM.sample.__wrapped__
        monkeypatch.setattr(sample, "__defaults__", (4, 0.0, None, None))


@pytest.mark.parametrize("run", RUNS)
def test_pretended_no_devices_mix_and_no_step_waits_kernels_are_untried(
    tiny, short, run
):
    with pretended() as waits:
        counts = type_in(lines(run, "cuda", "cuda"), waits.total)
    assert len(counts) == state(run)["step"] == STEPS + 2
    assert steps_that_wait(run, counts) == {}
    assert len([*Path(f"{run}-cuda").glob("0*.png")]) == 4


@pytest.mark.parametrize("run", ["base", "sparse", "guide", "video"])
def test_pretended_images_that_stay_on_the_cpu_are_sent(tiny, short, monkeypatch, run):
    """As a set of 4 GiB is. A step sends its images, and their numbers where the GPU
    looks up labels or motion by them."""
    monkeypatch.setattr(torch.Tensor, "nbytes", 2**32)
    with pretended() as waits:
        counts = type_in(lines(run, "cuda")[:1], waits.total)
    assert counts[1] - counts[0] == 1 + (run in ("guide", "video"))


def test_pretended_a_run_and_its_images_are_those_of_the_cpu(tiny, short):
    """So nothing is left out there."""
    with pretended() as waits:
        type_in(lines("base", "cuda", "cuda"), waits.total)
    Path("base").rename("pretended")
    type_in(lines("base", "cpu", "cpu"), waits.total)
    assert_same_run("base", "pretended")
    for own in sorted(Path("base-cpu").glob("*.png")):
        assert own.read_bytes() == Path("base-cuda", own.name).read_bytes()


@pytest.mark.parametrize("script", ["superminddpm", "superguide"])
@pytest.mark.parametrize("sampler", ["sample", "ddpm", "ddim", "heun", "dpmpp"])
def test_pretended_a_network_evaluation_waits_for_little(script, sampler):
    """At most for fresh noise, which the CPU draws."""
    script, z, counts = importlib.import_module(script), torch.randn(4, 1, 8, 8), []
    with pretended() as waits:
        ddpm = script.build(script.Config(n_feat=8), z.shape[1:]).to("cuda").eval()
        if hasattr(script, "condition"):
            script.condition(ddpm, [0, 1, 2, 3], [0.0, 1.0, 3.0, 5.0])
        for n in (4, 8):
            before = waits.total()
            if sampler == "sample":
                ddpm.sample(z.shape, n, xt=z.to("cuda"))
            else:
                noise = {"noise": lambda _: z.to("cuda")}
                supersample.solve(ddpm, z.to("cuda"), sampler, n, **noise)
            counts.append(waits.total() - before)
    assert counts[1] - counts[0] <= 4 * (sampler == "ddpm")


def test_pretended_lines_do_what_they_do_on_a_gpu():
    """The last test of this file asks a real one."""
    with pretended() as waits:
        assert try_out(DOES, waits.total) == DOES
        with pytest.raises(TypeError, match="float64"):
            torch.ones(3).to("cuda").double()


# ---- a real GPU ----------------------------------------------------------------------


def name_gpu(_, total):
    return str(torch.accelerator.current_accelerator(check_available=True) or "")


def answer(work, given):
    """Print work(given, total): total is what torch.cuda says of waits so far."""
    os.environ.pop("CUDA_VISIBLE_DEVICES")  # conftest hides the GPU from all tests
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("warn")
    torch.backends.cudnn.allow_tf32 = False  # as exact as a CPU
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        said = work(given, lambda: sum("synchroniz" in str(w.message) for w in heard))
    print(json.dumps(said))


def ask(work, given):
    """Return work(given, total) of a process that sees the GPU."""
    code = f"import test_gpu as t; t.answer(t.{work.__name__}, {given!r})"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), f"{ROOT}/tests"])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def gpu():
    return ask(name_gpu, None) or pytest.skip("no GPU: the scripts are untried on one")


def judge(run, counts, gpu):
    """The losses are finite, and those and the images that the CPU finds."""
    module, file = importlib.import_module(REAL[run].split()[0]), f"{run}/last.pt"
    rows = state(run)["history"]
    assert all(isfinite(value) for row in rows for value in row.values())
    held = module.load_images(module.read_checkpoint(file)["config"])[1] / 127.5 - 1
    loss = module.held_out_loss(module.load(file), held)["held_loss"]
    assert loss == pytest.approx(rows[-1]["held_loss"], rel=1e-3)
    for own in sorted(Path(f"{run}-cpu").glob("0*.png")):
        pair = own, Path(f"{run}-{gpu}", own.name)
        own, other = (np.asarray(Image.open(path), float) for path in pair)
        assert abs(own - other).mean() < 1
    if run.endswith("-compile"):
        loss = state(run.removesuffix("-compile"))["history"][-1]["loss"]
        assert rows[-1]["loss"] == pytest.approx(loss, rel=0.01)
    elif gpu == "cuda":
        assert steps_that_wait(run, counts) == {}


@pytest.mark.slow
def test_real_every_script_trains_goes_on_and_draws(tiny, gpu):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = partial(pool.submit, ask, type_in)
        asked = {run: work(lines(run, gpu, "cpu", gpu)) for run in REAL}
    problems = {}
    for run, counts in asked.items():
        try:
            judge(run, counts.result(), gpu)
        except Exception as error:  # tell of all scripts at once
            problems[run] = str(error)
    assert not problems, "\n\n".join(f"{run}: {x}" for run, x in problems.items())
    losses = [state(run)["history"][-1]["held_loss"] for run in ("base", "base-bf16")]
    type_in(
        [line.replace("--out base", "--out own") for line in lines("base", "cpu")], int
    )
    own = state("own")["history"][-1]["held_loss"]  # other noise alone: 0.3 %
    assert losses == pytest.approx([own, own], rel=0.02)


@pytest.mark.slow
def test_real_lines_do_what_is_pretended(gpu):
    if gpu != "cuda":
        pytest.skip(f"{gpu} does not tell what waits: the pretended GPU is unproven")
    assert ask(try_out, [*DOES]) == DOES
