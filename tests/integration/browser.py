"""A headless Chromium, driven over a pipe by its DevTools protocol.

The protocol is lines of JSON that end in a zero byte, so the standard library
is all that it takes.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = [
    "--headless",
    "--no-sandbox",  # root has none in a container; the page is our own
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-pipe",
]
# The browser reads from descriptor 3 and writes to 4.
START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4)"
    "; os.execvp(sys.argv[3], sys.argv[3:])"
)


def find_chromium():
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab.

    Arguments
    ---------
    profile : pathlib.Path
        An empty folder for the browser's files.
    """

    def __init__(self, profile):
        to_read, self.to = map(_high, os.pipe())
        self.back, from_write = map(_high, os.pipe())
        command = [sys.executable, "-c", START, str(to_read), str(from_write)]
        command += [find_chromium(), *OPTIONS, f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            command,
            pass_fds=(to_read, from_write),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(from_write)
        self.number, self.rest, self.session = 0, b"", {}
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")
        attached = self.call("Target.attachToTarget", flatten=True, **target)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """Calls a method of the protocol and returns its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message = json.dumps({**message, **self.session}).encode() + b"\0"
        while message:
            message = message[os.write(self.to, message) :]
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def read(self, seconds=60):
        """The next message."""
        end = time.monotonic() + seconds
        while b"\0" not in self.rest:
            left = max(end - time.monotonic(), 0)
            if not select.select([self.back], [], [], left)[0]:
                raise TimeoutError("Chromium does not answer")
            data = os.read(self.back, 1 << 20)
            if not data:
                raise RuntimeError("Chromium has ended")
            self.rest += data
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, url, width, height=900):
        """Opens an address in a window of that many CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not self.seen("Page.loadEventFired"):
            self.events.append(self.read())

    def seen(self, *methods):
        """The events of these kinds since the page was opened."""
        return [e["params"] for e in self.events if e.get("method") in methods]

    def complaints(self):
        """What the console says, errors and warnings of any source."""
        self.evaluate("0")  # what was said before has then arrived
        return self.seen(
            "Runtime.consoleAPICalled",
            "Runtime.exceptionThrown",
            "Log.entryAdded",
        )

    def addresses(self):
        """All that the page has asked for."""
        return [
            event["request"]["url"]
            for event in self.seen("Network.requestWillBeSent")
        ]

    def evaluate(self, expression):
        """The value of a JavaScript expression."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True
        )
        return answer["result"].get("value")

    def screenshot(self, path):
        """Writes a PNG of the whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        """Ends the browser."""
        os.close(self.to)
        os.close(self.back)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _high(descriptor):
    """Moves a descriptor clear of the numbers that the browser uses."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved
