"""Automatic prefix caching: full pages are found again by the tokens that they and all pages before them hold.

As vLLM's: a page's key is the SHA-256 of its parent's key and its own tokens; the first page's parent is the salt. No
token rests on the hash alone: a page is found only if its tokens are those wanted and its parent is the page found
before it; what separates tenants is the salt's hash. A prompt's pages can be found from the step on that computes them,
for a step writes all keys and values of a layer before it reads any; what was generated, when its request ends or loses
its pages, for then the host has read the tokens. Host only: no jax.
"""

import hashlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from .page_pool import PagePool
from .request import Request


@dataclass(eq=False, slots=True)
class _Named:
    """A page that can be found."""

    page: int
    key: bytes
    parent: "_Named | None"
    content: bytes


@dataclass
class PrefixCacheStats:
    """Counters since the start, in tokens of requests as they were admitted, again after a preemption too."""

    num_queries: int = 0
    num_hits: int = 0

    @property
    def hit_rate(self) -> float:
        return self.num_hits / max(self.num_queries, 1)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class PrefixCache:
    """Names the pool's full pages and finds them."""

    def __init__(self, pool: PagePool, digest: Callable[[bytes], bytes] = sha256):
        self.pool, self.stats, self._digest = pool, PrefixCacheStats(), digest
        self._by_key: dict[bytes, _Named] = {}
        self._by_page: dict[int, _Named] = {}
        self.num_resets = 0
        pool.on_evict = self._forget

    def find(self, request: Request) -> list[int]:
        """The pages that hold a request's first tokens, as many as are there; never all of its tokens, for the last one
        must be computed to sample the next. None if it wants its prompt's log-probabilities, which need computing.
        """
        if request.params.prompt_logprobs is not None:
            return []
        found: list[int] = []
        parent = None
        count = (request.num_tokens - 1) // self.pool.page_size
        for key, content in self._pages(request, count)[:count]:
            named = self._by_key.get(key)
            if named is None or named.parent is not parent or named.content != content:
                break
            found.append(named.page)
            parent = named
        return found

    def publish(self, request: Request) -> None:
        """Lets the full pages of a running request be found whose tokens are known and whose step has been scheduled.
        Where equal ones can be found already, these stay the ones, and what follows is named after them."""
        known = len(request.prompt_token_ids) + len(request.output_token_ids)
        first, count = request.num_published, min(known, request.num_computed_tokens) // self.pool.page_size
        if first >= count or request.num_resets != self.num_resets:
            return
        pages = self._pages(request, count)
        parent = self._by_key.get(pages[first - 1][0]) if first else None
        if first and parent is None:
            return  # evicted, or never named
        for i in range(first, count):
            key, content = pages[i]
            named = self._by_key.get(key)
            if named is None:
                named = self._by_key[key] = self._by_page[request.pages[i]] = _Named(
                    request.pages[i], key, parent, content
                )
                self.pool.keep(named.page)
            elif named.parent is not parent or named.content != content:
                return
            parent = named
            request.num_published = i + 1

    def reset(self) -> None:
        """No page can be found any more, nor will those of requests that run now: for new weights."""
        self.num_resets += 1
        self._by_key.clear()
        self._by_page.clear()
        self.pool.forget()

    def _pages(self, request: Request, count: int) -> list[tuple[bytes, bytes]]:
        """Key and content of a request's first full pages, `count` at least; they stay with the request, whose tokens
        never change."""
        pages, size = request.page_keys, self.pool.page_size
        if len(pages) < count:
            tokens = array("q", request.token_ids(len(pages) * size, count * size))
            data, width = tokens.tobytes(), size * tokens.itemsize
            parent = pages[-1][0] if pages else self._digest((request.cache_salt or "").encode(errors="surrogatepass"))
            for at in range(0, len(data), width):
                content = data[at : at + width]
                parent = self._digest(parent + content)
                pages.append((parent, content))
        return pages

    def _forget(self, page: int) -> None:
        named = self._by_page.pop(page)
        del self._by_key[named.key]
