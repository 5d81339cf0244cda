"""What all objects of the double of TensorRT have in common: a log, and only the names of their version."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum, IntEnum
from typing import Any, ClassVar, NoReturn


class NotInDouble(AssertionError):
    """A name that TensorRT has in this version, which the double does not implement."""


class Crash(AssertionError):
    """The real process would be gone here."""


class Absent:
    """A name of the bindings with nothing behind it here: hasattr is right, use is refused."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __set__(self, thing: Any, value: Any) -> NoReturn:
        self._refuse()

    def __get__(self, thing: Any, owner: Any = None) -> Absent:
        return self

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotInDouble(f"{self._path} is in TensorRT's bindings, and not in their double")

    __call__ = __bool__ = __eq__ = __int__ = __index__ = __iter__ = __len__ = __getitem__ = _refuse  # type: ignore
    __hash__ = object.__hash__


def plain(**defaults: Any) -> dict[str, Any]:
    """Attributes that can be read and set, and do nothing here."""
    return defaults


class Thing:
    """An object of TensorRT's: what is not underscored is what the bindings have."""

    _trt: ClassVar[Any]
    _plain: ClassVar[dict[str, Any]] = {}  # see plain

    def __setattr__(self, name: str, value: Any) -> None:
        # A class derived in Python has room for anything; those of the bindings have not.
        if not name.startswith("_") and "_own" in vars(type(self)) and not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        object.__setattr__(self, name, value)

    def _start(self, logger: Any) -> None:
        self._of(logger, "ILogger")
        if not hasattr(logger, "_ready"):
            raise TypeError("tensorrt.ILogger.__init__() must be called when overriding __init__")
        self._logger = logger

    def _of(self, thing: Any, kind: str) -> Any:
        if not isinstance(thing, getattr(self._trt, kind)):
            raise TypeError(f"incompatible function arguments: {thing!r} is no {kind}")
        return thing

    def _say(self, severity: str, text: str) -> None:
        self._logger.log(getattr(self._trt.ILogger.Severity, severity), text)

    def _refuse(self, code: int, text: str) -> None:
        self._say("ERROR", f"{type(self).__name__}: Error Code {code}: API Usage Error ({text})")


class Dims:
    """A shape; equal to a tuple or list of its sizes, and like the real one to nothing else."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = tuple(sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, at: Any) -> Any:
        return self._sizes[at]

    def __iter__(self) -> Iterator[int]:
        return iter(self._sizes)

    def __repr__(self) -> str:
        return repr(self._sizes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (tuple, list)):
            raise TypeError("__eq__(): incompatible function arguments")
        return self._sizes == tuple(other)


class Named(Enum):
    """pybind11's enums: an int can be had of them, and they are none."""

    def __int__(self) -> int:
        return int(self.value)

    __index__ = __int__


class Ordered(IntEnum):
    """Those that are compared, such as Severity."""

    __str__ = Enum.__str__
    __repr__ = Enum.__repr__


class ILogger(Thing):
    def __init__(self) -> None:
        self._ready = True

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError("ILogger.log is called by TensorRT: override it")


class IHostMemory(bytes):
    """Bytes behind a buffer; the real one is no bytes: what only those can do is refused."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name not in ("nbytes", "dtype"):
            raise AttributeError(f"'IHostMemory' object has no attribute {name!r}")
        return object.__getattribute__(self, name)

    @property
    def nbytes(self) -> int:
        return bytes.__len__(self)

    @property
    def dtype(self) -> Any:
        return type(self)._trt.DataType.INT8  # type: ignore[attr-defined]

    def _refuse(self, *args: Any) -> NoReturn:
        raise TypeError("object of type 'IHostMemory' has no len(), no items and no order")

    __len__ = __getitem__ = __iter__ = __add__ = __contains__ = __mul__ = __mod__ = _refuse  # type: ignore
