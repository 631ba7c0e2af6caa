"""The device side of the engine: parameters, page pool, rows, and the dispatch of one schedule."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import step as step_module
from .adjustments import make_adjustments, row_values
from .batch import MANY_TABLE_ROWS, TABLE_ROWS, Bucket, Buckets, make_batch, page_tables, prompt_targets, row_states
from .config import ResolvedConfig, platform_defaults
from .executables import Executables
from .host_pages import HostPages
from .in_flight import InFlight, PromptLogprobs
from .kv_cache import make_kv_cache
from .models.llama import Llama
from .page_pool import NULL_PAGE
from .pallas_kernels.dispatch import PagedOps
from .request import Request
from .sampler import Features, Sampled, num_alternatives
from .schedule import Schedule, ScheduledSequence
from .step import Step
from .step_function import StepFunction
from .step_state import Sequences, make_rows, sample_shapes
from .weights import Weights

logger = logging.getLogger(__name__)

GREEDY, RANDOM = COMMON_FEATURES = Features(), Features(random=True)  # compiled before the first request
FUSED_ROWS = 128  # up to which greedy decoding is one function: two calls would take longer than such a step


class Runner:
    """Owns the device state."""

    def __init__(self, config: ResolvedConfig, weights: Weights, ops: PagedOps, executables: Path | None = None):
        """`executables`: a folder where compiled functions are kept, if any."""
        self.config, self.weights, self.model = config, weights, weights.model
        self.compilations: Counter[str] = Counter()
        self._step, self.buckets = make_step(config, self.model, ops, self.compilations, executables)
        self._host_pages = HostPages(self._step, config.page_size)
        self._sent, self._again = np.empty(0, np.int32), None
        self._make_state()

    def _make_state(self) -> None:
        config = self.config
        self._kv: Any = make_kv_cache(self.model.config, config.num_pages, config.page_size, self.model.dtype)
        self._rows: Any = make_rows(config.max_num_seqs, config.pages_per_seq)
        self._adjustments: Any = None

    def release(self) -> None:
        """Drops the device state; for an engine without requests."""
        self.check_memory()
        self._kv = self._rows = self._adjustments = None

    def restore(self) -> None:
        """Makes it anew."""
        if self._rows is not None:
            raise RuntimeError("restore_memory, but memory is not released")
        self._make_state()

    def check_memory(self) -> None:
        """RuntimeError unless the device state is there."""
        if self._rows is None:
            raise RuntimeError("memory is released; call restore_memory first")

    def dispatch(self, schedule: Schedule, make_masks: Callable[[int], np.ndarray]) -> InFlight:
        """Starts one step and the copies of its results to the host; waits for neither. `make_masks` is called, if some
        outputs are constrained, when the forward pass has begun: what may be sampled in so many rows."""
        bucket = self.buckets.pick(schedule)
        features = self._features(schedule)
        if schedule.swaps:
            self._kv = self._host_pages.swap(self._kv, schedule.swaps)
        self._copy_pages(schedule.copies)
        self._write_tables(schedule.tables)
        self._write_rows(schedule.rewritten)
        self._write_adjusted(schedule.admitted)
        packed = self._send(make_batch(schedule, bucket, self._step.null_row))
        if schedule.swaps and schedule.swaps.late:
            packed = self._host_pages.ahead(packed)
            self._host_pages.begin(schedule.swaps.late)
        prompt_logprobs: list[PromptLogprobs] = []
        state = self._kv, self._rows
        if bucket.num_steps > 1 or (fused(bucket) and features == GREEDY):
            sampled, self._kv, self._rows = self._step.decode(bucket, features)(self.weights.arrays, *state, packed)
        else:
            last, hidden, sequences, self._kv, self._rows = self._step.forward(bucket)(
                self.weights.arrays, *state, packed
            )
            sampled = self._sample(last, sequences, features, make_masks(last.shape[0]) if features.masked else None)
            prompt_logprobs = list(self._prompt_logprobs(schedule, hidden))
        self._kv = self._host_pages.finish(self._kv)
        for array in jax.tree.leaves((sampled, [p.sampled for p in prompt_logprobs])):
            array.copy_to_host_async()
        return InFlight(schedule, sampled, prompt_logprobs)

    def num_steps(self, schedule: Schedule) -> int:
        """How many decode steps may go in one dispatch; 1 for what is not compiled before the first request."""
        ready = [features for _, features in self._several(self.buckets.pick(schedule))]
        return self.config.decode_steps if ready and self._features(schedule) in ready else 1

    def _send(self, batch: np.ndarray) -> np.ndarray | jax.Array:
        """The batch as the step takes it. A new one goes as it is, for a call transfers it sooner than `jnp.asarray`
        would; what comes again, as of few rows that decode, stays on the device."""
        if not np.array_equal(batch, self._sent):
            self._sent, self._again = batch, None
            return batch
        if self._again is None:
            self._again = jnp.asarray(batch)
        return self._again

    def warm_up(self) -> Iterator[str]:
        """Loads or compiles what greedy and random sampling need of every bucket, naming each function when it is
        there, then runs them.

        Only for an engine without requests: while something compiles the pool is dropped, for XLA tries GEMMs out on
        the device, in every thread with buffers of its own. Functions are lowered one after the other, since the keys
        of JAX's compilation cache follow that order, and compiled in threads. Each runs twice at the end: XLA records a
        CUDA graph in a function's second run, and making an executable drops the graphs of others.
        """
        missing = []
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            common = list(self._common())
            loaded = threads.map(lambda item: item[0].load(*item[1]), common)
            for (function, args), found in zip(common, loaded, strict=True):
                if found:
                    yield function.name
                else:
                    missing.append((function, args))
            if missing:
                yield from self._compile(missing, threads)
        for _ in range(2):
            self._run_padding()
        self.wait()

    def _compile(
        self, missing: list[tuple[StepFunction, tuple[Any, ...]]], threads: ThreadPoolExecutor
    ) -> Iterator[str]:
        """Nothing that stays may be allocated meanwhile: in the middle of where the pool was, it could keep the pool
        from coming back."""
        del self._kv, self._rows
        try:
            lowered = ((function, args, function.lower(*args)) for function, args in missing)
            compiling = {threads.submit(function.compile, low, *args): function for function, args, low in lowered}
            for future in as_completed(compiling):
                future.result()
                yield compiling[future].name
        finally:
            self._make_state()

    @property
    def num_common(self) -> int:
        """How many functions `warm_up` readies."""
        return sum(1 for _ in self._common())

    def _common(self) -> Iterator[tuple[StepFunction, tuple[Any, ...]]]:
        """Functions and the shapes of their arguments."""
        kv, rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (self._kv, self._rows))
        padding = next(page_tables([(self._step.null_row, [])], self._step.null_row, self.config.pages_per_seq))
        row, tables = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in padding)
        yield self._step.write_tables(), (rows, row, tables)
        yield self._step.copy_pages(TABLE_ROWS), (kv, row, row)
        if self.config.swaps:
            yield from self._host_pages.functions(kv)
        sampled: set[tuple[int, Features]] = set()
        for bucket in (*self.buckets.decode, *self.buckets.mixed):
            packed = jax.ShapeDtypeStruct(self._padding(bucket).shape, jnp.int32)
            args = (self.weights.arrays, kv, rows, packed)
            if fused(bucket):
                yield self._step.decode(bucket, GREEDY), args
            for several, features in self._several(bucket):
                packed = jax.ShapeDtypeStruct(self._padding(several).shape, jnp.int32)
                yield self._step.decode(several, features), (self.weights.arrays, kv, rows, packed)
            yield self._step.forward(bucket), args
            for features in COMMON_FEATURES[fused(bucket) :]:
                if (bucket.num_seqs, features) not in sampled:
                    sampled.add((bucket.num_seqs, features))
                    args = (self.weights.arrays, *sample_shapes(self.model, bucket.num_seqs), rows, None, None)
                    yield self._step.sample(bucket.num_seqs, features), args

    def _run_padding(self) -> None:
        self._write_tables([(self._step.null_row, [])])
        self._copy_pages([(NULL_PAGE, NULL_PAGE)])
        if self.config.swaps:
            self._kv = self._host_pages.run_padding(self._kv)
        for bucket in (*self.buckets.decode, *self.buckets.mixed):
            if fused(bucket):
                _, self._kv, self._rows = self._step.decode(bucket, GREEDY)(*self._idle(bucket))
            for several, features in self._several(bucket):
                _, self._kv, self._rows = self._step.decode(several, features)(*self._idle(several))
            last, _, sequences, self._kv, self._rows = self._step.forward(bucket)(*self._idle(bucket))
            for features in COMMON_FEATURES[fused(bucket) :]:
                self._sample(last, sequences, features)

    def _several(self, bucket: Bucket) -> list[tuple[Bucket, Features]]:
        """The same rows over several steps, and how they may be sampled; at random only few, whose steps are short."""
        if self.config.decode_steps == 1 or not bucket.decode:
            return []
        several = replace(bucket, num_steps=self.config.decode_steps)
        return [(several, features) for features in COMMON_FEATURES[: 1 + fused(bucket)]]

    def _padding(self, bucket: Bucket) -> np.ndarray:
        return make_batch(Schedule([], []), bucket, self._step.null_row)

    def _idle(self, bucket: Bucket) -> tuple[Any, ...]:
        """Arguments of a step of padding alone."""
        return self.weights.arrays, self._kv, self._rows, jnp.asarray(self._padding(bucket))

    def memory_analysis(self) -> Iterator[tuple[str, Any]]:
        """XLA's account of every step function: its temporaries, and the bytes it writes in place."""
        for bucket in (*self.buckets.decode, *self.buckets.mixed):
            fast = [self._step.decode(bucket, GREEDY)] if fused(bucket) else []
            for function in (self._step.forward(bucket), *fast):
                function.ready(*self._idle(bucket))
                yield str(bucket), function.memory_analysis()

    def wait(self) -> None:
        """Returns when the device has finished every step dispatched so far."""
        jax.block_until_ready(self._rows)

    def _sample(
        self, last: jax.Array, sequences: Sequences, features: Features, masks: np.ndarray | None = None
    ) -> Sampled:
        step = self._step.sample(last.shape[0], features)
        adjustments = self._adjustments if features.adjusted else None
        sampled, self._rows, adjustments = step(self.weights.arrays, last, sequences, self._rows, adjustments, masks)
        if features.adjusted:
            self._adjustments = adjustments
        return sampled

    def _features(self, schedule: Schedule) -> Features:
        """What the sampler must be able to do for this batch."""
        needs = {s.request.needs for s in schedule.sequences if s.samples}
        processed = self.config.logprobs_mode == "processed_logprobs"
        return Features.of(needs, processed, self.model.config.vocab_size)

    def _copy_pages(self, copies: list[tuple[int, int]]) -> None:
        size = TABLE_ROWS if len(copies) <= TABLE_ROWS else MANY_TABLE_ROWS
        for i in range(0, len(copies), size):
            pages = np.full((size, 2), NULL_PAGE, np.int32)
            pages[: len(copies[i : i + size])] = copies[i : i + size]
            self._kv = self._step.copy_pages(size)(self._kv, *pages.T.copy())

    def _write_tables(self, tables: list[tuple[int, list[int]]]) -> None:
        """Page tables of rows that begin with shared pages; a batch has no room for as many as there may be."""
        for row, values in page_tables(tables, self._step.null_row, self.config.pages_per_seq):
            self._rows = self._step.write_tables()(self._rows, row, values)

    def _write_rows(self, sequences: list[ScheduledSequence]) -> None:
        for states in row_states(sequences, self._step.null_row, self.config.pages_per_seq):
            self._rows = self._step.write_rows(states["row"].size)(self._rows, states)

    def _write_adjusted(self, admitted: list[Request]) -> None:
        """Writes the rows of admitted requests that change logits; makes the state at the first of them."""
        for request in admitted:
            if request.adjusted and request.row is not None:
                vocab_size = self.model.config.vocab_size
                if self._adjustments is None:
                    self._adjustments = make_adjustments(self.config.max_num_seqs + 1, vocab_size)
                values = row_values(request, vocab_size)
                write = self._step.write_adjustments()
                self._adjustments = write(self._adjustments, np.int32(request.row), values)

    def _prompt_logprobs(self, schedule: Schedule, hidden: jax.Array) -> Iterator[PromptLogprobs]:
        """Chunks of prompt log-probabilities: the token at position p is judged by the hidden state at p - 1."""
        for target in prompt_targets(schedule, self.config.logprob_rows):
            wanted = num_alternatives([target.wanted], self.model.config.vocab_size)
            step = self._step.prompt_logprobs(hidden.shape[0], wanted)
            sampled = step(self.weights.arrays, hidden, np.int32(target.row), target.tokens)
            yield PromptLogprobs(target.request, target.first, target.count, sampled)


def fused(bucket: Bucket) -> bool:
    """Whether its greedy sampling is part of its forward function."""
    return bucket.decode and bucket.num_seqs <= FUSED_ROWS


def make_step(
    config: ResolvedConfig, model: Llama, ops: PagedOps, compilations: Counter[str], folder: Path | None = None
) -> tuple[Step, Buckets]:
    """The functions and the buckets of a resolved configuration; `folder` is where executables are kept."""
    sizes = config.page_size, config.max_model_len, config.max_num_seqs
    parts = repr(model.config), model.fused, str(model.dtype), ops, sizes, config.batch_invariant
    executables = None if folder is None else Executables(folder, step_module, parts)
    step = Step(model, ops, *sizes, compilations, executables, by_token=config.batch_invariant)
    limits = platform_defaults(jax.devices()[0].platform).bucket_limits
    buckets = Buckets(config.max_num_seqs, config.max_num_batched_tokens, config.page_size, *limits)
    return step, buckets.largest() if config.batch_invariant else buckets
