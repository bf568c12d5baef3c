"""Damage to packed files: in their bytes as they are, and beneath a digest that is right again."""

import copy
import hashlib
import json
import zlib

PARTS = ("stream", "rest", "index")
NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    16,
    64,
    255,
    256,
    4095,
    4096,
    65535,
    1 << 20,
    1 << 31,
    1 << 32,
    1 << 62,
    1 << 63,
    1 << 64,
]
VALUES = [
    *NUMBERS,
    *(-1, -2, 0.5, 1e300, True, False, None, "", "float32", "float16", "bool", "bfloat16", "complex128", "uint16"),
    *("..", "a/b", "conv.weight", "x" * 2000, "\ud800", "9" * 100, [], {}, [0], [[]], [1, 2], {"a": 1}),
]


def take_apart(data):
    """The header, and the bytes of each part."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    return header, {name: data[start + header[name]["data_offsets"][0] :][: length(header, name)] for name in PARTS}


def length(header, name):
    first, end = header[name]["data_offsets"]
    return end - first


def put_together(parts):
    """A file of these parts, with a good header and a good digest."""
    header = {"__metadata__": {"format": "lightning-xai-compress", "version": "1", "sha256": "0" * 64}}
    offset = 0
    for name in PARTS:
        size = len(parts[name])
        shape = [size // 4 if name == "stream" else size]
        header[name] = {"dtype": "U32" if name == "stream" else "U8", "shape": shape}
        header[name]["data_offsets"] = [offset, offset + size]
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return sealed(len(text).to_bytes(8, "little") + text + b"".join(parts[name] for name in PARTS), b"0" * 64)


def sealed(data, digest):
    """The file with a digest that is right, if the place of the old one is still there."""
    data = data.replace(digest, b"0" * 64, 1)
    return data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1)


def damaged(data, rng, first=0, end=None):
    """Bytes with one to three changes between two positions."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        end = len(data) if end is None else min(end, len(data))
        at = int(rng.integers(first, max(first + 1, end)))
        some = int(rng.integers(1, 9))
        other = int(rng.integers(0, max(1, len(data))))
        kind = rng.integers(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1 and at < len(data):
            data[at] = int(rng.integers(256))
        elif kind == 2:
            del data[at : at + some]
        elif kind == 3:
            data[at:at] = rng.bytes(some)
        elif kind == 4 and rng.random() < 0.3:
            del data[at:]
        elif kind == 5:
            data[at : at + some], data[other : other + some] = data[other : other + some], data[at : at + some]
        else:
            data[at : at + some] = bytes([int(rng.choice([0, 255, 48, 57, 91, 34]))]) * some
    return bytes(data)


def damaged_json(index, rng):
    """An index with one to three values changed, moved, doubled or left out."""
    index = json.loads(json.dumps(index))
    for _ in range(int(rng.integers(1, 4))):
        spots = list(places(index))
        if not spots:
            break
        container, key = spots[int(rng.integers(len(spots)))]
        other_container, other_key = spots[int(rng.integers(len(spots)))]
        kind = rng.integers(8)
        if kind <= 2:
            container[key] = copy.deepcopy(VALUES[int(rng.integers(len(VALUES)))])
        elif kind == 3 and type(container[key]) is int:
            container[key] += int(rng.choice([-3, -1, 1, 2, 100, 1 << 20]))
        elif kind == 4:
            del container[key]
        elif kind == 5 and isinstance(container, list):
            container.insert(int(rng.integers(len(container) + 1)), json.loads(json.dumps(container[key])))
        elif kind == 6:
            container[key] = json.loads(json.dumps(other_container[other_key]))
        elif isinstance(container, list) and len(container) > 1:
            swap = int(rng.integers(len(container)))
            container[key], container[swap] = container[swap], container[key]
    return index


def places(content):
    """Where values stand: containers and keys."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(pairs):
        yield content, key
        if isinstance(value, dict | list):
            yield from places(value)


def any_bytes(data, rng):
    """Damage to the file as it is; its digest is not made right."""
    start = 8 + int.from_bytes(data[:8], "little")
    regions = [(0, 8), (8, start), (start, len(data)), (0, len(data))]
    return damaged(data, rng, *regions[int(rng.integers(len(regions)))])


def sealed_header(data, rng):
    """Damage to length and header; the digest is made right where it can be."""
    start = 8 + int.from_bytes(data[:8], "little")
    digest = json.loads(data[8:start])["__metadata__"]["sha256"].encode()
    return sealed(damaged(data, rng, 0, start), digest)


def sealed_stream(data, rng):
    """Damage to the codes, in whole words."""
    parts = take_apart(data)[1]
    stream = damaged(parts["stream"], rng)
    parts["stream"] = stream[: len(stream) // 4 * 4]
    return put_together(parts)


def sealed_rest(data, rng):
    """Damage to the byte planes."""
    parts = take_apart(data)[1]
    return put_together({**parts, "rest": damaged(parts["rest"], rng)})


def sealed_index(data, rng):
    """Damage to the index as it is deflated, or to its text."""
    parts = take_apart(data)[1]
    if rng.random() < 0.2:
        return put_together({**parts, "index": damaged(parts["index"], rng)})
    return put_together({**parts, "index": zlib.compress(damaged(zlib.decompress(parts["index"]), rng))})


def sealed_values(data, rng):
    """Damage to what the index says."""
    parts = take_apart(data)[1]
    index = damaged_json(json.loads(zlib.decompress(parts["index"])), rng)
    return put_together({**parts, "index": zlib.compress(json.dumps(index).encode())})


def sealed_swap(data, rng):
    """Parts of another order, or one of them twice."""
    parts = take_apart(data)[1]
    names = [PARTS[int(i)] for i in rng.integers(0, 3, 3)]
    parts = {name: damaged(parts[own], rng) for name, own in zip(PARTS, names, strict=True)}
    parts["stream"] = parts["stream"][: len(parts["stream"]) // 4 * 4]
    return put_together(parts)
