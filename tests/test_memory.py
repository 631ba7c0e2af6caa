"""How the pool is sized, on devices that the test makes up."""

import logging
from types import SimpleNamespace

import jax
import pytest

from pagedjax.config import EngineConfig
from pagedjax.memory import pool_pages

GIB = 1 << 30
PAGE = 1 << 20


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 100 GiB of which JAX holds 75, 10 of them in use."""
    stats = {"bytes_limit": 75 * GIB, "bytes_in_use": 10 * GIB}
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")


def pages(step_bytes=0, **config):
    return pool_pages(EngineConfig(model="m", **config), PAGE, step_bytes, 10**9)


def test_num_pages_wins_over_memory(gpu):
    assert pages(num_pages=7, gpu_memory_utilization=0.1) == 7


def test_the_pool_takes_what_weights_and_the_largest_step_leave_of_the_share(gpu):
    assert pages(step_bytes=5 * GIB, gpu_memory_utilization=0.5) == (50 - 10 - 5) * 1024


def test_a_share_of_jax_smaller_than_asked_for_is_said_plainly_and_kept_to(gpu, caplog):
    with caplog.at_level(logging.WARNING):
        assert pages(gpu_memory_utilization=0.9) == (75 - 10) * 1024
    assert "0.90 was asked for, but JAX holds 0.75" in caplog.text
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.90" in caplog.text


def test_no_room_for_a_page_is_an_error_that_says_where_memory_went(gpu):
    with pytest.raises(ValueError, match="10240 MiB are in use and 46080 MiB are needed by a step"):
        pages(step_bytes=45 * GIB, gpu_memory_utilization=0.5)


def test_a_cpu_takes_the_bytes_configured_but_never_more_pages_than_its_rows_can_fill():
    assert pages(cpu_kv_cache_bytes=8 * PAGE) == 8
    assert pool_pages(EngineConfig(model="m"), PAGE, 0, 33) == 33
