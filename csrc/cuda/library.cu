// The CUDA library's Python module. Operators register themselves in their own files.
#include <Python.h>

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", "CUDA kernels of sdp_kernels", -1, nullptr,
                                          nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  if (PyModule_AddStringConstant(module, "schema_hash", SDP_SCHEMA_HASH) < 0 ||
      PyModule_AddStringConstant(module, "build_info", SDP_BUILD_INFO) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
