"""Who may see a page and what a page may do: a token, the names of this machine, no other host's scripts or requests."""

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ftcore.ui import LOOPBACK

MOST = 2_000_000  # bytes of a request
HEADERS = {
    "Content-Security-Policy": "default-src 'self'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Middleware that lets through what comes from our own page in a browser that was given the token."""

    def __init__(self, app: ASGIApp, token: str, cookie: str) -> None:
        self.app, self.token, self.cookie = app, token, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, refuse, or take the token of the address for a cookie."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await (self._answer(scope) or self.app)(scope, receive, guarded)

    def _answer(self, scope: Scope) -> Response | None:
        """What to answer instead of the page."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if urlsplit(f"//{host}").hostname not in LOOPBACK:
            return PlainTextResponse("This page answers to localhost alone.", 403)
        if (origin := headers.get("origin")) and origin != f"http://{host}":
            return PlainTextResponse("A request of another page is refused.", 403)
        if scope["method"] not in ("GET", "HEAD"):
            if not origin and headers.get("sec-fetch-site") != "same-origin":
                return PlainTextResponse("A request that does not say which page it comes from is refused.", 403)
            if not headers.get("content-length", "").isdigit():
                return PlainTextResponse("A request must say how long it is.", 411)
            if int(headers["content-length"]) > MOST:
                return PlainTextResponse(f"A request may have {MOST:,} bytes.", 413)
        given = QueryParams(scope["query_string"]).get("token")
        if given is not None and hmac.compare_digest(given.encode(), self.token.encode()):
            response = RedirectResponse(
                scope["path"] if scope["path"].startswith("/") and scope["path"][1:2] != "/" else "/", 303
            )
            response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
            return response
        if not hmac.compare_digest(
            cookie_parser(headers.get("cookie", "")).get(self.cookie, "").encode(), self.token.encode()
        ):
            return PlainTextResponse(
                "Open the address that `python -m ftcore ui` printed: it holds the key to this page.", 403
            )
        if any(part in ("..", ".") for part in scope["path"].split("/")) or "\0" in scope["path"]:
            return PlainTextResponse("There is no such page.", 404)
        return None
