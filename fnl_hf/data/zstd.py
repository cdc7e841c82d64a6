"""Files compressed with zstd, read with whichever package is available."""

import io
from typing import Any, BinaryIO

from fsspec.compression import compr

try:
    import zstandard
except ImportError:
    zstandard = None  # type: ignore[assignment]

BLOCK_BYTES = 2**17  # bytes read at a time
LARGEST_WINDOW = 2**31  # of ``zstd --long=31``, as archives have it; the library's own limit is 2**27


def open_zstd(compressed: BinaryIO) -> BinaryIO:
    """The decompressed content of a file with any number of frames.

    Raises:
        EOFError: in reading, the file is cut.
    """
    if zstandard is None:  # fsspec has found Python's own (3.14) or its backport
        return compr["zstd"](compressed, mode="rb")
    return io.BufferedReader(ZstandardFile(compressed), BLOCK_BYTES)


class ZstandardFile(io.RawIOBase):
    """A file decompressed by ``zstandard``, whose own reader ends with the first frame, accepts truncated files and has
    no lines."""

    def __init__(self, compressed: BinaryIO):
        self._compressed = compressed
        self._frame: Any = None  # being read
        self._text = memoryview(b"")  # decompressed, but not returned yet

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._text and (block := self._next_block()):
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()
            self._text = memoryview(self._frame.decompress(block))
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size

    def _next_block(self) -> bytes:
        """Compressed bytes of one frame; empty after the last."""
        rest = b""
        if self._frame is not None and self._frame.eof:
            rest, self._frame = self._frame.unused_data, None
        block = rest or self._compressed.read(BLOCK_BYTES)
        if not block and self._frame is not None:
            raise EOFError("Compressed file ended before the end-of-stream marker was reached")
        return block
