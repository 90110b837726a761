"""What holds for each request and answer, whoever asks: headers, and no requests of other sites."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# No inline script or style, and nothing from outside. A page can't be framed.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    # With no-referrer, a browser would not say where a form comes from.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_STATIC = "/static/"
_READING = ("GET", "HEAD")


class Protection:
    """ASGI middleware that sets the headers, and refuses what another site's page sends."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                # What a role may see is kept nowhere, so that the next role doesn't find it.
                if not scope["path"].startswith(_STATIC):
                    headers["Cache-Control"] = "no-store"
            await send(message)

        if _is_foreign(Headers(scope=scope), scope["method"], scope["scheme"]):
            refusal = PlainTextResponse("This request comes from another site.\n", 403)
            await refusal(scope, receive, guarded)
            return
        await self.app(scope, receive, guarded)


def _is_foreign(headers: Headers, method: str, scheme: str) -> bool:
    site, mode = headers.get("sec-fetch-site"), headers.get("sec-fetch-mode")
    # A link elsewhere may lead here. Nothing else there may ask for anything.
    if site not in (None, "same-origin", "none") and not (
        method in _READING and mode == "navigate"
    ):
        return True
    origin = headers.get("origin")
    return origin is not None and origin != f"{scheme}://{headers.get('host', '')}"
