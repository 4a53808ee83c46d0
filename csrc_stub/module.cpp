// The Python module torch_rpa._C and the schemas of its operators, all of them private to torch_rpa.
//
// The module is empty: importing it loads this library, whose static initialisers register the operators with
// PyTorch as torch.ops.rpa_native. Their kernels stand in files of their own.

#include <Python.h>
#include <torch/library.h>

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
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
