"""Runs, and ranks of a run as torchrun starts them, forked from a process that has all imports: 0.1 s, not 7."""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch

import redit_fast as rf
from redit_fast.cli import main
from redit_fast.gr import shards
from redit_fast.training import config_file, report, trainer

PRELOADED = ["tests.training.processes", "torch.distributed.fsdp", "matplotlib.pyplot"]
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
    """The exit codes, and what each rank printed; of one that hangs the stacks of its threads too."""
    end = time.monotonic() + seconds
    while any(rank.is_alive() for rank in ranks) and time.monotonic() < end:
        time.sleep(0.02)
    hung = [rank.pid for rank in ranks if rank.is_alive()]
    for pid in hung:
        os.kill(pid, signal.SIGUSR1)
    time.sleep(0.5 if hung else 0)  # while they print where they are
    for rank in ranks:
        rank.kill()
    printed = [Path(f"{folder}/rank{i}.txt").read_text() for i in range(len(ranks))]
    assert not hung, f"ranks hang: {printed}"
    return [rank.exitcode for rank in ranks], printed


def _rank(variables, output, work, args):
    os.environ.update(variables)
    with open(output, "w") as file:
        _say_into(file.fileno(), file.fileno())
    faulthandler.register(signal.SIGUSR1, sys.stderr)  # where all threads of a rank that hangs are
    torch.set_num_threads(1)  # as torchrun does by a variable, which torch has read by now
    sys.exit(work(*args))


def _say_into(*files):
    for stream, file in zip((1, 2), files, strict=True):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))


def train(words):
    return main(["train", *words])


def train_into(words, out, error):
    _say_into(out, error)
    os.close(out)
    os.close(error)
    sys.exit(train(words))


def trained(jobs, folder):
    """Trains the jobs one after the other; of each optimizer step the gradient that AdamW gets, from the first rank."""
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    draw, report.write = report.write, lambda run: None
    for name, settings in jobs.items():
        gradients, take_step = [], rf.RegularizedAdamW._take_step

        def recorded(optimizer, combined, factor):
            whole = [p.grad.full_tensor() if shards.is_shard(p.grad) else p.grad for p in combined.params]  # noqa: B023
            gradients.append(torch.cat([(grad * factor).flatten() for grad in whole]).clone())  # noqa: B023
            take_step(optimizer, combined, factor)  # noqa: B023

        rf.RegularizedAdamW._take_step = recorded
        try:
            trainer.train(config_file.load(overrides={**settings, "out_dir": folder, "name": name}))
        finally:
            rf.RegularizedAdamW._take_step = take_step
        if os.environ.get("RANK", "0") == "0":
            torch.save(gradients, f"{folder}/{name}/gradients.pt")
    report.write = draw
    if "RANK" in os.environ:
        torch.distributed.destroy_process_group()
    return 0
