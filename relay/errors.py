"""Every error of Waystation. The class tells the caller what to do next; the data says about what.

Three roots:

- `UntrustedError`: the bytes are wrong. Never ask the same source for the same thing again; say who sent them.
- `UnreachableError`: the road is bad. Try again or try the next source.
- `RefusedError`: a rule of ours says no. Nothing was changed; a person (or the caller) must ask differently.
"""

from __future__ import annotations

from typing import ClassVar


class WaystationError(Exception):
    """Root of all errors that are told to a person: one sentence, and where it helps the next step."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message

    @property
    def lines(self) -> tuple[str, ...]:
        """What is told, line by line. One, but where several things are wrong at once."""
        return (self.message,)


class UntrustedError(WaystationError):
    """The bytes are not what they claim to be."""


class UnreachableError(WaystationError):
    """The other side could not be reached, did not answer in time, or cannot serve now."""

    def __init__(self, message: str, *, hint: str = "", retry_after: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class RefusedError(WaystationError):
    """A rule says no. Nothing was changed."""


def first_of(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a task group, however deep: the one that ended the others."""
    first = errors.exceptions[0]
    return first_of(first) if isinstance(first, BaseExceptionGroup) else first


# --- wrong bytes


class IdentityError(UntrustedError):
    """A package id, version or digest does not follow its grammar."""

    def __init__(self, kind: str, text: str, expected: str) -> None:
        shown = text if len(text) <= 120 else text[:117] + "..."
        super().__init__(f"{shown!r} is not a valid {kind}: expected {expected}")
        self.kind = kind
        self.text = text


class ArchiveError(UntrustedError):
    """A nupkg that the defensive walk refuses. `rule` is a short stable word, `member` the entry concerned."""

    def __init__(self, rule: str, detail: str, *, member: str = "") -> None:
        about = f" ({member[:200]!r})" if member else ""
        super().__init__(f"refused archive, {rule}: {detail}{about}")
        self.rule = rule
        self.member = member


class MetadataError(UntrustedError):
    """A nuspec that is missing, unreadable or says something else than it must."""


class ManifestError(UntrustedError):
    """A manifest that is not canonical, not consistent, or not the one asked for."""


class FrameError(UntrustedError):
    """A bundle or frame that breaks the format, lies about a length, or carries what was not asked for."""


class SignatureError(UntrustedError):
    """A missing, altered or foreign signature."""


class ChunkInvalid(UntrustedError):  # noqa: N818 - the word of the store contract
    """Bytes under a chunk's name have another hash: damage (in a store) or a lie (from a peer)."""

    def __init__(self, id: str, found: str) -> None:
        super().__init__(f"chunk {id[:16]}… has other bytes than its name says (found {found[:16]}…)")
        self.id = id
        self.found = found


# --- bad road


class ChunkMissing(UnreachableError):  # noqa: N818 - the word of the store contract
    """This store does not hold the chunk: ask the next."""

    def __init__(self, id: str) -> None:
        super().__init__(f"chunk {id[:16]}… is not here")
        self.id = id


class StoreError(UnreachableError):
    """The store's own medium failed (disk, bucket). `full` marks "no space left"."""

    def __init__(self, message: str, *, full: bool = False, hint: str = "", retry_after: float | None = None) -> None:
        super().__init__(message, hint=hint, retry_after=retry_after)
        self.full = full


# --- a rule says no


class NotFoundError(RefusedError):
    """What was named does not exist here."""


class UnknownLeaseError(NotFoundError):
    """A relay has no such lease (any more). The sender offers again."""

    def __init__(self) -> None:
        super().__init__("there is no such lease (any more)", hint="Offer the manifest again")


class ConflictError(RefusedError):
    """The same id and version already stands for other bytes. Always worth an alarm."""


class UsageError(RefusedError):
    """The command or configuration is wrong before anything was tried."""

    exit_code: ClassVar[int] = 2


class LockedError(RefusedError):
    """Somebody else holds the exclusive lock."""

    exit_code: ClassVar[int] = 4
