// Losses of similarities to banks. N queries are compared with the M samples of a bank, which no matrix holds: a block
// takes 64 samples of one side, its own, and goes through one split of the other side, tile by tile. For every tile it
// computes the products of student and teacher; adds the elements to the sums of its rows; makes the derivatives of the
// loss and multiplies them with the samples of the tile. Its own side is the queries or, for the gradients of banks,
// the banks: so each gradient has one block to each split, and splits are added in their order.
#pragma once

#include <type_traits>

#include "core/losses.h"
#include "cuda/kernels/combine.cuh"
#include "cuda/kernels/gram.cuh"
#include "cuda/kernels/norms.cuh"
#include "cuda/kernels/rows.cuh"

namespace icsd::cuda {

constexpr int kBankThreads = 256;
constexpr int kBankRows = 64;      // samples of a block
constexpr int kRowsOfThread = 4;   // that a thread has elements of
constexpr int kThreadsOfRow = 16;  // that have elements of a row
constexpr int kBankChunk = 32;     // samples of a tile that are multiplied with derivatives at a time
constexpr int kPadding = 8;        // rows of partial gradients are multiples of it

// The losses that banks have kernels for, in one type: a kernel for each would be mostly the same products.
template <class C>
struct BankLoss {
  using Row = typename Kl<C>::template Row<C>;  // the sum of a loss of elements is `weighted`
  static constexpr int kStatistics = Kl<C>::kStatistics;
  LossKind kind;
  C scale;  // of a row of `kl`, or of an element
  Kl<C> kl;
  Mse<C> mse;
  SmoothL1<C> smooth_l1;

  template <class D>
  static __device__ C element(const D& loss, C s, C t) {
    typename D::template Row<C> row{};
    loss.update(row, s, t);
    return row.sum;
  }
  __device__ void update(Row& row, C s, C t) const {
    if (kind == LossKind::kl) return kl.update(row, s, t);
    row.weighted += kind == LossKind::mse ? element(mse, s, t) : element(smooth_l1, s, t);
  }
  __device__ void merge(Row& row, const Row& other) const {
    if (kind == LossKind::kl) return kl.merge(row, other);
    row.weighted += other.weighted;
  }
  __device__ C value(const Row& row) const { return kind == LossKind::kl ? kl.value(row) : scale * row.weighted; }

  // Returns the derivative by s or, of the teacher, by t, from the statistics of the query. The structs have those of
  // both elements (i, j) and (j, i) of symmetric matrices, from the statistics of both rows.
  __device__ C derivative(bool of_teacher, C s, C t, const C* statistics) const {
    const auto half = [&](const auto& loss) {
      return C(0.5) *
             (of_teacher ? loss.teacher(s, t, statistics, statistics) : loss.student(s, t, statistics, statistics));
    };
    if (kind == LossKind::kl) return half(kl);
    return kind == LossKind::mse ? half(mse) : half(smooth_l1);
  }
};

// The samples of a student or teacher on one side.
template <class T>
struct BankSamples {
  const T* x;
  std::int64_t dim, group_stride, sample_stride;
  Compute<T>* inverse_norms;  // (groups, samples)
  int copy_bytes;
};

template <class T>
struct BankArguments {
  using C = Compute<T>;
  BankSamples<T> own[2], other[2];  // of student and teacher
  int own_samples, other_samples;
  int row_tiles, splits, split_samples;  // of the own side; of the other side
  int buffers;                           // in the ring of input tiles
  std::int64_t groups;
  bool of_bank;         // the own side is the banks
  int stage;            // whose gradient is made: 0 for the student, 1 for the teacher
  const C* statistics;  // of the queries, (kMaxStatistics, groups, queries)
  C* partials;          // gradients with respect to samples of norm 1, (splits, groups, own samples, pitch), or null
  std::int64_t pitch;
  void* rows;  // sums over the rows of the loss, (splits, groups, own samples), or null
  BankLoss<C> loss;
};

// The shared memory of a block: values of a tile, then a ring of lines of samples. Both are in use while the lines are
// multiplied; afterwards the ring holds chunks of samples. Derivatives take the place of values or, where each of them
// is the sum of two terms, the rest of the ring.
template <class T, bool kTensor>
struct BankLayout {
  using C = Compute<T>;
  using S = std::conditional_t<kTensor, typename Stored<T>::type, C>;  // of derivatives and of samples beside them
  static constexpr bool kTwoTerms = sizeof(S) < sizeof(C);
  static constexpr int kColumns = kTensor ? 128 : sizeof(C) == 8 ? 32 : 64;  // of a tile; features of a gradient's
  static constexpr int kPitch = kColumns + 16 / static_cast<int>(sizeof(C));
  static constexpr int kChunkPitch = kColumns + 8, kChunk = kBankChunk * kChunkPitch;
  static constexpr int kDerivativePitch = kTwoTerms ? kColumns + 8 : kPitch, kTerm = kBankRows * kDerivativePitch;
  static constexpr int kValueBytes = kBankRows * kPitch * sizeof(C);
  static constexpr int kBufferBytes = (kBankRows + kColumns) * kPitchBytes;
  static constexpr int kChunkBytes = kChunk * sizeof(S);
  static constexpr int kDerivatives = kTwoTerms ? kValueBytes + 2 * kChunkBytes : 0;  // where they begin, in bytes
  static constexpr int kMaxBuffers = kTensor ? 4 : 2;
  static_assert(2 * kChunkBytes + (kTwoTerms ? 2 * kTerm * sizeof(S) : 0) <= 2 * kBufferBytes);
  static_assert(kBankRows * kThreadsOfRow * kMaxStatistics * sizeof(C) <= kValueBytes + 2 * kBufferBytes);
  static_assert(kValueBytes % 128 == 0 && kDerivatives % 128 == 0);

  static constexpr std::size_t bytes(int buffers) { return kValueBytes + buffers * kBufferBytes; }
};

// Products for any type and device. Each thread has 4 rows of kColumns / 16 elements, 16 apart in both directions.
template <class T>
struct BankFma {
  using C = Compute<T>;
  using Layout = BankLayout<T, false>;
  static constexpr int kElements = Layout::kColumns / 16;  // of a row

  struct Tile {
    C sums[kRowsOfThread][kElements] = {};

    static __device__ int row(int r) { return threadIdx.x / 16 + 16 * r; }
    static __device__ int column(int c) { return threadIdx.x % 16 + 16 * c; }
    __device__ C at(int r, int c) const { return sums[r][c]; }

    // Calls call(m, n) for the indices of the thread's elements.
    template <class Call>
    static __device__ void for_each(const Call& call) {
#pragma unroll
      for (int m = 0; m < kRowsOfThread; ++m) {
#pragma unroll
        for (int n = 0; n < kElements; ++n) call(m, n);
      }
    }
  };

  struct Products : Tile {
    // Adds the products of a line of samples with a line of others. The sum of a line is made separately.
    __device__ void multiply(const T* own, const T* other) {
      C line[kRowsOfThread][kElements] = {};
      for (int k = 0; k < kLine<T>; k += Vector<T>::kSize) {
        Vector<T> u[kRowsOfThread], v[kElements];
#pragma unroll
        for (int m = 0; m < kRowsOfThread; ++m) {
          u[m] = *reinterpret_cast<const Vector<T>*>(own + Tile::row(m) * kPitch<T> + k);
        }
#pragma unroll
        for (int n = 0; n < kElements; ++n) {
          v[n] = *reinterpret_cast<const Vector<T>*>(other + Tile::column(n) * kPitch<T> + k);
        }
#pragma unroll
        for (int e = 0; e < Vector<T>::kSize; ++e) {
          Tile::for_each([&](int m, int n) { line[m][n] += widen(u[m].x[e]) * widen(v[n].x[e]); });
        }
      }
      Tile::for_each([&](int m, int n) { this->sums[m][n] += line[m][n]; });
    }
    __device__ void finish() {}
    static __device__ int thread_of_row() { return threadIdx.x % 16; }
  };

  struct Gradients : Tile {
    // Adds the products of derivatives with a chunk of samples.
    __device__ void multiply(const C* derivatives, const C* samples) {
#pragma unroll 4
      for (int k = 0; k < kBankChunk; ++k) {
        C u[kRowsOfThread], v[kElements];
#pragma unroll
        for (int m = 0; m < kRowsOfThread; ++m) u[m] = derivatives[Tile::row(m) * Layout::kDerivativePitch + k];
#pragma unroll
        for (int n = 0; n < kElements; ++n) v[n] = samples[k * Layout::kChunkPitch + Tile::column(n)];
        Tile::for_each([&](int m, int n) { this->sums[m][n] += u[m] * v[n]; });
      }
    }
    __device__ void finish() {}

    // Adds the sums to the first `left` columns of `rows` rows of partial gradients, or writes them if these are new.
    __device__ void add_to(C* partials, std::int64_t pitch, int rows, std::int64_t left, bool is_new) const {
      Tile::for_each([&](int m, int n) {
        C* const to = partials + Tile::row(m) * pitch + Tile::column(n);
        if (Tile::row(m) < rows && Tile::column(n) < left) *to = is_new ? this->sums[m][n] : *to + this->sums[m][n];
      });
    }
  };
};

#if __CUDA_ARCH__ >= 800

// Products by tensor cores. Each warp has 32 x 32 elements of a tile of 64 x 128.
template <class T>
struct BankTensor {
  using C = float;
  using Layout = BankLayout<T, true>;
  static constexpr int kElements = 8;  // of a row of a thread
  static constexpr bool kSplit = std::is_same_v<T, float>;

  template <class Sums>
  struct Tile {
    Sums product;

    static __device__ int row(int r) { return threadIdx.x / 128 * 32 + Sums::row(r / 2, r % 2 * 2); }
    static __device__ int column(int c) { return threadIdx.x / 32 % 4 * 32 + Sums::column(c / 2, c % 2); }
    __device__ float at(int r, int c) const { return product.sums[r / 2][c / 2][r % 2 * 2 + c % 2]; }
  };

  static constexpr Split kSplitOfSamples = kSplit ? Split::in_registers : Split::none;
  static constexpr Split kSplitOfDerivatives = Layout::kTwoTerms ? Split::in_memory : Split::in_registers;
  using S = typename Layout::S;
  using SumsOfProducts = TileSums<T, 2, 2, Order::along_k, Order::along_k, kSplitOfSamples, kSplitOfSamples, kSplit>;
  using SumsOfGradients = TileSums<S, 2, 2, Order::along_k, Order::across_k, kSplitOfDerivatives, kSplitOfSamples>;

  struct Products : Tile<SumsOfProducts> {
    static constexpr int kSteps = kLine<T> / Operand<T>::kStep;
    int line = 0;

    __device__ void multiply(const T* own, const T* other) {
      own += threadIdx.x / 128 * 32 * kPitch<T>;
      other += threadIdx.x / 32 % 4 * 32 * kPitch<T>;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        this->product.multiply(own + k * Operand<T>::kStep, kPitch<T>, other + k * Operand<T>::kStep, kPitch<T>);
      }
      if (++line % (kShortSteps<T> / kSteps) == 0) this->product.flush();
    }
    __device__ void finish() {
      this->product.flush();
      this->product.add_low();
    }
    static __device__ int thread_of_row() { return threadIdx.x / 32 % 4 * 4 + threadIdx.x % 4; }
  };

  struct Gradients : Tile<SumsOfGradients> {
    __device__ void multiply(const S* derivatives, const S* samples) {
      constexpr int kStep = Operand<S>::kStep;
      derivatives += threadIdx.x / 128 * 32 * Layout::kDerivativePitch;
      samples += threadIdx.x / 32 % 4 * 32;
#pragma unroll 2
      for (int k = 0; k < kBankChunk; k += kStep) {
        this->product.multiply(derivatives + k, Layout::kDerivativePitch, samples + k * Layout::kChunkPitch,
                               Layout::kChunkPitch, Layout::kTerm);
      }
      if constexpr (!Layout::kTwoTerms) this->product.flush();  // sums of 16-bit products may be longer
    }
    __device__ void finish() {
      if constexpr (Layout::kTwoTerms) this->product.flush();
    }

    // A thread has neighboring columns: 8 of them, or 2 of every 8. The first `left` are a multiple of 8.
    __device__ void add_to(float* partials, std::int64_t pitch, int rows, std::int64_t left, bool is_new) const {
      static_assert(kPadding == 8);
      constexpr bool kWide = SumsOfGradients::B::kWide;
      const int first = threadIdx.x / 32 % 4 * 32 + threadIdx.x % 4 * (kWide ? 8 : 2);
#pragma unroll
      for (int r = 0; r < kRowsOfThread; ++r) {
        if (this->row(r) >= rows) continue;
        float* const to = partials + this->row(r) * pitch + first;
#pragma unroll
        for (int n = 0; n < (kWide ? 2 : 4); ++n) {
          if (first + (kWide ? 0 : 8 * n) >= left) continue;
          if constexpr (kWide) {
            add(reinterpret_cast<float4*>(to) + n, is_new,
                make_float4(this->at(r, n), this->at(r, 2 + n), this->at(r, 4 + n), this->at(r, 6 + n)));
          } else {
            add(reinterpret_cast<float2*>(to + 8 * n), is_new, make_float2(this->at(r, 2 * n), this->at(r, 2 * n + 1)));
          }
        }
      }
    }

   private:
    static __device__ void add(float4* to, bool is_new, float4 sum) {
      const float4 old = is_new ? make_float4(0, 0, 0, 0) : *to;
      *to = make_float4(old.x + sum.x, old.y + sum.y, old.z + sum.z, old.w + sum.w);
    }
    static __device__ void add(float2* to, bool is_new, float2 sum) {
      const float2 old = is_new ? make_float2(0, 0) : *to;
      *to = make_float2(old.x + sum.x, old.y + sum.y);
    }
  };
};

#endif

// The work of one block.
template <class T, class Engine>
class BankBlock {
  using C = Compute<T>;
  using Layout = typename Engine::Layout;
  using S = typename Layout::S;
  using Products = typename Engine::Products;
  using Row = typename BankLoss<C>::Row;

 public:
  __device__ BankBlock(const BankArguments<T>& a, void* memory) : a_(a), values_(static_cast<C*>(memory)) {
    const unsigned rest = blockIdx.x / a.row_tiles;  // blocks of the same split are neighbors: they share its samples
    first_row_ = static_cast<int>(blockIdx.x % a.row_tiles) * kBankRows;
    rows_ = min(kBankRows, a.own_samples - first_row_);
    split_ = static_cast<int>(rest % a.splits);
    group_ = rest / a.splits;
  }

  __device__ void run() {
    const int begin = split_ * a_.split_samples, end = min(begin + a_.split_samples, a_.other_samples);
    Row sums[kRowsOfThread]{};
    for (int first = begin; first < end; first += Layout::kColumns) {
      const int columns = min(Layout::kColumns, end - first);
#pragma unroll 1
      for (int stage = 0; stage < 2; ++stage) {  // a loop, so that its code is there once
        const Products product = products(stage, first, columns);
        if (stage == 0) {
          put_values(product);
        } else {
          take_elements(product, first, columns, sums);
        }
      }
      if (a_.partials) add_gradients(first, columns, first == begin);
    }
    if (a_.rows) write(sums);
  }

 private:
  // Returns the place of an element of the tile. Until all threads meet, each accesses its own elements only.
  __device__ C* value(int r, int c) const { return values_ + Products::row(r) * Layout::kPitch + Products::column(c); }
  __device__ void* at(int bytes) const { return reinterpret_cast<unsigned char*>(values_) + bytes; }
  __device__ void* ring() const { return at(Layout::kValueBytes); }
  __device__ S* derivatives() const { return static_cast<S*>(at(Layout::kDerivatives)); }

  __device__ void put_values(const Products& product) const {
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
#pragma unroll
      for (int c = 0; c < Engine::kElements; ++c) *value(r, c) = product.at(r, c);
    }
  }

  __device__ void put_derivative(int r, int c, C x) const {
    S* const to = derivatives() + Products::row(r) * Layout::kDerivativePitch + Products::column(c);
    *to = Narrow<S>::from(x);
    if constexpr (Layout::kTwoTerms) to[Layout::kTerm] = Narrow<S>::from(x - widen(*to));
  }

  __device__ AsyncTiles<T> tiles(const BankSamples<T>& x, int first, int samples, int range) const {
    const T* const from = x.x + group_ * x.group_stride + first * x.sample_stride;
    return {from, nullptr, samples, 0, false, range, x.sample_stride, x.copy_bytes};
  }

  // Returns the products of the block's samples with `columns` samples of the other side, of student or teacher. All
  // threads of the block must call this; the ring is free when it returns.
  __device__ Products products(int stage, int first, int columns) const {
    const AsyncTiles<T> own = tiles(a_.own[stage], first_row_, rows_, kBankRows);
    const AsyncTiles<T> other = tiles(a_.other[stage], first, columns, Layout::kColumns);
    const auto buffer = [&](int k) { return static_cast<T*>(ring()) + k * Layout::kBufferBytes / sizeof(T); };
    for (int k = 0; k < a_.buffers; ++k) {
      own.clear(buffer(k));
      other.clear(buffer(k) + own.size());
    }
    Products result;
    const std::int64_t dim = a_.own[stage].dim;
    const int lines = static_cast<int>((dim + kLine<T> - 1) / kLine<T>);
    int full = 0, free = 0;
#pragma unroll 1
    for (int line = 1 - a_.buffers; line < lines; ++line) {  // as in AsyncTiles::for_each_line
      if (line >= 0) {
        __pipeline_wait_prior(a_.buffers - 2);
        __syncthreads();
      }
      const int ahead = line + a_.buffers - 1;
      const std::int64_t begin = static_cast<std::int64_t>(ahead) * kLine<T>;
      if (ahead < lines) {
        own.copy(buffer(free), begin, dim - begin);
        other.copy(buffer(free) + own.size(), begin, dim - begin);
      }
      __pipeline_commit();
      free = free + 1 == a_.buffers ? 0 : free + 1;
      if (line < 0) continue;
      result.multiply(buffer(full), buffer(full) + own.size());
      full = full + 1 == a_.buffers ? 0 : full + 1;
    }
    result.finish();
    __pipeline_wait_prior(0);
    __syncthreads();
    return result;
  }

  __device__ void load_statistics(C (&to)[kMaxStatistics], int query, int queries) const {
#pragma unroll
    for (int m = 0; m < BankLoss<C>::kStatistics; ++m)
      to[m] = a_.statistics[(m * a_.groups + group_) * queries + query];
  }

  __device__ C norm(const BankSamples<T>& of, int samples, int i) const {
    return of.inverse_norms[group_ * samples + i];
  }

  // Takes the elements (s, t) of a tile, where s is a value and t one of the teacher's products: adds them to the sums
  // of their rows and puts derivatives of the loss into shared memory, times the inverse norms of the other samples.
  __device__ void take_elements(const Products& teacher, int first, int columns, Row (&sums)[kRowsOfThread]) const {
    C own_s[kRowsOfThread], own_t[kRowsOfThread], products[kRowsOfThread][Engine::kElements];
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      const int row = Products::row(r);
      own_s[r] = row < rows_ ? norm(a_.own[0], a_.own_samples, first_row_ + row) : C(0);
      own_t[r] = row < rows_ ? norm(a_.own[1], a_.own_samples, first_row_ + row) : C(0);
#pragma unroll
      for (int c = 0; c < Engine::kElements; ++c) products[r][c] = teacher.at(r, c);
    }
#pragma unroll 1
    for (int c = 0; c < Engine::kElements; ++c) {  // little code: the next products move to the place of these
      const int column = Products::column(c), j = first + column;
      const bool inside = column < columns;
      const C norm_s = inside ? norm(a_.other[0], a_.other_samples, j) : C(0);
      const C norm_t = inside ? norm(a_.other[1], a_.other_samples, j) : C(0);
#pragma unroll
      for (int r = 0; r < kRowsOfThread; ++r) {
        C derivative = 0;
        if (inside && Products::row(r) < rows_) {
          const C s = own_s[r] * norm_s * *value(r, c), t = own_t[r] * norm_t * products[r][0];
          derivative = take_element(s, t, first_row_ + Products::row(r), j, sums[r]) * (a_.stage ? norm_t : norm_s);
        }
        if (a_.partials) put_derivative(r, c, derivative);
#pragma unroll
        for (int k = 1; k < Engine::kElements; ++k) products[r][k - 1] = products[r][k];
      }
    }
  }

  // Adds an element to the sums of its row and returns the derivative of the loss, if it is wanted.
  __device__ C take_element(C s, C t, int i, int j, Row& sums) const {
    if (a_.rows) a_.loss.update(sums, s, t);
    if (!a_.partials) return 0;
    C statistics[kMaxStatistics];
    if (a_.loss.kind == LossKind::kl) {
      load_statistics(statistics, a_.of_bank ? j : i, a_.of_bank ? a_.other_samples : a_.own_samples);
    }
    return a_.loss.derivative(a_.stage == 1, s, t, statistics);
  }

  // Adds the products of the derivatives with the tile's samples to the partial gradients. All threads of the block
  // must call this; shared memory is free when it returns.
  __device__ void add_gradients(int first, int columns, bool is_new) const {
    const BankSamples<T>& y = a_.other[a_.stage];
    const T* const samples = y.x + group_ * y.group_stride + first * y.sample_stride;
    C* const partials = a_.partials + ((split_ * a_.groups + group_) * a_.own_samples + first_row_) * a_.pitch;
    const int chunks = (columns + kBankChunk - 1) / kBankChunk;
    const int steps = chunks * static_cast<int>((y.dim + Layout::kColumns - 1) / Layout::kColumns);
    const auto buffer = [&](int step) { return static_cast<S*>(ring()) + step % 2 * Layout::kChunk; };
    const auto feature = [&](int step) { return static_cast<std::int64_t>(step / chunks) * Layout::kColumns; };
    const auto load = [&](int step) {
      const int sample = step % chunks * kBankChunk;
      copy_rectangle(y.copy_bytes, buffer(step), Layout::kChunkPitch,
                     samples + sample * y.sample_stride + feature(step), y.sample_stride,
                     min(kBankChunk, columns - sample), kBankChunk, Layout::kColumns, y.dim - feature(step));
      __pipeline_commit();
    };
    load(0);
    typename Engine::Gradients product;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      __pipeline_wait_prior(0);
      __syncthreads();  // all threads see this chunk and the derivatives, and none still reads the previous chunk
      if (step + 1 < steps) load(step + 1);
      product.multiply(derivatives() + step % chunks * kBankChunk, buffer(step));
      if (step % chunks < chunks - 1) continue;
      product.finish();
      product.add_to(partials + feature(step), a_.pitch, rows_, a_.pitch - feature(step), is_new);
      product = typename Engine::Gradients();
    }
    __syncthreads();
  }

  // Merges the sums of all threads of a row, in their order, and writes them.
  __device__ void write(const Row (&sums)[kRowsOfThread]) const {
    Row* const parts = reinterpret_cast<Row*>(values_);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      parts[Products::row(r) * kThreadsOfRow + Products::thread_of_row()] = sums[r];
    }
    __syncthreads();
    const int row = static_cast<int>(threadIdx.x);
    if (row >= rows_) return;
    Row sum = parts[row * kThreadsOfRow];
    for (int k = 1; k < kThreadsOfRow; ++k) a_.loss.merge(sum, parts[row * kThreadsOfRow + k]);
    static_cast<Row*>(a_.rows)[(split_ * a_.groups + group_) * a_.own_samples + first_row_ + row] = sum;
  }

  const BankArguments<T>& a_;
  C* const values_;
  int first_row_, rows_, split_;
  std::int64_t group_;
};

template <class T>
__global__ void __launch_bounds__(kBankThreads, 1) bank_fma(BankArguments<T> a) {
  ICSD_DYNAMIC_SHARED(unsigned char, memory);
  BankBlock<T, BankFma<T>>(a, memory).run();
}

// The kernel with tensor cores, from sm_80 on.
template <class T>
__global__ void __launch_bounds__(kBankThreads, 1) bank_tensor(BankArguments<T> a) {
#if __CUDA_ARCH__ >= 800
  ICSD_DYNAMIC_SHARED(unsigned char, memory);
  BankBlock<T, BankTensor<T>>(a, memory).run();
#endif
}

// The samples whose norms are wanted: up to two of student and teacher on each side.
template <class T>
struct BankNormArguments {
  BankSamples<T> of[4];
  std::int64_t last[4];  // the number of samples up to the last one of each
  int count;
  int samples[4];  // of a group
  Compute<T> eps;
};

// Writes the inverse norms. Each warp takes one sample.
template <class T>
__global__ void __launch_bounds__(kBankThreads) bank_norms(BankNormArguments<T> a) {
  std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * (kBankThreads / 32) + threadIdx.x / 32;
  if (item >= a.last[a.count - 1]) return;
  int k = 0;
  while (item >= a.last[k]) ++k;
  if (k) item -= a.last[k - 1];
  const BankSamples<T>& of = a.of[k];
  const std::int64_t group = item / a.samples[k], sample = item % a.samples[k];
  const double square = squared_norm(of.x + group * of.group_stride + sample * of.sample_stride, of.dim);
  if (threadIdx.x % 32 == 0) of.inverse_norms[item] = inverse_norm(static_cast<Compute<T>>(square), a.eps);
}

// Merges the sums of each row over all splits, in their order, writes the statistics that gradients need, and sums the
// loss. Each block takes one group.
template <class C>
__global__ void __launch_bounds__(kBackwardThreads)
    finish_bank_rows(const void* rows, int samples, int splits, std::int64_t groups, C* statistics, C* value,
                     BankLoss<C> loss) {
  using Row = typename BankLoss<C>::Row;
  __shared__ double sums[kBackwardThreads / 32];
  const std::int64_t group = blockIdx.x, size = groups * samples;
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < samples; i += kBackwardThreads) {
    const Row* const parts = static_cast<const Row*>(rows) + group * samples + i;
    Row row = parts[0];
#pragma unroll 8
    for (int split = 1; split < splits; ++split) loss.merge(row, parts[split * size]);
    sum += loss.value(row);
    if (loss.kind != LossKind::kl) continue;
    C own[kMaxStatistics];
    loss.kl.statistics(row, own);
    for (int m = 0; m < loss.kStatistics; ++m) statistics[m * size + group * samples + i] = own[m];
  }
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) value[group] = static_cast<C>(sum);
}

// The gradients with respect to samples of norm 1, by splits, and where the gradients with respect to the samples go.
template <class T>
struct BankGradientArguments {
  BankSamples<T> of;
  int samples, splits;
  std::int64_t groups, pitch;
  Compute<T>* partials;  // (splits, groups, samples, pitch)
  T* out;                // may be the partials, if there is one split
  std::int64_t out_group_stride, out_sample_stride;
  Compute<T> eps;
};

// Adds the splits in their order, projects out the direction of the sample unless eps replaced its norm, and divides by
// the norm. Each warp takes one sample, and each lane reads again what it has written.
template <class T>
__global__ void __launch_bounds__(kBankThreads, 1) finish_bank_gradients(BankGradientArguments<T> a) {
  using C = Compute<T>;
  const int lane = threadIdx.x % 32;
  const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * (kBankThreads / 32) + threadIdx.x / 32;
  if (item >= a.groups * a.samples) return;
  const std::int64_t group = item / a.samples, sample = item % a.samples;
  const std::int64_t size = a.groups * a.samples * a.pitch;
  const T* const x = a.of.x + group * a.of.group_stride + sample * a.of.sample_stride;
  C* const partial = a.partials + item * a.pitch;
  const C inverse = a.of.inverse_norms[item];
  C projection = 0;
  for (std::int64_t k = lane; k < a.of.dim; k += 32) {
    const C sum = sum_splits_of<C>(partial + k, size, 0, a.splits, 1);
    partial[k] = sum;
    projection += sum * (inverse * widen(x[k]));
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) projection += __shfl_xor_sync(0xffffffffu, projection, lanes);
  if (inverse >= 1 / a.eps) projection = 0;
  T* const out = a.out + group * a.out_group_stride + sample * a.out_sample_stride;
  for (std::int64_t k = lane; k < a.of.dim; k += 32) {
    out[k] = Narrow<T>::from(inverse * (partial[k] - projection * (inverse * widen(x[k]))));
  }
}

}  // namespace icsd::cuda
