"""The page at `/`, in a real browser where there is one: type, stream, stop."""

import re
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_helpers import Running

from pagedjax.demo import demo_model_path
from pagedjax.llm import LLM
from pagedjax.server.guard import Limits

PAGE = Path(__file__).parent.parent / "pagedjax" / "server" / "static" / "index.html"
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_the_page_takes_nothing_from_elsewhere():
    assert not re.findall(r"https?://|//\w+\.\w+/|@import|<link[^>]+href=\"(?!data:)", PAGE.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_chats_streams_stops_and_shows_pages(tmp_path: Path):
    sync_api = pytest.importorskip("playwright.sync_api")
    settings: Any = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 512, "num_pages": 80}
    llm = LLM(str(demo_model_path()), dtype="float32", **settings)
    with Running(llm, Limits(api_keys=("a-key",))) as server, sync_api.sync_playwright() as playwright:
        policy = httpx.get(server.url).headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'self'")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 640})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.fill("#text", "Name the three primary colours.")
        page.press("#text", "Enter")
        sync_api.expect(page.locator(".error")).to_contain_text("API key", timeout=20_000)
        page.click("#clear")
        page.fill("#key", "a-key")
        page.fill("#temperature", "0")
        page.fill("#tokens", "24")
        page.fill("#text", "Name the three primary colours.")
        page.click("#send")
        sync_api.expect(page.locator("#send")).to_be_enabled(timeout=120_000)
        assert re.search("red|blue|yellow", page.locator(".assistant").last.inner_text(), re.IGNORECASE)
        page.fill("#tokens", "400")
        page.fill("#text", "Tell me a very long story about a lighthouse.")
        page.click("#send")
        answer = page.locator(".assistant").last
        sync_api.expect(answer).to_have_text(re.compile(r"\w+ \w+ \w+"), timeout=120_000)
        sync_api.expect(page.locator("#running")).to_have_text("1", timeout=20_000)
        sync_api.expect(page.locator("#used")).not_to_have_text("0.0 %", timeout=20_000)
        page.screenshot(path=str(tmp_path / "playground.png"))
        page.click("#stop")
        sync_api.expect(page.locator("#send")).to_be_enabled(timeout=20_000)
        server.idle()
        sync_api.expect(page.locator("#running")).to_have_text("0", timeout=20_000)
        assert not errors
        browser.close()
