"""The end of a process that is one of several ranks."""

import os
import sys

import torch.distributed as dist


def meet_and_end(other=None):
    """Ends this rank at once, when all have come here; with the exit code of the process `other`, where one is given.

    A rank that leaves first can abort the other. And DDP and FSDP2 hold gloo's threads beyond destroy_process_group
    (torch 2.13): one that is late in dropping a tensor asks an ending Python for its lock, and C++ aborts with
    "terminate called without an active exception". os._exit leaves Python no end.
    """
    dist.barrier()
    code = os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) if other else 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
