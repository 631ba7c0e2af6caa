"""pagedjax/detokenizer.py with the tokenizers of test_tokenizer.py: text as soon as it is certain, stop strings."""

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_helpers import TEXT
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from pagedjax.detokenizer import Detokenizer
from pagedjax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """A tokenizer that decodes to words joined by spaces: one to three are words, <x> and <y> added tokens."""
    backend = Backend(models.WordLevel({"a": 0, "one": 1, "two": 2, "three": 3}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken("<x>"), AddedToken("<y>")])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def detokenized(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None, **options: Any) -> str:
    detokenizer = Detokenizer(tokenizer, prompt or [], **options)
    for token_id in ids:
        if detokenizer.append(token_id) is not None:
            break
    return detokenizer.text


class TestDetokenizer:
    def test_text_token_by_token_is_the_text_at_once(self, tokenizer):
        ids = tokenizer.encode(TEXT, add_special_tokens=False)
        assert detokenized(tokenizer, ids) == TEXT

    def test_no_half_character_ever_shows(self, tokenizer):
        detokenizer = Detokenizer(tokenizer, [])
        for token_id in tokenizer.encode(TEXT, add_special_tokens=False):
            detokenizer.append(token_id)
            assert TEXT.startswith(detokenizer.text)

    @settings(max_examples=100, deadline=None)
    @given(data=st.data())
    def test_random_tokens_read_as_they_decode(self, demo, data):
        ids = data.draw(st.lists(st.integers(17, 49151), max_size=60))
        ids += data.draw(st.lists(st.sampled_from(demo.encode("😀é世\u0300")), max_size=60))
        unfinished = demo.decode(ids)[len(detokenized(demo, ids)) :]
        assert not unfinished or unfinished.endswith("\ufffd")
        ids += demo.encode(".")
        assert detokenized(demo, ids) == demo.decode(ids)

    def test_long_runs_of_broken_bytes_read_as_they_decode(self, demo):
        first, second, last = demo.encode("😀")
        for num_broken in range(40):
            ids = [*[last] * num_broken, first, second, first, second, *demo.encode("x")]
            assert detokenized(demo, ids) == demo.decode(ids)

    def test_the_prompt_decides_whether_a_leading_space_shows(self, spm):
        output = spm.encode("fox", add_special_tokens=False)
        assert detokenized(spm, output, spm.encode("the quick")) == " fox"
        assert detokenized(spm, output, [1]) == "fox"
        assert detokenized(spm, output, [*spm.encode("the quick"), *[2] * 20]) == " fox"

    def test_a_character_begun_by_the_prompt_shows_whole(self, demo):
        first, *rest = demo.encode(" 😀")
        assert demo.token(first) == " \ufffd"
        assert detokenized(demo, [*rest, *demo.encode(" x")], [504, first]) == "😀 x"
        assert detokenized(demo, [*rest, *demo.encode(" x")], [first]) == "😀 x"

    @pytest.mark.parametrize("num_prompt_bytes", [1, 2, 3])
    def test_a_character_begun_by_bytes_of_the_prompt_shows_whole(self, spm, num_prompt_bytes):
        character = spm.encode("fox😀", add_special_tokens=False)[-4:]
        prompt = [*spm.encode("the quick"), *character[:num_prompt_bytes]]
        output = [*character[num_prompt_bytes:], *spm.encode("fox", add_special_tokens=False)]
        assert detokenized(spm, output, prompt) == "😀 fox"

    def test_bytes_that_the_prompt_leaves_unfinished_are_not_output(self, tokenizer):
        for unfinished in (tokenizer.encode("the quick 😀")[:-1], tokenizer.encode("😀")[:-1]):
            output = tokenizer.encode("x=1", add_special_tokens=False)
            assert detokenized(tokenizer, output, unfinished).lstrip(" ") == "x=1"
        assert (
            detokenized(tokenizer, tokenizer.encode("x", add_special_tokens=False)[-1:], tokenizer.encode("\ufffd"))
            == "x"
        )

    def test_a_prompt_of_bytes_alone_sets_the_context_too(self, spm):
        smile, fox = spm.encode("😀", add_special_tokens=False)[1:], spm.encode("fox", add_special_tokens=False)
        for num_characters in range(1, 12):
            prompt = spm.encode("世" * num_characters)
            assert detokenized(spm, fox, prompt) == " fox"
            assert detokenized(spm, [*smile[2:], *fox], [*prompt, *smile[:2]]) == "😀 fox"

    def test_a_byte_that_spoils_the_character_before_it_does_not_stop_the_text(self, spm):
        first, *_ = spm.encode("😀", add_special_tokens=False)[1:]
        ids = [*spm.encode("世", add_special_tokens=False), first, *spm.encode("the fox", add_special_tokens=False)]
        assert detokenized(spm, ids) == "世\ufffd the fox"

    def test_skipped_special_tokens_leave_no_trace(self, tokenizer):
        ids = tokenizer.encode("the x", add_special_tokens=False)
        smile = tokenizer.encode("😀", add_special_tokens=False)
        mixed = [2, ids[0], 2, *ids[1:], *smile[:-1], 2, smile[-1]]
        assert detokenized(tokenizer, mixed) == tokenizer.decode([*ids, *smile])

    def test_special_tokens_show_when_they_are_not_skipped(self, demo):
        ids = demo.encode("hi<|im_end|>\n<|im_start|>")
        assert detokenized(demo, ids, skip_special_tokens=False) == "hi<|im_end|>\n<|im_start|>"

    def test_adjacent_special_tokens_join_without_the_space(self, words):
        ids = words.encode("one <x> <y> <x> two <y>")
        spaced = detokenized(words, ids, skip_special_tokens=False)
        joined = detokenized(words, ids, skip_special_tokens=False, spaces_between_special_tokens=False)
        assert spaced == "one <x> <y> <x> two <y>"
        assert joined == "one <x><y><x> two <y>"

    @pytest.mark.parametrize("kind", ["text", "special", "unknown", "broken"])
    def test_a_token_costs_the_same_after_many_others(self, tokenizer, kind):
        broken = tokenizer.encode("😀", add_special_tokens=False)[-1]
        token_id = {"text": tokenizer.encode("the")[-1], "special": 2, "unknown": 60000, "broken": broken}[kind]
        detokenizer = Detokenizer(tokenizer, [], stop=("never", "the end"))
        started = time.perf_counter()
        for _ in range(50_000):
            detokenizer.append(token_id)
        assert time.perf_counter() - started < 10  # about 0.3; minutes if each token looked at all before it
        if kind in ("special", "unknown"):
            assert detokenizer.text == ""
        else:
            assert len(detokenizer.text) >= 50_000 - 16

    def test_a_stop_string_spread_over_tokens_cuts_the_text_before_it(self, tokenizer):
        ids = tokenizer.encode("the quick brown fox jumps", add_special_tokens=False)
        assert detokenized(tokenizer, ids, stop=("ck bro",)) == "the qui"
        assert detokenized(tokenizer, ids, stop=("ck bro",), include_stop_str_in_output=True) == "the quick bro"

    def test_a_stop_string_of_many_bytes_is_found_between_its_characters(self, tokenizer):
        ids = tokenizer.encode("x=1 世界 😀é done", add_special_tokens=False)
        assert detokenized(tokenizer, ids, stop=("界 😀",)) == "x=1 世"
        assert detokenized(tokenizer, ids, stop=("é",)) == "x=1 世界 😀"

    def test_the_stop_string_that_ended_the_text_is_returned_once_it_is_complete(self, demo):
        detokenizer = Detokenizer(demo, [], stop=("zzz", "lo wo"))
        returned = [detokenizer.append(i) for i in demo.encode("Hel") + demo.encode("lo") + demo.encode(" world")]
        assert returned[:-1] == [None] * (len(returned) - 1)
        assert returned[-1] == "lo wo"
        assert detokenizer.text == detokenizer.stable_text(False) == detokenizer.stable_text(True) == "Hel"

    @pytest.mark.parametrize("stop", [("b", "a"), ("a", "b"), ("bb", "ab", "a")])
    def test_the_earliest_stop_string_wins_whatever_their_order(self, demo, stop):
        assert detokenized(demo, demo.encode("xxabb"), stop=stop) == "xx"

    def test_within_one_token_the_stop_string_complete_first_wins_and_the_longer_of_two(self, demo):
        ids = demo.encode(" world")
        assert len(ids) == 1
        assert detokenized(demo, ids, stop=("world", "or")) == " w"
        assert detokenized(demo, ids, stop=("ld", "rld")) == " wo"

    def test_no_stop_string_ends_within_the_first_min_tokens(self, demo):
        ids = [demo.encode(letter)[0] for letter in "abcabc"]
        for min_tokens, expected in [(0, "a"), (1, "a"), (2, "abca"), (4, "abca"), (5, "abcabc")]:
            assert detokenized(demo, ids, stop=("b",), min_tokens=min_tokens) == expected
        assert detokenized(demo, ids, stop=("bc",), min_tokens=2) == "a"
        assert detokenized(demo, ids, stop=("b", "abcd"), min_tokens=2) == "abca"
        detokenizer = Detokenizer(demo, [], stop=("b", "xyz"), min_tokens=2)
        assert [detokenizer.append(i) for i in ids[:2]] == [None, None]
        assert detokenizer.stable_text(False) == "ab"  # nothing waits for a stop string that did not count

    @settings(max_examples=300, deadline=None)
    @given(data=st.data())
    def test_stopping_does_not_depend_on_how_tokens_cut_the_text(self, demo, data):
        pieces = ["a", "b", "ab", "ba", "bb", "aaa", "é", "éa", " a"]
        ids = [i for piece in data.draw(st.lists(st.sampled_from(pieces), max_size=12)) for i in demo.encode(piece)]
        stop = tuple(data.draw(st.lists(st.text("abé ", min_size=1, max_size=4), min_size=1, max_size=3)))
        include = data.draw(st.booleans())
        detokenizer = Detokenizer(demo, [], stop=stop, include_stop_str_in_output=include)
        shown, found = "", None
        for token_id in ids:
            found = detokenizer.append(token_id)
            stable = detokenizer.stable_text(False)
            assert stable.startswith(shown)
            shown = stable
            held = detokenizer.text[len(stable) :]
            assert not held or any(s.startswith(held) and s != held for s in stop)
            if found:
                break
        assert (detokenizer.text, found) == first_stop_by_character(demo.decode(ids), stop, include)
        assert detokenizer.text.startswith(shown)

    def test_only_a_true_beginning_of_a_stop_string_is_held_back(self, demo):
        detokenizer = Detokenizer(demo, [], stop=("\n\nUser:", "worldly"))
        expected = {
            "Hello": "Hello",
            " world": "Hello ",
            "!": "Hello world!",
            "\n": "Hello world!",
            "x": "Hello world!\nx",
        }
        for piece, stable in expected.items():
            for token_id in demo.encode(piece):
                assert detokenizer.append(token_id) is None
            assert detokenizer.stable_text(False) == stable
        for token_id in demo.encode("\n\nUser"):
            detokenizer.append(token_id)
        assert detokenizer.stable_text(False) == "Hello world!\nx"
        assert detokenizer.stable_text(True) == "Hello world!\nx\n\nUser"


def first_stop_by_character(text: str, stop: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """What reading the text character by character would stop at: the definition."""
    for end in range(1, len(text) + 1):
        hits = [s for s in stop if text[:end].endswith(s)]
        if hits:
            longest = max(hits, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None
