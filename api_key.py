# api_key.py
import os
import secrets

from starlette.responses import JSONResponse


def require_key() -> list[str]:
    """The value for `middleware`. Raises RuntimeError where it would be ignored, ValueError without a key."""
    if os.environ.get("RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING") != "1":
        raise RuntimeError("Nothing would check the key without RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING=1.")
    RequireKey(app=None)
    return ["api_key.RequireKey"]


class RequireKey:
    """ASGI middleware that asks for `Authorization: Bearer <API_KEY>`, and answers 401 without (RFC 6750).

    A websocket gets 403. A preflight passes to vLLM's CORSMiddleware, since browsers send no key with it.
    """

    def __init__(self, app):
        self.app, self.key = app, os.environ.get("API_KEY", "").strip().encode()
        if not self.key:
            raise ValueError("API_KEY is empty. Export it on each node before Ray starts.")

    async def __call__(self, scope, receive, send):
        headers = scope.get("headers", [])
        sent = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = sent[0].partition(b" ") if len(sent) == 1 else (b"", b"", b"")
        has_key = scheme.lower() == b"bearer" and secrets.compare_digest(key.strip(), self.key)
        of_preflight = {b"origin", b"access-control-request-method"}
        is_preflight = scope.get("method") == "OPTIONS" and of_preflight <= {name for name, _ in headers}
        if scope["type"] == "lifespan" or has_key or is_preflight:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = {"error": {"message": "Wrong or missing API key", "code": 401}}
            await JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
