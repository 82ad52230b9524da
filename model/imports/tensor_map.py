"""Map the tensors of another project's checkpoint to those of a Flamingo, and back.

A map names every tensor on both sides, so that one description serves import and export, and a checkpoint of another
family, size or generation is an error that names tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, cat

from model.transformers_tower import tensor_places

_MOST = 3  # names of a kind in a message


@dataclass(frozen=True)
class Entry:
    """Pair one tensor of ours with the tensors of theirs that it is made of.

    Attributes:
        ours: Name of the tensor here.
        theirs: Names of the tensors there, which are joined along their first dimension.
        shapes: Shape of each tensor there.
        our_shape: Shape of the tensor here, where joining alone does not give it.
    """

    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    our_shape: tuple[int, ...] | None = None

    def join(self, read: Callable[[str], Tensor]) -> Tensor:
        """Return our tensor; ``read`` gives a tensor of theirs by its name."""
        parts = [read(name) for name in self.theirs]
        joined = parts[0] if len(parts) == 1 else cat(parts)
        return joined if self.our_shape is None else joined.reshape(self.our_shape)

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return their tensors by name."""
        if len(self.theirs) == 1:
            return {self.theirs[0]: tensor.reshape(self.shapes[0])}
        parts = tensor.split([shape[0] for shape in self.shapes])
        return {name: part.contiguous() for name, part in zip(self.theirs, parts, strict=True)}


def same(ours: str, theirs: str, *shape: int) -> Entry:
    """Return the entry of a tensor that is the same on both sides."""
    return Entry(ours, (theirs,), (shape,))


class Checkpoint:
    """Read the tensors of a folder of safetensors, one at a time.

    Attributes:
        folder: Folder of the checkpoint.
    """

    def __init__(self, folder: Path, rename: Callable[[str], str] = str) -> None:
        """Look at the folder's files.

        Args:
            folder: Folder of the checkpoint.
            rename: Returns the name to use for a tensor, from its name in the file.

        Raises:
            ValueError: The folder has no safetensors, or a file is damaged.
        """
        self.folder = folder
        self._places = {
            rename(name): (path, name) for name, path in tensor_places(folder.glob("*.safetensors")).items()
        }
        if not self._places:
            pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
            found = f"; it has the pickled files {pickled[:_MOST]}, which are not read" if pickled else ""
            raise ValueError(
                f"{folder} has no .safetensors file{found}. Load it in transformers and write it with save_pretrained"
            )

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._places)

    def read(self, name: str) -> Tensor:
        """Return a tensor by its name."""
        path, stored = self._places[name]
        with safe_open(path, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(stored)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        path, stored = self._places[name]
        with safe_open(path, framework="pt") as opened:
            return tuple(opened.get_slice(stored).get_shape())


def check_names(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], family: str) -> None:
    """Check that a checkpoint has exactly the tensors that its configuration implies.

    Args:
        checkpoint: Checkpoint to look at.
        expected: Shape of every tensor, by name.
        family: Family for the message.

    Raises:
        ValueError: Tensors are missing, unexpected or of another shape.
    """
    missing = sorted(expected.keys() - checkpoint.names)
    unexpected = sorted(checkpoint.names - expected.keys())
    shapes = [
        f"{name} {list(checkpoint.shape(name))} instead of {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in checkpoint.names and checkpoint.shape(name) != shape
    ]
    if not (missing or unexpected or shapes):
        return
    if unexpected and not expected.keys() & checkpoint.names:
        raise ValueError(
            f"{checkpoint.folder} holds no tensor of {family}: found {unexpected[:_MOST]}, expected {missing[:_MOST]}. "
            "It is a checkpoint of another family or generation, or its config.json belongs to another one"
        )
    raise ValueError(
        f"{checkpoint.folder} does not fit its config.json as {family}: {len(missing)} tensors missing "
        f"{missing[:_MOST]}, {len(unexpected)} unexpected {unexpected[:_MOST]}, {len(shapes)} of another shape "
        f"{shapes[:_MOST]}. Take the config.json that belongs to the weights"
    )


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int = 5_000_000_000) -> None:
    """Write tensors as ``model.safetensors``, or as several files with an index, as transformers does.

    Args:
        folder: Folder to write to.
        tensors: Names and tensors; one file of them is in memory at once.
        limit: Most bytes of a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[tuple[Path, list[str]]] = []
    pending: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        path = folder / f"part-{len(shards)}.safetensors"
        save_file(pending, path, metadata={"format": "pt"})
        shards.append((path, list(pending)))
        pending.clear()

    for name, tensor in tensors:
        bytes_of_tensor = tensor.numel() * tensor.element_size()
        if pending and size + bytes_of_tensor > limit:
            flush()
            size = 0
        pending[name] = tensor.detach().cpu().contiguous()
        size, total = size + bytes_of_tensor, total + bytes_of_tensor
    flush()
    if len(shards) == 1:
        shards[0][0].rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        path.rename(folder / name)
        places |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def their_shapes(entries: Iterable[Entry]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of theirs, by name."""
    return {name: shape for entry in entries for name, shape in zip(entry.theirs, entry.shapes, strict=True)}


def split_all(entries: Sequence[Entry], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return their tensors from ours, by name."""
    found: dict[str, Tensor] = {}
    for entry in entries:
        found |= entry.split(state[entry.ours])
    return found
