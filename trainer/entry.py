"""Run a training entry point: read the settings, join the processes, train, export, turn errors into exit codes.

Nothing heavy is imported before the configuration is known to be good, so its errors come at once.
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

from trainer.checkpoint.catalog import latest_step
from trainer.config.command_line import parse_arguments
from trainer.config.loader import check_world_size, config_to_yaml
from trainer.config.run_config import RunConfig
from trainer.errors import ConfigError, TrainerError
from trainer.runtime.console import lasting_console
from trainer.runtime.run_folder import RunFolder
from trainer.runtime.stop_signals import EXIT_STOPPED, StoppedError, handling, stop_at_once, write_to_terminal

if TYPE_CHECKING:
    from trainer.loop import Task
    from trainer.observers.step_observer import StepObserver
    from trainer.runtime.distributed import World

Config = TypeVar("Config", bound=RunConfig)

EXIT_OK, EXIT_FAILED, EXIT_CONFIGURATION = 0, 1, 2
# The messages of these errors say all that a user needs; any other error is a defect and keeps its traceback.
_USER_ERRORS = (TrainerError, ValueError, OSError)

_log = logging.getLogger("trainer")


@dataclass(frozen=True)
class Recipe(Generic[Config]):
    """Say what one of the trainers does.

    Attributes:
        build_task: Builds what is trained; every rank calls it.
        export: Writes the export folder from the last checkpoint; rank 0 calls it.
        observers: Builds the observers of the steps beside the run's own, before the model is built; every rank calls
            it.
    """

    build_task: Callable[[Config, World], Task]
    export: Callable[[Config, Path], None]
    observers: Callable[[Config, World], Sequence[StepObserver]] = lambda config, world: ()


def run_training(schema: type[Config], argv: Sequence[str] | None, recipe: Callable[[], Recipe[Config]]) -> int:
    """Run a training entry point and return its exit code.

    Args:
        schema: Dataclass of the settings.
        argv: Command line; None takes the process's own.
        recipe: Imports and returns the recipe, once the configuration is known to be good.

    Returns:
        0 when the run is complete; a run that was complete before is left as it is. 1 when it failed. 2 when the
        configuration is wrong. 75 when it was asked to stop and saved a checkpoint, or had nothing to save yet. 124
        when a process hung.
    """
    with lasting_console(), handling(stop_at_once):
        try:
            return _run(schema, argv, recipe)
        except StoppedError as stopped:
            if _is_first_process():
                write_to_terminal(f"{stopped}; start the same command again")
            exit_now(EXIT_STOPPED)


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _run(schema: type[Config], argv: Sequence[str] | None, recipe: Callable[[], Recipe[Config]]) -> int:
    config = parse_arguments(schema, argv)
    folder = RunFolder(config.run_dir)
    if is_complete(config):
        if _is_first_process():
            steps = latest_step(folder.checkpoints) or config.training.steps  # fewer where it ended early
            print(f"{config.run_dir} is complete: {steps} steps, exported to {folder.export}")
        return EXIT_OK

    from trainer.resilience.events import event_time
    from trainer.resilience.restarts import cause_on_another_rank
    from trainer.resilience.watchdog import enable_flight_recorder
    from trainer.runtime import distributed

    started = event_time()
    enable_flight_recorder(folder)
    try:
        world = distributed.initialize(config.deepspeed.timeout_seconds, config.training.threads)
    except TrainerError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    _configure_logging(world)
    try:
        check_world_size(config, world.size)
        with distributed.failing_together(world):
            config.run_dir.mkdir(parents=True, exist_ok=True)
        with _locked(config, folder, world), _failures_recorded(folder, world):
            _train_and_export(config, world, recipe())
    except ConfigError as error:
        if world.is_main:
            print(error, file=sys.stderr)
        return EXIT_CONFIGURATION
    except _USER_ERRORS as error:
        _log.error("%s: %s", type(error).__name__, error, exc_info=_log.isEnabledFor(logging.DEBUG))
        return getattr(error, "exit_code", EXIT_FAILED)
    except RuntimeError as error:  # of a collective whose peer has left
        cause = cause_on_another_rank(folder, error, world.rank, started)
        if cause is None:
            raise
        _log.error("%s", cause)
        return EXIT_FAILED
    finally:
        distributed.shut_down()
    return EXIT_OK


@contextmanager
def _locked(config: RunConfig, folder: RunFolder, world: World) -> Iterator[None]:
    """Hold the locks of the run folder and of folders for offloaded tensors; all ranks fail together."""
    from trainer.resilience.run_lock import run_lock
    from trainer.resilience.swap_folders import swap_folders
    from trainer.runtime.distributed import failing_together

    with ExitStack() as stack:
        with failing_together(world):
            if world.is_main:
                stack.enter_context(run_lock(folder))
            stack.enter_context(swap_folders(config.deepspeed, world.rank))
        yield


@contextmanager
def _failures_recorded(folder: RunFolder, world: World) -> Iterator[None]:
    """Write an error of this process to events.jsonl, for people and for ``trainer.supervise``."""
    from trainer.resilience.events import EventLog
    from trainer.resilience.preemption import PreemptedError

    try:
        yield
    except PreemptedError:
        raise
    except Exception as error:
        message = f"{type(error).__name__}: {error}"[:1000]
        EventLog(folder).write("failed", rank=world.rank, host=os.uname().nodename, error=message)
        raise


def exit_now(code: int) -> NoReturn:
    """End this process with an exit code, without tearing the interpreter down.

    Everything that a run writes is closed by now. Threads of torch and DeepSpeed remain. One of them that asks for the
    interpreter's lock while the interpreter ends would abort the process, and a complete run would look like a failure.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a console that is gone does not change the exit code
            stream.flush()
    os._exit(code)


def _train_and_export(config: Config, world: World, recipe: Recipe[Config]) -> None:
    from trainer.loop import train
    from trainer.runtime.device_memory import explain_out_of_memory
    from trainer.runtime.distributed import failing_together
    from trainer.runtime.files import write_atomically

    with explain_out_of_memory():
        observers = recipe.observers(config, world)
        train(recipe.build_task(config, world), config, world, observers)
    folder = RunFolder(config.run_dir)
    with failing_together(world):
        if world.is_main:
            recipe.export(config, folder.export)
            write_atomically(folder.complete, _identity(config))


def is_complete(config: RunConfig) -> bool:
    """Return whether this very configuration was trained to its end and exported."""
    marker = RunFolder(config.run_dir).complete
    return marker.is_file() and marker.read_text(encoding="utf-8") == _identity(config)


def _identity(config: RunConfig) -> str:
    return sha256(config_to_yaml(config).encode()).hexdigest() + "\n"


def _configure_logging(world: World) -> None:
    level = logging.INFO if world.is_main else logging.WARNING
    logging.basicConfig(level=level, format=f"[rank {world.rank}] %(levelname)s %(name)s: %(message)s", force=True)
    quiet_libraries()


def quiet_libraries() -> None:
    """Let libraries log only what a user has to act on."""
    for name in ("DeepSpeed", "transformers", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # open_clip logs through the root logger, and warns of random weights where they are wanted.
    logging.getLogger().addFilter(lambda record: record.name != "root" or record.levelno >= logging.ERROR)
