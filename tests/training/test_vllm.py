"""With vLLM itself, which has an environment of its own: REDIT_FAST_VLLM is the Python in it. It takes two minutes."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from redit_fast.training import builtin, config_file, lora, policy, report
from redit_fast.training.config import TrainConfig
from redit_fast.training.rollout import EngineError
from redit_fast.training.rollout.server import Server
from redit_fast.training.trainer import train
from tests import ROOT
from tests.training.jobs import lines_of

PYTHON = os.environ.get("REDIT_FAST_VLLM")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="REDIT_FAST_VLLM, the Python of an environment with vLLM, is not set"
)


def a_model():
    """With heads of 32, the smallest that vLLM has on the CPU, and a head that shares the embedding's weights."""
    _, tokenizer = builtin.build(0)
    torch.manual_seed(0)
    sizes = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return Qwen2ForCausalLM(sizes), tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, tokenizer = a_model()
    path = tmp_path_factory.mktemp("vllm") / "model"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@contextmanager
def serving(folder, *words):
    """As docs/integrations/vllm.md starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = os.environ | {
        "PYTHONPATH": str(ROOT / "examples"), "VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--host", "127.0.0.1", "--port", port,
        "--max-model-len", 256, "--max-num-seqs", 64, "--dtype", "float32", "--enforce-eager",
        "--generation-config", "vllm", "--worker-extension-cls", "vllm_weights.Weights", *words,
    ]  # fmt: skip
    log = folder.parent / "server.log"
    with log.open("w") as written:
        server = subprocess.Popen(
            list(map(str, command)), cwd=folder.parent, env=variables, stdout=written, stderr=written,
            start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 300
        while not answers(f"{url}/health"):
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def url(folder):
    with serving(folder, "--logprobs-mode", "processed_logprobs", "--enable-lora", "--max-lora-rank", 8) as found:
        yield found


def furthest(engine, model, temperature):
    """The largest difference between the log-probs of the server and of the model."""
    prompts, most = [list(range(5, 25)), list(range(100, 107))], 0.0
    found = engine.generate(
        prompts, group_size=3, max_new_tokens=30, temperature=temperature, top_p=1.0, seed=1, step=0,
        sample_ids=torch.arange(6),
    )  # fmt: skip
    assert len(set(map(tuple, found.completions))) == 6
    for i, (tokens, logp) in enumerate(zip(found.completions, found.logp, strict=True)):
        prompt = prompts[i // 3]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1] / temperature
        ours = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        most = max(most, (ours - torch.tensor(logp)).abs().max().item())
    return most


def engine_of(url, model, tmp_path, base=None):
    ends = [model.config.eos_token_id]
    rows = model.get_input_embeddings().weight.shape[0]
    return Server(url, ends, rows, timeout=60, retries=0, folder=tmp_path, base=base)


def test_every_weight_arrives(url, folder, tmp_path):
    model, _ = policy.load(folder)
    engine = engine_of(url, model, tmp_path)
    for name, parameter in model.named_parameters():
        if ".layers.1." in name:
            continue
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(0.3 * torch.randn_like(parameter))
        assert name.endswith("k_proj.bias") or furthest(engine, model, 1.0) > 0.05, name
        engine.sync(model)
        assert furthest(engine, model, 0.7) < 1e-4, name
        with torch.no_grad():
            parameter.copy_(before)
    engine.sync(model)
    assert furthest(engine, model, 1.0) < 1e-4


def test_adapters_arrive(url, folder, tmp_path):
    model, _ = policy.load(folder)
    base = lora.Base(str(folder), {})
    lora.attach(model, TrainConfig(model="x", data="x", rewards=["integer_answer"], lora_rank=4), base)
    engine = engine_of(url, model, tmp_path, base)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        engine.sync(model)
        assert furthest(engine, model, 0.7) < 1e-4
    engine.close()


def more_of_the_letter_a(prompts, completions, **columns):
    return [text.count("a") / max(len(text), 1) for text in completions]


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "lora"])
def test_a_model_learns_from_its_completions(url, folder, tmp_path, monkeypatch, adapters):
    monkeypatch.setattr(report, "write", lambda run: None)
    model, _ = policy.load(folder)
    engine_of(url, model, tmp_path).sync(
        model
    )  # adapters belong to weights that another run may have taken the place of
    data = tmp_path / "data.jsonl"
    records = builtin.records(40, held_out=False, seed=0)
    data.write_text("".join(json.dumps({"prompt": record["prompt"]}) + "\n" for record in records))
    settings = {
        "model": str(folder), "data": str(data), "rewards": [f"{Path(__file__).with_suffix('')}:more_of_the_letter_a"],
        "name": "run", "out_dir": str(tmp_path), "steps": 20, "prompts_per_step": 4, "group_size": 8,
        "max_completion_length": 24, "eval_problems": 0, "temperature": 0.9, "rollout": url, "rollout_timeout": 60,
        "gr_gamma": 0, **({"lora_rank": 8, "learning_rate": 2e-2} if adapters else {"learning_rate": 2e-3}),
    }  # fmt: skip
    train(config_file.load(overrides=settings))
    lines = [line for line in lines_of(tmp_path / "run" / "metrics.jsonl") if line["step"]]
    rewards = [line["reward"] for line in lines]
    gaps = [line["sampling/sampling_logp_difference/max"] for line in lines]
    seconds = [sum(line[f"time/{part}"] for line in lines) for part in ("rollout", "pass1")]
    print(f"\nrewards {rewards[0]:.3f} to {rewards[-1]:.3f}, log-probs {max(gaps):.1e} apart at most, {seconds} s")
    assert len(lines) == 20 and max(gaps) < 1e-3
    assert sum(rewards[-4:]) > 2 * sum(rewards[:4])


def test_log_probs_of_before_the_temperature_are_refused(folder, tmp_path):
    model, _ = policy.load(folder)
    with serving(folder) as url, pytest.raises(EngineError, match="start it with --logprobs-mode processed_logprobs$"):
        engine_of(url, model, tmp_path).sync(model)
