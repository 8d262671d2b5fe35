"""A webhook on this machine that remembers what it was told."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Hook:
    """What came to the webhook."""

    url: str  #: ends with a slash; below /moved it answers with a redirection
    posted: list[dict[str, Any]] = field(default_factory=list)  #: bodies
    paths: list[str] = field(default_factory=list)  #: of all requests, those by GET too


@contextmanager
def webhook() -> Iterator[Hook]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json"
            hook.paths.append(self.path)
            hook.posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(302 if self.path.startswith("/moved") else 204)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def do_GET(self) -> None:
            hook.paths.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as serving:
        hook = Hook(url=f"http://127.0.0.1:{serving.server_port}/")
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hook
        finally:
            serving.shutdown()
            thread.join()
