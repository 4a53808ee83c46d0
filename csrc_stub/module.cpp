// The Python module torch_rpa._C and the schemas of its operators, all of them private to torch_rpa.
//
// Importing the module loads this library, whose static initialisers register the operators with PyTorch as
// torch.ops.rpa_native. Their kernels stand in files of their own. The module itself holds one number.

#include <Python.h>
#include <torch/library.h>

namespace {

// To be raised with every change of the schemas, here and in torch_rpa/native.py: so that it can tell a library that was
// built from older sources.
constexpr long kInterface = 2;

}  // namespace

TORCH_LIBRARY(rpa_native, m) {
  // The meaning of the arguments is that of torch.ops.rpa, with scales folded: score_scale = sm_scale * k_scale.
  m.def(
      "ragged_paged_attention(Tensor q, Tensor kv_pages, Tensor kv_lens, Tensor page_indices, Tensor cu_q_lens, "
      "Tensor num_seqs, Tensor? sinks, float score_scale, float value_scale, bool causal, int? sliding_window, "
      "float? soft_cap) -> (Tensor out, Tensor lse)");
  m.def(
      "ragged_paged_attention_update_(Tensor q, Tensor k, Tensor v, Tensor(a!) kv_pages, Tensor kv_lens, "
      "Tensor page_indices, Tensor cu_q_lens, Tensor num_seqs, Tensor? sinks, float sm_scale, float k_scale, "
      "float v_scale, bool causal, int? sliding_window, float? soft_cap) -> Tensor out");
  m.def(
      "write_kv_pages_(Tensor(a!) kv_pages, Tensor k, Tensor v, Tensor slots, float k_scale, float v_scale) -> ()");
  m.def("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  PyObject* const created = PyModule_Create(&module);
  if (created != nullptr && PyModule_AddIntConstant(created, "interface", kInterface) < 0) {
    Py_DECREF(created);
    return nullptr;
  }
  return created;
}
