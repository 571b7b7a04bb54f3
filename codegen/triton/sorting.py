"""Device functions that sort pairs by expert, list the tiles of each expert's rows, and find them again.

As those of `tiles.py`, their text is copied into the kernels that use them. A pair has the number token * K + slot; ids
that name no expert are skipped and come last.
"""
# pyright: basic, reportGeneralTypeIssues=false, reportAssignmentType=false
# mypy: disable-error-code="no-untyped-def, assignment, attr-defined, no-untyped-call"
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from sparsec.codegen.triton.tiles import column, lanes, pick


@triton.jit
def kept_ids(ids, live, E: tl.constexpr, K: tl.constexpr):
    """ids [rows, K_PAD] with -1 for those of experts that are not there, of rows that are not live, of padded slots."""
    return tl.where(live[:, None] & (lanes(ids, 1) < K) & (ids >= 0) & (ids < E), ids, -1).to(tl.int32)


@triton.jit
def hits(ids, K: tl.constexpr, E_PAD: tl.constexpr):
    """How often each row of ids [rows, K_PAD] chose each expert: [rows, E_PAD]."""
    expert = tl.arange(0, E_PAD)[None, :]
    count = (tl.expand_dims(column(ids, 0), 1) == expert).to(tl.int32)
    for j in tl.static_range(1, K):
        count += (tl.expand_dims(column(ids, j), 1) == expert).to(tl.int32)
    return count


@triton.jit
def place(order, ids, chosen, rows, live, first, earlier, total, pairs, K: tl.constexpr, E_PAD: tl.constexpr):
    """Write the pairs of a block of rows to their places in `order`.

    `chosen` [rows, E_PAD] are the hits of `kept_ids` [rows, K_PAD], `first` [E_PAD] is where the block's first pair of
    each expert goes, `earlier` counts the kept pairs before the block, `total` those that are kept of all `pairs`.
    """
    slot = lanes(ids, 1)
    position = pick(first[None, :] + tl.cumsum(chosen, axis=0) - chosen, ids, E_PAD)
    if K > 1:  # a row may choose an expert twice
        twins = tl.expand_dims(ids, 1) == tl.expand_dims(ids, 2)
        twins = twins & (tl.expand_dims(slot, 1) < tl.expand_dims(slot, 2))
        position += tl.sum(twins.to(tl.int32), axis=2)
    pair = rows[:, None].to(tl.int32) * K + slot
    if total < pairs:
        kept = (ids >= 0).to(tl.int32)
        upto = tl.reshape(tl.cumsum(tl.reshape(kept, ids.shape[0] * ids.shape[1]), axis=0), ids.shape)
        position = tl.where(ids >= 0, position, total + pair - (earlier + upto - kept))
    tl.store(order + position, pair, mask=live[:, None] & (slot < K))


@triton.jit
def group_few(order, offsets, tiles, ids, tokens, E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr,
              LISTED: tl.constexpr):  # fmt: skip
    """Sort a few pairs by comparing each with each: `order`, `offsets` and the tile lists for `kept_ids` [rows, K_PAD].

    No sum runs over the experts, and with one warp no program waits for itself.
    """
    N: tl.constexpr = ids.shape[0] * ids.shape[1]
    pairs = tokens * K
    row = tl.arange(0, ids.shape[0])[:, None]
    slot = lanes(ids, 1)
    # Pairs that are skipped come last, and places that hold no pair after them.
    key = tl.where((slot < K) & (row < tokens), tl.where(ids >= 0, ids, E), E + 1)
    key = tl.reshape(key, N)
    # Sums run over axis 0, which one warp holds in registers.
    mine = key[None, :]
    other = key[:, None]
    index = tl.arange(0, N)
    earlier = (other < mine) | ((other == mine) & (index[:, None] < index[None, :]))
    place = tl.sum(earlier.to(tl.int32), axis=0)
    start = tl.sum((other < mine).to(tl.int32), axis=0)
    tl.store(order + place, tl.reshape(row * K + slot, N), mask=key <= E)
    expert = tl.arange(0, E_PAD)
    stops = tl.sum((other <= expert[None, :]).to(tl.int32), axis=0)
    store_offsets(offsets, stops, E, E_PAD)
    if LISTED:
        stop = tl.sum((other <= mine).to(tl.int32), axis=0)
        for list in tl.static_range(4):
            if list == 0 or (8 << list) < N:  # else tiles are as in the list before
                # The first pair of each tile writes it.
                block = (place - start) // (16 << list)
                first = (place - start == block * (16 << list)) & (key <= E)
                at = tl.sum((earlier & first[:, None]).to(tl.int32), axis=0)
                used = tl.sum((first & (key < E)).to(tl.int32), axis=0)
                all = tl.sum(first.to(tl.int32), axis=0)
            head = tiles + list * ((pairs // 16 + (E + 2)) * 4)
            store_tile(head + (1 + at) * 4, key, start, stop, block, first)
            store_tile(head, used, all, 0, 0, True)
            past = tl.arange(0, 2 * N)
            unused = (past >= all) & (past < pairs // (16 << list) + tl.minimum(E + 1, pairs))
            store_tile(head + (1 + past) * 4, E + 1, pairs, pairs, 0, unused)


@triton.jit
def add_counts(counts, program, programs, E: tl.constexpr, E_PAD: tl.constexpr):
    """The sums of counts [programs, E] over all programs, and over those before this one: both [E_PAD]."""
    MANY: tl.constexpr = max(1, min(16, 2048 // E_PAD))
    expert = tl.arange(0, E_PAD)[None, :]
    total = tl.zeros([MANY, E_PAD], tl.int32)
    before = tl.zeros([MANY, E_PAD], tl.int32)
    start = 0
    while start < programs:
        for i in tl.static_range(4):  # loads that do not wait for each other
            other = start + i * MANY + tl.arange(0, MANY)[:, None]
            count = tl.load(counts + other * E + expert, mask=(other < programs) & (expert < E), other=0)
            total += count
            before += tl.where(other < program, count, 0)
        start += 4 * MANY
    return tl.sum(total, axis=0), tl.sum(before, axis=0)


@triton.jit
def store_offsets(offsets, stops, E: tl.constexpr, E_PAD: tl.constexpr):
    """Write where the pairs of each expert start, and after the last where they stop."""
    expert = tl.arange(0, E_PAD)
    tl.store(offsets + expert + 1, stops, mask=expert < E)
    tl.store(offsets + expert, 0, mask=expert == 0)


@triton.jit
def list_tiles(tiles, count, stops, kept, pairs, worker, workers, E: tl.constexpr, E_PAD: tl.constexpr):
    """Write the tile lists, given the experts' counts of pairs and where these stop, both [E_PAD], and all `kept` ones.

    List j is for tiles of 16 << j rows. Each of `workers` programs writes some row blocks of every expert.
    """
    list = tl.arange(0, 4)[:, None]
    expert = tl.arange(0, E_PAD)[None, :]
    rows = 16 << list
    blocks = (count[None, :] + rows - 1) // rows
    ends = tl.cumsum(blocks, axis=1)
    used = tl.max(ends, axis=1, keep_dims=True)
    skipped = (pairs - kept + rows - 1) // rows
    head = tiles + list * ((pairs // 16 + (E + 2)) * 4)
    if worker == 0:
        store_tile(head, used, used + skipped, 0, 0, list >= 0)
    at = head + (1 + ends - blocks) * 4
    start = stops - count
    block = worker
    most = (tl.max(count, axis=0) + 15) // 16
    while block < most:
        store_tile(at + block * 4, expert, start[None, :], stops[None, :], block, block < blocks)
        block += workers
    # Skipped pairs, as expert E, and what lies past them, as expert E + 1.
    most = (pairs - kept) // 16 + 1 + tl.minimum(E + 1, pairs)
    past = pairs // rows + tl.minimum(E + 1, pairs) - used
    first = worker * 64
    while first < most:
        i = first + tl.arange(0, 64)[None, :]
        of_skipped = i < skipped
        begin = tl.where(of_skipped, kept, pairs)
        store_tile(head + (1 + used + i) * 4, tl.where(of_skipped, E, E + 1), begin, pairs, tl.where(of_skipped, i, 0),
                   i < past)  # fmt: skip
        first += workers * 64


@triton.jit
def store_tile(entry, expert, start, stop, block, mask):
    """Write an entry of a tile list, as `listed_tile` reads it."""
    tl.store(entry, expert, mask=mask)
    tl.store(entry + 1, start, mask=mask)
    tl.store(entry + 2, stop, mask=mask)
    tl.store(entry + 3, block, mask=mask)


@triton.jit
def tile_list(tiles, pairs, E: tl.constexpr, BLOCK_M: tl.constexpr):
    """The list for tiles of BLOCK_M rows: first the numbers of tiles of experts and of all pairs, then the tiles."""
    LIST: tl.constexpr = (BLOCK_M >= 32) + (BLOCK_M >= 64) + (BLOCK_M >= 128)
    return tiles + LIST * ((pairs // 16 + (E + 2)) * 4)


@triton.jit
def listed_tile(
    tile,
    tiles,
    pairs,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """What `find_tile` tells, read from the tile list in one go."""
    entry = tile_list(tiles, pairs, E, BLOCK_M) + (1 + tile // COLUMNS) * 4
    expert = tl.load(entry)
    start = tl.load(entry + 1)
    stop = tl.load(entry + 2)
    # The tile's group of row blocks begins this many tiles before it.
    ahead = tl.load(entry + 3) % GROUP_M
    group = tl.load(entry + 3) // GROUP_M
    tile = tile % COLUMNS + ahead * COLUMNS
    rows = tl.maximum(tl.minimum((stop - start + BLOCK_M - 1) // BLOCK_M - group * GROUP_M, GROUP_M), 1)
    return expert, start, stop, group * GROUP_M + tile % rows, tile // rows


@triton.jit
def find_tile(
    tile,
    offsets,
    pairs,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """What program `tile` computes: expert, its first row and the end of its rows, row block, column block.

    Experts follow each other; within one, GROUP_M row blocks share a column block before the next one starts, so that
    its weights stay in the cache. Skipped pairs come last, as expert E; more programs than tiles get an expert > E.
    """
    e = tl.arange(0, E_PAD)
    starts = tl.load(offsets + e, mask=e <= E, other=pairs)
    stops = tl.load(offsets + e + 1, mask=e < E, other=pairs)
    blocks = (stops - starts + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(blocks, axis=0) * COLUMNS
    past = ends <= tile
    expert = tl.sum(past.to(tl.int32), axis=0)
    start = tl.sum(tl.where(e == expert, starts, 0), axis=0)
    stop = tl.sum(tl.where(e == expert, stops, 0), axis=0)
    tile -= tl.max(tl.where(past, ends, 0), axis=0)
    group = tile // (GROUP_M * COLUMNS)
    tile -= group * GROUP_M * COLUMNS
    rows = tl.maximum(tl.minimum((stop - start + BLOCK_M - 1) // BLOCK_M - group * GROUP_M, GROUP_M), 1)
    return expert, start, stop, group * GROUP_M + tile % rows, tile // rows
