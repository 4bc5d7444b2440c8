"""Checks a Parquet file's own metadata before pyarrow, which is C++ and may abort the process, is allowed to see it.

Parquet declares sizes twice: in the footer for each column chunk, and in a header before each page. pyarrow trusts
both. Here both are read, compared with each other and with the file, and capped. So a page can only be unpacked into
memory that the caps allow, and nothing points outside the file or to another file.

Format, and field numbers: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, Any

from dpdistill.data.limits import Limits, check_unpacked
from dpdistill.data.thrift import CompactReader, ThriftError
from dpdistill.errors import InputError

MAX_FOOTER_BYTES = 2**22
MAX_PAGE_HEADER_BYTES = 2**16
MAX_PAGES = 200_000
DATA_PAGE, INDEX_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = range(4)


@dataclass(frozen=True, kw_only=True)
class ParquetFacts:
    """What a checked file declares: rows, its writer's notes by key, and the largest dictionary.

    Every row may repeat the whole dictionary once unpacked, if that holds a single value.
    """

    n_rows: int
    dictionary_bytes: int
    metadata: dict[bytes, bytes]
    footer: bytes


def check_parquet(file: IO[bytes], size: int, path: str, columns: tuple[str, ...], limits: Limits) -> ParquetFacts:
    """Checks the footer, and the pages of the columns that will be read.

    Raises:
      InputError: damaged, contradicts itself, encrypted, refers to other files, or is too large once unpacked.
    """
    try:
        footer_bytes = read_footer(file, size, path)
        footer = CompactReader(footer_bytes).struct()
        metadata = {pair[1]: pair.get(2, b"") for pair in footer.get(5, [])}
        leaves = leaf_columns(footer[2])
        n_rows, unpacked, packed, dictionary_bytes, n_pages = 0, 0, 0, 0, 0
        for group in footer[4]:
            n_rows += natural(group[3])
            if len(group[1]) != len(leaves):
                raise ThriftError("a row group has other columns than the schema")
            for chunk, (names, kind) in zip(group[1], leaves, strict=True):
                facts = check_chunk(chunk, names, kind, size)
                if names[0].decode() in columns:
                    pages = page_sizes(file, facts)
                    n_pages += len(pages)
                    unpacked += sum(page for _, page in pages)
                    packed += facts[7]
                    sizes = [page for page_type, page in pages if page_type == DICTIONARY_PAGE]
                    dictionary_bytes = max([dictionary_bytes, *sizes])
                if n_pages > MAX_PAGES:
                    raise ThriftError("too many pages")
        if n_rows != footer[3]:
            raise ThriftError("the row groups do not add up to the number of rows")
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):  # a field is missing, or of another type
        raise InputError(path, "is a damaged Parquet file", "copy or download it again") from None
    check_unpacked(path, unpacked, packed, limits)
    return ParquetFacts(n_rows=n_rows, dictionary_bytes=dictionary_bytes, metadata=metadata, footer=footer_bytes)


def natural(value: Any) -> int:
    """Returns an integer that must not be negative."""
    if type(value) is not int or value < 0:
        raise ThriftError("a size is negative")
    return value


def read_footer(file: IO[bytes], size: int, path: str) -> bytes:
    """Returns the bytes of FileMetaData, from the end of the file."""
    file.seek(0)
    head = file.read(4)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    if size < 12 or head != b"PAR1" or tail[4:] != b"PAR1":
        raise InputError(path, "is not a Parquet file, or is encrypted or cut short", "write it again")
    n_bytes = int.from_bytes(tail[:4], "little")
    if n_bytes > min(size - 12, MAX_FOOTER_BYTES):
        raise InputError(path, "has a footer of an impossible size", "write it again, in larger row groups")
    file.seek(size - 8 - n_bytes)
    return file.read(n_bytes)


def leaf_columns(schema: list[dict[int, Any]]) -> list[tuple[list[bytes], int]]:
    """Returns the path and physical type of each column of bytes or numbers, from the schema's depth-first list."""
    leaves: list[tuple[list[bytes], int]] = []
    open_groups: list[list[Any]] = []  # [name, children still to come]
    for position, element in enumerate(schema):
        name, n_children = element[4], natural(element.get(5, 0))
        name.decode()
        if position:
            if not open_groups:
                raise ThriftError("the schema has two roots")
            open_groups[-1][1] -= 1
            if element[3] not in (0, 1, 2):
                raise ThriftError("unknown repetition")
        if n_children or not position:
            open_groups.append([name, n_children])
        else:
            if element[1] not in range(8):
                raise ThriftError("unknown type")
            leaves.append(([group for group, _ in open_groups[1:]] + [name], element[1]))
        while open_groups and open_groups[-1][1] == 0:
            open_groups.pop()
    if open_groups or not leaves or len(leaves) > 10_000:
        raise ThriftError("the schema is no tree")
    return leaves


def check_chunk(chunk: dict[int, Any], names: list[bytes], kind: int, size: int) -> dict[int, Any]:
    """Returns ColumnMetaData after checking it against the schema and the file."""
    facts: dict[int, Any] = chunk[3]
    if 1 in chunk or 8 in chunk or 9 in chunk:
        raise ThriftError("a column lies in another file, or is encrypted")
    if facts[3] != names or facts[1] != kind or facts[4] not in range(8):
        raise ThriftError("a column does not match the schema")
    if not all(encoding in range(10) for encoding in facts[2]):
        raise ThriftError("unknown encoding")
    if min(facts[5], facts[6], facts[7]) < 0:
        raise ThriftError("a size is negative")
    start = chunk_start(facts)
    if not 4 <= start <= start + facts[7] <= size - 8 or not start <= facts[9] <= start + facts[7]:
        raise ThriftError("a column lies outside the file")
    return facts


def chunk_start(facts: dict[int, Any]) -> int:
    """Returns where a column chunk starts: with its dictionary, if it has one."""
    data = natural(facts[9])
    dictionary = natural(facts.get(11, 0))
    return min(dictionary, data) if dictionary else data


def page_sizes(file: IO[bytes], facts: dict[int, Any]) -> list[tuple[int, int]]:
    """Returns (type, unpacked bytes) of each page of a chunk, which must fill the chunk exactly."""
    at = chunk_start(facts)
    end = at + facts[7]
    pages: list[tuple[int, int]] = []
    n_values = 0
    while at < end and len(pages) <= MAX_PAGES:
        file.seek(at)
        reader = CompactReader(file.read(min(MAX_PAGE_HEADER_BYTES, end - at)))
        header = reader.struct()
        page_type, unpacked, packed = header[1], natural(header[2]), natural(header[3])
        if page_type not in range(4):
            raise ThriftError("unknown page type")
        if page_type in (DATA_PAGE, DATA_PAGE_V2):
            n_values += natural(header[5 if page_type == DATA_PAGE else 8][1])
        if page_type == DICTIONARY_PAGE and (pages or natural(header[7][1]) > unpacked):
            raise ThriftError("a dictionary is out of place, or declares more values than bytes")
        if facts[4] == 0 and unpacked != packed:
            raise ThriftError("an uncompressed page has two sizes")
        pages.append((page_type, unpacked))
        at += reader.at + packed
    if at != end or n_values != facts[5]:
        raise ThriftError("the pages do not fill their column")
    return pages
