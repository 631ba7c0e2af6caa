"""Bodies that hypothesis makes up: always an answer, and if an error, a client's, in OpenAI's form."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_helpers import DUMMY

from pagedjax.llm import LLM
from pagedjax.server.app import make_app
from pagedjax.server.async_engine import AsyncEngine
from pagedjax.server.guard import Limits
from pagedjax.server.metrics import Metrics
from pagedjax.server.protocol import ChatRequest, CompletionRequest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
NAMES = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, "tools", "suffix", "no_such_field"})

numbers = st.integers() | st.floats(allow_nan=True) | st.integers(-3, 8)
scalars = st.none() | st.booleans() | numbers | st.text(max_size=12)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner))
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant", "robot"]), "content": values}),
    max_size=3,
)
likely = {"prompt": st.text(max_size=20) | st.lists(st.integers(0, 60_000), max_size=9), "messages": messages}
bodies = st.dictionaries(st.sampled_from(NAMES), values, max_size=4)
routes = st.sampled_from(["/v1/completions", "/v1/chat/completions", "/generate", "/tokenize", "/detokenize"])


@pytest.fixture(scope="module")
def client(small_smollm2: str) -> Iterator[TestClient]:
    small: Any = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 64, "num_pages": 60}
    llm = LLM(small_smollm2, **DUMMY, **small)
    engine, metrics = AsyncEngine(llm, watchers=[m := Metrics(llm.engine)]), m
    with TestClient(make_app(engine, metrics, "demo", Limits()), raise_server_exceptions=False) as client:
        yield client


def check(answer: Any) -> None:
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert len(answer.content) < 2000


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(routes, st.fixed_dictionaries(likely), bodies)
def test_no_body_makes_the_server_fail(client: TestClient, route: str, likely: Any, body: Any):
    content = {"max_tokens": 2} | likely | body
    content.pop("messages" if "chat" not in route else "prompt", None)
    check(client.post(route, content=json.dumps(content), headers={"Content-Type": "application/json"}))


def test_an_ordinary_request_is_answered_after_all_that(client: TestClient):
    answer = client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2})
    assert answer.status_code == 200 and client.get("/health").status_code == 200
