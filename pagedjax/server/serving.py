"""From a request to its reply: what it asks is checked, and its prompts are made."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pagedjax.prompts import Conversation, ReadPrompt, chat_prompt, read_prompt
from pagedjax.sampling_params import SamplingParams

from .answers import Answer, Generated
from .async_engine import AsyncEngine
from .errors import UnknownModelError
from .protocol import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateRequest,
    TokenizeRequest,
)
from .responses import Chat, Completion
from .tools import Toolbox, find_parser


@dataclass(frozen=True)
class ChatSettings:
    """template: instead of the model's own. tool_parser: how the model calls tools, if its template does not tell."""

    template: str | None = None
    tool_parser: str | None = None


class Serving:
    """Makes replies. A text that must have more tokens than the context is refused before it is tokenised."""

    def __init__(self, engine: AsyncEngine, model: str, chat: ChatSettings):
        self.engine, self.model, self._template = engine, model, chat.template
        self.tokenizer = engine.llm.get_tokenizer()
        longest = max(map(len, self.tokenizer.backend.get_vocab()))
        self._max_chars = longest * engine.llm.engine.config.max_model_len
        template = chat.template or self.tokenizer.hf.chat_template or ""
        self._has_tools = "tools" in str(template)
        self._tool_parser = chat.tool_parser or find_parser(template)

    async def completion(self, body: CompletionRequest) -> Answer:
        self._check_model(body.model)
        params = await self._checked(body.params(self.engine.llm.default_sampling_params))
        prompts = [await self._read(prompt, body.add_special_tokens) for prompt in body.prompts()]
        reply = Completion(self.model, body.request_id, self.tokenizer.token)
        return Answer(self.engine, body, params, prompts, reply, self.decode)

    async def chat(self, body: ChatRequest) -> Answer:
        self._check_model(body.model)
        toolbox = body.toolbox()
        params = await self._checked(body.params(self.engine.llm.default_sampling_params))
        make_reader = None
        if toolbox and toolbox.choice != "none":
            self._check_tools(toolbox)
            params = replace(params, skip_special_tokens=False)  # for a model's calls may stand between such
            make_reader = partial(toolbox.reader, self._tool_parser)
        made = await self._templated(body.messages, body.add_generation_prompt, toolbox)
        reply = Chat(self.model, body.request_id, make_reader)
        reply.num_top = body.top_logprobs or 0
        prompts = [ReadPrompt(made["prompt"], made["prompt_token_ids"])]
        return Answer(self.engine, body, params, prompts, reply, self.decode)

    async def generate(self, body: GenerateRequest) -> Generated:
        params = await self._checked(body.params())
        return Generated(self.engine, params, await self._read(body.prompt, True), body.stream)

    async def tokenize(self, body: TokenizeRequest) -> list[int]:
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ValueError("prompt and messages; accepted: one of them")
        if body.prompt is not None:
            return (await self._read(body.prompt, body.add_special_tokens)).token_ids
        return (await self._templated(body.messages or (), body.add_generation_prompt))["prompt_token_ids"]

    def detokenize(self, body: DetokenizeRequest) -> str:
        self._check_model(body.model)
        return self.decode(body.tokens)

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    async def _templated(
        self, messages: Sequence[ChatMessage], add_generation_prompt: bool, toolbox: Toolbox | None = None
    ) -> dict[str, Any]:
        """The prompt that the chat template makes."""
        dicts, tools = [message.as_dict() for message in messages], toolbox.templated() if toolbox else None
        self._check_messages(dicts, tools)
        conversation = Conversation(dicts, add_generation_prompt, tools, self._template)
        return await asyncio.to_thread(chat_prompt, conversation, self.tokenizer)

    async def _checked(self, params: SamplingParams) -> SamplingParams:
        """With a grammar that is compiled, where neither the event loop nor the engine waits for it."""
        structured = params.structured_outputs
        if structured:
            await asyncio.to_thread(lambda: self.engine.llm.grammars.constraint(structured))
        return params

    def _check_tools(self, toolbox: Toolbox) -> None:
        if not self._has_tools:
            raise ValueError("tools: the model's chat template has no place for them; accepted: tool_choice none")
        if toolbox.choice == "auto" and self._tool_parser is None:
            raise ValueError(
                "tool_choice='auto': how this model calls is not known; accepted: none, required, a function"
            )

    async def _read(self, prompt: str | list[int], add_special_tokens: bool) -> ReadPrompt:
        if isinstance(prompt, str):
            self._check_chars(len(prompt))
            ids = await asyncio.to_thread(self.tokenizer.encode, prompt, add_special_tokens)
            return ReadPrompt(prompt, ids)
        return read_prompt(prompt, lambda: self.tokenizer)

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.model):
            raise UnknownModelError(f"model={name!r:.100} is not served here; accepted: {self.model!r}")

    def _check_messages(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> None:
        """Each of them has a token at least."""
        most = self.engine.llm.engine.config.max_model_len
        if len(messages) > most:
            raise ValueError(f"messages has {len(messages)} entries; accepted: at most {most}")
        texts = (
            text if isinstance(text, str) else json.dumps(text) for message in messages for text in message.values()
        )
        self._check_chars(sum(map(len, texts)) + (len(json.dumps(tools)) if tools else 0))

    def _check_chars(self, count: int) -> None:
        if count > self._max_chars:
            raise ValueError(f"the prompt has {count} characters; accepted: at most {self._max_chars}")
