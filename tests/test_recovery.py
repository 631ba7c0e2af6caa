"""The experiment on recovery measures what it says."""

from helpers import load_tiny

from experiments.recovery import Trial


def test_a_request_is_swapped_and_computed_and_leaves_nothing_behind():
    trial = Trial(*load_tiny("gqa"), page_size=4, most_tokens=150)
    (times,) = trial.milliseconds(150, repeat=1)
    assert set(times) == {"out_ms", "in_ms", "device_ms", "recompute_ms"} and min(times.values()) > 0
    assert not trial.is_swapped(150)  # a tiny model is computed sooner
    assert trial.engine.pool.num_used == 0 and not trial.runner._host_pages._copies
