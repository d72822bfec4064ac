"""Headless Chromium by its DevTools protocol over a pipe: JSON, a zero byte after each message."""

import contextlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 60  # seconds until a browser that does not answer is ended
KEYS = {"ArrowLeft": 37, "ArrowRight": 39}


class Page:
    """One tab; `errors` has those of its console and what was thrown."""

    def __init__(self, send: int, receive: int):
        self.send, self.receive = send, receive
        self.count, self.session, self.unread, self.errors = 0, None, b"", []

    def call(self, method: str, **params) -> dict:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.send, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.count:
            said = answer.get("params", {})
            logged = "error" in (said.get("entry", {}).get("level"), said.get("type"))
            if logged or answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(said)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def read(self) -> dict:
        while b"\0" not in self.unread:
            if not (more := os.read(self.receive, 2**16)):
                raise RuntimeError("the browser has ended")
            self.unread += more
        message, self.unread = self.unread.split(b"\0", 1)
        return json.loads(message)

    def open(self, path: Path, fragment: str = "", width: int = 900, dark: bool = False) -> None:
        self.session, self.errors = None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.as_uri() + fragment)
        self.run("new Promise(done => document.readyState === 'complete' ? done() : (window.onload = done))")
        self.settle()

    def settle(self) -> None:
        """Wait until what was asked for has been drawn."""
        self.run("new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn)))")

    def run(self, script: str):
        """-> the script's value, awaited."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        given = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", **given)
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)
        self.settle()

    def drag(self, x: float, y: float, by: float) -> None:
        for kind, at in (("mousePressed", x), ("mouseMoved", x + by), ("mouseReleased", x + by)):
            held = {"button": "left", "buttons": 1, "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=at, y=y, **held)
        self.settle()


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    (its_in, send), (receive, its_out) = os.pipe(), os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command = [CHROMIUM, *options, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{its_in} 4>&{its_out}', "bash", *command],  # it reads 3, writes 4
        pass_fds=(its_in, its_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(its_in), os.close(its_out)
    watchdog = threading.Timer(PATIENCE, process.kill)
    watchdog.start()
    try:
        yield Page(send, receive)
    finally:
        watchdog.cancel()
        process.terminate()
        process.wait()
        os.close(send), os.close(receive)
