"""What does transformers in float32 say of each token of some windows of text?

The reference of `quality.py`, whose `--write-windows` makes the windows. Writes them to `--reference` with the
log-probability of every token and the token likeliest in its place. Held: weights in `--dtype` (a GGUF's are
dequantised), SDPA attention, no cache, one window at a time.

Needs torch, transformers and gguf; imports neither jax nor pagedjax. Prints one JSON line:

    python -m experiments.hf_quality --model SmolLM2-135M-Instruct.Q4_1.gguf --windows windows.npz --reference out.npz
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from .hf_gguf import load_llama


def load(path: Path, dtype: torch.dtype) -> torch.nn.Module:
    if path.suffix == ".gguf":
        return load_llama(path, dtype)
    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()


@torch.inference_mode()
def judge(model: torch.nn.Module, ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of ids[1:], and the likeliest tokens in their places."""
    logits = model(ids[None], use_cache=False).logits[0, :-1].float()
    chosen = logits.log_softmax(dim=-1).gather(1, ids[1:, None])[:, 0]
    return chosen.cpu().numpy(), logits.argmax(dim=-1).int().cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a LLaMA GGUF file, or a folder")
    parser.add_argument("--windows", type=Path, required=True, help="what quality.py wrote")
    parser.add_argument("--reference", type=Path, required=True, help="the file to write")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    with np.load(args.windows) as file:
        ids, about = file["ids"], json.loads(str(file["about"]))
    if about["model"] != args.model.name:
        raise ValueError(f"windows={str(args.windows)!r} are of {about['model']}; accepted: of {args.model.name}")
    model, start = load(args.model, getattr(torch, args.dtype)).to(device), time.perf_counter()
    found = [judge(model, torch.from_numpy(window).long().to(device)) for window in ids.reshape(-1, ids.shape[-1])]
    shape = (*ids.shape[:2], ids.shape[2] - 1)
    logprobs, likeliest = (np.stack(part).reshape(shape) for part in zip(*found, strict=True))
    by = {"dtype": args.dtype, "transformers": transformers.__version__, "torch": torch.__version__}
    by["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    about = json.dumps(about | {"judged_by": by})
    np.savez_compressed(args.reference, ids=ids, logprobs=logprobs, likeliest=likeliest, about=about)
    values = [math.exp(-trial.mean(dtype=np.float64)) for trial in logprobs]
    print(json.dumps(by | {"perplexity": values, "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
