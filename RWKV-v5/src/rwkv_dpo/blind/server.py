"""The page on which people vote, served to this machine alone.

    GET  /             the page
    GET  /api/view     what Ballot.view says
    POST /api/vote     {"number": 3, "choice": "A"}; 409 for a page that is behind
    POST /api/undo     {}
    POST /api/end      {}

All of /api answers with the view that follows, and asks for the token that the page was given. A site that another tab shows can't read
the page, whose origin is another, nor have its name stand for this machine (DNS rebinding): only local names are answered.
"""

import asyncio
import contextlib
import errno
import os
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from aiohttp import web

from rwkv_dpo.base.errors import InputError
from rwkv_dpo.blind.ballot import Ballot
from rwkv_dpo.files.json_text import as_json

HOST = "127.0.0.1"
TOKEN_HEADER = "X-Blindtest-Token"
_LOCAL = (HOST, "localhost")
_PAGE = Path(__file__).with_name("page.html")
_LARGEST_REQUEST = 4096
# For answers that are on their way when the server stops.
_PATIENCE_S = 5.0
_HEADERS = {
    "Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
                               "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}  # fmt: skip
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def listen(port: int) -> socket.socket:
    """The port of this machine, taken and not yet answered; 0: any free one. InputError when it can't be had."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if os.name == "posix":
        # Elsewhere that would share a port that is taken; here it takes one that was in use a moment ago.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        # Another may be bound to the port as well, until one of them listens.
        listener.listen()
    except OSError as error:
        listener.close()
        is_taken = error.errno == errno.EADDRINUSE
        raise InputError(
            f"--port {port}: {'another program has it' if is_taken else error.strerror}; --port 0 takes any free one"
        ) from error
    return listener


class Site:
    """The page of a ballot. `ended`: set when the result is asked for."""

    def __init__(self, ballot: Ballot) -> None:
        self.ballot, self.ended = ballot, threading.Event()
        self.token, self._nonce = secrets.token_urlsafe(16), secrets.token_urlsafe(16)
        self.app = web.Application(middlewares=[self._guard], client_max_size=_LARGEST_REQUEST)
        self.app.on_response_prepare.append(self._add_headers)
        self.app.add_routes([
            web.get("/", self._page), web.get("/api/view", self._view), web.post("/api/vote", self._vote),
            web.post("/api/undo", self._undo), web.post("/api/end", self._end),
        ])  # fmt: skip

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        if request.host.rpartition(":")[0] not in _LOCAL and request.host not in _LOCAL:
            raise web.HTTPForbidden(text="this page is for this machine alone")
        if request.path.startswith("/api/"):
            given = request.headers.get(TOKEN_HEADER, "")
            if not secrets.compare_digest(given.encode(), self.token.encode()):
                raise web.HTTPForbidden(text="not asked by the page: load it again")
            if request.method == "POST" and request.content_type != "application/json":
                raise web.HTTPUnsupportedMediaType(text="application/json is accepted")
        try:
            return await handler(request)
        except InputError as error:
            return self._answer({"error": str(error)}, 500)

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update({name: value.format(nonce=self._nonce) for name, value in _HEADERS.items()})

    async def _page(self, request: web.Request) -> web.Response:
        page = _PAGE.read_text("utf-8").replace("{nonce}", self._nonce).replace("{token}", self.token)
        return web.Response(text=page, content_type="text/html")

    async def _view(self, request: web.Request) -> web.Response:
        return self._answer(self.ballot.view())

    async def _vote(self, request: web.Request) -> web.Response:
        try:
            given = await request.json()
        except (ValueError, RecursionError):
            given = None
        is_counted = isinstance(given, dict) and self.ballot.vote(given.get("number"), given.get("choice"))
        return self._answer(self.ballot.view(), 200 if is_counted else 409)

    async def _undo(self, request: web.Request) -> web.Response:
        is_undone = self.ballot.undo()
        return self._answer(self.ballot.view(), 200 if is_undone else 409)

    async def _end(self, request: web.Request) -> web.Response:
        self.ballot.end()
        # The server stops from now on, but not before it has sent what it is asked for.
        self.ended.set()
        return self._answer(self.ballot.view())

    def _answer(self, value: object, status: int = 200) -> web.Response:
        return web.Response(text=as_json(value, ensure_ascii=False), status=status, content_type="application/json")


@contextlib.contextmanager
def serving(site: Site, listener: socket.socket) -> Iterator[str]:
    """Answers from a thread of its own, so that a signal finds the main thread; yields the address."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(site.app, access_log=None, shutdown_timeout=_PATIENCE_S)
    thread = threading.Thread(target=loop.run_forever, name="server", daemon=True)
    thread.start()

    async def start() -> None:
        await runner.setup()
        await web.SockSite(runner, listener).start()

    try:
        asyncio.run_coroutine_threadsafe(start(), loop).result()
        yield f"http://{HOST}:{listener.getsockname()[1]}/"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
