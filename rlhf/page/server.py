"""Serve the page: one HTML file, its state as JSON, and the videos, by Python's own HTTP server.

It fetches nothing from elsewhere, and the browser may not either (`POLICY`). At the default address
it is reached from this machine alone.
"""

import argparse
import json
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

PAGE = Path(__file__).with_name("page.html")
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "media-src blob:; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LOOPBACK = ("127.0.0.1", "localhost")
MAX_BODY = 2**20  # bytes of a request


class App(Protocol):
    """Content and actions of a page. Methods raise ValueError for what the user can mend."""

    actions: dict[str, Callable[[dict], None]]  # by the last part of the address

    def state(self) -> dict[str, Any]:
        """Return all that the page shows. Before a vote it does not tell the sides of a pair."""

    def video(self, key: str, side: str) -> Path | None:
        """Return the file on a side of a pair that is shown; None without one."""


def add_address_flags(parser: argparse.ArgumentParser) -> None:
    """Add --host and --port."""
    parser.add_argument("--host", default=LOOPBACK[0], help="address of the page (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port of the page; 0: a free one (default: %(default)s)")


def bind(host: str, port: int) -> ThreadingHTTPServer:
    """Return a server at an address, before the work of making its page; `serve` starts it.

    Raises ValueError if the address cannot be bound.
    """
    try:
        return ThreadingHTTPServer((host, port), _Handler)
    except (OSError, OverflowError) as error:
        got = f"--host {host} --port {port}: got {error}"
        raise ValueError(f"{got}, expected an address of this machine and a free port; choose another") from error


def serve(server: ThreadingHTTPServer, app: App) -> None:
    """Serve the page until Ctrl-C, and print its address."""
    server.app = app
    host, port = server.server_address[:2]
    with server:
        if host not in LOOPBACK:
            print(f"Anyone who can reach {host} can use this page; there is no password.")
        print(f"The page is at http://{host}:{port}; Ctrl-C ends it.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


class _Handler(BaseHTTPRequestHandler):
    """Answer one request."""

    @property
    def app(self) -> App:
        """The page."""
        return self.server.app

    def do_GET(self) -> None:
        """Send the page, its state or a video."""
        match self.path.split("?")[0].strip("/").split("/"):
            case _ if not self._is_called_here():
                self._fail(HTTPStatus.FORBIDDEN, "got another name of this machine, expected the printed address")
            case [""]:
                self._send(PAGE.read_bytes(), "text/html; charset=utf-8")
            case ["state"]:
                self._send_state()
            case ["video", key, side] if path := self.app.video(key, side):
                self._send(path.read_bytes(), "video/mp4")
            case _:
                self._fail(HTTPStatus.NOT_FOUND, f"{self.path}: got nothing there, expected a part of the page")

    def do_POST(self) -> None:
        """Do what was asked for, then send the state."""
        action = self.app.actions.get(self.path.strip("/"))
        # A form of another site can send neither this type nor, without leave, an Origin of ours.
        is_ours = self.headers.get("Content-Type") == "application/json" and self._is_called_here()
        if action is None or not is_ours:
            status = HTTPStatus.FORBIDDEN if action else HTTPStatus.NOT_FOUND
            return self._fail(status, f"{self.path}: got a request that is not of this page; load it again")
        try:
            size = min(int(self.headers.get("Content-Length", 0)), MAX_BODY)
            body = json.loads(self.rfile.read(size))
            if not isinstance(body, dict):
                raise ValueError(f"got {type(body).__name__}, expected an object")
            action(body)
        except ValueError as error:
            return self._fail(HTTPStatus.BAD_REQUEST, "; ".join(getattr(error, "problems", [str(error)])))
        self._send_state()

    def _is_called_here(self) -> bool:
        """Return whether the browser has this server's address, not a name that points to it."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        is_local = host.split(":")[0] in LOOPBACK or self.server.server_address[0] not in LOOPBACK
        return is_local and origin in (None, f"http://{host}")

    def _send_state(self) -> None:
        """Send the page's state as JSON."""
        self._send(json.dumps(self.app.state()).encode(), "application/json")

    def _fail(self, status: HTTPStatus, message: str) -> None:
        """Send a JSON object with the error."""
        self._send(json.dumps({"error": message}).encode(), "application/json", status)

    def _send(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        """Send a response with headers that forbid caching and foreign content."""
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Print nothing: the page asks for its state twice a second."""
