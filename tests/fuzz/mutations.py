"""Seeded changes to files: of bytes, and of the parts that a format has, so that they get past its first check."""

import gzip
import io
import json
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

Mutator = Callable[[bytes, random.Random], bytes]

_NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    127,
    128,
    255,
    256,
    4300,
    65535,
    65536,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
_WORDS = (
    b"\n",
    b"\0",
    b'"',
    b"'",
    b",",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b"\\ud800",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"null",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 400,
    b"\r",
    b"\xc3",
    b"PK\x03\x04",
    b"{prompt}",
    b"{answer}",
    b"\x1b[2J",
)


def number(draw: random.Random) -> int:
    """A number that readers stumble over, or one near it, or a small one."""
    return draw.choice(_NUMBERS) + draw.choice((0, 0, 0, 1, -1)) if draw.random() < 0.7 else draw.randrange(40)


def some_bytes(content: bytes, draw: random.Random) -> bytes:
    """One to four changes anywhere."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(data) + 1)
        length = min(draw.choice((1, 2, 4, 8, 16, 200)), len(data) - at)
        kind = draw.randrange(7)
        if kind == 0 and length:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and length:
            data[at : at + length] = draw.randbytes(length)
        elif kind == 2:
            size = draw.choice((1, 2, 4, 8))
            data[at : at + size] = (number(draw) % 256**size).to_bytes(size, draw.choice(("little", "big")))
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length] * draw.choice((1, 2, 50))
        elif kind == 5:
            data[at:at] = draw.choice(_WORDS)
        elif draw.random() < 0.3:
            del data[at:]
    return bytes(data)


def join(first: bytes, second: bytes) -> bytes:
    """Two files as one input: the .idx and .bin of a corpus, the settings and tensors of an adapter."""
    return len(first).to_bytes(4, "little") + first + second


def split(content: bytes) -> tuple[bytes, bytes]:
    """The two files of an input that `join` made, or that was changed since."""
    end = 4 + int.from_bytes(content[:4], "little")
    return content[4:end], content[end:]


def index_fields(content: bytes, draw: random.Random) -> bytes:
    """A corpus of two files (see join): counts, sizes and offsets of the .idx, also so that its length fits again."""
    first, tokens = split(content)
    index = bytearray(first)
    if len(index) < 33 or draw.random() < 0.15:
        return some_bytes(content, draw)
    n = min(struct.unpack_from("<Q", index, 17)[0], (len(index) - 33) // 12) or 1
    kind = draw.randrange(6)
    if kind == 0:
        struct.pack_into("<Q", index, draw.choice((17, 25, 9)), number(draw) % 2**64)
    elif kind == 1 and len(index) >= 33 + 12 * n:
        struct.pack_into("<i", index, 33 + 4 * draw.randrange(n), (number(draw) + 2**31) % 2**32 - 2**31)
    elif kind == 2 and len(index) >= 33 + 12 * n:
        struct.pack_into("<q", index, 33 + 4 * n + 8 * draw.randrange(n), (number(draw) + 2**63) % 2**64 - 2**63)
    elif kind == 3:
        index[16 % len(index)] = draw.randrange(10)
    elif kind == 4:
        # Consistent in itself: other sizes with the offsets that follow from them, wrapping around or not.
        sizes = [draw.choice((0, 1, 5, -1, 2**31 - 1, draw.randrange(9))) for _ in range(draw.randrange(6))]
        itemsize, ends = draw.choice((1, 2, 4, 8)), 0
        offsets = []
        for size in sizes:
            offsets.append(ends * itemsize)
            ends += size
        index = bytearray(b"MMIDIDX\0\0" + struct.pack("<QB", 1, {1: 1, 2: 8, 4: 4, 8: 5}[itemsize]))
        index += struct.pack("<QQ", len(sizes), len(sizes) + 1) + struct.pack(f"<{len(sizes)}i", *sizes)
        index += struct.pack(f"<{len(sizes)}q", *offsets) + struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1))
        tokens = (tokens * 3)[: max(0, min(ends * itemsize, 3 * len(tokens)))]
    else:
        tokens = some_bytes(tokens, draw)
    return join(bytes(index), tokens)


def pickle_opcodes(content: bytes, draw: random.Random) -> bytes:
    """Opcodes left out, doubled, moved, with other arguments, and strange ones put in."""
    try:
        starts = [at for _, _, at in pickletools.genops(content)]
    except ValueError:
        return some_bytes(content, draw)
    parts = [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(parts))
        kind = draw.randrange(6)
        if kind == 0:
            del parts[at]
        elif kind == 1:
            parts.insert(draw.randrange(len(parts) + 1), parts[at])
        elif kind == 2:
            other = draw.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif kind == 3:
            parts.insert(at, draw.choice(_FRAGMENTS)(draw))
        elif kind == 4:
            # Another argument of the same opcode.
            parts[at] = parts[at][:1] + draw.randbytes(len(parts[at]) - 1)
        else:
            parts[at] = some_bytes(parts[at], draw)
        parts = parts or [b"."]
    return b"".join(parts)


def _little(size: int) -> Callable[[random.Random], bytes]:
    return lambda draw: (number(draw) % 256**size).to_bytes(size, "little")


_FRAGMENTS: tuple[Callable[[random.Random], bytes], ...] = (
    lambda draw: b"2" * draw.choice((1, 30)),
    lambda draw: b"0",
    lambda draw: b"(" * draw.choice((1, 1000)),
    lambda draw: b"t",
    lambda draw: b"e",
    lambda draw: b"a",
    lambda draw: b"l",
    lambda draw: b"]",
    lambda draw: b"}",
    lambda draw: b"s",
    lambda draw: b"b",
    lambda draw: b"R",
    lambda draw: b"\x81",
    lambda draw: b"\x93",
    lambda draw: b"Q",
    lambda draw: b"\x85" * draw.choice((1, 2000)),
    lambda draw: b"\x94",
    lambda draw: b"r" + _little(4)(draw),
    lambda draw: b"j" + _little(4)(draw),
    lambda draw: b"\x8b" + _little(4)(draw),
    lambda draw: b"B" + _little(4)(draw),
    lambda draw: b"X" + _little(4)(draw),
    lambda draw: b"\x95" + _little(8)(draw),
    lambda draw: b"\x8e" + _little(8)(draw),
    lambda draw: b"\x8d" + _little(8)(draw),
    lambda draw: b"\x96" + _little(8)(draw),
    lambda draw: b"p%d\n" % number(draw),
    lambda draw: b"g%d\n" % number(draw),
    lambda draw: b"I%d\n" % number(draw),
    lambda draw: b"L" + b"9" * 5000 + b"L\n",
    lambda draw: b"\x8a\xff" + b"\x7f" * 255,
    lambda draw: b"F1e999\n",
    lambda draw: b"h" + draw.randbytes(1),
    lambda draw: b"cposix\nsystem\n\x8c\x04true\x85R",
    lambda draw: b"cbuiltins\neval\n\x8c\x011\x85R",
    lambda draw: b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R",
    lambda draw: b"ctorch\nTensor\nJ\xff\xff\xff\x7f\x85R",
    lambda draw: b"cnumpy.core.multiarray\nscalar\n}\x8c\x0c__defaults__K\x01sN\x86b0",
)


def npy_header(content: bytes, draw: random.Random) -> bytes:
    """Another shape, type or order in the header of a .npy file."""
    if content[:6] != b"\x93NUMPY" or len(content) < 12:
        return some_bytes(content, draw)
    n_header = int.from_bytes(content[8:10], "little")
    header, rest = content[10 : 10 + n_header].decode("latin1").rstrip(), content[10 + n_header :]
    kind = draw.randrange(5)
    if kind == 0:
        sizes = [number(draw) for _ in range(draw.choice((0, 1, 1, 2, 3, 40)))]
        shape = str(tuple(sizes)) if draw.random() < 0.8 else draw.choice(("(-1,)", "(True,)", "5", "(1.5,)", "((1,),)", "None"))
        header = header[: header.find("'shape'")] + f"'shape': {shape}, }}"
    elif kind == 1:
        types = (
            "<i4",
            ">i8",
            "|O",
            "<f8",
            "<u2",
            "|V0",
            "|S0",
            "|V1000000000",
            "<U9",
            "<M8[s]",
            "i4,i4",
            "(3,)i4",
            "(1000000000,)i4",
            "|b1",
            "<c16",
        )
        header = header.replace(header.split("'")[3], draw.choice(types), 1) if header.count("'") > 3 else header
    elif kind == 2:
        header = header.replace("False", draw.choice(("True", "None", "1", "[]")))
    elif kind == 3:
        header = draw.choice(
            (
                "-" * 5000 + "1",
                "(" * 3000,
                "[" * 90 + "]" * 90,
                "{'descr': 1}",
                "{}",
                "\0",
                "__import__('os').system('true')",
                "1+" * 3000 + "1",
            )
        )
    else:
        return some_bytes(content, draw)
    encoded = header.encode("latin1", "replace") + b"\n"
    return (
        content[:6]
        + draw.choice((b"\1\0", b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\x09\0"))
        + len(encoded).to_bytes(2, "little")
        + encoded
        + rest
    )


def zip_members(member: Mutator) -> Mutator:
    """An archive whose members are changed by `member`, left out, renamed, doubled or compressed, or whose directory lies."""

    def mutate(content: bytes, draw: random.Random) -> bytes:
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        except Exception:
            return some_bytes(content, draw)
        kind = draw.randrange(10)
        if kind == 0 or not members:
            return some_bytes(content, draw)
        if kind == 1:
            # A field of a local header, of the directory, or of the record that ends it.
            at = draw.choice([i for i in range(len(content) - 4) if content[i : i + 4] in (b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6")])
            at, size = at + draw.randrange(4, 46), draw.choice((1, 2, 4, 8))
            return content[:at] + (number(draw) % 256**size).to_bytes(size, "little") + content[at + size :]
        at = draw.randrange(len(members))
        name, data = members[at]
        if kind == 2:
            members.pop(at)
        elif kind == 3:
            members.insert(draw.randrange(len(members) + 1), (draw.choice((name, name + "x", "../" + name, "a/" + name)), data))
        elif kind == 4:
            members[at] = (draw.choice(members)[0], data)
        else:
            members[at] = (name, member(data, draw))
        method = zipfile.ZIP_DEFLATED if draw.random() < 0.05 else zipfile.ZIP_STORED
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", method) as archive:
            for name, data in members:
                archive.writestr(zipfile.ZipInfo(name), data, method)
        return packed.getvalue()

    return mutate


def weights_member(data: bytes, draw: random.Random) -> bytes:
    """A member of a checkpoint: its pickle by opcodes or by numbers, its storages by bytes."""
    if data[:1] != b"\x80":
        return some_bytes(data, draw)
    if draw.random() < 0.5:
        return pickle_opcodes(data, draw)
    # Sizes, strides and offsets are small numbers: K and one byte, M and two.
    places = [at for opcode, _, at in pickletools.genops(data) if opcode.name in ("BININT1", "BININT2", "BININT")]
    if not places:
        return some_bytes(data, draw)
    at = draw.choice(places)
    replacement = b"J" + (number(draw) % 2**32).to_bytes(4, "little")
    return data[:at] + replacement + data[at + {b"K": 2, b"M": 3, b"J": 5}[data[at : at + 1]] :]


def torch_file(content: bytes, draw: random.Random) -> bytes:
    """A file of torch.save: an archive by its members, the form before by one of its five pickles, or by the storages after them."""
    if content[:2] == b"PK":
        return zip_members(weights_member)(content, draw)
    ends = [0]
    try:
        for _ in range(5):
            ends.append(ends[-1] + 1 + max(at for _, _, at in pickletools.genops(content[ends[-1] :]) if at is not None))
    except ValueError:
        return some_bytes(content, draw)
    parts = [content[a:b] for a, b in zip(ends, [*ends[1:], len(content)], strict=True)]
    at = draw.choice((2, 3, 3, 3, 4, 4, 5))
    parts[at] = weights_member(parts[at], draw) if at < 5 else some_bytes(parts[at], draw)
    return b"".join(parts)


def safetensors_header(content: bytes, draw: random.Random) -> bytes:
    """The JSON before the tensors: another type, shape, offset or name, with a length that mostly fits."""
    n_header = int.from_bytes(content[:8], "little")
    if n_header > len(content) or draw.random() < 0.15:
        return some_bytes(content, draw)
    header, rest = content[8 : 8 + n_header], content[8 + n_header :]
    if draw.random() < 0.3:
        entries = json.loads(header)
        entry = entries[draw.choice([name for name in entries if name != "__metadata__"])]
        field = draw.choice(("dtype", "shape", "data_offsets"))
        types = ("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "F6_E2M3", "X", "")
        numbers = [number(draw) for _ in range(draw.choice((0, 1, 2, 2, 5)))]
        entry[field] = draw.choice(types) if field == "dtype" else numbers
        header = json.dumps(entries).encode()
    else:
        header = json_values(header, draw)
    length = len(header) if draw.random() < 0.9 else number(draw) % 2**64
    return length.to_bytes(8, "little") + header + rest


def either(first: Mutator, second: Mutator) -> Mutator:
    """One of two files in one input (see join): the first of them by `first` or the second by `second`."""

    def mutate(content: bytes, draw: random.Random) -> bytes:
        one, other = split(content)
        return join(first(one, draw), other) if draw.random() < 0.5 else join(one, second(other, draw))

    return mutate


def json_values(content: bytes, draw: random.Random) -> bytes:
    """A value somewhere in the JSON (or in one of its lines) becomes another, or a field is renamed, doubled or left out."""
    if draw.random() < 0.3:
        return some_bytes(content, draw)
    lines = content.splitlines()
    at = draw.randrange(len(lines)) if lines else 0
    try:
        tree = json.loads(lines[at] if len(lines) > 1 else content)
    except (ValueError, RecursionError):
        return some_bytes(content, draw)
    changed = _changed(tree, draw)
    try:
        text = json.dumps(changed).replace('"<huge>"', "9" * draw.choice((20, 400, 4000, 5000))).encode()
    except (ValueError, RecursionError):
        return some_bytes(content, draw)
    if draw.random() < 0.02:
        text = text.replace(b"null", b"[" * 100_000 + b"]" * 100_000)
    return b"\n".join([*lines[:at], text, *lines[at + 1 :]]) if len(lines) > 1 else text


def _changed(value: Any, draw: random.Random) -> Any:
    if isinstance(value, list) and value and draw.random() < 0.85:
        at = draw.randrange(len(value))
        return draw.choice(
            (
                [*value[:at], _changed(value[at], draw), *value[at + 1 :]],
                [*value[:at], *value[at + 1 :]],
                [*value, value[at]],
                value[::-1],
            )
        )
    if isinstance(value, dict) and value and draw.random() < 0.9:
        name = draw.choice(list(value))
        rest = {k: v for k, v in value.items() if k != name}
        return draw.choice(
            (
                value | {name: _changed(value[name], draw)},
                value | {name: _changed(value[name], draw)},
                rest,
                rest
                | {
                    draw.choice(
                        ("chosen", "rejected", "reject", "prompt", "messages", "conversations", "system", "score_chosen", "x")
                    ): value[name]
                },
            )
        )
    return draw.choice(
        (
            None,
            True,
            0,
            -1,
            1.5,
            float("nan"),
            float("inf"),
            "<huge>",
            "",
            " ",
            "\ud800",
            "\0",
            "x" * 3000,
            "\n\nHuman: a\n\nAssistant: b",
            [],
            {},
            [None],
            [[]],
            {"role": "user", "content": "a"},
            [{"role": "assistant", "content": "b"}],
            {"role": [], "content": {}},
            {"from": "gpt", "value": 3},
            "{prompt}",
            "\u202e\u0085\u2028",
            str(number(draw)),
            number(draw),
        )
    )


def gzipped(inner: Mutator) -> Mutator:
    """The packed content changed, or the packed bytes."""

    def mutate(content: bytes, draw: random.Random) -> bytes:
        try:
            plain = gzip.decompress(content)
        except Exception:
            return some_bytes(content, draw)
        return gzip.compress(inner(plain, draw), 1, mtime=0) if draw.random() < 0.5 else some_bytes(content, draw)

    return mutate
