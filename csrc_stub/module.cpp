// The Python module torch_rpa._C and the schemas of its operators, all of them private to torch_rpa.
//
// The module is empty: importing it loads this library, whose static initialisers register the operators with
// PyTorch as torch.ops.rpa_native. Their kernels stand in files of their own.

#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(rpa_native, m) {
  m.def(
      "write_kv_pages_(Tensor(a!) kv_pages, Tensor k, Tensor v, Tensor slots, float k_scale, float v_scale) -> ()");
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
