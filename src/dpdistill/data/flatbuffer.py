"""Reads Google's flatbuffers, the language of Arrow's metadata, with every offset checked.

Format: https://flatbuffers.dev/internals. A table is a position; its vtable, found through a signed offset, says where
each numbered field (slot) lies. All offsets come from the file, so each access is checked against the buffer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator


class FlatbufferError(ValueError):
    """An offset leads out of the buffer."""


class Table:
    """A table in a buffer."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at
        self.vtable = at - self.unpack("<i", at)
        self.vtable_bytes = self.unpack("<H", self.vtable)

    @staticmethod
    def root(data: bytes) -> Table:
        """Returns the table that a buffer holds."""
        if len(data) < 8:
            raise FlatbufferError("too short")
        return Table(data, struct.unpack_from("<I", data)[0])

    def unpack(self, form: str, at: int) -> int:
        """Returns one number at a position."""
        if not 0 <= at <= len(self.data) - struct.calcsize(form):
            raise FlatbufferError("outside the buffer")
        return int(struct.unpack_from(form, self.data, at)[0])

    def place(self, slot: int) -> int:
        """Returns the position of a field, or 0 if it is absent."""
        if 4 + 2 * slot + 2 > self.vtable_bytes:
            return 0
        offset = self.unpack("<H", self.vtable + 4 + 2 * slot)
        return self.at + offset if offset else 0

    def number(self, slot: int, form: str, default: int = 0) -> int:
        """Returns a number, of a `struct` form."""
        at = self.place(slot)
        return self.unpack(form, at) if at else default

    def follow(self, at: int) -> int:
        """Returns the position that an offset refers to."""
        return at + self.unpack("<I", at)

    def table(self, slot: int) -> Table | None:
        """Returns a table."""
        at = self.place(slot)
        return Table(self.data, self.follow(at)) if at else None

    def vector(self, slot: int, item_bytes: int) -> tuple[int, int]:
        """Returns (position, length) of a vector; (0, 0) if it is absent. All its items lie in the buffer."""
        at = self.place(slot)
        if not at:
            return 0, 0
        start = self.follow(at)
        length = self.unpack("<I", start)
        if start + 4 + length * item_bytes > len(self.data):
            raise FlatbufferError("a vector is longer than the buffer")
        return start + 4, length

    def text(self, slot: int) -> bytes:
        """Returns a string, as bytes."""
        start, length = self.vector(slot, 1)
        return self.data[start : start + length]

    def tables(self, slot: int) -> Iterator[Table]:
        """Yields the tables of a vector."""
        start, length = self.vector(slot, 4)
        for i in range(length):
            yield Table(self.data, self.follow(start + 4 * i))

    def longs(self, slot: int, per_item: int) -> list[tuple[int, ...]]:
        """Returns a vector of structs of int64."""
        start, length = self.vector(slot, 8 * per_item)
        return [struct.unpack_from(f"<{per_item}q", self.data, start + 8 * per_item * i) for i in range(length)]
