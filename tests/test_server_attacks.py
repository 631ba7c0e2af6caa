"""Attacks that hit servers of this kind, and what is left of them; after each the server answers as before.

Checkpoints that bring pickles or code are refused in test_load.py and test_tokenizer.py too; here, from the command.
"""

import ast
import json
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_helpers import DUMMY, KEY, SMALL, Running, refused, talk

import pagedjax
from pagedjax.cli import main
from pagedjax.llm import LLM
from pagedjax.server.guard import Limits
from pagedjax.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
MAX_BODY = 1_000_000
PACKAGE = Path(pagedjax.__file__).parent
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def server(small_smollm2: str) -> Iterator[Running]:
    llm = LLM(small_smollm2, **DUMMY, **SMALL)
    with Running(llm, Limits(api_keys=("another", KEY), max_body=MAX_BODY)) as running:
        yield running


@pytest.fixture
def raw(server: Running) -> Iterator[httpx.Client]:
    """A client; in the end an ordinary request is answered as before, and nothing is left running."""
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=60) as client:
        server.answers(client)
        yield client
        server.answers(client)
    server.idle()


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_module_unpickles_or_evaluates_anything():
    """But `executables.py`, which reads what it wrote to the user's own cache folder."""
    modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch", "code"}
    calls = {"eval", "exec", "compile", "__import__"}
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            named = node.arg if isinstance(node, ast.keyword) else ""
            if {name.partition(".")[0] for name in imported} & modules or called in calls or named == "allow_pickle":
                found.add(file.name)
    assert found == {"executables.py"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_a_pickle_of_weights_is_not_opened(name: str, text_model: Path, tmp_path: Path, capsys: Any):
    for file in text_model.iterdir():
        if file.suffix != ".safetensors" and file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    trap = tmp_path / "ran"
    (tmp_path / name).write_bytes(pickle.dumps(Trap(trap)))
    for model in (tmp_path, tmp_path / name):
        assert main(["generate", "--model", str(model), "Hi"]) == 2
        assert str(model) in capsys.readouterr().err and not trap.exists()


def test_code_in_a_checkpoint_does_not_run(text_model: Path, tmp_path: Path, capsys: Any):
    """It is left alone; what the configuration says besides is used."""
    for file in text_model.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    trap = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Evil: pass\n")
    names = "AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"
    for file in ("config.json", "tokenizer_config.json"):
        settings = json.loads((tmp_path / file).read_text())
        settings["auto_map"] = dict.fromkeys(names, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        (tmp_path / file).write_text(json.dumps(settings))
    code = main(["generate", "--model", str(tmp_path), "--dtype", "float32", "--max-tokens", "1", "Hi"])
    assert code == 0 and not trap.exists(), capsys.readouterr().err


def test_a_pickle_on_the_socket_is_no_request(server: Running, raw: httpx.Client, tmp_path: Path):
    body = pickle.dumps(Trap(tmp_path / "ran"))
    for kind in ("application/octet-stream", "application/x-pickle", "application/json", "text/plain"):
        refused(raw.post("/v1/completions", content=body, headers={"Content-Type": kind}), 400)
    assert b" 400 " in talk(server, body + b"\r\n\r\n")
    assert not (tmp_path / "ran").exists()


COUNTS: list[tuple[str, dict[str, Any], str]] = [
    ("completions", {"n": 10**9}, "n"),
    ("completions", {"n": 128, "prompt": ["a"] * 1024}, "choices in all"),
    ("completions", {"best_of": 10**9}, "best_of"),
    ("completions", {"logprobs": 10**9}, "logprobs"),
    ("completions", {"stop": ["a"] * 100_000}, "stop"),
    ("completions", {"stop_token_ids": [1] * 100_000}, "stop_token_ids"),
    ("completions", {"bad_words": ["a b"] * 100_000}, "bad_words"),
    ("completions", {"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
    ("completions", {"logit_bias": {str(i): 1 for i in range(40_000)}}, "fields"),
    ("completions", {"prompt": ["a"] * 100_000}, "prompt"),
    ("completions", {"prompt": [[5]] * 100_000}, "prompt"),
    ("chat/completions", {"top_logprobs": 10**9, "logprobs": True}, "top_logprobs"),
    ("chat/completions", {"n": 10**9}, "n"),
    ("chat/completions", {"messages": [{"role": "user", "content": ""}] * 20_000}, "messages"),
    ("../generate", {"n": 10**9}, "n"),
    ("../generate", {"logprobs": 10**9}, "logprobs"),
    ("../generate", {"prompt_logprobs": 10**9}, "prompt_logprobs"),
    ("../generate", {"stop": ["a"] * 100_000}, "stop"),
    ("../generate", {"bad_words": ["a b"] * 100_000}, "bad_words"),
]


def body_for(route: str) -> dict[str, Any]:
    chat = route.startswith("chat")
    return {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": "Hi"}


@pytest.mark.parametrize(("route", "change", "word"), COUNTS)
def test_nothing_is_unbounded(raw: httpx.Client, route: str, change: dict[str, Any], word: str):
    answer = raw.post(f"/v1/{route}".replace("/v1/..", ""), json=body_for(route) | {"max_tokens": 1} | change)
    refused(answer, 400, word)


UNKNOWN = "".join(f',"a{i}":1' for i in range(80_000))


def many(entry: str, count: int) -> str:
    return f"[{','.join([entry] * count)}]"


WRONG: list[tuple[str, str]] = [
    ("completions", f'{{"prompt": {many("null", 150_000)}}}'),
    ("completions", f'{{"prompt": {many("[{}]", 150_000)}}}'),
    ("completions", f'{{"prompt": "Hi", "stop": {many("1", 400_000)}}}'),
    ("completions", f'{{"prompt": "Hi"{UNKNOWN}}}'),
    ("chat/completions", f'{{"messages": {many("{}", 300_000)}}}'),
    ("chat/completions", f'{{"messages": [{{"role": "user"{UNKNOWN}}}]}}'),
]


@pytest.mark.parametrize(("route", "body"), WRONG)
def test_a_million_mistakes_cost_no_more_than_the_first(raw: httpx.Client, route: str, body: str):
    """The validation's errors, of which one is shown, would hold up all others for seconds."""
    start = time.perf_counter()
    refused(raw.post(f"/v1/{route}", content=body, headers={"Content-Type": "application/json"}), 400)
    assert time.perf_counter() - start < 1.5


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["a", ""], [[5], []], None])
@pytest.mark.parametrize("stream", [False, True])
def test_an_empty_prompt_is_refused(raw: httpx.Client, prompt: Any, stream: bool):
    refused(raw.post("/v1/completions", json={"prompt": prompt, "stream": stream}), 400, "prompt")
    if not prompt:
        refused(raw.post("/generate", json={"prompt": prompt, "stream": stream}), 400, "prompt")
        refused(raw.post("/v1/chat/completions", json={"messages": prompt, "stream": stream}), 400, "messages")


@pytest.mark.parametrize("field", ["chat_template", "chat_template_kwargs", "documents", "mm_processor_kwargs"])
def test_no_template_comes_with_a_request(raw: httpx.Client, field: str):
    bomb = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    for route in ("/v1/chat/completions", "/tokenize"):
        body = body_for("chat") | {field: {"template": bomb} if field.endswith("kwargs") else bomb}
        refused(raw.post(route, json=body), 400, field)


def test_a_long_prompt_is_refused_before_it_is_tokenised(raw: httpx.Client, monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []

    def counted(real: Any) -> Any:
        return lambda self, text, *args, **more: calls.append(len(text)) or real(self, text, *args, **more)

    for name in ("encode", "apply_chat_template"):
        monkeypatch.setattr(Tokenizer, name, counted(getattr(Tokenizer, name)))
    text = "a" * (MAX_BODY - 1000)
    named = [{"role": "user", "content": "a", "name": text}]
    long: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": text}),
        ("/v1/completions", {"prompt": [text]}),
        ("/generate", {"prompt": text}),
        ("/tokenize", {"prompt": text}),
        ("/tokenize", {"messages": [{"role": "user", "content": text}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]}),
        ("/v1/chat/completions", {"messages": named}),
    ]
    for route, body in long:
        start = time.perf_counter()
        refused(raw.post(route, json=body), 400, "characters")
        assert time.perf_counter() - start < 1.5
    assert not calls
    assert raw.post("/tokenize", json={"prompt": "a"}).json()["count"] == 1 and calls == [1]


def test_salts_separate_tenants_whatever_they_are(server: Running, raw: httpx.Client):
    """Half a surrogate pair is one too; it once ended the engine."""
    server.llm.reset_prefix_cache()
    prompt = "It was a bright cold day in April, and the clocks were striking thirteen, as they did every day. " * 2

    def cached(**more: Any) -> int:
        body = json.dumps({"prompt": prompt, "max_tokens": 1} | more)
        answer = raw.post("/v1/completions", content=body, headers=kind)
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    kind = {"Content-Type": "application/json"}
    salts: list[dict[str, Any]] = [{"cache_salt": salt} for salt in ("a", "b", "\ud800", "\udfff", "?")] + [{}]
    assert [cached(**salt) for salt in salts] == [0] * 6
    assert all(cached(**salt) > 0 for salt in salts)


LEAKS: list[tuple[str, str, Any]] = [
    ("POST", "/v1/completions", {"prompt": "Hi", "x" * 100_000: 1}),
    ("POST", "/v1/completions", {"prompt": "Hi", "model": "m" * 100_000}),
    ("POST", "/v1/completions", {"prompt": "Hi", "request_id": "r" * 100_000}),
    ("POST", "/v1/completions", {"prompt": "Hi", "logit_bias": {"k" * 100_000: 1}}),
    ("POST", "/v1/completions", {"prompt": "Hi", "bad_words": ["\ud800" * 10_000]}),
    ("POST", "/v1/completions", {"prompt": "Hi", "\ud800": 1}),
    ("POST", "/v1/completions", {"prompt": [-(10**400)]}),
    ("POST", "/v1/completions", {"prompt": "Hi", "temperature": "t" * 100_000}),
    ("POST", "/v1/completions", {"prompt": "Hi", "stream_options": {"s" * 100_000: 1}, "stream": True}),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "r" * 100_000, "content": "Hi"}]}),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud800" * 500}]}),
    ("POST", "/generate", {"prompt": "Hi", "x" * 100_000: 1}),
    ("POST", "/generate", {"prompt": "Hi", "temperature": "\ud800" * 10_000}),
    ("POST", "/detokenize", {"tokens": [10**30] * 1000}),
    ("POST", "/tokenize", {"prompt": "\ud800" * 500}),
    ("GET", "/" + "y" * 20_000, None),
    ("GET", "/../../etc/passwd", None),
    ("PUT", "/v1/completions", None),
]


@pytest.mark.parametrize(("method", "path", "body"), LEAKS)
def test_errors_neither_leak_nor_echo(raw: httpx.Client, method: str, path: str, body: Any):
    answer = raw.request(method, path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    refused(answer, answer.status_code)
    assert 400 <= answer.status_code < 500
