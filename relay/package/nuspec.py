"""A package's own description: nuspec XML from anybody becomes plain values.

Id and version stand once, in the one reading that NuGet has (`NuGet.Packaging`, `NuspecReader`), or the nuspec is
refused. Nothing acts on the rest: a value that does not read is left out, and named. Elements that NuGet does not know
are passed over. Texts are what an author wrote: they are escaped where they are shown, also the URLs.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from xml.etree.ElementTree import Element, ParseError, TreeBuilder

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import DefusedXMLParser, iterparse

from relay.errors import IdentityError, MetadataError
from relay.package.identity import NuGetVersion, PackageId

NUSPEC_MAX: Final = 1 << 20
"""Bytes of a nuspec."""

TEXT_MAX: Final = 64 << 10
"""Characters of one value."""

DEPTH_MAX: Final = 100
ATTRIBUTES_MAX: Final = 1000
"""Attributes of one element."""
ELEMENTS_MAX: Final = 100_000

_TEXTS: Final = (
    "title",
    "authors",
    "owners",
    "description",
    "summary",
    "releaseNotes",
    "copyright",
    "language",
    "projectUrl",
    "iconUrl",
    "icon",
    "licenseUrl",
    "readme",
)
_FLAGS: Final = ("requireLicenseAcceptance", "developmentDependency", "serviceable")
_BOOLEANS: Final = {"true": True, "1": True, "false": False, "0": False}
T = TypeVar("T")
_LEFT_OUT_MAX: Final = 50
"""Things that are named one by one."""
_SPACE: Final = " \t\r\n"

_MARKS: Final = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\0\0", "utf-32-le"),
    (b"\0\0\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
_STARTS: Final = ((b"<\0", "utf-16-le"), (b"\0<", "utf-16-be"))
"""How a text without a mark begins."""
_SAID: Final = re.compile(rb"<\?xml\s[^>]*?\sencoding\s*=\s*[\"']([^\"'>]{1,40})[\"']")
_UNICODE: Final = re.compile(r"utf-?8|utf-?16(le|be)?|utf-?32(le|be)?|unicode|ucs-2|iso-10646-ucs-[24]")
_PAGES: Final = (
    (re.compile(r"(?:us-)?ascii|iso646-us|ansi_x3\.4-19(?:68|86)"), "ascii"),
    (re.compile(r"latin-?1"), "iso8859-1"),
    (re.compile(r"iso[-_]?8859-([1-9]|1[013-6])(?::19[0-9]{2})?"), "iso8859-{}"),
    (re.compile(r"(?:windows-|x-cp|cp)(125[0-8]|874)"), "cp{}"),
    (re.compile(r"(?:ibm|cp)0*(437|737|775|85[02578]|86[0-69])"), "cp{}"),
    (re.compile(r"koi8-([ru])"), "koi8-{}"),
    (re.compile(r"macintosh|x-mac-roman"), "mac-roman"),
)
"""Code pages of one byte, and what Python calls them. Ids and versions are the same bytes in each."""
_WIDE_PAGES: Final = {
    "shift_jis": "cp932",
    "shift-jis": "cp932",
    "x-sjis": "cp932",
    "windows-31j": "cp932",
    "gb2312": "gbk",
    "gbk": "gbk",
    "gb18030": "gb18030",
    "big5": "cp950",
    "euc-jp": "euc-jp",
    "iso-2022-jp": "iso2022-jp",
    "euc-kr": "cp949",
    "ks_c_5601-1987": "cp949",
}


@dataclass(frozen=True)
class Nuspec:
    """Identity and description. `metadata` holds plain JSON types only, and only the keys that are present.

    Texts under NuGet's own element names; `tags` a list of texts; `requireLicenseAcceptance`, `developmentDependency`
    and `serviceable` booleans; `minClientVersion` a text; `license` {type, value}; `packageTypes` [{name, version?}];
    `repository` {type?, url?, branch?, commit?};
    `dependencyGroups` [{targetFramework?, dependencies: [{id, range, include?, exclude?}]}], where an empty `range`
    means any version.

    `left_out` says, a line each, what could not be read. It is no part of a manifest: its wording may change.
    """

    id: PackageId
    version: NuGetVersion
    metadata: dict[str, object]
    left_out: tuple[str, ...]


def parse_nuspec(data: bytes) -> Nuspec:
    """Read a nuspec: no document type, in an encoding that its mark or its declaration names.

    Raises:
        MetadataError: too large, not such a document, or without one valid id and one valid version.
    """
    root, namespace = _parse(data)
    element = _find_metadata(root)
    id, version = (_identity(element, namespace, name) for name in ("id", "version"))
    try:
        identity = PackageId.parse(id), NuGetVersion.parse(version.strip(_SPACE))
    except IdentityError as error:
        raise MetadataError(f"the nuspec says: {error.message}") from error
    reading = _Reading(namespace)
    metadata = reading.metadata(element)
    return Nuspec(*identity, metadata, reading.left_out)


def _demand(is_so: bool, fault: str) -> None:  # noqa: FBT001 - it reads as a sentence
    if not is_so:
        raise MetadataError(fault)


# --- bytes to elements


def _parse(data: bytes) -> tuple[Element, str]:
    """The root, and the default namespace where its <metadata> begins.

    Depth and counts are checked step by step, before a tree of any size stands in memory.
    """
    _demand(len(data) <= NUSPEC_MAX, f"the nuspec has {len(data)} bytes, more than {NUSPEC_MAX}")
    depth = elements = 0
    root: Element | None = None
    declared: list[tuple[str, str]] = []
    namespace = ""
    try:
        for event, found in _events(_decoded(data)):
            if event == "start-ns":
                declared.append(found)
            elif event == "end-ns":
                declared.pop()
            elif event == "end":
                depth -= 1
            else:
                root = found if root is None else root
                depth, elements = depth + 1, elements + 1
                _check_bounds(depth, elements, len(found.attrib))
                if depth == 2 and _local(found) == "metadata":
                    namespace = next((uri for prefix, uri in reversed(declared) if not prefix), "")
    except DefusedXmlException as error:
        raise MetadataError("the nuspec has a document type or entities, which are refused") from error
    except (ParseError, ValueError) as error:
        raise MetadataError(f"the nuspec is not readable XML: {error}") from error
    if root is None:
        raise MetadataError("the nuspec is empty")
    return root, namespace


def _decoded(data: bytes) -> str:
    """The text. Its first bytes say what Unicode it is; the declaration only chooses among the others, as .NET has it."""
    for start, encoding in (*_MARKS, *_STARTS):
        if data.startswith(start):
            return _decode(data.removeprefix(start) if (start, encoding) in _MARKS else data, encoding)
    said = _SAID.match(data)
    name = said[1].decode("latin-1").lower() if said else "utf-8"
    if _UNICODE.fullmatch(name):
        return _decode(data, "utf-8")
    if name in _WIDE_PAGES:
        return _decode(data, _WIDE_PAGES[name])
    for pattern, encoding in _PAGES:
        if page := pattern.fullmatch(name):
            # A byte that the page lacks is a character that cannot be read, never markup.
            return data.decode(encoding.format(*page.groups()), "replace")
    raise MetadataError(f"the nuspec is in an encoding that is not known: {name!r}")


def _decode(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise MetadataError(f"the nuspec is in {encoding.upper()}, but not all of its bytes are") from error


def _events(text: str) -> Iterable[tuple[str, Any]]:
    """The declaration has been heeded already: what it says of the encoding no longer counts."""
    parser = DefusedXMLParser(target=TreeBuilder(), encoding="utf-8", forbid_dtd=True)
    return iterparse(io.BytesIO(text.encode()), events=("start-ns", "start", "end", "end-ns"), parser=parser)


def _check_bounds(depth: int, elements: int, attributes: int) -> None:
    is_small = depth <= DEPTH_MAX and elements <= ELEMENTS_MAX and attributes <= ATTRIBUTES_MAX
    bounds = f"{DEPTH_MAX} levels, {ELEMENTS_MAX} elements or {ATTRIBUTES_MAX} attributes on one of them"
    _demand(is_small, f"the nuspec is larger than {bounds}")


def _local(element: Element) -> str:
    return str(element.tag).rpartition("}")[2]


def _named(parent: Element, namespace: str, name: str) -> list[Element]:
    tag = f"{{{namespace}}}{name}" if namespace else name
    return [child for child in parent if child.tag == tag]


# --- identity


def _find_metadata(root: Element) -> Element:
    """As NuGet finds it: by its local name, in any namespace."""
    found = [child for child in root if _local(child) == "metadata"]
    _demand(bool(found), "the nuspec has no <metadata>")
    _demand(len(found) == 1, "the nuspec has more than one <metadata>")
    return found[0]


def _identity(metadata: Element, namespace: str, name: str) -> str:
    """Id or version as written. NuGet would take the first of several: where they differ, readers do, too."""
    found = {"".join(element.itertext()) for element in _named(metadata, namespace, name)}
    _demand(bool(found), f"the nuspec has no <{name}>")
    _demand(len(found) == 1, f"the nuspec has <{name}> more than once, and not alike")
    return found.pop()


# --- all the rest


class _UnreadError(Exception):
    """Why a value does not read."""


class _Reading:
    """Reads what <metadata> says, and collects what of it does not read."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._faults: list[str] = []
        self._readers: dict[str, Callable[[Element], object]] = {
            **dict.fromkeys(_TEXTS, _text),
            **dict.fromkeys(_FLAGS, _flag),
            "tags": _tags,
            "license": _license,
            "packageTypes": self._package_types,
            "repository": lambda repository: self._attributes(repository, "type", "url", "branch", "commit"),
            "dependencies": self._dependency_groups,
        }

    @property
    def left_out(self) -> tuple[str, ...]:
        more = len(self._faults) - _LEFT_OUT_MAX
        return (*self._faults[:_LEFT_OUT_MAX], *([f"{more} more"] if more > 0 else []))

    def metadata(self, element: Element) -> dict[str, object]:
        values = self._attributes(element, "minClientVersion")
        for name, read in self._readers.items():
            for value in self._read(self._first(element, name), read):
                values["dependencyGroups" if name == "dependencies" else name] = value
        return {name: value for name, value in values.items() if value not in ("", [], {})}

    def _first(self, parent: Element, name: str) -> list[Element]:
        """The one that counts for NuGet where there are several."""
        found = self._children(parent, name)
        if len(found) > 1:
            self._faults.append(f"<{name}> stands {len(found)} times: the first one counts")
        return found[:1]

    def _children(self, parent: Element, name: str) -> list[Element]:
        return _named(parent, self._namespace, name)

    def _read(self, elements: Iterable[Element], read: Callable[[Element], T]) -> list[T]:
        """The values of those that have one."""
        values = []
        for element in elements:
            try:
                values.append(read(element))
            except _UnreadError as error:
                self._faults.append(f"<{_local(element)}> {error}")
        return values

    def _attributes(self, element: Element, *names: str) -> dict[str, object]:
        """The named attributes that are there and not empty."""
        found: dict[str, object] = {}
        for name in names:
            text = element.get(name, "").strip()
            if len(text) > TEXT_MAX:
                self._faults.append(f"<{_local(element)}> has {_too_long(name, text)}")
            elif text:
                found[name] = text
        return found

    def _package_types(self, element: Element) -> list[dict[str, object]]:
        return self._read(self._children(element, "packageType"), self._package_type)

    def _package_type(self, element: Element) -> dict[str, object]:
        kind = self._attributes(element, "name", "version")
        if "name" not in kind:
            raise _UnreadError("has no name")
        return kind

    def _dependency_groups(self, element: Element) -> list[dict[str, object]]:
        """Groups in their order; dependencies outside of any (the form before groups) are one group for all frameworks."""
        groups, loose = self._children(element, "group"), self._children(element, "dependency")
        if not groups:
            dependencies = self._read(loose, self._dependency)
            return [{"dependencies": dependencies}] if dependencies else []
        if loose:
            self._faults.append(f"<dependencies> has {len(loose)} beside its groups: the groups count")
        return [self._group(group) for group in groups]

    def _group(self, element: Element) -> dict[str, object]:
        dependencies = self._read(self._children(element, "dependency"), self._dependency)
        return self._attributes(element, "targetFramework") | {"dependencies": dependencies}

    def _dependency(self, element: Element) -> dict[str, object]:
        """`range` is NuGet's interval notation as written; no dependency is ever resolved here."""
        text = element.get("id", "").strip()
        if not text:
            raise _UnreadError("has no id")
        try:
            id = PackageId.parse(text)
        except IdentityError as error:
            raise _UnreadError(f"is of {text[:100]!r}, which is no package's id") from error
        given = self._attributes(element, "version", "include", "exclude")
        range = given.pop("version", "")
        return {"id": id.text, "range": range, **given}


def _text(element: Element) -> str:
    text = "".join(element.itertext()).strip()
    if len(text) > TEXT_MAX:
        raise _UnreadError(f"has {_too_long('a text', text)}")
    return text


def _too_long(what: str, text: str) -> str:
    return f"{what} of {len(text)} characters, more than {TEXT_MAX}"


def _flag(element: Element) -> bool | str:
    """An empty one says nothing."""
    text = _text(element)
    if text and text.lower() not in _BOOLEANS:
        raise _UnreadError(f"is {text[:40]!r}, neither true nor false")
    return _BOOLEANS.get(text.lower(), "")


def _tags(element: Element) -> list[str]:
    """Split at spaces, commas and semicolons, as the public gallery does."""
    return [tag for tag in re.split(r"[\s,;]+", _text(element)) if tag]


def _license(element: Element) -> dict[str, object]:
    kind = element.get("type", "").strip()
    if kind.lower() not in {"expression", "file"}:
        raise _UnreadError(f"is of type {kind[:40]!r}, neither 'expression' nor 'file'")
    return {"type": kind.lower(), "value": _text(element)}
