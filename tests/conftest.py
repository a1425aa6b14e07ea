"""Shared by all tests: one thread, a small data folder, processes that start fast.

python -m pytest runs the short tests. With --all it also runs those that are marked
slow: they kill and restart processes, execute whole notebooks or open a browser.
"""

import json
import multiprocessing
import os
import shutil
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # for the process that starts all workers
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a GPU sums are not repeatable bit for bit
os.environ["OMP_NUM_THREADS"] = "1"  # small tensors: faster, and repeatable bit for bit

import numpy as np
import pytest
import torch

BROWSERS = "chromium chromium-browser google-chrome google-chrome-stable".split()
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
FAST = multiprocessing.get_context("forkserver")
FAST.set_forkserver_preload(["superminddpm"])


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests, too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Run each test in a folder of its own, without the caller's settings."""
    monkeypatch.chdir(tmp_path)
    for name in ("CELEBA_PATH", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def browser():
    """A Chromium for all tests: a second one in the same thread is refused."""
    from playwright.sync_api import sync_playwright

    if not CHROMIUM:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_playwright() as p:
        # a sandbox of its own is not to be had as root, nor in a container
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tiny():
    """Make a data folder as prepare.py does: 160 + 40 digits with labels; its name."""
    from sklearn.datasets import load_digits

    digits, folder = load_digits(), Path("tiny")
    images = (digits.images * 255 / 16).round().astype(np.uint8)[:, None]
    folder.mkdir()
    for name, part in {"train": slice(160), "held": slice(160, 200)}.items():
        np.save(folder / f"{name}.npy", images[part])
        np.save(folder / f"{name}_labels.npy", digits.target[part])
    recipe = {"n_feat": 8, "epochs": 2, "batch": 32, "lr": 5e-3, "every": 1}
    (folder / "recipe.json").write_text(json.dumps({**recipe, "ema_decay": 0.9}))
    return str(folder)


def state(folder):
    """Return the last checkpoint of a run."""
    return torch.load(Path(folder) / "last.pt", map_location="cpu", weights_only=True)


def assert_same_run(a, b):
    """All that decides how two runs go on is equal bit for bit."""
    a, b = state(a), state(b)
    assert a["step"] == b["step"] and a["history"] == b["history"] != []
    for key in ("net", "ema"):
        assert a[key].keys() == b[key].keys()
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])
    for i, moments in a["opt"]["state"].items():
        theirs = b["opt"]["state"][i]
        assert all(torch.equal(value, theirs[k]) for k, value in moments.items())
    assert a.get("starts") == b.get("starts")


def command_line(script, line):
    """Run main() of a script, a module, with a command line; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *line.split()])
        try:
            script.main()
        except SystemExit as leave:
            return leave.code
    return 0


def enter(rank, world, port, folder, target, args):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(folder)
    torch.set_num_threads(1)
    target(*args)


def start(target, *args, world=1):
    """Start world processes that call target(*args) as torchrun's workers would."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    workers = []
    for rank in range(world):
        given = (rank, world, port, os.getcwd(), target, args)
        workers.append(FAST.Process(target=enter, args=given, daemon=True))
        workers[-1].start()
    return workers


def finish(workers, seconds=120):
    """Wait for processes of start(); return their exit codes."""
    for worker in workers:
        worker.join(seconds)
    return [worker.exitcode for worker in workers]
