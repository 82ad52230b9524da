"""Collect everything that is wrong with the files of a task, and read JSON and images' names with such findings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainer.data.errors import SampleError
from trainer.data.samples.sample_members import decode_json
from trainer.errors import Problem

Types = Mapping[str, type | tuple[type, ...]]

_SHOWN = 5


@dataclass
class Findings:
    """Collect what is wrong with a task's files; each kind of fault becomes one problem with its ids.

    Attributes:
        task: Dotted name of the task ("tasks.0").
    """

    task: str
    _ids: dict[tuple[str, Path, str], list[str]] = field(default_factory=dict)

    def add(self, setting: str, file: Path, fault: str, identifier: object = None) -> None:
        """Add a fault.

        Args:
            setting: Name of the task's setting that names the file.
            file: File with the fault.
            fault: What is wrong, the same text for each id.
            identifier: Id of the entry; None where the whole file is meant.
        """
        ids = self._ids.setdefault((setting, file, fault), [])
        if identifier is not None:
            ids.append(str(identifier))

    @property
    def problems(self) -> list[Problem]:
        """A problem for each kind of fault."""
        return [
            Problem(f"{self.task}.{setting}", f"{file}: {fault}{_listed(ids)}")
            for (setting, file, fault), ids in self._ids.items()
        ]

    def __bool__(self) -> bool:
        return bool(self._ids)


def _listed(ids: list[str]) -> str:
    if not ids:
        return ""
    more = f" and {len(ids) - _SHOWN:,} more" if len(ids) > _SHOWN else ""
    return f": {', '.join(ids[:_SHOWN])}{more}"


@dataclass(frozen=True)
class Source:
    """Read one file of a task.

    Attributes:
        findings: Where faults go.
        setting: Name of the task's setting that names the file.
        file: File to read.
    """

    findings: Findings
    setting: str
    file: Path

    def fault(self, fault: str, identifier: object = None) -> None:
        """Add a fault of this file."""
        self.findings.add(self.setting, self.file, fault, identifier)

    def json_object(self, *keys: str) -> dict[str, Any]:
        """Return the file's JSON object; another value is a finding, and gives an empty one.

        Args:
            keys: Keys that the object must have, each with a list as its value; a missing one gives an empty list.
        """
        value = self._json()
        if not isinstance(value, dict):
            if value is not None:
                self.fault(f"is {_kind(value)}, not an object: is it another file?")
            return {key: [] for key in keys}
        for key in keys:
            if not isinstance(value.get(key), list):
                self.fault(f"has no list {key!r} (it has {', '.join(list(value)[:8])}): is it another file?")
                value[key] = []
        return value

    def json_list(self) -> list[Any]:
        """Return the file's JSON list; another value is a finding, and gives an empty one."""
        value = self._json()
        if isinstance(value, list):
            return value
        if value is not None:
            self.fault(f"is {_kind(value)}, not a list: is it another file?")
        return []

    def _json(self) -> Any:
        try:
            value = decode_json(self.file.read_bytes(), strict=False)
        except (OSError, SampleError) as error:
            self.fault(f"cannot be read ({error})")
            return None
        if value is None:
            self.fault("is null: is it another file?")
        return value

    def json_lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield number (from 1) and object of each line of a JSON lines file."""
        try:
            lines = self.file.read_bytes().split(b"\n")
        except OSError as error:
            self.fault(f"cannot be read ({error})")
            return
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = decode_json(line)
            except SampleError as error:
                self.fault(f"line cannot be read ({error})", f"line {number}")
                continue
            if isinstance(value, dict):
                yield number, value
            else:
                self.fault("line is not an object", f"line {number}")

    def entries(self, values: list[Any], types: Types) -> Iterator[dict[str, Any]]:
        """Yield the entries that have these fields; the others become findings, with their places.

        Args:
            values: Entries of a list in the file.
            types: Type of each field.
        """
        for number, entry in enumerate(values):
            if not isinstance(entry, dict):
                self.fault("entry is not an object", f"entry {number}")
                continue
            wrong = [name for name, kind in types.items() if not _has(entry, name, kind)]
            for name in wrong:
                self.fault(f"entry lacks {name!r}, or it is of another type", f"entry {number}")
            if not wrong:
                yield entry

    def unique(self, what: str) -> Callable[[object], bool]:
        """Return a function that tells whether an id is new; one that is not becomes a finding."""
        seen: set[object] = set()

        def is_new(identifier: object) -> bool:
            if identifier in seen:
                self.fault(f"{what} stands more than once", identifier)
                return False
            seen.add(identifier)
            return True

        return is_new

    def medium_path(self, setting: str, path: Path, identifier: object, kind: str = "image") -> Path:
        """Return the path of a medium; one that does not exist becomes a finding of ``setting``."""
        if path.name not in _names_in(path.parent):
            self.findings.add(setting, self.file, f"its {kind}s are missing", f"{identifier} ({path})")
        return path

    def formatted(self, setting: str, template: Path, **fields: object) -> Path:
        """Return a path with its ``{image_id}`` or ``{video}`` filled in; an impossible one becomes a finding."""
        text = str(template)
        name = next(iter(fields))
        try:
            if "{" not in text:
                raise ValueError(f"it has no {{{name}}}")
            return Path(text.format(**fields))
        except (KeyError, ValueError, IndexError) as error:
            self.findings.add(setting, template, f"is no path with {{{name}}} ({error})")
            return template


def _has(entry: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> bool:
    value = entry.get(name)
    return isinstance(value, kind) and not isinstance(value, bool)


def _kind(value: object) -> str:
    for kind, name in ((dict, "an object"), (list, "a list"), (str, "a text")):
        if isinstance(value, kind):
            return name
    return type(value).__name__


@lru_cache(maxsize=4096)
def _listing(folder: Path, changed: int) -> frozenset[str]:
    return frozenset(os.listdir(folder))


def _names_in(folder: Path) -> frozenset[str]:
    """Return the names in a folder, () if there is none. One listing is faster than asking for 80,000 files."""
    try:
        return _listing(folder, folder.stat().st_mtime_ns)
    except OSError:
        return frozenset()
