"""The account of a profile: which part had the device when, and for how long none had."""

import pytest
from helpers import load_tiny, make_engine
from jax.profiler import ProfileData

from experiments.timeline import Event, Window, device_events, measure, needed_ms, part_of, time_by_part
from pagedjax.bench import Workload, run_workload
from pagedjax.schedule import SchedulerStats

PROFILE = """
planes { name: "/host:CPU" lines { name: "Stream of thoughts" events { duration_ps: 5000 } } }
planes {
  name: "/device:GPU:0"
  lines { name: "Stream #14(Compute)" timestamp_ns: 100
    events { metadata_id: 1 offset_ps: 30000 duration_ps: 20000 }
    events { metadata_id: 2 offset_ps: 0 duration_ps: 10000 } }
  lines { name: "XLA Ops" timestamp_ns: 100 events { metadata_id: 1 duration_ps: 90000 } }
  event_metadata { key: 1 value { id: 1 name: "paged_decode_mosaic_gpu_kernel" } }
  event_metadata { key: 2 value { id: 2 name: "nvjet_tst_64x8" } }
}
"""


def test_events_are_those_of_a_gpus_streams_in_order():
    profile = ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(PROFILE))
    events = device_events(profile)
    assert events == [Event("nvjet_tst_64x8", 100, 110), Event("paged_decode_mosaic_gpu_kernel", 130, 150)]
    assert time_by_part(events) == {"GEMMs": 10, "attention": 20, "idle": 20}


def test_what_overlaps_counts_once():
    events = [Event("gemm", 0, 10), Event("kv_write", 5, 8), Event("loop_add_fusion", 6, 14), Event("gemm", 15, 16)]
    assert time_by_part(events) == {"GEMMs": 11, "KV write": 0, "other": 4, "idle": 1}
    assert time_by_part([]) == {}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("paged_prefill_mosaic_gpu_kernel", "attention"),
        ("kv_write_mosaic_gpu_kernel", "KV write"),
        ("gemm_fusion_dot_5", "GEMMs"),
        ("project_mosaic_gpu_kernel", "GEMMs"),
        ("loop_add_fusion", "other"),
        ("MemcpyD2H", "copies"),
        ("input_reduce_fusion", "other"),
    ],
)
def test_parts_follow_kernels_names(name: str, part: str):
    assert part_of(name) == part


def test_what_a_step_needs_follows_from_its_weights_and_tokens():
    engine = make_engine(*load_tiny("gqa"))
    stats = SchedulerStats(num_steps=1, num_scheduled_tokens=1, used_slots=1000)
    one, many = (needed_ms(engine, stats, rate) for rate in (1.0, 2.0))
    assert one["GEMMs"] == pytest.approx(2 * many["GEMMs"]) and one["attention"] == pytest.approx(2 * many["attention"])
    config = engine.runner.model.config
    kv = config.num_layers * 2 * config.num_kv_heads * config.head_dim * 4  # float32
    assert one["attention"] == pytest.approx(1000 * kv / 1e9)


@pytest.mark.slow
def test_a_window_counts_the_work_of_its_own_steps(tmp_path):
    engine = make_engine(*load_tiny("gqa"))
    window = Window(engine, 3, 5, tmp_path / "a")
    run_workload(engine, Workload("mine", [(4, 12)] * 3), seed=0, after_step=window.after_step)
    assert window.stats.num_steps == 5 and window.stats.num_scheduled_tokens == 15
    assert window.seconds > 0
    assert device_events(window.profile()) == []  # no GPU here
    events, timed = measure(engine, Workload("mine", [(4, 12)] * 3), after=3, steps=5)
    assert events == [] and timed.stats == window.stats and timed.seconds > 0
    late = Window(engine, 3, 50, tmp_path / "b")
    run_workload(engine, Workload("mine", [(4, 2)]), seed=0, after_step=late.after_step)
    with pytest.raises(ValueError, match="before step 53"):
        late.profile()
