"""What has been dispatched to the device and not been read back."""

from dataclasses import dataclass

from .request import Request
from .sampler import Sampled
from .schedule import Schedule


@dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of prompt tokens [first, first + count) of a request, perhaps still on the device."""

    request: Request
    first: int
    count: int
    sampled: Sampled


@dataclass(frozen=True)
class InFlight:
    """A dispatched step; its results are on their way to the host."""

    schedule: Schedule
    sampled: Sampled
    prompt_logprobs: list[PromptLogprobs]
