"""Serve the page: on one address, without telemetry, and without any request to another host."""

from __future__ import annotations

import socket
from typing import Any

import gradio as gr
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainer.demo_page.limits import MOST_BODY_BYTES, Limits
from trainer.demo_page.markup import STYLE

_SESSIONS = 100  # whose state is kept at the same time
# gradio compiles its templates in the browser, which needs unsafe-eval.
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'"
)
_FONT = ["system-ui", "sans-serif"]
_MONO_FONT = ["ui-monospace", "monospace"]


class OwnHostOnly:
    """Add a content security policy that forbids the browser every request to another host."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"content-security-policy", _POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, with_policy)


class BoundedBodies:
    """Refuse large requests before they are read; gradio itself bounds uploaded files."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        refusal = _refusal(scope) if scope["type"] == "http" else None
        await (self._app(scope, receive, send) if refusal is None else refusal(scope, receive, send))


def _refusal(scope: Scope) -> PlainTextResponse | None:
    """Return the answer to a request whose body is too large or of unknown size; None takes the request."""
    if scope["method"] not in ("POST", "PUT", "PATCH") or scope["path"].rstrip("/").endswith("/upload"):
        return None
    length = Headers(scope=scope).get("content-length", "")
    if not length.isdecimal():
        return PlainTextResponse("the request does not say its size (Content-Length)", 411)
    if int(length) > MOST_BODY_BYTES:
        return PlainTextResponse(f"the request has {length} bytes; at most {MOST_BODY_BYTES} are taken", 413)
    return None


def check_address(host: str, port: int) -> None:
    """Check that the address is free, before the model is loaded.

    Raises:
        ValueError: Something else uses the port, or this machine does not have the address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"--host {host} --port {port} cannot be used: {error}. Choose another port, or 127.0.0.1 for this "
                "machine alone"
            ) from error


def start(page: gr.Blocks, host: str, port: int, limits: Limits) -> str:
    """Start to serve the page in threads, and return its address.

    Args:
        page: Page.
        host: Address of this machine.
        port: TCP port.
        limits: Limits of the page.

    Raises:
        OSError: The address cannot be used.
    """
    settings: dict[str, Any] = {
        "theme": gr.themes.Default(font=_FONT, font_mono=_MONO_FONT),
        "css": STYLE,
        "footer_links": [],
        "app_kwargs": {"middleware": [Middleware(OwnHostOnly), Middleware(BoundedBodies)]},
    }
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        max_file_size=round(limits.upload_mib * 2**20),
        state_session_capacity=_SESSIONS,
        **settings,
    )
    return str(address)
