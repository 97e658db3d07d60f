"""What the HTTP side counts. `relay/server/metrics.py` has the rest, and shows all of it."""

from __future__ import annotations

from prometheus_client import Counter

REFUSALS = Counter("waystation_refusals", "Requests that were not served, by the code of the problem", ["reason"])
CONNECTIONS_REFUSED = Counter("waystation_connections_refused", "Connections reset at once, by the limit", ["reason"])
