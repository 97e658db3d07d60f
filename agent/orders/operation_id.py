"""The name of an operation: one attempt at one thing of a deployment, the same for ever and at every party. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from relay.errors import UsageError

SERVER: Final = "server"
"""Stands where a machine would, for what concerns none; no machine may be called so."""

_ACTION_MAX: Final = 63
_TEXT_MAX: Final = 200
"""Characters. Ours are shorter; a longer one would be no name of a file."""
_FOREIGN: Final = re.compile(r"[^A-Za-z0-9._-]+")
_WORD: Final = r"[A-Za-z0-9._-]+"
_NUMBER: Final = r"0|[1-9][0-9]{0,8}"
_TEXT: Final = re.compile(rf"({_WORD})/({_NUMBER})/({_WORD})/({_WORD})/({_NUMBER})")


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
        word = _FOREIGN.sub("-", name).strip("-._")[:_ACTION_MAX] or "action"
        return cls(deployment, step, who, word, attempt)

    @classmethod
    def parse(cls, text: str) -> OperationId:
        """Raises `UsageError` where `text` is not exactly what an operation's is."""
        if (found := cls.find(text)) is None:
            raise UsageError(f"{text[:_TEXT_MAX]!r} is no operation: expected deployment/step/who/action/attempt")
        return found

    @classmethod
    def find(cls, text: str) -> OperationId | None:
        """As `parse`; None where it is none."""
        match = _TEXT.fullmatch(text) if len(text) <= _TEXT_MAX else None
        if match is None:
            return None
        return cls(match[1], int(match[2]), match[3], match[4], int(match[5]))

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
    return text if found is None else found.action
