"""Memory that a training process on the CPU has freed, and may as well keep."""

from __future__ import annotations

import ctypes
import platform


def keep_memory() -> bool:
    """Tell the C library to keep freed memory instead of handing it back to the system; True where it can (glibc).

    False also on ARM: PyTorch's builds for it allocate by mimalloc, which has rules of its own and isn't asked by this.

    glibc hands large blocks back as soon as they are free, and what the system gives out again it clears and maps page
    by page. A training step frees and wants the same hundreds of megabytes every time: tens of thousands of page
    faults, some 5 to 20 % of its time. The price: what the process held at its peak, it holds to its end.

    It concerns the whole process from now on, and changes no result. Forked processes inherit it, spawned ones have to
    call it themselves. The commands sdpnet.train and sdpnet.evaluate do so on a CPU; importing a module does not. In a
    training loop of your own, call it once before the first step.
    """
    if platform.machine().lower() in ("aarch64", "arm64"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no C library to ask by this name, or one without it
        return False
    trim_threshold, mmap_max = -1, -4  # malloc.h
    never, none = -1, 0  # the heap's free end is not given back; no block gets a mapping of its own
    return bool(mallopt(trim_threshold, never) and mallopt(mmap_max, none))
