"""`python -m redit_fast` is the command `redit-fast`."""

import atexit
import os
import sys

from redit_fast.cli import main


def run() -> None:
    """Ends the process with the command's exit code.

    One of torchrun's ends without the interpreter's own end: DDP and FSDP2 hold gloo's threads longer than the process
    group (torch 2.13), and one that drops a tensor late asks an ending Python for its lock, upon which C++ aborts.
    """
    try:
        code = main()
    except SystemExit as end:
        if not (end.code is None or isinstance(end.code, int)):
            raise
        code = end.code or 0
    if "torch.distributed" in sys.modules and "RANK" in os.environ:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
