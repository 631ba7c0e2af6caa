"""Shared by all tests: annotations are checked at run time, and equal programs are compiled once a session.

Many tests build an engine of the same shapes. JAX's persistent compilation cache, in a folder that goes with the session,
makes all but the first start at once; subprocesses inherit it.
"""

import atexit
import os
import shutil
import tempfile

from jaxtyping import install_import_hook

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.mkdtemp(prefix="pagedjax-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

CHECKED = ["pagedjax.models", "pagedjax.pallas_kernels", "pagedjax.sampler", "pagedjax.adjustments"]
install_import_hook(CHECKED, "beartype.beartype")
