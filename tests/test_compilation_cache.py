"""Where compilations are kept."""

from pathlib import Path

import jax
import platformdirs
import pytest

from pagedjax.compilation_cache import use_compilation_cache


@pytest.fixture
def settings():
    """JAX's settings, restored afterwards."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_enable_compilation_cache",
    )
    values = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in values.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(
    "asked, before, after",
    [
        (None, "theirs", "theirs"),
        ("asked", "theirs", "asked"),
        ("asked", None, "asked"),
        (None, None, platformdirs.user_cache_dir("pagedjax")),
    ],
)
def test_a_folder_that_was_asked_for_or_set_is_used(settings, asked, before, after):
    jax.config.update("jax_compilation_cache_dir", before)
    use_compilation_cache(asked)
    assert jax.config.jax_compilation_cache_dir == after


def test_what_compiles_fast_is_kept_in_a_folder_of_ours_only(settings):
    jax.config.update("jax_compilation_cache_dir", "theirs")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 3.0)
    use_compilation_cache(None)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 3.0
    use_compilation_cache("asked")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.0


@pytest.mark.parametrize(
    ("asked", "before", "enabled", "executables"),
    [
        (None, None, True, platformdirs.user_cache_dir("pagedjax")),
        ("asked", None, True, "asked"),
        ("asked", None, False, None),
        (None, "theirs", True, None),
        ("asked", "theirs", True, None),
    ],
)
def test_a_gpu_has_executables_kept_or_jax_keep_its_own(settings, monkeypatch, asked, before, enabled, executables):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_enable_compilation_cache", enabled)
    assert use_compilation_cache(asked) == (Path(executables) if executables else None)
    assert jax.config.jax_compilation_cache_dir == ("asked" if before and asked else before)
