"""Read untrusted files (.npz, .npy, pickles, joblib's and torch's) without running code that is in them.

A pickle may name any function to be called; this reader resolves names only to the stand-ins below. joblib
writes a pickle, too, in which an array's bytes follow a wrapper that says its shape and type.
"""

import bz2
import gzip
import io
import lzma
import pickle
import re
import zipfile
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.lib import format as npy

COMPRESSED = {b"x" + level: zlib.decompress for level in (b"\x01", b"\x5e", b"\x9c", b"\xda")} | {
    b"\x1f\x8b": gzip.decompress, b"BZ": bz2.decompress, b"\xfd7": lzma.decompress,
}  # by joblib: by a file's first two bytes  # fmt: skip


def read_arrays(file: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of an .npz that have these names; ValueError if it is damaged or holds pickled objects."""
    with open(file, "rb") as stream:
        try:
            if not zipfile.is_zipfile(stream):
                raise ValueError("it is no archive, or cut short")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as archive:
                return {name: archive[name] for name in names if name in archive}
        except Exception as error:  # zip, zlib and numpy have no common error for damaged bytes
            hint = "expected an .npz of plain arrays; download or export it again"
            raise ValueError(f"{file} cannot be read: {error}; {hint}") from error


def read_object(file: Path, what: str, names: Sequence[str] | None = None) -> object:
    """What a .pkl, .npy or torch file holds: dicts, lists, texts, numbers, and arrays of numpy.

    The format is told by the content, not the file's name; tensors become arrays. `what` is what errors call
    the file, such as "SMPL model"; of a dictionary only `names` are read. ValueError if it is damaged or
    names something that could run code.
    """
    try:
        content = _read(file.read_bytes())
        if names is not None and isinstance(content, dict):
            content = {name: content[name] for name in names if name in content}
        return _plain(content, {})
    except Exception as error:  # damaged bytes can raise any exception in these formats
        unknown = re.search(r"GLOBAL (\S+)", str(error))  # torch's word in a long message, and ours
        reason = f"it names {unknown[1]}, which no {what} needs" if unknown else str(error).split("\n")[0]
        if not reason.startswith("it "):
            reason = f"it is damaged or cut short ({reason or type(error).__name__})"
        raise ValueError(f"{file} cannot be read: {reason}; download or export this {what} again") from error


def _read(data: bytes) -> object:
    if not data:
        raise ValueError("it is empty")
    data = COMPRESSED.get(data[:2], bytes)(data)
    stream = io.BytesIO(data)
    if data.startswith(b"PK"):
        return _read_torch(stream)
    if data.startswith(b"\x93NUMPY"):
        return _read_npy(stream)
    return _AllowList(stream).load()


def _read_npy(stream: io.BytesIO) -> object:
    read_header = {1: npy.read_array_header_1_0, 2: npy.read_array_header_2_0}[npy.read_magic(stream)[0]]
    *_, dtype = read_header(stream)
    if dtype.hasobject:
        return _AllowList(stream).load()
    stream.seek(0)
    return npy.read_array(stream, allow_pickle=False)


def _read_torch(stream: io.BytesIO) -> object:
    core = np._core.multiarray
    types = [core._reconstruct, core.scalar, np.ndarray, np.dtype]
    types += [type(np.dtype(code)) for code in np.typecodes["AllFloat"] + np.typecodes["AllInteger"] + "?SU"]
    with torch.serialization.safe_globals(types):
        return torch.load(stream, map_location="cpu", weights_only=True)


# ---------------------------------------------------------------- stand-ins


class _Record:
    """Stands in for a chumpy or scipy.sparse object: pickle fills its attributes, no code of theirs runs."""


class _Wrapper(_Record):
    """Stands in for joblib's NumpyArrayWrapper."""


class _Dtype:
    """Stands in for numpy.dtype, whose own unpickling trusts the file with memory layout."""

    def __init__(self, code: str, *_: object):
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.code = state[1] + self.code  # byte order

    def read(self, data: bytes | str, shape: tuple[int, ...], order: str = "C") -> np.ndarray:
        raw = data.encode("latin1") if isinstance(data, str) else data  # Python 2 had no bytes
        return np.frombuffer(raw, self.code).reshape(shape, order=order)


class _Array:
    """Stands in for numpy.ndarray; `x` is the array, or the list of an array of objects."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, column_major, data = state
        if isinstance(data, list):
            self.x = data if shape else data[0]
        else:
            self.x = dtype.read(data, shape, "F" if column_major else "C")


def _storage(data: bytes) -> object:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


_NUMPY_MODULES = {"numpy"} | {
    f"numpy.{core}.{module}" for core in ("core", "_core") for module in ("multiarray", "numeric")
}
_NUMPY = {
    "ndarray": _Array,
    "dtype": _Dtype,
    "_reconstruct": lambda *_: _Array(),
    "_frombuffer": lambda data, dtype, shape, order: dtype.read(data, shape, order),
    "scalar": lambda dtype, data: dtype.read(data, ())[()],  # may be a dictionary's key: hashable, no array
}
_OTHERS = {
    "_codecs.encode": lambda text, _: text.encode("latin1"),  # how Python 3 writes bytes for Python 2
    "copyreg._reconstructor": lambda kind, *_: kind(),
    "copy_reg._reconstructor": lambda kind, *_: kind(),  # Python 2's name
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": defaultdict,
    "joblib.numpy_pickle.NumpyArrayWrapper": _Wrapper,
    "torch._utils._rebuild_tensor_v2": lambda *parts: torch._utils._rebuild_tensor_v2(*parts[:5], {}),
    "torch.storage._load_from_bytes": _storage,
}
for _kind in (object, set, dict, list):  # chumpy notes its changed variables in a set
    _OTHERS |= {f"{module}.{_kind.__name__}": _kind for module in ("builtins", "__builtin__")}


class _AllowList(pickle._Unpickler):  # the Python version: C's reads ahead, into the arrays in between
    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, encoding="latin1")
        self.stream = stream

    def find_class(self, module: str, name: str) -> object:
        found = _NUMPY.get(name) if module in _NUMPY_MODULES else _OTHERS.get(f"{module}.{name}")
        sparse = module.startswith("scipy.sparse") and name.endswith("_matrix")
        if sparse or module.split(".")[0] == "chumpy":
            found = _Record
        if found is None:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        # a pickle can set attributes on a class that it names, so it gets a new subclass each time
        return type(name, (found,), {}) if isinstance(found, type) else found

    def load_build(self) -> None:
        super().load_build()
        if isinstance(wrapper := self.stack[-1], _Wrapper):
            self.stack[-1] = self.read_joblib_array(wrapper)

    dispatch[pickle.BUILD[0]] = load_build

    def read_joblib_array(self, wrapper: _Wrapper) -> object:
        """joblib/numpy_pickle.py, NumpyArrayWrapper.read_array."""
        if "O" in wrapper.dtype.code:
            return _AllowList(self.stream).load()
        if getattr(wrapper, "numpy_array_alignment_bytes", None):
            self.stream.read(self.stream.read(1)[0])  # a byte that counts the padding after it
        count = int(np.prod(wrapper.shape, dtype=object))
        data = self.stream.read(count * np.dtype(wrapper.dtype.code).itemsize)
        return wrapper.dtype.read(data, wrapper.shape, wrapper.order)


def _plain(value: object, seen: dict) -> object:
    """The value with stand-ins and tensors turned into arrays; `seen` holds results by id."""
    if id(value) in seen:
        return seen[id(value)][0]
    if isinstance(value, torch.Tensor):
        plain = (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
    elif isinstance(value, _Array):
        plain = _plain(value.x, seen)
    elif isinstance(value, _Record):
        plain = _array_of(value, seen)
    elif isinstance(value, dict):
        plain = {key: _plain(item, seen) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        plain = [_plain(item, seen) for item in value]
    else:
        plain = value
    seen[id(value)] = plain, value  # the value is kept, so that no other object gets its id
    return plain


def _array_of(record: _Record, seen: dict) -> np.ndarray:
    """The array of a chumpy or scipy.sparse object; Ch holds `x`, Select a flat selection of `a`."""
    kind = type(record).__name__
    if kind == "Ch":
        return _plain(record.x, seen)
    if kind == "Select":
        selected = np.asarray(_plain(record.a, seen)).ravel()[_plain(record.idxs, seen)]
        return selected.reshape(getattr(record, "preferred_shape", selected.shape))
    if kind == "csc_matrix":
        indptr, indices, data = (_plain(x, seen) for x in (record.indptr, record.indices, record.data))
        dense = np.zeros(record._shape)
        np.add.at(dense, (indices, np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))), data)
        return dense
    raise ValueError(f"expected arrays of numpy, chumpy (Ch, Select) or scipy.sparse (csc), got {kind}")
