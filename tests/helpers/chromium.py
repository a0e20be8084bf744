"""A headless Chromium for tests, by its DevTools protocol over a pipe, without a driver.

$CHROMIUM names the program; else chromium or google-chrome is looked for.
"""

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
    "--mute-audio",
    "--hide-scrollbars",
)
TIMEOUT = 60  # seconds for an answer


def find() -> str | None:
    return os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)


needs_browser = pytest.mark.skipif(
    find() is None, reason="no Chromium here: install one, or name it in $CHROMIUM, to test the page in it"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser for the tests of a module."""
    opened = Chromium(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


class Chromium:
    """One page at a time; `problems` are its console messages, exceptions and failed requests."""

    def __init__(self, profile: Path):
        to_read, self.send_end = os.pipe()
        self.receive_end, to_write = os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (to_read, to_write)]

        def hand_over():  # the browser reads from 3 and writes to 4
            os.dup2(theirs[0], 3)
            os.dup2(theirs[1], 4)

        command = [find(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, preexec_fn=hand_over, pass_fds=(3, 4), **quiet)
        for end in (to_read, to_write, *theirs):
            os.close(end)
        self.number, self.buffer, self.session, self.problems, self.loaded = 0, b"", None, [], False
        self.home = ""  # the address of the page
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, path: Path | str, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Show a file, or the page at an address, and wait until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.problems, self.loaded = [], False
        self.home = path if isinstance(path, str) else Path(path).resolve().as_uri()
        self.call("Page.navigate", url=self.home)
        while not self.loaded:
            self._handle(self._receive())

    def evaluate(self, expression: str):
        """The value of a JavaScript expression; a promise is awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = TIMEOUT):
        """The value of a JavaScript expression, as soon as it is true."""
        until = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < until, f"{expression} stayed {value!r}"
            time.sleep(0.1)
        return value

    def press(self, key: str) -> None:
        """A key as a person would press it: "Tab", "Enter" or " "."""
        codes = {
            "Tab": (9, ""),
            "Enter": (13, "\r"),
            " ": (32, " "),
            "ArrowDown": (40, ""),
            "ArrowLeft": (37, ""),
            "ArrowRight": (39, ""),
        }
        code, text = codes[key]
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **more)

    def call(self, method: str, **parameters) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.send_end, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.number:
            self._handle(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self.send_end, b'{"id": 0, "method": "Browser.close"}\0')
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.send_end)
        os.close(self.receive_end)

    def _receive(self) -> dict:
        until = time.monotonic() + TIMEOUT
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.receive_end], [], [], max(0, until - time.monotonic()))
            piece = os.read(self.receive_end, 1 << 16) if ready else b""
            if not piece:
                raise TimeoutError(f"Chromium ({find()}) gave no answer; its exit status is {self.process.poll()}")
            self.buffer += piece
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def _handle(self, event: dict) -> None:
        method, told = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Runtime.exceptionThrown":
            self.problems.append(told["exceptionDetails"])
        elif method == "Runtime.consoleAPICalled" or (
            method == "Log.entryAdded" and told["entry"]["level"] != "verbose"
        ):
            self.problems.append(told.get("entry") or told)
        elif method == "Network.loadingFailed" and not told.get("canceled"):
            self.problems.append(told)
        elif method == "Network.requestWillBeSent":
            url = told["request"]["url"]
            if url.startswith("http") and not url.startswith(self.home):
                self.problems.append(url)
