"""The reward `math`: whether an answer equals another as mathematics, by math-verify in a process of its own.

math-verify hands text to sympy's `parse_expr`, which evaluates it, and its own deadline is `signal.alarm`, which only
works in the main thread. So no text is parsed in this process. The child is killed at `DEADLINE` and started anew for
the next question.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from redit_fast.training.rewards.user_code import RewardError

DEADLINE = 5.0  # seconds for one answer; most take 0.02
START = 120.0  # seconds for the child's imports, which take 1 where nothing else runs
LONGEST = 1000  # bytes of what it says where it does not start
ANSWERS = {b"right": 1.0, b"wrong": 0.0, b"no gold": None}
# Nothing else of the environment: keys and tokens are not for a process that evaluates what a model wrote.
ENVIRONMENT = ("HOME", "PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


class Question(NamedTuple):
    gold: str
    text: str
    tagged: bool  # the text is what was between answer tags


class Child:
    """A process of math_child.py. It begins with the first question, and ends with this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: tuple[subprocess.Popen, Connection] | None = None

    def answer(self, question: Question) -> float | None:
        """1.0 or 0.0; None where the gold answer cannot be read, or the child does not come to an end.

        Raises:
            RewardError: the child does not start.
        """
        asked = json.dumps(question).encode()
        with self.lock:
            for _ in range(2):  # a child that ended before the deadline was killed from outside, or by the question
                begun = self.running or self._start()
                until = time.monotonic() + DEADLINE
                told = self._exchange(*begun, asked, DEADLINE, max(map(len, ANSWERS)))
                if told in ANSWERS:
                    return ANSWERS[told]
                self._end()
                if time.monotonic() >= until:
                    break
            return None

    def _start(self) -> tuple[subprocess.Popen, Connection]:
        ours, theirs = Pipe()
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        with theirs:
            try:
                process = subprocess.Popen(
                    # Without the script's own folder, and the current one, on sys.path: neither has Python's modules.
                    [sys.executable, "-P", str(Path(__file__).with_name("math_child.py")), str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=environment | {"PYTHONHASHSEED": "0"},
                    start_new_session=True,  # a Ctrl-C is for this process
                )
            except OSError as error:
                ours.close()
                raise RewardError(f"rewards: the process of math cannot be started: {error}") from None
        self.running = process, ours
        told = self._exchange(process, ours, None, START, LONGEST)
        if told != b"ready":
            self._end()
            words = told.decode("utf-8", "replace") if told else f"it ended, or took more than {START:g} s"
            raise RewardError(f"rewards: the process of math does not start: {words}")
        return self.running

    def _exchange(
        self, process: subprocess.Popen, pipe: Connection, sent: bytes | None, seconds: float, most: int
    ) -> bytes | None:
        """What the child says, at most so many bytes; None where it ends, as it does when the time is over."""
        alarm = threading.Timer(seconds, _kill, [process])
        alarm.daemon = True
        alarm.start()
        whole = False
        try:
            if sent is not None:
                pipe.send_bytes(sent)
            told = pipe.recv_bytes(most)
            whole = True
            return told
        except (EOFError, OSError):
            return None
        finally:
            alarm.cancel()
            if not whole:  # also at a Ctrl-C: its answer would be taken for the next question's
                self._end()

    def _end(self) -> None:
        if self.running is not None:
            process, pipe = self.running
            self.running = None
            _kill(process)
            process.wait()
            pipe.close()


def _kill(process: subprocess.Popen) -> None:
    """And what it has started, all of which have its session."""
    if process.returncode is None:  # else its number may be another's
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


CHILD = Child()
