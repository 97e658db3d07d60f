"""Secrets are taken out of a stream of output, also where a piece ends in the middle of one.

Pure, and cheap to import by the runner: nothing but modules that it has anyway, or that are small.

A byte is masked when it belongs to any occurrence of any form of a secret (`agent/runs/secret_forms.py`), in any reading
of the stream (`agent/runs/readings.py`), so that of two secrets that overlap neither shows its end; occurrences that
overlap make one mask. What may still become an occurrence (the stream ends with the beginning of a form) is held back,
and `flush` gives it out when it was held for too long.
"""

from __future__ import annotations

from agent.runs.readings import Reading, Wanted, readings_of
from agent.runs.secret_forms import SHORTEST, base64_forms, check_secret, hex_forms, text_forms

TYPE_CHECKING = False  # `typing` costs the runner more than all the rest of this module
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MASK = b"********"
KEPT_MAX = 4 << 20
"""Bytes that are held back at most. What is beyond them still the beginning of a secret is taken for one."""

_SPACES = b" \t\r\n:"
"""Between the characters of a code: where lines of base64 are broken, and between the bytes of a dump."""
_NEAR_END = 4096


class Masker:
    """A stream on its way: bytes go in by `feed`, masked bytes come out, no more behind than the longest form is long."""

    def __init__(self, values: Iterable[str]) -> None:
        """Mask `values` in every form and notation.

        Raises:
            UsageError: one of them is shorter than 4 characters.
        """
        values = tuple(values)
        for value in values:
            check_secret(value)
        self._texts = _Forms(form for value in values for form in text_forms(value))
        self._base64 = _Forms(form for value in values for form in base64_forms(value))
        self._hex = _Forms(form for value in values for form in hex_forms(value))
        self._wanted = Wanted([*self._texts.forms, *self._base64.forms, *self._hex.forms])
        # What came in and may belong to an occurrence. Its first `_told` bytes were given out already: the end of them
        # as a mask (`_masked`), or as it is.
        self._kept = b""
        self._told = 0
        self._masked = False

    @property
    def held(self) -> int:
        """Bytes that came in, and of which nothing was shown yet."""
        return len(self._kept) - self._told

    def feed(self, data: bytes) -> bytes:
        """What may be shown now."""
        if not self._texts.forms:
            return data
        self._kept += data
        if len(self._kept) > KEPT_MAX + len(data):
            return self._give_up()
        spans, begun, read = self._look(final=False)
        show_to = _floor(read, min((start for start, _, shown in begun if not shown), default=len(self._kept)))
        keep_from = _floor(read, min((start for start, _, _ in begun), default=show_to))
        shown = self._show(spans, max(show_to, self._told))
        self._kept, self._told = self._kept[keep_from:], self._told - keep_from
        return shown

    def flush(self) -> bytes:
        """Give out what is held, because it was held for long enough.

        The beginning of a secret is taken for a secret when it has 4 bytes or more. A shorter one is shown, and if the
        secret does go on, its rest is masked: it is never shown whole, however slowly it is written.
        """
        if not self._kept:
            return b""
        end = len(self._kept)
        spans, begun, _ = self._look(final=False)
        return self._show([*spans, *((start, end) for start, size, _ in begun if size >= SHORTEST)], end)

    def close(self) -> bytes:
        """The last bytes: nothing comes after them."""
        spans, _, _ = self._look(final=True)
        shown = self._show(spans, len(self._kept))
        self._kept, self._told = b"", 0
        return shown

    def _give_up(self) -> bytes:
        shown = self.flush()
        self._kept, self._told = b"", 0
        return shown

    def _show(self, spans: Iterable[tuple[int, int]], limit: int) -> bytes:
        """All that lies before `limit` and was not told, with the spans that begin there masked."""
        out = []
        told = self._told
        for start, end in _merged(span for span in spans if span[0] < limit):
            if end <= told:
                continue
            if start >= told:
                out += [self._kept[told:start], MASK]
            elif not self._masked:
                out.append(MASK)
            told, self._masked = end, True
        if told < limit:
            out.append(self._kept[told:limit])
            told, self._masked = limit, False
        self._told = told
        return b"".join(out)

    def _look(self, *, final: bool) -> tuple[list[tuple[int, int]], list[tuple[int, int, bool]], list[Reading]]:
        """Occurrences (from, to); beginnings (from, how many bytes of a form, whether they are shown all the same); and
        the readings in which they were found.
        """
        spans: list[tuple[int, int]] = []
        begun: list[tuple[int, int, bool]] = []
        read = []
        for reading in readings_of(self._kept, self._wanted, final=final):
            read.append(reading)
            coded = _Unspaced(reading)
            if reading.shows:
                spans += ((reading.start(start), reading.end(end)) for start, end in self._texts.within(reading.text))
                for forms, least in ((self._base64, SHORTEST), (self._hex, 2)):
                    spans += (coded.span(start, end, least) for start, end in forms.within(coded.text))
            if final:
                continue
            size = len(reading.text)
            begun += ((reading.start(at), size - at, False) for at in self._texts.begun(reading.text))
            for forms, least in ((self._base64, SHORTEST), (self._hex, 2)):
                begun += (coded.beginning(at, least) for at in forms.begun(coded.text))
            if reading.held is not None and self._texts.may_begin(reading):
                begun.append((reading.held, 0, False))
        return spans, begun, read


class _Forms:
    """Texts to look for, by how they begin."""

    def __init__(self, forms: Iterable[bytes]) -> None:
        self.forms = sorted(set(forms))
        self._by_head: dict[bytes, list[bytes]] = {}
        for form in self.forms:
            self._by_head.setdefault(form[:SHORTEST], []).append(form)
        self._short_beginnings = {head[:size] for head in self._by_head for size in range(1, SHORTEST)}
        self._firsts = {head[0] for head in self._by_head}
        self._longer: dict[bytes, list[bytes]] = {}
        root = b""
        for form in self.forms:  # sorted: what others begin with stands before them
            if not root or not form.startswith(root):
                root = form
            self._longer.setdefault(root, []).append(form)
        self._longest = max(map(len, self.forms), default=0)

    def within(self, text: bytes) -> Iterator[tuple[int, int]]:
        """Where they occur."""
        for root, forms in self._longer.items():
            start = text.find(root)
            while start >= 0:
                yield from ((start, start + len(form)) for form in forms if text.startswith(form, start))
                start = text.find(root, start + 1)

    def begun(self, text: bytes) -> set[int]:
        """Where the rest of `text` is the beginning of a form, and not the whole of it."""
        size = len(text)
        found = {size - n for n in range(1, min(SHORTEST, size + 1)) if text[-n:] in self._short_beginnings}
        for head, forms in self._by_head.items():
            start = text.find(head, max(0, size - self._longest + 1))
            while start >= 0:
                rest = text[start:]
                if any(len(form) > len(rest) and form.startswith(rest) for form in forms):
                    found.add(start)
                start = text.find(head, start + 1)
        return found

    def may_begin(self, reading: Reading) -> bool:
        """Whether what is undecided at the end of a reading may be the first byte of a form."""
        makes = None if reading.notation is None else reading.notation.makes
        return makes is None or not self._firsts.isdisjoint(makes)


class _Unspaced:
    """A reading without the white space in it, and without colons.

    A code that is broken after fewer than `least` of its characters counts from the break on: else every line whose last
    letter is one that a code begins with would wait for the next one.
    """

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self.text = reading.text.translate(None, _SPACES)
        self._last: list[int] = []  # from the end: there lie the beginnings, and they are looked for with each piece
        self._places: list[int] = []

    def span(self, start: int, end: int, least: int) -> tuple[int, int]:
        """Where, in what was written, this part stands."""
        begin = next((at for at in range(start + least - 1, start, -1) if self._is_after_space(at)), start)
        return self._reading.start(self._place(begin)), self._reading.end(self._place(end - 1) + 1)

    def beginning(self, start: int, least: int) -> tuple[int, int, bool]:
        """Of a part that goes on to the end: from where, how long it is, and whether it is shown all the same."""
        size = len(self.text) - start
        is_broken = size < least and self._place(len(self.text) - 1) + 1 < len(self._reading.text)
        return self._reading.start(self._place(start)), size, is_broken

    def _is_after_space(self, at: int) -> bool:
        return self._place(at) != self._place(at - 1) + 1

    def _place(self, at: int) -> int:
        """Where the reading has the byte that this text has at `at`."""
        text = self._reading.text
        if len(text) == len(self.text):
            return at
        behind = len(self.text) - at
        if behind <= len(self._last):
            return self._last[behind - 1]
        if behind > _NEAR_END:
            self._places = self._places or [place for place, byte in enumerate(text) if byte not in _SPACES]
            return self._places[at]
        place = self._last[-1] if self._last else len(text)
        while len(self._last) < behind:
            place -= 1
            if text[place] not in _SPACES:
                self._last.append(place)
        return place


def _floor(readings: list[Reading], limit: int) -> int:
    """`limit`, or as far before it that it is in the middle of no character in any reading: where the rest begins anew,
    it must be read as before.
    """
    while limit < len(readings[0].text) and (lower := min(reading.floor(limit) for reading in readings)) < limit:
        limit = lower
    return limit


def _merged(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Spans that overlap as one, in order. Those that only touch stay two."""
    last: tuple[int, int] | None = None
    for start, end in sorted(spans):
        if last and start < last[1]:
            last = last[0], max(last[1], end)
            continue
        if last:
            yield last
        last = start, end
    if last:
        yield last
