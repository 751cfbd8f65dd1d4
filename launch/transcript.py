"""Turns what a program draws on a terminal into lines for a log file: a progress bar leaves its last state, not every redraw.

Understands what such bars use: carriage return, erase line, cursor up and down; other control sequences are dropped.
"""

import codecs
import re

# CSI (ESC [ parameters letter), OSC (ESC ] ... BEL or ESC \), two-character escapes; then the characters that move
TOKEN = re.compile(
    r"\x1b\[([0-9;?]*)([@-~])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\^_()][0-9A-B]?"
    r"|[\r\n\x08\x07]|[^\x1b\r\n\x08\x07]+|\x1b"
)
# An escape sequence that has not wholly arrived
PARTIAL = re.compile(r"\x1b(?:\[[0-9;?]*|\][^\x07\x1b]*\x1b?)?$")
OPEN_LINES = 24  # a live display is at most this high: lines above it are final


class Transcript:
    """Feed it what the terminal got; it gives back the lines that will not change any more."""

    def __init__(self):
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._partial = ""
        self._lines = [""]
        self._row = 0
        self._column = 0

    def feed(self, data: bytes) -> bytes:
        text = self._partial + self._decode(data)
        cut = PARTIAL.search(text)
        self._partial = text[cut.start() :] if cut else ""
        for token in TOKEN.finditer(text[: cut.start()] if cut else text):
            self._apply(token)
        return self._take(max(0, len(self._lines) - OPEN_LINES))

    def finish(self) -> bytes:
        """The lines that are still open."""
        while self._lines and not self._lines[-1].strip():
            self._lines.pop()
        return self._take(len(self._lines))

    def _take(self, count: int) -> bytes:
        taken, self._lines = self._lines[:count], self._lines[count:] or [""]
        self._row = max(0, self._row - count)
        return "".join(line.rstrip() + "\n" for line in taken).encode()

    def _apply(self, token: re.Match[str]) -> None:
        text, letter = token[0], token[2]
        if letter is not None:
            self._control(letter, token[1])
        elif text == "\r":
            self._column = 0
        elif text == "\n":
            self._down(1)
            self._column = 0
        elif text == "\x08":
            self._column = max(0, self._column - 1)
        elif text[0] not in "\x1b\x07":
            self._write(text)

    def _write(self, text: str) -> None:
        line = self._lines[self._row].ljust(self._column)
        self._lines[self._row] = line[: self._column] + text + line[self._column + len(text) :]
        self._column += len(text)

    def _down(self, count: int) -> None:
        self._row += count
        self._lines += [""] * (self._row + 1 - len(self._lines))

    def _control(self, letter: str, parameters: str) -> None:
        first = parameters.split(";")[0]
        count = int(first) if first.isdigit() else 0
        line = self._lines[self._row]
        if letter == "A":
            self._row = max(0, self._row - max(1, count))
        elif letter == "B":
            self._down(max(1, count))
        elif letter == "G":
            self._column = max(0, count - 1)
        elif letter == "K":
            kept = {0: line[: self._column], 1: " " * self._column + line[self._column :]}
            self._lines[self._row] = kept.get(count, "")
