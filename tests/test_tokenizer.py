"""pagedjax/tokenizer.py with the demo model's tokenizer (byte-level) and a tiny SentencePiece one (byte fallback)."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from pagedjax.demo import demo_model_path
from pagedjax.gguf_tokenizer import build_tokenizer
from pagedjax.tokenizer import Detokenizer, Tokenizer

GOLDEN = Path(__file__).parent / "golden"
TEXT = "héllo 世界 😀👩‍👩‍👧  \n\n\tx=1 2024 café "


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer.load(demo_model_path())


@pytest.fixture(scope="module")
def spm() -> Tokenizer:
    """SentencePiece with a space prefix: <s> 1, </s> 2, control token <|turn|> 3, user-defined <sep> 4."""
    golden = json.loads((GOLDEN / "spm.json").read_text(encoding="utf-8"))
    fields = {name: golden[name] for name in ("tokens", "scores", "token_type")}
    return Tokenizer(build_tokenizer({f"tokenizer.ggml.{k}": v for k, v in ({"model": "llama"} | fields).items()}))


@pytest.fixture(params=["demo", "spm"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


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


def test_importing_the_tokenizer_loads_no_jax():
    code = "import sys, pagedjax.tokenizer; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, check=False).returncode == 0


class TestTokenizer:
    def test_a_saved_folder_loads_to_the_same_tokenizer(self, demo, tmp_path):
        demo.hf.save_pretrained(tmp_path)
        loaded = Tokenizer.load(tmp_path)
        assert loaded.encode(TEXT) == demo.encode(TEXT)
        assert (loaded.vocab_size, loaded.bos_token_id, loaded.eos_token_id) == (49152, 1, 2)
        assert loaded.hf.chat_template == demo.hf.chat_template

    def test_truncation_and_padding_saved_with_a_tokenizer_do_not_apply(self, spm, tmp_path):
        spm.hf.save_pretrained(tmp_path)
        path = tmp_path / "tokenizer.json"
        saved = json.loads(path.read_text(encoding="utf-8"))
        saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        saved["padding"] = {
            "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "<unk>",
        }  # fmt: skip
        path.write_text(json.dumps(saved), encoding="utf-8")
        assert Tokenizer.load(tmp_path).encode("the quick brown fox") == spm.encode("the quick brown fox")

    def test_code_of_a_checkpoint_never_runs(self, tmp_path):
        (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
        config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"no tokenizer could be loaded"):
            Tokenizer.load(tmp_path)
        assert not (tmp_path / "ran").exists()

    def test_a_tokenizer_without_a_fast_version_is_refused_by_class(self, tmp_path):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CanineTokenizer"}))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "canine"}))
        with pytest.raises(ValueError, match=r"has a CanineTokenizer, expected one with a tokenizer.json"):
            Tokenizer.load(tmp_path)

    def test_a_folder_without_a_tokenizer_is_named(self, tmp_path):
        with pytest.raises(ValueError, match=r"model='.*': no tokenizer could be loaded"):
            Tokenizer.load(tmp_path)

    def test_a_missing_gguf_file_is_named(self):
        with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
            Tokenizer.load("none.gguf")

    def test_special_tokens_come_only_when_asked_for(self, spm):
        assert spm.encode("the") == [1, *spm.encode("the", add_special_tokens=False)]

    def test_decoding_inverts_encoding_and_skips_special_tokens(self, tokenizer):
        ids = tokenizer.encode(TEXT)
        assert tokenizer.decode(ids) == TEXT
        assert tokenizer.decode([*ids, 2]) == TEXT
        assert tokenizer.decode([*ids, 2], skip_special_tokens=False).endswith(tokenizer.token(2))

    @pytest.mark.parametrize("text", ["\ud800", b"bytes", None])
    def test_what_is_not_unicode_text_is_refused(self, demo, text):
        with pytest.raises(ValueError, match=r"text=.*, expected a str of valid Unicode"):
            demo.encode(text)

    def test_ids_beyond_the_vocabulary_have_no_text_and_negative_ones_are_refused(self, demo):
        assert demo.decode([504, 60000, 504]) == "TheThe"
        assert demo.token(60000) == ""
        with pytest.raises(ValueError, match=r"token ids \[-1\]"):
            demo.decode([-1])

    def test_the_text_of_a_token_keeps_its_leading_space(self, demo, spm):
        assert [demo.token(i) for i in demo.encode(" The cat", add_special_tokens=False)] == [" The", " cat"]
        assert [spm.token(i) for i in spm.encode("the fox", add_special_tokens=False)] == [" the", " fox"]
        assert spm.token(2) == "</s>"

    def test_the_text_of_half_a_character_is_the_replacement_character(self, tokenizer):
        ids = tokenizer.encode("😀", add_special_tokens=False)[-2:]
        assert [tokenizer.token(i) for i in ids] == ["\ufffd", "\ufffd"]

    def test_chats_encode_to_the_golden_ids(self, demo):
        prompts = json.loads((GOLDEN / "smollm2.json").read_text(encoding="utf-8"))["prompts"]
        chats = [p for p in prompts if p["messages"]]
        assert chats
        for prompt in chats:
            assert demo.apply_chat_template(prompt["messages"]) == prompt["prompt_ids"]

    def test_a_chat_can_end_without_the_generation_prompt(self, demo):
        ids = demo.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=False)
        assert demo.decode(ids, skip_special_tokens=False).endswith("user\nhi<|im_end|>\n")

    def test_a_model_without_chat_template_says_so(self, spm):
        with pytest.raises(ValueError, match=r"the model has no chat template"):
            spm.apply_chat_template([{"role": "user", "content": "hi"}])
        template = "{{ messages[0]['content'] }}"
        ids = spm.apply_chat_template([{"role": "user", "content": "the fox"}], chat_template=template)
        assert ids == spm.encode("the fox", add_special_tokens=False)

    def test_what_a_template_objects_to_is_passed_on(self, demo):
        template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(ValueError, match=r"does not take these messages: roles must alternate"):
            demo.apply_chat_template([{"role": "user", "content": "hi"}], chat_template=template)
        with pytest.raises(ValueError, match=r"does not take these messages"):
            demo.apply_chat_template([{"role": "user"}])

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ([], r"messages=\[\], expected a list"),
            ("hi", r"messages='hi', expected a list"),
            ([{"role": "user", "content": "a"}, "b"], r"messages\[1\]='b', expected a dict"),
            ([{"content": "a"}], r"messages\[0\]={'content': 'a'}, expected a dict with a role"),
            ([{"role": "user", "content": 5}], r"messages\[0\]\['content'\]=5, expected text"),
        ],
    )
    def test_a_malformed_message_is_named(self, demo, messages, message):
        with pytest.raises(ValueError, match=message):
            demo.apply_chat_template(messages)


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
