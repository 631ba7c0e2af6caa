"""LLM: offline generation, text or token ids in, outputs in the order of the prompts."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Self

import jax
from tqdm import tqdm

from .beam_search import BeamSearch, BeamSearchOutput, BeamSearchParams, run_searches
from .compilation_cache import use_compilation_cache
from .config import EngineConfig
from .engine import Engine
from .models.config import LlamaConfig
from .models.llama import Llama, Params
from .models.load import dummy_params, load_params, open_checkpoint, read_config
from .prompts import (
    Conversation,
    Message,
    Prompt,
    bad_word_ids,
    chat_prompt,
    is_prompt,
    make_detokenizer,
    params_of,
    priorities_of,
    read_prompt,
)
from .request import Request, RequestOutput, Status, request_output
from .rollout import RolloutBatch, collect
from .sampling_params import SamplingParams
from .structured import Grammars
from .tokenizer import Tokenizer
from .weights import flatten


class LLM:
    """A model, its tokenizer and an engine.

    `model` and the keywords are `EngineConfig`'s fields. With `skip_tokenizer_init` prompts are token ids and outputs
    have no text. Raises ValueError where the model cannot be loaded or a setting cannot be met.
    """

    def __init__(self, model: str, **config: Any):
        settings = EngineConfig(model=model, **config)
        checkpoint, path = open_checkpoint(model)
        model_config = read_config(checkpoint)
        tokenizer = None if settings.skip_tokenizer_init else Tokenizer.load(settings.tokenizer or path)

        def load(llama: Llama) -> Params:
            if settings.load_format == "dummy":
                return dummy_params(llama, settings.seed)
            return load_params(llama, checkpoint.tensors())

        self._set_up(settings, model_config, model_config.dtype, load, tokenizer)
        self.default_sampling_params = SamplingParams.from_hf(checkpoint.generation_config())

    @classmethod
    def from_params(cls, params: Any, config: LlamaConfig, *, tokenizer: str | None = None, **settings: Any) -> Self:
        """An engine on a caller's parameters: a dict from Hugging Face names to arrays, matrices [in, out] as
        `Llama.init` gives them, or the Flax NNX state of a `LlamaForCausalLM`.

        Arrays that fit are shared, not copied: all of them with `fuse_projections=False` and the tree's own `dtype`.
        Who donates these to a training step calls `update_params` before the engine steps again. `tokenizer` is a
        folder or a hub id; without it, token ids go in and come out. `settings` are `EngineConfig`'s other fields.
        """
        if "model" in settings:
            raise ValueError(f"model={settings['model']!r}; accepted: params in its stead")
        given = {"tokenizer": tokenizer, "skip_tokenizer_init": tokenizer is None}
        engine_config = EngineConfig(model="params", **given, **settings)
        llm = cls.__new__(cls)
        dtype = str(next(iter(flatten(params).values())).dtype)
        loaded = None if tokenizer is None else Tokenizer.load(tokenizer)
        llm._set_up(engine_config, config, dtype, lambda llama: params, loaded)
        llm.default_sampling_params = SamplingParams()
        return llm

    def _set_up(
        self,
        settings: EngineConfig,
        config: LlamaConfig,
        own_dtype: str | None,
        load: Callable[[Llama], Any],
        tokenizer: Tokenizer | None,
    ) -> None:
        """`own_dtype` is that of the weights as they come; `load` gives them for a model."""
        executables = use_compilation_cache(settings.compilation_cache_dir)
        platform = jax.default_backend()
        settings = replace(settings, dtype=settings.resolve_dtype(platform, own_dtype))
        llama = Llama(config, fused=settings.fuse(platform), dtype=jax.numpy.dtype(settings.dtype))
        self.tokenizer = tokenizer
        self.engine = Engine(settings, llama, load(llama), tokenizer.token if tokenizer else None, executables)
        self._num_calls = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts; the outputs keep their order.

        A prompt is a string, `{"prompt": str}`, `{"prompt_token_ids": [...]}` or a list of ids; a dict may have
        a `cache_salt`, a string without which nobody shares the prefix cache's pages of it. `sampling_params`
        is one for all, a list that pairs one to one, or None for the model's own defaults. `priority`: one for
        each prompt, of which lower ones are served sooner; equal ones first come, first served. A bad prompt
        given alone raises ValueError; in a list, its place in the result says why in `error`, a warning is
        issued, and the others run.
        """
        outputs: dict[str, RequestOutput] = {}
        groups = self._submit(prompts, sampling_params, outputs, priority)
        num_tokens = 0
        with tqdm(total=len(groups), desc="generating", disable=not use_tqdm) as bar:
            for output in self._run(groups, stream=False):
                outputs[output.request_id] = output
                num_tokens += sum(len(o.token_ids) for o in output.outputs)
                speed = num_tokens / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(f"{speed:.1f} output tokens/s", refresh=False)
                bar.update()
        return [outputs[request_id] for request_id in sorted(outputs, key=_number)]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Like `generate`, but yields every request's output so far whenever it has grown.

        Outputs are cumulative, and `request_id` ends in the prompt's index. Closing the iterator aborts what still
        runs.
        """
        outputs: dict[str, RequestOutput] = {}
        groups = self._submit(prompts, sampling_params, outputs)
        yield from list(outputs.values())
        yield from self._run(groups, stream=True)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answers one conversation, or each of a list of them, through the model's chat template.

        Bad conversations are treated as `generate` treats bad prompts.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        prompts: Any = [Conversation(c, add_generation_prompt) for c in conversations]
        return self.generate(prompts[0] if single else prompts, sampling_params, use_tqdm)

    def chat_prompt(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> dict[str, Any]:
        """The prompt that the model's chat template makes of a conversation."""
        return chat_prompt(Conversation(messages, add_generation_prompt), self.get_tokenizer())

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, use_tqdm: bool = True
    ) -> list[BeamSearchOutput]:
        """Searches each prompt's likeliest continuations; bad prompts are treated as `generate` treats them."""
        single = is_prompt(prompts)
        items: Any = [prompts] if single else list(prompts)
        outputs: list[BeamSearchOutput | None] = [None] * len(items)
        searches: dict[int, BeamSearch] = {}
        for i, prompt in enumerate(items):
            try:
                searches[i] = self._add_search(f"{self._num_calls}-{i}", prompt, params)
            except (ValueError, TypeError) as error:
                if single:
                    raise
                warnings.warn(f"prompt {i} was refused: {error}", stacklevel=2)
                outputs[i] = BeamSearchOutput([], str(error))
        self._num_calls += 1
        run_searches(self.engine, list(searches.values()), use_tqdm)
        return [outputs[i] or searches[i].output() for i in range(len(items))]

    def rollout(self, prompts: Sequence[Sequence[int]], params: SamplingParams, **padding: Any) -> RolloutBatch:
        """Samples `params.n` completions of every prompt: token ids in, arrays out. `padding`: `prompt_length` and
        `pad_token_id`, as `rollout.collect` has them."""

        def add(request_id: str, prompt: Sequence[int], params: SamplingParams) -> list[Request]:
            return self.add(request_id, {"prompt_token_ids": prompt}, params, recorded=True)[1]

        return collect(self.engine, add, prompts, params, **padding)

    def update_params(self, params: Any, recompute: bool = False) -> None:
        """New weights for all that is computed from now on: `Engine.update_params`."""
        self.engine.update_params(params, recompute)

    def release_memory(self) -> None:
        """Gives the memory of pages back to JAX, as for a training step, until `restore_memory`."""
        self.engine.release_memory()

    def restore_memory(self) -> None:
        """Takes it again."""
        self.engine.restore_memory()

    def reset_prefix_cache(self) -> None:
        """Forgets what earlier prompts and outputs left in pages."""
        self.engine.reset_prefix_cache()

    @cached_property
    def grammars(self) -> Grammars:
        """Compiles what outputs must be. ImportError without llguidance; ValueError with skip_tokenizer_init."""
        config = self.engine.runner.model.config
        return Grammars(self.get_tokenizer(), config.vocab_size, config.eos_token_ids)

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer; ValueError with skip_tokenizer_init."""
        if self.tokenizer is None:
            raise ValueError("skip_tokenizer_init=True leaves no tokenizer: give token ids, and detokenize=False")
        return self.tokenizer

    def _submit(
        self, prompts: Any, sampling_params: Any, outputs: dict[str, RequestOutput], priority: Any = None
    ) -> dict[str, tuple[str | None, list[Request]]]:
        """Queues every prompt; refused ones of a list become outputs with an error."""
        single = is_prompt(prompts)
        items = [prompts] if single else list(prompts)
        params = params_of(sampling_params, len(items), self.default_sampling_params)
        priorities = priorities_of(priority, len(items))
        groups: dict[str, tuple[str | None, list[Request]]] = {}
        for i, (prompt, param, rank) in enumerate(zip(items, params, priorities, strict=True)):
            request_id = f"{self._num_calls}-{i}"
            try:
                groups[request_id] = self.add(request_id, prompt, param, rank)
            except (ValueError, TypeError) as error:
                if single:
                    raise
                warnings.warn(f"prompt {i} was refused: {error}", stacklevel=3)
                outputs[request_id] = RequestOutput(request_id, None, [], None, [], True, error=str(error))
        self._num_calls += 1
        return groups

    def add(
        self, request_id: str, prompt: Any, params: SamplingParams, priority: int = 0, recorded: bool = False
    ) -> tuple[str | None, list[Request]]:
        """Queues one prompt; its text, and its sequences in the engine. ValueError on what is refused. `recorded`: as
        the engine has it."""
        text, token_ids, salt = read_prompt(prompt, self.get_tokenizer)
        if params.bad_words or (params.detokenize and params.stop):
            self.get_tokenizer()
        make = None
        if self.tokenizer and params.detokenize:
            make = partial(make_detokenizer, self.tokenizer, token_ids, params)
        structured = params.structured_outputs
        return text, self.engine.add_request(
            request_id,
            token_ids,
            params,
            constraint=self.grammars.constraint(structured) if structured else None,
            bad_words=bad_word_ids(params.bad_words or (), self.get_tokenizer),
            make_detokenizer=make,
            cache_salt=salt,
            priority=priority,
            recorded=recorded,
        )

    def _add_search(self, request_id: str, prompt: Any, params: BeamSearchParams) -> BeamSearch:
        _, token_ids, salt = read_prompt(prompt, self.get_tokenizer)
        if params.stop:
            self.get_tokenizer()
        decode = partial(self.tokenizer.decode, skip_special_tokens=False) if self.tokenizer else None
        return self.engine.add_beam_search(request_id, token_ids, params, decode, cache_salt=salt)

    def _run(self, groups: dict[str, tuple[str | None, list[Request]]], stream: bool) -> Iterator[RequestOutput]:
        """Steps the engine until these requests end; yields their outputs, finished or, if streaming, growing."""
        pending = dict(groups)
        try:
            while pending:
                for request_id in dict.fromkeys(request.request_id for request in self.engine.step()):
                    if request_id not in pending:
                        continue
                    text, requests = pending[request_id]
                    finished = all(r.status is Status.FINISHED for r in requests)
                    if finished:
                        del pending[request_id]
                    if finished or stream:
                        yield request_output(text, requests)
        finally:
            for _, requests in pending.values():
                self.engine.abort(requests)


def _number(request_id: str) -> int:
    return int(request_id.rpartition("-")[2])
