"""Rollouts by a server: what it is asked, what it may answer, and what its failures say."""

import json
import os
import random
import signal
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from redit_fast.cli import main
from redit_fast.training import checkpoint, lora, policy, report
from redit_fast.training.config import TrainConfig
from redit_fast.training.distributed import Ranks
from redit_fast.training.rollout import EngineError, connection, server
from redit_fast.training.rollout.server import Server, seeds_of
from tests import ROOT
from tests.project.pages import PAGES, fenced
from tests.training import processes
from tests.training.fake_vllm import FakeVLLM, changed, running, serving, slow
from tests.training.jobs import flags, lines_of

V, ENDS = 48, [3, 17]
PROMPTS = [[5, 6, 7], [9, 10, 11, 12]]
SAMPLING = dict(group_size=2, max_new_tokens=6, temperature=0.7, top_p=1.0, seed=4, step=2)


def a_model(seed=0):
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.5, tie_word_embeddings=True,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def away():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture(scope="module")
def fake():
    with serving(a_model()) as found:
        yield found


@pytest.fixture
def clean(fake, monkeypatch):
    """The fake server without faults; pauses between attempts are short."""
    monkeypatch.setattr(connection, "PAUSE", 0.01)
    monkeypatch.delenv(connection.KEY, raising=False)
    fake.seen.clear()
    yield fake
    fake.faults.clear()
    fake.mode = "processed_logprobs"
    fake.key = None


def engine(url, tmp_path, *, timeout=5.0, retries=2, **options):
    return Server(url, ENDS, V, timeout=timeout, retries=retries, folder=tmp_path, **options)


def sampled(engine, prompts=PROMPTS, **changes):
    sampling = {**SAMPLING, **changes}
    count = len(prompts) * sampling["group_size"]
    return engine.generate(prompts, sample_ids=torch.arange(count), **sampling)


def test_a_request_has_all_that_the_distribution_depends_on(clean, tmp_path):
    found = sampled(engine(clean.url, tmp_path))
    asked = [body for path, body in clean.seen if path == "/v1/completions"]
    assert sorted(body["prompt"] for body in asked) == PROMPTS
    for body in asked:
        assert body["n"] == 2 and body["max_tokens"] == 6 and body["temperature"] == 0.7 and body["top_p"] == 1.0
        assert body["stop_token_ids"] == ENDS and body["ignore_eos"] and body["return_token_ids"]
        # A model's generation_config.json would set these.
        neutral = ("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        assert [body[name] for name in neutral] == [0, 0, 1, 0, 0]
    seeds = {tuple(body["prompt"]): body["seed"] for body in asked}
    assert [seeds[tuple(prompt)] for prompt in PROMPTS] == seeds_of(4, 2, torch.tensor([0, 2]))
    assert [len(row) for row in found.completions] == [len(row) for row in found.logp]
    assert found.finished == [row[-1] in ENDS for row in found.completions]


def test_a_seed_is_of_the_run_the_step_and_the_sample():
    ids = torch.arange(1000)
    each = [seeds_of(seed, step, ids) for seed, step in ((0, 0), (1, 0), (0, 1), (2**64 - 1, 2**32 - 1))]
    assert len({seed for seeds in each for seed in seeds}) == 4000
    assert all(0 <= seed < 2**62 for seeds in each for seed in seeds)
    assert seeds_of(0, 1, ids.flip(0)) == each[2][::-1]


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"top_p": 0.9}], ids=["greedy", "top_p"])
def test_there_are_no_log_probs_where_the_server_has_not_those_of_all_tokens(clean, tmp_path, sampling):
    assert sampled(engine(clean.url, tmp_path), **sampling).logp is None


def put(name, value):
    return lambda choice: choice.update({name: value})


def logp(change):
    return lambda choice: change(choice["logprobs"]["token_logprobs"])


def longer(choice):
    choice["token_ids"] = [1] * 7
    choice["logprobs"]["token_logprobs"] = [-1.0] * 7


def ends_early(choice):
    choice["token_ids"], choice["logprobs"]["token_logprobs"] = [1, 2], [-1.0, -1.0]


def goes_on(choice):
    choice["token_ids"], choice["logprobs"]["token_logprobs"] = [3, 1], [-1.0, -1.0]


def fewer(handler, found):
    handler.answer({**found, "choices": found["choices"][:1]})


def twice(handler, found):
    handler.answer({**found, "choices": found["choices"][:1] * 2})


def of_another_model(handler, found):
    handler.answer({**found, "model": "another"})


def redirect(handler, found):
    handler.answer(None, 307, Location="http://127.0.0.1:9/elsewhere")


def status(code, content):
    return lambda handler, found: handler.answer(content, code)


WRONG = {
    "fewer": (fewer, r"1 samples of numbers \[0\], needs 2 from 0 on"),
    "twice": (twice, r"2 samples of numbers \[0\], needs 2 from 0 on"),
    "token": (changed(lambda choice: choice["token_ids"].__setitem__(0, V)), "token 48 is none of the model's, .* 48"),
    "negative": (changed(lambda choice: choice["token_ids"].__setitem__(0, -1)), "token -1 is none of the model's"),
    "none": (changed(put("token_ids", [])), "0 tokens, needs 1 to 6"),
    "longer": (changed(longer), "7 tokens, needs 1 to 6"),
    "early": (changed(ends_early), "ended after 2 of 6 tokens .* --generation-config vllm"),
    "on": (changed(goes_on), "goes on after the end token 3"),
    "prompt": (changed(put("prompt_token_ids", [1])), "of another prompt than the one that was sent"),
    "nan": (changed(logp(lambda row: row.__setitem__(0, float("nan")))), "a log-prob is nan"),
    "infinite": (changed(logp(lambda row: row.__setitem__(0, float("-inf")))), "a log-prob is -inf"),
    "positive": (changed(logp(lambda row: row.__setitem__(0, 2.5))), "2.5, .* --logprobs-mode processed_logprobs"),
    "missing log-prob": (changed(logp(lambda row: row.pop())), "log-probs for . tokens"),
    "null log-prob": (changed(logp(lambda row: row.__setitem__(0, None))), r"token_logprobs.0: Input should be"),
    "no log-probs": (changed(put("logprobs", None)), "it has no log-probs"),
    "no tokens": (changed(lambda choice: choice.pop("token_ids")), "choices.0.token_ids: Field required"),
    "text": (changed(put("token_ids", ["1"])), "choices.0.token_ids.0: Input should be a valid integer"),
    "model": (of_another_model, "the answer is of model 'another', not of 'the-model'"),
    "a list": (status(200, [1]), "no answer of vLLM's shape: the whole: Input should be an object"),
    "no JSON": (status(200, b"<html>"), "no answer of vLLM's shape: the whole: Invalid JSON"),
    "large": (status(200, b" " * (2 << 20)), "an answer of more than"),
    "redirect": (redirect, "a redirect, which is not followed"),
    "400": (status(400, {"error": {"message": "too\nlarge", "code": 400}}), "status 400, too large"),
    "500": (status(500, b"Internal Server Error"), "status 500, Internal Server Error"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_another_answer_is_refused_in_one_sentence_at_once(clean, tmp_path, name):
    fault, sentence = WRONG[name]
    clean.faults.append(fault)
    with pytest.raises(EngineError, match=sentence) as raised:
        sampled(engine(clean.url, tmp_path), PROMPTS[:1])
    assert str(raised.value).startswith(f"rollout {clean.url}/v1/completions: ") and "\n" not in str(raised.value)
    assert clean.paths().count("/v1/completions") == 1  # not tried again


def test_a_connection_that_is_closed_without_an_answer_is_made_again(clean, tmp_path):
    def closed(handler, found):
        handler.close_connection = True

    clean.faults += [closed] * 2
    assert len(sampled(engine(clean.url, tmp_path), PROMPTS[:1]).completions) == 2
    clean.faults += [closed] * 3
    with pytest.raises(EngineError, match="no answer in 3 attempts .*: Server disconnected"):
        sampled(engine(clean.url, tmp_path), PROMPTS[:1])


def test_samples_are_by_their_numbers_whatever_their_order_in_the_answer(clean, tmp_path):
    direct = sampled(engine(clean.url, tmp_path), PROMPTS[:1])
    clean.faults.append(lambda handler, found: handler.answer({**found, "choices": found["choices"][::-1]}))
    assert sampled(engine(clean.url, tmp_path), PROMPTS[:1]) == direct
    assert direct.completions[0] != direct.completions[1]


@pytest.mark.parametrize("code", [429, 502, 503, 504])
def test_what_may_come_right_is_tried_again_as_it_was(clean, tmp_path, code):
    direct = sampled(engine(clean.url, tmp_path), PROMPTS[:1])
    clean.seen.clear()
    clean.faults += [status(code, b"later")] * 2
    assert sampled(engine(clean.url, tmp_path), PROMPTS[:1]) == direct
    first, *others = [body for path, body in clean.seen if path == "/v1/completions"]
    assert others == [first, first]
    clean.faults += [status(code, b"later")] * 3
    with pytest.raises(EngineError, match=rf"no answer in 3 attempts \(rollout_retries\): status {code}, later$"):
        sampled(engine(clean.url, tmp_path), PROMPTS[:1])


def test_a_server_that_is_away_is_one_sentence(away, clean, tmp_path):
    with pytest.raises(EngineError, match=rf"^rollout {away}/v1/models: no answer in 3 attempts \(rollout_retries\): "):
        sampled(engine(away, tmp_path))


def test_a_slow_server_is_one_sentence_after_the_timeout(clean, tmp_path):
    clean.faults.append(slow(1.0))
    begin = time.monotonic()
    with pytest.raises(EngineError, match=r"no answer within 0.3 s \(rollout_timeout\)$"):
        sampled(engine(clean.url, tmp_path, timeout=0.3), PROMPTS[:1])
    assert time.monotonic() - begin < 0.8


def test_an_answer_that_drips_is_over_at_the_timeout_too(clean, tmp_path):
    def drip(handler, found):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(20):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    clean.faults.append(drip)
    with pytest.raises(EngineError, match=r"no answer within 0.3 s"):
        sampled(engine(clean.url, tmp_path, timeout=0.3), PROMPTS[:1])


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_sent(clean, tmp_path):
    with pytest.raises(EngineError, match="a prompt of 251 tokens and a completion of 6 .* --max-model-len, 256"):
        sampled(engine(clean.url, tmp_path), [[1] * 250, [1] * 251])
    assert clean.paths() == ["/v1/models"]


def test_ctrl_c_ends_a_rollout_at_once(clean, tmp_path):
    clean.faults += [slow(2.0)] * 2
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sampled(engine(clean.url, tmp_path, timeout=20))
    assert time.monotonic() - begin < 1.5


def test_closing_ends_a_rollout_of_another_thread(clean, tmp_path):
    clean.faults += [slow(2.0)] * 2
    running, raised = engine(clean.url, tmp_path, timeout=20), []

    def roll():
        try:
            sampled(running)
        except EngineError as error:
            raised.append(str(error))

    thread = threading.Thread(target=roll)
    thread.start()
    time.sleep(0.3)
    begin = time.monotonic()
    running.close()
    thread.join()
    assert time.monotonic() - begin < 1.0 and raised == [
        f"rollout {clean.url}: the engine was closed during the rollout"
    ]
    assert not [thread for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name]
    with pytest.raises(EngineError, match="the engine is closed$"):
        sampled(running)


def test_the_key_is_sent_and_said_nowhere(clean, tmp_path, monkeypatch):
    clean.key = "a-secret"
    with pytest.raises(EngineError, match="status 401, Unauthorized$"):
        sampled(engine(clean.url, tmp_path))
    monkeypatch.setenv(connection.KEY, "a-secret")
    sampled(engine(clean.url, tmp_path))
    clean.faults.append(status(400, b"your key is a-secret"))
    with pytest.raises(EngineError, match=r"your key is \*\*\*$"):
        sampled(engine(clean.url, tmp_path), PROMPTS[:1])
    monkeypatch.setenv(connection.KEY, "a-secret\n")
    with pytest.raises(ValueError, match="^REDIT_FAST_API_KEY has a character that no key has") as raised:
        engine(clean.url, tmp_path)
    assert "secret" not in str(raised.value)


def test_no_proxy_and_no_password_is_taken_from_the_environment(clean, tmp_path, monkeypatch, away):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, away)
    assert len(sampled(engine(clean.url, tmp_path)).completions) == 4


# --- weights


def test_the_weights_arrive_and_leave_no_files(clean, tmp_path, monkeypatch):
    """In memory, or next to the run where memory has no room."""
    model = a_model(1)
    assert not torch.equal(model.lm_head.weight, clean.model.lm_head.weight)
    memory = tmp_path / "memory"
    memory.mkdir()
    for room in (memory, tmp_path / "none"):
        monkeypatch.setattr(server, "MEMORY", room)
        with torch.no_grad():
            model.lm_head.weight += 0.01
        running = engine(clean.url, tmp_path)
        running.sync(model)
        place = Path(next(body["args"][0] for path, body in clean.seen if path == "/collective_rpc")).parents[1]
        assert place == (memory if room is memory else tmp_path)
        assert clean.paths()[:2] == ["/collective_rpc", "/reset_prefix_cache"]
        mine, served = model.state_dict(), clean.model.state_dict()
        assert all(torch.equal(mine[name], served[name]) for name in mine)
        assert not list(memory.iterdir()) and list(tmp_path.iterdir()) == [memory]
        clean.seen.clear()
        running.sync(model)
        assert clean.paths() == ["/collective_rpc", "/reset_prefix_cache"]  # the probe is of the first time
        clean.seen.clear()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_log_probs_are_those_of_the_model_that_was_sent(clean, tmp_path, temperature):
    model = a_model(2)
    running = engine(clean.url, tmp_path)
    running.sync(model)
    found = sampled(running, temperature=temperature)
    for row, (tokens, logp) in enumerate(zip(found.completions, found.logp, strict=True)):
        prompt = PROMPTS[row // 2]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        ours = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert ours.tolist() == pytest.approx(logp, abs=1e-5)


def test_log_probs_of_before_the_temperature_are_refused_at_the_start(clean, tmp_path):
    clean.mode = "raw_logprobs"
    with pytest.raises(EngineError, match="start it with --logprobs-mode processed_logprobs$"):
        engine(clean.url, tmp_path).sync(a_model())


def test_the_mode_of_log_probs_is_found_whatever_token_was_drawn(clean, tmp_path, monkeypatch):
    """vLLM gives the token that was drawn beside the likeliest, here the least likely one at temperature 2."""

    def completions(self, body):
        found = plain(self, body)
        if body["temperature"] == 2:
            found["choices"][0]["logprobs"]["top_logprobs"][0]["token_id:0"] = -50.0
        return found

    plain = FakeVLLM.completions
    monkeypatch.setattr(FakeVLLM, "completions", completions)
    engine(clean.url, tmp_path).sync(a_model())


def test_a_server_that_cannot_load_says_why(clean, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "LOAD", "another_method")
    with pytest.raises(EngineError, match="/collective_rpc: status 500, .*another_method"):
        engine(clean.url, tmp_path).sync(a_model())
    monkeypatch.undo()
    monkeypatch.setattr(Server, "_written", lambda self, folder, *_: folder / "nowhere")
    with pytest.raises(EngineError, match="holds no safetensors that the server can read"):
        engine(clean.url, tmp_path).sync(a_model())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "needs"),
    [
        ("/collective_rpc", "VLLM_SERVER_DEV_MODE=1"),
        ("/reset_prefix_cache", "VLLM_SERVER_DEV_MODE=1"),
        ("/v1/load_lora_adapter", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"),
    ],
)
def test_a_server_that_was_started_without_a_route_is_told_with_what(clean, tmp_path, monkeypatch, path, needs):
    monkeypatch.setattr(clean, "without", (path,))
    model, base = a_model(), None
    if "lora" in path:
        base = with_adapters(model)
    with pytest.raises(EngineError, match=f"{path}: status 404, Not Found: start the server with {needs}$"):
        engine(clean.url, tmp_path, base=base).sync(model)


def test_a_full_disk_is_one_sentence(clean, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    model = a_model()
    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(EngineError, match="^rollout: the weights could not be written for the server: .*No space left"):
        engine(clean.url, tmp_path).sync(model)
    assert clean.paths() == []


def test_what_the_old_weights_have_computed_is_not_kept(clean, tmp_path):
    running = engine(clean.url, tmp_path)
    clean.held = 3
    running.sync(a_model())
    assert clean.paths().count("/reset_prefix_cache") == 4
    clean.held = 1000
    with pytest.raises(EngineError, match="/reset_prefix_cache: the server keeps what it has computed"):
        running.sync(a_model())
    clean.held = 0


def with_adapters(model):
    base = lora.Base("x", {})
    lora.attach(model, TrainConfig(model="x", data="x", rewards=["integer_answer"], lora_rank=2), base)
    return base


def test_adapters_are_sent_under_a_new_name_each_time(clean, tmp_path, monkeypatch):
    gathered = []
    monkeypatch.setattr(Ranks, "state_of", lambda ranks, model, *, trained=False: gathered.append(trained))
    model = a_model()
    base = with_adapters(model)
    running = engine(clean.url, tmp_path, base=base)
    names = []
    for _ in range(2):
        running.sync(model)
        assert list(clean.adapters.values()) == [["adapter_config.json", "adapter_model.safetensors", "base.json"]]
        names += clean.adapters
        clean.seen.clear()
        sampled(running)
        assert {body["model"] for path, body in clean.seen if path == "/v1/completions"} == {names[-1]}
        (files,) = {Path(running.adapter[1].name)}
        assert files.is_dir()  # vLLM may read them again
    assert len(set(names)) == 2 and gathered == [True, True]  # FSDP2's ranks gather the adapters alone
    running.close()
    assert not files.exists()
    clean.adapters.clear()


def test_the_server_sleeps_between_rollouts(clean, tmp_path):
    running = engine(clean.url, tmp_path, sleeps=True)
    running.sync(a_model())
    assert not clean.asleep
    sampled(running)
    assert clean.asleep and clean.paths()[-1] == "/sleep?level=1"
    clean.seen.clear()
    running.sync(a_model())
    sampled(running)
    assert clean.paths()[0] == "/wake_up" and clean.paths().count("/wake_up") == 1 and clean.asleep
    clean.asleep = False


def test_ranks_that_share_a_server_cannot_put_it_to_sleep(clean, tmp_path):
    with pytest.raises(ValueError, match="^rollout_sleep: several ranks share the server"):
        engine(clean.url, tmp_path, sleeps=True, ranks=Ranks(0, 2, "ddp"))


def test_the_page_has_the_workers_file():
    (quoted,) = fenced("python", PAGES["docs/integrations/vllm.md"])
    assert quoted == (ROOT / "examples/vllm_weights.py").read_text()


# --- a run


@pytest.fixture
def served(settings):
    """A server of the run's own model, as it is at the start."""
    model, _ = policy.load(settings["model"])
    with serving(model) as found:
        yield found


def test_a_run_by_a_server_ends_as_its_checkpoint(settings, tmp_path, served, monkeypatch, capsys):
    """And the key is in no file of it."""
    monkeypatch.setattr(report, "write", lambda run: None)
    monkeypatch.setenv(connection.KEY, "a-secret")
    served.key = "a-secret"
    job = {**settings, "rollout": served.url, "steps": 2, "learning_rate": 1e-2}
    assert main(["train", *flags(job), "--temperature", "0.7", "--rollout-sleep"]) == 0
    lines = [line for line in lines_of(tmp_path / "run/metrics.jsonl") if line["step"]]
    assert len(lines) == 2 and all(line["sampling/sampling_logp_difference/max"] < 1e-5 for line in lines)
    assert all(line["sampling/frac_corrected"] == 0 for line in lines)
    last, _ = policy.load(tmp_path / "run/checkpoints/step-000002")
    mine, theirs = last.state_dict(), served.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert served.asleep and served.paths().count("/wake_up") == served.paths().count("/sleep?level=1") - 1 >= 3
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if b"a-secret" in path.read_bytes()]
    printed = capsys.readouterr()
    assert "a-secret" not in printed.out + printed.err


def test_a_server_that_goes_away_stops_the_run_after_a_checkpoint(settings, tmp_path, served, monkeypatch, capsys):
    monkeypatch.setattr(report, "write", lambda run: None)
    monkeypatch.setattr(connection, "PAUSE", 0.01)
    job = {**settings, "rollout": served.url, "steps": 3, "eval_problems": 0, "checkpoint_every": 10}
    job["rollout_retries"] = 1
    loads, plain = [], served.collective_rpc

    def load(method, args):
        loads.append(args)
        if len(loads) == 3:  # at the start, after the first step, after the second
            served.faults += [status(503, b"draining")] * 100
        return plain(method, args)

    monkeypatch.setattr(served, "collective_rpc", load)
    assert main(["train", *flags(job)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"redit-fast: rollout {served.url}/v1/completions: no answer in 2 attempts")
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "run/checkpoints")) == 2
    assert main(["train", *flags({**job, "rollout": "http://127.0.0.1:9"}), "--resume"]) == 2  # moved, and away


def test_a_server_that_is_too_slow_is_refused_before_anything_is_written(settings, tmp_path, served, capsys):
    served.faults += [slow(3)] * 4
    assert main(["train", *flags({**settings, "rollout": served.url, "rollout_timeout": 1.5})]) == 2
    assert capsys.readouterr().err.endswith("no answer within 1.5 s (rollout_timeout)\n")
    assert not (tmp_path / "run").exists()


def test_ranks_share_a_server(settings, tmp_path, served):
    """Each with a part of the weights, which are gathered for it."""
    job = {**settings, "rollout": served.url, "strategy": "fsdp2", "steps": 1, "max_completion_length": 8}
    codes, printed = processes.finish(processes.start(2, processes.train, flags(job), folder=tmp_path), tmp_path)
    assert codes == [0, 0], printed
    line = lines_of(tmp_path / "run/metrics.jsonl")[1]
    assert line["sampling/sampling_logp_difference/max"] < 1e-5
    samples = lines_of(tmp_path / "run/completions.jsonl")
    assert [row["sample"] for row in samples] == list(range(12)) and len({row["completion"] for row in samples}) > 6
    assert served.paths().count("/collective_rpc") == 2  # by the first rank alone: at the start and after the step
    last, _ = policy.load(tmp_path / "run/checkpoints/step-000001")
    mine, theirs = last.state_dict(), served.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# --- a bad network


class Proxy(socketserver.ThreadingTCPServer):
    """Between a client and `to`: of the connections some are cut before the request, some after it, some within the
    answer, and some wait."""

    daemon_threads, request_queue_size = True, 256

    def __init__(self, to, seed):
        super().__init__(("127.0.0.1", 0), None)
        self.to, self.random, self.did = to, random.Random(seed), Counter()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def finish_request(self, client, address):
        kind = self.random.choices(["pass", "wait", "cut", "cut after", "cut within"], [4, 2, 1, 1, 1])[0]
        self.did[kind] += 1
        if kind == "cut":
            return reset(client)
        with socket.create_connection(self.to) as server:
            if kind == "wait":
                time.sleep(0.05)
            threading.Thread(target=forward, args=(client, server), daemon=True).start()
            if kind == "cut after":
                time.sleep(0.02)
                return reset(client)
            forward(server, client, 150 if kind == "cut within" else None)
            if kind == "cut within":
                reset(client)

    def handle_error(self, request, address):
        """A connection that was cut."""


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.shutdown(socket.SHUT_RD)  # a thread that reads from it would keep it open
    connection.close()


def forward(source, target, most=None):
    """All that comes, or so many bytes."""
    try:
        while data := source.recv(most or 65536):
            target.sendall(data)
            if most:
                return
    except OSError:
        pass


class Quick(FakeVLLM):
    """Its tokens are of the request's seed alone."""

    def completions(self, body):
        choices = []
        for i in range(body["n"]):
            tokens = [4 + (body["seed"] >> (5 * (t + 6 * i))) % 32 % 12 for t in range(body["max_tokens"])]
            logp = {"token_logprobs": [-1.0 - token for token in tokens]}
            choices.append({"index": i, "token_ids": tokens, "finish_reason": "length", "logprobs": logp})
        return {"model": body["model"], "choices": choices}


def test_200_requests_over_a_bad_network_have_the_samples_of_a_good_one(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "PAUSE", 0.01)
    prompts = [[5, i % 40 + 1, i // 40 + 1] for i in range(200)]
    with serving(a_model(), kind=Quick) as quick, running(Proxy(quick.server_address, seed=1)) as proxy:
        direct = sampled(engine(quick.url, tmp_path), prompts)
        assert len({tuple(row) for row in direct.completions}) > 350
        quick.seen.clear()
        begin = time.monotonic()
        through = sampled(engine(proxy.url, tmp_path, timeout=5, retries=8), prompts)
        assert time.monotonic() - begin < 5
    assert through == direct
    assert all(proxy.did[kind] >= 5 for kind in ("pass", "wait", "cut", "cut after", "cut within")), proxy.did
    asked = [json.dumps(body, sort_keys=True) for path, body in quick.seen if path == "/v1/completions"]
    assert len(set(asked)) == 200 < len(asked)  # some more than once, each as it was


def test_a_connection_that_is_silent_costs_the_timeout_and_no_more(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        begin = time.monotonic()
        with pytest.raises(EngineError, match="no answer within 0.3 s"):
            sampled(engine(url, tmp_path, timeout=0.3, retries=8))
        assert time.monotonic() - begin < 1
