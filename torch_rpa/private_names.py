"""Private names of other packages: looked up by path at first use, so that one that a release lacks is named.

Each package has one table of them, in one file; nothing else in torch_rpa uses a private name of it.
"""

from importlib import import_module, metadata
from operator import attrgetter


class PrivateNames:
    """Attributes that stand for private names of another package.

    Args:
        package: as pip names it.
        version: of the package that the names were taken from.
        paths: attribute -> "module:name", where the name may have dots.
    """

    def __init__(self, package: str, version: str, paths: dict[str, str]) -> None:
        self._package, self._version, self._paths = package, version, paths

    def __getattr__(self, attribute: str):
        if attribute not in self.__dict__["_paths"]:
            raise AttributeError(attribute)
        try:
            value = _resolve(self._paths[attribute])
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"torch_rpa needs {self._paths[attribute]}, which {self._package} {metadata.version(self._package)} "
                f"does not have; version {self._version} has it"
            ) from error
        setattr(self, attribute, value)  # the next look-up is a plain attribute's
        return value

    def missing(self) -> list[str]:
        """The paths that the installed release does not have."""
        return [path for path in self._paths.values() if not _exists(path)]


def _resolve(path: str):
    module, _, name = path.partition(":")
    return attrgetter(name)(import_module(module))


def _exists(path: str) -> bool:
    try:
        _resolve(path)
    except (ImportError, AttributeError):
        return False
    return True
