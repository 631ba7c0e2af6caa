"""Arrivals and latencies of the benchmark."""

import math

import numpy as np
import pytest
from helpers import load_tiny, make_engine

from pagedjax.bench import Workload, inter_token_ms, run_workload, summary
from pagedjax.request import Request, RequestMetrics
from pagedjax.sampling_params import SamplingParams
from pagedjax.schedule import SchedulerStats

WORKLOAD = Workload("mine", [(3, 4)] * 30)


@pytest.fixture(scope="module")
def engine():
    engine = make_engine(*load_tiny("gqa"))
    engine.warm_up(progress=False)
    return engine


def test_requests_arrive_at_the_rate_asked_for(engine, monkeypatch):
    arrivals = []
    add = engine.add_request

    def add_request(*args):
        requests = add(*args)
        arrivals.append(requests[0].metrics)
        return requests

    monkeypatch.setattr(engine, "add_request", add_request)
    result = run_workload(engine, WORKLOAD, seed=0, request_rate=100.0)
    gaps = np.diff([metrics.arrival for metrics in arrivals])
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(0.01, rel=0.6)  # three standard errors of 29 gaps
    assert result["seconds"] > gaps.sum()
    assert all(m.arrival <= m.first_scheduled <= m.first_token <= m.finished for m in arrivals)


def test_all_at_once_is_an_infinite_rate(engine):
    result = run_workload(engine, WORKLOAD, seed=0, request_rate=math.inf)
    assert result["preemptions"] == 0 and 0 < result["itl_ms"]["p50"] <= result["itl_ms"]["p99"]


def test_times_between_tokens_are_each_requests_own():
    a, b = (Request(name, [1], SamplingParams(), max_len=9) for name in "ab")
    steps = [(1.0, [a]), (1.5, [a, b]), (1.75, [b]), (2.5, [a])]
    assert inter_token_ms(steps) == [500.0, 250.0, 1000.0]


def test_normalized_latency_counts_from_arrival_and_is_a_mean_over_requests():
    requests = []
    for num_tokens, finished in ((1, 2.0), (4, 5.0)):
        request = Request("a", [1], SamplingParams(), max_len=9, metrics=RequestMetrics(1.0, 1.1, 1.5, finished))
        request.output_token_ids = [7] * num_tokens
        requests.append(request)
    latency = summary(requests, 4.0, SchedulerStats())["normalized_latency_s"]
    assert latency["mean"] == latency["p50"] == 1.0  # 1 s for one token, 4 s for four: not 5 s over 5 tokens from start
    requests[1].metrics.finished = 9.0
    latency = summary(requests, 8.0, SchedulerStats())["normalized_latency_s"]
    assert (latency["mean"], latency["p90"]) == pytest.approx((1.5, 1.9))
