"""Which bucket, and how it is spoken to: a location's text, parsed. Pure.

    s3://bucket/prefix?endpoint=https://s3.example&region=eu-1&path_style=true&credentials=/etc/waystation/s3.ini&state=/var/lib/relay

All but the bucket may be left out. `credentials` is a file as the AWS tools have it (sections, `aws_access_key_id`,
`aws_secret_access_key`), `profile` its section; without it boto3 looks where it always does. No secret stands in a location.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from relay.errors import UsageError

EXPECTED: Final = "expected s3://bucket/prefix?endpoint=URL&region=NAME&path_style=true&credentials=/FILE&state=/FOLDER"

_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", re.ASCII)
_PREFIX: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(?:/[A-Za-z0-9_][A-Za-z0-9._-]*)*", re.ASCII)
_PREFIX_MAX: Final = 200
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)


@dataclass(frozen=True, slots=True)
class S3Settings:
    """A bucket.

    Attributes:
        prefix: before each key, without a slash at its end; empty for none.
        endpoint: URL of an S3-compatible server; empty for AWS.
        region: empty for what boto3 finds, else `us-east-1`.
        path_style: the bucket stands in the path, not in the host's name.
        credentials: absolute path of a file; empty for where boto3 looks.
        profile: section of that file.
        state: absolute path of a local folder for what is this process's alone, such as mail; empty for the default.
    """

    bucket: str
    prefix: str = ""
    endpoint: str = ""
    region: str = ""
    path_style: bool = False
    credentials: str = ""
    profile: str = ""
    state: str = ""

    def __str__(self) -> str:
        options = {field.name: getattr(self, field.name) for field in fields(self)[2:]}
        query = urlencode({name: _shown(value) for name, value in options.items() if value}, safe="/:")
        return f"s3://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "") + (f"?{query}" if query else "")

    @property
    def place(self) -> str:
        """For people: the bucket, and where it is not AWS's, whose."""
        return f"bucket {self.bucket}" + (f" at {self.endpoint}" if self.endpoint else "")


def _shown(value: str | bool) -> str:  # noqa: FBT001 - any value of a field
    return value if isinstance(value, str) else "true"


def parse_settings(text: str) -> S3Settings:
    """The bucket that an `s3:` location names.

    Raises:
        UsageError: it names none, or has an option that is not known or cannot be.
    """
    parts = urlsplit(text)
    bucket, prefix = parts.netloc, parts.path.strip("/")
    if parts.scheme != "s3" or not _BUCKET.fullmatch(bucket):
        raise UsageError(f"{text!r} names no bucket", hint=EXPECTED)
    if parts.fragment or (prefix and (len(prefix) > _PREFIX_MAX or not _PREFIX.fullmatch(prefix))):
        raise UsageError(f"{text!r} has a prefix that no key may begin with", hint=EXPECTED)
    try:
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise UsageError(f"{text!r}: what follows the question mark is no NAME=VALUE", hint=EXPECTED) from None
    options = dict(pairs)
    for name, value in options.items():
        check = _OPTIONS.get(name)
        if check is None or not check(value):
            raise UsageError(f"{text!r}: {name}={value!r} is no option of a bucket", hint=EXPECTED)
    if len(options) < len(pairs):
        raise UsageError(f"{text!r} has an option twice", hint=EXPECTED)
    plain = {name: value for name, value in options.items() if name != "path_style"}
    return S3Settings(bucket, prefix, path_style=options.get("path_style") == "true", **plain)


def _is_url(text: str) -> bool:
    parts = urlsplit(text)
    return parts.scheme in {"http", "https"} and bool(parts.hostname) and not (parts.username or parts.query)


_OPTIONS: Final[Mapping[str, Callable[[str], bool]]] = {
    "endpoint": _is_url,
    "region": lambda text: bool(_NAME.fullmatch(text)),
    "path_style": lambda text: text in {"true", "false"},
    "credentials": os.path.isabs,
    "profile": lambda text: bool(_NAME.fullmatch(text)),
    "state": os.path.isabs,
}
