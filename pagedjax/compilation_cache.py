"""Compilations that outlive the process."""

import jax
import platformdirs


def use_compilation_cache(folder: str | None) -> None:
    """Has JAX keep executables, and XLA what it found for GEMMs, in `folder`; None: in the user's cache folder, unless
    the process or `JAX_COMPILATION_CACHE_DIR` has named another.

    What is older stays there until someone deletes it. `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off.
    """
    if folder is None and jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", folder or platformdirs.user_cache_dir("pagedjax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
