"""Hand-made hostile files: each would run code, fill the memory or leave the file if its reader let it. All are to be refused."""

import gzip
import io
import json
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from fuzz.mutations import join

# Inputs that a campaign found, of formats that are not written by hand.
_KEPT = Path(__file__).parent / "regressions"
_DEEP = "[" * 100_000 + "]" * 100_000


class _Call:
    """Pickles as a call, which a loader that trusts the file would make."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def _calls() -> dict[str, _Call]:
    import builtins
    import os
    import subprocess

    return {
        "system": _Call(os.system, "touch ran"),
        "popen": _Call(subprocess.Popen, ["touch", "ran"]),
        "eval": _Call(builtins.eval, "open('ran', 'w')"),
        "exec": _Call(builtins.exec, "open('ran', 'w')"),
        "open": _Call(builtins.open, "ran", "w"),
        "import": _Call(builtins.__import__, "antigravity"),
        "getattr": _Call(getattr, "", "upper"),
    }


_ROW_END = b"]K\x04a]K\x05aG\xbf\xf0\0\0\0\0\0\0G\xbf\xf0\0\0\0\0\0\0t"


def pickled_pairs() -> dict[str, bytes]:
    row = ([1], [2], [3], -1.0, -1.0)
    found = {f"calls {name}": pickle.dumps([row, call], 4) for name, call in _calls().items()}
    nest: object = [1]
    for _ in range(9):
        nest = [nest] * 10
    shared = [1] * 40_000
    scalar = b"cnumpy.core.multiarray\nscalar\n"
    return found | {
        "a memo of 2**28 entries": b"\x80\x02]r\xf0\xff\xff\x0f.",
        "a memo entry in text": b"\x80\x02]p268435440\n.",
        "a string of 2**62 bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",
        "a byte array of 4 GB": b"\x80\x05\x96" + struct.pack("<Q", 2**32 - 8) + b"abc.",
        "a frame of 2**60 bytes": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"].",
        "a number of 2**31 bytes": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"1.",
        "lists in lists, 10**9 numbers": pickle.dumps([(nest, [2], [3], -1.0, -1.0)], 4),
        "one list in 20,000 rows": pickle.dumps([(shared, [2], [3], -1.0, -1.0) for _ in range(20_000)], 4),
        "a list that holds itself": b"\x80\x02]q\0h\0a.",
        "a row that holds itself": b"\x80\x02]q\0(h\0" + _ROW_END + b"a.",
        "a log-probability of 400 digits": pickle.dumps([(*row[:3], 10**400, -1.0)], 2),
        "a token of 5,000 digits": pickle.dumps([([1 << 16000], [2], [3], -1.0, -1.0)], 2),
        "state for the reader's own class": b"\x80\x02]" + scalar + b"N}X\x0c\0\0\0__defaults__)s\x86ba.",
        "a dictionary of equal hashes": pickle.dumps({i * (2**61 - 1): None for i in range(20_000)}, 4),
        "a name with line ends": b"\x80\x04\x8c\x06os\nos\n\x8c\x03a\nb\x93.",
        "ten thousand open brackets": b"\x80\x02" + b"(" * 10_000 + b".",
        "ten thousand tuples": b"\x80\x02)" + b"\x85" * 1_000_000 + b".",
        "a dtype of its own": b"\x80\x02]cnumpy\ndtype\nX\x12\0\0\0(1000000000,)i4,i4\x85Ra.",
    }


def _npz(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def _npy_with(shape: str, dtype: str, rest: bytes = b"", header: str = "") -> bytes:
    text = (header or f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}").encode() + b"\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + rest


def _members(**changes: bytes) -> dict[str, bytes]:
    header = json.dumps({"format": "rwkv_dpo pairs", "version": 1, "n_pairs": 1}).encode()
    members = {
        "header": _npy(np.frombuffer(header, np.uint8)),
        "tokens": _npy(np.arange(4, dtype=np.int32)),
        "offsets": _npy(np.array([0, 1, 2, 4])),
        "ref_logps": _npy(np.full((1, 2), -1.0)),
    } | changes
    return {f"{name}.npy": content for name, content in members.items()}


def packed_pairs() -> dict[str, bytes]:
    bomb = _npy(np.zeros(1 << 26, np.uint8).view(np.int32))
    lies = _npz(_members())
    at = lies.rfind(b"PK\1\2")
    low, top = -(2**63), 2**63 - 1
    return {
        "zeros that unpack to 64 MB": _npz(_members(tokens=bomb), zipfile.ZIP_DEFLATED),
        "a directory that promises 4 GB": lies[: at + 20] + b"\xf0\xff\xff\xff" * 2 + lies[at + 28 :],
        "10**15 tokens": _npz(_members(tokens=_npy_with("(1000000000000000,)", "<i4"))),
        "sizes that wrap around": _npz(_members(tokens=_npy_with("(4294967296, 4294967296)", "<i4"))),
        "offsets that wrap around": _npz(
            _members(offsets=_npy(np.array([0, top, low, low + 1, top - 5, -9, 4])), ref_logps=_npy(np.full((2, 2), -1.0)))
        ),
        "objects": _npz(_members(tokens=_npy(np.array([_calls()["system"]], dtype=object)))),
        "a nested header": _npz(_members(header=_npy(np.frombuffer(_DEEP.encode(), np.uint8)))),
        "a header that is a long sum": _npz(_members(tokens=_npy_with("", "", header="-" * 9000 + "1"))),
        "an encrypted member": lies.replace(b"PK\1\2\x14\x03\x14\0\0\0", b"PK\1\2\x14\x03\x14\0\1\0"),
    }


def arrays() -> dict[str, bytes]:
    return {
        "10**15 tokens": _npy_with("(1000000000000000,)", "<i4"),
        "sizes that wrap around to 0": _npy_with("(4294967296, 4294967296)", "<u2", bytes(64)),
        "sizes that wrap around": _npy_with("(4611686018427387905,)", "<i4", bytes(64)),
        "less than nothing": _npy_with("(-4,)", "<u2", bytes(64)),
        "objects": _npy(np.array([_calls()["system"]], dtype=object)),
        "minus minus minus": _npy_with("", "", header="-" * 9000 + "1"),
        "brackets": _npy_with("", "", header="(" * 9000),
        "a call": _npy_with("", "", header="__import__('os').system('touch ran')"),
        "half a zip": b"PK\x03\x04" + bytes(40),
        "a pickle": pickle.dumps(_calls()["system"], 2),
    }


def corpora() -> dict[str, bytes]:
    def index(n: int, m: int, sizes: list[int], offsets: list[int], code: int = 8, tokens: bytes = b"\1\0" * 8) -> bytes:
        content = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, n, m) + struct.pack(f"<{len(sizes)}i{len(offsets)}q", *sizes, *offsets)
        # struct aligns unless told not to: the offsets are written again without.
        content = content[:34] + b"".join(size.to_bytes(4, "little", signed=True) for size in sizes)
        content += b"".join(offset.to_bytes(8, "little", signed=True) for offset in offsets) + bytes(8 * min(m, 9))
        return join(content, tokens)

    return {
        "10**15 documents": index(10**15, 1, [8], [0]),
        "2**64 - 1 documents": index(2**64 - 1, 2**64 - 1, [8], [0]),
        "counts whose bytes wrap around": index(2**62, 2**63, [], []),
        "a document of 2**31 tokens": index(1, 2, [2**31 - 1], [0]),
        "sizes below 0": index(2, 3, [-8, 16], [0, -16]),
        "offsets before the file": index(2, 3, [4, 4], [-8, 8]),
        "offsets after the file": index(2, 3, [4, 4], [0, 2**62]),
    }


def _torch_zip(pickled: bytes, storages: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    members = {"a/data.pkl": pickled, "a/byteorder": b"little", "a/version": b"3\n"}
    return _npz(members | {f"a/data/{name}": content for name, content in storages.items()}, method)


def _tensor(
    numel: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, kind: str = "FloatStorage", key: str = "0"
) -> bytes:
    def number(n: int) -> bytes:
        return b"\x8a\x0a" + n.to_bytes(10, "little", signed=True)

    def text(s: str) -> bytes:
        return b"X" + len(s).to_bytes(4, "little") + s.encode()

    def numbers(many: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, many)) + b"t"

    storage = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu") + number(numel) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + numbers(size) + numbers(stride) + b"\x89" + hooks + b"tR"


def _pickled_rows(n: int, chosen: bytes, before: bytes = b"", logp: bytes = b"G\xbf\xf0\0\0\0\0\0\0") -> bytes:
    """n rows with those opcodes for their chosen tokens and their first log-probability."""
    row = b"(]K\1a" + chosen + b"]K\3a" + logp + b"G\xbf\xf0\0\0\0\0\0\0t"
    return b"\x80\x02" + before + b"](" + row * n + b"e."


def _called(name: bytes, *arguments: bytes) -> bytes:
    return b"c" + name + b"\n(" + b"".join(arguments) + b"tR"


def torch_pairs() -> dict[str, bytes]:
    import torch

    found = {}
    row = ([1], [2], [3], -1.0, -1.0)
    for name, call in _calls().items():
        for is_zip in (True, False):
            file = io.BytesIO()
            torch.save([row, call], file, _use_new_zipfile_serialization=is_zip)
            found[f"calls {name}, {'archive' if is_zip else 'legacy'}"] = file.getvalue()
    legacy = io.BytesIO()
    torch.save([(*row[:4], torch.tensor(-1.0))], legacy, _use_new_zipfile_serialization=False)
    plain = legacy.getvalue()
    n_at = plain.rindex((1).to_bytes(8, "little"))
    key = plain[plain.index(b"FloatStorage") :].split(b"X")[1][4:].split(b"q")[0]

    text_key = b"X" + len(key).to_bytes(4, "little") + key

    def in_keys(pickled: bytes) -> bytes:
        return plain[: plain.rindex(b"\x80\x02]")] + pickled + plain[n_at:]

    def longs(numel: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, key: str = "0") -> bytes:
        return _tensor(numel, size, stride, offset, "LongStorage", key)

    one, many = {"0": bytes(8)}, {"0": (1).to_bytes(8, "little") * 40_000}
    text = b"X" + (1 << 20).to_bytes(4, "little") + (b"\1" + bytes(7)) * (1 << 17) + b"q\1"
    latin = b"X\6\0\0\0latin1q\2"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85h\2tR"
    dtype = b"cnumpy\ndtype\nX\2\0\0\0i8\x85Rq\3"
    shape = b"(" + b"K\1" * 100_000 + b"tq\1"
    storage = b"(X\7\0\0\0storagectorch\nLongStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\1tQq\4"
    nested = b"C\xff" + b"PK\3\4" + bytes(251)
    return found | {
        "one token repeated 2**51 times": _torch_zip(_pickled_rows(1, longs(1, (1 << 51,), (0,))), one),
        "one token repeated in 20,000 rows": _torch_zip(
            b"\x80\x02" + longs(1, (40_000,), (0,)) + b"q\1" + _pickled_rows(20_000, b"h\1")[2:], one
        ),
        "one tensor in 20,000 rows": _torch_zip(
            b"\x80\x02" + longs(40_000, (40_000,), (1,)) + b"q\1" + _pickled_rows(20_000, b"h\1")[2:], many
        ),
        "a tensor beyond its storage": _torch_zip(_pickled_rows(1, longs(1, (1 << 30,), (1,))), one),
        "a storage larger than its record": _torch_zip(_pickled_rows(1, longs(1 << 50, (1 << 50,), (1,))), one),
        "an offset before its storage": _torch_zip(_pickled_rows(1, longs(1, (1,), (1,), offset=-8)), one),
        "strides that wrap around": _torch_zip(_pickled_rows(1, longs(1, (3,), (2**63 - 1,))), one),
        "a shape below 0": _torch_zip(_pickled_rows(1, longs(1, (-1,), (1,))), one),
        "a storage that is not there": _torch_zip(_pickled_rows(1, longs(1, (1,), (1,), key="7")), one),
        "a storage of another folder": _torch_zip(_pickled_rows(1, longs(1, (1,), (1,), key="../../a/data/0")), one),
        "100,000 dimensions in 20,000 tensors": _torch_zip(
            b"\x80\x02" + shape + storage + b"(" + b"ctorch._utils\n_rebuild_tensor_v2\n(h\4K\0h\1h\1tR" * 20_000 + b"l.", one
        ),
        "a text of 1 MB encoded 20,000 times": _torch_zip(
            b"\x80\x02" + text + latin + b"(" + _called(b"_codecs\nencode", b"h\1", b"h\2") * 20_000 + b"l.", {}
        ),
        "an array of 1 MB in 20,000 rows": _torch_zip(
            b"\x80\x02" + text + latin + dtype
            + _pickled_rows(20_000, array + b"(K\1J\0\0\2\0\x85h\3\x89h\1tb")[2:], {}
        ),
        "an array of 2**60 numbers": _torch_zip(
            b"\x80\x02" + latin + dtype + _pickled_rows(1, array + b"(K\1\x8a\x08\0\0\0\0\0\0\0\x10\x85h\3\x89h\2tb")[2:], {}
        ),
        "2**31 bytes by their number": _torch_zip(_pickled_rows(1, b"cbuiltins\nbytes\nJ\xff\xff\xff\x7f\x85R"), {}),
        "a pickle that unpacks to 64 MB": _torch_zip(
            b"\x80\x02X" + (1 << 26).to_bytes(4, "little") + bytes(1 << 26) + b".", {}, zipfile.ZIP_DEFLATED
        ),
        "two contents": _npz({"a/data.pkl": b"\x80\x02].", "b/data.pkl": b"\x80\x02]."}),
        "state for what it names": _torch_zip(_pickled_rows(1, b"ctorch._utils\n_rebuild_tensor_v2\nN}\x86b"), {}),
        "an archive in an archive": b"\x80\x03" + _pickled_rows(
            1, _called(b"torch._utils\n_rebuild_tensor_v2", _called(b"torch.storage\n_load_from_bytes", nested), b"K\0K\1\x85K\1\x85")
        )[2:],
        "legacy: a storage of 2**62 numbers": plain[:n_at] + (1 << 62).to_bytes(8, "little") + plain[n_at + 8 :],
        "legacy: a storage of fewer than none": plain[:n_at] + (2**64 - 8).to_bytes(8, "little") + plain[n_at + 8 :],
        "legacy: keys that are called": in_keys(b"\x80\x02]" + pickle.dumps(_calls()["system"], 2)[2:-1] + b"a."),
        "legacy: keys that are a dictionary": in_keys(pickle.dumps({i * (2**61 - 1): None for i in range(20_000)}, 2)),
        "legacy: a key that nothing names": in_keys(b"\x80\x02]X\1\0\0\0xa."),
        "legacy: a key in 100,000 places": in_keys(b"\x80\x02](" + text_key + b"q\1" + b"h\1" * 100_000 + b"e."),
        "legacy: an end after the content": plain[: plain.rindex(b"\x80\x02]")],
        "legacy: facts that are called": plain.replace(b"X\r\0\0\0little_endian", b"cos\ngetcwd\n)RX\1\0\0\0a", 1),
    }  # fmt: skip


def _weights(*entries: tuple[str, bytes]) -> bytes:
    items = b"".join(b"X" + len(name).to_bytes(4, "little") + name.encode() + value for name, value in entries)
    return b"\x80\x02}(" + items + b"u."


def checkpoints() -> dict[str, bytes]:
    import torch

    found = {}
    for name, call in _calls().items():
        file = io.BytesIO()
        torch.save({"emb.weight": call}, file)
        found[f"calls {name}"] = file.getvalue()
        found[f"a pickle that calls {name}"] = pickle.dumps(call, 2)
    one = bytes(4)
    huge = (1 << 31, 1 << 20)
    reduce = b"\x80\x02}X\1\0\0\0a"
    named = [("blocks.0.att.time_mix_g", _tensor(1, (1, 1, 1), (1, 1, 1))), ("blocks.0.att.time_decay", _tensor(1, (1, 8), (0, 0)))]
    empty = [
        (name, _tensor(0, (0, 0), (1, 1)))
        for name in ("emb.weight", "blocks.0.att.receptance.weight", "blocks.0.ffn.key.weight", "blocks.0.att.time_decay")
    ]
    def again(kept: bytes, call: bytes) -> bytes:
        """One object, number 1 of the memo, given to 3,000 calls."""
        return _torch_zip(b"\x80\x02}(X\1\0\0\0b" + kept + b"X\1\0\0\0a](" + call * 3000 + b"eu.", {"0": bytes(8)})

    text = b"X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20) + b"q\1"
    twos = b"]q\1(" + b"K\1K\2\x86" * 50_000 + b"e"
    numbers = b"]q\1(" + b"".join(b"J" + i.to_bytes(4, "little") for i in range(50_000)) + b"e"
    entries = b"}q\1(" + b"".join(b"X\4\0\0\0%04xN" % i for i in range(50_000)) + b"u"
    sizes = b"(" + b"K\1" * 50_000 + b"tq\1"
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\1tQ"
    old = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, old, _use_new_zipfile_serialization=False)
    return found | {
        "one number repeated 2**51 times": _torch_zip(_weights(*named, ("emb.weight", _tensor(1, huge, (0, 0)))), {"0": one}),
        "a storage larger than its record": _torch_zip(_weights(*named, ("emb.weight", _tensor(10**15, (10**15, 1), (1, 1)))), {"0": one}),
        "a tensor beyond its storage": _torch_zip(_weights(*named, ("emb.weight", _tensor(1, (1 << 30, 1), (1, 1)))), {"0": one}),
        "an offset before its storage": _torch_zip(_weights(("emb.weight", _tensor(1, (1, 1), (1, 1), offset=-8))), {"0": one}),
        "strides that wrap around": _torch_zip(_weights(("emb.weight", _tensor(1, (3, 3), (2**62, 2**62)))), {"0": one}),
        "no numbers at all": _torch_zip(_weights(("blocks.0.att.time_mix_g", _tensor(0, (0,), (1,))), *empty), {"0": b""}),
        "a layer of number 999999999": _torch_zip(
            _weights(
                *named,
                ("emb.weight", _tensor(1, (1, 1), (1, 1))),
                ("blocks.999999999.x", _tensor(1, (1,), (1,))),
                *[(n, _tensor(1, (1, 1), (1, 1))) for n in ("blocks.0.att.receptance.weight", "blocks.0.ffn.key.weight")],
            ),
            {"0": one},
        ),
        "a bytearray of 2 GB": _torch_zip(reduce + b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85Rs.", {}),
        "a tensor by its size": _torch_zip(reduce + b"ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85Rs.", {}),
        "a storage by its size": _torch_zip(reduce + b"ctorch.storage\nUntypedStorage\nJ\xff\xff\xff\x7f\x85Rs.", {}),
        "a tensor without storage": _torch_zip(
            reduce
            + b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\n(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ft(K\1K\1t\x89tRs.",
            {},
        ),
        "a pickle that unpacks to 64 MB": _torch_zip(
            b"\x80\x02X" + (1 << 26).to_bytes(4, "little") + bytes(1 << 26) + b".", {}, zipfile.ZIP_DEFLATED
        ),
        "a string of 4 GB": _torch_zip(b"\x80\x02X\xf0\xff\xff\xff.", {}),
        "an old file with a string of 4 GB": b"\x80\x02X\xf0\xff\xff\xff.",
        "an old file with a huge storage": old.getvalue().replace(b"K\x04", b"J\xff\xff\xff\x7f", 1),
        "a text of 1 MB encoded 3,000 times": again(text, b"c_codecs\nencode\nh\1X\6\0\0\0latin1\x86R"),
        "one list in 3,000 dictionaries": again(twos, b"ccollections\nOrderedDict\nh\1\x85R"),
        "one list in 3,000 sets": again(numbers, b"c__builtin__\nset\nh\1\x85R"),
        "one state of 3,000 objects": again(entries, b"ccollections\nOrderedDict\n)Rh\1b"),
        "one shape of 3,000 tensors": again(
            sizes, b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0h\1h\1\x89ccollections\nOrderedDict\n)RtR"
        ),
        "a program of TorchScript": _npz(
            {"a/data.pkl": b"\x80\x02}.", "a/constants.pkl": b"\x80\x02).", "a/version": b"3\n", "a/code/a.py": b"import os"}
        ),
    }


def _safetensors(entries: dict | bytes, data: bytes = b"") -> bytes:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + data


def safetensors() -> dict[str, bytes]:
    def one(shape: list[int], end: int, data: bytes, dtype: str = "F32") -> bytes:
        return _safetensors({"emb.weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}, data)

    shared = {name: {"dtype": "F32", "shape": [1 << 18], "data_offsets": [0, 1 << 20]} for name in map(str, range(2000))}
    return {
        "a header of 2**62 bytes": (1 << 62).to_bytes(8, "little") + b"{}",
        "10**15 numbers": one([10**15], 4 * 10**15, bytes(64)),
        "a shape that wraps around": one([1 << 32, 1 << 32], 0, b""),
        "a shape beyond its bytes": one([1 << 20, 1 << 20], 64, bytes(64)),
        "2,000 tensors in the same bytes": _safetensors(shared, bytes(1 << 20)),
        "a tensor below 0": one([-4], 16, bytes(16)),
        "a type of half a byte": one([16], 8, bytes(8), "F4"),
        "no numbers at all": one([0, 1 << 40], 0, b""),
        "a deep header": _safetensors(b'{"a": ' + _DEEP.encode() + b"}"),
        "a name with line ends": _safetensors({"a\nb\x1b[2J": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        "a pickle behind a brace": (9).to_bytes(8, "little") + b"{" + pickle.dumps(_calls()["system"], 2),
    }


def adapters() -> dict[str, bytes]:
    """Settings and tensors in one, see mutations.join."""

    def lora(r: object, alpha: object = 8, **settings: object) -> bytes:
        config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, **settings}
        parts = {"blocks.0.att.key.lora_A.weight": [4, 8], "blocks.0.att.key.lora_B.weight": [8, 4]}
        entries = {}
        for at, (name, shape) in zip((0, 128), parts.items(), strict=True):
            entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + 128]}
        return join(json.dumps(config).encode(), _safetensors(entries, bytes(256)))

    found = {f"tensors: {name}": join(b'{"r": 4, "lora_alpha": 8}', content) for name, content in safetensors().items()}
    found |= {f"settings: {name}": join(content, _safetensors({})) for name, content in json_files().items()}
    return found | {
        "a rank of 400 digits": lora(10**400),
        "a strength of 400 digits": lora(4, 10**400),
        "a rank that is a list": lora([4]),
        "a rank that is true": lora(True),
        "ranks of its own": lora(4, rank_pattern={"key": 10**9}),
        "a start that calls": lora(4, init_lora_weights={"__reduce__": "os.system"}),
        "settings in a list": join(b"[" * 9 + b"]" * 9, _safetensors({})),
    }


def json_files() -> dict[str, bytes]:
    return {
        "deep": _DEEP.encode(),
        "deep in a row": b'[{"prompt": ' + _DEEP.encode() + b"}]",
        "deep objects": b'[{"a":' * 50_000,
        "5,000 digits": b'[{"prompt": "a", "chosen": "b", "rejected": "c", "text": ' + b"9" * 5000 + b"}]",
        "the end is missing": b'[{"text": "' + b"a" * 300_000,
        "white space": b" " * 3_000_000,
    }


def json_lines() -> dict[str, bytes]:
    scores = b'{"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": ' + b"9" * 400 + b', "score_rejected": 1, "text": 1}\n'
    return {"deep": _DEEP.encode(), "a score of 400 digits": scores, "a name in raw mode": b'{"\\u001b[2J\\n": 1}\n'}


def gzipped() -> dict[str, bytes]:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    zeros = bytes(1 << 20)
    # 300 MB of one line.
    bomb = b"".join(packer.compress(zeros.replace(b"\0", b"a")) for _ in range(300)) + packer.flush()
    twice = gzip.compress(bomb)
    return {"300 MB of one letter": bomb, "a pack in a pack": gzip.compress(twice) + bomb}


def parquet() -> dict[str, bytes]:
    import pyarrow
    from pyarrow import parquet as format

    file = io.BytesIO()
    text = pyarrow.array(["a" * (1 << 26)])
    table = pyarrow.table({"prompt": text, "chosen": text, "rejected": text, "text": text})
    format.write_table(table, file, compression="zstd", use_dictionary=False)
    return {
        "four texts of 64 MB": file.getvalue(),
        "column facts at which pyarrow ends the process": (_KEPT / "column_statistics.parquet").read_bytes(),
        "no footer": b"PAR1" * 2,
        "a footer of 4 GB": b"PAR1" + b"\xff\xff\xff\xff" + b"PAR1",
    }
