"""The archive: a PT2 file of ``torch.export.save`` with a few entries of ours beside torch's.

Ours stand in the folder ``extra/chanopt/``: ``plan.json``, ``report.json``, and ``manifest.json``, which has the digest
of every other entry and says where the bytes of each tensor are. Nothing in the archive is pickled. Reading takes the
manifest, JSON and raw bytes; torch's own graph is for readers without chanopt, and is not looked at.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.export import ExportedProgram

from chanopt.errors import ChanoptError, LoadError

FORMAT = 1
_OURS = "extra/chanopt/"
_MANIFEST = _OURS + "manifest.json"
_WEIGHTS = "data/weights/"
_WEIGHTS_CONFIG = _WEIGHTS + "model_weights_config.json"
_SAVE = "chanopt.save(chanopt.optimize(model, inputs), path) makes one"


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in an archive.

    Attributes:
        entry: the archive's entry with its bytes.
        dtype: the element type's name.
        shape: sizes.
        stride: steps between elements, per axis.
        offset: elements before the first.
        trainable: whether it is a parameter with ``requires_grad``.
    """

    entry: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    trainable: bool

    def read(self, data: bytes) -> torch.Tensor:
        """The tensor, from its entry's bytes.

        Raises:
            LoadError: it does not lie inside them.
        """
        dtype = getattr(torch, self.dtype, None)
        numbers = (*self.shape, *self.stride, self.offset)
        if not isinstance(dtype, torch.dtype) or len(self.shape) != len(self.stride) or min(numbers) < 0:
            raise LoadError(f"expected the description of a tensor, found {self}")
        if math.prod(self.shape) == 0:
            return torch.empty(self.shape, dtype=dtype)
        last = self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        if (last + 1) * dtype.itemsize > len(data):
            raise LoadError(f"expected {(last + 1) * dtype.itemsize} bytes in {self.entry}, found {len(data)}")
        whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        usable = len(data) // dtype.itemsize * dtype.itemsize
        return whole[:usable].view(dtype).as_strided(self.shape, self.stride, self.offset).clone()


@dataclass(frozen=True)
class Archive:
    """What chanopt put into an archive, read and checked.

    Attributes:
        plan: the plan's JSON.
        report: the report's JSON.
        tensors: the state dict.
        trainable: names of the parameters with ``requires_grad``.
    """

    plan: str
    report: str
    tensors: Mapping[str, torch.Tensor]
    trainable: frozenset[str]


def write(path: Path, exported: ExportedProgram, plan: str, report: str, version: str) -> None:
    """Write an archive; a file that was at ``path`` is replaced only once the new one is whole.

    Args:
        path: where.
        exported: the slim module; its example inputs are not written.
        plan: the plan's JSON.
        report: the report's JSON.
        version: of chanopt, for messages.

    Raises:
        ChanoptError: a weight is not a plain tensor.
        OSError: the file cannot be written.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # torch takes a lone channels-last tensor for a slice of something; that it is whole is checked below
        warnings.filterwarnings("ignore", message="No complete tensor found", category=UserWarning)
        torch.export.save(_without_examples(exported), buffer)
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        root = PurePosixPath(archive.namelist()[0]).parts[0] + "/"
        archive.writestr(f"{root}{_OURS}plan.json", plan)
        archive.writestr(f"{root}{_OURS}report.json", report)
        names = archive.namelist()
        tensors = _described(exported, json.loads(archive.read(root + _WEIGHTS_CONFIG)))
        for name, row in tensors.items():
            _require_same(name, exported.state_dict[name], _stored(row).read(archive.read(root + row["entry"])))
        manifest = {
            "format": FORMAT,
            "chanopt": version,
            "torch": torch.__version__,
            "byteorder": sys.byteorder,
            "entries": {name.removeprefix(root): _digest(archive.read(name)) for name in names},
            "tensors": tensors,
        }
        archive.writestr(root + _MANIFEST, json.dumps(manifest))
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(buffer.getbuffer())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _without_examples(exported: ExportedProgram) -> ExportedProgram:
    """No example inputs, which torch would pickle; they are of no use to a reader of the file."""
    return ExportedProgram(
        exported.graph_module,
        exported.graph_module.graph,
        exported.graph_signature,
        exported.state_dict,
        exported.range_constraints,
        exported.module_call_graph,
        None,
        exported.constants,
        verifiers=exported.verifiers,
    )


def _described(exported: ExportedProgram, config: Any) -> dict[str, Any]:
    """Where each tensor of the state dict lies, after torch's own index of them."""
    described: dict[str, Any] = {}
    for name, tensor in exported.state_dict.items():
        row = config["config"][name]
        if row["use_pickle"] or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise ChanoptError(f"expected plain tensors to save, found that {name} is a {type(tensor).__name__}")
        offset = row["tensor_meta"]["storage_offset"].get("as_int", 0)
        described[name] = {
            "entry": _WEIGHTS + row["path_name"],
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "offset": offset,
            "trainable": tensor.requires_grad,
        }
    return described


def _require_same(name: str, tensor: torch.Tensor, written: torch.Tensor) -> None:
    bytes_of = [part.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for part in (tensor, written)]
    if not torch.equal(*bytes_of):
        raise ChanoptError(
            f"expected torch.export.save to write {name}, found other bytes in the archive; clone it first"
        )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_ours(path: Path) -> bool:
    """Whether a file is an archive with a manifest of chanopt's, of whatever version."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with _opened(path) as archive:
        return any(name.endswith("/" + _MANIFEST) for name in archive.namelist())


def read(path: Path) -> Archive:
    """Read an archive: JSON and raw bytes, each entry against its digest.

    Raises:
        LoadError: the file is missing, cut short, changed, not chanopt's, or from a newer version.
    """
    with _opened(path) as archive:
        root, manifest = _manifest(archive, path)
        entries = _checked(archive, root, manifest, path)
    try:
        described = {name: _stored(row) for name, row in manifest["tensors"].items()}
        tensors = {name: stored.read(entries[stored.entry]) for name, stored in described.items()}
        plan, report = (entries[f"{_OURS}{name}.json"].decode() for name in ("plan", "report"))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _changed(path, f"its manifest does not fit ({type(error).__name__}: {error})") from error
    return Archive(plan, report, tensors, frozenset(name for name, stored in described.items() if stored.trainable))


def report_of(path: Path) -> str:
    """The report's JSON alone.

    Raises:
        LoadError: as :func:`read`.
    """
    with _opened(path) as archive:
        root, manifest = _manifest(archive, path)
        return _checked(archive, root, manifest, path)[f"{_OURS}report.json"].decode()


# What a damaged archive makes zipfile raise; OSError where it is sent to a place before the file's first byte.
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    LookupError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)


@contextlib.contextmanager
def _opened(path: Path) -> Generator[zipfile.ZipFile]:
    if not path.is_file():
        raise LoadError(
            f"expected a file saved by chanopt.save, found {'a folder' if path.is_dir() else 'no file'} {path}"
        )
    with path.open("rb"):
        pass  # what may not be read is no damaged file
    if not zipfile.is_zipfile(path):
        raise LoadError(f"expected a .pt2 file saved by chanopt.save, found that {path} is none, or cut short; {_SAVE}")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except PermissionError:
        raise
    except _DAMAGED as error:
        raise _changed(path, f"it is damaged ({error})") from error


def _manifest(archive: zipfile.ZipFile, path: Path) -> tuple[str, dict[str, Any]]:
    """The folder that everything stands in, and the manifest."""
    names = archive.namelist()
    found = [name for name in names if name.endswith("/" + _MANIFEST)]
    if not found:
        pickled = [name for name in names if name.endswith((".pkl", ".pickle"))]
        also = f"; it holds pickled Python ({pickled[0]}), which chanopt never loads" if pickled else ""
        raise LoadError(f"expected a file saved by chanopt.save, found that {path} has no manifest{also}; {_SAVE}")
    try:
        manifest = json.loads(archive.read(found[0]))
        written, by = manifest["format"], manifest["chanopt"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _changed(path, "its manifest is not JSON of chanopt's") from error
    if type(written) is not int or written < 1:
        raise _changed(path, f"its format is {written!r}")
    if written > FORMAT:
        raise LoadError(
            f"expected a file of format {FORMAT} at most, found that {path} has format {written!r}, "
            f"written by chanopt {by}; update chanopt to read it"
        )
    if manifest.get("byteorder") != sys.byteorder:
        raise LoadError(f"expected tensors of a {sys.byteorder}-endian machine, found {manifest.get('byteorder')!r}")
    return found[0].removesuffix(_MANIFEST), manifest


def _checked(archive: zipfile.ZipFile, root: str, manifest: dict[str, Any], path: Path) -> dict[str, bytes]:
    """The bytes of every entry, once there is none more and none less, and none changed."""
    digests = manifest.get("entries")
    if not isinstance(digests, dict):
        raise _changed(path, "its manifest lists no entries")
    names = [name for name in archive.namelist() if name != root + _MANIFEST]
    unknown = sorted(set(names) - {root + str(name) for name in digests})
    missing = sorted({root + str(name) for name in digests} - set(names))
    if unknown or missing or len(names) != len(set(names)):
        raise _changed(path, f"entries were added ({unknown[:3]}), repeated or taken away ({missing[:3]})")
    entries = {name.removeprefix(root): archive.read(name) for name in names}
    wrong = [name for name, data in entries.items() if _digest(data) != digests[name]]
    if wrong:
        raise _changed(path, f"{wrong[0]} is not what was saved")
    return entries


def _stored(row: Any) -> Stored:
    shape, stride = tuple(map(int, row["shape"])), tuple(map(int, row["stride"]))
    return Stored(str(row["entry"]), str(row["dtype"]), shape, stride, int(row["offset"]), bool(row["trainable"]))


def _changed(path: Path, why: str) -> LoadError:
    return LoadError(f"expected {path} as chanopt.save wrote it, found that {why}; copy or save it again")
