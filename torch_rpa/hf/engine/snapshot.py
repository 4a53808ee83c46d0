"""The model as a step computes it: its modules as they stand, in eval mode, whatever happens to the model meanwhile."""

import copy
from itertools import chain
from operator import is_

import torch
from torch import nn
from transformers import PreTrainedConfig

# What torch keeps on every module; all else on one is an attribute of its own.
_OF_TORCH = frozenset(vars(nn.Module()))
_TABLES = ("_modules", "_parameters", "_buffers", "_forward_pre_hooks", "_forward_hooks")
# No forward reads them.
_IGNORED = frozenset({"generation_config", "_torch_rpa", "_torch_rpa_gate"})
_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class ModelSnapshot:
    """Copies of a model's modules, one by one, in eval mode; their weights and buffers are the model's own tensors.

    A step runs on the copies. So `model.train()`, or a hook that another thread adds, does nothing to a step that has
    begun, and what a forward sets on its modules stays off the user's. `is_current` tells before a step whether the
    model still has the same modules, tensors, hooks, attributes and configs, under the same autocast; that takes about
    half a microsecond for each module.

    model      the copies
    tensors    every parameter and buffer
    device     the model's
    """

    def __init__(self, original: nn.Module) -> None:
        self._modules = list(original.modules())
        self.tensors = [*original.parameters(), *original.buffers()]
        self.device = original.device
        self._tables = [vars(module)[name] for module in self._modules for name in _TABLES]
        self._owners, self._plain, self._others = _attributes(self._modules)
        self._objects = self._objects_now()
        self._values = copy.deepcopy(self._values_now())
        self.model = _evaluating_copies(self._modules)[original]

    def is_current(self) -> bool:
        objects = self._objects_now()
        return (
            len(objects) == len(self._objects)
            and all(map(is_, objects, self._objects))
            and self._values_now() == self._values
        )

    def _objects_now(self) -> list:
        """What must be the same objects: children, weights, hooks, and attributes that cannot be compared."""
        in_tables = chain.from_iterable([table.values() for table in self._tables if table])
        return [*map(type, self._modules), *in_tables, *[owner.get(name) for owner, name in self._others]]

    def _values_now(self) -> tuple:
        """What must be equal."""
        device_type = self.device.type
        return (
            [owner.get(name) for owner, name in self._plain],
            [*map(len, self._owners)],  # attributes that are new
            [tensor.dtype for tensor in self.tensors],
            (self.tensors[0].device, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)),
        )


def _attributes(modules: list[nn.Module]) -> tuple[list[dict], list[tuple[dict, str]], list[tuple[dict, str]]]:
    """The dicts of modules and of their configs, and where in them the attributes stand: plain values, and others."""
    configs = {id(value): value for module in modules for value in vars(module).values() if _is_config(value)}
    owners = [vars(owner) for owner in (*modules, *configs.values())]
    places = [(owner, name) for owner in owners for name in owner if name not in _OF_TORCH | _IGNORED]
    plain = [place for place in places if _is_plain(place[0][place[1]])]
    others = [place for place in places if not _is_plain(place[0][place[1]])]
    return owners, plain, others


def _is_table(value: object) -> bool:
    return isinstance(value, (dict, set))


def _is_config(value: object) -> bool:
    return isinstance(value, PreTrainedConfig)


def _is_plain(value: object) -> bool:
    """Whether it is made of numbers and texts, so that a copy of it compares equal."""
    if isinstance(value, dict):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, _ATOMS)


def _evaluating_copies(modules: list[nn.Module]) -> dict[nn.Module, nn.Module]:
    """A copy of each module, with tables of its own, the same tensors, and copies for children."""
    copies = {module: object.__new__(type(module)) for module in modules}
    for module, twin in copies.items():
        attributes = {name: value for name, value in vars(module).items() if name not in _IGNORED}
        tables = {name: value.copy() for name, value in attributes.items() if name in _OF_TORCH and _is_table(value)}
        children = {name: copies.get(child) for name, child in tables["_modules"].items()}
        vars(twin).update(attributes | tables, _modules=children, training=False)
    return copies
