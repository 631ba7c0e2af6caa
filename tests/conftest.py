"""Shared by all tests: annotations are checked at run time, and equal programs are compiled once a session.

Many tests build an engine of the same shapes. JAX's persistent compilation cache, in a folder that goes with the
session, makes all but the first start at once; subprocesses and pytest's workers inherit it.
"""

import atexit
import gc
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.mkdtemp(prefix="pagedjax-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(1 << 36)  # bytes: only with a limit does it lock its files

# Subprocesses import JAX, which takes three times as long without what Python compiles of it.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

if not Path("/proc/driver/nvidia").exists():
    # JAX's CUDA plugin, with which kernels are compiled for a GPU that is not there, must not look for one.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Most of the quick tests' time is XLA compiling what then runs for milliseconds. Where the demo model runs long,
    # as in the slow tests, a step that is not optimised costs more than it saves: these are run with XLA_FLAGS empty.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# A kernel's threads wait for each other on threads of XLA's pool, whose size is this or the number of cores.
os.environ.setdefault("NPROC", "16")

CHECKED = [
    "pagedjax.models",
    "pagedjax.pallas_kernels",
    "pagedjax.sampler",
    "pagedjax.row_params",
    "pagedjax.adjustments",
]
install_import_hook(CHECKED, "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def _executables_go_with_their_tests():
    """XLA maps up to 230 parts of memory for each that it loads, and Linux allows a process 65 530 in all: at one more,
    loading ends in a segmentation fault. Engines refer to themselves, so only the collector frees theirs."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def text_model(tmp_path_factory):
    """A tiny model with a byte-level tokenizer of 128 tokens: ASCII, two special tokens, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("text") / "model"
    shutil.copytree(Path(__file__).parent / "golden" / "tiny" / "gqa", path)
    ascii_letters = [
        chr(256 + byte) if byte < 33 else chr(byte) for byte in range(126)
    ]  # as byte-level BPE spells them
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(ascii_letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", bos_token="<start>")
    hf.chat_template = (
        "{% for m in messages %}<start>{{ m['role'] }}:{{ m['content'] }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<start>{% endif %}"
    )
    hf.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def small_smollm2(tmp_path_factory) -> str:
    """SmolLM2's tokenizer and vocabulary on two layers of weights that are drawn: for servers whose answers need not
    make sense. Load it with `load_format="dummy"`."""
    from pagedjax.demo import demo_model_path
    from pagedjax.tokenizer import Tokenizer

    path = tmp_path_factory.mktemp("small_smollm2")
    Tokenizer.load(demo_model_path()).hf.save_pretrained(path)
    config = json.loads((Path(__file__).parent / "golden" / "tiny" / "gqa" / "config.json").read_text())
    config |= {"vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="module")
def demo():
    """The demo model's tokenizer, byte-level."""
    from tokenizer_helpers import demo_tokenizer

    return demo_tokenizer()


@pytest.fixture(scope="module")
def spm():
    """A tiny SentencePiece tokenizer, with byte fallback."""
    from tokenizer_helpers import spm_tokenizer

    return spm_tokenizer()


@pytest.fixture(params=["demo", "spm"])
def tokenizer(request: pytest.FixtureRequest):
    """Both."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def without_jax_cache():
    """What comes out of JAX's cache cannot be saved again on a CPU."""
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    for enabled in (False, True):
        jax.config.update("jax_enable_compilation_cache", enabled)
        reset_cache()
        if not enabled:
            yield
