"""Headless Chromium, driven by the DevTools protocol through a pipe: it takes no package and no port."""

import json
import os
import select
import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 120  # that an answer may take
LOCAL = ("file:", "data:")
PROBLEMS = ("Runtime.exceptionThrown", "Network.loadingFailed", "Log.entryAdded")


class Browser:
    """One tab. ``problems`` are errors of scripts, requests that failed and those that left the disk."""

    def __init__(self, folder: Path):
        read, self._commands = os.pipe()
        self._messages, write = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={folder}"]
        shell = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash", str(CHROMIUM), *flags]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(shell, pass_fds=(read, write), **quiet)
        os.close(read)
        os.close(write)
        self._rest, self._count, self._session, self.problems = b"", 0, {}, []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def open(self, url: str, width: int = 1280, dark: bool = False) -> None:
        """Load a page, and wait for all that it loads."""
        self.problems.clear()
        is_phone = width < 600
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=is_phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Page.navigate", url=url)
        while self._message().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str):
        """The value of an expression of JavaScript, of a promise what it resolves to."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def close(self) -> None:
        self._session = {}
        self._call("Browser.close")
        self._process.wait(SECONDS)
        os.close(self._commands)
        os.close(self._messages)

    def _call(self, method: str, **params):
        self._count += 1
        message = {"id": self._count, "method": method, "params": params} | self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._count:
            pass
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _message(self):
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._messages], [], [], SECONDS)
            received = os.read(self._messages, 1 << 16) if ready else b""
            assert received, "Chromium does not answer"
            self._rest += received
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, event, params) -> None:
        is_written = event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert")
        has_left = event == "Network.requestWillBeSent" and not params["request"]["url"].startswith(LOCAL)
        if event in PROBLEMS or is_written or has_left:
            self.problems.append((event, params))
