"""The modules that an import loads, by their top-level package, in a new process."""

import json
import subprocess
import sys

from tests import ROOT

SCRIPT = """
import collections, json, sys
found = {}

def added(name, statement):
    before = set(sys.modules)
    exec(statement, globals())
    found[name] = collections.Counter(module.split(".")[0] for module in set(sys.modules) - before)

added("import redit_fast", "import redit_fast")
import torch
added("group_advantages, beside torch", "redit_fast.group_advantages")
added("linear_grpo_loss, after that", "redit_fast.linear_grpo_loss")
added("RegularizedAdamW, after that", "redit_fast.RegularizedAdamW")
print(json.dumps(found))
"""


def count():
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, check=True, capture_output=True, text=True)
    return {name: {"modules": parts} for name, parts in json.loads(done.stdout).items()}
