"""A headless Chromium, driven by the DevTools protocol (https://chromedevtools.github.io/devtools-protocol)."""

import asyncio
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_PATIENCE_S = 60


class Tab:
    """`complaints`: exceptions of scripts and what the browser logs, a breach of the page's policy for one."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._n = socket, 0
        self.complaints: list[dict[str, Any]] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._n += 1
        await self._socket.send_json({"id": self._n, "method": method, "params": parameters})
        while (told := await self._socket.receive_json()).get("id") != self._n:
            if told.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(told["params"])
        assert "error" not in told, told
        return told["result"]

    async def value(self, script: str) -> Any:
        return (await self.call("Runtime.evaluate", expression=script, returnByValue=True))["result"].get("value")

    async def until(self, script: str) -> None:
        """For something that the page does by itself."""
        end = time.monotonic() + _PATIENCE_S
        while not await self.value(script):
            assert time.monotonic() < end, (script, await self.value("document.body.innerText"), self.complaints)
            await asyncio.sleep(0.01)

    async def press(self, key: str, is_repeat: bool = False, modifiers: int = 0) -> None:
        text = {"Enter": "\r", "Tab": ""}.get(key, key if len(key) == 1 else "")
        code = {"Enter": 13, "Tab": 9, " ": 32}.get(key, 0)
        more = {"key": key, "modifiers": modifiers, "windowsVirtualKeyCode": code, **({"text": text} if text and not modifiers else {})}
        await self.call("Input.dispatchKeyEvent", type="keyDown", autoRepeat=is_repeat, **more)
        if not is_repeat:
            await self.call("Input.dispatchKeyEvent", type="keyUp", key=key, modifiers=modifiers, windowsVirtualKeyCode=code)


@contextlib.asynccontextmanager
async def opened(address: str, folder: Path, width: int, height: int = 800) -> AsyncIterator[Tab]:
    """A tab of a browser of its own that shows that address. folder: where the browser keeps what it does."""
    assert CHROMIUM
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
    process = subprocess.Popen([*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        async with aiohttp.ClientSession() as session, session.ws_connect(await _tab(session, process, folder)) as socket:
            tab = Tab(socket)
            for domain in ("Runtime", "Log", "Page"):
                await tab.call(f"{domain}.enable")
            await tab.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
            await tab.call("Page.navigate", url=address)
            yield tab
    finally:
        process.kill()
        process.wait()


async def _tab(session: aiohttp.ClientSession, process: subprocess.Popen[bytes], folder: Path) -> str:
    """The address of the first tab's protocol, once there is one."""
    end = time.monotonic() + _PATIENCE_S
    while True:
        assert process.poll() is None
        assert time.monotonic() < end
        await asyncio.sleep(0.05)
        with contextlib.suppress(FileNotFoundError, StopIteration, aiohttp.ClientError):
            port = (folder / "DevToolsActivePort").read_text().split("\n")[0]
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                return next(tab for tab in json.loads(await answer.text()) if tab["type"] == "page")["webSocketDebuggerUrl"]
