"""Tell receivers what a deployment came to: CloudEvents 1.0 as structured JSON over HTTP, signed with the order key.

Format: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md and
https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/http-protocol-binding.md (structured content mode).

The header `Waystation-Signature` holds, in base64, a DSSE envelope of type `SIGNATURE_TYPE` whose payload is
`{"format":1,"sha256":"<of the body, hex>"}`. The body names the event by `source` and `id`, which stay the same when it is sent again, so a receiver can tell a repetition.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import msgspec

from orchestrator.files.values import NotificationKind
from orchestrator.plan.plan import NotifyPlan
from relay.errors import UnreachableError, UsageError, WaystationError
from relay.trust.envelopes import sign_document

if TYPE_CHECKING:
    import aiohttp
    from securesystemslib.signer import Signer

    from orchestrator.trust.secrets import SecretStore
    from relay.network.proxies import Proxy

CONTENT_TYPE: Final = "application/cloudevents+json; charset=utf-8"
SIGNATURE_HEADER: Final = "Waystation-Signature"
SIGNATURE_TYPE: Final = "application/vnd.waystation.notification+json"
TYPE_PREFIX: Final = "dev.waystation.deployment."
"""Of an event's `type`: `dev.waystation.deployment.finished`."""

ATTEMPTS: Final = 3
SECONDS: Final = 10.0
"""For each attempt, from connecting to the answer's head."""
LONGEST_ASKED: Final = 10.0
"""Seconds between two attempts, where the receiver asks for more: the deployment waits for its news to be told."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Notifier:
    """Tells the receivers of one plan.

    Attributes:
        plans: the receivers.
        secrets: where URLs are that are secret; such a URL is shown nowhere, also not in an error.
        signer: the order key.
        seconds: for each attempt.
    """

    plans: Sequence[NotifyPlan]
    secrets: SecretStore
    signer: Signer
    seconds: float = SECONDS

    def targets(self, event: NotificationKind) -> str:
        """The receivers of this event, for people and records; empty where it has none."""
        return ", ".join(target_of(plan) for plan in self.plans if event in plan.on)

    async def notify(self, event: Mapping[str, Any]) -> list[str]:
        """Tell every receiver of this event, all at once. No failure stops anything: it never raises.

        Args:
            event: `event` (one of `NotificationKind`), `project`, `environment` and `deployment` (its ULID); `id` (unique
                in the deployment) and `time` (seconds since 1970) where they are known. It is sent whole, as the event's
                data.

        Returns:
            A sentence for each receiver that could not be told.
        """
        wanted = [plan for plan in self.plans if event.get("event") in plan.on]
        if not wanted:
            return []
        try:
            body = cloud_event(event)
            signature = await asyncio.to_thread(_sign, body, self.signer)
        except Exception as error:  # this edge promises not to raise: a deployment is worth more than its news
            log.exception("a notification could not be made")
            return [f"no receiver was told of {event.get('event')!r}: {error}"]
        import aiohttp

        from relay.network.addresses import connector

        # Neither cookies nor a redirect: the URL that was named, or nothing.
        async with aiohttp.ClientSession(
            connector=connector(),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=self.seconds),
        ) as session:
            errors = await asyncio.gather(*(_tell(session, plan, self.secrets, body, signature) for plan in wanted))
        return [error for error in errors if error]


def target_of(plan: NotifyPlan) -> str:
    """The receiver for people and records: its host, or the name of the secret that holds its URL."""
    if plan.url_secret:
        return f"the receiver in the secret {plan.url_secret!r}"
    return plan.url.partition("://")[2].partition("/")[0].rpartition("@")[2] or plan.url[:100]


def cloud_event(event: Mapping[str, Any]) -> bytes:
    """The body of a notification.

    Raises:
        KeyError: `event`, `project`, `environment` or `deployment` is not there.
        TypeError: something in it is no JSON.
    """
    kind: NotificationKind = event["event"]
    deployment = event["deployment"]
    time = datetime.fromtimestamp(event["time"], UTC) if "time" in event else datetime.now(UTC)
    return msgspec.json.encode(
        {
            "specversion": "1.0",
            "id": f"{deployment}/{event.get('id', kind)}",
            "source": f"/waystation/{quote(event['project'], safe='')}/{quote(event['environment'], safe='')}",
            "type": f"{TYPE_PREFIX}{kind}",
            "subject": deployment,
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "datacontenttype": "application/json",
            "data": dict(event),
        }
    )


def _sign(body: bytes, signer: Signer) -> str:
    signed = msgspec.json.encode({"format": 1, "sha256": hashlib.sha256(body).hexdigest()})
    return base64.b64encode(sign_document(signed, SIGNATURE_TYPE, signer)).decode()


class _NotTakenError(UnreachableError):
    """A failure that another attempt may mend. Made without its cause, whose text can hold the URL."""


async def _tell(
    session: aiohttp.ClientSession, plan: NotifyPlan, secrets: SecretStore, body: bytes, signature: str
) -> str:
    """Empty, or why the receiver could not be told."""
    target = target_of(plan)
    try:
        url = secrets.value(plan.url_secret).reveal() if plan.url_secret else plan.url
        await _post(session, url, body, signature)
    except WaystationError as error:
        return f"{target} could not be told: {error}"
    except Exception as error:  # as above; only the kind of what is unknown is shown, as its text can hold the URL
        return f"{target} could not be told: {type(error).__name__}"
    return ""


async def _post(session: aiohttp.ClientSession, url: str, body: bytes, signature: str) -> None:
    from relay.network.proxies import proxy_of
    from relay.support.persistence import Persistence

    if not url.startswith(("https://", "http://")):
        raise UsageError("its URL is neither http nor https")
    headers = {"Content-Type": CONTENT_TYPE, SIGNATURE_HEADER: signature, "User-Agent": "waystation"}
    persistence = Persistence(
        first_pause=0.5, longest_pause=2.0, longest_asked=LONGEST_ASKED, failures=ATTEMPTS - 1, spread=0.5
    )
    proxy = proxy_of(url)
    await persistence.call(
        lambda: _post_once(session, url, body, headers, proxy), lambda error: isinstance(error, _NotTakenError)
    )


async def _post_once(
    session: aiohttp.ClientSession, url: str, body: bytes, headers: Mapping[str, str], proxy: Proxy | None
) -> None:
    import aiohttp

    from relay.network.proxies import ProxyError, check_answer, through
    from relay.support.persistence import is_passing, seconds_asked

    try:
        with through(proxy, "the receiver"):
            async with session.post(
                url, data=body, headers=headers, allow_redirects=False, proxy=proxy.url if proxy else None
            ) as response:
                status, asked = response.status, seconds_asked(response.headers.get("Retry-After"))
            check_answer(proxy, url, status, "the receiver", asked)
    except ProxyError as error:
        raise _NotTakenError(str(error), retry_after=error.retry_after) from None
    except TimeoutError:
        raise _NotTakenError("it did not answer in time") from None
    except aiohttp.InvalidURL:
        raise UsageError("its URL is none") from None
    except aiohttp.ClientConnectorError as error:
        raise _NotTakenError(f"it cannot be reached ({error.os_error.strerror or 'no such host'})") from None
    except (aiohttp.ClientError, OSError) as error:
        raise _NotTakenError(f"the connection failed ({type(error).__name__})") from None
    if is_passing(status):
        raise _NotTakenError(f"it answers with status {status}", retry_after=asked)
    if not 200 <= status < 300:
        raise WaystationError(f"it answers with status {status}")
