# api_key.py
import os
import secrets

from starlette.responses import JSONResponse


class RequireKey:
    """ASGI middleware that answers 401 to a request without `Authorization: Bearer <API_KEY>`."""

    def __init__(self, app):
        self.app = app
        self.expected = f"Bearer {os.environ['API_KEY']}".encode()

    async def __call__(self, scope, receive, send):
        sent = dict(scope.get("headers", [])).get(b"authorization", b"")
        if scope["type"] != "lifespan" and not secrets.compare_digest(sent, self.expected):
            refusal = JSONResponse({"error": {"message": "Wrong or missing API key", "code": 401}}, status_code=401)
            return await refusal(scope, receive, send)
        await self.app(scope, receive, send)
