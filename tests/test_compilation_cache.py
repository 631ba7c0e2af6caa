"""Where compilations are kept."""

import jax
import platformdirs
import pytest

from pagedjax.compilation_cache import use_compilation_cache


@pytest.fixture
def settings():
    """JAX's settings, restored afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
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
