"""A page in a real browser: Chromium without a window, spoken to by its DevTools protocol over two pipes."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def program() -> str | None:
    """The browser of this machine; `CHROMIUM` names another one."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Seen:
    """What happened when a page was opened."""

    requests: list[str] = field(default_factory=list)  # addresses, but for the page itself
    complaints: list[str] = field(default_factory=list)  # of the console, and exceptions
    width: int = 0  # of the content, in pixels
    facts: Any = None  # what the expression gave
    screenshot: bytes = b""


def look(page: Path, width: int, height: int = 844, expression: str = "null", scale: float = 1.0) -> Seen:
    """Open a file in a window of so many pixels and look at all of it."""
    to_browser, our_orders = os.pipe()
    our_news, from_browser = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        quiet = ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
        # The protocol is spoken over file descriptors 3 and 4; the shell moves ours there.
        line = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        process = subprocess.Popen(
            ["bash", "-c", line, str(program()), *options, *quiet],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            with os.fdopen(our_orders, "wb", buffering=0) as orders, os.fdopen(our_news, "rb") as news:
                return _Talk(orders, news).look(page, width, height, expression, scale)
        finally:
            process.terminate()
            process.wait()


class _Talk:
    """Orders and answers; events are kept as they come."""

    def __init__(self, orders: Any, news: Any) -> None:
        self.orders, self.news = orders, news
        self.count, self.session = 0, ""
        self.events: list[dict[str, Any]] = []

    def look(self, page: Path, width: int, height: int, expression: str, scale: float) -> Seen:
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **metrics)
        self.ask("Page.navigate", url=page.absolute().as_uri())
        self.until(lambda event: event["method"] == "Page.loadEventFired")
        seen = Seen()
        seen.width = self.evaluate("document.documentElement.scrollWidth")
        seen.facts = self.evaluate(expression)
        clip = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        picture = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip | {"scale": 1})
        seen.screenshot = base64.b64decode(picture["data"])
        seen.requests = [url for url in self.requested() if url != page.absolute().as_uri()]
        seen.complaints = [
            json.dumps(event["params"])
            for event in self.events
            if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        ]
        return seen

    def requested(self) -> list[str]:
        """Addresses that the page asked for; a page's own pictures are no requests to anywhere."""
        sent = [event["params"]["request"]["url"] for event in self.events if event["method"].endswith("WillBeSent")]
        return [url for url in sent if not url.startswith("data:")]

    def evaluate(self, expression: str) -> Any:
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        order = {"id": self.count, "method": method, "params": params}
        if self.session:
            order["sessionId"] = self.session
        self.orders.write(json.dumps(order).encode() + b"\0")
        answer = self.until(lambda message: message.get("id") == self.count)
        assert "error" not in answer, answer
        return answer["result"]

    def until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while True:
            message = self.read()
            if "method" in message:
                self.events.append(message)
            if ("method" in message or "id" in message) and wanted({"method": "", **message}):
                return message

    def read(self) -> dict[str, Any]:
        collected = bytearray()
        while (byte := self.news.read(1)) != b"\0":
            assert byte, "the browser ended"
            collected += byte
        return json.loads(collected)
