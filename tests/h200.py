"""Compiles for an H200 on a machine without a GPU: XLA, Mosaic and ptxas.

Needs JAX's CUDA 13 plugin beside the CPU's jaxlib, and a ptxas (the package nvidia-cuda-nvcc has one). Choices between
GEMMs are untuned, for that takes the card. What it shows: that shared memory suffices, spilled registers, temporaries,
aliased buffers, and how many kernels a step launches.
"""

import os
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax._src import xla_bridge
from jax.experimental import topologies


def _rates(clock: float, units: dict[int, tuple[int, int]]) -> str:
    row = "rate_infos {{ key: {} value {{ clock_rate_ghz: {} units_per_core: {} ops_per_clock: {} }} }}"
    return " ".join(row.format(key, clock, count, ops) for key, (count, ops) in units.items())


# What CUDA reports of the device, as XLA's GpuTargetConfigProto; keys of the rates are XLA's primitive types.
SCALAR = _rates(1.98, {4: (64, 1), 8: (64, 1), 10: (128, 2), 11: (128, 1), 12: (64, 1), 16: (128, 2)})
MATRIX = _rates(1.83, {2: (4, 1024), 6: (4, 1024), 10: (4, 512), 11: (4, 256), 12: (4, 32), 16: (4, 512)})
H200 = f"""
gpu_device_info {{
  name: "NVIDIA H200"  device_vendor: "NVIDIA Corporation"  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132  clock_rate_ghz: 1.98  fpus_per_core: 128
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  memory_bandwidth: 4800000000000  l2_cache_size: 52428800  device_memory_size: 151397597184
  device_address_bits: 64  pcie_bandwidth: 34359738368  ecc_enabled: true
  driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"  dnn_version: "9.12.0"
  scalar_unit_description {{ {SCALAR} }}  matrix_unit_description {{ {MATRIX} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
device_description_str: "NVIDIA H200"
"""
OPTIMIZED = {"xla_backend_optimization_level": 3}  # whatever XLA_FLAGS the tests have


@cache
def _sharding() -> jax.sharding.Sharding:
    _find_ptxas()
    xla_bridge.backends()  # registers the CUDA plugin
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _find_ptxas() -> None:
    """The package's ptxas goes first on PATH: a toolkit of the machine may be too old for sm_90a."""
    import nvidia  # a namespace package, only where the CUDA packages are

    for folder in nvidia.__path__:
        for ptxas in Path(folder).glob("cu*/bin/ptxas"):
            os.environ["PATH"] = f"{ptxas.parent}{os.pathsep}{os.environ['PATH']}"


def spec(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An argument of that shape on the H200."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=_sharding())


def specs(tree: Any) -> Any:
    """The same for a pytree of shapes."""
    return jax.tree.map(lambda x: spec(x.shape, x.dtype), tree)


class Compiled(NamedTuple):
    temporaries: int  # bytes
    aliased: int  # bytes
    spilled: int  # bytes of registers, of all kernels that this process had not compiled before
    reports: int  # of such kernels
    custom_calls: list[str]  # their targets, GEMMs among them
    sorts: int
    launches: int  # kernels of a run: fusions, custom calls, copies and sorts of the entry computation

    @property
    def mosaic_calls(self) -> int:
        return sum("mosaic" in name for name in self.custom_calls)


def compile_for_h200(f: Any, *args: Any, donate: tuple[int, ...] = (), capfd: Any) -> Compiled:
    """Compiles `f` for arguments made by `spec`; `capfd` is pytest's, through which ptxas reports."""
    jitted = f if hasattr(f, "lower") else jax.jit(f, donate_argnums=donate)
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)  # or nothing is compiled, so nothing reported
    try:
        capfd.readouterr()
        compiled = jitted.lower(*args).compile((getattr(jitted, "options", None) or {}) | OPTIMIZED)
        report = "".join(capfd.readouterr())
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
        del os.environ["MOSAIC_GPU_DUMP_PTXAS"]
    text = compiled.as_text() or ""
    kernels = re.findall(r'custom_call_target="([^"]+)"', text)
    memory = compiled.memory_analysis()
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", report)))
    reports, sorts = report.count("Used "), text.count(" sort(")
    launches = len(re.findall(r" (?:fusion|custom-call|copy|sort)\(", text[text.index("\nENTRY ") :]))
    return Compiled(memory.temp_size_in_bytes, memory.alias_size_in_bytes, spilled, reports, kernels, sorts, launches)
