"""What the README's sections on the server and on training say to type works: against a server of the demo model, and
here."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_helpers import PACKAGE, SMALL, Running

from pagedjax.cli import _parser
from pagedjax.demo import demo_model_path
from pagedjax.llm import LLM
from pagedjax.server.guard import Limits

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
(TRAINING,) = re.findall(
    r"^## In a JAX program that trains\n.*?^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE
)
SECTION = re.search(r"^## Over HTTP\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)[1]
BASH, PYTHON = (re.findall(rf"^```{kind}\n(.*?)^```", SECTION, re.DOTALL | re.MULTILINE) for kind in ("bash", "python"))
(SERVE,) = [shlex.split(block) for block in BASH if "pagedjax serve" in block]
CURLS = [block for block in BASH if block.startswith("curl ")]
ADDRESS = "127.0.0.1:8000"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_the_command_that_starts_the_server_is_one():
    args = _parser().parse_args(SERVE[1:])
    assert SERVE[:2] == ["pagedjax", "serve"] and args.served == "meta-llama/Llama-3.2-1B-Instruct"
    assert (args.served_model_name, args.api_key, f"{args.host}:{args.port}") == ("llama", ["secret"], ADDRESS)
    assert len(BASH) == 1 + len(CURLS) and CURLS and PYTHON


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    llm = LLM(str(demo_model_path()), dtype="float32", **SMALL)
    with Running(llm, Limits(api_keys=("secret",)), model="llama") as running:
        yield running
        running.idle()


def run(server: Running, command: list[str], text: str) -> str:
    """The output of a program that reads a block, with this server's address in it."""
    assert ADDRESS in text
    text = text.replace(ADDRESS, f"127.0.0.1:{server.port}")
    env = os.environ | {"PYTHONPATH": str(PACKAGE), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(command, input=text, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
@pytest.mark.parametrize("block", CURLS)
def test_the_curl_commands_are_answered(server: Running, block: str):
    output = run(server, ["bash", "-e"], block.replace("curl ", "curl --silent --show-error --fail-with-body "))
    if "response_format" in block:
        said = json.loads(json.loads(output)["choices"][0]["message"]["content"])
        assert set(said) == {"name"} and isinstance(said["name"], str)
        return
    if '"stream": true' not in block:
        assert json.loads(output)["choices"][0]["text"].startswith(" Paris")
        return
    events = [line.removeprefix("data: ") for line in output.splitlines() if line]
    chunks = [json.loads(event) for event in events[:-1]]
    assert events[-1] == "[DONE]" and chunks[0]["model"] == "llama"
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)


@pytest.mark.slow
@pytest.mark.parametrize("block", PYTHON)
def test_the_python_programs_run(server: Running, block: str):
    pytest.importorskip("langchain_openai")
    assert "Paris" in run(server, [sys.executable, "-W", "ignore", "-"], block)


@pytest.mark.slow
def test_the_program_that_trains_learns():
    names: dict[str, Any] = {}
    exec(TRAINING, names)
    assert names["llm"].engine.policy_version == len(names["rewards"]) == 10
    assert max(names["rewards"][-3:]) > names["rewards"][0] + 0.05
