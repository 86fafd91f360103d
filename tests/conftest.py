"""One test body, every backend that this machine can run: `backend` forces each in turn, a skip prints the refusal. For
the tests of the trainer: a model and data as a user would bring them, and the settings of a small run.
"""

import json

import pytest
import torch

import redit_fast as rf
from redit_fast import backends

REWARDS = [f"redit_fast.training.builtin:{name}" for name in ("correct_answer", "right_steps", "answer_format")]


@pytest.fixture(params=backends.NAMES)
def backend(request):
    """A forced backend; the test skips where the backend refuses an op the test's module names in `OPS`."""
    module = backends._backend(request.param)
    for op in getattr(request.module, "OPS", ()):
        refusal = module.why_not(op, torch.device("cpu"))
        if refusal:
            pytest.skip(f"{request.param}: {refusal}")
    with rf.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny model with dropout and its own tokenizer, as a user would bring them."""
    from redit_fast.training import builtin

    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = builtin.build(0)
    builtin.warm_start(model, tokenizer, steps=4, seed=0)
    model.config.attention_dropout = 0.1
    model.config.max_position_embeddings = 1024
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def problems(tmp_path_factory):
    from redit_fast.training import builtin

    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in builtin.records(60, held_out=False, seed=0)))
    return path


@pytest.fixture
def settings(model_folder, problems, tmp_path):
    return {
        "model": str(model_folder), "data": str(problems), "rewards": REWARDS, "out_dir": str(tmp_path), "name": "run",
        "steps": 2, "prompts_per_step": 3, "group_size": 4, "max_completion_length": 12, "eval_problems": 5,
        "learning_rate": 1e-3, "checkpoint_every": 1, "eval_every": 2, "gamma": 0.1, "epsilon": 0.1,
    }  # fmt: skip
