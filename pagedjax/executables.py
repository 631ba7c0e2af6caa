"""Compiled step functions on disk, so that a later process neither traces, lowers nor compiles them.

JAX's own cache keeps what XLA compiled, but its key is the lowered program, and lowering takes longer than all else.
Here the key is what the program is made from: the code of `step` and of all that it uses, as loaded (so a function
that someone has replaced counts too), versions, device, flags, and the arguments' shapes.

Files are pickles: whoever can write to the cache folder can run code in this process.
"""

import hashlib
import inspect
import logging
import os
import pickle
import sys
from collections.abc import Callable
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from .config import xla_flags

logger = logging.getLogger(__name__)
PACKAGE = __name__.partition(".")[0]
LIBRARIES = "jax", "jaxlib", "flax", "numpy", "jaxtyping"
MAX_DEPTH = 12
Simple = int | float | str | bool | None


class Executables:
    """A folder of compiled functions, each found by its name and its arguments' shapes.

    `parts` go into the key beside code, versions and device: whatever else the functions close over.
    """

    def __init__(self, folder: Path, code: ModuleType, parts: Any):
        self.folder = folder
        self._key = repr((fingerprint(code), surroundings(), _describe(parts))).encode()

    def load(self, name: str, args: tuple[Any, ...]) -> Callable[..., Any] | None:
        """The function if it was saved, else None; what cannot be read counts as absent."""
        path = self._path(name, args)
        try:
            return deserialize_and_load(*pickle.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except Exception:  # an old or damaged file may fail in any way
            logger.warning("%s cannot be loaded: compiling anew", path, exc_info=True)
            return None

    def save(self, name: str, args: tuple[Any, ...], compiled: Any) -> None:
        """Writes beside the place and renames, since processes may share the folder. A failure is logged only."""
        path = self._path(name, args)
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(pickle.dumps(serialize(compiled)))
            draft.replace(path)
        except Exception:  # not every backend can serialise, and disks fill up
            logger.warning("%s cannot be saved", path, exc_info=True)

    def _path(self, name: str, args: tuple[Any, ...]) -> Path:
        leaves, structure = jax.tree.flatten(args)
        shapes = [(x.shape, str(x.dtype)) for x in leaves]
        digest = hashlib.sha256(self._key + repr((name, str(structure), shapes)).encode())
        return self.folder / f"{digest.hexdigest()}.executable"


def surroundings() -> tuple[Any, ...]:
    """What compilation depends on besides code: versions, device, flags."""
    device = jax.devices()[0]
    settings = {k: v for k, v in jax.config.values.items() if isinstance(v, Simple) and "cache" not in k}
    libraries = [version(name) for name in LIBRARIES]
    return libraries, device.client.platform_version, device.device_kind, xla_flags(), sorted(settings.items())


def fingerprint(module: ModuleType) -> str:
    """A digest of a module and of the package's modules that it uses: bytecode and plain constants as they are now."""
    digest, waiting, seen = hashlib.sha256(), [module], set()
    while waiting:
        current = waiting.pop()
        if current.__name__ in seen:
            continue
        seen.add(current.__name__)
        for name, value in sorted(vars(current).items()):
            if not name.startswith("__"):
                digest.update(repr((current.__name__, name, _describe(value))).encode())
        used = {getattr(value, "__module__", None) or "" for value in vars(current).values()}
        used |= {value.__name__ for value in vars(current).values() if isinstance(value, ModuleType)}
        waiting += [sys.modules[name] for name in sorted(used) if name.partition(".")[0] == PACKAGE]
    return digest.hexdigest()


def _describe(value: Any, depth: int = 0) -> Any:
    """Plain values and our own code in a form whose `repr` is the same in every process; None for all else."""
    inner = partial(_describe, depth=depth + 1)
    if isinstance(value, Simple | bytes):
        return value
    if depth > MAX_DEPTH or isinstance(value, ModuleType) or _foreign(value):
        return None
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, [_describe(v, depth) for v in value.co_consts]  # nested as deep as it is
    if isinstance(value, tuple | list):
        return [inner(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(inner(v)) for v in value)
    if isinstance(value, dict):
        return [(repr(inner(k)), inner(v)) for k, v in value.items()]
    if isinstance(value, type):
        return [(k, inner(v)) for k, v in sorted(vars(value).items()) if not k.startswith("__") or _is_function(v)]
    if isinstance(value, partial):
        return inner((value.func, value.args, value.keywords))
    if isinstance(value, property):
        return inner(value.fget)
    if isinstance(value, cached_property):
        return inner(value.func)
    if hasattr(value, "__wrapped__"):  # a jit, a cache, a static method
        return inner(value.__wrapped__)
    if _is_function(value):
        return inner(
            (value.__code__, value.__defaults__, value.__kwdefaults__, inspect.getclosurevars(value).nonlocals)
        )
    return None


def _foreign(value: Any) -> bool:
    """Whether it is a function or a class of Python or of a library, for which its version stands."""
    top = str(getattr(value, "__module__", None)).partition(".")[0]
    return (top in LIBRARIES or top in sys.stdlib_module_names) and (_is_function(value) or isinstance(value, type))


def _is_function(value: Any) -> bool:
    return hasattr(value, "__code__")
