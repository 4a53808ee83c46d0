"""The bridge to TorchTPU, Google's native backend of PyTorch for TPUs: tensors on "tpu".

bridge.py     the interface
lowering.py   a call of an op as a custom kernel of TorchTPU
names.py      all private names of torch_tpu
"""
