"""What every test needs before jax starts: a CPU that plays eight devices, and parsed flags."""

import os

from absl import flags

# jax reads both once, when it is first imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile more than they compute: without optimisation a step compiles three times as fast.
for _flag in ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"):
    if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()

# grain asks absl for flags when it starts worker processes; pytest never parses them.
flags.FLAGS.mark_as_parsed()
