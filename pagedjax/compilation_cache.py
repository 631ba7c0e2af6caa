"""Compilations that outlive the process."""

from pathlib import Path

import jax
import platformdirs


def use_compilation_cache(folder: str | None) -> Path | None:
    """Has compilations kept in `folder`; None: in the user's cache folder, unless the process or
    `JAX_COMPILATION_CACHE_DIR` has named another to JAX, whose own cache then does it.

    On a GPU returns where to keep the engine's executables; elsewhere JAX's cache keeps what XLA compiled. Not both:
    what comes out of JAX's cache cannot be relied on to be saved again. What is older stays until someone deletes it.
    `JAX_ENABLE_COMPILATION_CACHE=false` turns either off.
    """
    if jax.config.jax_compilation_cache_dir is not None and folder is None:
        return None
    chosen = folder or platformdirs.user_cache_dir("pagedjax")
    if jax.default_backend() != "cpu" and jax.config.jax_compilation_cache_dir is None:
        return Path(chosen) if jax.config.jax_enable_compilation_cache else None
    jax.config.update("jax_compilation_cache_dir", chosen)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return None
