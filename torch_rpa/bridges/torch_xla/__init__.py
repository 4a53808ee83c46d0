"""The bridge to PyTorch/XLA.

bridge.py     the interface
lowering.py   a call of an op as a computation of PyTorch/XLA
target.py     what is lowered for, and what tensors are made of: the device, or what stands in its place
replay.py     a program that is traced once and run again and again
spmd.py       parts of tensors on chips, for ``torch_rpa.sharding``
names.py      all private names of torch_xla
"""
