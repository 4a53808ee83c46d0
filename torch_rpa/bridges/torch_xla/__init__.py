"""The bridge to PyTorch/XLA.

bridge.py     the interface
lowering.py   a call of an op as a computation of PyTorch/XLA
device.py     the device: what it is, its memory, running what is pending
replay.py     a program that is traced once and run again and again
spmd.py       parts of tensors on chips, for ``torch_rpa.sharding``
names.py      all private names of torch_xla
"""
