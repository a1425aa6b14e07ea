"""Shared by all tests: one thread, an empty folder, processes that start fast."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # for the process that starts all workers
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a GPU sums are not repeatable bit for bit
os.environ["OMP_NUM_THREADS"] = "1"  # small tensors: faster, and repeatable bit for bit

import pytest
import torch

FAST = multiprocessing.get_context("forkserver")
FAST.set_forkserver_preload(["superminddpm"])


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Run each test in a folder of its own, without the caller's settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CELEBA_PATH", raising=False)
    torch.set_num_threads(1)


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
