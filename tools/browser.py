"""A Chromium for the test that opens pages: finds one, or as root on a Debian installs one.

Run by `make browser`. Where there is none to be had it says so and goes on: that test is skipped.
"""

import os
import shutil
import subprocess

# The shell is the least that draws pages: a quarter smaller than the browser itself.
PACKAGE = "chromium-headless-shell"
NAMES = (PACKAGE, "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str:
    """Path of a Chromium; "" where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), "")


def installs() -> bool:
    """Whether Debian's package manager installed one."""
    if os.geteuid() or not shutil.which("apt-get"):
        return False
    install = ("install", "--yes", "--quiet=2", "--no-install-recommends", PACKAGE)
    return _apt("update", "--quiet=2") and _apt(*install)


def _apt(*words: str) -> bool:
    """Whether it did so; what is wrong it says on its own."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        ["apt-get", *words], env=environment, stdout=subprocess.DEVNULL, check=False
    )
    return done.returncode == 0


if __name__ == "__main__":
    if not find() and not installs():
        print(f"no Chromium (one of {', '.join(NAMES)}), and none installed: that takes root on")
        print("Debian, or your own hands. The test that opens a page in it is skipped.")
