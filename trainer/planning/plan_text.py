"""Print predictions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # these load torch; a wrong configuration is reported before that
    from trainer.planning.prediction import Prediction
    from trainer.planning.scaling import ScalingPoint
    from trainer.planning.search import Found

_GIB = 2.0**30
_SAMPLES = 2e9


def print_prediction(found: Prediction) -> None:
    """Print the parameters, the memory, the seconds and the traffic of a step."""
    print(f"  parameters {found.parameters / 1e9:.3f} G, of which {found.trainable / 1e9:.3f} G train")
    for name, size in (*found.memory.parts.items(), *found.overhead.items()):
        if size:
            print(f"  memory   {name:28s} {size / _GIB:10.2f} GiB")
    print(f"  memory   {'of a device, total':28s} {found.device_memory / _GIB:10.2f} GiB, at {found.memory.moment}")
    for name, size in found.host_memory.items():
        if size:
            print(f"  host     {name:28s} {size / _GIB:10.2f} GiB of a node")
    for name, seconds in found.seconds.items():
        print(f"  step     {name:28s} {seconds:10.3f} s")
    rate = found.samples / found.step_seconds
    print(f"  step     {'total':28s} {found.step_seconds:10.3f} s, {rate:.0f} samples/s")
    print(f"  sent     {'by a device, in a step':28s} {found.sent / _GIB:10.2f} GiB in {found.messages} messages")
    if found.recomputed is not None:
        print(f"  {found.recomputed} of the language model's blocks are recomputed in the backward pass")
    print(f"  2 billion samples {found.days(_SAMPLES):28.1f} days", flush=True)


def print_search(ranked: Sequence[Found[Any]]) -> None:
    """Print the best variant of each group, what bounds it, and why it is not the best."""
    fitting = [one for one in ranked if one.prediction.fits]
    print("the fastest of each kind:" if fitting else "no setting of the search fits")
    for one in ranked:
        found, memory = one.prediction, one.prediction.device_memory / _GIB
        if found.fits:
            verdict = f"bound by {found.bound_by}"
            if one is not fitting[0]:
                slower = found.step_seconds / fitting[0].prediction.step_seconds
                verdict += f", {slower:.2f} times the fastest"
            print(f"  {found.step_seconds:8.2f} s  {memory:6.1f} GiB  {one.variant.group}: {verdict}")
        else:
            print(f"  {'':8s}    {memory:6.1f} GiB  {one.variant.group}: does not fit")
    if fitting:
        print(f"settings of the fastest: {settings_text(fitting[0])}")


def settings_text(found: Found[Any]) -> str:
    """Return the settings of a variant as on the command line, without the dashes."""
    values = {name: value for name, value in found.variant.settings.items() if name != "deepspeed.raw"}
    return ", ".join(f"{name} {_plain(value)}" for name, value in values.items())


def print_scaling(points: Iterable[ScalingPoint]) -> None:
    """Print a table of predictions for several numbers of devices."""
    print(f"  {'':8s}  {'same batch':^40s}  {'batch in proportion to the devices':^40s}")
    header = f"{'seconds':>9s} {'samples/s':>10s}  {'bound by':19s}"
    print(f"  {'devices':8s}  {header:40s}  {header}")
    for point in points:
        print(f"  {point.cluster.size:<8d}  {_scaling_cell(point.strong):40s}  {_scaling_cell(point.weak)}".rstrip())


def _scaling_cell(found: Prediction | None) -> str:
    if found is None:
        return "the batch cannot be divided"
    bound = found.bound_by if found.fits else f"does not fit: {found.device_memory / _GIB:.0f} GiB"
    return f"{found.step_seconds:9.2f} {found.samples / found.step_seconds:10.0f}  {bound:19s}"


def _plain(value: object) -> object:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else value
