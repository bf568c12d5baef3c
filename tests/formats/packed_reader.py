"""A slow reader of packed files, written from docs/packed-format.md alone, with none of the package's code."""

import hashlib
import json
import math
import zlib

import constriction
import numpy as np

BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex64": 8, "complex128": 16, "bool": 1}
BYTES |= {f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)}
BYTES |= {f"float8_{kind}": 1 for kind in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz")}
STEP = [65536, 71468, 77936, 84990, 92682, 101070, 110218, 120194]
MODES = [(True, 8), (False, 8), (True, 2), (False, 2), (False, 1)]


def read(data):
    """All tensors of a file: name -> (dtype, shape, bytes of the numbers); and the index."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header["__metadata__"]
    assert metadata["format"] == "lightning-xai-compress"
    assert metadata["version"] in ("1", "2", "3")
    digest = metadata["sha256"]
    assert hashlib.sha256(data.replace(digest.encode(), b"0" * 64, 1)).hexdigest() == digest
    parts = {}
    for name in ("stream", "rest", "index"):
        start, end = header[name]["data_offsets"]
        parts[name] = data[8 + length + start : 8 + length + end]
    index = json.loads(zlib.decompress(parts["index"]))
    coded, bitmaps = read_stream(np.frombuffer(parts["stream"], "<u4").astype(np.uint32), index)
    raw = read_rest(parts["rest"], index, bitmaps)
    tensors = {}
    for row in index["tensors"]:
        name = row[0]
        if len(row) == 2:
            tensors[name] = tensors[index["tensors"][row[1]][0]]
        else:
            tensors[name] = (row[1], tuple(row[2]), coded[name] if row[3] == 1 else raw[name])
    return tensors, index


class Adaptive:
    def __init__(self, start, gain):
        self.start, self.weights, self.gain = list(start), list(start), gain

    def decode(self, coder):
        model = constriction.stream.model.Categorical(np.array(self.weights, np.float64), perfect=False)
        symbol = int(coder.decode(model, 1)[0])
        self.weights[symbol] += self.gain
        return symbol

    def fade(self):
        self.weights = [s + math.floor((w - s) / 4) for s, w in zip(self.start, self.weights, strict=True)]


def keys(width, mode):
    """The key of each symbol, in the order of the symbols."""
    if width == 1:
        return [0, 1]
    signed, kept = MODES[mode]
    largest = 2 ** (width - 1) - 1
    result = []
    for value in range(-largest, largest + 1):
        m = abs(value)
        s = max(0, m.bit_length() - 1 - kept)
        key = 65536 if m == largest else (m >> s) + 512 * s
        result.append(-key if signed and value < 0 else key)
    return result


def read_stream(words, index):
    coder = constriction.stream.stack.AnsCoder(words)
    steps = Adaptive([512 // (2 + min(s, 161 - s)) + 1 for s in range(161)], 64)
    models = []
    for width, mode in index["contexts"]:
        every = keys(width, mode)
        level, frequency = 160, {}
        for key in sorted(set(every)):
            level = (level + steps.decode(coder)) % 161
            frequency[key] = STEP[(level - 1) % 8] * 2 ** ((level - 1) // 8) if level else 0
        p = np.array([frequency[key] for key in every], np.float64)
        models.append(constriction.stream.model.Categorical(p, perfect=False))
    contexts = Adaptive([1] * max(2, len(models)), 4)
    first, count = index["scales"]
    coarse = Adaptive([1] * max(2, count), 4)
    sixteen = constriction.stream.model.Categorical(np.ones(16), perfect=False)
    coded, bitmaps = {}, {}
    for row in index["tensors"]:
        if len(row) == 2 or row[3] == 0:
            continue
        name, dtype, shape, kind = row[:4]
        more = row[4] if kind == 1 and len(row) == 5 else 1
        codebooks = [] if isinstance(more, int) else [more] if isinstance(more, str) else more
        rows = shape[0] * (1 if codebooks else more)
        columns = math.prod(shape) // rows
        label = [contexts.decode(coder) for _ in range(rows)]
        contexts.fade()
        numbers = {}
        for context in sorted(set(label)):
            lowest = 0 if index["contexts"][context][0] == 1 else 1 - 2 ** (index["contexts"][context][0] - 1)
            for i in range(rows):
                if label[i] == context:
                    numbers[i] = coder.decode(models[context], columns) + lowest
        matrix = np.array([numbers[i] for i in range(rows)])
        if kind == 2:
            bitmaps[name] = matrix.reshape(-1) == 1
            continue
        live = [i for i in range(rows) if matrix[i].any()]
        high = [coarse.decode(coder) + first for _ in live]
        coarse.fade()
        low = [int(coder.decode(sixteen, 1)[0]) for _ in live]
        weights = np.zeros(matrix.shape, np.float32)
        for i, top, bottom in zip(live, high, low, strict=True):
            bits = top * 16 + bottom - 128 * index["contexts"][label[i]][0]
            scale = np.array([bits << 16], np.uint32).view(np.float32)[0]
            weights[i] = matrix[i].astype(np.float32) * scale
        block = rows // max(1, len(codebooks))
        for start, codebook in zip(range(0, rows, block), codebooks, strict=False):
            numbers = [int(codebook[at : at + 4], 16) << 16 for at in range(0, len(codebook), 4)]
            numbers = np.array([0, *numbers], np.uint32).view(np.float32)  # from zero's place on, then those before it
            weights[start : start + block] = numbers[matrix[start : start + block]]  # negative ones count from the end
        coded[name] = rounded(weights.reshape(-1) + np.float32(0), dtype)
    assert coder.is_empty()
    return coded, bitmaps


def rounded(values, dtype):
    """Bytes of float32 values in a dtype."""
    if dtype != "bfloat16":
        return values.astype(dtype).tobytes()
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()  # to nearest, ties to even


def read_rest(data, index, bitmaps):
    rows = [
        (row[4] if len(row) == 5 else row[1], row[0].split(".")[-1], position)
        for position, row in enumerate(index["tensors"])
        if len(row) > 2 and row[3] != 1
    ]
    planes = list(index["planes"])
    offset, raw = 0, {}
    for held in sorted({row[0] for row in rows}):
        size = BYTES[held]
        own = [index["tensors"][position] for dtype, _, position in sorted(rows) if dtype == held]
        counts = [int(bitmaps[row[0]].sum()) if row[3] == 2 else math.prod(row[2]) for row in own]
        left, numbers = sum(counts), b""
        while left:
            n = min(left, 2**22 // size)
            chunk = np.zeros((n, size), np.uint8)
            for column in range(size):
                length = planes.pop(0)
                piece = data[offset : offset + (length or n)]
                offset += length or n
                chunk[:, column] = np.frombuffer(zlib.decompress(piece) if length else piece, np.uint8)
            numbers += chunk.tobytes()
            left -= n
        start = 0
        for row, count in zip(own, counts, strict=True):
            values = numbers[start : start + count * size]
            start += count * size
            if held != row[1]:
                values = np.frombuffer(values, "<f2").astype(row[1]).tobytes()
            if row[3] == 2:
                full = np.zeros((math.prod(row[2]), BYTES[row[1]]), np.uint8)
                full[bitmaps[row[0]]] = np.frombuffer(values, np.uint8).reshape(-1, BYTES[row[1]])
                values = full.tobytes()
            raw[row[0]] = values
    assert not planes
    assert offset == len(data)
    return raw
