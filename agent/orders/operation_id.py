"""The name of an operation: one attempt at one thing of a deployment, the same for ever and at every party. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from relay.errors import UsageError

SERVER: Final = "server"
"""Stands where a machine would, for what concerns none; no machine may be called so."""

_FOREIGN: Final = re.compile(r"[^A-Za-z0-9._-]+")
_TEXT: Final = re.compile(r"(?=.{1,200}\Z)([\w.-]+)/(0|[1-9]\d{0,8})/([\w.-]+)/([\w.-]+)/(0|[1-9]\d{0,8})", re.ASCII)
"""Ours are shorter than 200 characters; a longer one would be no name of a file."""


@dataclass(frozen=True, slots=True)
class OperationId:
    """Its text is deployment/step/who/action/attempt.

    Attributes:
        deployment: ULID.
        step: number of the step; 0 for preparation.
        who: the machine, or `SERVER`.
        action: a word, unique in this step for `who`.
        attempt: from 1.
    """

    deployment: str
    step: int
    who: str
    action: str
    attempt: int

    @classmethod
    def of(cls, deployment: str, step: int, who: str, name: str, attempt: int = 1) -> OperationId:
        """Any `name` of an action becomes a word: letters, digits, `.`, `_` and `-`."""
        return cls(deployment, step, who, _FOREIGN.sub("-", name).strip("-._")[:63] or "action", attempt)

    @classmethod
    def find(cls, text: str) -> OperationId | None:
        """The operation of exactly this text; None where it is none."""
        match = _TEXT.fullmatch(text)
        return cls(match[1], int(match[2]), match[3], match[4], int(match[5])) if match else None

    @classmethod
    def parse(cls, text: str) -> OperationId:
        """As `find`. Raises `UsageError` where it is none."""
        if (found := cls.find(text)) is None:
            raise UsageError(f"{text[:200]!r} is no operation: expected deployment/step/who/action/attempt")
        return found

    @property
    def machine(self) -> str:
        """The machine; empty where it concerns none."""
        return "" if self.who == SERVER else self.who

    @property
    def file_name(self) -> str:
        """As the name of a file of the deployment: no operation holds a tilde, so no two have the same."""
        return f"{self.step}~{self.who}~{self.action}~{self.attempt}"

    def __str__(self) -> str:
        return f"{self.deployment}/{self.step}/{self.who}/{self.action}/{self.attempt}"


def action_of(text: str) -> str:
    """The action of an operation, for people; all of `text` where it is none."""
    found = OperationId.find(text)
    return found.action if found else text
