"""The scanner finds what tarfile finds, in any format; damage and lies end in ArchiveError."""

import contextlib
import hashlib
import io
import itertools
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.tarscan import ArchiveError, Kind, scan_tar
from data_tools.tarwriter import tar_header
from tests.data_tools.layouts import tar_bytes

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
FILES = {"a.jpg": b"x" * 700, "deep/" * 12 + "b.jpg": b"", "c" * 90 + ".json": b"y" * 512, "d/e.cls": b"3"}
LONG = {"n" * 300 + ".jpg": b"long", "ünï/cödé.jpg": b"z" * 1025, "plain.jpg": b"p"}


def found(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    return {m.name: data[m.data : m.data + m.size] for m in scan_tar(path)}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read(tmp_path: Path, kind: int) -> None:
    files = FILES if kind == tarfile.USTAR_FORMAT else FILES | LONG
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(files, kind))
    assert found(path) == files
    members = list(scan_tar(path))
    assert members[0].header == 0
    assert all(one.end == two.header for one, two in itertools.pairwise(members))


def test_a_tar_inside_a_tar_is_read_in_place(tmp_path: Path) -> None:
    path = tmp_path / "outer.tar"
    path.write_bytes(tar_bytes({"inner.tar": tar_bytes(FILES), "other.tar": tar_bytes(LONG)}))
    data = path.read_bytes()
    inner, other = scan_tar(path)
    for member, files in ((inner, FILES), (other, LONG)):
        members = scan_tar(path, start=member.data, end=member.data + member.size)
        assert {m.name: data[m.data : m.data + m.size] for m in members} == files


def test_kinds_are_told_apart(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("s", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE), ("p", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "target"
            tar.addfile(member)
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    assert [m.kind for m in scan_tar(tmp_path / "a.tar")] == [Kind.DIRECTORY, Kind.LINK, Kind.LINK, Kind.OTHER]


@given(st.integers(0, 10**6), st.integers(0, 255), st.booleans(), st.sampled_from(FORMATS))
def test_damage_ends_in_an_archive_error_or_in_members(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, cut: bool, kind: int
) -> None:
    data = bytearray(tar_bytes(FILES if kind == tarfile.USTAR_FORMAT else FILES | LONG, kind))
    position %= len(data)
    if cut:
        del data[position:]
    else:
        data[position] = value
    path = tmp_path_factory.mktemp("fuzz") / "a.tar"
    path.write_bytes(data)
    with contextlib.suppress(ArchiveError):  # any other exception fails the test
        for member in scan_tar(path):
            assert 0 <= member.header < member.data <= member.data + member.size <= len(data)


def test_a_member_that_claims_more_than_there_is_is_refused(tmp_path: Path) -> None:
    header = tar_header("bomb.jpg", 8**11 - 1)
    (tmp_path / "a.tar").write_bytes(header + bytes(5000))
    with pytest.raises(ArchiveError, match="cut off"):
        list(scan_tar(tmp_path / "a.tar"))


@pytest.mark.parametrize(("content", "message"), [(b"", "holds no tar"), (b"PK" + bytes(600), r"compressed \(zip\)")])
def test_what_is_no_tar_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ArchiveError, match=message):
        list(scan_tar(tmp_path / "a.tar"))
    with pytest.raises(ArchiveError, match="cannot be read"):
        list(scan_tar(tmp_path / "b.tar"))


@given(st.text("abc/_é.0", min_size=1, max_size=130).map(lambda name: f"a{name}b"), st.integers(0, 2**32))
def test_tarfile_reads_our_headers(name: str, size: int) -> None:
    header = tar_header(name, size)
    assert len(header) % 512 == 0
    with tarfile.open(fileobj=io.BytesIO(header + bytes(1024)), mode="r:") as tar:
        member = tar.firstmember
    assert member is not None
    assert (member.name, member.size, member.mode, member.mtime) == (name, size, 0o644, 0)


def test_the_bytes_of_a_header_are_fixed() -> None:
    # Shards made by another version of Python or of this program must have equal bytes.
    digest = hashlib.sha256(tar_header("n01440764/n01440764_18.jpg", 110_000) + tar_header("ü" * 70, 5)).hexdigest()
    assert digest == "31ad9d765678fd5d74eae4713e75fe82b1da3881a8f432a065c158f2e08f92fb"
