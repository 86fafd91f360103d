"""A server behind a bad network: no sample is lost or there twice, and nothing waits longer than the timeout."""

import json
import random
import socket
import socketserver
import struct
import threading
import time
from collections import Counter

import pytest

from redit_fast.training.rollout import EngineError, connection
from tests.training.fake_vllm import FakeVLLM, a_model, engine, running, sampled, serving


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
        through = sampled(engine(proxy.url, tmp_path, timeout=10, retries=8), prompts)
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
        assert time.monotonic() - begin < 3
