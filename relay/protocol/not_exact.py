"""Why the identical nupkg of a package cannot be had: told by a relay to its clients, and by a store to its callers."""

from __future__ import annotations

from relay.errors import NotFoundError
from relay.protocol.messages import ExactLacks


class NotExactError(NotFoundError):
    """The package is there, but neither its nupkg nor all that it takes to make the identical one."""

    def __init__(self, message: str, lacks: ExactLacks) -> None:
        reasons = [
            "there is no recipe that gives it" if lacks.recipe else "",
            f"the encoder {', '.join(lacks.encoders)[:200]} is not there" if lacks.encoders else "",
            f"{lacks.verbatim_bytes:,} bytes that no encoder makes are not there" if lacks.verbatim_bytes else "",
            "chunks are damaged or gone" if lacks.chunks else "",
        ]
        why = " and ".join(filter(None, reasons))
        super().__init__(
            f"{message}: {why}" if why else message,
            hint="Send it with 'waystation package replicate --exact', or give that relay a parent",
        )
        self.lacks = lacks
