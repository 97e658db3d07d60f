"""A NuGet V3 feed on loopback whose every answer a test can replace."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

from aiohttp import web


@dataclass
class Server:
    """A V3 feed whose every answer a test can replace. `asked` lists the requests as (path, headers)."""

    port: int = 0
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    answers: dict[str, object] = field(default_factory=dict)

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def index(self) -> str:
        return f"{self.base}/v3/index.json"

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def serve(self, path, answer):
        """`answer` is a JSON value, or a function of the request."""
        self.answers[path] = answer

    def serve_index(self, **ids):
        resources = [{"@id": ids.get("flat", f"{self.base}/flat/"), "@type": "PackageBaseAddress/3.0.0"}]
        if "registration" in ids:
            resources.append({"@id": ids["registration"], "@type": ["Other", "RegistrationsBaseUrl/3.6.0"]})
        self.serve("/v3/index.json", {"version": "3.0.0", "resources": resources, "@context": {}})

    def serve_registration(self, **entry):
        """A page that is given by its address, and a leaf among others whose version no client can read."""
        self.serve_index(registration=f"{self.base}/reg")
        pages = [
            {"@id": f"{self.base}/reg/old.json", "lower": "0.1.0", "upper": "0.9.0", "count": 1},
            {"@id": f"{self.base}/reg/page.json", "lower": "1.0.0", "upper": "1.0.1", "count": 2},
        ]
        leaves = [
            {"catalogEntry": {"@id": "", "version": "1.0.0-01"}},
            {"catalogEntry": {"version": "1.0.1-rc.1+meta", **entry}},
        ]
        self.serve("/reg/shop.web/index.json", {"count": 2, "items": pages})
        self.serve("/reg/page.json", {"items": leaves})

    async def handle(self, request):
        self.asked.append((request.path, dict(request.headers)))
        answer = self.answers.get(request.path)
        if answer is None:
            return web.Response(status=404)
        return await answer(request) if callable(answer) else web.json_response(answer)


@contextlib.asynccontextmanager
async def running_feed(ssl_context=None):
    """A feed with nothing but its service index."""
    server = Server()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=ssl_context)
    await site.start()
    server.port = runner.addresses[0][1]
    server.serve_index()
    try:
        yield server
    finally:
        await runner.cleanup()


def body(data, *, status=200, **headers):
    async def answer(request):
        return web.Response(body=data, status=status, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return answer


def redirect(location, status=302):
    return body(b"", status=status, Location=location)


def cut(data, at, *, chunked=False):
    """A body that ends in the middle, with its connection."""

    async def answer(request):
        response = web.StreamResponse()
        if not chunked:
            response.content_length = len(data)
        await response.prepare(request)
        await response.write(data[:at])
        request.transport.close()
        return response

    return answer


async def drop(request):
    """The connection is reset before a byte of the answer."""
    request.transport.abort()
    return web.Response()


def at_first(*answers, then):
    """The first requests get `answers`, every later one `then`: an answer, or a JSON value."""
    left = list(answers)

    async def answer(request):
        if left:
            return await left.pop(0)(request)
        return await then(request) if callable(then) else web.json_response(then)

    return answer
