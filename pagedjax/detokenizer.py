"""Token ids to text one at a time, as soon as it is certain, and up to a stop string."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from .tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character
_MAX_UNFINISHED = 3  # tokens of a character that still lacks a byte: it has four bytes at most, a token at least one
_NUM_CONTEXT_TOKENS = 8
_MAX_PENDING = 16


class Detokenizer:
    """The text of one sequence's output, token by token, cut at the first stop string.

    Characters appear once all of their bytes are there. The stop string that is complete first wins, as if
    the text came character by character; of two that end together, the longer. None can end within the text
    of the first `min_tokens` tokens. A token costs the same however long the text is.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        stop: tuple[str, ...] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._decoder = _TokenDecoder(tokenizer, prompt_token_ids, skip_special_tokens, spaces_between_special_tokens)
        self._stop = stop
        self._include_stop = include_stop_str_in_output
        self._num_unchecked = min_tokens
        self._pieces: list[str] = []
        self._tail = ""  # as much of the text's end as can be part of an unfinished stop string
        self._max_tail = max(map(len, stop), default=1) - 1
        self._stopped = False

    def append(self, token_id: int) -> str | None:
        """Take the next output token; returns the stop string that it completes, if it does."""
        assert not self._stopped, "no token follows a stop string"
        text = self._decoder.step(token_id)
        self._num_unchecked -= 1
        if not text:
            return None
        window, num_old = self._tail + text, len(self._tail)
        self._pieces.append(text)
        self._tail = window[-self._max_tail :] if self._max_tail else ""
        found = _first_stop(window, num_old, self._stop) if self._num_unchecked < 0 else None
        if found is None:
            return None
        start, stop = found
        self._stopped = True
        excess = len(window) - (start + len(stop) if self._include_stop else start)
        self._pieces = [self.text[: len(self.text) - excess]]
        return stop

    @property
    def text(self) -> str:
        """All text so far, up to the stop string if there was one."""
        if len(self._pieces) != 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def stable_text(self, finished: bool) -> str:
        """The text that no later token can take back: without a tail that may yet become a stop string."""
        if finished or self._stopped:
            return self.text
        return self.text[: len(self.text) - _num_held_back(self._tail, self._stop)]


def _first_stop(window: str, num_old: int, stop: tuple[str, ...]) -> tuple[int, str] | None:
    """Where the first stop string to end beyond `num_old` starts in the window, and which it is."""
    found = [(window.find(s, max(0, num_old - len(s) + 1)), s) for s in stop]
    hits = [(start, s) for start, s in found if start >= 0]
    return min(hits, key=lambda hit: (hit[0] + len(hit[1]), hit[0]), default=None)


def _num_held_back(tail: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `tail` that is a true prefix of a stop string."""
    first_characters = {s[0] for s in stop}
    for start, character in enumerate(tail):
        if character in first_characters:
            end = tail[start:]
            if any(len(s) > len(end) and s.startswith(end) for s in stop):
                return len(end)
    return 0


class _TokenDecoder:
    """Turns output tokens into text as soon as it is certain, at a bounded cost for each token."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._skipped_ids = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._joined_tokens = {} if spaces_between_special_tokens else tokenizer.added_tokens
        self._after_joined_token = False
        context, unfinished = self._split_prompt(prompt_token_ids)
        self._stream = DecodeStream(ids=context, skip_special_tokens=skip_special_tokens)
        self._pending: list[int] = unfinished  # tokens that the stream has, but whose text it holds back
        self._prompt_tail = tokenizer.decode_within(unfinished)
        if unfinished:
            self._stream.step(tokenizer.backend, unfinished)

    def step(self, token_id: int) -> str:
        """The text that this token makes certain: none if it is skipped or its last character lacks bytes."""
        if token_id in self._skipped_ids:  # the stream would pile them up
            return ""
        text = self._advance(token_id)
        if self._prompt_tail and text:
            text, self._prompt_tail = _without_prompt_tail(text, self._prompt_tail), ""
        content = self._joined_tokens.get(token_id)
        if self._after_joined_token and text == f" {content}":
            text = text[1:]
        self._after_joined_token = content is not None
        return text

    def _split_prompt(self, prompt_token_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """The prompt's last tokens: those that set the context, and those that end inside a character."""
        recent = [t for t in prompt_token_ids[-4 * _NUM_CONTEXT_TOKENS :] if t not in self._skipped_ids]
        for num_unfinished in range(_MAX_UNFINISHED + 1):
            end = max(0, len(recent) - num_unfinished)
            # One of four starts in a row does not fall inside a character.
            for num_context in range(_NUM_CONTEXT_TOKENS, _NUM_CONTEXT_TOKENS + 4):
                context = recent[max(0, end - num_context) : end]
                if not self._tokenizer.decode(context, self._skip_special_tokens).endswith(_REPLACEMENT):
                    return context, recent[end:]
        return self._tokenizer.context_ids, []

    def _advance(self, token_id: int) -> str:
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._tokenizer.backend, token_id)
        except Exception as error:  # tokenizers raises plain Exception
            if not str(error).startswith("Invalid prefix"):
                raise
            return self._restart(len(self._pending))  # new bytes spoilt the character before them
        if text is not None:
            self._pending = []
            return text
        return "" if len(self._pending) < _MAX_PENDING else self._restart(self._num_settled())

    def _num_settled(self) -> int:
        """How many pending tokens can be decoded apart from the rest, perhaps an unfinished character."""
        decode, pending = self._tokenizer.decode_within, self._pending
        text = decode(pending)
        for num_tokens in range(len(pending) - _MAX_UNFINISHED, 0, -1):
            if decode(pending[:num_tokens]) + decode(pending[num_tokens:]) == text:
                return num_tokens
        return len(pending)

    def _restart(self, num_tokens: int) -> str:
        """Decode so many pending tokens as they stand, and begin a new stream with the rest."""
        text = self._tokenizer.decode_within(self._pending[:num_tokens])
        self._pending = self._pending[num_tokens:]
        self._stream = DecodeStream(ids=self._tokenizer.context_ids, skip_special_tokens=self._skip_special_tokens)
        if self._pending and (rest := self._stream.step(self._tokenizer.backend, self._pending)):
            self._pending = []
            text += rest
        return text


def _without_prompt_tail(text: str, tail: str) -> str:
    """The part of a text begun by the prompt's unfinished tokens, `tail` by themselves, that is output.

    That is the character which the prompt began, if the output finishes it, and what follows.
    """
    finished = tail.rstrip(_REPLACEMENT)
    text = text.removeprefix(finished)
    num_stray = len(text) - len(text.lstrip(_REPLACEMENT))
    return text[min(num_stray, len(tail) - len(finished)) :]
