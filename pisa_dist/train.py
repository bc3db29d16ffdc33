"""Command line: `python -m pisa_dist.train KEY=VALUE...`, alone, under torchrun or under srun. Also `pisa-train`."""

import os
import sys
from contextlib import ExitStack
from pathlib import Path

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pisa_dist.consensus import ConsensusError
from pisa_dist.distributed import launched_ranks, process_group, select_device
from pisa_dist.runner import run
from pisa_dist.schema import SCHEMAS, Config, as_plain, to_config, validate

USER_ERRORS = (
    ValueError,
    OSError,
    FloatingPointError,
    ConsensusError,
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


def main() -> None:
    """Compose the configuration from `sys.argv`, check it and train; a sweep with `--multirun` does so job by job.

    Exits with 0, with 2 after a bad setting, bad input or a failed run (one line on stderr; with HYDRA_FULL_ERROR=1 in
    the environment, the traceback), or with 130 if interrupted.
    """
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR", "0") != "0"
    # Hydra would otherwise print its own many-line report and exit; with this its errors reach us.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    register_schemas()
    status = 0
    # One process group for all jobs of a sweep: a rendezvous cannot be repeated under torchrun.
    with ExitStack() as stack:

        @hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="config")
        def job(composed: DictConfig) -> None:
            nonlocal status
            try:
                _train(composed, stack)
            except USER_ERRORS as error:
                if wants_traceback:
                    raise
                _complain(error)
                status = 2

        try:
            job()
        except USER_ERRORS as error:
            if wants_traceback:
                raise
            _complain(error)
            status = 2
        except KeyboardInterrupt:
            status = 130
    sys.exit(status)


def _train(composed: DictConfig, stack: ExitStack) -> None:
    _, num_ranks, local_rank = launched_ranks()
    config = to_config(composed)
    validate(config, num_ranks=num_ranks)
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN and config.run_dir is not None:
        config.run_dir = str(Path(config.run_dir) / (hydra_config.job.override_dirname or str(hydra_config.job.num)))
    stack.enter_context(process_group(select_device(config.device, local_rank=local_rank)))
    path = run(config, as_plain(composed))
    if launched_ranks()[0] == 0:
        print(f"run directory: {path}", flush=True)


def _complain(error: BaseException) -> None:
    """One line, whatever the error's own shape; bad settings are alike on all ranks and printed once."""
    rank, num_ranks, _ = launched_ranks()
    is_alike = isinstance(error, HydraException | OmegaConfBaseException | ValueError)
    if is_alike and rank > 0:
        return
    message = _one_line(error)
    prefix = f"rank {rank}: " if num_ranks > 1 and not is_alike else ""
    print(f"pisa-train: error: {prefix}{message}", file=sys.stderr, flush=True)


def _one_line(error: BaseException) -> str:
    """The error and its cause on one line, without Hydra's search path and our schema names."""
    cause = error.__cause__ or error.__context__
    texts = [str(error)]
    if isinstance(error, HydraException) and cause is not None:
        texts.append((str(cause).strip().splitlines() or [""])[0])
    text = ": ".join(text for text in texts if text.strip()) or type(error).__name__
    text = text.split("Config search path:")[0].removeprefix("In 'config': ")
    return " ".join(word for word in text.split() if not word.endswith("_schema"))


if __name__ == "__main__":
    main()
