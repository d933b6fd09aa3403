// The operator under ThreadSanitizer, which knows std::thread but not the synchronization inside libgomp: the few
// OpenMP functions that the operator calls are here, of threads that it does know.
//
//   races          every function, by teams of threads, called by several threads at once
//   races shared   two calls write one result: a race to be found
//   races barrier  the team's barriers do nothing: races to be found
#include <pthread.h>

#include <cstdio>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/feature.h"
#include "cpu/runtime/memory.h"
#include "cpu/sample.h"
#include "cpu/streamed.h"

namespace {

constexpr int kThreads = 3;

struct Team {
  int threads;
  pthread_barrier_t barrier;
};

thread_local Team* team = nullptr;
thread_local int member = 0;
bool barriers = true;

}  // namespace

extern "C" {
int omp_get_max_threads() { return kThreads; }
int omp_in_parallel() { return team != nullptr; }
int omp_get_thread_num() { return member; }
int omp_get_num_threads() { return team ? team->threads : 1; }

void GOMP_barrier() {
  if (team && barriers) pthread_barrier_wait(&team->barrier);
}

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team mine{static_cast<int>(threads ? threads : kThreads), {}};
  pthread_barrier_init(&mine.barrier, nullptr, mine.threads);
  const auto run = [&](int index) {
    team = &mine;
    member = index;
    body(data);
    team = nullptr;
    member = 0;
  };
  std::vector<std::thread> others;
  for (int index = 1; index < mine.threads; ++index) others.emplace_back(run, index);
  run(0);
  for (std::thread& other : others) other.join();
  pthread_barrier_destroy(&mine.barrier);
}
}

namespace {

using icsd::DType;
using icsd::LossKind;
using icsd::Regime;
using icsd::Shape;
using icsd::Spec;

struct Batch {
  std::vector<float> values;
  icsd::Features features;

  Batch(Shape shape, std::int64_t width) : values(shape.groups * shape.samples * width) {
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>((i * 7919) % 1009) / 1009 - 0.4f;
    features = {values.data(), DType::float32, width, shape.samples * width, width};
  }
};

// The covariance matrices are small where this holds.
bool narrow(const Batch& batch) { return batch.features.dim <= 64; }

// Forward and backward of every function; `shared` results if not null.
void work(const Shape shape, const Batch& student, const Batch& teacher, float* shared) {
  const std::int64_t square = shape.groups * shape.samples * shape.samples;
  std::vector<float> own(square), loss(shape.groups), slots(2 * (square + shape.groups * shape.samples));
  float* matrix = shared ? shared : own.data();
  icsd::cpu::gram<float>(student.features, shape, matrix);
  Batch gradient(shape, student.features.dim);
  icsd::cpu::combine<float>(own.data(), shape.samples, student.features, gradient.features, shape);
  const std::pair<LossKind, std::vector<double>> losses[] = {
      {LossKind::mse, {1, 1}}, {LossKind::kl, {0.1, 0.1, 1}}, {LossKind::smooth_l1, {0, 0.2, 0}}};
  const std::vector<icsd::Features> stages{student.features, teacher.features}, outs{gradient.features, {}};
  const std::vector<float> grad(shape.groups, 1);
  std::vector<float> statistics(shape.groups * icsd::cpu::streamed_elements(2, shape.samples));
  for (const auto& [kind, parameters] : losses) {
    const Spec spec{kind, parameters, {1}, 1e-8, false, Regime::sample, false};
    for (const bool center : {true, false}) {
      Spec of_sample = spec;
      of_sample.center = center;
      icsd::cpu::distill_sample<float>(stages, shape, of_sample, loss.data(), slots.data());
      icsd::cpu::distill_sample_backward<float>(grad.data(), slots.data(), stages, outs, shape);
    }
    icsd::cpu::distill_streamed<float>(stages, shape, spec, loss.data(), statistics.data());
    icsd::cpu::distill_streamed_backward<float>(grad.data(), statistics.data(), stages, outs, shape, spec);
  }
  for (std::int64_t i = 0; i < 20; ++i) {  // memory goes from thread to thread
    icsd::cpu::Buffer<float> large(icsd::cpu::kLargeBytes / sizeof(float) * (1 + i % 2));
    large.data()[i] = 1;
  }
  if (!narrow(student) || !narrow(teacher)) return;
  std::vector<double> covariances(shape.groups * icsd::covariance_elements(stages));
  const Spec mse{LossKind::mse, {1}, {1}, 1e-8, false, Regime::feature, false};
  icsd::cpu::distill_feature<float>(stages, shape, mse, loss.data(), covariances.data());
  icsd::cpu::distill_feature_backward<float>(grad.data(), covariances.data(), stages, outs, shape, mse);
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "";
  barriers = mode != "barrier";
  struct Case {
    Shape shape;
    std::int64_t student, teacher;
  };
  for (const auto& [shape, student_width, teacher_width] :
       {Case{{1, 24}, 6000, 3001}, Case{{3, 9}, 6000, 3001}, Case{{1, 700}, 60, 31}}) {
    const Batch student(shape, student_width), teacher(shape, teacher_width);
    std::vector<float> result(shape.groups * shape.samples * shape.samples);
    std::vector<std::thread> callers;
    float* shared = mode == "shared" ? result.data() : nullptr;
    const Shape same = shape;  // a structured binding cannot be captured
    for (int i = 0; i < 2; ++i) callers.emplace_back([&, shared, same] { work(same, student, teacher, shared); });
    for (std::thread& caller : callers) caller.join();
  }
  std::puts("done");
}
