"""The jitted functions of a step: forward, sample, and both fused for plain decoding. Device state in, device state
out.

The page pool and the rows' state are donated and written in place. A bucket, and for the sampler a set of features, is
one compilation; forward and sample compile apart, so that sampler variants add to shapes rather than multiply them.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .adjustments import Adjustments, gather_rows, record, write_row
from .batch import Bucket
from .config import SAMPLE_ROWS
from .executables import Executables
from .kv_cache import KVCache
from .models.llama import PRODUCTS, Attend, Llama, Params, Products
from .models.rope import apply_rope, rope_frequencies, rotation
from .pallas_kernels.dispatch import PagedOps, joins_rows
from .products import JoinedProducts, joins
from .row_params import unpack_sampling
from .sampler import Features, Sampled, sample, token_logprobs
from .step_function import StepFunction
from .step_state import Rows, Sequences, StepTokens, decode_tokens, mixed_tokens, unpack

# XLA tries products out with weights that fit in the L2 cache, and then takes Triton's where cuBLAS's are faster here:
# beyond so many rows.
TRITON_ROWS = 64
CUBLAS_ALONE = {"xla_gpu_enable_triton_gemm": False}


def _kept(make: Callable[..., StepFunction]) -> Callable[..., StepFunction]:
    """A method that makes a function for its arguments once. The step keeps it, so that it ends with its engine."""

    @wraps(make)
    def get(self: "Step", *args: Any) -> StepFunction:
        key = make.__name__, *args
        if key not in self.functions:
            self.functions[key] = make(self, *args)
        return self.functions[key]

    return get


@dataclass(frozen=True, eq=False)
class Step:
    """Builds and keeps the jitted functions. `compilations` counts how often each was traced, by name. `by_token`:
    every token attends as if it decoded, those of prompts too, so that how prompts are cut changes no bit."""

    model: Llama
    ops: PagedOps
    page_size: int
    max_model_len: int
    null_row: int
    compilations: Counter[str]
    executables: Executables | None = None
    by_token: bool = False
    functions: dict[tuple[Any, ...], StepFunction] = field(default_factory=dict)

    @_kept
    def forward(self, bucket: Bucket) -> StepFunction:
        """Of (params, kv, rows, packed) -> (last hidden [S, H], hidden [T, H], Sequences, kv, rows)."""

        def forward(flat_params, kv: KVCache, rows: Rows, packed: jax.Array):
            self.compilations[f"forward {bucket}"] += 1
            return self._forward(bucket, self._params(flat_params), kv, rows, unpack(packed, bucket))

        return self._function(f"forward {bucket!r}", forward, (1, 2), bucket.num_tokens)

    @_kept
    def sample(self, num_seqs: int, features: Features) -> StepFunction:
        """Of (params, last hidden, Sequences, rows, adjustments, masks) -> (Sampled, rows, adjustments)."""

        def sample(flat_params, hidden, sequences: Sequences, rows: Rows, adjustments: Adjustments | None, masks):
            self.compilations[f"sample {num_seqs} {features}"] += 1
            return self._sample(features, self._params(flat_params), hidden, sequences, rows, adjustments, masks)

        return self._function(f"sample {num_seqs} {features}", sample, (3, 4), num_seqs)

    @_kept
    def decode(self, bucket: Bucket, features: Features) -> StepFunction:
        """Of (params, kv, rows, packed) -> (Sampled, kv, rows): forward and sample in one, for decoding without
        adjustments or log-probabilities. A bucket of several steps gives tokens [steps, S]; a sequence that has fewer
        leaves its row alone in the others."""
        assert bucket.decode and not features.adjusted and features.num_logprobs is None

        def step(params: Params, kv: KVCache, rows: Rows, sections: dict[str, jax.Array]):
            hidden, _, sequences, kv, rows = self._forward(bucket, params, kv, rows, sections)
            sampled, rows, _ = self._sample(features, params, hidden, sequences, rows, None)
            return sampled.tokens, kv, rows

        def decode(flat_params, kv: KVCache, rows: Rows, packed: jax.Array):
            self.compilations[f"decode {bucket} {features}"] += 1
            params, sections = self._params(flat_params), unpack(packed, bucket)
            if bucket.num_steps == 1:
                tokens, kv, rows = step(params, kv, rows, sections)
                return Sampled(tokens), kv, rows

            def next_step(i, carry):
                tokens, kv, rows = carry
                row = jnp.where(i < sections["steps"], sections["row"], self.null_row)
                sampled, kv, rows = step(params, kv, rows, sections | {"row": row})
                return tokens.at[i].set(sampled), kv, rows

            tokens = jnp.zeros((bucket.num_steps, bucket.num_seqs), jnp.int32)
            tokens, kv, rows = lax.fori_loop(0, bucket.num_steps, next_step, (tokens, kv, rows))
            return Sampled(tokens), kv, rows

        return self._function(f"decode {bucket!r} {features}", decode, (1, 2), bucket.num_tokens)

    @_kept
    def prompt_logprobs(self, num_tokens: int, num_logprobs: int) -> StepFunction:
        """Of (params, hidden [T, H], first row, next tokens [C]) -> Sampled of those C rows of hidden states."""

        def prompt_logprobs(flat_params, hidden, first, next_tokens):
            self.compilations[f"prompt_logprobs {num_tokens} {num_logprobs}"] += 1
            rows = hidden.at[first + jnp.arange(next_tokens.size)].get(mode="clip")
            return token_logprobs(self.model.logits(self._params(flat_params), rows), next_tokens, num_logprobs)

        return self._function(f"prompt_logprobs {num_tokens} {num_logprobs}", prompt_logprobs)

    @_kept
    def write_tables(self) -> StepFunction:
        """Of (rows, row [N], tables [N, pages_per_seq]) -> rows with these page tables."""

        def write(rows: Rows, row: jax.Array, tables: jax.Array):
            self.compilations["write_tables"] += 1
            return rows._replace(page_table=rows.page_table.at[row].set(tables))

        return self._function("write_tables", write, (0,))

    @_kept
    def write_rows(self, num_rows: int) -> StepFunction:
        """Of (rows, states of N rows by name, with their numbers as "row") -> rows."""

        def write(rows: Rows, states: dict[str, jax.Array]):
            self.compilations[f"write_rows {num_rows}"] += 1
            row = states["row"]
            return Rows(*(array.at[row].set(states[name]) for name, array in rows._asdict().items()))

        return self._function(f"write_rows {num_rows}", write, (0,))

    @_kept
    def copy_pages(self, num_pages: int) -> StepFunction:
        """Of (kv, sources [N], targets [N]) -> kv with these pages copied in every layer; the null page pads."""

        def copy(kv: KVCache, sources: jax.Array, targets: jax.Array):
            self.compilations[f"copy_pages {num_pages}"] += 1
            layers = tuple(self.ops.copy_pages(layer, sources, targets) for layer in kv.layers)
            return KVCache(layers, kv.scales)

        return self._function(f"copy_pages {num_pages}", copy, (0,))

    @_kept
    def gather_pages(self) -> StepFunction:
        """Of (kv, pages [N]) -> what they hold in all layers, [L, N, 2, Hkv, page_size, D]."""

        def gather(kv: KVCache, pages: jax.Array):
            self.compilations["gather_pages"] += 1
            return jnp.stack([layer.at[pages].get(mode="promise_in_bounds") for layer in kv.layers])

        return self._function("gather_pages", gather)

    @_kept
    def scatter_pages(self) -> StepFunction:
        """Of (kv, pages [N], what `gather_pages` gave) -> (kv with that in these pages, a sign that it is written); the
        null page may come many times."""

        def scatter(kv: KVCache, pages: jax.Array, contents: jax.Array):
            self.compilations["scatter_pages"] += 1
            written = [layer.at[pages].set(contents[i], mode="promise_in_bounds") for i, layer in enumerate(kv.layers)]
            return KVCache(tuple(written), kv.scales), pages[0]

        return self._function("scatter_pages", scatter, (0,))

    @_kept
    def write_adjustments(self) -> StepFunction:
        """Of (adjustments, row, values) -> adjustments with that row replaced."""

        def write(adjustments: Adjustments, row: jax.Array, values: dict[str, jax.Array]):
            self.compilations["write_adjustments"] += 1
            return write_row(adjustments, row, values)

        return self._function("write_adjustments", write, (0,))

    def _function(
        self, name: str, function: Callable[..., Any], donated: tuple[int, ...] = (), num_rows: int = 0
    ) -> StepFunction:
        """`num_rows` go through the model's products."""
        many = self.ops.impl == "mosaic" and num_rows > TRITON_ROWS
        return StepFunction(name, function, donated, self.executables, CUBLAS_ALONE if many else None)

    def _params(self, flat_params: tuple[jax.Array, ...]) -> Params:
        return dict(zip(self.model.shapes, flat_params, strict=True))

    def _forward(self, bucket: Bucket, params: Params, kv: KVCache, rows: Rows, sections: dict[str, jax.Array]):
        table = rows.page_table.at[sections["page_row"], sections["page_index"]].set(sections["page"])
        rows = rows._replace(page_table=table)
        read = decode_tokens if bucket.decode else partial(mixed_tokens, by_token=self.by_token)
        tokens, sequences, rows = read(sections, rows, self.page_size)
        attend, products = self._attend(tokens), self._products(bucket, tokens)
        hidden, layers = self.model.hidden(params, tokens.tokens, tokens.positions, kv.layers, attend, products)
        last = hidden if tokens.cu_q_lens is None else hidden[jnp.maximum(tokens.cu_q_lens[1:] - 1, 0)]
        return last, hidden, sequences, KVCache(layers, kv.scales), rows

    def _products(self, bucket: Bucket, step: StepTokens) -> Products:
        linear = self.ops.linear
        few = bucket.decode and joins_rows(bucket.num_seqs)
        if not (few and linear and joins(self.model, linear)):
            return PRODUCTS
        angles = rotation(step.positions, rope_frequencies(self.model.config, self.max_model_len))
        tables = {"page_table": step.page_table, "kv_lens": step.kv_lens}
        decode = partial(linear.decode, **tables, scale=self.model.config.head_dim**-0.5)
        return JoinedProducts(linear, decode, angles, step.slots)

    def _attend(self, step: StepTokens) -> Attend:
        """Rotates q and k, writes k and v to their slots, and attends over the pages."""
        config = self.model.config
        frequencies = rope_frequencies(config, self.max_model_len)
        scale = config.head_dim**-0.5

        angles = rotation(step.positions, frequencies)

        def attend(q, k, v, positions, layer_kv, layer):
            if step.num_decodes is None or step.cu_q_lens is None:
                grouped = q.reshape(q.shape[0], config.num_kv_heads, -1, config.head_dim)
                qkv = jnp.concatenate([grouped, k[:, :, None], v[:, :, None]], axis=2)
                places = step.page_table, step.kv_lens, angles, step.slots
                return self.ops.decode_step(qkv, layer_kv, *places, scale=scale)
            q, k = apply_rope(q, positions, frequencies), apply_rope(k, positions, frequencies)
            layer_kv = self.ops.kv_write(layer_kv, k, v, step.slots)
            num_seqs = step.kv_lens.size
            decodes = jnp.arange(num_seqs) < step.num_decodes
            lens = jnp.where(decodes, step.kv_lens, 0)
            decoded = self.ops.decode(q[:num_seqs], layer_kv, step.page_table, lens, scale=scale)
            cu_q_lens = jnp.maximum(step.cu_q_lens, step.num_decodes)  # a decoding sequence has no tokens here
            out = self.ops.prefill(q, layer_kv, step.page_table, step.kv_lens, cu_q_lens, scale=scale)
            decoded = jnp.where(decodes[:, None, None], decoded, out[:num_seqs])
            return lax.dynamic_update_slice_in_dim(out, decoded, 0, axis=0), layer_kv

        return attend

    def _sample(
        self,
        features: Features,
        params: Params,
        hidden: jax.Array,
        sequences: Sequences,
        rows: Rows,
        adjustments: Adjustments | None,
        masks: jax.Array | None = None,
    ) -> tuple[Sampled, Rows, Adjustments | None]:
        logits, row = self.model.logits(params, hidden), sequences.row
        size = row.size if features == Features() else SAMPLE_ROWS
        parts = []
        for i in range(0, row.size, size):
            part = row[i : i + size]
            gathered = None if adjustments is None else gather_rows(adjustments, part)
            sampling, positions = unpack_sampling(rows.sampling[part]), sequences.positions[i : i + size]
            allowed = None if masks is None else masks[i : i + size]
            parts.append(sample(logits[i : i + size], sampling, positions, gathered, features, allowed))
            if i + size < row.size:  # one after the other, or their arrays would exist at one time
                logits, parts[-1] = lax.optimization_barrier((logits, parts[-1]))
        sampled = parts[0] if len(parts) == 1 else jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
        if adjustments is not None:
            adjustments = record(adjustments, row, sampled.tokens, sequences.samples)
        rows = rows._replace(last_token=rows.last_token.at[row].set(sampled.tokens))
        return sampled, rows, adjustments
