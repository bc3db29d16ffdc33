"""Command line: `python -m pisa_dist.train KEY=VALUE...`, alone, under torchrun or under srun. Also `pisa-train`."""

import os
import re
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path

import hydra
import torch.distributed as dist
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pisa_dist.consensus import ConsensusError
from pisa_dist.distributed import launched_ranks, process_group, select_device
from pisa_dist.guards import OutOfMemory, RankError
from pisa_dist.preemption import REQUEUE_STATUS, Preempted
from pisa_dist.runner import run
from pisa_dist.schema import SCHEMAS, Config, as_plain, explain_unknown, to_config, validate

# A file name holds 255 bytes; figures and checkpoints lie in folders of their own.
LONGEST_JOB_NAME = 200
# torchrun ends all ranks when one ends badly: rank 0 has this long to say why, longer while it may still be starting.
SECONDS_FOR_RANK_0, SECONDS_FOR_ITS_START = 2.0, 20.0

USER_ERRORS = (
    ValueError,
    OSError,
    FloatingPointError,
    ConsensusError,
    OutOfMemory,
    RankError,
    HydraException,
    OmegaConfBaseException,
    yaml.YAMLError,
)


def config_directory() -> Path:
    """The YAML files: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    packaged = package / "configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def register_schemas() -> None:
    """Put the structured configs where each group's YAML finds them: `<group>/<option>_schema`."""
    store = ConfigStore.instance()
    store.store(name="config_schema", node=Config)
    for group, options in SCHEMAS.items():
        for option, schema in options.items():
            store.store(group=group, name=f"{option}_schema", node=schema)


def compose_config(overrides: Sequence[str]) -> Config:
    """The checked configuration of `pisa-train OVERRIDES...`, in this process and without training.

    Args:
        overrides: KEY=VALUE as on the command line.

    Raises:
        ValueError: one line, as `pisa-train` would print it.
    """
    register_schemas()
    try:
        _refuse_empty_groups(overrides)
        with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
            config = to_config(hydra.compose("config", overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(_one_line(error)) from error
    validate(config)
    return config


def main() -> None:
    """Compose the configuration from `sys.argv`, check it and train; a sweep with `--multirun` does so job by job.

    Exits with 0, with 2 after a bad setting, bad input or a failed run (one line on stderr; with HYDRA_FULL_ERROR=1 in
    the environment, the traceback), with 75 after a stop by signal or time limit that left a checkpoint to go on from,
    or with 130 if interrupted.
    """
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR", "0") != "0"
    # Hydra would otherwise print its own many-line report and exit; with this its errors reach us.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # As `python -m` does: a `_target_` in a file of the working directory is found by the console script too.
    sys.path.insert(0, os.getcwd())
    register_schemas()
    status = 0

    def failed(error: Exception) -> None:
        nonlocal status
        if wants_traceback:
            raise error
        status = 2
        _complain(error)

    arguments, launcher = sys.argv[1:], os.getpid()

    # One process group for all jobs of a sweep: a rendezvous cannot be repeated under torchrun.
    with ExitStack() as stack:

        @hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="config")
        def job(composed: DictConfig) -> None:
            if os.getpid() != launcher:
                _train_elsewhere(composed, arguments)
                return
            try:
                _train(composed, stack, arguments)
            except Preempted as stopped:
                _wait_for_the_others()
                if launched_ranks()[0] == 0:
                    print(stopped, flush=True)
                raise SystemExit(REQUEUE_STATUS) from None
            except USER_ERRORS as error:
                failed(error)
                if isinstance(error, ConsensusError):
                    # An orderly end would wait for the ranks that are gone; this one closes its connections at once.
                    sys.stdout.flush()
                    os._exit(status)
                if not _is_alike(error) and launched_ranks()[1] > 1:
                    # The other ranks are in the middle of this job: going on to the next would cross collectives.
                    raise SystemExit(status) from error

        try:
            _refuse_empty_groups(arguments)
            job()
        except Preempted as stopped:
            print(stopped, flush=True)
            status = REQUEUE_STATUS
        except USER_ERRORS as error:
            failed(error)
        except KeyboardInterrupt:
            status = 130
        if status == 2:
            _wait_for_the_others()
    sys.exit(status)


def _wait_for_the_others() -> None:
    """torchrun ends all ranks when one ends with a status: rank 0 may still be writing or drawing."""
    if dist.is_initialized():
        with suppress(RuntimeError):  # one of them is gone
            dist.barrier()


def _train_elsewhere(composed: DictConfig, arguments: Sequence[str]) -> None:
    """A sweep's job in a process that its launcher, such as submitit's, has started: errors go home by pickle."""
    try:
        with ExitStack() as stack:
            _train(composed, stack, arguments)
    except USER_ERRORS as error:
        raise ValueError(_one_line(error)) from None


def _train(composed: DictConfig, stack: ExitStack, arguments: Sequence[str]) -> None:
    rank, num_ranks, local_rank = launched_ranks()
    config = to_config(composed)
    validate(config, num_ranks=num_ranks)
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN and config.run_dir is not None:
        config.run_dir = str(
            Path(config.run_dir) / _job_name(hydra_config.overrides.task, arguments, hydra_config.job.num)
        )
    device = select_device(config.device, local_rank=local_rank)
    stack.enter_context(process_group(device, timeout=timedelta(seconds=config.timeout_seconds)))
    path = run(config, as_plain(composed))
    if rank == 0:
        print(f"run directory: {path}", flush=True)


def _job_name(overrides: Sequence[str], arguments: Sequence[str], number: int) -> str:
    """Directory of a sweep's job: what the sweep varies, such as "seed=1,algorithm=sisa"; else the job's number."""
    varied = [override for override in overrides if override not in arguments]
    name = ",".join(varied).replace("/", "_")
    return name if 0 < len(name) <= LONGEST_JOB_NAME else str(number)


def _refuse_empty_groups(overrides: Sequence[str]) -> None:
    """Hydra refuses `data=null` without saying where."""
    for override in overrides:
        group, _, value = override.partition("=")
        if group in SCHEMAS and value in ("", "null", "~"):
            raise ValueError(f"`{group}` must be one of {', '.join(SCHEMAS[group])}, got {value or 'nothing'}")


def _is_alike(error: BaseException) -> bool:
    """Whether every rank has met this error: settings and refused steps are the same everywhere, files may not be."""
    return isinstance(error, HydraException | OmegaConfBaseException | ValueError | FloatingPointError)


def _complain(error: BaseException) -> None:
    """One line, whatever the error's own shape, written at once; by rank 0 alone where all ranks have met the error."""
    try:
        rank, num_ranks, _ = launched_ranks()
    except ValueError:  # which is then the error
        rank, num_ranks = 0, 1
    have_met = dist.is_initialized()
    if _is_alike(error) and rank > 0 and have_met:
        return
    if rank > 0 and (_is_alike(error) or isinstance(error, RankError)):
        # Most likely all have met it, and this one is ended while it waits; if not, it has something to say.
        time.sleep(SECONDS_FOR_RANK_0 if have_met else SECONDS_FOR_ITS_START)
    prefix = f"rank {rank}: " if num_ranks > 1 and (rank > 0 or not _is_alike(error)) else ""
    sys.stderr.write(f"pisa-train: error: {prefix}{_one_line(error)}\n")
    sys.stderr.flush()


def _one_line(error: BaseException) -> str:
    """The error and its cause on one line, without Hydra's search path and our schema names."""
    unknown = re.match(r"Could not override '([^']+)'", str(error))
    if unknown:
        return explain_unknown(unknown[1])
    cause = error.__cause__ or error.__context__
    texts = [str(error)]
    if isinstance(error, OverrideParseException):
        texts = [f"{error.override!r} is not KEY=VALUE in Hydra's grammar", str(error).splitlines()[0]]
    elif isinstance(error, HydraException) and cause is not None:
        texts.append((str(cause).strip().splitlines() or [""])[0])
    text = ": ".join(text for text in texts if text.strip()) or type(error).__name__
    text = text.split("Config search path:")[0].removeprefix("In 'config': ")
    return " ".join(word for word in text.split() if not word.endswith("_schema"))


if __name__ == "__main__":
    main()
