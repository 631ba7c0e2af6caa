"""A live server on loopback, for the tests that talk to one."""

import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import uvicorn

import pagedjax
from pagedjax.llm import LLM
from pagedjax.server.app import make_app
from pagedjax.server.async_engine import AsyncEngine
from pagedjax.server.connections import make_config
from pagedjax.server.guard import Limits
from pagedjax.server.metrics import Metrics

MODEL, KEY = "smollm2", "a-key"
PACKAGE = Path(pagedjax.__file__).parent.parent
CAPITAL = "The capital of France is"
SMALL: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 128, "max_model_len": 384, "num_pages": 200}
DUMMY: dict[str, Any] = {"load_format": "dummy", "dtype": "float32"}
ORDINARY: dict[str, Any] = {"prompt": CAPITAL, "max_tokens": 2, "temperature": 0}


class Running:
    """An application on a free port, in a thread."""

    def __init__(self, llm: LLM, limits: Limits, max_requests: int = 64, model: str = MODEL, chat: Any = None):
        self.llm, self.metrics, self.answer = llm, Metrics(llm.engine), ""
        self.engine = AsyncEngine(llm, max_requests, [self.metrics])
        app = make_app(self.engine, self.metrics, model, limits, chat)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(make_config(app, limits))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)

    def __enter__(self) -> "Running":
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def answers(self, client: httpx.Client) -> None:
        """An ordinary request is answered as it was the first time."""
        answer = client.post("/v1/completions", json=ORDINARY)
        assert answer.status_code == 200
        text = answer.json()["choices"][0]["text"]
        self.answer = self.answer or text
        assert text == self.answer != ""

    def idle(self) -> None:
        """Waits until nothing runs; then all pages are free."""
        deadline = time.monotonic() + 10
        while self.llm.engine.has_unfinished or self.engine.num_requests:
            assert time.monotonic() < deadline, "a request stays"
            time.sleep(0.01)
        assert self.llm.engine.pool.num_used == 0


def refused(answer: httpx.Response, status: int, word: str = "") -> None:
    """In OpenAI's form, in few bytes, and with nothing about the server's insides."""
    assert answer.status_code == status, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == status
    assert word in error["message"]
    assert len(answer.content) < 2000
    for secret in (str(PACKAGE), "site-packages", "Traceback", 'File "', ".py"):
        assert secret not in answer.text


def talk(server: Running, *parts: bytes, wait: float = 0.0, until: float = 20.0) -> bytes:
    """Sends bytes, waiting between them; returns what comes back until the server closes, or is silent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=until) as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(wait)
        got = b""
        try:
            while chunk := connection.recv(65536):
                got += chunk
                if b"\r\n\r\n" in got and b"connection: close" not in got.lower() and not wait:
                    connection.settimeout(0.3)
        except (TimeoutError, ConnectionResetError):
            pass
        return got
