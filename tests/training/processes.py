"""Ranks of a run as torchrun starts them, forked from a process that has all imports behind it: 0.1 s a rank, not 7."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

from redit_fast.cli import main

PRELOADED = ["tests.training.processes", "redit_fast.training.trainer", "torch.distributed.fsdp"]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOADED)


def environment(rank, size, port):
    """What torchrun sets."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def start(size, work, *args, folder):
    """`work(*args)` in `size` processes, each with its output in `folder`/rankN.txt; its result is the exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    Path(folder).mkdir(parents=True, exist_ok=True)
    ranks = [context.Process(target=_rank, args=(environment(rank, size, port), f"{folder}/rank{rank}.txt", work, args))
             for rank in range(size)]  # fmt: skip
    for rank in ranks:
        rank.start()
    return ranks


def finish(ranks, folder, seconds=120):
    """The exit codes, and what each rank printed."""
    for rank in ranks:
        rank.join(seconds)
    hung = [rank.pid for rank in ranks if rank.is_alive()]
    for rank in ranks:
        rank.kill()
    printed = [Path(f"{folder}/rank{i}.txt").read_text() for i in range(len(ranks))]
    assert not hung, f"ranks hang: {printed}"
    return [rank.exitcode for rank in ranks], printed


def _rank(variables, output, work, args):
    os.environ.update(variables)
    with open(output, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    code = work(*args)
    sys.exit(code)


def train(words):
    return main(["train", *words])
