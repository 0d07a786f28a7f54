"""The yardstick of benchmarks/prepare.py: decompress, `json.loads` every line, and nothing else.

    python -m benchmarks.plain_pass FILE.zst ...

Prints the number of lines, and the bytes of the longest file when it is decompressed.
"""

from __future__ import annotations

import io
import json
import sys

import zstandard


def plain_pass(*files: str) -> tuple[int, int]:
    """(lines, bytes of the longest file) of dumps that demand a window of 2 GiB."""
    n_lines = longest = 0
    for name in files:
        n_bytes = 0
        with open(name, "rb") as file:
            reader = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(file)
            for line in io.BufferedReader(reader, 1 << 18):
                json.loads(line)
                n_lines += 1
                n_bytes += len(line)
        longest = max(longest, n_bytes)
    return n_lines, longest


if __name__ == "__main__":
    print(*plain_pass(*sys.argv[1:]))
