// The CPU library's Python module and the choice of SIMD level. Operators register themselves in their own files.
#include <Python.h>

#include <cstdlib>

#include "cpu/levels.h"

#if SDP_LEVELS == 3
#include <cpuid.h>
#endif

namespace sdp {

static int detected_level() {
#if SDP_LEVELS == 3
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;  // F16C is a name that clang and GCC 10 don't know
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                    f16c;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? 2 : avx2 ? 1 : 0;
#else
  return 0;
#endif
}

static int chosen_level = -1;

int active_level() { return chosen_level; }

bool has_bf16_pairs() {
#if SDP_LEVELS == 3 && SDP_KNOWS_BF16_PAIRS
  return chosen_level == 2 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

static bool has_matrix_unit() {
#if SDP_LEVELS == 3
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx >> 22 & 1) != 0;  // AMX-BF16
#else
  return false;
#endif
}

bool multiplies_bf16() {
  static const bool found = has_bf16_pairs() && !has_matrix_unit();  // once: a virtual machine leaves itself for cpuid
  return found;
}

bool multiplies_fp32() {
#if SDP_LEVELS == 3
  static const bool found = has_bf16_pairs() && __builtin_cpu_is("amd");
  return found;
#else
  return false;
#endif
}

}  // namespace sdp

PyMODINIT_FUNC PyInit__C(void) {
  const int detected = sdp::detected_level();
  sdp::chosen_level = detected;
  if (const char* wanted = std::getenv("SDP_KERNELS_CPU_LEVEL")) {
    char* end = nullptr;
    const long level = std::strtol(wanted, &end, 10);
    if (end == wanted || *end != '\0' || level < 0 || level > detected) {
      PyErr_Format(PyExc_ImportError, "SDP_KERNELS_CPU_LEVEL must be an integer in [0, %d] on this machine, got '%s'",
                   detected, wanted);
      return nullptr;
    }
    sdp::chosen_level = static_cast<int>(level);
  }
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "CPU kernels of sdp_kernels", -1, nullptr,
                                          nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  if (PyModule_AddStringConstant(module, "schema_hash", SDP_SCHEMA_HASH) < 0 ||
      PyModule_AddStringConstant(module, "build_info", SDP_BUILD_INFO) < 0 ||
      PyModule_AddIntConstant(module, "cpu_level", sdp::chosen_level) < 0 ||
      PyModule_AddIntConstant(module, "cpu_level_detected", detected) < 0 ||
      PyModule_AddIntConstant(module, "multiplies_bf16", sdp::multiplies_bf16()) < 0 ||
      PyModule_AddIntConstant(module, "multiplies_fp32", sdp::multiplies_fp32()) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
