"""Rollouts by a server: what it is asked, what it may answer, and what its failures say."""

import os
import signal
import socket
import threading
import time

import pytest
import torch

from redit_fast.training.rollout import EngineError, connection
from redit_fast.training.rollout.server import seeds_of
from tests.training.fake_vllm import (
    ENDS,
    PROMPTS,
    V,
    a_model,
    at_rest,
    changed,
    engine,
    sampled,
    serving,
    slow,
    status,
)


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
    with at_rest(fake, monkeypatch) as found:
        yield found


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


CARD = {"id": "the-model", "max_model_len": 256}
NO_LISTS = {
    "text for a length": {"data": [{**CARD, "max_model_len": "12"}]},
    "a fraction": {"data": [{**CARD, "max_model_len": 12.5}]},
    "true": {"data": [{**CARD, "max_model_len": True}]},
    "no length": b'{"data": [{"id": "the-model", "max_model_len": NaN}]}',
    "below 1": {"data": [{**CARD, "max_model_len": 0}]},
    "no name": {"data": [{**CARD, "id": None}]},
    "an empty name": {"data": [{**CARD, "id": ""}]},
    "a number": {"data": [{**CARD, "id": 7}]},
    "a long name": {"data": [{**CARD, "id": "x" * 100_000}]},
    "half of a pair": b'{"data": [{"id": "the-model\\ud800"}]}',
    "no UTF-8": b'{"data": [{"id": "\xff"}]}',
    "a further one": {"data": [CARD, None]},
    "none": {"data": []},
    "no key": {"models": [CARD]},
    "a list": [CARD],
    "deep": b"[" * 100_000,
    "no JSON": b"<html>",
    "nothing": b"",
}


@pytest.mark.parametrize("name", NO_LISTS)
def test_another_list_of_models_is_refused_in_one_sentence(clean, tmp_path, monkeypatch, name):
    monkeypatch.setattr(clean, "models", NO_LISTS[name])
    with pytest.raises(
        EngineError, match=rf"^rollout {clean.url}/v1/models: no list of models as vLLM has it: "
    ) as raised:
        sampled(engine(clean.url, tmp_path), PROMPTS[:1])
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300 and clean.paths() == ["/v1/models"]


def test_a_list_of_models_may_have_more_and_no_length(clean, tmp_path, monkeypatch):
    monkeypatch.setattr(clean, "models", {"data": [{"id": "the-model", "new": [1]}, {**CARD, "max_model_len": None}]})
    assert len(sampled(engine(clean.url, tmp_path), [[1] * 251]).completions) == 2


def test_an_address_that_is_none_is_one_sentence(tmp_path):
    with pytest.raises(EngineError, match="^rollout http://1.2.3.999/v1/models: Invalid IPv4 address"):
        sampled(engine("http://1.2.3.999", tmp_path))


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
    clean.faults.append(slow(5.0))
    begin = time.monotonic()
    with pytest.raises(EngineError, match=r"no answer within 0.3 s \(rollout_timeout\)$"):
        sampled(engine(clean.url, tmp_path, timeout=0.3), PROMPTS[:1])
    assert time.monotonic() - begin < 3


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
    clean.faults += [slow(5.0)] * 2
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sampled(engine(clean.url, tmp_path, timeout=20))
    assert time.monotonic() - begin < 3


def test_closing_ends_a_rollout_of_another_thread(clean, tmp_path):
    clean.faults += [slow(5.0)] * 2
    others = set(threading.enumerate())
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
    assert time.monotonic() - begin < 3 and raised == [f"rollout {clean.url}: the engine was closed during the rollout"]
    assert not [thread for thread in threading.enumerate() if "PoolExecutor" in thread.name and thread not in others]
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
