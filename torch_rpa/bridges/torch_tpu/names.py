"""All private names of torch_tpu that torch_rpa uses."""

from torch_rpa.private_names import PrivateNames

_INTERNAL = "torch_tpu._internal"
tpu = PrivateNames(
    "torch_tpu",
    "0.2.0",
    {
        "call_kernel": f"{_INTERNAL}.pallas.tpu_torch_pallas:call_custom_kernel",
        "has_kernel": f"{_INTERNAL}.pallas.tpu_torch_pallas:lookup_custom_kernel",
        "register_kernel": f"{_INTERNAL}.pallas.tpu_torch_pallas:register_custom_kernel",
        "cache_stats": f"{_INTERNAL}.device._device_ops_backend:_get_cache_stats",
        "device_attributes": f"{_INTERNAL}.device._device_ops_backend:_get_local_device_attributes",
        "run_pending": f"{_INTERNAL}.sync._tpu_torch_sync:synchronize",
    },
)
