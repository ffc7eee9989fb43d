"""Corrupt bytes, JSON and safetensors files; every change depends only on a ``random.Random``."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

DEEP = 200_000
MANY = (45_000, 240_000)  # numbers of small values, each of which takes many times its bytes in memory
RAW = "\x02raw\x02"  # placeholder in JSON for text that json.dumps can't write

NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ",
    ".", "..", "../../escape", "/etc/passwd", "a/b", "a\\b", "a\nb", "\x00", "\x1b[2J", "\ud800", "\u202e", "²", "٣",
    "ä" * 150, "x" * 5000, "{}", "{} {}", "nan", "1", "0" * 64, "f" * 63 + "\n", [], {}, [[]], [None], ["a", "a"],
    {"": ""}, {"a": {"b": []}}, [float("nan")], list(range(1000)),
)  # fmt: skip
RAW_TEXTS = (
    "[" * DEEP, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP, "9" * 10_000, "1e999999", "-", "NaN", '"\\ud800"', '"\\u0000"',
    "[1,]", "01", "'a'", "\ufeff1", "/**/1",
    *(f"[{small * (many - 1)}{small[:-1]}]" for small in ('1,', '"",', '[1],', '[[]],', '{"":1},') for many in MANY),
    *("{" + ",".join(f'"{n}":{small}' for n in range(many)) + "}" for small in ("1", "[1]") for many in MANY),
)  # fmt: skip
DTYPES = ("F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F4", "X", 7)
SIZES = (0, 1, 2, 3, -1, 2**31, 2**40, 2**63, 2**64, 1.5, "1", None)


def corrupted_bytes(content: bytes, draw: random.Random) -> bytes:
    """Make one to four edits: bits flipped, bytes replaced, removed, repeated or added, eight-byte numbers written."""
    corrupted = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(corrupted) + 1)
        run = draw.choice((1, 2, 8, 64))
        edit = draw.randrange(8)
        if edit == 0 and corrupted:
            corrupted[min(at, len(corrupted) - 1)] ^= 1 << draw.randrange(8)
        elif edit == 1:
            corrupted[at : at + run] = draw.randbytes(run)
        elif edit == 2:
            del corrupted[at:]
        elif edit == 3:
            del corrupted[at : at + run]
        elif edit == 4:
            corrupted[at:at] = corrupted[at : at + run] * draw.choice((1, 2, 100))
        elif edit == 5:
            corrupted[at : at + run] = bytes(min(run, len(corrupted) - at))
        elif edit == 6:
            number = draw.choice((0, 1, 2**31, 2**32, 2**63, 2**64 - 1, len(corrupted), draw.getrandbits(64)))
            place = draw.choice((0, at))
            corrupted[place : place + 8] = number.to_bytes(8, "little")
        else:
            corrupted += draw.randbytes(run)
    return bytes(corrupted)


def corrupted_json(value: Any, draw: random.Random) -> Any:
    """Return a copy with one to three values replaced, removed, repeated or added, anywhere in it."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return _nasty(draw)
        inside, key = draw.choice(places)
        edit = draw.randrange(6)
        if edit == 0:
            del inside[key]
        elif edit == 1 and isinstance(inside, dict):
            inside[draw.choice(("", "extra", "../x", "__class__", "\ud800", "sha256"))] = _nasty(draw)
        elif edit == 1:
            inside.insert(key, draw.choice((inside[key], _nasty(draw))))
        elif edit == 2 and isinstance(inside, dict):
            inside[str(_nasty(draw))[:300]] = inside.pop(key)
        elif edit == 3:
            inside[key] = RAW
        elif edit == 4 and isinstance(inside[key], str):
            at = draw.randrange(len(inside[key]) + 1)
            inside[key] = inside[key][:at] + str(_nasty(draw))[:100] + inside[key][at:]
        else:
            inside[key] = _nasty(draw)
    return value


def json_text(value: Any, draw: random.Random) -> str:
    """Write JSON with random formatting; ``RAW`` is replaced with text that may not be valid JSON."""
    text = json.dumps(
        value,
        ensure_ascii=draw.random() < 0.5,
        indent=draw.choice((None, None, 1)),
        separators=draw.choice((None, (",", ":"))),
    )
    raw = json.dumps(RAW)
    return text.replace(raw, draw.choice(RAW_TEXTS)) if raw in text else text


def safetensors_file(header: dict[str, Any] | str, data: bytes) -> bytes:
    """Return a safetensors file with this header and data; the header is not checked."""
    text = header if isinstance(header, str) else json.dumps(header)
    encoded = text.encode("utf-8", "surrogatepass")
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + data


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of a valid safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def corrupted_header(content: bytes, draw: random.Random) -> bytes:
    """Make one or two edits in a safetensors header: in an entry of a tensor, or in the whole metadata entry."""
    header, data = split_safetensors(content)
    for _ in range(draw.choice((1, 1, 2))):
        names = [name for name, entry in header.items() if name != "__metadata__" and isinstance(entry, dict)]
        if not names:
            break
        name = draw.choice(names)
        entry, edit = dict(header[name]), draw.randrange(6)
        if edit == 0:
            entry["dtype"] = draw.choice(DTYPES)
        elif edit == 1:
            entry["shape"] = [draw.choice(SIZES) for _ in range(draw.randrange(4))]
        elif edit == 2:
            entry["data_offsets"] = [draw.choice((*SIZES, len(data))) for _ in range(draw.choice((1, 2, 2, 3)))]
        elif edit == 3:
            header[draw.choice(("x", "", "../x.lora_A", "a\nb.lora_A", name + ".lora_A"))] = header.pop(name)
            continue
        elif edit == 4:
            entry = draw.choice(NASTY)
        else:
            header["__metadata__"] = draw.choice((header["__metadata__"], *NASTY))
            continue
        header[name] = entry
    return safetensors_file(header, data)


def sealed_file(metadata: Any, tensors: dict[str, np.ndarray], draw: random.Random) -> bytes:
    """Return an adapter file with arbitrary metadata and a fitting SHA-256: a false file, not a damaged one."""
    if isinstance(metadata, dict):
        text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
        for name in sorted(tensors):
            digest.update(f"{name} {tensors[name].shape}\n".encode("utf-8", "surrogatepass"))
            digest.update(np.ascontiguousarray(tensors[name]).tobytes())
        metadata = {**metadata, "sha256": digest.hexdigest()}
    data, header = b"", {}
    for name, array in tensors.items():
        kind = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64"}[array.dtype.name]
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    header["__metadata__"] = {"clipweld": json_text(metadata, draw)}
    return safetensors_file(header, data)


def corrupted_tensors(tensors: dict[str, np.ndarray], draw: random.Random) -> dict[str, np.ndarray]:
    """Change one tensor: to numbers that aren't finite, another shape or type, or a name that no layer has."""
    tensors = {name: array.copy() for name, array in tensors.items()}
    name = draw.choice(list(tensors))
    array = tensors.pop(name)
    edits: tuple[Callable[[], Any], ...] = (
        lambda: array.fill(draw.choice((np.nan, np.inf, -np.inf))),
        lambda: array.reshape(-1)[:1].fill(draw.choice((np.nan, 3e38, 1e-45, -0.0))),
        lambda: array.T.copy(),
        lambda: array.reshape(-1),
        lambda: array[None],
        lambda: array[:0],
        lambda: array[:, :1].copy(),
        lambda: array.astype(draw.choice((np.float16, np.float64, np.int64))),
        lambda: np.zeros((draw.choice((1, 2)), draw.choice((1, 10**5))), np.float32),
        lambda: None,
    )
    found = draw.choice(edits)()
    name = draw.choice((name, name, name, "x", "m.inputs", "n.lora_A", ".lora_A", "a\nb.lora_B", "../x.lora_A"))
    return tensors | {name: array if found is None else found}


def _nasty(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(NASTY))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place in nested JSON: the dict or list, and the key or index in it."""
    if isinstance(value, (dict, list)):
        for key, inner in list(value.items()) if isinstance(value, dict) else list(enumerate(value)):
            yield value, key
            yield from _places(inner)
