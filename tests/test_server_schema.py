"""`/openapi.json` holds what the server does: requests that schemathesis makes of it, and responses checked by it."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from server_helpers import DUMMY, KEY, Running

from pagedjax.llm import LLM
from pagedjax.server.guard import OPEN_PATHS, Limits

schemathesis = pytest.importorskip("schemathesis")
from schemathesis import checks  # noqa: E402  # pyright: ignore[reportMissingImports]
from schemathesis.specs.openapi import checks as openapi_checks  # noqa: E402  # pyright: ignore[reportMissingImports]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the package's own
CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.unsupported_method,
    openapi_checks.ignored_auth,
]
EXAMPLES = 40  # of each route
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example]
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def server(small_smollm2: str) -> Iterator[Running]:
    small: Any = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 64, "num_pages": 60}
    llm = LLM(small_smollm2, **DUMMY, **small)
    with Running(llm, Limits(api_keys=(KEY,))) as running:
        yield running
        running.idle()
        answer = httpx.post(f"{running.url}/v1/completions", json={"prompt": "Hi"}, headers=HEADERS, timeout=60)
        assert answer.status_code == 200


@pytest.fixture
def api(server: Running) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


ROUTES = [
    ("POST", path) for path in ("/v1/completions", "/v1/chat/completions", "/generate", "/tokenize", "/detokenize")
]
ROUTES += [("GET", path) for path in ("/v1/models", "/health", "/version", "/metrics")]


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_responses_are_as_the_document_says(api: Any, method: str, path: str, mode: str):
    """To requests that the document allows, and to others."""
    cases = api[path][method].as_strategy(generation_mode=schemathesis.GenerationMode[mode])

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=SLOW)
    @given(cases)
    def run(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, headers=HEADERS, timeout=60)

    with suppress(Unsatisfiable):  # of nothing that the document says of a route without parameters
        run()


LIKELY: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 2, "logprobs": 2, "echo": True, "n": 2}),
    ("/v1/completions", {"prompt": ["Hi"], "max_tokens": 2, "stream": True}),
    ("/v1/completions", {"prompt": "Hi", "model": "another"}),
    ("/v1/completions", {"prompt": "word " * 500}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "logprobs": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "stream": True}),
    ("/generate", {"prompt": "Hi", "max_tokens": 2, "n": 2}),
    ("/generate", {"prompt": "Hi", "max_tokens": 2, "stream": True}),
    ("/tokenize", {"prompt": "Hi"}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]


@pytest.mark.parametrize(("path", "body"), LIKELY)
def test_ordinary_responses_are_as_the_document_says(api: Any, path: str, body: dict[str, Any]):
    case = api[path]["POST"].Case(body=body, media_type="application/json")
    case.call_and_validate(checks=CHECKS[:5], headers=HEADERS, timeout=60)


def test_the_document_tells_of_errors_and_keys(server: Running):
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert "HTTPValidationError" not in str(document)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert ("security" in operation) == (path not in OPEN_PATHS)
            wanted = {"200", "400", "401", "404", "413", "503"} if method == "post" else {"200", "431"}
            assert wanted <= set(operation["responses"]) and "422" not in operation["responses"]
    for path, kind in (("/v1/completions", "text/event-stream"), ("/generate", "application/x-ndjson")):
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        assert {"application/json", kind} == set(content)
