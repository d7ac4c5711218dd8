"""A page in a real headless Chromium, driven by the DevTools protocol through a pair of pipes."""

import base64
import contextlib
import json
import os
import select
import subprocess
import time

PATIENCE = 60  # seconds for any answer, on a busy machine

# What Chromium would otherwise ask of the network, or of a screen.
OPTIONS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


@contextlib.contextmanager
def opened(chromium: str, path, profile, width: int = 1280, height: int = 1600):
    """Opens a file; yields a `Page` whose images and styles are loaded.

    Args:
      chromium: the program.
      path: of the page.
      profile: an empty folder.
      width, height: of the window in pixels.
    """
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    command = [chromium, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
    # Chromium reads 3 and writes 4.
    shell = ["bash", "-c", f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}', *command]
    process = subprocess.Popen(
        shell,
        pass_fds=(theirs_in, theirs_out),
        stderr=subprocess.DEVNULL,
        env=_environment(profile),
    )
    os.close(theirs_in)
    os.close(theirs_out)
    page = Page(ours_in, ours_out)
    try:
        page.open(path, width, height)
        yield page
    finally:
        os.close(ours_out)  # it ends then, and its helpers with it
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()
        os.close(ours_in)


def _environment(profile) -> dict[str, str]:
    return {**os.environ, "HOME": str(profile)}


class Page:
    """A page; `complaints` are the errors and warnings of its console so far."""

    def __init__(self, reading: int, writing: int):
        self._reading, self._writing = reading, writing
        self._read, self._number, self._session = b"", 0, {}
        self._events: list[dict] = []

    def open(self, path, width: int, height: int) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        window = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **window)
        self.call("Page.navigate", url=path.as_uri())
        self._await(lambda message: message.get("method") == "Page.loadEventFired")

    def evaluate(self, expression: str):
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def screenshot(self) -> bytes:
        """What stands in the window, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    @property
    def complaints(self) -> list[str]:
        self.evaluate("0")  # what was said before has arrived then
        kinds = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}
        return [json.dumps(e["params"]) for e in self._events if e["method"] in kinds]

    def call(self, method: str, **params) -> dict:
        """The result of a command of the protocol."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params, **self._session}
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        answer = self._await(lambda message: message.get("id") == number)
        assert "error" not in answer, answer
        return answer["result"]

    def _await(self, wanted) -> dict:
        until = time.monotonic() + PATIENCE
        while True:
            message = self._next(until - time.monotonic())
            if "method" in message:
                self._events.append(message)
            if wanted(message):
                return message

    def _next(self, patience: float) -> dict:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._reading], [], [], max(0, patience))
            assert ready, f"Chromium said nothing for {PATIENCE} s"
            chunk = os.read(self._reading, 1 << 16)
            assert chunk, "Chromium ended"
            self._read += chunk
        first, _, self._read = self._read.partition(b"\0")
        return json.loads(first)
