"""Memory figures of devices."""

import jax

from vlm_jax.parallel import devices


class Accelerator:
    platform = "cpu"

    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


def test_a_device_that_knows_its_limit_is_believed():
    assert devices.memory([Accelerator({"bytes_limit": 10}), Accelerator({"bytes_limit": 7})]) == 7


def test_simulated_devices_share_what_the_host_has(monkeypatch):
    monkeypatch.setattr(devices, "host_memory", lambda: 8000)
    assert devices.memory() == 8000 // len(jax.local_devices())


def test_a_container_has_no_more_than_its_limit(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(devices, "CGROUP_LIMITS", (str(limit), str(tmp_path / "absent")))
    limit.write_text("max\n")
    free = devices.host_memory()
    assert free > 12345
    limit.write_text("12345\n")
    assert devices.host_memory() == 12345
