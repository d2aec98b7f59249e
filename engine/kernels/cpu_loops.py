"""Loops compiled by numba for the CPU: attention over pages in place, and what is too small for torch.

Owns float32 arithmetic on raw addresses; `cpu` owns shapes and the choice of when to come here. Each kernel is a C function of
one pointer: a block of int64 (addresses and sizes). `run` calls it once, `run_parallel` on every thread of *torch's own*
OpenMP pool: numba's pool would be a second one, spinning on the same cores. Machine code lies in numba's cache under Sluice's
cache folder; only the first start of a version compiles it (about ten seconds).

NOTE: a hidden cost decides the shape of this code: slices with a length known when compiling become straight vector code.
Products of whole tiles must stay in registers while they are summed, which no compiler finds by itself: `_product` writes
them down as vectors.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.config import cache_dir

if not numba.config.CACHE_DIR:
    numba.config.CACHE_DIR = str(cache_dir() / "numba")

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_MATH = {"fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy"}
_LINE = 64  # bytes of a cache line
TILE_KEYS = 64  # keys of a tile of prompt attention
_UNKNOWN = 1 << 40  # the length of an array that is never checked
_KERNEL = types.void(types.voidptr)
_openmp = ctypes.CDLL(None)  # torch loads its OpenMP library for everyone
_thread = types.ExternalFunction("omp_get_thread_num", types.int32())
_num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())


def is_available() -> bool:
    """Whether torch's OpenMP pool can be reached."""
    return hasattr(_openmp, "GOMP_parallel")


def run(kernel: Any, *values: int) -> None:
    """Call a kernel on this thread."""
    kernel.ctypes((ctypes.c_int64 * len(values))(*values))


def run_parallel(kernel: Any, threads: int, *values: int) -> None:
    """Call a kernel on `threads` threads at once; it shares out the work by thread number."""
    block = (ctypes.c_int64 * len(values))(*values)
    _openmp.GOMP_parallel(ctypes.c_void_p(kernel.address), block, threads, 0)


@intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    """int64 -> void*."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@intrinsic
def _prefetch(_context: Any, address: Any) -> Any:
    """Ask for the cache line at an address that will be read soon."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], cgutils.voidptr_t)
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(prefetch, [pointer, number(0), number(3), number(1)])  # to read, keep in all levels, data

    return types.void(types.int64), codegen


@intrinsic
def _next(_context: Any, address: Any) -> Any:
    """The int64 at an address, which goes up by one: how threads share out work of unequal size."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        number = ir.IntType(64)
        pointer = builder.inttoptr(args[0], number.as_pointer())
        return builder.atomic_rmw("add", pointer, number(1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic(prefer_literal=True)
def _product(
    _context: Any,
    left: Any,
    left_step: Any,
    right: Any,
    right_step: Any,
    depth: Any,
    out: Any,
    out_step: Any,
    factors: Any,
    lanes: Any,
    rows: Any,
    vectors: Any,
) -> Any:
    """out [rows, vectors * lanes] = out * factors [rows] + left [rows, depth] @ right [depth, vectors * lanes].

    All are addresses of float32; steps from row to row are in numbers. `factors` 0 stands for an `out` not read. The shape is
    known when compiling, and the sums are in registers from first to last (the micro-kernel of Goto and van de Geijn 2008).
    """
    width, height, across = lanes.literal_value, rows.literal_value, vectors.literal_value

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        left, left_step, right, right_step, depth, out, out_step, factors = args[:8]
        number, real = ir.IntType(64), ir.FloatType()
        vector = ir.VectorType(real, width)
        nothing = ir.Constant(vector, ir.Undefined)
        first = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
        fused = ("contract",)

        def at(base: Any, index: Any, kind: Any) -> Any:
            return builder.inttoptr(builder.add(base, builder.shl(index, number(2))), kind.as_pointer())

        def load(base: Any, index: Any, kind: Any) -> Any:
            return builder.load(at(base, index, kind), align=4)

        def spread(value: Any) -> Any:
            return builder.shuffle_vector(builder.insert_element(nothing, value, ir.IntType(32)(0)), nothing, first)

        places = [builder.mul(out_step, number(row)) for row in range(height)]
        columns = [number(column * width) for column in range(across)]
        empty = builder.icmp_unsigned("==", factors, number(0))
        before = builder.block
        reading, loop, done = (builder.append_basic_block(name) for name in ("reading", "loop", "done"))
        builder.cbranch(empty, loop, reading)
        builder.position_at_end(reading)
        scales = [spread(load(factors, number(row), real)) for row in range(height)]
        there = [
            [builder.fmul(load(out, builder.add(place, column), vector), scale) for column in columns]
            for place, scale in zip(places, scales, strict=True)
        ]
        builder.branch(loop)

        builder.position_at_end(loop)
        index = builder.phi(number)
        index.add_incoming(number(0), before)
        index.add_incoming(number(0), reading)
        sums = [[builder.phi(vector) for _ in columns] for _ in places]
        lines = builder.mul(index, right_step)
        rights = [load(right, builder.add(lines, column), vector) for column in columns]
        for row in range(height):
            value = spread(load(left, builder.add(builder.mul(left_step, number(row)), index), real))
            for column in range(across):
                total = sums[row][column]
                total.add_incoming(ir.Constant(vector, [0.0] * width), before)
                total.add_incoming(there[row][column], reading)
                total.add_incoming(builder.fadd(builder.fmul(value, rights[column], flags=fused), total, flags=fused), loop)
        following = builder.add(index, number(1))
        index.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, done)

        builder.position_at_end(done)
        for row, place in enumerate(places):
            for column, offset in enumerate(columns):
                result = sums[row][column].incomings[-1][0]
                builder.store(result, at(out, builder.add(place, offset), vector), align=4)
        return context.get_dummy_value()

    numbers = (left, left_step, right, right_step, depth, out, out_step, factors)
    return types.void(*(types.int64 for _ in numbers), lanes, rows, vectors), codegen


@intrinsic(prefer_literal=True)
def _highest(_context: Any, address: Any, count: Any) -> Any:
    """The largest of `count` float32, a number known when compiling, none of which is not-a-number."""
    size = count.literal_value

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        real = ir.FloatType()
        vector = ir.VectorType(real, size)
        values = builder.load(builder.inttoptr(args[0], vector.as_pointer()), align=4)
        kind = ir.FunctionType(real, [vector])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fmax.v{size}f32")
        return builder.call(reduce, [values], fastmath=("nnan",))

    return types.float32(types.int64, count), codegen


@njit(inline="always", **_MATH)
def _floats(address, size):
    return carray(_pointer(address), (size,), np.float32)


@njit(inline="always", **_MATH)
def _ints(address, size):
    return carray(_pointer(address), (size,), np.int64)


@njit(inline="always", **_MATH)
def _exp(x):
    """e ** x for float32 |x| <= 87, relative error below 3e-7 (the polynomial of Cephes' expf), in a form made for vectors."""
    x = min(max(x, np.float32(-87.0)), np.float32(87.0))
    n = np.float32(math.floor(x * _LOG2E + np.float32(0.5)))
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


# The three parts of attention are functions of the module, not of the closure below: a closure over functions is compiled
# anew in every process, one over numbers comes from the cache.


@njit(inline="always", **_MATH)
def _score(query, keys, n, scores, length, at, ahead, num_kv_heads, group, head_dim):
    """scores[head, at + t] of n tokens; asks for the n tokens at address `ahead` meanwhile."""
    width = num_kv_heads * head_dim
    scale = np.float32(1.0) / np.sqrt(np.float32(head_dim))
    for t in range(n):
        for line in range(0, width * 4, _LINE):
            _prefetch(ahead + t * width * 4 + line)
        for h in range(num_kv_heads):
            key = keys[t * width + h * head_dim :][:head_dim]
            for g in range(group):
                mine = query[(h * group + g) * head_dim :][:head_dim]
                total = np.float32(0.0)
                for d in range(head_dim):
                    total += mine[d] * key[d]
                scores[(h * group + g) * length + at + t] = total * scale


@njit(inline="always", **_MATH)
def _gather(values, n, scores, length, at, out, ahead, num_kv_heads, group, head_dim):
    """Add the values of n tokens, weighted by scores[head, at + t], to out; asks for what lies at `ahead` meanwhile."""
    width = num_kv_heads * head_dim
    for t in range(n):
        for line in range(0, width * 4, _LINE):
            _prefetch(ahead + t * width * 4 + line)
        for h in range(num_kv_heads):
            value = values[t * width + h * head_dim :][:head_dim]
            for g in range(group):
                mine = out[(h * group + g) * head_dim :][:head_dim]
                weight = scores[(h * group + g) * length + at + t]
                for d in range(head_dim):
                    mine[d] += weight * value[d]


@njit(inline="always", **_MATH)
def _softmax(row):
    """Turn scores into unnormalised weights; returns the largest score and the sum of the weights."""
    top = row[0]
    for i in range(row.shape[0]):
        top = max(top, row[i])
    total = np.float32(0.0)
    for i in range(row.shape[0]):
        weight = _exp(row[i] - top)
        row[i] = weight
        total += weight
    return top, total


@cache
def decode_pieces(num_kv_heads: int, group: int, head_dim: int) -> Any:
    """The attention kernel for one shape of heads.

    Block: kv address, page stride, numbers of a plane, layer; page size, tables, pieces and their count; q [T, H * D];
    sums [N, H * D], tops [N, H], mass [N, H]. pieces [N, 4] int64: the token in q, the place of its page table in tables,
    first and end position. Leaves each piece's unnormalised output, largest score and softmax mass.
    """
    num_heads = num_kv_heads * group
    width, query_width = num_kv_heads * head_dim, num_heads * head_dim

    @cfunc(_KERNEL, cache=True, **_MATH)
    def kernel(block):
        a = carray(block, (12,), np.int64)
        stride, plane, layer, page_size, count = a[1], a[2], a[3], a[4], a[7]
        tables, pieces = _ints(a[5], _UNKNOWN), _ints(a[6], count * 4)
        thread, threads = np.int64(_thread()), np.int64(_num_threads())
        for piece in range(count * thread // threads, count * (thread + 1) // threads):
            token, table = pieces[piece * 4], pieces[piece * 4 + 1]
            first, end = pieces[piece * 4 + 2], pieces[piece * 4 + 3]
            length = end - first
            query = _floats(a[8] + token * query_width * 4, query_width)
            out = _floats(a[9] + piece * query_width * 4, query_width)
            tops, mass = _floats(a[10] + piece * num_heads * 4, num_heads), _floats(a[11] + piece * num_heads * 4, num_heads)
            scores = np.empty(num_heads * length, np.float32)
            for i in range(query_width):
                out[i] = np.float32(0.0)
            keys, values = a[0] + layer * 2 * plane * 4, a[0] + (layer * 2 + 1) * plane * 4
            at = first
            while at < end:
                page = at // page_size
                n = min(end, (page + 1) * page_size) - at
                here = tables[table + page] * stride * 4 + (at - page * page_size) * width * 4
                # The hardware fetches ahead within a page of KV; the jump to the next one has to be told.
                ahead = values + tables[table + first // page_size] * stride * 4
                if at + n < end:
                    ahead = keys + tables[table + page + 1] * stride * 4
                tokens = _floats(keys + here, n * width)
                _score(query, tokens, n, scores, length, at - first, ahead, num_kv_heads, group, head_dim)
                at += n
            for head in range(num_heads):
                tops[head], mass[head] = _softmax(scores[head * length : (head + 1) * length])
            at = first
            while at < end:
                page = at // page_size
                n = min(end, (page + 1) * page_size) - at
                here = tables[table + page] * stride * 4 + (at - page * page_size) * width * 4
                ahead = values + here
                if at + n < end:
                    ahead = values + tables[table + page + 1] * stride * 4
                elif piece + 1 < count:
                    ahead = keys + tables[pieces[piece * 4 + 5] + pieces[piece * 4 + 6] // page_size] * stride * 4
                tokens = _floats(values + here, n * width)
                _gather(tokens, n, scores, length, at - first, out, ahead, num_kv_heads, group, head_dim)
                at += n

    return kernel


@cfunc(_KERNEL, cache=True, **_MATH)
def merge_pieces(block):
    """Join the pieces of each token, which follow one another.

    Block: pieces and their count; H, D; sums, tops, mass as `decode_pieces` left them; out [T, H * D].
    """
    a = carray(block, (8,), np.int64)
    count, num_heads, head_dim = a[1], a[2], a[3]
    pieces = _ints(a[0], count * 4)
    sums = _floats(a[4], count * num_heads * head_dim)
    tops, mass = _floats(a[5], count * num_heads), _floats(a[6], count * num_heads)
    first = np.int64(0)
    while first < count:
        token, end = pieces[first * 4], first + 1
        while end < count and pieces[end * 4] == token:
            end += 1
        for head in range(num_heads):
            mine = _floats(a[7] + (token * num_heads + head) * head_dim * 4, head_dim)
            top = tops[first * num_heads + head]
            for piece in range(first + 1, end):
                top = max(top, tops[piece * num_heads + head])
            total = np.float32(0.0)
            for piece in range(first, end):
                total += mass[piece * num_heads + head] * _exp(tops[piece * num_heads + head] - top)
            for d in range(head_dim):
                mine[d] = np.float32(0.0)
            for piece in range(first, end):
                share = _exp(tops[piece * num_heads + head] - top) / total
                part = sums[(piece * num_heads + head) * head_dim :][:head_dim]
                for d in range(head_dim):
                    mine[d] += share * part[d]
        first = end


@njit(inline="always", **_MATH)
def _pack(page_keys, page_values, n, at, width, head_dim, padded, lines, keys, values):
    """n tokens of one KV head into a tile from its place `at` on: keys as columns, values as rows.

    keys: panels of [head_dim, lines], one for each `lines` keys; values: [TILE_KEYS, padded].
    """
    for t in range(n):
        key, value = page_keys[t * width :][:head_dim], page_values[t * width :][:head_dim]
        column = (at + t) // lines * head_dim * lines + (at + t) % lines
        mine = values[(at + t) * padded :][:head_dim]
        for d in range(head_dim):
            keys[column + d * lines] = key[d]
            mine[d] = value[d]


@njit(inline="always", **_MATH)
def _weigh(row, top, low, high):
    """Turn the scores of a tile into weights, those outside [low, high) into zero. Returns highest score so far, sum."""
    masked = low > 0 or high < TILE_KEYS
    if masked:
        for i in range(TILE_KEYS):
            row[i] = row[i] if low <= i < high else np.float32(-1e30)
    top = max(top, _highest(row.ctypes.data, TILE_KEYS))
    for i in range(TILE_KEYS):
        row[i] = _exp(row[i] - top)
    if masked:
        for i in range(TILE_KEYS):
            row[i] = row[i] if low <= i < high else np.float32(0.0)
    total = np.float32(0.0)
    for i in range(TILE_KEYS):
        total += row[i]
    return top, total


@njit(inline="always", **_MATH)
def _fold(
    query_at, keys_at, values_at, scores_at, sums_at, tops_at, position, tokens, key, held, window,
    group, head_dim, padded, lanes, rows, vectors, most,
):  # fmt: skip
    """Let a tile's queries see `held` packed keys, the first of them at position `key`; see prompt_tiles for the rest.

    tops_at: highest scores, sums of the weights and shrinking factors, [most] each.
    """
    lines = lanes * vectors
    tops, mass, shrink = (_floats(tops_at, most), _floats(tops_at + most * 4, most), _floats(tops_at + most * 8, most))
    first = max(0, key - position) * group // rows * rows  # rows before it see none of these keys
    for row in range(first, tokens * group, rows):
        seen = min(held, position + min(tokens - 1, (row + rows - 1) // group) - key + 1)
        for panel in range(-(-seen // lines)):
            _product(
                query_at + row * head_dim * 4, head_dim, keys_at + panel * head_dim * lines * 4, lines, head_dim,
                scores_at + panel * lines * 4, TILE_KEYS, 0, lanes, rows, vectors,
            )  # fmt: skip
        for i in range(rows):
            place = position + (row + i) // group - key  # of this row's own key in the tile
            scores = _floats(scores_at + i * TILE_KEYS * 4, TILE_KEYS)
            top, total = _weigh(scores, tops[row + i], place - window + 1, min(seen, place + 1))
            shrink[row + i] = _exp(tops[row + i] - top)
            mass[row + i] = mass[row + i] * shrink[row + i] + total
            tops[row + i] = top
        for dim in range(0, padded, lines):
            _product(
                scores_at, TILE_KEYS, values_at + dim * 4, padded, seen, sums_at + (row * padded + dim) * 4, padded,
                tops_at + (most * 2 + row) * 4, lanes, rows, vectors,
            )  # fmt: skip


@cache
def prompt_tiles(num_kv_heads: int, group: int, head_dim: int, lanes: int, rows: int, vectors: int) -> Any:
    """The attention kernel for rows of several tokens: blocked, causal, softmax as it goes (FlashAttention-2, Dao 2023).

    Block: kv address, page stride, numbers of a plane, layer; page size, tables, tiles and their count, a counter at 0; window
    (or a number beyond any context), q and out [T, H * D], the most tokens of a tile. tiles [N, 6] int64: the first token in q,
    how many, position of the first, place of the page table in tables, KV head, first key (a multiple of TILE_KEYS).

    A tile holds all query heads of a KV head, so each key is packed once for all of them; a query's sums run over the same
    tiles of keys wherever its own tile begins, so they never depend on how a prompt was cut. `lanes`, `rows` and `vectors` are
    the shape of `_product` that the processor's registers hold.
    """
    num_heads = num_kv_heads * group
    width, query_width = num_kv_heads * head_dim, num_heads * head_dim
    lines = lanes * vectors  # columns of a product
    padded = -(-head_dim // lines) * lines
    scale = np.float32(1.0 / math.sqrt(head_dim))

    @cfunc(_KERNEL, cache=True, **_MATH)
    def kernel(block):
        a = carray(block, (13,), np.int64)
        stride, plane, layer, page_size, count, window = a[1], a[2], a[3], a[4], a[7], a[9]
        tables, tiles = _ints(a[5], _UNKNOWN), _ints(a[6], count * 6)
        all_keys, all_values = a[0] + layer * 2 * plane * 4, a[0] + (layer * 2 + 1) * plane * 4
        most = -(-a[12] * group // rows) * rows
        room = np.empty(most * (head_dim + padded + 3) + TILE_KEYS * (rows + head_dim + padded) + _LINE, np.float32)
        room[:] = np.float32(0.0)  # rows beyond the last and dims beyond the head are computed too, and not used
        query_at = (room.ctypes.data + _LINE - 1) // _LINE * _LINE
        keys_at = query_at + most * head_dim * 4
        values_at = keys_at + TILE_KEYS * head_dim * 4
        scores_at = values_at + TILE_KEYS * padded * 4
        sums_at = scores_at + TILE_KEYS * rows * 4
        tops_at = sums_at + most * padded * 4
        query, sums = _floats(query_at, most * head_dim), _floats(sums_at, most * padded)
        keys, values = _floats(keys_at, TILE_KEYS * head_dim), _floats(values_at, TILE_KEYS * padded)
        tops, mass = _floats(tops_at, most), _floats(tops_at + most * 4, most)
        while True:
            tile = _next(a[8])
            if tile >= count:
                break
            token, tokens, position = tiles[tile * 6], tiles[tile * 6 + 1], tiles[tile * 6 + 2]
            table, kv_head, key = tiles[tile * 6 + 3], tiles[tile * 6 + 4], tiles[tile * 6 + 5]
            head = kv_head * group * head_dim
            for t in range(tokens):
                asked = _floats(a[10] + ((token + t) * query_width + head) * 4, group * head_dim)
                mine = query[t * group * head_dim :][: group * head_dim]
                for i in range(group * head_dim):
                    mine[i] = asked[i] * scale
            for row in range(most):
                tops[row], mass[row] = np.float32(-1e30), np.float32(0.0)
            for i in range(most * padded):
                sums[i] = np.float32(0.0)
            end = position + tokens
            while key < end:
                held = min(TILE_KEYS, end - key)
                at = key
                while at < key + held:
                    page = at // page_size
                    n = min(key + held, (page + 1) * page_size) - at
                    here = tables[table + page] * stride * 4 + ((at - page * page_size) * width + kv_head * head_dim) * 4
                    page_keys, page_values = _floats(all_keys + here, n * width), _floats(all_values + here, n * width)
                    _pack(page_keys, page_values, n, at - key, width, head_dim, padded, lines, keys, values)
                    at += n
                _fold(
                    query_at, keys_at, values_at, scores_at, sums_at, tops_at, position, tokens, key, held, window,
                    group, head_dim, padded, lanes, rows, vectors, most,
                )  # fmt: skip
                key += TILE_KEYS
            for row in range(tokens * group):
                mine = _floats(a[11] + ((token + row // group) * query_width + head + row % group * head_dim) * 4, head_dim)
                found = sums[row * padded :][:head_dim]
                part = np.float32(1.0) / mass[row]
                for d in range(head_dim):
                    mine[d] = found[d] * part

    return kernel


@cfunc(_KERNEL, cache=True, **_MATH)
def write_kv(block):
    """Put the keys and values of each token into its page.

    Block: kv address, page stride, numbers of a plane, layer; pages [T], slots [T], T, numbers of a token; k and its row
    stride; v and its row stride (in numbers).
    """
    a = carray(block, (12,), np.int64)
    stride, plane, layer, width = a[1], a[2], a[3], a[7]
    pages, slots = _ints(a[4], a[6]), _ints(a[5], a[6])
    thread, threads = np.int64(_thread()), np.int64(_num_threads())
    for t in range(a[6] * thread // threads, a[6] * (thread + 1) // threads):
        place = a[0] + (pages[t] * stride + layer * 2 * plane + slots[t] * width) * 4
        keys, values = _floats(place, width), _floats(place + plane * 4, width)
        k, v = _floats(a[8] + t * a[9] * 4, width), _floats(a[10] + t * a[11] * 4, width)
        for i in range(width):
            keys[i] = k[i]
            values[i] = v[i]


@cache
def add_rms_norm(width: int, eps: float) -> Any:
    """Block: T; x, residual [T, width]; weight; out, total. total = x + residual, out = total / rms(total) * weight."""
    small = np.float32(eps)

    @cfunc(_KERNEL, cache=True, **_MATH)
    def kernel(block):
        a = carray(block, (6,), np.int64)
        weight = _floats(a[3], width)
        thread, threads = np.int64(_thread()), np.int64(_num_threads())
        for t in range(a[0] * thread // threads, a[0] * (thread + 1) // threads):
            row = t * width * 4
            x, r = _floats(a[1] + row, width), _floats(a[2] + row, width)
            o, s = _floats(a[4] + row, width), _floats(a[5] + row, width)
            square = np.float32(0.0)
            for i in range(width):
                value = x[i] + r[i]
                s[i] = value
                square += value * value
            factor = np.float32(1.0) / np.sqrt(square / np.float32(width) + small)
            for i in range(width):
                o[i] = s[i] * factor * weight[i]

    return kernel


@cache
def rotary(num_heads: int, head_dim: int) -> Any:
    """Block: T; x [T, H, D] and its row stride in numbers; cos, sin [T, D / 2]; out [T, H, D]."""
    half = head_dim // 2

    @cfunc(_KERNEL, cache=True, **_MATH)
    def kernel(block):
        a = carray(block, (6,), np.int64)
        thread, threads = np.int64(_thread()), np.int64(_num_threads())
        for t in range(a[0] * thread // threads, a[0] * (thread + 1) // threads):
            c, s = _floats(a[3] + t * half * 4, half), _floats(a[4] + t * half * 4, half)
            for h in range(num_heads):
                x = a[1] + (t * a[2] + h * head_dim) * 4
                o = a[5] + (t * num_heads + h) * head_dim * 4
                low, high = _floats(x, half), _floats(x + half * 4, half)
                to_low, to_high = _floats(o, half), _floats(o + half * 4, half)
                for i in range(half):
                    to_low[i] = low[i] * c[i] - high[i] * s[i]
                    to_high[i] = high[i] * c[i] + low[i] * s[i]

    return kernel


@cfunc(_KERNEL, cache=True, **_MATH)
def silu_mul(block):
    """Block: T, F; x [T, 2F]; out [T, F] = silu(x[:, :F]) * x[:, F:]."""
    a = carray(block, (4,), np.int64)
    width = a[1]
    thread, threads = np.int64(_thread()), np.int64(_num_threads())
    for t in range(a[0] * thread // threads, a[0] * (thread + 1) // threads):
        gate, up = _floats(a[2] + t * width * 8, width), _floats(a[2] + t * width * 8 + width * 4, width)
        out = _floats(a[3] + t * width * 4, width)
        for i in range(width):
            out[i] = gate[i] * up[i] / (np.float32(1.0) + _exp(-gate[i]))
