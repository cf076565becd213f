"""The page on a port, with nothing that could reach beyond it."""

from __future__ import annotations

import logging
import socket
import threading
import webbrowser
from typing import Any

import fastapi
import gradio as gr
import uvicorn
from gradio import themes

from jaxear.errors import UserError
from jaxear.explore.page import CSS, build
from jaxear.explore.session import MAX_BYTES, Explorer

logger = logging.getLogger(__name__)

# What Gradio's frontend needs, and no other address: the browser itself then keeps the page from
# asking for anything elsewhere (Content Security Policy, level 3).
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "form-action 'self'; frame-ancestors 'self'; base-uri 'self'"
)

# Gradio applies a style sheet to what lies inside its main element; this is about the element.
_HEAD = """<style>
@media (max-width: 640px) { .gradio-container .main.main { padding: 0.3rem !important; } }
</style>"""

_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # the reader's own


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on an address; port 0 takes a free one.

    Raises:
        UserError: the port is in use, or the address is none of this computer's.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port must be from 0 to 65535, not {port}.")
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"Cannot listen on {host}, port {port}: {error}.") from error
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UserError(
            f"Cannot listen on {host}, port {port}: {error.strerror}. Give another --port (0 takes "
            "a free one) or --host."
        ) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """Where a browser on this computer finds the page."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def create_app(explorer: Explorer) -> fastapi.FastAPI:
    """The web application around the page."""
    theme = themes.Base(
        primary_hue="stone", neutral_hue="stone", font=_FONT, font_mono=("monospace",),
        radius_size=themes.sizes.radius_md, spacing_size=themes.sizes.spacing_sm,
    )  # fmt: skip
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def keep_local(request: fastapi.Request, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    return gr.mount_gradio_app(
        app, build(explorer), path="/", theme=theme, css_paths=CSS, head=_HEAD,
        max_file_size=MAX_BYTES, ssr_mode=False, pwa=False, mcp_server=False,
        enable_monitoring=False,
    )  # fmt: skip


def create_server(explorer: Explorer) -> uvicorn.Server:
    """The server of the page; `run(sockets=[bind(...)])` runs it."""
    return uvicorn.Server(
        uvicorn.Config(create_app(explorer), log_level="warning", timeout_graceful_shutdown=1)
    )


def serve(explorer: Explorer, bound: socket.socket, *, open_browser: bool = True) -> None:
    """Serve the page until it is interrupted."""
    server = create_server(explorer)
    address = address_of(bound)
    logger.info("Open %s in a browser; Ctrl-C ends it.", address)
    if open_browser:
        webbrowser.open(address)  # it waits in the socket's queue until the server takes it
    # In a thread, so that Ctrl-C reaches this one: uvicorn would end with a traceback in the log.
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        server.should_exit = True
        thread.join(timeout=5)
