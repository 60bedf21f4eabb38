"""Show a run while it trains: a page on this machine with progress, curves and scores, always up to date."""

import argparse
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

from delo_llava.commands.base import Command, at_least, say
from delo_llava.errors import DeloError
from delo_llava.files import user_path

#: Only this machine may ask, under its own names: a page of the net that resolves to it is refused.
HERE = ("127.0.0.1", "localhost", "[::1]")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, and where the page is."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """Example: delo-llava watch runs/x
For a run on another machine: ssh -L 8800:localhost:8800 HOST delo-llava watch runs/x"""
    add = parser.add_argument
    add("run", type=user_path, help="folder of the run")
    add("--port", type=int, default=8800, help="0 takes any that is free (default: %(default)s)")
    add("--every", type=at_least(1), default=5, metavar="SECONDS", help="(default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C.

    Raises:
        DeloError: no run in this folder, or a port that cannot be had.
    """
    page(options.run, options.every)  # a mistake is told before anything is served
    try:
        server = ThreadingHTTPServer(("127.0.0.1", options.port), partial(_Handler, options))
    except (OSError, OverflowError) as error:
        raise DeloError(
            f"This port cannot be had: {error}",
            given=f"--port {options.port}",
            fix="--port 0 takes a free one",
        ) from error
    with server:
        say(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C ends it)\n")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


def page(folder: Path, every: int) -> str:
    """The page; the library knows the harness by name only."""
    found: str = import_module("delo_eval.report.live").live_page(folder, every)
    return found


class _Handler(BaseHTTPRequestHandler):
    """Answers one request: the page, or why there is none."""

    def __init__(self, options: argparse.Namespace, *given: object) -> None:
        self.options = options
        super().__init__(*given)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """The page at `/`, nothing else."""
        if (self.headers.get("Host") or "").rpartition(":")[0] not in HERE:
            self.send_error(403, "only this machine may ask")
            return
        if self.path != "/":
            self.send_error(404)
            return
        try:
            body = page(self.options.run, self.options.every).encode()
        except (DeloError, OSError, ValueError, KeyError) as error:  # a file that is being written
            self.send_error(503, "the run cannot be read now", str(error))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are of no interest."""


COMMAND = Command(arguments, run)
