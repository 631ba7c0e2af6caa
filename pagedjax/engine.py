"""The continuous-batching loop: schedule, dispatch, and read back `lookahead` steps late."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from .beam_search import BeamSearch, BeamSearchParams
from .checks import check_params, check_prompt, check_request
from .config import EngineConfig
from .host_pages import make_swap_space
from .in_flight import InFlight
from .kv_cache import bytes_per_page
from .landing import keep_logprobs, keep_prompt_logprobs
from .memory import resolve_config
from .models.llama import Llama
from .page_pool import PagePool, PageStats
from .pallas_kernels.dispatch import Heads, paged_ops
from .prefix_cache import PrefixCache
from .request import Request, Status
from .runner import Runner
from .sampling_params import SamplingParams
from .schedule import Schedule
from .scheduler import Scheduler
from .structured import Constraint, token_masks
from .weights import Weights


class Engine:
    """Runs requests through a model on JAX's default device.

    Tokens in, tokens out: text is the business of `LLM`, except that `token_text` gives logprobs their text.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: Llama,
        params: Any,
        token_text: Callable[[int], str] | None = None,
        executables: Path | None = None,
    ):
        """`params` are as `update_params` takes them. `executables`: a folder where compiled functions are kept, if
        any."""
        llama = model.config
        group = llama.num_q_heads // llama.num_kv_heads
        heads = Heads(llama.head_dim, group, config.page_size, model.dtype)
        ops = paged_ops(config.attention_impl, heads, batch_invariant=config.batch_invariant)
        weights = Weights(model, params)
        self.config = resolve_config(replace(config, attention_impl=ops.impl), model, ops, executables)
        self.runner = Runner(self.config, weights, ops, executables)
        self.pool = PagePool(self.config.num_pages, self.config.page_size, self.config.eviction())
        sizes = self.config.max_num_seqs, self.config.max_num_batched_tokens, self.config.max_mixed_tokens
        self.prefix_cache = PrefixCache(self.pool) if self.config.enable_prefix_caching else None
        allocation = self.config.allocation_class(self.pool, self.config.max_model_len)
        swap = make_swap_space(self.config, model)
        self.scheduler = Scheduler(self.pool, *sizes, self.prefix_cache, allocation, swap)
        self._model_config = model.config
        self._token_text = token_text
        self._in_flight: deque[InFlight] = deque()
        self._aborted: list[Request] = []
        self._searches: list[BeamSearch] = []
        self._num_requests = 0

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        bad_words: Sequence[Sequence[int]] = (),
        make_detokenizer: Callable[[], Any] | None = None,
        constraint: Constraint | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
        recorded: bool = False,
    ) -> list[Request]:
        """Queues a request; returns its `params.n` sequences. Raises ValueError on what can never run.

        `bad_words` are token sequences never to be produced. `make_detokenizer` makes one detokenizer per sequence.
        `constraint` is what each of them must be, at its beginning.
        Requests share pages only with those of the same `cache_salt`. Less `priority` is served sooner. `recorded` ones
        keep the log-probabilities of their tokens under the distributions that these were sampled from.
        """
        prompt = check_prompt(prompt_token_ids, self.config.max_model_len, self._model_config.vocab_size)
        check_params(params, self._model_config.vocab_size, self.config.max_logprobs)
        number = self._num_requests
        max_len = self._max_len(prompt, params)
        requests = [
            Request(
                request_id=request_id,
                prompt_token_ids=prompt,
                params=params,
                max_len=max_len,
                seed=self._seed(params, number, child),
                eos_ids=frozenset(self._model_config.eos_token_ids),
                bad_words=tuple(tuple(words) for words in bad_words),
                cache_salt=cache_salt,
                priority=priority,
                recorded=recorded,
                policy_runs=((0, self.policy_version),),
                detokenizer=make_detokenizer() if make_detokenizer else None,
                constraint=constraint.copy() if constraint else None,
            )
            for child in range(params.n)
        ]
        check_request(requests[0])
        self.scheduler.add(requests[0], requests[1:])
        self._num_requests += 1
        return requests

    def add_beam_search(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: BeamSearchParams,
        decode: Callable[[list[int]], str] | None = None,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> BeamSearch:
        """Queues a search; it is `done` some steps later. Raises ValueError on what can never run. `decode` gives the
        text of token ids."""
        prompt = check_prompt(prompt_token_ids, self.config.max_model_len, self._model_config.vocab_size)
        check_params(params.stopping, self._model_config.vocab_size, self.config.max_logprobs)
        width, config = params.beam_width, self.config
        max_len = self._max_len(prompt, params.stopping)
        pages = width * self.pool.pages_for(max_len)
        if not self.scheduler.allocation.shares:
            raise ValueError(f"beams share pages, which allocation={config.allocation!r} does not; accepted: paged")
        if width > config.max_num_seqs or pages > self.pool.num_usable:
            raise ValueError(
                f"beam_width={width} may take {width} rows and {pages} pages; accepted: up to "
                f"max_num_seqs={config.max_num_seqs} and the pool's {self.pool.num_usable}"
            )
        eos_ids = frozenset(self._model_config.eos_token_ids)
        sampling = params.sampling(eos_ids, self._model_config.vocab_size)
        salted = {"cache_salt": cache_salt, "priority": priority}
        root = Request(request_id, prompt, sampling, max_len, eos_ids=eos_ids, **salted)
        search = BeamSearch(root, params, decode)
        self._searches.append(search)
        self.scheduler.add(root)
        return search

    def abort_search(self, search: BeamSearch) -> None:
        """Ends a search now; its output is what has been found."""
        search.end(self.scheduler)

    def abort(self, requests: Iterable[Request]) -> None:
        """Ends requests now; their pages are free at once."""
        for request in requests:
            if request.status is not Status.FINISHED:
                self.scheduler.abort(request)
                self._aborted.append(request)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting or self._in_flight or self._aborted)

    def step(self) -> list[Request]:
        """Dispatches one step, or several where nothing waits; reads back what was dispatched `lookahead` calls ago.

        Returns the requests that were aborted since the last call, and those that got a token, once for each.
        RuntimeError while memory is released.
        """
        self.runner.check_memory()
        progressed, self._aborted = self._aborted, []
        schedule = self.scheduler.schedule()
        if schedule.sequences:
            schedule = self.scheduler.extend(schedule, self.runner.num_steps(schedule))
            make_masks = partial(self._make_masks, schedule, progressed)
            self._in_flight.append(self.runner.dispatch(schedule, make_masks))
        if self._in_flight and (not schedule.sequences or len(self._in_flight) > self.config.lookahead):
            progressed += self._land(self._in_flight.popleft())
        return progressed

    def _make_masks(self, schedule: Schedule, progressed: list[Request], num_rows: int) -> np.ndarray:
        """What each sequence may sample, which depends on its last token: so all that is in flight is read first, while
        the device computes the step."""
        while self._in_flight:
            progressed += self._land(self._in_flight.popleft())
        constraints = [s.request.constraint if s.samples else None for s in schedule.sequences]
        return token_masks(constraints, num_rows, self._model_config.vocab_size)

    def warm_up(self, progress: bool = True) -> None:
        """Compiles every bucket before the first request, with a progress bar. ValueError if there are requests."""
        if self.has_unfinished:
            raise ValueError("warm_up while requests are unfinished; accepted: an engine without requests")
        self.runner.check_memory()
        with tqdm(total=self.runner.num_common, desc="compiling", disable=not progress) as bar:
            for name in self.runner.warm_up():
                bar.set_postfix_str(name)
                bar.update()

    def reset_prefix_cache(self) -> None:
        """No request finds pages of earlier ones any more, as must be when the weights change."""
        if self.prefix_cache:
            self.prefix_cache.reset()

    @property
    def policy_version(self) -> int:
        """How often the weights have been updated."""
        return self.runner.weights.version

    def update_params(self, params: Any, recompute: bool = False) -> None:
        """New weights, as `Weights.update` takes them, for all steps from now on; those in flight have the old ones.

        No request finds pages of the old weights. Requests under way go on in theirs, which the old weights filled, as
        in vLLM; or, with `recompute`, lose them and compute what they have by the new weights.
        """
        self.runner.weights.update(params)
        self.reset_prefix_cache()
        self.scheduler.begin_policy(self.policy_version, recompute)

    def release_memory(self) -> None:
        """Gives the memory of pages and rows back to JAX until `restore_memory`. RuntimeError if there are requests."""
        if self.scheduler.running or self.scheduler.waiting:
            raise RuntimeError("release_memory while requests are unfinished; accepted: an engine without requests")
        while self._in_flight:  # past the ends of what has finished
            self._land(self._in_flight.popleft())
        self.reset_prefix_cache()
        self.runner.release()

    def restore_memory(self) -> None:
        """Empty pages and rows as they were before `release_memory`; nothing is compiled again."""
        self.runner.restore()

    def page_stats(self) -> PageStats:
        """How pages are used now; a page takes `page_bytes` bytes."""
        size = self.config.page_size
        filled = {
            page: min(size, request.num_computed_tokens - i * size)
            for request in self.scheduler.running
            for i, page in enumerate(request.pages)
        }
        return self.pool.stats(sum(filled.values()))

    @property
    def page_bytes(self) -> int:
        """Of one page in all layers."""
        return bytes_per_page(self._model_config, self.config.page_size, self.runner.model.dtype)

    @property
    def num_compilations(self) -> int:
        """Functions compiled so far; `runner.compilations` has them by name, and `runner.weights.compilations`."""
        return sum((self.runner.compilations + self.runner.weights.compilations).values())

    def check_integrity(self) -> None:
        """Every page and row has exactly one owner; meant for idle moments and tests."""
        self.scheduler.check_integrity()

    def _max_len(self, prompt: list[int], params: SamplingParams) -> int:
        most = self.config.max_model_len
        return min(len(prompt) + (params.max_tokens or most), most)

    def _seed(self, params: SamplingParams, number: int, child: int) -> int:
        """A seeded request's child i has seed + i; without a seed it follows from the engine's and the number."""
        if params.seed is not None:
            return params.seed + child
        words = np.random.SeedSequence([self.config.seed % 2**64, number, child]).generate_state(2)
        return int(words[0]) << 32 | int(words[1])

    def _land(self, step: InFlight) -> list[Request]:
        """Waits for a step's results and hands them to the scheduler."""
        sampled = jax.device_get(step.sampled)
        for part in step.prompt_logprobs:
            keep_prompt_logprobs(part, self._token_text)
        keep_logprobs(step.schedule, sampled, self._token_text)
        num_seqs, schedule, progressed = len(step.schedule.sequences), step.schedule, []
        for i, tokens in enumerate(np.atleast_2d(sampled.tokens)[:, :num_seqs].tolist()):
            progressed += self.scheduler.update(schedule, tokens, i)
        return progressed + self._advance()

    def _advance(self) -> list[Request]:
        """Takes searches on whose beams' next tokens are all known; a beam of each."""
        ready = [search for search in self._searches if not search.done and search.ready]
        progressed = [search.beams[0] for search in ready]
        for search in ready:
            search.advance(self.scheduler)
        self._searches = [search for search in self._searches if not search.done]
        return progressed
