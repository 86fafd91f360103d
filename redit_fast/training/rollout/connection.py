"""Requests to a server, many at once. What may come right is tried again; what does not is one sentence."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import ssl
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple

import httpx2

from redit_fast.training.rollout import EngineError

KEY = "REDIT_FAST_API_KEY"
AT_ONCE = 64  # requests; a server of 256 sequences has more than it can batch from 64 groups of 8
CONNECT = 10.0  # seconds to connect
PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before the first attempt that follows one, doubled before each next
AGAIN = (429, 502, 503, 504)  # too many requests, and what a proxy says of a server that starts or is away
LARGEST = 1 << 20  # bytes of an answer beside what the completions in it may take


class Request(NamedTuple):
    path: str  # after the server's URL, with a slash
    body: dict | None = None  # None: GET, else POST
    room: int = 0  # bytes that the answer may have above LARGEST
    fine: tuple[int, ...] = (200,)  # the statuses of an answer that is one
    needs: str = ""  # what a server with this path was started with


One = Callable[[httpx2.AsyncClient, asyncio.Semaphore, Request], Awaitable[Any]]  # the outcome of one request


class Connection:
    """To one server.

    A redirect is not followed, and neither proxies nor passwords are taken from the environment: the key and the
    samples go where the URL says. The key is sent in a header and is in no message.

    Args:
        url: http or https, without a user and a query.
        timeout: seconds for an attempt as a whole, from connecting to the last byte.
        retries: attempts after the first one, where the connection breaks or the server answers with AGAIN. A request
            that times out is not sent again: the server is at work on it, or on too much already.
        what: the server is, in messages.
        key_in: the environment's variable that the key is in, if there is one.

    Raises:
        ValueError: the key is nothing that a header can hold.
    """

    def __init__(self, url: str, timeout: float, retries: int, *, what: str = "rollout", key_in: str = KEY) -> None:
        self.url, self.timeout, self.retries, self.what = url.rstrip("/"), timeout, retries, what
        self.key = os.environ.get(key_in, "")
        if not self.key.isascii() or not self.key.isprintable() or self.key != self.key.strip():
            raise ValueError(f"{key_in} has a character that no key has, such as a space at its end or a line break")
        self.at_work: set[tuple[asyncio.AbstractEventLoop, asyncio.Task]] = set()
        self.closed, self.lock = False, threading.Lock()  # of both

    @functools.cached_property
    def certificates(self) -> ssl.SSLContext:
        return ssl.create_default_context()  # 20 ms

    def answer(self, request: Request) -> bytes:
        """The body of its answer."""
        return self.answers([request])[0]

    def answers(self, requests: Sequence[Request]) -> list[bytes]:
        """In the order of the requests, of which AT_ONCE run at a time.

        Raises:
            EngineError: one has no answer; the others are then given up.
        """
        return self._together(self._one, requests)

    def each(self, requests: Sequence[Request]) -> list[bytes | EngineError]:
        """As `answers`, with the error in place of an answer that does not come."""
        return self._together(self._one_or_why, requests)

    def _together(self, one: One, requests: Sequence[Request]) -> list:
        # In a thread, since the caller's may have an event loop, as in a notebook. Ctrl-C comes to the caller's.
        with closing(asyncio.new_event_loop()) as loop, ThreadPoolExecutor(1) as thread:
            with self.lock:
                if self.closed:
                    raise EngineError(f"{self.what} {self.url}: the engine is closed")
                task = loop.create_task(self._all(one, requests))
                self.at_work.add((loop, task))
            try:
                return thread.submit(loop.run_until_complete, task).result()
            except asyncio.CancelledError:
                raise EngineError(f"{self.what} {self.url}: the engine was closed during the rollout") from None
            finally:
                with self.lock:  # before the loop is closed
                    self.at_work.discard((loop, task))
                loop.call_soon_threadsafe(task.cancel)

    def close(self) -> None:
        """What is at work in other threads raises an EngineError."""
        with self.lock:
            self.closed = True
            for loop, task in self.at_work:
                loop.call_soon_threadsafe(task.cancel)

    async def _all(self, one: One, requests: Sequence[Request]) -> list:
        places = asyncio.Semaphore(AT_ONCE)
        async with httpx2.AsyncClient(
            verify=self.certificates,
            trust_env=False,
            headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {}),
            timeout=httpx2.Timeout(None, connect=min(CONNECT, self.timeout)),
            limits=httpx2.Limits(max_connections=AT_ONCE),
        ) as client:
            tasks = [asyncio.ensure_future(one(client, places, request)) for request in requests]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _one_or_why(
        self, client: httpx2.AsyncClient, places: asyncio.Semaphore, request: Request
    ) -> bytes | EngineError:
        try:
            return await self._one(client, places, request)
        except EngineError as error:
            return error

    async def _one(self, client: httpx2.AsyncClient, places: asyncio.Semaphore, request: Request) -> bytes:
        async with places:
            for attempt in range(self.retries + 1):
                if attempt:
                    await asyncio.sleep(min(PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE))
                try:
                    async with asyncio.timeout(self.timeout):
                        status, body = await self._sent(client, request)
                except TimeoutError:
                    raise self._error(request, f"no answer within {self.timeout:g} s (rollout_timeout)") from None
                except (httpx2.ConnectTimeout, httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
                    why = self._words(str(error) or type(error).__name__)
                except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                    raise self._error(request, self._words(str(error) or type(error).__name__)) from None
                else:
                    if status in request.fine:
                        return body
                    why = f"status {status}{self._words(_message(body), ', ')}"
                    if status == 404 and request.needs:
                        why += f": start the server with {request.needs}"
                    if status not in AGAIN:
                        raise self._error(request, why)
        tries = f"{self.retries + 1} attempts" if self.retries else "1 attempt"
        raise self._error(request, f"no answer in {tries} (rollout_retries): {why}")

    async def _sent(self, client: httpx2.AsyncClient, request: Request) -> tuple[int, bytes]:
        method = "GET" if request.body is None else "POST"
        async with client.stream(method, self.url + request.path, json=request.body) as response:
            if response.is_redirect:
                raise self._error(request, f"a redirect, which is not followed: {self.what} needs the server's own URL")
            body = bytearray()
            async for part in response.aiter_raw():
                body += part
                if len(body) > LARGEST + request.room:
                    raise self._error(request, f"an answer of more than {LARGEST + request.room} bytes")
            return response.status_code, bytes(body)

    def _error(self, request: Request, why: str) -> EngineError:
        return EngineError(f"{self.what} {self.url}{request.path}: {why}")

    def without_key(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text

    def _words(self, text: str, before: str = "") -> str:
        """What a server or a library says, on one line, in short and without the key."""
        text = self.without_key(" ".join(text.split()))
        shown = "".join(c if c.isprintable() else "?" for c in text[:200]) + ("..." if len(text) > 200 else "")
        return f"{before}{shown}" if shown else ""


def _message(body: bytes) -> str:
    """Of an error, as FastAPI and OpenAI's API put it, or the text itself."""
    text = body[:10000].decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for name in ("error", "message", "detail"):
        found = found.get(name, found) if isinstance(found, dict) else found
    return found if isinstance(found, str) else text
