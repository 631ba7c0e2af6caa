"""Write beams.json beside this script: transformers' beam search on SmolLM2, in float32 on the CPU.

Run where make_golden.py runs, which holds the prompts and the tokenizer:

    python tests/golden/make_beams.py --demo-model PATH_TO_GGUF
"""

import argparse
import json
from pathlib import Path

import gguf
import torch
from make_golden import HERE, PROMPTS, build_tokenizer, load_llama, metadata, render_chat, versions

NUM_TOKENS = 24
CASES = [  # prompt, width, and what differs from transformers' defaults
    *((name, width, {}) for name in ("capital", "code", "chat_turns") for width in (2, 4, 8)),
    ("chat_turns", 4, {"length_penalty": 0.0}),
    ("chat_turns", 4, {"length_penalty": 2.0}),
    ("chat_turns", 4, {"early_stopping": True}),
    ("capital", 4, {"stop_strings": ["city", "\n"]}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo-model", type=Path, required=True, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    path = parser.parse_args().demo_model
    reader = gguf.GGUFReader(path)
    tokenizer, model = build_tokenizer(reader), load_llama(path, torch.float32)
    template = metadata(reader, "tokenizer.chat_template")
    stopper = Stopper(tokenizer)
    entries = []
    for name, width, more in CASES:
        text = PROMPTS[name] if isinstance(PROMPTS[name], str) else render_chat(template, PROMPTS[name])
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        settings = {key: value for key, value in more.items() if key != "stop_strings"}
        output = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=metadata(reader, "tokenizer.ggml.eos_token_id"),
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            stopping_criteria=stopper.criteria(len(ids), more.get("stop_strings")),
            **settings,
        )
        lengths = (output.beam_indices >= 0).sum(dim=1).tolist()
        sequences = [row[len(ids) : len(ids) + n] for row, n in zip(output.sequences.tolist(), lengths, strict=True)]
        scores = [round(score, 6) for score in output.sequences_scores.tolist()]
        texts = [tokenizer.decode(tokens, skip_special_tokens=False) for tokens in sequences]
        entries.append({"prompt": name, "width": width, **more, "tokens": sequences, "scores": scores, "texts": texts})
        print(name, width, more, scores[:3], repr(texts[0]), flush=True)
    header = [
        f"{json.dumps(key)}: {json.dumps(value)}" for key, value in {**versions(), "num_tokens": NUM_TOKENS}.items()
    ]
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    text = "{\n" + ",\n".join(header) + ',\n"cases": [\n' + lines + "\n]\n}\n"
    (HERE / "beams.json").write_text(text, encoding="utf-8")


class Stopper:
    """transformers' own criterion wants one of its tokenizers; this one has its meaning for output text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def criteria(self, prompt_len: int, strings: list[str] | None):
        from transformers import StoppingCriteriaList

        if not strings:
            return StoppingCriteriaList()

        def stops(input_ids, scores, **_):
            texts = [self.tokenizer.decode(row[prompt_len:]) for row in input_ids.tolist()]
            return torch.tensor([any(s in text for s in strings) for text in texts])

        return StoppingCriteriaList([stops])


if __name__ == "__main__":
    main()
