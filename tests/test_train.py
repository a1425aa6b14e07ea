"""Training: what is drawn, processes, resuming, killing, the run folder, bad input."""

import csv
import dataclasses
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.run
from conftest import ROOT, assert_same_run, command_line, finish, start, state
from torchvision.io import ImageReadMode, decode_image

import superminddpm as base
from superminddpm import Config, train


def small(out, steps=15, **changes):
    """Return a Config of a short run on the folder tiny: 5 steps an epoch."""
    own = {"data": "tiny", "n_feat": 8, "batch": 32, "lr": 5e-3, "every": 1}
    own |= {"ema_decay": 0.9, "quiet": True, "out": str(out), "steps": steps}
    return Config(**{**own, **changes})


def run(*args, **changes):
    """Train a short run; return its last checkpoint."""
    cfg = small(*args, **changes)
    train(cfg)
    return state(cfg.out)


def spy_on_forward(monkeypatch, look):
    """Call look(ddpm, x0, t, eps) before each training loss."""
    forward = base.DDPM.forward

    def spy(self, x0, t, eps):
        if self.training:
            look(self, x0, t, eps)
        return forward(self, x0, t, eps)

    monkeypatch.setattr(base.DDPM, "forward", spy)


# ---- what a run is -------------------------------------------------------------------


def test_a_run_leaves_what_the_readme_promises(tiny):
    ddpm = train(small("run", steps=0, epochs=4, every=2))
    assert {path.name for path in Path("run").iterdir()} == {
        *("metrics.csv", "last.pt", "samples_epoch_002.png", "samples_epoch_004.png"),
        *("checkpoint_epoch_002.pt", "checkpoint_epoch_004.pt"),
    }
    with open("run/metrics.csv") as f:
        rows = list(csv.DictReader(f))
    assert [(row["step"], row["epoch"]) for row in rows] == [("10", "2"), ("20", "4")]
    levels = [float(rows[-1][key]) for key in rows[-1] if key.startswith("held_t")]
    assert len(levels) == 10 and all(level > 0 for level in levels)
    assert sum(levels) / 10 == pytest.approx(float(rows[-1]["held_loss"]))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert state("run").keys() >= {*"net ema opt step config".split()}
    loaded = zip(base.load("run/last.pt").parameters(), ddpm.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in loaded)
    raw = base.load("run/last.pt", ema=False)
    assert not torch.equal(raw.net.out.weight, ddpm.net.out.weight)


def trivial_and_linear(images, held, level):
    """Return the held-out losses at t = level of two answers that need no network.

    eps_hat = x_t, and the best linear one, from the mean and covariance of images.
    """
    ab = base.DDPM(None).alphabar[level].double()
    x, y = ((z.flatten(1) / 127.5 - 1).double() for z in (images, held))
    values, vectors = torch.linalg.eigh(torch.cov(x.T))
    power = ((y - x.mean(0)) @ vectors).square().mean(0)
    keep = ab * values / (ab * values + 1 - ab)  # Wiener filter of each component
    linear = (1 - keep).square() * power + keep.square() * (1 - ab) / ab
    trivial = ab * y.square().mean() + ((1 - ab).sqrt() - 1) ** 2
    return trivial.item(), (ab / (1 - ab) * linear.mean()).item()


def test_training_learns():
    """On digits, after a tenth of the default run."""
    cfg = Config(steps=200, n_feat=8, out="run", quiet=True, every=1000)
    images, held = base.load_images(cfg)
    losses = base.held_out_loss(train(cfg), held / 127.5 - 1)
    for level in (50, 550, 750):
        trivial, _ = trivial_and_linear(images, held, level)
        assert losses[f"held_t{level}"] < 0.8 * trivial


@pytest.mark.slow
def test_after_the_default_run_no_level_is_worse_than_a_trivial_answer():
    """Nor, above t = 500, by 15 % worse than the best linear one."""
    cfg = Config(out="run", quiet=True, every=1000)
    images, held = base.load_images(cfg)
    losses = base.held_out_loss(train(cfg), held / 127.5 - 1)
    for level in range(50, 1000, 100):
        trivial, linear = trivial_and_linear(images, held, level)
        assert losses[f"held_t{level}"] < trivial
        assert losses[f"held_t{level}"] < 1.15 * linear or level < 500


def test_digits_are_sklearns_and_a_fixed_fifth_is_held_out():
    images, held = base.load_images(Config())
    assert images.shape == (1438, 1, 8, 8) and held.shape == (359, 1, 8, 8)
    assert images.dtype == torch.uint8 and images.max() == 255
    from sklearn.datasets import load_digits

    theirs = sorted((load_digits().images * 255 / 16).round().reshape(-1, 64).tolist())
    assert sorted(torch.cat([images, held]).flatten(1).float().tolist()) == theirs


def test_a_folder_is_mapped_and_never_written(tiny):
    images, held = base.load_images(small("x"))
    assert images.shape == (160, 1, 8, 8) and len(held) == 40
    maps = Path("/proc/self/maps").read_text()
    lines = [line for line in maps.splitlines() if line.endswith("tiny/train.npy")]
    assert lines and all(line.split()[1] == "r--s" for line in lines)


def test_every_image_is_seen_once_an_epoch_in_a_new_order(tiny, monkeypatch):
    seen = []
    spy_on_forward(monkeypatch, lambda self, x0, t, eps: seen.append(x0.clone()))
    run("run", steps=10)
    images = base.load_images(small("x"))[0] / 127.5 - 1
    epochs = [torch.cat(seen[:5]), torch.cat(seen[5:])]
    for epoch in epochs:
        assert sorted(epoch.flatten(1).tolist()) == sorted(images.flatten(1).tolist())
    assert not torch.equal(*epochs)


def test_flip_mirrors_the_images_of_every_other_step(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(base, "save_grid", lambda *_: None)
    spy_on_forward(monkeypatch, lambda self, x0, t, eps: seen.append(x0.clone()))
    run("run", steps=3, batch=160, every=99, flip=True)  # all images in each step
    images = base.load_images(small("x"))[0] / 127.5 - 1
    for x0, want in zip(seen, (images, images.flip(-1), images), strict=True):
        assert sorted(x0.flatten(1).tolist()) == sorted(want.flatten(1).tolist())


def test_another_seed_has_other_weights_order_t_and_noise(tiny, monkeypatch):
    seen = []

    def record(self, *drawn):
        seen.append([self.net.init.weight.detach().clone(), *drawn])

    monkeypatch.setattr(base, "save_grid", lambda *_: None)
    spy_on_forward(monkeypatch, record)
    for seed in (0, 1):
        run(f"run{seed}", steps=1, seed=seed)
    for one, other in zip(*seen, strict=True):
        assert not torch.equal(one, other)


def test_t_is_uniform_up_to_T_and_noise_is_normal_and_new(tiny, monkeypatch):
    ts, noise = [], []

    def record(self, x0, t, eps):
        ts.append(t)
        noise.append(eps)

    spy_on_forward(monkeypatch, record)
    run("run", steps=200, T=50, every=1000)
    counts = torch.bincount(torch.cat(ts), minlength=51)
    assert counts[0] == 0 and len(counts) == 51
    chi2 = ((counts[1:] - 128) ** 2 / 128).sum()
    assert chi2 < 85  # 49 degrees of freedom: 1 in 1000
    eps = torch.cat(noise)
    assert abs(eps.mean()) < 0.01 and abs(eps.std() - 1) < 0.01
    assert len(eps.flatten(1).unique(dim=0)) == len(eps)


def test_the_held_out_loss_is_fixed_and_exact():
    """Against a plain loop over images, one at a time, at the middles of ten bands."""
    ddpm = base.build(Config(n_feat=8, T=50), (1, 8, 8))
    torch.nn.init.normal_(ddpm.net.out.weight)
    held = base.load_images(Config())[1][:30] / 127.5 - 1
    torch.manual_seed(1)
    first = base.held_out_loss(ddpm, held)
    torch.manual_seed(2)
    assert base.held_out_loss(ddpm, held) == first
    levels = [2, 8, 12, 18, 22, 28, 32, 38, 42, 48]
    assert list(first) == ["held_loss", *(f"held_t{level}" for level in levels)]
    eps, errors = torch.randn(held.shape, generator=base.rng("cpu", 22)), []
    for x0, noise in zip(held, eps, strict=True):
        xt = ddpm.q_sample(x0[None], torch.tensor([22]), noise[None])
        guess = xt[0] + ddpm.net(xt, torch.tensor([22]))[0]
        errors.append((guess - noise).square().mean().item())
    assert sum(errors) / 30 == pytest.approx(first["held_t22"], rel=1e-4)


def test_metrics_and_upper_rows_are_of_the_averaged_weights(tiny):
    """The raw weights have another held-out loss; only the third row is theirs."""
    cfg = small("run", steps=5, seed=1)
    ema = train(cfg)
    raw, held = base.load("run/last.pt", ema=False), base.load_images(cfg)[1]
    held = held / 127.5 - 1
    row = state("run")["history"][-1]
    assert row["held_loss"] == base.held_out_loss(ema, held)["held_loss"]
    assert row["held_loss"] != base.held_out_loss(raw, held)["held_loss"]
    grid = decode_image("run/samples_epoch_001.png", ImageReadMode.GRAY)[0] / 127.5 - 1
    xt = torch.randn(32, 1, 8, 8, generator=base.rng("cpu", 1, 3))
    drawn = [ema.sample(xt.shape, xt=xt), raw.sample(xt[:16].shape, xt=xt[:16])]
    for k, image in enumerate(torch.cat([*drawn, held[:16]])):
        y, x = 66 * (k // 16) + 2, 66 * (k % 16) + 2  # 64 pixels and a gap of 2
        shown = grid[y : y + 64 : 8, x : x + 64 : 8]
        torch.testing.assert_close(shown, image[0], atol=0.01, rtol=0)


def test_the_average_warms_up_and_then_decays(tiny, monkeypatch):
    """Against a plain loop over the weights as each step finds and leaves them."""
    raw = []

    def record(self, *_):
        raw.append(self.net.out.bias.detach().clone())

    spy_on_forward(monkeypatch, record)
    last = run("run", steps=12, ema_decay=0.5, warmup=0, every=99)
    raw.append(last["net"]["net.out.bias"])
    want = raw[0]
    for step, weight in enumerate(raw[1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * weight
    assert len(raw) == 13 and (raw[-1] - want).abs().max() > 1e-4
    torch.testing.assert_close(last["ema"]["net.out.bias"], want)
    off = run("off", steps=3, ema_decay=0.0)
    assert torch.equal(off["ema"]["net.out.bias"], off["net"]["net.out.bias"])


def test_the_learning_rate_rises_and_falls_linearly(tiny, monkeypatch):
    monkeypatch.setattr(base, "save_grid", lambda *_: None)
    batch = {"batch": 160, "every": 1}  # one step an epoch
    rates = [
        row["lr"] for row in run("run", steps=20, lr=1.0, warmup=4, **batch)["history"]
    ]
    assert rates == pytest.approx(
        [min(1, (step + 1) / 5) * (1 - step / 20) for step in range(20)]
    )


def test_clipping_limits_the_step_and_adam_has_no_weight_decay(tiny):
    free = run("free", steps=1, grad_clip=0.0)
    held = run("clip", steps=1, grad_clip=0.01)

    def norm(s):  # after one step Adam's first moment is a tenth of the gradient
        moments = (m["exp_avg"] * 10 for m in s["opt"]["state"].values())
        return sum(m.square().sum() for m in moments).sqrt().item()

    assert norm(free) > 0.02 and norm(held) == pytest.approx(0.01, rel=1e-3)
    assert free["opt"]["param_groups"][0]["weight_decay"] == 0


# ---- processes -----------------------------------------------------------------------


def work(cfg):
    """Train as a worker; write down which images this process got first."""
    first, forward = [], base.DDPM.forward

    def spy(self, x0, t, eps):
        first.append(x0.clone())
        return forward(self, x0, t, eps)

    base.DDPM.forward = spy
    train(cfg)
    torch.save(first[0], f"seen{os.environ['RANK']}.pt")
    torch.distributed.is_initialized() and torch.distributed.destroy_process_group()


def test_two_processes_do_what_one_does(tiny):
    one = run("one", steps=20)
    assert finish(start(work, small("two", steps=20), world=2)) == [0, 0]
    two = state("two")
    for name, weight in one["net"].items():
        torch.testing.assert_close(weight, two["net"][name], atol=1e-4, rtol=0)
    slices = [torch.load(f"seen{rank}.pt").flatten(1) for rank in (0, 1)]
    assert len(slices[0]) == len(slices[1]) == 16
    assert torch.cdist(*slices).min() > 0  # no image on both
    losses = [[row["loss"] for row in s["history"]] for s in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # the mean over both


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2: 2 cpu here"),
        ({"RANK": "1"}, "rank 1 of 1: 1 cpu here"),
        ({"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}, "rank 8 of 8"),
    ],
)
def test_a_rank_that_does_not_fit_is_refused(tiny, monkeypatch, capsys, env, said):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert command_line(base, "--data tiny --out run") == 2
    assert said in capsys.readouterr().err and not Path("run").exists()


def test_more_processes_than_gpus_are_refused_in_one_line(tiny, monkeypatch, capsys):
    """All processes of the machine see it, the first one says it."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: gpu)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    said = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert command_line(base, "--data tiny --out run") == 2
        said.append(capsys.readouterr().err)
    line = "superminddpm.py: rank 0 of 2: 1 cuda here (--device cpu?)\n"
    assert said == [line, ""] and not Path("run").exists()
    with pytest.raises(ValueError, match="rank 1 of 2: 0 mps here"):
        base.join_processes(small("run", device="mps"))
    # the hint is right: on the CPU two do fit, but not with the GPU's own backend
    said.clear()
    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([("store", 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda **how: said.append(how))
    base.join_processes(small("run", device="cpu"))
    assert said == [{"store": "store", "rank": 1, "world_size": 2, "backend": "gloo"}]
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    base.join_processes(small("run"))
    assert said[1]["device_id"] == torch.device("cuda", 1) and len(said[1]) == 4


def test_clips_are_refused_by_name(tiny):
    for part in ("train", "held"):
        images = np.load(f"tiny/{part}.npy")
        np.save(f"tiny/{part}.npy", images.reshape(-1, 4, *images.shape[1:]))
    with pytest.raises(ValueError, match="tiny holds clips, not images"):
        train(small("run", batch=8))
    assert not Path("run").exists()


def test_a_batch_that_the_processes_do_not_divide_is_refused(tiny, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(base, "join_processes", lambda cfg: (cpu, 0, 3))
    with pytest.raises(ValueError, match="--batch: at most 160, divisible by 3 ranks"):
        train(small("run"))
    assert not Path("run").exists()


# ---- going on ------------------------------------------------------------------------


def test_a_resumed_run_equals_an_uninterrupted_one(tiny, monkeypatch):
    run("whole", steps=15, every=2)
    run("parts", steps=15, every=2)
    os.remove("parts/last.pt")
    os.rename("parts/checkpoint_epoch_002.pt", "parts/last.pt")
    assert state("parts")["step"] == 10
    steps = []
    spy_on_forward(monkeypatch, lambda *_: steps.append(1))
    run("parts", steps=15, every=2, resume=True)
    assert len(steps) == 5  # it goes on: to start over would end alike
    assert_same_run("whole", "parts")
    tables = [Path(name, "metrics.csv").read_text() for name in ("whole", "parts")]
    assert tables[0] == tables[1] and tables[0].count("\n") == 3


def kill_until_done(cfg, world, kills, dice):
    """Kill start after start of a run at random moments; at last let one end."""
    done, n = Path("seen0.pt"), 0
    done.unlink(missing_ok=True)
    last, first = (Path(cfg.out, f"{x}.pt") for x in ("last", "checkpoint_epoch_001"))
    born = set()
    while not done.exists():
        workers = start(work, cfg, world=world)
        if n < kills:
            before, deadline = written(cfg.out), time.time() + 60
            while written(cfg.out) == before and time.time() < deadline:
                time.sleep(0.002)  # until it has come a little further than last time
            time.sleep(dice.random() * 0.15)
            for worker in workers:
                worker.kill()
            n += 1
        assert set(finish(workers)) <= {0, -signal.SIGKILL}
        born |= {first.stat().st_mtime_ns} if last.exists() else set()
    assert len(born) == 1  # no start began again with the first epoch
    return n


def written(folder):
    files = Path(folder).glob("*") if Path(folder).exists() else []
    found = []
    for path in files:
        try:
            found.append((path.name, path.stat().st_mtime_ns))
        except FileNotFoundError:  # it has just been renamed
            found.append((path.name, None))
    return sorted(found)


def test_sigkill_loses_nothing(tiny):
    run("whole", steps=40)
    killed = small("killed", steps=40, resume=True)
    assert kill_until_done(killed, 1, 1, random.Random(0)) == 1
    assert_same_run("whole", "killed")


@pytest.mark.slow
@pytest.mark.parametrize(("world", "kills"), [(1, 12), (2, 8)])
def test_sigkill_at_any_moment_loses_nothing(tiny, world, kills):
    assert finish(start(work, small("whole", steps=80), world=world)) == [0] * world
    killed = small("killed", steps=80, resume=True)
    assert kill_until_done(killed, world, kills, random.Random(world)) >= 3
    assert_same_run("whole", "killed")


def test_a_kill_in_the_middle_of_a_save_spares_the_older_checkpoint(tiny):
    content = run("run", steps=5)
    pid = os.fork()
    if pid == 0:
        write = Path.write_bytes

        def die_halfway(path, data):
            write(path, bytes(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        Path.write_bytes = die_halfway
        base.save_run(Path("run"), 2, {**content, "step": 10})
    os.waitpid(pid, 0)
    assert state("run")["step"] == 5 and Path("run/part").exists()
    base.save_run(Path("run"), 2, {**content, "step": 10})
    assert state("run")["step"] == 10


def test_a_full_disk_spares_the_older_checkpoint(tiny):
    """A limit on the size of files stands for the full disk."""
    content = run("run", steps=5)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            base.save_run(Path("run"), 2, {**content, "step": 10})
        except OSError:
            os._exit(7)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert state("run")["step"] == 5


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_the_run_and_is_never_saved(tiny, monkeypatch, where):
    forward, calls = base.DDPM.forward, []

    def spoil(self, x0, t, eps):
        loss = forward(self, x0, t, eps)
        calls.append(self.training)
        if self.training and sum(calls) == 8:
            if where == "loss":
                return loss * float("nan")
            loss.register_hook(lambda grad: grad * float("nan"))
        return loss

    monkeypatch.setattr(base.DDPM, "forward", spoil)
    with pytest.raises(ValueError, match="the loss is nan in epoch 2"):
        run("run")
    assert state("run")["step"] == 5
    assert all(value.isfinite().all() for value in state("run")["net"].values())


def test_a_run_is_never_overwritten(tiny):
    run("run", steps=2)
    before = Path("run/last.pt").read_bytes()
    with pytest.raises(ValueError, match="run holds a run: add --resume"):
        run("run", steps=4)
    assert Path("run/last.pt").read_bytes() == before


def test_on_resume_more_steps_are_fine_and_other_options_are_refused_by_name(
    tiny, capsys
):
    run("run", steps=2, resume=True)  # there is none yet: it begins
    assert run("run", steps=7, resume=True, every=2)["step"] == 7
    with pytest.raises(ValueError, match="the run in run has another n_feat, lr$"):
        run("run", steps=9, resume=True, lr=1e-3, n_feat=16)
    own = small("run", steps=9, resume=True)
    fixed = {"data": "digits", "n_feat": 16, "T": 500, "batch": 40, "lr": 1e-3}
    fixed |= {"warmup": 9, "grad_clip": 2.0, "ema_decay": 0.5, "flip": True, "seed": 1}
    free = {"epochs": 9, "steps": 8, "every": 3, "device": "cpu", "bf16": True}
    free |= {"compile": True, "wandb": True, "quiet": False, "out": "./run"}
    fields = {field.name for field in dataclasses.fields(Config)}
    assert fields == {*fixed, *free, "resume"}
    for name, value in fixed.items():
        with pytest.raises(ValueError, match=f"the run in run has another {name}$"):
            base.find_run(dataclasses.replace(own, **{name: value}))
    assert base.find_run(dataclasses.replace(own, **free))[1]["step"] == 7
    assert capsys.readouterr().err == ""
    assert run("run", steps=5, resume=True, quiet=False)["step"] == 7
    assert "nothing to do: run is at step 7 of 5" in capsys.readouterr().err


def test_a_run_is_not_resumed_with_more_or_fewer_images(tiny):
    """Its epochs would be others, and older grids and checkpoints be overwritten."""
    run("run", steps=12)
    images = np.load("tiny/train.npy")
    for other in (np.concatenate([images, images]), images[:96]):
        np.save("tiny/train.npy", other)
        with pytest.raises(ValueError, match="run in run has another number of images"):
            run("run", steps=30, resume=True)


def test_compile_leaves_clean_keys(tiny):
    """A backend that compiles nothing shows the keys as well as a real one."""
    compiled = torch.nn.Module.compile

    def eager(self, mode):
        compiled(self, backend="eager")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", eager)
        fast = run("fast", steps=3, compile=True)
    slow = run("slow", steps=3)
    assert fast["net"].keys() == slow["net"].keys()
    for name, weight in slow["net"].items():
        torch.testing.assert_close(fast["net"][name], weight, atol=1e-4, rtol=0)


def test_bf16_is_near_and_not_equal(tiny):
    fast, slow = run("fast", steps=3, bf16=True), run("slow", steps=3)
    losses = [s["history"][-1]["loss"] for s in (fast, slow)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]


# ---- torchrun ------------------------------------------------------------------------

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
OPTIONS = "--data tiny --steps 60 --resume --quiet --out faces"


def wait_and_kill(agent, path):
    """Kill a worker of a torchrun agent as soon as path is there."""
    deadline = time.time() + 90
    while not path.exists() and time.time() < deadline:
        time.sleep(0.01)
    tasks = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(tasks[-1]), signal.SIGKILL)


@pytest.mark.slow
def test_torchrun_brings_a_killed_worker_back(tiny):
    """Kill one of two workers: torchrun restarts both, and --resume lets them go on."""
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    command += [str(ROOT / "superminddpm.py"), *OPTIONS.split()]
    with open("log", "w") as log:
        agent = subprocess.Popen(command, stdout=log, stderr=log)
        wait_and_kill(agent, Path("faces/last.pt"))
        assert agent.wait(120) == 0, Path("log").read_text()
    assert finish(start(work, small("whole", steps=60), world=2)) == [0, 0]
    assert_same_run("whole", "faces")


@pytest.mark.slow
def test_two_machines_train_one_model_also_when_a_worker_is_killed(tiny):
    """Two torchrun agents meet on loopback, as the page on scale has it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d"]
    command += ["--max-restarts=3", f"--rdzv-endpoint=127.0.0.1:{port}"]
    command += [str(ROOT / "superminddpm.py"), *OPTIONS.split()]
    own = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open("log", "w") as log:
        both = {"stdout": log, "stderr": log, "env": own}
        agents = [subprocess.Popen(command, **both) for _ in "ab"]
        wait_and_kill(agents[1], Path("faces/last.pt"))
        assert [agent.wait(180) for agent in agents] == [0, 0], Path("log").read_text()
    assert finish(start(work, small("whole", steps=60), world=2)) == [0, 0]
    assert_same_run("whole", "faces")


def test_no_option_is_a_prefix_of_one_of_torchruns():
    """torchrun would take it for an abbreviation of its own."""
    parser = torch.distributed.run.get_args_parser()
    theirs = {name for action in parser._actions for name in action.option_strings}
    for path in ROOT.glob("super*.py"):
        text = path.read_text()
        fields = re.findall(r"^    (\w+): \S.* = ", text, re.M)
        assert len(fields) >= 14
        for name in fields:
            option = f"--{name.replace('_', '-')}"
            assert not any(x.startswith(option) and x != option for x in theirs), option


# ---- the command line ----------------------------------------------------------------


def test_a_folder_brings_its_recipe_and_options_win(tiny):
    assert command_line(base, "--data tiny --batch 40 --quiet") == 0
    last = state("runs/superminddpm-tiny")
    config = last["config"]
    assert (config["n_feat"], config["batch"], config["lr"]) == (8, 40, 5e-3)
    assert last["step"] == 8 and last["shape"] == (1, 8, 8)


def test_help_explains_every_option(capsys):
    assert command_line(base, "--help") == 0
    text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert "arXiv:2006.11239" in text
    for field in dataclasses.fields(Config):
        name = field.name.replace("_", "-")
        assert re.search(rf"--{name}[ ,].{{10,200}}\(default: ", text), name


BAD = {
    "--bogus 3": "--bogus",
    "--data imagenet": "no imagenet/recipe.json: run e.g. `python prepare.py",
    "--lr much": "--lr",
    "--batch 0": "--batch cannot be 0",
    "--batch -4": "--batch cannot be -4",
    "--batch 2000": "--batch: at most 1438",
    "--epochs -1": "--epochs cannot be -1",
    "--lr nan": "--lr cannot be nan",
    "--lr inf": "--lr cannot be inf",
    "--n-feat 20": "--n-feat cannot be 20",
    "--n-feat 0": "--n-feat cannot be 0",
    "--T 49": "--T cannot be 49",
    "--ema-decay 1": "--ema-decay cannot be 1.0",
    "--epoch 3": "--epoch",  # no option is known by its beginning
    "--seed 99999999999999999999": "--seed cannot be 99999999999999999999",
    "--device cuda": "rank 0 of 1: 0 cuda here (--device cpu?)",
    "--device gpu": "--device",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_gets_one_clear_line(line, capsys, tmp_path):
    assert command_line(base, line) == 2
    told = capsys.readouterr()
    words = re.sub(r"[│─╭╮╰╯\s]+", " ", told.out + told.err)
    assert BAD[line] in words and "Traceback" not in words
    if "superminddpm.py:" in told.err:  # ours, not tyro's box
        assert told.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["cut", "text", "foreign", "cousin", "empty"])
def test_a_broken_checkpoint_is_refused(tiny, capsys, kind):
    run("run", steps=1)
    path = Path("run/last.pt")
    broken = {
        "cut": path.read_bytes()[:-1000],
        "text": b"hello",
        "empty": b"",
    }
    if kind in broken:
        path.write_bytes(broken[kind])
    elif kind == "foreign":
        torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, path)
    else:
        torch.save({**state("run"), "script": "superother"}, path)
    before = path.read_bytes()
    assert command_line(base, "--data tiny --out run --resume --steps 5") == 2
    told = capsys.readouterr().err
    assert "run/last.pt is no checkpoint of superminddpm.py" in told
    assert path.read_bytes() == before


def test_a_broken_run_of_another_folder_concerns_nobody(tiny):
    Path("runs/superminddpm-digits").mkdir(parents=True)
    Path("runs/superminddpm-digits/last.pt").write_bytes(b"")
    assert command_line(base, "--help") == 0
    assert command_line(base, "--data tiny --steps 1 --quiet") == 0


def test_wandb_gets_the_metrics(tiny, monkeypatch):
    rows = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: types.SimpleNamespace(log=rows.append)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run("run", steps=10, wandb=True)
    assert [row["step"] for row in rows] == [5, 10] and rows[0]["held_loss"] > 0


@pytest.mark.parametrize("found", [None, types.ModuleType("wandb")])
def test_without_wandb_or_with_a_folder_of_that_name_there_is_one_line(
    monkeypatch, capsys, tmp_path, found
):
    """Also where it is installed. To Python a folder is a module without contents."""
    monkeypatch.setitem(sys.modules, "wandb", found)
    assert command_line(base, "--wandb") == 2
    said = capsys.readouterr().err
    assert said.startswith("superminddpm.py: ") and said.count("\n") == 1
    assert "wandb" in said.removeprefix("superminddpm.py: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["memory", "accelerator", "network"])
def test_a_fault_of_the_machine_gives_one_line(monkeypatch, capsys, kind):
    """Of every process that has it: another one's would not say whose GPU is full."""
    kinds = {"memory": torch.OutOfMemoryError, "network": dist.DistNetworkError}
    kinds["accelerator"] = torch.AcceleratorError

    def fail(cfg):
        error = kinds[kind].__new__(kinds[kind])
        error.args = ("the GPU is full,\n or\n something like it",)
        raise error

    monkeypatch.setattr(base, "train", fail)
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert command_line(base, "") == 2
        line = "superminddpm.py: the GPU is full, or something like it\n"
        assert capsys.readouterr().err == line


def test_a_mistake_in_the_code_shows_where(monkeypatch):
    monkeypatch.setattr(base, "train", lambda cfg: torch.ones(2, 3) @ torch.ones(2))
    monkeypatch.setattr(sys, "argv", ["superminddpm.py"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        base.main()


def test_a_busy_port_gives_one_line(tiny, monkeypatch, capsys):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
        for name, value in group.items():
            monkeypatch.setenv(name, value)
        assert command_line(base, "--data tiny --out run") == 2
    said = capsys.readouterr().err
    assert said.count("superminddpm.py: ") == 1 and "in use" in said
    assert "Traceback" not in said and not Path("run").exists()


@pytest.mark.slow
def test_compile_without_a_compiler_gives_one_line(tiny):
    command = [sys.executable, str(ROOT / "superminddpm.py"), "--data", "tiny"]
    command += ["--compile", "--steps", "1", "--out", "run"]
    cache = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": os.getcwd()}
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | cache
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    lines = [x for x in done.stderr.splitlines() if x.startswith("superminddpm.py: ")]
    assert len(lines) == 1 and "compiler" in lines[0]


def test_a_name_that_the_terminal_cannot_show(tiny):
    """Nor does the last line of a finished run end in an error."""
    command = [sys.executable, str(ROOT / "superminddpm.py"), "--data", "tiny"]
    command += ["--steps", "1", "--resume", "--out", "run-\u00e9\u4e2d"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "1"}
    for _ in "12":
        done = subprocess.run(command, capture_output=True, env=env)
        assert done.returncode == 0, done.stderr
    assert b"nothing to do: run-" in done.stderr


def test_importing_does_nothing():
    code = """
import os, sys
sys.argv = ["x", "--bogus"]
import torch
import torch.distributed as dist
before = torch.initial_seed(), torch.get_rng_state().tolist(), os.listdir()
import superminddpm
assert before == (torch.initial_seed(), torch.get_rng_state().tolist(), os.listdir())
assert not torch.cuda.is_initialized()
assert not {"wandb", "matplotlib", "diffusers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_script_itself_runs_and_talks_and_quiet_is_quiet(tiny):
    """As a user does it, in a process of its own."""
    command = [sys.executable, str(ROOT / "superminddpm.py"), "--data", "~/tiny"]
    command += ["--steps", "2", "--out", "~/run"]
    home = {**os.environ, "HOME": os.getcwd()}
    done = subprocess.run(command, capture_output=True, text=True, env=home)
    assert done.returncode == 0 and "held_loss=" in done.stderr
    assert Path("run/last.pt").exists() and not Path("~").exists()
    command[-1:] = ["again", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, env=home)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
