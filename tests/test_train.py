"""Training: what is drawn, processes, resuming, killing, the run folder."""

import csv
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, finish, start

import superminddpm as base
from superminddpm import Config, train

SMALL = {"n_feat": 8, "batch": 32, "n_train": 160, "quiet": True}


def small(out, steps=15, **changes):
    """Return a Config of a short run on digits, 5 steps an epoch, saved at each."""
    cadence = {"save_every": 1, "sample_every": 100}
    return Config(out=str(out), steps=steps, **{**SMALL, **cadence, **changes})


def state(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def assert_same_run(a, b):
    """All that decides how a run goes on is equal bit for bit."""
    a, b = state(a), state(b)
    assert a["step"] == b["step"] and a["losses"] == b["losses"]
    for row in (*a["history"], *b["history"]):
        row.pop("images_per_s")
    assert a["history"] == b["history"] and a["history"]
    for key in ("net", "ema"):
        assert a[key].keys() == b[key].keys()
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])
    for i, moments in a["opt"]["state"].items():
        assert all(
            torch.equal(value, b["opt"]["state"][i][k]) for k, value in moments.items()
        )


def test_a_run_leaves_what_the_readme_promises(tmp_path):
    ddpm = train(small("run", epochs=4, steps=0, sample_every=2, save_every=2))
    names = {path.name for path in Path("run").iterdir()}
    assert names == {
        *("config.json", "metrics.csv", "loss_curves.png", "last.pt"),
        *("samples_epoch_002.png", "samples_epoch_004.png"),
        *("checkpoint_epoch_002.pt", "checkpoint_epoch_004.pt"),
    }
    with open("run/metrics.csv") as f:
        rows = list(csv.DictReader(f))
    assert [(row["step"], row["epoch"]) for row in rows] == [("10", "2"), ("20", "4")]
    levels = [
        float(value) for key, value in rows[-1].items() if key.startswith("held_t")
    ]
    assert len(levels) == 10 and all(level > 0 for level in levels)
    assert sum(levels) / 10 == pytest.approx(float(rows[-1]["held_loss"]))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert json.loads(Path("run/config.json").read_text())["n_feat"] == 8
    loaded = base.load("run/last.pt")
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.parameters(), ddpm.parameters(), strict=True)
    )
    raw = base.load("run/last.pt", ema=False)
    assert not torch.equal(raw.net.out.weight, ddpm.net.out.weight)


def test_training_learns():
    """The mean of eps is 0, so guessing 0 has a loss of 1."""
    cfg = small("run", steps=150, n_train=0, lr=8e-3, save_every=1000)
    images, _, held, _ = base.load_images(cfg)
    losses = base.held_out_loss(train(cfg), held)
    assert losses[950] < 0.05 and losses[50] < 0.8


def test_every_image_is_seen_once_an_epoch_in_a_new_order(monkeypatch):
    seen = []
    forward = base.DDPM.forward

    def spy(self, x0, t=None, eps=None):
        if self.training:
            seen.append(x0.clone())
        return forward(self, x0, t, eps)

    monkeypatch.setattr(base.DDPM, "forward", spy)
    train(small("run", steps=10))
    images = base.load_images(small("x"))[0] / 127.5 - 1
    epochs = [torch.cat(seen[:5]), torch.cat(seen[5:])]
    for epoch in epochs:
        found = sorted(epoch.flatten(1).tolist())
        assert found == sorted(images.flatten(1).tolist())
    assert not torch.equal(*epochs)


def test_t_is_uniform_up_to_T_and_noise_is_normal_and_new(monkeypatch):
    ts, noise = [], []

    def spy(self, x0, t=None, eps=None):
        ts.append(t)
        noise.append(eps)
        return sum(p.sum() * 0 for p in self.parameters())

    monkeypatch.setattr(base.DDPM, "forward", spy)
    monkeypatch.setattr(base, "held_out_loss", lambda *_: {1: 1.0})
    train(small("run", steps=200, T=25, save_every=1000))
    counts = torch.bincount(torch.cat(ts), minlength=26)
    assert counts[0] == 0 and len(counts) == 26
    chi2 = ((counts[1:] - 256) ** 2 / 256).sum()
    assert chi2 < 52  # 24 degrees of freedom: 1 in 1000
    eps = torch.cat(noise)
    assert abs(eps.mean()) < 0.01 and abs(eps.std() - 1) < 0.01
    assert len(eps.flatten(1).unique(dim=0)) == len(eps)


def test_the_held_out_loss_is_fixed_and_exact():
    """Against a plain loop over images, one at a time, at the middles of ten bands."""
    ddpm = base.build(Config(n_feat=8, T=50), (1, 8, 8))
    torch.nn.init.normal_(ddpm.net.out.weight)
    held = base.load_images(Config())[2][:300]
    torch.manual_seed(1)
    first = base.held_out_loss(ddpm, held)
    torch.manual_seed(2)
    assert base.held_out_loss(ddpm, held) == first
    assert list(first) == [2, 8, 12, 18, 22, 28, 32, 38, 42, 48]
    g, errors = base.rng("cpu", 22), []
    for part in (held[:256], held[256:]):
        eps = torch.randn(part.shape, generator=g)
        for x0, noise in zip(part / 127.5 - 1, eps, strict=True):
            xt = ddpm.q_sample(x0[None], torch.tensor([22]), noise[None])
            guess = ddpm.net(xt, torch.tensor([22]))[0]
            errors.append((guess - noise).square().mean().item())
    assert sum(errors) / 300 == pytest.approx(first[22], rel=1e-4)


@pytest.mark.parametrize(("data", "share"), [("cifar10", 0.5), ("digits", 0.0)])
def test_half_of_the_photographs_are_mirrored_but_no_digit(monkeypatch, data, share):
    ramp = torch.arange(8, dtype=torch.uint8).expand(320, 1, 8, 8) * 30
    monkeypatch.setattr(base, "load_images", lambda cfg: (ramp, None, ramp[:9], None))
    seen, forward = [], base.DDPM.forward

    def spy(self, x0, t=None, eps=None):
        if self.training:
            seen.append(x0[:, 0, 0, 0] > x0[:, 0, 0, 7])
        return forward(self, x0, t, eps)

    monkeypatch.setattr(base.DDPM, "forward", spy)
    train(small("run", steps=10, data=data, image_size=8, epochs=1, save_every=99))
    assert torch.cat(seen).float().mean().item() == pytest.approx(share, abs=0.1)


def test_the_average_warms_up_and_then_decays(monkeypatch):
    """Against a plain loop over the weights as each step finds and leaves them."""
    raw, forward = [], base.DDPM.forward

    def spy(self, x0, t=None, eps=None):
        if self.training:
            raw.append(self.net.out.bias.detach().clone())
        return forward(self, x0, t, eps)

    monkeypatch.setattr(base.DDPM, "forward", spy)
    cfg = small("run", steps=12, ema_decay=0.5, warmup=0, save_every=99)
    run = state_of(train, cfg)
    raw.append(run["net"]["net.out.bias"])
    want = raw[0]
    for step, weight in enumerate(raw[1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * weight
    assert len(raw) == 13 and (raw[-1] - want).abs().max() > 1e-4
    torch.testing.assert_close(run["ema"]["net.out.bias"], want)
    off = state_of(train, small("off", steps=3, ema_decay=0.0))
    assert torch.equal(off["ema"]["net.out.bias"], off["net"]["net.out.bias"])


def state_of(function, cfg):
    function(cfg)
    return state(cfg.out)


def test_the_learning_rate_rises_and_falls():
    cfg = Config(lr=1.0, warmup=9)
    rates = [base.learning_rate(cfg, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(
        rates[9], rel=0.02
    )
    assert rates[-1] < 0.02 and rates[9:] == sorted(rates[9:], reverse=True)
    flat = Config(lr=1.0, warmup=0, lr_decay=False)
    assert {base.learning_rate(flat, step, 100) for step in range(100)} == {1.0}


def test_clipping_limits_the_step():
    free = state_of(train, small("free", steps=1, grad_clip=0.0))
    held = state_of(train, small("clip", steps=1, grad_clip=0.01))

    def norm(s):  # after one step Adam's first moment is a tenth of the gradient
        return (
            sum((m["exp_avg"] * 10).square().sum() for m in s["opt"]["state"].values())
            ** 0.5
        )

    assert norm(free) > 0.02 and norm(held).item() == pytest.approx(0.01, rel=1e-3)


# ---- processes -----------------------------------------------------------------------


def record(cfg):
    """Train as a worker; write down which images this rank got."""
    forward, seen = base.DDPM.forward, []

    def spy(self, x0, t=None, eps=None):
        if self.training:
            seen.append(x0.clone())
        return forward(self, x0, t, eps)

    base.DDPM.forward = spy
    train(cfg)
    torch.save(torch.cat(seen), f"seen{os.environ['RANK']}-{cfg.out}.pt")
    torch.distributed.is_initialized() and torch.distributed.destroy_process_group()


def test_two_processes_do_what_one_does():
    cfg = small("", lr=2e-3)
    one, two = {}, {}
    for steps in (1, 20):
        one[steps] = state_of(train, base.replace(cfg, out=f"one{steps}", steps=steps))
        job = base.replace(cfg, out=f"two{steps}", steps=steps)
        assert finish(start(record, job, world=2)) == [0, 0]
        two[steps] = state(job.out)
    for i, moments in one[1]["opt"]["state"].items():  # a tenth of the first gradient
        theirs = two[1]["opt"]["state"][i]["exp_avg"]
        torch.testing.assert_close(
            10 * moments["exp_avg"], 10 * theirs, atol=1e-5, rtol=0
        )
    for name, weight in one[20]["net"].items():
        torch.testing.assert_close(weight, two[20]["net"][name], atol=1e-4, rtol=0)
    slices = [torch.load(f"seen{rank}-two1.pt").flatten(1) for rank in (0, 1)]
    assert len(slices[0]) == len(slices[1]) == 16
    assert torch.cdist(*slices).min() > 0  # no image on both ranks
    rows = [
        Path(f"{run}/metrics.csv").read_text().splitlines()[-1]
        for run in ("one20", "two20")
    ]
    losses = [float(row.split(",")[4]) for row in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # the mean over all ranks


def test_a_batch_that_the_processes_do_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr(base, "join_processes", lambda: (torch.device("cpu"), 0, 3))
    with pytest.raises(ValueError, match="--batch 32 is not divisible by 3 processes"):
        train(small("run"))
    assert not Path("run").exists()


# ---- going on ------------------------------------------------------------------------


def test_a_resumed_run_equals_an_uninterrupted_one():
    """The stop lies between two rows of metrics, and in another run within an epoch."""
    rows = {"lr_decay": False, "sample_every": 2}
    whole = train(small("whole", steps=15, **rows))
    train(small("parts", steps=15, **rows))
    os.remove("parts/last.pt")
    os.rename("parts/checkpoint_epoch_001.pt", "parts/last.pt")
    train(small("parts", steps=15, resume="auto", **rows))
    assert_same_run("whole", "parts")
    assert torch.equal(whole.net.out.weight, state("parts")["ema"]["net.out.weight"])
    train(small("within", steps=7, **rows))
    train(small("within", steps=15, resume="auto", **rows))
    assert torch.equal(
        state("within")["net"]["net.out.weight"],
        state("whole")["net"]["net.out.weight"],
    )


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_sigkill_at_any_moment_loses_nothing(world):
    """Kill each start of a run at a random moment, until one start gets to the end."""
    whole, killed = small("whole", steps=40), small("killed", steps=40)
    assert finish(start(record, whole, world=world)) == [0] * world
    kills, dice = 0, random.Random(0)
    while not Path("seen0-killed.pt").exists():
        workers = start(record, base.replace(killed, resume="auto"), world=world)
        if kills < 4:
            before = written("killed")
            deadline = time.time() + 60
            while written("killed") == before and time.time() < deadline:
                time.sleep(
                    0.002
                )  # until it has come a little further than the last time
            time.sleep(dice.random() * 0.15)
            for worker in workers:
                worker.kill()
            kills += 1
        codes = finish(workers)
        assert set(codes) <= {0, -signal.SIGKILL}
    assert kills >= 2
    assert_same_run("whole", "killed")


def written(folder):
    return (
        sorted((p.name, p.stat().st_mtime_ns) for p in Path(folder).glob("*"))
        if Path(folder).exists()
        else []
    )


def test_a_kill_in_the_middle_of_a_save_spares_the_older_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    base.save_checkpoint(path, {"step": 1})

    def die_halfway():
        write = torch.save
        torch.save = lambda state, f: (
            write(state, f),
            f.flush(),
            os.kill(os.getpid(), 9),
        )
        base.save_checkpoint(path, {"step": 2})

    pid = os.fork()
    if pid == 0:
        die_halfway()
    os.waitpid(pid, 0)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert path.with_suffix(".part").exists()  # the kill did come in between
    base.save_checkpoint(path, {"step": 3})
    assert torch.load(path, weights_only=True) == {"step": 3}


def test_a_full_disk_spares_the_older_checkpoint(tmp_path):
    """A limit on the size of files stands for the full disk."""
    path = tmp_path / "last.pt"
    base.save_checkpoint(path, {"step": 1})
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            base.save_checkpoint(path, {"net": torch.zeros(100_000)})
        except OSError as error:
            os._exit(
                7 if "cannot write" in str(error) and "\n" not in str(error) else 8
            )
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_the_run_and_is_never_saved(monkeypatch, where):
    forward, calls = base.DDPM.forward, []

    def spoil(self, x0, t=None, eps=None):
        calls.append(self.training)
        loss = forward(self, x0, t, eps)
        if sum(calls) == 8 and self.training:
            loss.register_hook(lambda grad: grad * float("nan"))
            return loss * float("nan") if where == "loss" else loss
        return loss

    monkeypatch.setattr(base.DDPM, "forward", spoil)
    step = {"loss": "at step 8", "gradient": "at step 9"}[where]
    with pytest.raises(FloatingPointError, match=step):
        train(small("run"))
    assert state("run")["step"] == 5
    assert all(value.isfinite().all() for value in state("run")["net"].values())


def test_nan_weights_of_the_last_step_are_not_saved(monkeypatch):
    forward = base.DDPM.forward

    def spoil(self, x0, t=None, eps=None):
        loss = forward(self, x0, t, eps)
        if self.training and spoil.calls == 9:
            loss.register_hook(lambda grad: grad * float("nan"))
        spoil.calls += self.training
        return loss

    spoil.calls = 0
    monkeypatch.setattr(base.DDPM, "forward", spoil)
    with pytest.raises(FloatingPointError, match="at step 10"):
        train(small("run"))
    assert state("run")["step"] == 5


@pytest.mark.slow
def test_torchrun_brings_a_killed_worker_back(tmp_path):
    """Kill one of two workers: torchrun restarts both, and they go on by themselves."""
    options = "--n-feat 8 --batch 32 --n-train 160 --steps 60"
    options += " --save-every 1 --sample-every 99"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", "--max-restarts=1", str(ROOT / "superminddpm.py")]
    with open("log", "w") as log:
        run = subprocess.Popen([*command, *options.split()], stdout=log, stderr=log)
        deadline, last = time.time() + 90, Path("runs/superminddpm-digits/last.pt")
        while not last.exists() and time.time() < deadline:
            time.sleep(0.01)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert run.wait(120) == 0, Path("log").read_text()
    assert [path.name for path in Path("runs").iterdir()] == ["superminddpm-digits"]
    finish(start(record, small("whole", steps=60), world=2))
    assert_same_run("whole", last.parent)


@pytest.mark.slow
def test_two_machines_train_one_model_also_when_a_worker_is_killed():
    """Two torchrun agents meet on loopback, as the README has it for two machines."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = "--n-feat 8 --batch 32 --n-train 160 --steps 60 --out faces --resume auto"
    options += " --lr 0.002 --save-every 1 --sample-every 99"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
    command += ["--nproc_per_node=1", "--rdzv-backend=c10d", "--max-restarts=3"]
    command += [f"--rdzv-endpoint=127.0.0.1:{port}", str(ROOT / "superminddpm.py")]
    own = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open("log", "w") as log:
        both = {"stdout": log, "stderr": log, "env": own}
        agents = [subprocess.Popen(command + options.split(), **both) for _ in "ab"]
        deadline, last = time.time() + 90, Path("faces/last.pt")
        while not last.exists() and time.time() < deadline:
            time.sleep(0.01)
        tasks = Path(f"/proc/{agents[1].pid}/task/{agents[1].pid}/children")
        os.kill(int(tasks.read_text().split()[-1]), signal.SIGKILL)
        codes = [agent.wait(180) for agent in agents]
    assert codes == [0, 0], Path("log").read_text()
    assert Path("log").read_text().count("faces: 160 images") == 2  # it began twice
    finish(start(record, small("whole", steps=60, lr=2e-3), world=2))
    assert_same_run("whole", last.parent)
    one = state_of(train, small("one", steps=60, lr=2e-3))
    for name, weight in one["net"].items():
        torch.testing.assert_close(
            weight, state(last.parent)["net"][name], atol=1e-3, rtol=0
        )


# ---- where a run goes, what it starts from -------------------------------------------


def test_a_second_run_takes_the_next_number():
    cfg = base.replace(small("", steps=2), out="")
    for _ in range(2):
        train(cfg)
    first, second = sorted(path.name for path in Path("runs").iterdir())
    assert (first, second) == ("superminddpm-digits", "superminddpm-digits-2")
    stamp = Path("runs", first, "last.pt").stat().st_mtime_ns
    train(base.replace(cfg, steps=4, resume="auto"))  # goes on with the newest
    assert state(Path("runs", second))["step"] == 4
    assert Path("runs", first, "last.pt").stat().st_mtime_ns == stamp


def test_a_run_is_never_overwritten():
    train(small("run", steps=2))
    before = Path("run/last.pt").read_bytes()
    with pytest.raises(
        ValueError, match="run holds a run: --resume auto goes on with it"
    ):
        train(small("run", steps=4))
    assert Path("run/last.pt").read_bytes() == before


def test_auto_starts_where_there_is_nothing_yet():
    train(small("run", steps=2, resume="auto"))
    assert state("run")["step"] == 2


def test_init_takes_what_fits_and_says_so(capsys):
    train(small("old", steps=5))
    old = state("old")["ema"]
    for options, kept in (({}, True), ({"delete_keys": "out,up3.conv"}, False)):
        cfg = small(
            f"new{kept}", steps=1, lr=0.0, init="old/last.pt", quiet=False, **options
        )
        new = state_of(train, base.replace(cfg, seed=3))["net"]
        assert torch.equal(new["net.down1.conv1.weight"], old["net.down1.conv1.weight"])
        assert (
            torch.equal(new["net.up3.conv1.weight"], old["net.up3.conv1.weight"])
            is kept
        )
    said = capsys.readouterr().out
    n = len([key for key in old if key.startswith("net.")])
    assert f"--init: {n} of {n} tensors taken" in said
    assert f"--init: {n - 6} of {n} tensors taken" in said and "up3.conv2.bias" in said
    train(small("wide", steps=1, n_feat=16, init="old/last.pt", quiet=False))
    assert (
        "out.bias" not in capsys.readouterr().out.split("not:")[1]
    )  # fits at any width


def test_compile_leaves_clean_keys():
    """A backend that compiles nothing shows the keys as well as a real one."""
    compiled = torch.nn.Module.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.Module, "compile", lambda self: compiled(self, backend="eager")
        )
        fast = state_of(train, small("fast", steps=3, compile=True))
    slow = state_of(train, small("slow", steps=3))
    assert fast["net"].keys() == slow["net"].keys()
    for name, weight in slow["net"].items():
        torch.testing.assert_close(fast["net"][name], weight, atol=1e-4, rtol=0)


# ---- restarts by torchrun ------------------------------------------------------------


@pytest.fixture
def restarted(monkeypatch):
    """Pretend that torchrun has started this process again."""
    return lambda: monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")


def test_a_restart_goes_on_with_its_own_run(restarted):
    train(base.replace(small("", steps=5), out=""))
    restarted()
    train(base.replace(small("", steps=10), out=""))
    assert [path.name for path in Path("runs").iterdir()] == ["superminddpm-digits"]
    assert state("runs/superminddpm-digits")["step"] == 10


def test_a_restart_leaves_the_runs_of_others_alone(monkeypatch, restarted):
    train(small("old", steps=2))
    train(base.replace(small("", steps=2), out=""))
    before = Path("old/last.pt").read_bytes()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    restarted()
    with pytest.raises(ValueError, match="old holds a run"):
        train(small("old", steps=4))
    assert Path("old/last.pt").read_bytes() == before
    train(base.replace(small("", steps=4), out=""))
    assert state("runs/superminddpm-digits")["step"] == 2
    assert state("runs/superminddpm-digits-2")["step"] == 4


def test_a_restart_of_a_resumed_run_goes_on_from_there(monkeypatch, restarted):
    train(small("run", steps=5))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    again = base.replace(small("", steps=10), out="", resume="run/last.pt")
    restarted()  # before the first attempt had come to write anything
    assert base.find_run(again) == (Path("run"), Path("run/last.pt"))
    train(again)
    assert base.find_run(again) == (Path("run"), Path("run/last.pt"))
    assert state("run")["step"] == 10


def test_resuming_an_older_checkpoint_spares_the_newer_ones():
    train(small("run", steps=10))
    train(small("other", steps=5))
    kept = {path: path.read_bytes() for path in Path().rglob("*.pt")}
    older = small("", steps=15, resume="run/checkpoint_epoch_001.pt")
    with pytest.raises(ValueError, match="other holds a run"):
        train(base.replace(older, out="other"))
    with pytest.raises(ValueError, match="other holds a run"):
        train(base.replace(older, out="other", resume="run/last.pt"))
    train(base.replace(older, out=""))
    assert state("runs/superminddpm-digits")["step"] == 15
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_the_last_checkpoint_is_as_new_as_the_last_picture():
    train(small("run", steps=15, sample_every=1, save_every=99))
    assert state("run")["step"] == 15
    assert {path.name for path in Path("run").glob("*.pt")} == {
        *("last.pt", "checkpoint_epoch_003.pt")
    }
