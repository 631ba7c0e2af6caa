"""Shared by all tests: jaxtyping's annotations are checked at run time, and the demo model is loaded once."""

from jaxtyping import install_import_hook

install_import_hook(
    ["pagedjax.models", "pagedjax.pallas_kernels", "pagedjax.sampler", "pagedjax.adjustments"],
    "beartype.beartype",
)
