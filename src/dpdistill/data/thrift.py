"""Reads Thrift's compact protocol, the language of Parquet's metadata, into plain dicts and lists, with bounds on all.

Format: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md. A struct becomes a dict from
field number to value; a map is refused, since Parquet has none.
"""

from __future__ import annotations

import struct
from typing import Any

MAX_DEPTH = 16
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12


class ThriftError(ValueError):
    """The bytes are not a compact Thrift struct, or pass a bound."""


class CompactReader:
    """A position in some bytes. `budget` bounds the number of values, so that work is bounded too."""

    def __init__(self, data: bytes, budget: int = 2**19) -> None:
        self.data, self.at, self.budget = data, 0, budget

    def take(self, n_bytes: int) -> bytes:
        """Returns the next bytes."""
        if n_bytes > len(self.data) - self.at:
            raise ThriftError("ends too soon")
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]

    def varint(self) -> int:
        """Returns an unsigned integer of up to 64 bits, seven bits a byte."""
        value = 0
        for shift in range(0, 64, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ThriftError("an integer is too long")

    def zigzag(self, bits: int) -> int:
        """Returns a signed integer, refused if it does not fit the bits that the field has."""
        coded = self.varint()
        if coded >> bits:
            raise ThriftError("an integer is too large for its field")
        return (coded >> 1) ^ -(coded & 1)

    def value(self, kind: int, depth: int) -> Any:
        """Returns one value of a wire type."""
        self.budget -= 1
        if self.budget < 0 or depth > MAX_DEPTH:
            raise ThriftError("too many values, or nested too deep")
        if kind in (I16, I32, I64):
            return self.zigzag({I16: 16, I32: 32, I64: 64}[kind])
        if kind == BINARY:
            return self.take(self.varint())
        if kind == STRUCT:
            return self.struct(depth + 1)
        if kind in (LIST, SET):
            return self.list(depth + 1)
        if kind == BYTE:
            return self.take(1)[0]
        if kind == DOUBLE:
            return struct.unpack("<d", self.take(8))[0]
        raise ThriftError("unknown type")

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Returns the fields of a struct by number. A repeated field is refused."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self.take(1)[0]:
            delta, kind = head >> 4, head & 0x0F
            number = number + delta if delta else self.zigzag(16)
            if number in fields:
                raise ThriftError("a field is repeated")
            fields[number] = kind == TRUE if kind in (TRUE, FALSE) else self.value(kind, depth)
        return fields

    def list(self, depth: int) -> list[Any]:
        """Returns the elements of a list or set; each takes at least a byte, so the length is bounded by the data."""
        head = self.take(1)[0]
        size, kind = head >> 4, head & 0x0F
        if size == 15:
            size = self.varint()
        if size > len(self.data) - self.at:
            raise ThriftError("a list is longer than the data")
        if kind in (TRUE, FALSE):
            return [byte == TRUE for byte in self.take(size)]
        return [self.value(kind, depth) for _ in range(size)]
