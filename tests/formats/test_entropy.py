import numpy as np
import pytest

from lightning_xai_compress.formats.contexts import WIDTHS, frequencies, level_count, lowest
from lightning_xai_compress.formats.entropy import BITMAP, Block, Header, decode, encode


def block(rng, rows, columns, *, widths=(2, 3, 4, 5, 6, 7, 8), scaled=True):
    """Laplacian codes that fill their width differently in every row, some rows empty."""
    width = rng.choice(widths, rows).astype(np.uint8)
    high = np.maximum(2.0 ** (width - 1) - 1, width == BITMAP)[:, None]
    spread = rng.uniform(0.05, 1.0, (rows, 1)) * (rng.random((rows, 1)) < 0.8)
    values = np.clip(np.rint(rng.laplace(0, 1, (rows, columns)) * spread * high), -high, high)
    values[width == BITMAP] = np.abs(values[width == BITMAP])
    scales = rng.integers(0x3A00, 0x3C80, rows).astype(np.uint16) if scaled else None
    return Block(values.astype(np.int8), width, scales)


def shapes(blocks):
    return [(*each.values.shape, each.scales is not None) for each in blocks]


def information(values, *, by=None):
    """Zeroth-order entropy of integers in bytes, by rows of the same label if there are labels."""
    if by is not None:
        return sum(information(values[by == label]) for label in np.unique(by))
    share = np.unique(values, return_counts=True)[1] / values.size
    return float(-(share * np.log2(share)).sum() * values.size / 8)


@pytest.mark.parametrize("seed", range(12))
def test_blocks_of_all_sorts_come_back(seed):
    rng = np.random.default_rng(seed)
    blocks = [
        block(rng, int(rng.integers(1, 60)), int(rng.integers(1, 200)), widths=widths, scaled=BITMAP not in widths)
        for widths in [(2,), (8,), (BITMAP,), (2, 3, 4, 5, 6, 7, 8), (3, 6), (BITMAP,)]
    ]

    encoded = encode(blocks)
    decoded = list(decode(encoded.words, encoded.header, shapes(blocks)))

    assert len(decoded) == len(blocks)
    for before, after in zip(blocks, decoded, strict=True):
        assert after.values.tolist() == before.values.tolist()
        assert after.widths.tolist() == before.widths.tolist()
        if before.scales is None:
            assert after.scales is None
        else:
            live = before.values.any(1)
            assert after.scales[live].tolist() == before.scales[live].tolist()
            assert not after.scales[~live].any()


@pytest.mark.parametrize("scale", [0x0001, 0x7F7F])
def test_the_smallest_and_the_largest_scale_come_back(scale):
    blocks = [Block(np.ones((1, 1), np.int8), np.array([2], np.uint8), np.array([scale], np.uint16))]
    blocks += [Block(np.ones((1, 1), np.int8), np.array([8], np.uint8), np.array([0x3F80], np.uint16))]

    encoded = encode(blocks)

    assert [int(each.scales[0]) for each in decode(encoded.words, encoded.header, shapes(blocks))] == [scale, 0x3F80]


def test_no_blocks_are_an_empty_stream():
    encoded = encode([])

    assert encoded.words.size == 0
    assert list(decode(encoded.words, encoded.header, [])) == []


def test_the_bits_that_are_told_are_those_of_the_stream():
    rng = np.random.default_rng(0)
    blocks = [block(rng, 100, 300), block(rng, 30, 2000)]

    encoded = encode(blocks)

    told = sum(encoded.code_bits) + sum(encoded.scale_bits)
    assert told == pytest.approx(32 * len(encoded.words), rel=0.002, abs=64)
    assert len(encoded.code_bits) == len(encoded.scale_bits) == 2


def test_rows_that_differ_are_told_apart():
    rng = np.random.default_rng(0)
    dense = rng.random(200) < 0.5
    values = np.where(rng.random((200, 500)) < np.where(dense, 0.5, 0.02)[:, None], rng.choice([-1, 1], (200, 500)), 0)
    one = Block(values.astype(np.int8), np.full(200, 2, np.uint8))

    told = encode([one]).code_bits[0] / 8

    apart = information(values, by=dense)
    assert apart < 0.9 * information(values)
    assert told < 1.01 * apart + 25  # which row is which: 200 bits


def test_blocks_that_are_alike_share_their_tables():
    rng = np.random.default_rng(0)
    values = np.clip(np.rint(rng.laplace(0, 20, (320, 30))), -127, 127).astype(np.int8)
    blocks = [Block(part, np.full(8, 8, np.uint8)) for part in np.split(values, 40)]

    encoded = encode(blocks)

    assert len(encoded.header.contexts) <= 3
    assert 4 * len(encoded.words) < 1.01 * information(values) + 40


def test_codes_with_gaps_are_not_smoothed_over():
    rng = np.random.default_rng(0)
    values = (16 * rng.integers(-7, 8, (100, 500))).astype(np.int8)

    told = encode([Block(values, np.full(100, 8, np.uint8))]).code_bits[0] / 8

    assert told < 1.01 * information(values) + 30


@pytest.mark.parametrize(("width", "value"), [(2, 2), (4, -8), (8, -128), (BITMAP, -1), (BITMAP, 2)])
def test_codes_outside_their_width_are_refused(width, value):
    with pytest.raises(ValueError, match="codes must lie within"):
        encode([Block(np.array([[0, value]], np.int8), np.array([width], np.uint8))])


@pytest.mark.parametrize("width", [0, 9])
def test_unknown_widths_are_refused(width):
    with pytest.raises(ValueError, match=r"widths must lie in 1\.\.8"):
        encode([Block(np.zeros((1, 2), np.int8), np.array([width], np.uint8))])


@pytest.mark.parametrize(
    ("header", "error"),
    [
        (Header(((9, 0),), (0, 1)), "context of width 9 and mode 0"),
        (Header(((0, 0),), (0, 1)), "context of width 0"),
        (Header(((2, 5),), (0, 1)), "context of width 2 and mode 5"),
        (Header(((2, 0),) * 300, (0, 1)), "300 contexts"),
        (Header(((2, 0),), (-1, 1)), "1 scales from -1"),
        (Header(((2, 0),), (0, 1 << 20)), "1048576 scales"),
        (Header((), (0, 1)), "codes without a context"),
    ],
)
def test_headers_that_make_no_sense_are_refused(header, error):
    with pytest.raises(ValueError, match=error):
        list(decode(np.array([5], np.uint32), header, [(2, 2, True)]))


def test_a_stream_with_something_left_is_refused():
    rng = np.random.default_rng(0)
    blocks = [block(rng, 10, 100), block(rng, 10, 100)]
    encoded = encode(blocks)

    with pytest.raises(ValueError, match="the stream holds more than its index says"):
        list(decode(encoded.words, encoded.header, shapes(blocks)[:1]))


@pytest.mark.parametrize("width", WIDTHS)
def test_every_symbol_of_a_width_has_a_frequency(width):
    symbols = 2 if width == BITMAP else 2**width - 1

    for mode in range(5):
        table = frequencies(np.full(level_count(width, mode), 9), width, mode)

        assert table.tolist() == [2.0**17] * symbols  # level 9: one octave above the lowest
        assert symbols - 1 + lowest(width) == max(1, 2 ** (width - 1) - 1)
