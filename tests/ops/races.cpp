// The operator under ThreadSanitizer, which knows std::thread but not the synchronisation inside libgomp: the few OpenMP
// functions that the operator calls are here, of threads that it does know.
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

#include "cpu/operator.h"

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
using icsd::DivergenceKind;
using icsd::cpu::Distillation;
using icsd::Shape;

struct Batch {
  std::vector<float> values;
  icsd::Features features;

  Batch(Shape shape, std::int64_t width) : values(shape.groups * shape.samples * width) {
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>((i * 7919) % 1009) / 1009 - 0.4f;
    features = {values.data(), DType::float32, width, shape.samples * width, width};
  }
};

// Forward and backward of every function; `shared` results if not null.
void work(const Shape shape, const Batch& student, const Batch& teacher, float* shared) {
  const std::int64_t square = shape.groups * shape.samples * shape.samples;
  std::vector<float> own(square), loss(shape.groups), slots(2 * (square + shape.groups * shape.samples));
  float* matrix = shared ? shared : own.data();
  icsd::cpu::gram<float>(student.features, shape, matrix);
  Batch gradient(shape, student.features.features);
  icsd::cpu::combine<float>(own.data(), shape.samples, student.features, gradient.features, shape);
  const double weight = 1, kl[] = {0.1, 0.1, 1}, huber[] = {1};
  const std::pair<DivergenceKind, const double*> divergences[] = {
      {DivergenceKind::mse, nullptr}, {DivergenceKind::kl, kl}, {DivergenceKind::smooth_l1, huber}};
  for (const auto& [kind, parameters] : divergences) {
    const Distillation how{kind, parameters, &weight, 1e-8, false};
    icsd::cpu::distill<float>({student.features, teacher.features}, shape, how, loss.data(), slots.data());
    const std::vector<float> grad(shape.groups, 1);
    icsd::cpu::distill_backward<float>(grad.data(), slots.data(), {student.features, teacher.features},
                                       {gradient.features, {}}, shape);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "";
  barriers = mode != "barrier";
  for (const Shape shape : {Shape{1, 24}, Shape{3, 9}, Shape{1, 70}}) {
    const Batch student(shape, 6000), teacher(shape, 3001);
    std::vector<float> result(shape.groups * shape.samples * shape.samples);
    std::vector<std::thread> callers;
    for (int i = 0; i < 2; ++i) {
      callers.emplace_back([&] { work(shape, student, teacher, mode == "shared" ? result.data() : nullptr); });
    }
    for (std::thread& caller : callers) caller.join();
  }
  std::puts("done");
}
