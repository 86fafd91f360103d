"""A training job as the command line gets it, and what it leaves."""

import atexit
import json
import subprocess
import sys


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def flags(settings):
    words = []
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return words


def launch(settings, *more, **options):
    command = [sys.executable, "-m", "redit_fast", "train", *flags(settings), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    atexit.register(process.kill)  # a test that fails leaves it running
    return process
