"""The modules that an import loads, by their top-level package, in a new process."""

import json
import sys

from tests.budgets import said

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
    return {name: {"modules": parts} for name, parts in json.loads(said(sys.executable, "-c", SCRIPT)).items()}
