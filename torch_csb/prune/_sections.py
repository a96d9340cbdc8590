"""A file of named sections under a JSON header. Nothing of a file is used before its sizes and checksums hold.

Little-endian: 8 bytes magic, uint32 length of the header, uint32 crc32 of the header, the header, the sections one
after the other. The header's ``sections`` is ``{name: [stored bytes, plain bytes, crc32 of the stored bytes]}``; a
section with fewer stored than plain bytes is a raw deflate stream of Huffman codes without matches.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAGIC = b"torchcsb"
FORMAT = "torch_csb.compressed"
VERSION = 1
_HEAD = struct.Struct("<8sII")
# A Huffman code has at least one bit, so no honest section grows more than this when it is read.
_MAX_GROWTH = 8


def write(path: Path, fields: Mapping[str, Any], sections: Mapping[str, bytes]) -> int:
    """Writes the file whole or not at all.

    Returns:
        Its bytes.
    """
    stored = {name: _deflate(data) for name, data in sections.items()}
    table = {name: [len(data), len(sections[name]), zlib.crc32(data)] for name, data in stored.items()}
    header = {"format": FORMAT, "version": VERSION, **fields, "sections": table}
    text = json.dumps(header, separators=(",", ":")).encode()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(_HEAD.pack(MAGIC, len(text), zlib.crc32(text)))
            file.write(text)
            file.writelines(stored.values())
            size = file.tell()
            file.flush()
            # Without this a crash soon after could leave the new name with old or no data.
            os.fsync(file.fileno())
        if path.exists():
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return size


def _deflate(data: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    packed = coder.compress(data) + coder.flush()
    return packed if len(packed) < len(data) else data


class Sections:
    """A file whose header, sizes and checksums hold: ``header``, and :meth:`take` for the plain bytes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, altered, of another kind or of a newer version; it names the section.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        data = memoryview(path.read_bytes())
        self.header, start = _read_header(data)
        self._stored: dict[str, memoryview] = {}
        self._sizes: dict[str, int] = {}
        for name, record in table(self.header, "sections").items():
            if not isinstance(record, list) or len(record) != 3 or not all(is_size(number) for number in record):
                raise ValueError(f"header: section {name!r}: expected three sizes, got {record!r:.80}")
            stored, size, checksum = record
            part = data[start : start + stored]
            if len(part) != stored:
                raise ValueError(f"section {name!r}: expected {stored} bytes, got {len(part)}; the file is truncated")
            if zlib.crc32(part) != checksum:
                raise ValueError(
                    f"section {name!r}: expected crc32 {checksum:08x}, got {zlib.crc32(part):08x}; the file was altered"
                )
            if not stored <= size <= _MAX_GROWTH * stored:
                raise ValueError(
                    f"section {name!r}: expected {stored} to {_MAX_GROWTH * stored} plain bytes, got {size}"
                )
            start += stored
            self._stored[name], self._sizes[name] = part, size
        if start != len(data):
            raise ValueError(f"end of the file: expected {start} bytes in all, got {len(data)}")

    def take(self, name: str, size: int | None = None) -> bytearray:
        """The plain bytes of a section, which must be ``size`` many; each section is read once."""
        if name not in self._stored:
            raise ValueError(f"section {name!r}: expected once, got none")
        stored, declared = self._stored.pop(name), self._sizes[name]
        if size is not None and declared != size:
            raise ValueError(f"section {name!r}: expected {size} plain bytes, got {declared}")
        if len(stored) == declared:
            return bytearray(stored)
        decoder = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            # One byte more shows a stream that is too long, and a limit of 0 would be none.
            plain = decoder.decompress(stored, declared + 1)
        except zlib.error as error:
            raise ValueError(f"section {name!r}: expected a deflate stream, got {error}") from error
        if len(plain) != declared or not decoder.eof or decoder.unused_data:
            raise ValueError(f"section {name!r}: expected a deflate stream of {declared} bytes, got another length")
        return bytearray(plain)

    def finish(self) -> None:
        """Refuses sections that nothing asked for."""
        if self._stored:
            raise ValueError(f"section {next(iter(self._stored))!r}: belongs to no tensor of the header")


def _read_header(data: memoryview) -> tuple[dict[str, Any], int]:
    if bytes(data[: len(MAGIC)]) != MAGIC[: len(data)] or not data:
        raise ValueError("start of the file: not a file of save_compressed")
    if len(data) < _HEAD.size:
        raise ValueError(f"header: expected {_HEAD.size} bytes before it, got {len(data)}; the file is truncated")
    _, length, checksum = _HEAD.unpack_from(data)
    text = bytes(data[_HEAD.size : _HEAD.size + length])
    if len(text) != length:
        raise ValueError(f"header: expected {length} bytes, got {len(text)}; the file is truncated")
    if zlib.crc32(text) != checksum:
        raise ValueError(f"header: expected crc32 {checksum:08x}, got {zlib.crc32(text):08x}; the file was altered")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"header: expected JSON, got {text[:60]!r}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"header: expected format {FORMAT!r}, got {text[:60]!r}")
    version = header.get("version")
    if version != VERSION or not is_size(version):
        newer = is_size(version) and version > VERSION
        hint = "; a newer torch_csb wrote this file, please upgrade" if newer else ""
        raise ValueError(f"header: version: expected {VERSION}, got {version!r:.20}{hint}")
    return header, _HEAD.size + length


def table(header: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A JSON object of the header."""
    found = header.get(key)
    if not isinstance(found, dict):
        raise ValueError(f"header: {key}: expected an object, got {type(found).__name__}")
    return found


def is_size(number: object) -> bool:
    """Whether it is a count that torch can hold."""
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63
