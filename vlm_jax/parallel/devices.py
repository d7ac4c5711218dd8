"""What the devices of this machine offer."""

import os
import resource
from pathlib import Path

import jax

KIB = 1024  # what Linux counts `ru_maxrss` in

# Linux control groups, versions 2 and 1: a container may have less than its machine.
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory(devices: list[jax.Device] | None = None) -> int:
    """Bytes that one of `devices` (default: this host's) can hold; the smallest of them.

    Simulated CPU devices share what the host has left.
    """
    devices = jax.local_devices() if devices is None else devices
    return min(_device_memory(device) for device in devices)


def _device_memory(device: jax.Device) -> int:
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return host_memory() // len(jax.local_devices(backend=device.platform))


def peak() -> int:
    """Bytes that were in use at most: on one of this host's devices, or by this process on CPUs."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    known = [int(each["peak_bytes_in_use"]) for each in stats if "peak_bytes_in_use" in each]
    return max(known) if known else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


def host_memory() -> int:
    """Bytes that this host, or the container around it, can still give."""
    return min([_available(), *_cgroup_rooms()])


def _available() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        if "MemAvailable" in fields:
            return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_rooms() -> list[int]:
    """Limits of the container; "max" and version 1's huge default mean there is none."""
    texts = [Path(path).read_text().strip() for path in CGROUP_LIMITS if Path(path).exists()]
    return [int(text) for text in texts if text.isdigit()]
