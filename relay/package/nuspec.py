"""A package's own description: nuspec XML from anybody becomes plain values, or is refused.

What the elements mean is NuGet's (`NuGet.Packaging`, `NuspecReader`); elements that it does not know are passed over.
Texts are what an author wrote: whoever shows them must escape them, also the URLs.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import iterparse

from relay.errors import IdentityError, MetadataError
from relay.package.identity import NuGetVersion, PackageId

NUSPEC_MAX: Final = 1 << 20
"""Bytes of a nuspec."""

TEXT_MAX: Final = 64 << 10
"""Characters of one value."""

DEPTH_MAX: Final = 16
ATTRIBUTES_MAX: Final = 32
"""Attributes of one element."""
ELEMENTS_MAX: Final = 20_000

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
_NAMESPACE: Final = re.compile(r"http://schemas\.microsoft\.com/packaging/[0-9]{4}/[0-9]{2}/nuspec\.xsd")
_ENCODING: Final = re.compile(r"<\?xml\s[^>]*?encoding\s*=\s*[\"']([^\"'>]*)[\"']")


@dataclass(frozen=True)
class Nuspec:
    """Identity and description. `metadata` holds plain JSON types only, and only the keys that are present.

    Texts under NuGet's own element names; `tags` a list of texts; `requireLicenseAcceptance`, `developmentDependency`
    and `serviceable` booleans; `minClientVersion` a text; `license` {type, value}; `packageTypes` [{name, version?}];
    `repository` {type?, url?, branch?, commit?};
    `dependencyGroups` [{targetFramework?, dependencies: [{id, range, include?, exclude?}]}], where an empty `range`
    means any version.
    """

    id: PackageId
    version: NuGetVersion
    metadata: dict[str, object]


def parse_nuspec(data: bytes) -> Nuspec:
    """Read a nuspec: UTF-8, no document type, in one of NuGet's namespaces or none.

    Raises:
        MetadataError: too large, not such a document, without valid id or version, or with a value out of bounds.
    """
    root = _parse(data)
    _demand(_name(root) == "package", "the nuspec's root element is not <package>")
    metadata = _children(root).get("metadata")
    if metadata is None:
        raise MetadataError("the nuspec has no <metadata>")
    children = _children(metadata)
    id, version = (_identity(children, name) for name in ("id", "version"))
    try:
        return Nuspec(PackageId.parse(id), NuGetVersion.parse(version), _metadata(metadata, children))
    except IdentityError as error:
        raise MetadataError(f"the nuspec says: {error.message}") from error


def _demand(is_so: bool, fault: str) -> None:  # noqa: FBT001 - it reads as a sentence
    if not is_so:
        raise MetadataError(fault)


# --- XML to elements


def _parse(data: bytes) -> Element:
    """Parse step by step, so that depth and counts are checked before a tree of any size stands in memory."""
    _demand(len(data) <= NUSPEC_MAX, f"the nuspec has {len(data)} bytes, more than {NUSPEC_MAX}")
    _check_encoding(data)
    depth = elements = 0
    root: Element | None = None
    try:
        for event, element in iterparse(io.BytesIO(data), events=("start", "end"), forbid_dtd=True):
            if event == "end":
                depth -= 1
                continue
            root = element if root is None else root
            depth, elements = depth + 1, elements + 1
            if depth > DEPTH_MAX or elements > ELEMENTS_MAX or len(element.attrib) > ATTRIBUTES_MAX:
                raise MetadataError(
                    f"the nuspec is larger than {DEPTH_MAX} levels, {ELEMENTS_MAX} elements "
                    f"or {ATTRIBUTES_MAX} attributes on one of them",
                )
    except DefusedXmlException as error:
        raise MetadataError("the nuspec has a document type or entities, which are refused") from error
    except (ParseError, ValueError) as error:
        raise MetadataError(f"the nuspec is not readable XML: {error}") from error
    if root is None:
        raise MetadataError("the nuspec is empty")
    return root


def _check_encoding(data: bytes) -> None:
    """Only UTF-8, said or unsaid: two readers that disagree about the encoding read two packages."""
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        raise MetadataError("the nuspec is not UTF-8") from error
    said = _ENCODING.match(text)
    says_so = said is None or said[1].lower() in {"utf-8", "us-ascii"}
    _demand("\0" not in text and says_so, "the nuspec is not UTF-8 or says that it is not")


def _name(element: Element) -> str:
    """The local name in one of our namespaces; '' for an element of somebody else's."""
    tag = str(element.tag)
    if not tag.startswith("{"):
        return tag
    namespace, _, local = tag[1:].partition("}")
    return local if _NAMESPACE.fullmatch(namespace) else ""


def _children(element: Element) -> dict[str, Element]:
    """Child elements by name. One that stands twice is refused, as readers differ in which one they take."""
    found: dict[str, Element] = {}
    for child in element:
        name = _name(child)
        _demand(not name or found.setdefault(name, child) is child, f"the nuspec has <{name[:100]}> twice")
    return found


def _named(element: Element, name: str) -> Iterator[Element]:
    return (child for child in element if _name(child) == name)


# --- elements to values


def _bounded(name: str, text: str) -> str:
    _demand(len(text) <= TEXT_MAX, f"the nuspec's {name} has {len(text)} characters, more than {TEXT_MAX}")
    return text


def _identity(children: dict[str, Element], name: str) -> str:
    """Id or version exactly as written: what a path will be made of is not tidied up."""
    _demand(name in children, f"the nuspec has no <{name}>")
    return _text(children[name], strip=False)


def _text(element: Element, *, strip: bool = True) -> str:
    text = _bounded(f"<{_name(element)}>", "".join(element.itertext()))
    return text.strip() if strip else text


def _attributes(element: Element, *names: str) -> dict[str, object]:
    """The named attributes that are there and not empty."""
    found = ((name, _bounded(f"attribute {name}", element.get(name, "").strip())) for name in names)
    return {name: value for name, value in found if value}


def _metadata(element: Element, children: dict[str, Element]) -> dict[str, object]:
    readers: dict[str, Callable[[Element], object]] = {
        **dict.fromkeys(_TEXTS, _text),
        **dict.fromkeys(_FLAGS, _flag),
        "tags": _tags,
        "license": _license,
        "packageTypes": _package_types,
        "repository": lambda repository: _attributes(repository, "type", "url", "branch", "commit"),
    }
    values = {name: read(children[name]) for name, read in readers.items() if name in children}
    if "dependencies" in children:
        values["dependencyGroups"] = _dependency_groups(children["dependencies"])
    return _attributes(element, "minClientVersion") | {
        name: value for name, value in values.items() if value not in ("", [], {})
    }


def _flag(element: Element) -> bool:
    text = _text(element)
    known = text.lower() in _BOOLEANS
    _demand(known, f"the nuspec's <{_name(element)}> is {text[:40]!r}, neither true nor false")
    return _BOOLEANS[text.lower()]


def _tags(element: Element) -> list[str]:
    """Split at spaces, commas and semicolons, as the public gallery does."""
    return [tag for tag in re.split(r"[\s,;]+", _text(element)) if tag]


def _license(element: Element) -> dict[str, object]:
    kind = element.get("type", "")
    fault = f"the nuspec's <license> is of type {kind[:40]!r}, neither 'expression' nor 'file'"
    _demand(kind in {"expression", "file"}, fault)
    return {"type": kind, "value": _text(element)}


def _package_types(element: Element) -> list[dict[str, object]]:
    types = [_attributes(child, "name", "version") for child in _named(element, "packageType")]
    _demand(all("name" in kind for kind in types), "the nuspec has a <packageType> without a name")
    return types


def _dependency_groups(element: Element) -> list[dict[str, object]]:
    """Groups in their order; dependencies outside of any (the form before groups) are one group for all frameworks."""
    groups = list(_named(element, "group"))
    loose = _dependencies(element)
    _demand(not (groups and loose), "the nuspec's <dependencies> mixes groups and single dependencies")
    if loose:
        return [{"dependencies": loose}]
    return [_attributes(group, "targetFramework") | {"dependencies": _dependencies(group)} for group in groups]


def _dependencies(element: Element) -> list[dict[str, object]]:
    return [_dependency(child) for child in _named(element, "dependency")]


def _dependency(element: Element) -> dict[str, object]:
    """`range` is NuGet's interval notation as written; no dependency is ever resolved here."""
    id = PackageId.parse(element.get("id", "").strip())
    given = _attributes(element, "version", "include", "exclude")
    range = given.pop("version", "")
    return {"id": id.text, "range": range, **given}
