"""Device functions that generated kernels are built of. Their text is copied into the kernels that use them.

A tile is a block of a tensor in registers: axis 0 holds tokens (rows), and each further axis is padded to a power of
two. Padded lanes hold anything; a function that mixes lanes takes the true SIZE and leaves them out. Floats are f32,
integers i32.
"""
# pyright: basic, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# mypy: disable-error-code="no-untyped-def, assignment, attr-defined, no-untyped-call"
# ruff: noqa: ANN001, ANN201, PLR0124

import triton
import triton.language as tl


@triton.jit
def arrive(PDL: tl.constexpr):
    """Wait until what the launch in front of this one wrote can be read; then the next may start where there is room.

    Every program of every launch goes through it, before it writes or leaves. So all that came before the launch in
    front had ended when that one let this one start: what they wrote may be read ahead of `arrive`.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def lanes(x, AXIS: tl.constexpr):
    """0, 1, 2 ... along AXIS of x, in a shape that broadcasts with x."""
    at = tl.arange(0, x.shape[AXIS])
    for axis in tl.static_range(len(x.shape)):
        if axis != AXIS:
            at = tl.expand_dims(at, axis)
    return at


@triton.jit
def guard(x, AXIS: tl.constexpr, SIZE: tl.constexpr, FILL: tl.constexpr):
    """x with FILL in the padded lanes of AXIS."""
    return tl.where(lanes(x, AXIS) < SIZE, x, FILL)


@triton.jit
def softmax(x, AXIS: tl.constexpr, SIZE: tl.constexpr):
    """Softmax along AXIS."""
    x = guard(x, AXIS, SIZE, float("-inf"))
    e = tl.exp(x - tl.max(x, axis=AXIS, keep_dims=True))
    return e / tl.sum(e, axis=AXIS, keep_dims=True)


@triton.jit
def order_key(x):
    """Integers in the order of the floats x: -inf first, inf then NaN last, -0 and 0 alike; neither the least i32 nor
    the greatest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x != x, 0x7FFFFFFE, key)


@triton.jit
def of_key(key):
    """The float that `order_key` gave this integer for; -0 comes back as 0."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def first_lane(key, best, AXIS: tl.constexpr):
    """The lowest lane along AXIS where key is `best`; the axis stays, with one lane."""
    return tl.min(tl.where(key == best, lanes(key, AXIS), 0x7FFFFFFF), axis=AXIS, keep_dims=True)


@triton.jit
def top_k(x, SIZE: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, LARGEST: tl.constexpr):
    """The K greatest (or least) along the last axis, in order, of equals the lowest index first: values and indices.

    Each takes two reductions of integers, which Hopper has an instruction for, and the values come from their keys.
    """
    LAST: tl.constexpr = len(x.shape) - 1
    lane = lanes(x, LAST)
    key = order_key(x) if LARGEST else -1 - order_key(x)
    key = tl.where(lane < SIZE, key, -0x80000000)
    slot = tl.arange(0, K_PAD)
    for axis in tl.static_range(LAST):
        slot = tl.expand_dims(slot, axis)
    for j in tl.static_range(K):
        best = tl.max(key, axis=LAST, keep_dims=True)
        at = first_lane(key, best, LAST)
        if j == 0:
            keys = tl.where(slot == 0, best, 0)
            indices = tl.where(slot == 0, at, 0)
        else:
            keys = tl.where(slot == j, best, keys)
            indices = tl.where(slot == j, at, indices)
        key = tl.where(lane == at, -0x80000000, key)
    return of_key(keys if LARGEST else -1 - keys), indices


@triton.jit
def arg_max(x, AXIS: tl.constexpr, SIZE: tl.constexpr):
    """The index of the greatest along AXIS, of equals the lowest; the axis stays, with one lane."""
    key = tl.where(lanes(x, AXIS) < SIZE, order_key(x), -0x80000000)
    return first_lane(key, tl.max(key, axis=AXIS, keep_dims=True), AXIS)


@triton.jit
def variance(x, AXIS: tl.constexpr, SIZE: tl.constexpr, DIVISOR: tl.constexpr):
    """Sum of the squared distances from the mean along AXIS, over DIVISOR; the axis stays, with one lane."""
    mean = tl.sum(guard(x, AXIS, SIZE, 0), axis=AXIS, keep_dims=True) / SIZE
    return tl.sum(guard((x - mean) * (x - mean), AXIS, SIZE, 0), axis=AXIS, keep_dims=True) / DIVISOR


@triton.jit
def layer_norm(x, AXIS: tl.constexpr, SIZE: tl.constexpr, EPS: tl.constexpr):
    """x less its mean along AXIS, over its standard deviation."""
    mean = tl.sum(guard(x, AXIS, SIZE, 0), axis=AXIS, keep_dims=True) / SIZE
    return (x - mean) / tl.sqrt(variance(x, AXIS, SIZE, SIZE) + EPS)


@triton.jit
def rms_norm(x, AXIS: tl.constexpr, SIZE: tl.constexpr, EPS: tl.constexpr):
    """x over the root of the mean of its squares along AXIS."""
    return x / tl.sqrt(tl.sum(guard(x * x, AXIS, SIZE, 0), axis=AXIS, keep_dims=True) / SIZE + EPS)


@triton.jit
def modulo(x, y):
    """The remainder of integers with the sign of y, whichever way the hardware rounds."""
    return (x % y + y) % y


@triton.jit
def floor_divide(x, y):
    """The quotient of integers, rounded down."""
    return (x - modulo(x, y)) // y


@triton.jit
def pick(x, index, SIZE: tl.constexpr):
    """x[..., index]: lanes of the last axis by number. A number out of range takes the nearest lane."""
    LAST: tl.constexpr = len(x.shape) - 1
    index = tl.minimum(tl.maximum(index.to(tl.int32), 0), SIZE - 1)
    if x.shape[LAST] == 1:  # Triton cannot lay out a gather from one lane or of one
        return tl.broadcast_to(x, index.shape)
    if index.shape[LAST] == 1:
        return tl.sum(tl.where(lanes(x, LAST) == index, x, 0), axis=LAST, keep_dims=True)
    TIMES: tl.constexpr = index.shape[LAST] // x.shape[LAST]
    if TIMES > 1:  # nor, within a warp, a gather of more lanes than there are: each is there TIMES times
        times = tl.arange(0, TIMES)
        for _ in tl.static_range(LAST + 1):
            times = tl.expand_dims(times, 0)
        each, _ = tl.broadcast(tl.expand_dims(x, LAST + 1), times)
        x, index = tl.reshape(each, index.shape), index * TIMES
    return tl.gather(x, index, LAST)


@triton.jit
def put(x, index, value, COUNT: tl.constexpr):
    """x with `value` in the lanes of the last axis that the first COUNT lanes of `index` name; each names another."""
    LAST: tl.constexpr = len(x.shape) - 1
    wanted = tl.expand_dims(index, LAST + 1) == tl.expand_dims(lanes(x, LAST), LAST)
    wanted = wanted & (tl.expand_dims(lanes(index, LAST), LAST + 1) < COUNT)
    hit = tl.max(wanted.to(tl.int32), axis=LAST) != 0
    return tl.where(hit, tl.sum(tl.where(wanted, tl.expand_dims(value, LAST + 1), 0.0), axis=LAST), x)


@triton.jit
def put_sum(x, index, value, COUNT: tl.constexpr):
    """x with the first COUNT lanes of `value` added in the lanes of the last axis that `index` names."""
    LAST: tl.constexpr = len(x.shape) - 1
    wanted = tl.expand_dims(index, LAST + 1) == tl.expand_dims(lanes(x, LAST), LAST)
    wanted = wanted & (tl.expand_dims(lanes(index, LAST), LAST + 1) < COUNT)
    return x + tl.sum(tl.where(wanted, tl.expand_dims(value, LAST + 1), 0.0), axis=LAST)


@triton.jit
def put_scalar(x, index, VALUE: tl.constexpr, COUNT: tl.constexpr):
    """x with VALUE in the lanes of the last axis that the first COUNT lanes of `index` name."""
    LAST: tl.constexpr = len(x.shape) - 1
    wanted = tl.expand_dims(index, LAST + 1) == tl.expand_dims(lanes(x, LAST), LAST)
    wanted = wanted & (tl.expand_dims(lanes(index, LAST), LAST + 1) < COUNT)
    return tl.where(tl.max(wanted.to(tl.int32), axis=LAST) != 0, VALUE, x)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), without overflow."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def tanh(x):
    """Hyperbolic tangent; by its series near 0, where the quotient would cancel."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    e = tl.exp(-2 * tl.abs(x))
    quotient = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def halves(x):
    """The first and the second half of the columns of a tile; of a product they stay in their threads."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def column(x, J: tl.constexpr):
    """Column J of a tile [rows, n]."""
    return tl.sum(tl.where(lanes(x, 1) == J, x, 0), axis=1)


@triton.jit
def owner(row, offsets, E: tl.constexpr, E_PAD: tl.constexpr):
    """The expert that owns a row in the order of experts, its first row and the end of its rows; E: nobody does."""
    e = tl.arange(0, E_PAD)
    stops = tl.load(offsets + e + 1, mask=e < E, other=0x7FFFFFFF)
    past = stops <= row
    start = tl.max(tl.where(past, stops, 0), axis=0)
    stop = tl.min(tl.where(past, 0x7FFFFFFF, stops), axis=0)
    return tl.sum(past.to(tl.int32), axis=0), start, stop


@triton.jit
def owners(rows, offsets, E: tl.constexpr, E_PAD: tl.constexpr):
    """The expert that owns each of a vector of rows; E where nobody does."""
    e = tl.arange(0, E_PAD)
    stops = tl.load(offsets + e + 1, mask=e < E, other=0x7FFFFFFF)
    return tl.sum((stops[None, :] <= rows[:, None]).to(tl.int32), axis=1)


@triton.jit
def places(pairs, order, count, SIZE: tl.constexpr):
    """Where each of a vector of pairs stands among the first `count` entries of `order`, which are at most SIZE."""
    at = tl.arange(0, SIZE)
    found = tl.load(order + at, mask=at < count, other=-1)
    return tl.sum(tl.where(found[None, :] == pairs[:, None], at[None, :], 0), axis=1)


@triton.jit
def fetch(pointers, EARLY: tl.constexpr):
    """Ask for the cache lines at `pointers` without waiting for them, where launches may start early."""
    if EARLY:
        text: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
        tl.inline_asm_elementwise(text, "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1)
