"""All private names of torch_xla that torch_rpa uses."""

from torch_rpa.private_names import PrivateNames

_XLAC = {
    "annotate_sharding": "_xla_annotate_custom_sharding",
    "check_needs_run": "_check_tensor_need_materialization",
    "compile_pending": "_xla_warm_up_cache",
    "full_to_shard": "_spmd_full_to_shard_shape",
    "graph_hash": "_get_graph_hash",
    "hlo_of": "_get_xla_tensors_hlo",
    "init_client": "_init_computation_client",
    "is_compilation_cache_made": "_xla_computation_cache_is_initialized",
    "mark_manual": "_mark_manual_sharding",
    "mark_sharding": "_xla_mark_sharding",
    "OpSharding": "OpSharding",
    "parameters_of": "_get_tensors_xla_device_data_node",
    "replace_data": "_replace_xla_tensor",
    "run_by_hash": "_run_cached_graph",
    "run_pending": "_xla_sync_multi",
    "set_donation": "_set_buffer_donation",
    "shard_to_full": "_spmd_shard_to_full_shape",
    "sharding_of": "_get_xla_sharding_spec",
    "tensor_handles": "_get_tensors_handle",
    "tensor_id": "_xla_get_tensor_id",
    "user_computation": "_xla_user_computation",
}
xla = PrivateNames(
    "torch_xla",
    "2.9.0",
    {name: f"torch_xla:_XLAC.{path}" for name, path in _XLAC.items()}
    | {"tpu_type": "torch_xla._internal.tpu:get_tpu_type"},
)
