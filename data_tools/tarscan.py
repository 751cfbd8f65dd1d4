"""Where the members of a tar lie: headers are read, nothing is unpacked, and nothing a header says is trusted.

Reads what tar programs write for plain files (ustar, GNU long names, pax), from a whole file or from a tar inside a tar, and
refuses archives that are cut off, damaged or lie about their sizes. A member is read as a slice of the outer file.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

BLOCK = 512
_LONGEST_NAME = 2**20  # bytes of a GNU long name or of pax records; more is an attack
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd", b"PK": "zip"}


class ArchiveError(ValueError):
    """An archive that cannot be used; the message names it, the reason and what to do."""


class Kind(Enum):
    """What a member is. Only files are ever read."""

    FILE = "file"
    DIRECTORY = "directory"
    LINK = "link"
    OTHER = "device, pipe or sparse file"


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member: `header` and `data` count bytes from the start of the outermost file; `header` is its first header block."""

    name: str
    kind: Kind
    header: int
    data: int
    size: int

    @property
    def end(self) -> int:
        """First byte after its padding."""
        return self.data + self.size + -self.size % BLOCK


@dataclass
class _Extended:
    """What extended headers say about the member that follows them."""

    name: str | None = None
    size: int | None = None
    sparse: bool = False
    header: int | None = None


def scan_tar(path: Path | str, *, start: int = 0, end: int | None = None) -> Iterator[TarMember]:
    """Yield the members of the tar in bytes [start, end) of a file, in their order.

    Raises:
        ArchiveError: No tar, compressed, damaged or cut off; an end that is missing is found after the last member.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read ({error.strerror}). Give the path of a tar archive.") from error
    try:
        yield from _scan(handle, str(path), start, os.fstat(handle).st_size if end is None else end)
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read ({error.strerror}). Repair the disk or copy the archive again.") from error
    finally:
        os.close(handle)


def _scan(handle: int, path: str, start: int, end: int) -> Iterator[TarMember]:
    at, extended, closed = start, _Extended(), False
    while at < end and not closed:
        block = os.pread(handle, BLOCK, at)
        if not block.strip(b"\0") and len(block) == BLOCK:
            closed = True
            continue
        member = _parse(block, path, at, start, end, extended)
        flag = block[156:157]
        if flag in b"LKxg":
            _extend(extended, flag, member, handle, path)
        else:
            yield member
            extended = _Extended()
        at = member.end
    if at == start:
        raise ArchiveError(f"{path}: holds no tar, or one without members{_within(start)}. Give a tar archive with images.")
    if extended.header is not None:
        raise _cut_off(path, at)
    if not closed:
        close = f" If nothing is missing, close it: head -c 1024 /dev/zero >> {path}" if start == 0 else ""
        raise ArchiveError(
            f"{path}: the archive is cut off: it ends at byte {at:,} without the empty block that closes a tar, so that members"
            f" may be missing. Compare its checksum, download it again.{close}"
        )


def _parse(block: bytes, path: str, at: int, start: int, end: int, extended: _Extended) -> TarMember:
    if len(block) < BLOCK:
        raise _cut_off(path, at)
    if not _checksum_fits(block):
        known = _COMPRESSED.get(block[:2]) if at == start else None
        what = f"is compressed ({known})" if known else f"has no tar header at byte {at:,}"
        fix = "Unpack it to the plain .tar first" if known else "It is no tar or is damaged: compare its checksum, copy it again"
        raise ArchiveError(f"{path}: {what}. {fix}.")
    size = _number(block[124:136], path, at) if extended.size is None or block[156:157] in b"LKxg" else extended.size
    member = TarMember(
        name=extended.name if extended.name is not None else _name(block),
        kind=Kind.OTHER if extended.sparse else _kind(block[156:157]),
        header=at if extended.header is None else extended.header,
        data=at + BLOCK,
        size=0 if block[156:157] in b"123456" and block[156:157] else size,
    )
    if member.size < 0 or member.data + member.size > end:
        raise _cut_off(path, at)
    return member


def _extend(extended: _Extended, flag: bytes, member: TarMember, handle: int, path: str) -> None:
    """Take over what a long-name or pax header says about the next member."""
    if member.size > _LONGEST_NAME:
        raise ArchiveError(
            f"{path}: a name of {member.size:,} bytes at byte {member.header:,}. The archive is damaged or hostile."
        )
    if extended.header is None:
        extended.header = member.header
    if flag in b"Kg":
        return
    content = os.pread(handle, member.size, member.data)
    if flag == b"L":
        extended.name = _text(content.split(b"\0")[0])
        return
    for keyword, value in _pax_records(content, path, member.header):
        if keyword == b"path":
            extended.name = _text(value)
        elif keyword == b"size":
            extended.size = int(value) if value.isdigit() else -1
        extended.sparse |= keyword.startswith(b"GNU.sparse")


def _pax_records(content: bytes, path: str, at: int) -> Iterator[tuple[bytes, bytes]]:
    position = 0
    while position < len(content) and content[position : position + 1] != b"\0":
        digits, space, _ = content[position : position + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        keyword, equals, value = content[position + len(digits) + 1 : position + length].partition(b"=")
        if not (space and equals and value.endswith(b"\n")) or position + length > len(content):
            raise ArchiveError(f"{path}: damaged pax header at byte {at:,}. Compare the archive's checksum, copy it again.")
        yield keyword, value[:-1]
        position += length


def _checksum_fits(block: bytes) -> bool:
    stated = block[148:156].strip(b" \0")
    try:
        return int(stated, 8) == sum(block) - sum(block[148:156]) + 8 * ord(" ")
    except ValueError:
        return False


def _number(field: bytes, path: str, at: int) -> int:
    if field[0] & 0x80:  # base 256, for sizes from 8 GiB on
        return int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise ArchiveError(
            f"{path}: damaged tar header at byte {at:,}. Compare the archive's checksum, copy it again."
        ) from error


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _kind(flag: bytes) -> Kind:
    return {b"0": Kind.FILE, b"\0": Kind.FILE, b"7": Kind.FILE, b"5": Kind.DIRECTORY, b"1": Kind.LINK, b"2": Kind.LINK}.get(
        flag, Kind.OTHER
    )


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _within(start: int) -> str:
    return f" (at byte {start:,})" if start else ""


def _cut_off(path: str, at: int) -> ArchiveError:
    return ArchiveError(
        f"{path}: the archive is cut off: its member at byte {at:,} is not complete. Compare its checksum, download it again."
    )
