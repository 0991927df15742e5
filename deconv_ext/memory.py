"""The memory of large results on the CPU.

Results of 1 MiB and more come from a pool: when one dies, its memory waits for the next one that
fits, for fresh memory costs page faults that may take longer than the kernel. At most
``DECONV_EXT_POOL_MB`` MiB wait (default 256; 0 keeps nothing; read once).
"""

from __future__ import annotations

from .build import extension


def idle_output_bytes() -> int:
    """Bytes that wait in the pool; results that are alive do not count."""
    waiting: int = extension().idle_output_bytes()
    return waiting


def empty_output_pool() -> None:
    """Give all memory that waits in the pool back to the system."""
    extension().empty_output_pool()
