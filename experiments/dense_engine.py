"""An engine over a dense KV cache, which reserves `max_len` tokens for every row: the baseline of paging.

The same model code, sampler and requests as the paged engine's; `pagedjax.bench.run_workload` runs either. It knows how
long outputs are, since nothing but `max_tokens` ends them, so a row is free once its last token has been dispatched;
tokens are read back one step late, and the host waits for nothing else.
"""

import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pagedjax.batch import SAMPLING_FLOATS, SAMPLING_INTS
from pagedjax.executables import Executables, fingerprint
from pagedjax.models.llama import Llama, Params
from pagedjax.models.rope import apply_rope, rope_frequencies
from pagedjax.request import Request, Status
from pagedjax.row_params import unpack_sampling
from pagedjax.sampler import Features, sample
from pagedjax.sampling_params import SamplingParams
from pagedjax.schedule import Schedule, ScheduledSequence, SchedulerStats
from pagedjax.slots import Slots
from pagedjax.step import CUBLAS_ALONE, TRITON_ROWS
from pagedjax.step_function import StepFunction

from . import dense_attention
from .dense_attention import PREFILL, Choice

DenseKV = tuple[tuple[jax.Array, jax.Array], ...]  # k and v of each layer, laid out as `Decode` says
PROMPT_TOKENS = 2048  # of several prompts in one call, at most
SMALLEST_PROMPT, MOST_PROMPTS = 64, 8


def cuts(max_len: int, step: int) -> list[int]:
    """Lengths of the longest row for which decoding is compiled."""
    return [min(n, max_len) for n in range(step, max_len + step, step)]


def prompt_sizes(max_len: int) -> list[int]:
    """Lengths to which prompts are padded."""
    sizes = [SMALLEST_PROMPT << i for i in range(max_len.bit_length())]
    return [*(size for size in sizes if size < max_len), max_len]


class DenseScheduler:
    """Who has which row. Continuous batching: a free row goes to the first that waits. Static: rows are handed out when
    all are free. Prompts are computed whole."""

    def __init__(self, num_rows: int, max_len: int, continuous: bool):
        self.max_len, self.continuous = max_len, continuous
        self.waiting, self.stats = deque[Request](), SchedulerStats()
        self._rows: list[Request | None] = [None] * num_rows

    @property
    def running(self) -> list[Request]:
        """Requests with a row, at the newest step."""
        return [request for request in self._rows if request]

    def schedule(self) -> Schedule:
        """The next step: a token of every row that has one to come, and the prompts of those admitted."""
        self._rows = [r if r and r.num_to_compute else None for r in self._rows]
        decodes = [
            ScheduledSequence(r, row, r.num_computed_tokens, 1, True, True, ()) for row, r in enumerate(self._rows) if r
        ]
        prompts = list(self._admit()) if self.continuous or not decodes else []
        for s in (*decodes, *prompts):
            s.request.num_computed_tokens += s.num_tokens
            s.request.num_in_flight += 1
        if decodes or prompts:
            self.stats.count(1, sum(s.num_tokens for s in (*decodes, *prompts)), self.slots())
        return Schedule([*decodes, *prompts], [s.request for s in prompts])

    def slots(self) -> Slots:
        """What the cache's slots are used for."""
        running = self.running
        used, wanted = sum(r.num_computed_tokens for r in running), sum(r.max_len for r in running)
        free = self.max_len * (len(self._rows) - len(running))
        internal, external = self.max_len * len(running) - wanted, free if self.waiting else 0
        return Slots(used, wanted - used, internal, external, free - external)

    def _admit(self) -> Iterator[ScheduledSequence]:
        for row, owner in enumerate(self._rows):
            if owner is None and self.waiting:
                self._rows[row] = request = self.waiting.popleft()
                request.status, request.row, request.metrics.first_scheduled = Status.RUNNING, row, time.perf_counter()
                yield ScheduledSequence(request, row, 0, len(request.prompt_token_ids), False, True, ())

    def update(self, schedule: Schedule, tokens: list[int]) -> list[Request]:
        """Appends a step's tokens, one for each row; returns the requests that got one."""
        progressed = [s.request for s in schedule.sequences]
        for s in schedule.sequences:
            s.request.num_in_flight -= 1
            s.request.append(tokens[s.row])
            if s.request.finish_reason:
                s.request.status, s.request.row = Status.FINISHED, None
        return progressed


class DenseRunner:
    """Owns the device state: caches, written in place, and the last token of every row."""

    def __init__(
        self,
        model: Llama,
        params: Params,
        num_rows: int,
        max_len: int,
        cut: int,
        attention: Choice,
        executables: Path | None = None,
    ):
        """Decoding reads a multiple of `cut` tokens. `executables`: a folder where compiled functions are kept."""
        self.model, self.num_rows, self.max_len, self.attention = model, num_rows, max_len, attention
        self.compilations: Counter[str] = Counter()
        self._params, self._functions = tuple(params.values()), dict[tuple[int, ...], StepFunction]()
        parts = repr(model.config), model.fused, str(model.dtype), max_len, attention.decode_name, attention.prefill
        code, parts = sys.modules[__name__], (*parts, fingerprint(dense_attention))
        self._executables = Executables(executables, code, parts) if executables else None
        self._frequencies = rope_frequencies(model.config, max_len)
        self.cuts, self.prompt_sizes = cuts(max_len, cut), prompt_sizes(max_len)
        shape = attention.decode.cache_shape(model.config, num_rows, max_len)
        self._kv: DenseKV = tuple(
            (jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype)) for _ in range(model.config.num_layers)
        )
        self._last = jnp.zeros(num_rows, jnp.int32)

    def dispatch(self, schedule: Schedule) -> jax.Array:
        """Starts a step; waits for nothing. The tokens that it samples will be at their rows."""
        decodes = schedule.sequences[: schedule.num_decodes]
        if decodes:
            positions = np.zeros(self.num_rows, np.int32)
            positions[[s.row for s in decodes]] = [s.start for s in decodes]
            cut = next(n for n in self.cuts if n > positions.max())
            self._last, self._kv = self._decode(cut)(self._params, self._kv, self._last, positions)
        for size, prompts in self._together(schedule.sequences[schedule.num_decodes :]):
            tokens = np.zeros((len(prompts), size), np.int32)
            for i, s in enumerate(prompts):
                tokens[i, : s.num_tokens] = s.request.prompt_token_ids
            lens, rows = (np.asarray(x, np.int32) for x in zip(*[(s.num_tokens, s.row) for s in prompts], strict=True))
            prefill = self._prefill(len(prompts), size)
            self._last, self._kv = prefill(self._params, self._kv, self._last, tokens, lens, rows)
        self._last.copy_to_host_async()
        return self._last

    def _together(self, prompts: Sequence[ScheduledSequence]) -> Iterator[tuple[int, list[ScheduledSequence]]]:
        """Prompts of one padded length, a power of two of them in a call."""
        for size in self.prompt_sizes:
            alike = [s for s in prompts if size == next(n for n in self.prompt_sizes if n >= s.num_tokens)]
            for count in reversed(self._counts(size)):
                while len(alike) >= count:
                    yield size, alike[:count]
                    alike = alike[count:]

    def _counts(self, size: int) -> list[int]:
        """How many prompts of that length go in a call."""
        most = min(MOST_PROMPTS, self.num_rows, max(PROMPT_TOKENS // size, 1))
        return [1 << i for i in range(most.bit_length())]

    def warm_up(self) -> None:
        """Loads or compiles everything, then runs it twice; for a runner without requests. XLA makes a CUDA graph of a
        function in its second run."""
        calls: list[tuple[StepFunction, tuple[np.ndarray, ...]]]
        calls = [(self._decode(cut), (np.zeros(self.num_rows, np.int32),)) for cut in self.cuts]
        for size in self.prompt_sizes:
            for count in self._counts(size):
                lens, rows = np.ones(count, np.int32), np.arange(count, dtype=np.int32)
                calls.append((self._prefill(count, size), (np.zeros((count, size), np.int32), lens, rows)))
        state = self._params, self._kv, self._last
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            loaded = list(threads.map(lambda call: call[0].load(*state, *call[1]), calls))
            missing = [(f, (*state, *args)) for (f, args), found in zip(calls, loaded, strict=True) if not found]
            lowered = [(f, f.lower(*args), args) for f, args in missing]
            list(threads.map(lambda item: item[0].compile(item[1], *item[2]), lowered))
        for function, args in calls * 2:
            self._last, self._kv = function(self._params, self._kv, self._last, *args)
        jax.block_until_ready(self._last)

    def _function(self, key: tuple[int, ...], function: Callable[..., Any], num_tokens: int) -> StepFunction:
        """Kept by its key; the caches, its second argument, are donated."""
        if key not in self._functions:
            many = jax.default_backend() == "gpu" and num_tokens > TRITON_ROWS  # as the paged engine has it
            name, options = f"{function.__name__} {key}", CUBLAS_ALONE if many else None
            self._functions[key] = StepFunction(name, function, (1,), self._executables, options)
        return self._functions[key]

    def _decode(self, cut: int) -> StepFunction:
        """Of (params, kv, last tokens [B], positions [B]) -> (tokens [B], kv)."""
        attention = self.attention.decode

        def attend(q, k, v, positions, layer_kv, layer):
            q, k = self._rotate(q, k, positions)
            layer_kv = tuple(
                attention.write_tokens(cache, x, positions) for cache, x in zip(layer_kv, (k, v), strict=True)
            )
            return attention.attend(q, *(attention.first(cache, cut) for cache in layer_kv), positions + 1), layer_kv

        def decode(flat_params, kv: DenseKV, last: jax.Array, positions: jax.Array):
            self.compilations[f"decode {cut}"] += 1
            params = dict(zip(self.model.shapes, flat_params, strict=True))
            hidden, kv = self.model.hidden(params, last, positions, kv, attend)
            return self._sample(params, hidden, positions + 1), kv

        return self._function((cut,), decode, self.num_rows)

    def _prefill(self, count: int, size: int) -> StepFunction:
        """Of (params, kv, last tokens [B], tokens [count, size], lens [count], rows [count]) -> (last tokens, kv)."""
        attention, causal = self.attention.decode, PREFILL[self.attention.prefill[size]]

        def prefill(flat_params, kv: DenseKV, last: jax.Array, tokens: jax.Array, lens: jax.Array, rows: jax.Array):
            def attend(q, k, v, positions, layer_kv, layer):
                q, k = self._rotate(q, k, positions)
                q, k, v = (x.reshape(count, size, *x.shape[1:]) for x in (q, k, v))
                caches = list(layer_kv)
                for i in range(count):
                    caches = [attention.write_prompt(c, x[i], rows[i]) for c, x in zip(caches, (k, v), strict=True)]
                return causal(q, k, v).reshape(count * size, *q.shape[2:]), tuple(caches)

            self.compilations[f"prefill {count} {size}"] += 1
            params = dict(zip(self.model.shapes, flat_params, strict=True))
            positions = jnp.tile(jnp.arange(size), count)
            hidden, kv = self.model.hidden(params, tokens.reshape(-1), positions, kv, attend)
            final = hidden[jnp.arange(count) * size + lens - 1]
            return last.at[rows].set(self._sample(params, final, lens)), kv

        return self._function((count, size), prefill, count * size)

    def _rotate(self, q: jax.Array, k: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        return apply_rope(q, positions, self._frequencies), apply_rope(k, positions, self._frequencies)

    def _sample(self, params: Params, hidden: jax.Array, positions: jax.Array) -> jax.Array:
        """Greedy tokens."""
        zeros = jnp.zeros((hidden.shape[0], len(SAMPLING_FLOATS) + len(SAMPLING_INTS)), jnp.int32)
        logits = self.model.logits(params, hidden)
        return sample(logits, unpack_sampling(zeros), positions, None, Features()).tokens


class DenseEngine:
    """As much of an `Engine` as a benchmark needs, over a `DenseRunner` that other such engines have used before."""

    def __init__(self, runner: DenseRunner, continuous: bool):
        self.runner = runner
        self.scheduler = DenseScheduler(runner.num_rows, runner.max_len, continuous)
        self._in_flight: deque[tuple[Schedule, jax.Array]] = deque()

    def add_request(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> list[Request]:
        """Queues a greedy request that ends by its `max_tokens` alone. ValueError if it does not fit a row."""
        max_len, most = len(prompt_token_ids) + (params.max_tokens or 1), self.runner.max_len
        if max_len > most:
            raise ValueError(f"request {request_id!r} may reach {max_len} tokens; accepted: at most max_len={most}")
        if not (params.greedy and params.ignore_eos and params.n == 1 and params.max_tokens):
            raise ValueError(f"{params}; accepted: temperature=0, ignore_eos=True, n=1 and max_tokens")
        request = Request(request_id, prompt_token_ids, params, max_len)
        self.scheduler.waiting.append(request)
        return [request]

    @property
    def has_unfinished(self) -> bool:
        return bool(self.scheduler.waiting or self._in_flight or any(r.num_to_compute for r in self.scheduler.running))

    @property
    def num_compilations(self) -> int:
        return sum(self.runner.compilations.values())

    def step(self) -> list[Request]:
        """Dispatches a step and reads back the one before; returns the requests that got a token."""
        schedule = self.scheduler.schedule()
        if schedule.sequences:
            self._in_flight.append((schedule, self.runner.dispatch(schedule)))
        if self._in_flight and (not schedule.sequences or len(self._in_flight) > 1):
            landed, tokens = self._in_flight.popleft()
            return self.scheduler.update(landed, np.asarray(tokens).tolist())
        return []

    def check_integrity(self) -> None:
        """A row's owner knows it."""
        assert all(r.row == row for row, r in enumerate(self.scheduler._rows) if r and r.num_to_compute)
