"""What preempted requests had in their pages, in host memory: copies out and back that overlap the steps.

The device runs what is dispatched in order. So a gather reads pages before the next step writes them, and its result
goes to the host while that step runs. A copy that comes back begins when the device has done all that was dispatched
before it, and holds up the copies to the device that are dispatched after it; so it is dispatched between a step's
arguments and the step, which does not need it, and a scatter after that step puts it into the pool. The host waits for
neither, unless more is on its way than the pool leaves room for beside it.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from .config import EngineConfig, ResolvedConfig
from .kv_cache import KVCache, bytes_per_page
from .models.llama import Llama
from .page_pool import NULL_PAGE
from .schedule import Swapped, Swaps
from .step import Step
from .step_function import StepFunction
from .swap import SwapCosts, SwapSpace, pages_per_copy

PINNED = "pinned_host"
MAX_STAGED = 8  # copies that lie on the device beside the pool, on their way out or back


class HostCopy:
    """The pages of one copy, on their way to the host or there: in pinned memory, which the device copies to at the
    bus's rate and without the host's help, where the backend has it, else in an array of numpy's."""

    def __init__(self, pages: jax.Array, pinned: SingleDeviceSharding | None):
        self.pages: Any = pages if pinned is None else jax.device_put(pages, pinned)
        if pinned is None:
            pages.copy_to_host_async()

    def is_ready(self) -> bool:
        return self.pages.is_ready()

    def wait(self) -> None:
        """Returns when it is there, and the device has no part of it any more; once."""
        is_pinned = self.pages.sharding.memory_kind == PINNED
        self.pages = self.pages.block_until_ready() if is_pinned else np.array(self.pages)


class HostPages:
    """Keeps pages for as long as somebody else keeps their `Swapped`: an aborted request's go with it."""

    def __init__(self, step: Step, page_size: int):
        self._step, self._size = step, pages_per_copy(page_size)
        device = jax.devices()[0]
        kinds = {memory.kind for memory in device.addressable_memories()}
        self._pinned = SingleDeviceSharding(device, memory_kind=PINNED) if PINNED in kinds else None
        self._device = SingleDeviceSharding(device)
        self._copies: WeakKeyDictionary[Swapped, list[HostCopy]] = WeakKeyDictionary()
        self._staged: deque[Any] = deque()  # host copies, and signs that pages are back
        self._late: list[tuple[np.ndarray, Any]] = []  # pages, and what goes into them

    def swap(self, kv: KVCache, swaps: Swaps) -> KVCache:
        """Starts what a schedule swaps before its step, and before all else of it."""
        while self._staged and self._staged[0].is_ready():
            self._wait_for_oldest()
        for swapped, pages in swaps.outs:
            self._copies[swapped] = [self._out(kv, part) for part in self._parts(pages)]
        for part, contents in self._returning(swaps.ins):
            kv = self._back(kv, part, contents)
        return kv

    def ahead(self, batch: np.ndarray | jax.Array) -> jax.Array:
        """A step's batch on its way to the device, from pinned memory like the copies back that begin after it: a step
        that takes an array from other memory waits for these too."""
        if self._pinned is not None and isinstance(batch, np.ndarray):
            batch = jax.device_put(batch, self._pinned).block_until_ready()
        return jax.device_put(batch, self._device)

    def begin(self, late: list[tuple[Swapped, list[int]]]) -> None:
        """Starts the copies back that a step does not need, whose arguments are on their way; `finish` is to follow."""
        self._late = self._returning(late)
        for i in range(min(len(self._late), MAX_STAGED - len(self._staged))):
            part, contents = self._late[i]
            self._late[i] = part, jax.device_put(contents, self._device)

    def finish(self, kv: KVCache) -> KVCache:
        """Puts what was late into its pages, when the step has been dispatched."""
        for part, contents in self._late:
            kv = self._back(kv, part, contents)
        self._late = []
        return kv

    def functions(self, kv: KVCache) -> Iterator[tuple[StepFunction, tuple[Any, ...]]]:
        """What it runs, for a pool of this shape, and the shapes of arguments."""
        pages = jax.ShapeDtypeStruct((self._size,), np.int32)
        shape = len(kv.layers), self._size, *kv.layers[0].shape[1:]
        yield self._step.gather_pages(), (kv, pages)
        yield self._step.scatter_pages(), (kv, pages, jax.ShapeDtypeStruct(shape, kv.layers[0].dtype))

    def run_padding(self, kv: KVCache) -> KVCache:
        (padding,) = self._parts([NULL_PAGE])
        return self._back(kv, padding, self._out(kv, padding).pages)

    def wait(self) -> None:
        """Returns when nothing is on its way."""
        while self._staged:
            self._wait_for_oldest()

    def _out(self, kv: KVCache, pages: np.ndarray) -> HostCopy:
        copy = HostCopy(self._step.gather_pages()(kv, pages), self._pinned)
        self._stage(copy)
        return copy

    def _returning(self, ins: list[tuple[Swapped, list[int]]]) -> list[tuple[np.ndarray, Any]]:
        """The copies that come back, which the host then has no more, and their pages."""
        copies = [
            pair for swapped, pages in ins for pair in zip(self._parts(pages), self._copies.pop(swapped), strict=True)
        ]
        return [(part, copy.pages) for part, copy in copies if part.any()]

    def _back(self, kv: KVCache, pages: np.ndarray, contents: Any) -> KVCache:
        kv, written = self._step.scatter_pages()(kv, pages, jax.device_put(contents, self._device))
        self._stage(written)
        return kv

    def _stage(self, on_its_way: HostCopy | jax.Array) -> None:
        self._staged.append(on_its_way)
        if len(self._staged) > MAX_STAGED:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        oldest = self._staged.popleft()
        oldest.wait() if isinstance(oldest, HostCopy) else oldest.block_until_ready()

    def _parts(self, pages: list[int]) -> list[np.ndarray]:
        """Pages as copies take them; null pages fill the last one."""
        padded = np.full(-(-len(pages) // self._size) * self._size, NULL_PAGE, np.int32)
        padded[: len(pages)] = pages
        return list(padded.reshape(-1, self._size))


def staged_bytes(config: EngineConfig, page_bytes: int) -> int:
    """What the pool must leave free for copies on their way."""
    return MAX_STAGED * pages_per_copy(config.page_size) * page_bytes if config.swaps else 0


def make_swap_space(config: ResolvedConfig, model: Llama) -> SwapSpace | None:
    """The account of `swap_space`, if preempted requests may be swapped. ValueError if it holds not even one copy."""
    if not config.swaps:
        return None
    llama, size = model.config, pages_per_copy(config.page_size)
    page_bytes = bytes_per_page(llama, config.page_size, model.dtype)
    num_pages = int(config.swap_space * 2**30) // page_bytes
    if num_pages < size:
        least = size * page_bytes / 2**30
        raise ValueError(f"swap_space={config.swap_space!r}; accepted: 0, or at least {least:.3g} GiB for one copy")
    weights = sum(x.size for name, x in model.shapes.items() if ".layers." in name)
    attention = 4 * llama.num_layers * llama.num_q_heads * llama.head_dim
    costs = SwapCosts(page_bytes, 2 * weights, attention)
    return SwapSpace(num_pages, config.page_size, page_bytes, None if config.preemption_mode == "swap" else costs)
