"""A jitted function for one shape of arguments, and how it comes to be ready."""

from collections.abc import Callable
from typing import Any

import jax

from .executables import Executables


class StepFunction:
    """A function for arguments of one shape, compiled at its first call or before, or loaded if an earlier process has
    saved it."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        donate_argnums: tuple[int, ...] = (),
        executables: Executables | None = None,
        options: dict[str, Any] | None = None,
    ):
        """`options` are XLA's."""
        self.name, self.options, self._executables = name, options, executables
        self._jitted = jax.jit(function, donate_argnums=donate_argnums)
        self._executable: Any = None

    def __call__(self, *args: Any) -> Any:
        if self._executable is None:
            self.ready(*args)
        executable: Any = self._executable
        return executable(*args)

    def ready(self, *args: Any) -> None:
        """Loads or compiles it. Arguments may be shapes, here and below."""
        if not self.load(*args):
            self.compile(self.lower(*args), *args)

    def memory_analysis(self) -> Any:
        """XLA's account, once it is ready."""
        assert self._executable is not None
        return self._executable.memory_analysis()

    def load(self, *args: Any) -> bool:
        """Whether it was saved, and is ready now."""
        if self._executables is not None:
            self._executable = self._executables.load(self.name, args)
        return self._executable is not None

    def lower(self, *args: Any) -> Any:
        return self._jitted.lower(*args)

    def compile(self, lowered: Any, *args: Any) -> None:
        self._executable = lowered.compile(self.options)
        if self._executables is not None:
            self._executables.save(self.name, args, self._executable)
