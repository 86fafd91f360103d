"""A server that speaks vLLM's routes, in the process of the tests: a model of transformers in float32 behind
http.server. `faults` makes it answer otherwise; `seen` has what it was asked."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from examples import vllm_weights
from redit_fast.training.rollout import connection, local
from redit_fast.training.rollout.server import Server

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


class _Worker(vllm_weights.Weights):
    """With the methods of vLLM's worker that the extension calls."""

    def __init__(self, model):
        self.model = model

    def reload_weights(self, weights_iterator):
        missing, unexpected = self.model.load_state_dict(dict(weights_iterator), strict=False)
        assert not unexpected and set(missing) <= set(self.model.all_tied_weights_keys), (missing, unexpected)

    def get_model(self):
        return self.model


class FakeVLLM(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 256

    def __init__(self, model, *, longest=256, key=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.longest, self.key = model.eval(), longest, key
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.mode = "processed_logprobs"
        self.seen = []  # (path, body)
        self.faults = []  # of the next completions, each a function of (handler, answer)
        self.models = None  # another list of them
        self.adapters, self.asleep = {}, False
        self.without = ()  # paths that it was not started with
        self.held = 0  # how often the prefix cache is not emptied
        self.lock = threading.Lock()

    def handle_error(self, request, address):
        """A client that has gone away is none."""

    def paths(self):
        return [path for path, _ in self.seen]

    @torch.no_grad()
    def completions(self, body):
        prompt, n, temperature = body["prompt"], body["n"], body["temperature"]
        with self.lock:
            rollout = local.generate(
                self.model, body["stop_token_ids"], [prompt], group_size=n, max_new_tokens=body["max_tokens"],
                temperature=temperature, top_p=body["top_p"], seed=body["seed"],
            )  # fmt: skip
            choices = []
            for i, tokens in enumerate(rollout.completions):
                logits = self.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double()
                logp = (logits / (temperature if self.mode == "processed_logprobs" else 1)).log_softmax(-1)
                drawn = logp.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
                best = logp.topk(body.get("logprobs") or 0, -1)
                choices.append({
                    "index": i, "text": "not looked at", "token_ids": tokens, "prompt_token_ids": prompt,
                    "finish_reason": "stop" if rollout.finished[i] else "length", "stop_reason": None,
                    "logprobs": {
                        "token_logprobs": drawn,
                        "top_logprobs": [{f"token_id:{k}": v for k, v in [(token, value), *zip(*row, strict=True)]}
                                         for token, value, *row in zip(tokens, drawn, best[1].tolist(),
                                                                       best[0].tolist(), strict=True)],
                    } if "logprobs" in body else None,
                })  # fmt: skip
        return {"id": "cmpl-0", "object": "text_completion", "model": body["model"], "choices": choices, "usage": {}}

    def collective_rpc(self, method, args):
        with self.lock:
            return getattr(_Worker(self.model), method)(*args)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.seen.append((self.path, None))
        if self.path == "/v1/models":
            card = {"id": "the-model", "root": "/models/x", "parent": None, "max_model_len": self.server.longest}
            plain = {"object": "list", "data": [card]}
            return self.answer(plain if self.server.models is None else self.server.models)
        self.answer({"detail": "Not Found"}, 404)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.seen.append((self.path, body))
        if server.key and self.path.startswith("/v1") and self.headers["Authorization"] != f"Bearer {server.key}":
            return self.answer({"error": "Unauthorized"}, 401)
        if self.path in server.without:
            return self.answer({"detail": "Not Found"}, 404)
        if self.path == "/v1/completions":
            fault = server.faults.pop(0) if server.faults else None
            if body["model"] not in ("the-model", *server.adapters):
                return self.answer(
                    {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}, 404
                )
            found = server.completions(body)
            return self.answer(found) if fault is None else fault(self, found)
        if self.path == "/collective_rpc":
            try:
                return self.answer({"results": [server.collective_rpc(**body)]})
            except (AttributeError, FileNotFoundError) as error:  # vLLM's answer to what a worker raises
                return self.answer({"error": {"message": f"Call to collective_rpc failed: {error}", "code": 500}}, 500)
        if self.path == "/v1/load_lora_adapter":
            server.adapters[body["lora_name"]] = sorted(path.name for path in Path(body["lora_path"]).iterdir())
        elif self.path == "/v1/unload_lora_adapter":
            del server.adapters[body["lora_name"]]
        elif self.path.startswith(("/sleep", "/wake_up")):
            server.asleep = self.path.startswith("/sleep")
        elif self.path == "/reset_prefix_cache":
            held, server.held = server.held, max(server.held - 1, 0)
            return self.answer({"success": not held})
        else:
            return self.answer({"detail": "Not Found"}, 404)
        self.answer(None)

    def answer(self, content, status=200, **headers):
        raw = b"" if content is None else content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


@contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def serving(model, kind=FakeVLLM, **options):
    return running(kind(model, **options))


def slow(seconds):
    def fault(handler, found):
        time.sleep(seconds)
        handler.answer(found)

    return fault


def changed(change):
    """An answer with a `change` of its first sample."""

    def fault(handler, found):
        change(found["choices"][0])
        handler.answer(found)

    return fault


def status(code, content):
    return lambda handler, found: handler.answer(content, code)


def engine(url, tmp_path, *, timeout=5.0, retries=2, **options):
    return Server(url, ENDS, V, timeout=timeout, retries=retries, folder=tmp_path, **options)


def sampled(engine, prompts=PROMPTS, **changes):
    sampling = {**SAMPLING, **changes}
    count = len(prompts) * sampling["group_size"]
    return engine.generate(prompts, sample_ids=torch.arange(count), **sampling)


@contextmanager
def at_rest(fake, monkeypatch):
    """The server without faults and memories of another test; pauses between attempts are short."""
    monkeypatch.setattr(connection, "PAUSE", 0.01)
    monkeypatch.delenv(connection.KEY, raising=False)
    for kept in (fake.seen, fake.faults, fake.adapters):
        kept.clear()
    fake.mode, fake.key, fake.asleep, fake.held, fake.without = "processed_logprobs", None, False, 0, ()
    yield fake
