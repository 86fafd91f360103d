"""A training job as the command line gets it, and what it leaves."""

import atexit
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import reduction

from tests.training import processes


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def flags(settings):
    words = []
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return words


def launch_anew(settings, *more, **options):
    """`redit-fast train` as a shell starts it: 7 s of imports."""
    command = [sys.executable, "-m", "redit_fast", "train", *flags(settings), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    atexit.register(process.kill)  # a test that fails leaves it running
    return process


def launch(settings, *more):
    """The same in a process that is forked from one with all imports behind it."""
    return Forked([*flags(settings), *more])


class Forked:
    """What tests ask of a subprocess.Popen."""

    def __init__(self, words):
        (out, child_out), (error, child_error) = os.pipe(), os.pipe()
        self.stdout, self.stderr = open(out), open(error)
        args = words, _Inherited(child_out), _Inherited(child_error)
        self.process = processes.context.Process(target=processes.train_into, args=args)
        self.process.start()
        os.close(child_out)
        os.close(child_error)
        self.pid = self.process.pid
        atexit.register(self.kill)

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def kill(self):
        self.process.kill()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout=300):
        self.process.join(timeout)
        assert self.poll() is not None, f"process {self.pid} has not ended after {timeout} s"
        return self.poll()

    def communicate(self, timeout=300):
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(lambda file: file.read(), (self.stdout, self.stderr), timeout=timeout))
        self.stdout.close()
        self.stderr.close()
        self.wait(timeout)
        return tuple(found)


class _Inherited:
    """An open file's number, pickled so that it is one of the process that is started."""

    def __init__(self, number):
        self.number = number

    def __reduce__(self):
        return _detached, (reduction.DupFd(self.number),)


def _detached(duplicate):
    return duplicate.detach()
