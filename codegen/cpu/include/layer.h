// An expert layer in one parallel region: route, sort, both GEMMs, activation and combine.
//
// `Config` is generated: sizes, types, the activation, the router and the tail if the layer has them. `Sweep` multiplies
// rows by weights. Each chunk of an expert's rows goes through both GEMMs on one core, its activations staying in that core's cache.
// Where there are too few chunks for the cores, all cores share each GEMM's columns instead, and wait between the two.
#pragma once
#include "call.h"
#include "panels8.h"
#include "sort.h"

#ifndef SPARSEC_WAKING_US
#define SPARSEC_WAKING_US 20.0  // a thread that has less to do is left asleep; tests set it to next to nothing
#endif

template <class Config>
struct Layer {
  typedef typename Config::Elem Elem;
  typedef typename Config::Weights Weights;
  typedef typename Weights::template Held<Elem> Held;  // what rows are multiplied as
  typedef typename GemmOf<Held>::type Gemm;
  static constexpr bool NARROW = sizeof(Held) == 1;
  static constexpr int V = 4 / sizeof(Held), S = LANES * V, PACKED = S * Weights::STEPS;  // k's of a step, a packed one

  // Steps of activations along each GEMM's k, in whole packed steps; panels and their bytes; scales of a panel.
  static constexpr int64_t UP_STEPS = ceil_div(Config::hidden, PACKED) * Weights::STEPS;
  static constexpr int64_t DOWN_STEPS = ceil_div(Config::width, PACKED) * Weights::STEPS;
  static constexpr int UP_COLUMNS = Config::parts == 2 ? LANES : 2 * LANES;  // of the activated rows, per panel
  static constexpr int64_t UP_BLOCKS = ceil_div(Config::width, UP_COLUMNS);
  static constexpr int64_t UP_GROUP = NARROW ? GROUP / UP_COLUMNS : 1;  // panels that cannot be parted
  static constexpr int64_t DOWN_BLOCKS = ceil_div(Config::columns, 2 * LANES), COLUMNS = DOWN_BLOCKS * 2 * LANES;
  static constexpr int64_t UP_PANEL = UP_STEPS / Weights::STEPS * PAIR, DOWN_PANEL = DOWN_STEPS / Weights::STEPS * PAIR;
  static constexpr int64_t UP_SCALES = 2 * LANES * (Weights::grouped ? UP_STEPS / Weights::STEPS : 1);
  static constexpr int64_t DOWN_SCALES = 2 * LANES * (Weights::grouped ? DOWN_STEPS / Weights::STEPS : 1);

  // A chunk's rows fill most of a 2 MB second-level cache, or a slice of its activations half of it, not both at a time.
  // Weights of an expert that has more rows are read once for each of its chunks.
  static constexpr int MOST_ROWS = most(32, least(MOST_ROWS_SWEPT, int((3 << 19) / (UP_STEPS * 64) / 32 * 32)));
  // Steps that cannot be parted.
  static constexpr int64_t UNIT = NARROW ? GROUP_STEPS : most(Weights::STEPS, UP_COLUMNS / S);
  static constexpr int64_t SLICES = ceil_div(DOWN_STEPS, most<int64_t>(UNIT, (1 << 20) / (MOST_ROWS * 64)));
  static constexpr int64_t SLICE = ceil_div(ceil_div(DOWN_STEPS, SLICES), UNIT) * UNIT;
  static constexpr int CHUNK_TILES = MOST_ROWS / ROWS;

  // Bytes of 16 rows of x and, for so many steps, of 16 activated rows.
  static constexpr int64_t ROW_BYTES = UP_STEPS * TILE + scale_bytes<Held>(Rows::given, UP_STEPS);
  static constexpr int64_t activated_bytes(int64_t steps) {
    return steps * TILE + scale_bytes<Held>(Rows::activated, steps);
  }

  // Steps along the width.
  struct Slice {
    int64_t first, steps;
  };

  // What one core works in.
  struct Core {
    char *rows, *activated, *expanded;
    Elem* group;     // activated rows that are yet to be quantised [MOST_ROWS, GROUP]
    float* carried;  // sums of earlier slices [DOWN_BLOCKS, MOST_ROWS, 2 * LANES]
  };

  const Call* call;
  const Elem* x;
  const typename Config::Id* ids;
  const typename Config::Weight* weights;
  Sorted sorted;
  Elem* results;  // of every pair, in sorted order [pairs, COLUMNS]
  char *rows, *activated;  // all chunks' tiles, where cores share them
  char *own, *spare;       // each core's
  bool shared;
  int next_thread = 0, next_row = 0, next_chunk = 0, next_part = 0, next_token = 0;

  // ---- memory -------------------------------------------------------------------------------------------------

  static constexpr int64_t OWN_ROWS = CHUNK_TILES * ROW_BYTES, OWN_ACTIVATED = CHUNK_TILES * activated_bytes(SLICE);
  static constexpr int64_t OWN_SUMS = SLICES > 1 ? MOST_ROWS * COLUMNS * 4 : 0;
  static constexpr int64_t OWN = ceil_div(OWN_ROWS + OWN_ACTIVATED, 4096) * 4096;
  static constexpr int64_t EXPANDED = Weights::STEPS > 1 ? most(UP_STEPS, DOWN_STEPS) * PAIR : 0;
  static constexpr int64_t UNROUNDED = NARROW ? MOST_ROWS * GROUP * sizeof(Elem) : 0;
  static constexpr int64_t SPARE = EXPANDED + UNROUNDED + OWN_SUMS;

  static int64_t most_chunks(int64_t pairs) {
    return ceil_div(pairs, MOST_ROWS) + least<int64_t>(pairs, Config::experts);
  }
  static int64_t most_tiles(int64_t pairs) { return ceil_div(pairs, ROWS) + least<int64_t>(pairs, Config::experts); }
  static bool is_shared(int64_t chunks, int threads) { return chunks < 4 * threads && threads > 1; }

  // Lays scratch out; returns its size.
  int64_t lay_out(char* base, int64_t tokens, int threads) {
    const int64_t pairs = tokens * Config::slots;
    int64_t size = 0;
    auto take = [&](int64_t bytes) { return base + (size += ceil_div(bytes, 64) * 64) - ceil_div(bytes, 64) * 64; };
    sorted.order = (int32_t*)take(pairs * 4);
    sorted.place = (int32_t*)take(pairs * 4);
    sorted.bounds = (int32_t*)take((2 * Config::experts + 1) * 4);
    sorted.chunks = (Chunk*)take(most_chunks(pairs) * sizeof(Chunk));
    results = (Elem*)take(pairs * COLUMNS * sizeof(Elem));
    spare = take(threads * SPARE);
    const int64_t begin = size, tiles = most_tiles(pairs);
    own = take(threads * OWN);
    const int64_t alone = size;
    size = begin;  // one way or the other
    if (threads > 1) {
      const int64_t bounded = least<int64_t>(tiles, int64_t(4) * threads * CHUNK_TILES);
      rows = take(bounded * ROW_BYTES);
      activated = take(bounded * activated_bytes(DOWN_STEPS));
    }
    return most(size, alone);
  }

  // ---- one chunk ----------------------------------------------------------------------------------------------

  // The rows of x of a chunk, as tiles; rows beyond the last are zeros.
  void gather(const Chunk& chunk, char* to) const {
    for (int first = 0; first < chunk.rows; first += ROWS, to += ROW_BYTES)
      for (int r = 0; r < ROWS; ++r) {
        if (first + r >= chunk.rows) {
          for (int64_t s = 0; s < UP_STEPS; ++s) memset(to + s * TILE + r * 64, 0, 64);
          if (NARROW) memset(to + UP_STEPS * TILE + r * 4, 0, 4);
          continue;
        }
        const int32_t pair = sorted.order[chunk.begin + first + r];
        const Elem* row = x + int64_t(pair / Config::slots) * Config::hidden;
        if constexpr (NARROW) {
          float scale = quantise_row(row, Config::hidden, UP_STEPS, Gemm::OFFSET, to + r * 64);
          if (Config::early) scale *= float_of(weights[pair]);
          memcpy(to + UP_STEPS * TILE + r * 4, &scale, 4);
          continue;
        }
        if (Config::early) {
          scale_into<Elem>(row, float_of(weights[pair]), Config::hidden, UP_STEPS, to + r * 64, TILE);
          continue;
        }
        for (int64_t s = 0; s < UP_STEPS; ++s) {
          const int64_t left = least<int64_t>(S, Config::hidden - s * S) * int64_t(sizeof(Elem));
          if (left == 64) {
            memcpy(to + s * TILE + r * 64, row + s * S, 64);
            continue;
          }
          memset(to + s * TILE + r * 64, 0, 64);
          if (left > 0) memcpy(to + s * TILE + r * 64, row + s * S, left);
        }
      }
  }

  // Panels of an expert's banks from a block on; of the down-projection, from a step on.
  Panels up_panels(int expert, int64_t begin, int64_t end) const {
    const int64_t first = expert * UP_BLOCKS + begin;
    return {(const char*)call->in[Config::up] + first * UP_PANEL, UP_PANEL, end - begin,
            scales_of<Config::up_scale>(first * UP_SCALES), UP_SCALES};
  }
  Panels down_panels(int expert, int64_t begin, int64_t end, int64_t step) const {
    const int64_t first = expert * DOWN_BLOCKS + begin, packed = step / Weights::STEPS;
    return {(const char*)call->in[Config::down] + first * DOWN_PANEL + packed * PAIR, DOWN_PANEL, end - begin,
            scales_of<Config::down_scale>(first * DOWN_SCALES + (Weights::grouped ? packed * 2 * LANES : 0)),
            DOWN_SCALES};
  }
  template <int place>
  const float* scales_of(int64_t offset) const {
    if constexpr (place < 0) return nullptr;
    return (const float*)call->in[place < 0 ? 0 : place] + offset;
  }

  // Up-projection and activation of some blocks. place(row, column): where a row's values from there on go.
  template <class Place>
  void activate(const Chunk& chunk, const Core& core, const char* a, int64_t begin, int64_t end, Place place) const {
    const float* bias =
        Config::up_bias < 0 ? nullptr
                            : (const float*)call->in[Config::up_bias] + chunk.expert * UP_BLOCKS * 2 * LANES;
    Sweep<Gemm, Weights, Rows::given>::run(
        a, ROW_BYTES, a + UP_STEPS * TILE, chunk.rows, up_panels(chunk.expert, begin, end), UP_STEPS, core.expanded,
        [&](int64_t panel, int row, const Sums& sums, int r) {
          const int64_t block = begin + panel, column = block * UP_COLUMNS;
          const int valid = int(least<int64_t>(UP_COLUMNS, Config::width - column));
          F32 p0 = load(sums.of[0][r]), p1 = load(sums.of[1][r]);
          if (bias) p0 += load(bias + block * 2 * LANES), p1 += load(bias + block * 2 * LANES + LANES);
          if (Config::parts == 2) {
            store(place(row, column), Config::activation(p0, p1), valid);
          } else {
            store(place(row, column), Config::activation(p0, p0), valid);
            store(place(row, column + LANES), Config::activation(p1, p1), most(0, valid - LANES));
          }
        });
  }

  // The same into tiles of `steps` steps from `first_step` on. int8 rows: `begin` begins a group.
  void up(const Chunk& chunk, const Core& core, const char* a, int64_t begin, int64_t end, char* to, int64_t first_step,
          int64_t steps) const {
    const int64_t bytes = activated_bytes(steps), first_column = first_step * S;
    if constexpr (!NARROW) {
      activate(chunk, core, a, begin, end, [&](int row, int64_t column) {
        const int64_t offset = column - first_column;
        return (Elem*)(to + row / ROWS * bytes + offset / S * TILE + row % ROWS * 64 + offset % S * sizeof(Elem));
      });
      return;
    }
    if constexpr (NARROW) for (; begin < end; begin += UP_GROUP) {
      const int64_t column = begin * UP_COLUMNS, first = (column - first_column) / S;
      activate(chunk, core, a, begin, least(begin + UP_GROUP, end),
               [&](int row, int64_t at) { return core.group + row * GROUP + (at - column); });
      for (int row = 0; row < chunk.rows; ++row) {
        char* tile = to + row / ROWS * bytes;
        const float scale =
            quantise_row(core.group + row * GROUP, least<int64_t>(GROUP, Config::width - column),
                         least<int64_t>(GROUP_STEPS, steps - first), Gemm::OFFSET, tile + first * TILE + row % ROWS * 64);
        memcpy(tile + steps * TILE + (first / GROUP_STEPS * ROWS + row % ROWS) * 4, &scale, 4);
      }
    }
  }

  // Down-projection of some blocks over one slice; what earlier slices gave is in `core.carried`.
  // a: rows activated over `held`, which has the slice in it.
  void down(const Chunk& chunk, const Core& core, const char* a, Slice held, int64_t begin, int64_t end,
            Slice slice) const {
    const bool starts = slice.first == 0, ends = slice.first + slice.steps == DOWN_STEPS;
    const int64_t before = slice.first - held.first;
    const char* scales = a + held.steps * TILE + before / GROUP_STEPS * ROWS * int64_t(sizeof(float));
    const float* bias =
        Config::down_bias < 0 ? nullptr : (const float*)call->in[Config::down_bias] + chunk.expert * COLUMNS;
    Sweep<Gemm, Weights, Rows::activated>::run(
        a + before * TILE, activated_bytes(held.steps), scales, chunk.rows,
        down_panels(chunk.expert, begin, end, slice.first), int(slice.steps), core.expanded,
        [&](int64_t panel, int row, const Sums& sums, int r) {
          const int64_t column = (begin + panel) * 2 * LANES;
          F32 y0 = load(sums.of[0][r]), y1 = load(sums.of[1][r]);
          float* sum = core.carried + ((begin + panel) * MOST_ROWS + row) * 2 * LANES;
          if (bias && starts) y0 += load(bias + column), y1 += load(bias + column + LANES);
          if (!starts) y0 += load(sum), y1 += load(sum + LANES);
          if (ends)
            stream(results + (chunk.begin + row) * COLUMNS + column, y0, y1);
          else
            store(sum, y0), store(sum + LANES, y1);
        });
  }

  // A chunk through both GEMMs, slice by slice of the width.
  void run_alone(const Chunk& chunk, const Core& core) const {
    gather(chunk, core.rows);
    for (int64_t first = 0; first < DOWN_STEPS; first += SLICE) {
      const int64_t steps = least(SLICE, DOWN_STEPS - first);
      clear(chunk, core.activated, first, steps);
      up(chunk, core, core.rows, blocks_to(first), blocks_to(first + steps), core.activated, first, steps);
      down(chunk, core, core.activated, {first, steps}, 0, DOWN_BLOCKS, {first, steps});
    }
  }

  // How many panels of the up-projection fill the steps up to one.
  static constexpr int64_t blocks_to(int64_t step) { return least(ceil_div(step * S, UP_COLUMNS), UP_BLOCKS); }

  // Zeros in those of the given steps of activated rows that the width does not fill; int8 groups are always filled.
  static void clear(const Chunk& chunk, char* h, int64_t first, int64_t steps) {
    if (NARROW) return;
    const int64_t filled = most<int64_t>(0, least(steps, Config::width / S - first));
    for (int64_t tile = 0; tile < ceil_div(chunk.rows, ROWS); ++tile)
      memset(h + (tile * steps + filled) * TILE, 0, (steps - filled) * TILE);
  }

  // ---- the layer ----------------------------------------------------------------------------------------------

  static int take(int& counter, int amount = 1) { return __atomic_fetch_add(&counter, amount, __ATOMIC_RELAXED); }
  void wait() const {
    if (call->barrier) call->barrier();
  }

  void run_chunks(const Core& core) {
    for (int i = take(next_chunk); i < sorted.num_chunks; i = take(next_chunk)) run_alone(sorted.chunks[i], core);
  }

  void run_shared(const Core& core) {
    // Each chunk's columns are cut so that there is work for every core several times over.
    const int cuts = int(ceil_div(int64_t(8) * call->threads, most(1, sorted.num_chunks)));
    auto parts = [&](int& counter, int64_t blocks, int64_t unit, auto work) {
      const int64_t size = ceil_div(ceil_div(blocks, cuts), unit) * unit, each = ceil_div(blocks, size);
      const int64_t all = each * sorted.num_chunks;
      for (int i = take(counter); i < all; i = take(counter)) {
        const Chunk& chunk = sorted.chunks[i / each];
        const int64_t begin = i % each * size;
        work(chunk, begin, least(begin + size, blocks));
      }
    };
    for (int i = take(next_row); i < sorted.num_chunks; i = take(next_row)) {
      const Chunk& chunk = sorted.chunks[i];
      gather(chunk, rows + chunk.tile * ROW_BYTES);
      clear(chunk, activated + chunk.tile * activated_bytes(DOWN_STEPS), 0, DOWN_STEPS);
    }
    wait();
    parts(next_chunk, UP_BLOCKS, UP_GROUP, [&](const Chunk& chunk, int64_t begin, int64_t end) {
      up(chunk, core, rows + chunk.tile * ROW_BYTES, begin, end, activated + chunk.tile * activated_bytes(DOWN_STEPS), 0,
         DOWN_STEPS);
    });
    wait();
    parts(next_part, DOWN_BLOCKS, 1, [&](const Chunk& chunk, int64_t begin, int64_t end) {
      // Slices are added up as in `run_alone`, but panel by panel, which lie in memory so.
      const int64_t panels = SLICES > 1 ? 1 : end - begin;
      for (; begin < end; begin += panels)
        for (int64_t first = 0; first < DOWN_STEPS; first += SLICE)
          down(chunk, core, activated + chunk.tile * activated_bytes(DOWN_STEPS), {0, DOWN_STEPS}, begin, begin + panels,
               {first, least(SLICE, DOWN_STEPS - first)});
    });
  }

  // out[token] = the sum over its slots, in their order, of weight * result; in f32, rounded once.
  void combine(int64_t token, Elem* out) const {
    const Elem* row[Config::slots];
    float weight[Config::slots];
    int used = 0;
    for (int slot = 0; slot < Config::slots; ++slot) {
      const int32_t place = sorted.place[token * Config::slots + slot];
      if (place < 0) continue;
      row[used] = results + place * COLUMNS;
      weight[used++] = Config::early ? 1.0f : float_of(weights[token * Config::slots + slot]);
    }
    if constexpr (Config::has_tail) return combine_finished(row, weight, used, out + token * Config::columns);
    for (int64_t column = 0; column < Config::columns; column += LANES) {
      F32 sum = {};
      for (int i = 0; i < used; ++i) sum += weight[i] * load(row[i] + column);
      store(out + token * Config::columns + column, sum, int(least<int64_t>(LANES, Config::columns - column)));
    }
  }

  // The same with each row through the tail first.
  void combine_finished(const Elem* const* row, const float* weight, int used, Elem* out) const {
    alignas(64) float sum[COLUMNS] = {}, y[COLUMNS];
    for (int i = 0; i < used; ++i) {
      for (int64_t column = 0; column < COLUMNS; column += LANES) store(y + column, load(row[i] + column));
      if constexpr (Config::has_tail) Config::tail(call, y);
      for (int64_t column = 0; column < COLUMNS; column += LANES)
        store(sum + column, load(sum + column) + weight[i] * load(y + column));
    }
    for (int64_t column = 0; column < Config::columns; column += LANES)
      store(out + column, load(sum + column), int(least<int64_t>(LANES, Config::columns - column)));
  }

  void run_thread() {
    const int thread = take(next_thread);
    char* memory = own + thread * OWN;
    char* mine = spare + thread * SPARE;
    const Core core = {memory, memory + OWN_ROWS, mine, (Elem*)(mine + EXPANDED), (float*)(mine + EXPANDED + UNROUNDED)};
    const int64_t tokens = call->tokens;
    if constexpr (Config::has_router) {
      for (int t = take(next_token, 16); t < tokens; t = take(next_token, 16))
        for (int64_t row = t; row < least<int64_t>(t + 16, tokens); ++row) Config::route(call, row);
      wait();
    }
    if (thread == 0) {
      sort_pairs(ids, tokens * Config::slots, Config::experts, MOST_ROWS, sorted);
      shared = is_shared(sorted.num_chunks, call->threads);
      next_token = 0;
    }
    wait();
    Gemm::begin();
    if (shared)
      run_shared(core);
    else
      run_chunks(core);
    Gemm::end();
    publish();
    wait();
    Elem* out = (Elem*)call->out[0];
    for (int t = take(next_token, 16); t < tokens; t = take(next_token, 16))
      for (int64_t token = t; token < least<int64_t>(t + 16, tokens); ++token) combine(token, out);
  }

  // How many threads have work for longer than it takes to wake them, by what memory and arithmetic take at the most.
  static int worth_waking(int64_t tokens, int threads) {
    const int64_t pairs = tokens * Config::slots, hit = least<int64_t>(pairs, Config::experts);
    const double bytes = double(hit) * (UP_BLOCKS * UP_PANEL + DOWN_BLOCKS * DOWN_PANEL);
    const double products = double(pairs) * Config::width * (Config::parts * Config::hidden + Config::columns);
    const double us = bytes / 16e3 + products / 1e5;  // 16 GB/s, 0.1 T/s
    return int(most(1.0, least(us / SPARSEC_WAKING_US, double(threads))));
  }

  // Tokens and pairs are counted in 32 bits, a little beyond the last.
  static bool is_too_many(int64_t tokens) { return tokens > (1 << 30) / Config::slots; }

  static int32_t run(const Call* given) {
    Call call = *given;
    if (is_too_many(call.tokens)) return 1;
    call.threads = worth_waking(call.tokens, call.threads);
    if (call.threads == 1) call.barrier = nullptr;
    Layer layer = {};
    layer.call = &call;
    layer.x = (const Elem*)call.in[0];
    layer.ids = (const typename Config::Id*)(Config::has_router ? call.out[1] : call.in[1]);
    layer.weights = (const typename Config::Weight*)(Config::has_router ? call.out[2] : call.in[2]);
    layer.lay_out((char*)call.scratch, call.tokens, call.threads);
    auto body = [](void* data) { ((Layer*)data)->run_thread(); };
    if (call.threads > 1)
      call.parallel(body, &layer, call.threads, 0);
    else
      body(&layer);
    return 0;
  }

  static int64_t scratch(int64_t tokens, int threads) {
    if (is_too_many(tokens)) return -1;
    Layer layer = {};
    return layer.lay_out(nullptr, tokens, threads);
  }
};
