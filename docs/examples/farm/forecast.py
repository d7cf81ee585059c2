"""The forecast: an HTTP service on loopback, and a source that asks it for many fields at once."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Collection, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs, urlencode, urlsplit

from coalestra import (
    CallableBatchSource,
    CircuitBreakerPolicy,
    FetchContext,
    ResourceKey,
    RetryPolicy,
    SourceResiliencePolicy,
    SourceUnavailableError,
)

RESILIENCE = SourceResiliencePolicy(
    retry=RetryPolicy(max_attempts=2, base_delay_seconds=0.01),
    circuit=CircuitBreakerPolicy(failure_threshold=2, recovery_timeout_seconds=5 * 60.0),
)


class ForecastService(HTTPServer):
    """The weather service, on a free port, in a thread of its own; `asked` are its requests."""

    def __init__(self, **rain_mm: float) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.rain_mm = rain_mm
        self.asked: list[list[str]] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), name="forecast")
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Answer(BaseHTTPRequestHandler):
    server: ForecastService

    def do_GET(self) -> None:
        fields = parse_qs(urlsplit(self.path).query)["field"]
        self.server.asked.append(fields)
        body = json.dumps({field: self.server.rain_mm[field] for field in fields}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Leave the console to the story."""


class ForecastClient:
    """Asks the service at a port, which changes when the service moves."""

    def __init__(self, port: int) -> None:
        self.port = port

    def source(self) -> CallableBatchSource:
        """Return the service as a source. It never blocks, so its timeout is all it needs."""
        return CallableBatchSource(
            name="forecast",
            priority=100,
            supports=lambda key: key.namespace == "weather",
            fetcher=self.fetch,
            timeout_seconds=2.0,
            resilience_policy=RESILIENCE,
        )

    async def fetch(
        self, keys: Collection[ResourceKey], context: FetchContext
    ) -> Mapping[ResourceKey, float]:
        query = urlencode([("field", key.subject) for key in keys])
        rain_mm = await self._get(f"/rain?{query}")
        return {key: rain_mm[key.subject] for key in keys}

    async def _get(self, path: str) -> dict[str, float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
            await writer.wait_closed()
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise SourceUnavailableError(f"the forecast service answered {head[:40]!r}")
        answer: dict[str, float] = json.loads(body)
        return answer
