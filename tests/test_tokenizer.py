"""pagedjax/tokenizer.py with the demo model's tokenizer (byte-level) and a tiny SentencePiece one (byte fallback)."""

import json
import subprocess
import sys

import pytest
from tokenizer_helpers import GOLDEN, TEXT

from pagedjax.tokenizer import Tokenizer


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
