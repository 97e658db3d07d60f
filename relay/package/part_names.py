"""Names of parts: how they are laid down, which no system can hold, and which of them a file system takes for one file.

A name is unescaped and laid down as NuGet does it (`Uri.UnescapeDataString` and `Path.Combine` in
`PackageArchiveReader.CopyFiles`). What Windows would change or take for something else is refused everywhere, so that a
tree looks the same everywhere; names that are odd and nothing worse are kept.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NoReturn
from unicodedata import normalize

from relay.errors import ArchiveError


@dataclass(frozen=True, slots=True)
class NameLimits:
    """How long names may be. Real ones stay far below."""

    path_bytes: int = 1024
    component: int = 255
    """Bytes (UTF-8) of one component of a path: what Linux file systems hold."""
    depth: int = 64
    """Components of a path."""


_DEVICE: Final = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3]) *(\..*)?", re.IGNORECASE
)
_FORBIDDEN: Final = re.compile(r'[\x00-\x1f\x7f-\x9f<>:"|?*\\]')
"""Control characters, and what Windows keeps for itself: packages install there too."""
_PASSED_OVER: Final = dict.fromkeys([*range(0x200C, 0x2010), *range(0x202A, 0x202F), *range(0x206A, 0x2070), 0xFEFF])
"""Joiners and direction marks: HFS+ passes over them when it compares names."""
_SHORT_NAME: Final = re.compile(r"(?P<stem>[^./~]{1,6})~[0-9]{1,6}(?:\.(?P<extension>[^./]{1,3}))?")
"""What Windows gives a long name as a second one, in folded form: `progra~1`."""
_ESCAPES: Final = re.compile(r"(?:%[0-9A-Fa-f]{2})+")
_NOT_IN_SHORT_NAMES: Final = re.compile(r"[ .]")


def _refuse(rule: str, detail: str, member: str) -> NoReturn:
    raise ArchiveError(rule, detail, member=member)


# --- one name


def laid_down(name: str) -> str:
    """Where NuGet lays a part of this name: a relative path with '/', a folder's with '/' at its end.

    One '/' in front is dropped, as are '.' and nothing between two '/'. It may still be a path that `path_fault` refuses.

    Raises:
        ArchiveError: rule name, it is absolute.
    """
    path = unescaped(name.removeprefix("/"))
    if path.startswith("/"):
        _refuse("name", "an absolute path", name)
    *folders, last = path.split("/")
    return "/".join([*(folder for folder in folders if folder not in {"", "."}), last])


def unescaped(name: str) -> str:
    """A name without the escapes that stand for UTF-8. Others stay as they are, as .NET has it."""
    return _ESCAPES.sub(lambda run: "".join(_decoded(run[0])), name)


def _decoded(escapes: str) -> Iterator[str]:
    at = 0
    for character in bytes.fromhex(escapes.replace("%", "")).decode(errors="surrogateescape"):
        is_byte = "\udc80" <= character <= "\udcff"
        size = 1 if is_byte else len(character.encode())
        yield escapes[3 * at : 3 * (at + size)] if is_byte else character
        at += size


def path_fault(path: str, limits: NameLimits) -> str:
    """Why this relative path with '/' cannot be a part's, or ''."""
    if not path:
        return "an empty name"
    components = path.split("/")
    if len(path.encode("utf-8", "surrogatepass")) > limits.path_bytes:
        return f"a path of more than {limits.path_bytes} bytes"
    if len(components) > limits.depth:
        return f"a path of more than {limits.depth} components"
    return next((fault for component in components if (fault := _component_fault(component, limits))), "")


def _component_fault(component: str, limits: NameLimits) -> str:
    if component in {"", ".", ".."}:
        return "a path that is absolute, or has '.', '..' or nothing between two '/'"
    if _FORBIDDEN.search(component):
        return 'a control character, a backslash or one of <>:"|?*'
    if component[-1] in ". ":
        return "a name that ends in a dot or a space, which Windows would drop"
    if _DEVICE.fullmatch(component):
        return "the name of a Windows device"
    try:
        size = len(component.encode())
    except UnicodeEncodeError:
        return "a name that is not UTF-8"
    return f"a name of more than {limits.component} bytes" if size > limits.component else ""


# --- several names


def check_paths(paths: list[str], limits: NameLimits) -> None:
    """What the walk demands of the parts' paths, for a list that came another way (a manifest).

    Raises:
        ArchiveError: rules name, duplicate or collision.
    """
    for path in paths:
        if fault := path_fault(path, limits):
            _refuse("name", fault, path)
    check_collisions(paths)


def check_collisions(paths: list[str]) -> None:
    """No two may be one file to a file system, and none may be a folder of another's path.

    Raises:
        ArchiveError: rule duplicate or collision.
    """
    files: dict[str, str] = {}
    for path in paths:
        key = folded(path)
        if key in files:
            rule = "duplicate" if files[key] == path else "collision"
            _refuse(rule, f"stands for the same file as {files[key][:100]!a}", path)
        files[key] = path
    for key, path in files.items():
        if fault := _folder_collision(key, files):
            _refuse("collision", f"needs a folder where there is the file {fault[:100]!r}", path)
    _check_short_names(files)


def folded(path: str) -> str:
    """A key that two paths share if a file system of today may take them for one: by case, by form, by what it ignores.

    Case is folded character by character, as NTFS and APFS do: ß is not ss. Forms are compared as APFS does (é may be one
    character or two), and what HFS+ passes over is left out.
    """
    if path.isascii():
        return path.lower()
    return "".join(map(_folded_character, normalize("NFD", path.translate(_PASSED_OVER))))


def _folded_character(character: str) -> str:
    """Simple case folding (Unicode's classes C and S): full folding where that is one character."""
    return next((form for form in (character.casefold(), character.lower()) if len(form) == 1), character)


def _folder_collision(key: str, files: dict[str, str]) -> str:
    folder = key.removesuffix("/") if key.endswith("/") else key.rpartition("/")[0]
    while folder:
        if folder in files:
            return files[folder]
        folder = folder.rpartition("/")[0]
    return ""


def _check_short_names(files: dict[str, str]) -> None:
    """No name may be one that Windows gives its neighbour as a short name: `PROGRA~1` beside `Program Files`."""
    short = {(folder, name): path for path in files if "~" in path for folder, name in _steps(path) if "~" in name}
    if not short:
        return
    neighbours: defaultdict[str, set[str]] = defaultdict(set)
    folders = {folder for folder, _ in short}
    for path in files:
        for folder, name in _steps(path):
            if folder in folders:
                neighbours[folder].add(name)
    for (folder, name), path in short.items():
        if other := next((each for each in sorted(neighbours[folder]) if _is_short_for(name, each)), ""):
            _refuse("collision", f"has the short name that Windows may give to {other[:100]!r}", files[path])


def _steps(path: str) -> Iterable[tuple[str, str]]:
    """Each component of a path, with the folder it stands in."""
    components = path.removesuffix("/").split("/")
    return (("/".join(components[:at]), name) for at, name in enumerate(components))


def _is_short_for(short: str, long: str) -> bool:
    """Whether Windows may call the file `long` by the name `short`, too. Both are folded.

    A short name is the first six characters (or two, and four digits of a checksum), a number, three of the extension.
    """
    match = _SHORT_NAME.fullmatch(short)
    stem, dot, extension = long.rpartition(".")
    if not dot or not stem:
        stem, extension = long.removeprefix("."), ""
    is_long = len(stem) > 8 or len(extension) > 3 or bool(_NOT_IN_SHORT_NAMES.search(stem)) or long.startswith(".")
    if match is None or not is_long:
        return False
    wanted, plain = match["stem"], _NOT_IN_SHORT_NAMES.sub("", stem)
    is_checksum = bool(re.fullmatch(r".{2}[0-9a-f]{4}", wanted)) and plain.startswith(wanted[:2])
    same_stem = plain.startswith(wanted) or is_checksum
    return same_stem and (match["extension"] or "") == _NOT_IN_SHORT_NAMES.sub("", extension)[:3]
