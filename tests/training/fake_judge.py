"""Judges of the tests: a server with OpenAI's routes, and a model whose answers are grades; the settings of one."""

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import Qwen2ForCausalLM

from redit_fast.training import builtin
from redit_fast.training.config import TrainConfig
from redit_fast.training.config_values import JUDGE_KEY
from redit_fast.training.rollout import connection
from tests.training.fake_vllm import running

OWN = {"model": "m", "data": "d.jsonl"}


def config(place="http://127.0.0.1:1", **more):
    served = {"rollout_retries": 0} if str(place).startswith("http") else {}
    return TrainConfig(**{**OWN, "rewards": [f"judge:{place}"], **served, **more})


class FakeChat(ThreadingHTTPServer):
    """A server with OpenAI's routes. It grades by `grades`, in the order of the questions, and then always 5."""

    daemon_threads, request_queue_size = True, 256

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.seen, self.keys = [], []
        self.grades, self.fault, self.good = [], None, 0  # of the questions after the first `good` ones

    def handle_error(self, request, address):
        """A client that has gone away is none."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer({"data": [{"id": "the-judge"}]} if self.path == "/v1/models" else {}, 200)

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.seen.append((self.path, body))
        server.keys.append(self.headers["Authorization"])
        if server.fault is not None and len(server.seen) > server.good:
            return server.fault(self)
        grade = server.grades.pop(0) if server.grades else 5
        content = grade if isinstance(grade, str) else f"I see.\nScore: {grade}"
        self.answer({"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}, 200)

    def answer(self, content, status, **headers):
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)


@contextmanager
def serving(monkeypatch):
    monkeypatch.setattr(connection, "PAUSE", 0.01)
    monkeypatch.setattr(connection, "AT_ONCE", 1)  # so that grades are in the order of the questions
    monkeypatch.delenv(JUDGE_KEY, raising=False)
    with running(FakeChat()) as server:
        yield server


def of(content, status=200):
    """A fault: this answer."""
    return lambda handler: handler.answer(content, status)


def save_grader(folder):
    """A model whose next token is 1, 2, 3, 4 or 5, each as likely, whatever was asked."""
    model, tokenizer = builtin.build(0)
    shape = model.config
    shape.update({"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 800,
                  "tie_word_embeddings": False, "layer_types": ["full_attention"]})  # fmt: skip
    model = Qwen2ForCausalLM(shape)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "embed" in name or "norm" in name else 0.0)
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(list("12345"))] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
