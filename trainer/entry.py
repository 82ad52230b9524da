"""What the training entry points share: parse, join the processes, train, export, turn errors into exit codes.

Nothing heavy is imported before the configuration is known to be good, so that its errors come at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NoReturn, TypeVar

from trainer.config.loader import check_world_size, config_to_yaml, parse_arguments
from trainer.config.run_config import RunConfig
from trainer.errors import ConfigError, TrainerError

if TYPE_CHECKING:
    from trainer.loop import Task
    from trainer.runtime.distributed import World

Config = TypeVar("Config", bound=RunConfig)

EXIT_OK, EXIT_FAILED, EXIT_CONFIGURATION = 0, 1, 2
COMPLETE = "complete"
# Errors whose message says all that a user needs; anything else is a defect and keeps its traceback.
_USER_ERRORS = (TrainerError, ValueError, OSError)

_log = logging.getLogger("trainer")


@dataclass(frozen=True)
class Tools(Generic[Config]):
    """What differs between the trainers. export writes ``run_dir/export`` from the last checkpoint, on rank 0."""

    build_task: Callable[[Config, World], Task]
    export: Callable[[Config, Path], None]


def run_training(schema: type[Config], argv: Sequence[str] | None, tools: Callable[[], Tools[Config]]) -> int:
    """Run a training entry point and return its exit code.

    0: the run is complete (one that was complete already is left as it is). 2: the configuration is wrong; all its
    errors were printed before anything was loaded. 75: it was asked to stop and saved a checkpoint: start it again.
    124: a process hung; stacks of all are in ``run_dir/stacks``. 1: it failed.
    """
    config = parse_arguments(schema, argv)
    if is_complete(config):
        if os.environ.get("RANK", "0") == "0":
            print(f"{config.run_dir} is complete: {config.training.steps} updates, exported to {export_folder(config)}")
        return EXIT_OK

    from trainer.resilience.watchdog import enable_flight_recorder
    from trainer.runtime import distributed

    enable_flight_recorder(config.run_dir)
    world = distributed.initialize(config.deepspeed.timeout_seconds, config.training.threads)
    _configure_logging(world)
    try:
        check_world_size(config, world.size)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        with _locked(config.run_dir, world), _failures_noted(config.run_dir, world):
            _train_and_export(config, world, tools())
    except ConfigError as error:
        if world.is_main:
            print(error, file=sys.stderr)
        return EXIT_CONFIGURATION
    except _USER_ERRORS as error:
        _log.error("%s: %s", type(error).__name__, error, exc_info=_log.isEnabledFor(logging.DEBUG))
        return getattr(error, "exit_code", EXIT_FAILED)
    finally:
        distributed.shut_down()
    return EXIT_OK


@contextmanager
def _locked(run_dir: Path, world: World) -> Iterator[None]:
    """The run folder is this job's; all ranks fail together when it is another's."""
    from trainer.resilience.run_lock import RunLockedError, run_lock
    from trainer.runtime.distributed import raise_together

    with ExitStack() as stack:
        error: Exception | None = None
        if world.is_main:
            try:
                stack.enter_context(run_lock(run_dir))
            except (OSError, RunLockedError) as caught:
                error = caught
        raise_together(error, world)
        yield


@contextmanager
def _failures_noted(run_dir: Path, world: World) -> Iterator[None]:
    """A process that fails says so in events.jsonl, for whoever looks later and for ``trainer.supervise``."""
    from trainer.resilience.events import EventLog
    from trainer.resilience.preemption import PreemptedError

    try:
        yield
    except PreemptedError:
        raise
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        with suppress(OSError):  # of a full disk, that error itself is the one to be told
            EventLog(run_dir).write("failed", rank=world.rank, host=os.uname().nodename, error=message[:1000])
        raise


def leave(code: int) -> NoReturn:
    """End this process with an exit code, without tearing the interpreter down.

    Everything that a run writes is closed by now. What is left are threads of torch and DeepSpeed; one that asks for
    the interpreter's lock while the interpreter ends aborts the process, and a complete run would look like a failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _train_and_export(config: Config, world: World, tools: Tools[Config]) -> None:
    from trainer.loop import train
    from trainer.runtime.device_memory import exhaustion_explained
    from trainer.runtime.distributed import raise_together
    from trainer.runtime.files import write_atomically

    with exhaustion_explained():
        train(tools.build_task(config, world), config, world)
    error: Exception | None = None
    if world.is_main:
        try:
            tools.export(config, export_folder(config))
            write_atomically(config.run_dir / COMPLETE, _identity(config))
        except OSError as caught:
            error = caught
    raise_together(error, world)


def export_folder(config: RunConfig) -> Path:
    """Where a complete run leaves what it made."""
    return config.run_dir / "export"


def is_complete(config: RunConfig) -> bool:
    """Whether this very configuration was trained to its end and exported."""
    marker = config.run_dir / COMPLETE
    return marker.is_file() and marker.read_text(encoding="utf-8") == _identity(config)


def _identity(config: RunConfig) -> str:
    return sha256(config_to_yaml(config).encode()).hexdigest() + "\n"


def _configure_logging(world: World) -> None:
    level = logging.INFO if world.is_main else logging.WARNING
    logging.basicConfig(level=level, format=f"[rank {world.rank}] %(levelname)s %(name)s: %(message)s", force=True)
    quiet_libraries()


def quiet_libraries() -> None:
    """Let libraries log only what a user has to act on."""
    for noisy in ("DeepSpeed", "transformers", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # open_clip speaks through the root logger, and warns of random weights where they are wanted.
    logging.getLogger().addFilter(lambda record: record.name != "root" or record.levelno >= logging.ERROR)
