"""Request: when a sequence ends, and what it says about itself."""

from dataclasses import replace
from typing import Any

import pytest

from pagedjax.request import Logprob, Request, Status, completion, request_output
from pagedjax.sampling_params import SamplingParams

EOS, STOP_ID = 90, 80


class FakeDetokenizer:
    """Token i is the letter of that number; "!" ends the text where it is a stop string."""

    def __init__(self, stop: str | None = None):
        self.stop = stop
        self.fed: list[int] = []

    def append(self, token_id: int) -> str | None:
        self.fed.append(token_id)
        return self.stop if self.stop is not None and chr(token_id) == self.stop else None

    def stable_text(self, finished: bool) -> str:
        return "".join(map(chr, self.fed)) + ("." if finished else "")


def make(stop: str | None = None, max_len: int = 10, prompt: tuple[int, ...] = (1, 2, 3), **params: Any) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=list(prompt),
        params=SamplingParams(**params),
        max_len=max_len,
        eos_ids=frozenset({EOS, EOS + 1}),
        detokenizer=FakeDetokenizer(stop),
    )


def ended(request: Request, *token_ids: int) -> tuple[str | None, int | str | None]:
    for token_id in token_ids:
        assert request.finish_reason is None
        request.append(token_id)
    return request.finish_reason, request.stop_reason


def test_an_ordinary_token_ends_nothing():
    request = make(stop="!", stop_token_ids=[STOP_ID])
    assert ended(request, 65, 66) == (None, None)
    assert request.metrics.finished is None


@pytest.mark.parametrize("eos", [EOS, EOS + 1])
def test_any_of_the_eos_ids_ends_a_sequence(eos: int):
    assert ended(make(), 65, eos) == ("stop", None)


def test_ignore_eos_goes_on_past_it():
    assert ended(make(ignore_eos=True), 65, EOS, 66) == (None, None)


def test_ignore_eos_leaves_stop_ids_alone():
    assert ended(make(ignore_eos=True, stop_token_ids=[EOS]), EOS) == ("stop", EOS)


def test_a_stop_id_ends_a_sequence_and_is_its_stop_reason():
    assert ended(make(stop_token_ids=[STOP_ID]), 65, STOP_ID) == ("stop", STOP_ID)


def test_prompt_and_output_together_end_at_the_length_limit():
    assert ended(make(max_len=5), 65, 66) == ("length", None)


def test_a_stop_string_ends_a_sequence_and_is_its_stop_reason():
    assert ended(make(stop="!"), 65, ord("!")) == ("stop", "!")


def test_eos_is_found_before_a_stop_id():
    assert ended(make(stop_token_ids=[EOS]), EOS) == ("stop", None)


@pytest.mark.parametrize(("token_id", "reason"), [(EOS, None), (STOP_ID, STOP_ID), (ord("!"), "!")])
def test_a_last_token_that_stops_by_itself_has_not_reached_the_length_limit(token_id: int, reason: int | str | None):
    assert ended(make(stop="!", max_len=4, stop_token_ids=[STOP_ID]), token_id) == ("stop", reason)


def test_an_id_that_stops_comes_before_a_stop_string_in_its_text():
    request = make(stop="!", stop_token_ids=[ord("!")], include_stop_str_in_output=True)
    assert ended(request, ord("!")) == ("stop", ord("!"))


@pytest.mark.parametrize("token_id", [EOS, STOP_ID])
def test_nothing_stops_by_its_id_before_min_tokens(token_id: int):
    request = make(stop_token_ids=[STOP_ID], min_tokens=3)
    assert ended(request, token_id, token_id) == (None, None)
    assert ended(request, token_id) == ("stop", STOP_ID if token_id == STOP_ID else None)


def test_the_length_limit_holds_below_min_tokens():
    assert ended(make(max_len=4, min_tokens=3), 65) == ("length", None)


@pytest.mark.parametrize("token_id", [EOS, STOP_ID])
@pytest.mark.parametrize("include", [False, True])
def test_the_stopping_token_stays_among_the_ids_and_its_text_is_shown_on_request(token_id: int, include: bool):
    request = make(stop_token_ids=[STOP_ID], include_stop_str_in_output=include)
    ended(request, 65, token_id)
    assert request.output_token_ids == [65, token_id]
    assert request.detokenizer.fed == ([65, token_id] if include else [65])


def test_the_last_token_within_the_limit_is_text():
    request = make(max_len=5)
    ended(request, 65, 66)
    assert request.detokenizer.fed == [65, 66]


def test_an_ignored_eos_is_text():
    request = make(min_tokens=2)
    ended(request, EOS, 65)
    assert request.detokenizer.fed == [EOS, 65]


def test_a_request_without_a_detokenizer_ends_by_ids_and_length():
    request = make(max_len=5)
    request.detokenizer = None
    assert ended(request, 65, 66) == ("length", None)


@pytest.mark.parametrize(("start", "end"), [(start, end) for end in range(6) for start in range(end + 1)])
def test_any_run_of_tokens_reads_across_prompt_and_output(start: int, end: int):
    request = make()
    request.output_token_ids += [65, 66]
    assert request.token_ids(start, end) == [1, 2, 3, 65, 66][start:end]


def test_tokens_in_flight_count_and_none_is_computed_past_the_limit():
    request = make(max_len=6)
    assert (request.num_tokens, request.num_to_compute) == (3, 3)
    request.num_computed_tokens, request.num_in_flight = 3, 1
    assert (request.num_tokens, request.num_to_compute) == (4, 1)
    request.append(65)
    request.num_computed_tokens, request.num_in_flight = 5, 2
    assert (request.num_tokens, request.num_to_compute) == (6, 0)


def test_times_of_the_first_token_and_of_the_end_are_kept():
    request = make(max_len=6)
    assert (request.metrics.first_token, request.metrics.finished) == (None, None)
    request.append(65)
    first = request.metrics.first_token
    assert first is not None and request.metrics.arrival <= first and request.metrics.finished is None
    request.append(66)
    request.append(67)
    finished = request.metrics.finished
    assert request.metrics.first_token == first and finished is not None and finished >= first


@pytest.mark.parametrize(
    ("params", "adjusted"),
    [
        ({}, False),
        ({"temperature": 0.3, "top_k": 5, "seed": 1, "logprobs": 2}, False),
        ({"presence_penalty": 0.1}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"logit_bias": {1: 2.0}}, True),
        ({"logit_bias": {}}, False),
        ({"allowed_token_ids": [1]}, True),
        ({"min_tokens": 1}, True),
        ({"min_tokens": 1, "ignore_eos": True}, True),
        ({"min_tokens": 1, "ignore_eos": True, "stop_token_ids": [7]}, True),
    ],
)
def test_a_request_knows_whether_its_logits_change(params: dict[str, Any], adjusted: bool):
    assert make(**params).adjusted == adjusted


def test_bad_words_change_the_logits():
    assert replace(make(), bad_words=((5,),)).adjusted


def test_what_min_tokens_bans_are_the_eos_ids_even_if_ignored_and_the_stop_ids():
    assert make(stop_token_ids=[STOP_ID]).banned_until == ()
    assert make(min_tokens=1, stop_token_ids=[STOP_ID]).banned_until == (STOP_ID, EOS, EOS + 1)
    assert make(min_tokens=1, stop_token_ids=[STOP_ID], ignore_eos=True).banned_until == (STOP_ID, EOS, EOS + 1)


def test_an_output_is_a_copy_of_what_has_come_so_far():
    request = make(logprobs=0)
    for token, logprob in ((65, -1.0), (66, -0.5)):
        request.append(token)
        request.logprobs.append({token: Logprob(logprob, 1)})
    output = completion(2, request, finished=False)
    request.append(67)
    assert (output.index, output.text, output.token_ids) == (2, "AB", [65, 66])
    assert output.cumulative_logprob == -1.5 and output.logprobs is not None and len(output.logprobs) == 2
    assert (output.finish_reason, output.stop_reason) == (None, None)


def test_logprobs_come_only_when_asked_for():
    request = make()
    request.append(65)
    output = completion(0, request, finished=True)
    assert (output.logprobs, output.cumulative_logprob, output.text) == (None, None, "A.")


def test_a_prompt_s_output_is_finished_when_all_its_sequences_are():
    requests = [make(max_len=4), make(max_len=4)]
    requests[0].append(65)
    requests[0].status = Status.FINISHED
    output = request_output("abc", requests)
    assert not output.finished and [o.index for o in output.outputs] == [0, 1]
    assert [o.text for o in output.outputs] == ["A.", ""]
    requests[1].status = Status.FINISHED
    assert request_output("abc", requests).finished
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r", "abc", [1, 2, 3])
