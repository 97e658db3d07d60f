"""Whether people have said yes: what the answers to a question come to. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.people.statement import Approve, Reject, SignedDecision, is_person
from orchestrator.plan.plan import PlannedAsk


@dataclass(frozen=True, slots=True)
class Answer:
    """What one person said to one question. `by` and `at` as in `SignedDecision`; `decision` is the row.

    `recorded`: the journal holds it as an answer (`AskAnswered`), so it came in time; `at` is then when it was taken up.
    """

    by: str
    verdict: Literal["approve", "reject"]
    at: float
    why: str = ""
    decision: int = 0
    recorded: bool = False


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the answers come to.

    Attributes:
        state: `waiting`, or how it is settled; `expired` only where `on_expiry` is `stop` or `proceed`.
        goes_on: whether it is settled as a yes.
        reason: whose word, or which rule, settled it; for people.
        agreed: who said yes, in the order in which they did; of those who count.
        needed: so many more must agree; 0 where it is settled.
        waits_for: those who may still answer, by name; empty: everybody who may order in the environment.
        late: its time is over: it waits on all the same (`pause`), or nobody looked when it was (see `judge`).
    """

    state: Literal["waiting", "approved", "rejected", "expired"]
    goes_on: bool = False
    reason: str = ""
    agreed: tuple[str, ...] = ()
    needed: int = 0
    waits_for: tuple[str, ...] = ()
    late: bool = False


def answer_of(decision: SignedDecision) -> Answer | None:
    """The answer that a decision is; None where it answers no question."""
    said = decision.saying
    if isinstance(said, Approve | Reject):
        verdict: Literal["approve", "reject"] = "approve" if isinstance(said, Approve) else "reject"
        return Answer(decision.by, verdict, decision.at, said.why, decision.number)
    return None


def why_not(ask: PlannedAsk, author: str, by: str) -> str:
    """Why the word of `by` does not count for this question; empty where it does.

    Only names count where approvers are listed, where several people must agree, and where the author may not: a key
    without a name may be anybody's.
    """
    if ask.approvers and by not in ask.approvers:
        return f"{by} is not one of those who are asked: {', '.join(ask.approvers)}"
    if (ask.not_author or ask.minimum > 1) and not is_person(by):
        return f"{by} acts by a key without a name, and names are needed here"
    if ask.not_author and by == author:
        return f"{by} made the release, and another person is to agree"
    if ask.not_author and not author:
        return "nobody knows who made the release: its key has no name"
    return ""


def is_late(ask: PlannedAsk, answer: Answer, at: float) -> bool:
    """Whether the question's time (`at`; 0: never) was over when this was said, and its rule takes no answer then."""
    return bool(at) and ask.on_expiry != "pause" and not answer.recorded and answer.at > at


def judge(
    ask: PlannedAsk, author: str, answers: Sequence[Answer], *, now: float, at: float = 0.0, since: float = 0.0
) -> Judgement:
    """Judge a question by the answers to it, in the order of their rows.

    A no of anybody who counts settles it, and so do as many different people as are needed who say yes; what is said
    after that changes nothing. A person who says something twice has said the last of it. After the question's time only
    `pause` takes answers.

    Args:
        ask: the question, as it was planned.
        author: who made the release (`Plan.author`).
        answers: all of them, also of those who do not count (they are passed over).
        now: seconds since 1970.
        at: when its time is over (`AskOpened.at`); 0: never.
        since: when this process began to look: what expired before is `late`.
    """
    agreed: list[str] = []
    for answer in answers:
        if why_not(ask, author, answer.by) or is_late(ask, answer, at):
            continue
        if answer.verdict == "reject":
            why = f": {answer.why}" if answer.why else ""
            return Judgement("rejected", reason=f"{answer.by} said no{why}", agreed=tuple(agreed))
        if answer.by not in agreed:
            agreed.append(answer.by)
        if len(agreed) >= ask.minimum:
            return Judgement("approved", goes_on=True, reason=f"{', '.join(agreed)} agreed", agreed=tuple(agreed))
    is_over = bool(at) and now >= at
    if is_over and ask.on_expiry != "pause":
        goes_on = ask.on_expiry == "proceed"
        reason = "nobody settled it in time" + (", and then it goes on" if goes_on else "")
        return Judgement("expired", goes_on, reason, tuple(agreed), late=at < since)
    others = tuple(name for name in ask.approvers if name not in agreed and not why_not(ask, author, name))
    return Judgement("waiting", agreed=tuple(agreed), needed=ask.minimum - len(agreed), waits_for=others, late=is_over)
