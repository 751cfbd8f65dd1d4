"""Reading the bytes of a `Piece`: a file, a slice of an archive, or a URL. What changed or vanished is an error that says so."""

import os
from types import TracebackType

from data_tools.download import download
from data_tools.sources import UNKNOWN_SIZE, Piece


class PieceReader:
    """Reads pieces, keeping archives open. Use as a context manager."""

    def __init__(self) -> None:
        self._archives: dict[str, int] = {}

    def __enter__(self) -> "PieceReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._archives.values():
            os.close(handle)
        self._archives.clear()

    def read(self, piece: Piece) -> bytes:
        """The bytes of a piece.

        Raises:
            ValueError: It cannot be read, or has not the size that it had when it was listed.
            UnreachableError: A URL that gave nothing (data_tools/download.py).
        """
        if piece.is_remote:
            return download(piece.place)
        try:
            data = self._read_slice(piece) if piece.offset is not None else _read_file(piece.place)
        except OSError as error:
            raise ValueError(
                f"{piece.place}: cannot be read ({error.strerror}). Repair or remove the file, then run the same command again."
            ) from error
        if piece.size not in (UNKNOWN_SIZE, len(data)):
            raise ValueError(
                f"{piece.place}: has {len(data)} bytes, but had {piece.size} when the source was listed. Let nothing change the"
                " source while it is packed, then run the same command again with --overwrite."
            )
        return data

    def _read_slice(self, piece: Piece) -> bytes:
        assert piece.offset is not None
        if piece.place not in self._archives:
            self._archives[piece.place] = os.open(piece.place, os.O_RDONLY)
        return os.pread(self._archives[piece.place], piece.size, piece.offset)


def _read_file(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.readall()
