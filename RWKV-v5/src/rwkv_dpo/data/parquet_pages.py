"""How much memory the pages of a .parquet file take when they are unpacked, told without unpacking any.

A reader holds a page of every column at a time, and takes its size from the page's header. The format, and the compact protocol of
Thrift that it is written in: https://parquet.apache.org/docs/file-format and
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from typing import Any, BinaryIO, NamedTuple

_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 11, 12


# Field numbers of what is read, nested as in the format.
_FOOTER = {4: {1: {3: {5: None, 7: None, 9: None, 11: None}}}}  # row groups: columns: meta data: values, size, first page, dictionary
_PAGE = {2: None, 3: None, 5: {1: None}, 7: {1: None}, 8: {1: None}}  # sizes, and the number of values by kind of page
# A value that is null, or repeats the one before, takes no byte in its page; its place in a list takes two levels of 16 bits.
_LEAST_OF_A_VALUE = 4
# How much is read for the header of a page, whose statistics may hold whole texts.
_HEADERS = (1 << 9, 1 << 14, 1 << 24)


class Pages(NamedTuple):
    """Bytes of the largest pages, and of the largest dictionaries, added up over the columns of the row group where they are most."""

    size: int = 0
    dictionaries: int = 0


def largest_pages(file: BinaryIO) -> Pages:
    """Of a file that is open. ValueError when it is no whole .parquet file; encrypted ones are left to the reader."""
    n_file = file.seek(0, 2)
    file.seek(max(n_file - 8, 0))
    tail = file.read(8)
    n_footer = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or n_footer > n_file - 12:
        raise ValueError("it does not end as one does")
    file.seek(n_file - 8 - n_footer)
    groups = _Thrift(file.read(n_footer)).struct(_FOOTER).get(4, [])
    found = [[_of_a_column(file, column.get(3, {}), n_file) for column in group.get(1, [])] for group in groups]
    sizes = [Pages(sum(pages.size for pages in group), sum(pages.dictionaries for pages in group)) for group in found]
    return Pages(max((one.size for one in sizes), default=0), max((one.dictionaries for one in sizes), default=0))


def _of_a_column(file: BinaryIO, facts: dict[int, Any], n_file: int) -> Pages:
    n_values, at, dictionary = facts.get(5, 0), facts.get(9, 0), facts.get(11, 0)
    at = dictionary if 0 < dictionary < at else at
    end = min(at + facts.get(7, 0), n_file)
    size = dictionaries = 0
    while n_values > 0 and at < end:
        header, n_header = _page_header(file, at)
        packed, unpacked = header.get(3, -1), header.get(2, -1)
        if packed < 0 or unpacked < 0:
            raise ValueError(f"the page at byte {at} has no size")
        of_data = header.get(5) or header.get(8) or {}
        n_values -= of_data.get(1, 0)
        size = max(size, unpacked, _LEAST_OF_A_VALUE * of_data.get(1, 0))
        dictionaries = max(dictionaries, unpacked if 7 in header else 0)
        at += n_header + packed
    return Pages(size, dictionaries)


def _page_header(file: BinaryIO, at: int) -> tuple[dict[int, Any], int]:
    for n in _HEADERS:
        file.seek(at)
        thrift = _Thrift(file.read(n))
        try:
            return thrift.struct(_PAGE), thrift.at
        except EOFError:
            continue
    raise ValueError(f"the page at byte {at} has no whole header")


class _Thrift:
    """Values in Thrift's compact protocol, one after the other; `at` is where the next begins. EOFError at the end."""

    def __init__(self, data: bytes) -> None:
        self.at, self._data = 0, data

    def struct(self, wanted: dict[int, Any] | None, depth: int = 0) -> dict[int, Any]:
        """The fields that are wanted, by their numbers."""
        if depth > 32:
            raise ValueError("its facts are nested too deeply")
        found: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != _STOP:
            number = number + (head >> 4) if head >> 4 else self._signed()
            is_wanted = wanted is not None and number in wanted
            value = self._value(head & 15, (wanted or {}).get(number) if is_wanted else None, is_wanted, depth)
            if is_wanted:
                found[number] = value
        return found

    def _value(self, kind: int, wanted: dict[int, Any] | None, is_kept: bool, depth: int, is_element: bool = False) -> Any:
        if kind in (_TRUE, _FALSE):
            return self._byte() if is_element else kind
        if kind == _STRUCT:
            return self.struct(wanted, depth + 1)
        if kind in (_LIST, _SET):
            return self._list(wanted, is_kept, depth)
        if kind == _MAP:
            return self._map(depth)
        if kind == _BINARY:
            return self._skip(self._unsigned())
        if kind in (_BYTE, _DOUBLE):
            return self._skip(1 if kind == _BYTE else 8)
        return self._signed() if kind in (4, 5, 6) else self._fail()

    def _list(self, wanted: dict[int, Any] | None, is_kept: bool, depth: int) -> list[Any]:
        head = self._byte()
        n = head >> 4 if head >> 4 < 15 else self._unsigned()
        kept = []
        for _ in range(n):
            value = self._value(head & 15, wanted, False, depth + 1, is_element=True)
            if is_kept:
                kept.append(value if isinstance(value, dict) else {})
        return kept

    def _map(self, depth: int) -> None:
        if n := self._unsigned():
            kinds = self._byte()
            for _ in range(n):
                self._value(kinds >> 4, None, False, depth + 1, is_element=True)
                self._value(kinds & 15, None, False, depth + 1, is_element=True)

    def _byte(self) -> int:
        self.at += 1
        if self.at > len(self._data):
            raise EOFError("it ends within its facts")
        return self._data[self.at - 1]

    def _unsigned(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > 63:
                self._fail()
        return value | byte << shift

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, n: int) -> None:
        self.at += n
        if self.at > len(self._data):
            raise EOFError("it ends within its facts")

    def _fail(self) -> Any:
        raise ValueError("its facts are not in Thrift's compact form")
