"""A bad setting ends in one line that names key, value and range, before any data is read; never in a traceback."""

import os
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import run_main
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from pisa_dist import runner
from pisa_dist.schema import to_config, validate
from pisa_dist.train import _one_line, config_directory, main, register_schemas

pytestmark = pytest.mark.timeout(300)

REFUSALS = (ValueError, HydraException, OmegaConfBaseException)
MULTILINE = string.whitespace.replace(" ", "")


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(config: object) -> None:
        raise AssertionError("data were read")

    monkeypatch.setattr(runner, "load_data", read)


@pytest.fixture
def hydra(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        yield


def refusal(*overrides: str, num_ranks: int = 1) -> str:
    """The line that a user would see; fails on any error that is not a refusal, and on acceptance."""
    try:
        validate(to_config(compose("config", overrides=list(overrides))), num_ranks=num_ranks)
    except REFUSALS as error:
        line = _one_line(error)
        assert line.strip()
        assert not set(line) & set(MULTILINE), line
        return line
    return pytest.fail(f"{' '.join(overrides)} was accepted")


# Command line -> what the message must hold: key, range, value.
BAD_SETTINGS: dict[str, tuple[str, ...]] = {
    # Out of range.
    "num_workers=0": ("`num_workers`", ">= 1", "0"),
    "num_workers=-3": ("`num_workers`", ">= 1", "-3"),
    "rounds=0": ("`rounds`", ">= 1", "0"),
    "batch_size=0": ("`batch_size`", ">= 1", "0"),
    "local_steps=0": ("`local_steps`", "[1, 1000000]", "0"),
    "algorithm=fedavg local_epochs=0": ("`local_epochs`", "> 0", "0.0"),
    "algorithm=fedavg local_epochs=two": ("local_epochs", "Float", "two"),
    "availability.mean_up=0 availability.mean_down=2": ("`availability.mean_up`", ">= 1", "0.0"),
    "availability.mean_up=2 availability.mean_down=0.5": ("`availability.mean_down`", ">= 1", "0.5"),
    "clock.speeds=[1,0]": ("`clock.speeds[1]`", "> 0", "0.0"),
    "clock.speeds=[fast]": ("clock.speeds", "Float", "fast"),
    "clock.speed_spread=0.5": ("`clock.speed_spread`", ">= 1", "0.5"),
    "clock.speed_spread=2 clock.period=-1": ("`clock.period`", "> 0", "-1.0"),
    "clock.perod=2": ("clock.perod", "did you mean clock.period?"),
    "+availability.up=2": ("`availability.up`", "not a known key", "mean_up"),
    "participation=0": ("`participation`", "(0, 1]", "0.0"),
    "participation=1.5": ("`participation`", "(0, 1]", "1.5"),
    "participation=-0.1": ("`participation`", "(0, 1]", "-0.1"),
    "seed=-1": ("`seed`", "[0, ", "-1"),
    "seed=4294967296": ("`seed`", "[0, ", "4294967296"),
    "eval_every=0": ("`eval_every`", ">= 1", "0"),
    "checkpoint.every=-1": ("`checkpoint.every`", ">= 0", "-1"),
    "data.num_train=0": ("`data.num_train`", ">= 1", "0"),
    "data.validation_fraction=1": ("`data.validation_fraction`", "[0, 1)", "1.0"),
    "data.validation_fraction=-0.1": ("`data.validation_fraction`", "[0, 1)", "-0.1"),
    "split=label_k split.labels_per_worker=0": ("`split.labels_per_worker`", ">= 1", "0"),
    "split=dirichlet split.dirichlet_concentration=0": ("`split.dirichlet_concentration`", "(0, 1000000]", "0.0"),
    "split=quantity split.dirichlet_concentration=-1": ("`split.dirichlet_concentration`", "(0, 1000000]", "-1.0"),
    "split=feature_noise split.noise_level=-1": ("`split.noise_level`", ">= 0", "-1.0"),
    "algorithm.penalty=-1.0": ("`algorithm.penalty` (sigma) must be > 0, got -1.0",),
    "algorithm.penalty=0": ("`algorithm.penalty` (sigma)", "> 0", "0.0"),
    "algorithm.preconditioner_scale=-1": ("`algorithm.preconditioner_scale` (rho)", ">= 0", "-1.0"),
    "algorithm.second_moment_decay=1": ("`algorithm.second_moment_decay` (beta)", "[0, 1)", "1.0"),
    "algorithm.eps=-1e-8": ("`algorithm.eps`", ">= 0", "-1e-08"),
    "algorithm.preconditioner_bound=0": ("`algorithm.preconditioner_bound` (eta)", "> 0", "0.0"),
    "algorithm.consensus_l2=-1": ("`algorithm.consensus_l2` (lambda)", ">= 0", "-1.0"),
    "algorithm.penalty_growth=0.9": ("`algorithm.penalty_growth` (1/gamma)", ">= 1", "0.9"),
    "algorithm.penalty_growth_interval=0": ("`algorithm.penalty_growth_interval`", ">= 1", "0"),
    "algorithm.lr=0": ("`algorithm.lr`", "> 0", "0.0"),
    "algorithm=nsisa algorithm.momentum=1": ("`algorithm.momentum` (mu)", "[0, 1)", "1.0"),
    "algorithm=nsisa algorithm.newton_schulz_steps=0": ("`algorithm.newton_schulz_steps`", ">= 1", "0"),
    "algorithm=nsisa algorithm.newton_schulz_coefficients=cubic": (
        "`algorithm.newton_schulz_coefficients`",
        "quintic, polar_express",
        "cubic",
    ),
    "algorithm=nsisa algorithm.newton_schulz_precision=half": (
        "`algorithm.newton_schulz_precision`",
        "auto, bfloat16, float32",
        "half",
    ),
    "algorithm=fedavg algorithm.lr=0": ("`algorithm.lr`", "> 0", "0.0"),
    "algorithm=fedavg algorithm.weight_decay=-1": ("`algorithm.weight_decay`", ">= 0", "-1.0"),
    "algorithm=synchronous algorithm.lr=-1": ("`algorithm.lr`", "> 0", "-1.0"),
    "model.hidden_sizes=[0]": ("model.hidden_sizes", ">= 1", "0"),
    "model.hidden_sizes=[16,-1]": ("model.hidden_sizes", ">= 1", "-1"),
    # Not a number, infinite.
    "participation=nan": ("`participation`", "(0, 1]", "nan"),
    "num_workers=nan": ("num_workers", "Integer", "nan"),
    "rounds=inf": ("rounds", "Integer", "inf"),
    "algorithm.penalty=nan": ("`algorithm.penalty` (sigma)", "> 0", "nan"),
    "algorithm.penalty=inf": ("`algorithm.penalty` (sigma)", "> 0", "inf"),
    "algorithm.penalty_growth=1e400": ("`algorithm.penalty_growth`", ">= 1", "inf"),
    "algorithm.lr=-inf": ("`algorithm.lr`", "> 0", "-inf"),
    "split=dirichlet split.dirichlet_concentration=inf": ("`split.dirichlet_concentration`", "(0, 1000000]", "inf"),
    "split=feature_noise split.noise_level=nan": ("`split.noise_level`", ">= 0", "nan"),
    # Of the wrong type.
    "num_workers=2.5": ("num_workers", "Integer", "2.5"),
    "num_workers=ten": ("num_workers", "Integer", "ten"),
    "num_workers=true": ("num_workers", "Integer", "True"),
    "num_workers=null": ("num_workers", "not Optional", "null"),
    "num_workers=[1,2]": ("num_workers", "Integer", "[1, 2]"),
    "num_workers={a:1}": ("num_workers", "Integer", "{'a': 1}"),
    "num_workers=": ("num_workers", "Integer", "''"),
    "seed=1.0": ("seed", "Integer", "1.0"),
    "data.num_train=1e3": ("data.num_train", "Integer", "1000.0"),
    "participation=half": ("participation", "Float", "half"),
    "algorithm.penalty=big": ("algorithm.penalty", "Float", "big"),
    "algorithm.penalty=true": ("algorithm.penalty", "Float", "True"),
    "model.hidden_sizes=3": ("model.hidden_sizes", "list", "int"),
    "model.hidden_sizes=[a]": ("model.hidden_sizes", "Integer", "a"),
    "checkpoint=3": ("checkpoint", "3"),
    "algorithm=nsisa algorithm.sisa_parameters=3": ("algorithm.sisa_parameters", "list", "int"),
    "run_dir=[1]": ("run_dir", "[1]"),
    # Not one of the choices.
    "worker_weight=mine": ("`worker_weight`", "samples, uniform", "'mine'"),
    "dtype=float16": ("`dtype`", "float32, float64, bfloat16", "'float16'"),
    "on_nonfinite=ignore": ("`on_nonfinite`", "raise, skip", "'ignore'"),
    "vectorize=maybe": ("`vectorize`", "auto, true, false", "'maybe'"),
    "algorithm.preconditioner=shampoo": ("`algorithm.preconditioner`", "adam, rmsprop, adagrad", "'shampoo'"),
    "algorithm.name=pisa": ("`algorithm.name`", "sisa", "'pisa'"),
    "data.name=mnist": ("data.name", "digits", "mnist"),
    "data.name=nonsense": ("data.name", "digits", "nonsense"),
    "split.name=nonsense": ("split.name", "iid", "nonsense"),
    "split=dirichlet split.name=iid": ("split.name", "dirichlet", "iid"),
    "tracking.name=comet": ("tracking", "none, wandb, tensorboard", "comet"),
    "tracking.name=wandb": ("tracking", "wandb"),
    "tracking=wandb tracking.mode=sometimes": ("`tracking.mode`", "online, offline", "'sometimes'"),
    "model=resnet20 model.norm=layer": ("model.norm", "group, batch", "'layer'"),
    "algorithm=synchronous algorithm.optimizer=AdamX": ("`algorithm.optimizer`", "torch.optim", "'AdamX'"),
    "algorithm=synchronous algorithm.optimizer=LBFGS": ("algorithm.optimizer", "LBFGS"),
    "algorithm=synchronous algorithm.optimizer=SparseAdam": ("algorithm.optimizer", "SparseAdam"),
    # Devices.
    "device=gpu": ("`device`", "auto, cpu, cuda or cuda:N", "'gpu'"),
    "device=meta": ("`device`", "auto, cpu, cuda or cuda:N", "'meta'"),
    "device=cpu:-1": ("`device`", "auto, cpu, cuda or cuda:N", "'cpu:-1'"),
    "device=cuda:99": ("`device`", "CUDA device", "'cuda:99'"),
    "device=''": ("`device`", "auto, cpu, cuda or cuda:N", "''"),
    # Unknown and misspelt keys.
    "+foo=3": ("`foo`", "not a known key", "num_workers"),
    "++foo=3": ("`foo`", "not a known key"),
    "foo=3": ("`foo`", "not a known key"),
    "+checkpoint.keep=2": ("`checkpoint.keep`", "not a known key", "keep_last"),
    "+data.foo=1": ("`data.foo`", "not a known key", "num_train"),
    "+data._target_=os.system": ("`data._target_`", "not a known key"),
    "+algorithm.momentum=0.5": ("`algorithm.momentum`", "not a known key", "penalty"),
    "split.labels_per_worker=1": ("`split.labels_per_worker`", "a key of split=label_k", "not chosen"),
    "hydra.foo=1": ("hydra.foo",),
    "+algorithm=pisa": ("algorithm", "Multiple values"),
    "num_train=3": ("`num_train`", "did you mean data.num_train?"),
    "+num_worker=3": ("`num_worker`", "did you mean num_workers?"),
    "+algorithm.penatly=1": ("`algorithm.penatly`", "did you mean algorithm.penalty?"),
    "+split.nane=iid": ("`split.nane`", "did you mean split.name?"),
    "num_worker=3": ("num_worker", "did you mean num_workers?"),
    "algorithm.penatly=1": ("algorithm.penatly", "did you mean algorithm.penalty?"),
    # Unknown options.
    "algorithm=adam": ("algorithm/adam", "fedavg", "sisa"),
    "data=imagenet": ("data/imagenet", "digits", "libsvm"),
    "split=random": ("split/random", "dirichlet", "label_k"),
    "model=transformer": ("model/transformer", "cnn", "resnet20"),
    "tracking=comet": ("tracking/comet", "tensorboard"),
    "experiment=nope": ("experiment/nope",),
    # Missing.
    "data=libsvm data.test_file=a": ("`data.train_file` must be given",),
    "data=libsvm data.train_file=a": ("`data.test_file` must be given",),
    "data=libsvm data.train_file=/no/such/a data.test_file=/no/b": ("`data.train_file`", "a file", "'/no/such/a'"),
    "data=custom": ("`data._target_` must be given",),
    "model=custom": ("`model._target_` must be given",),
    "algorithm.penalty=???": ("`algorithm.penalty` must be given",),
    "~algorithm": ("`algorithm` must be given",),
    "~split.name": ("split.name", "deletion"),
    "num_workers=${nope}": ("num_workers", "'nope' not found"),
    "num_workers=${oc.env:PISA_NO_SUCH_VARIABLE}": ("num_workers", "PISA_NO_SUCH_VARIABLE"),
    "algorithm.penalty=${algorithm.penalty}": ("algorithm.penalty", "Recursive"),
    # Models, data sets and optimizers that cannot be called.
    "model=custom model._target_=nowhere.Net": ("`model._target_` 'nowhere.Net'", "cannot be imported"),
    "model=custom model._target_=torch.nn.Nope": ("`model._target_` 'torch.nn.Nope'", "cannot be imported"),
    "model=custom model._target_=''": ("`model._target_` ''", "cannot be imported"),
    "model=custom model._target_=math.pi": ("`model._target_` 'math.pi'", "not a class or function"),
    "model=custom model._target_=torch.nn.Linear": ("`model.in_features` must be given",),
    "model=custom model._target_=torch.nn.Linear +model.in_feature=3": ("`model.in_feature`", "in_features"),
    "+model.width=3": ("`model.width`", "hidden_sizes"),
    "model=cnn +model.width=3": ("`model.width`", "num_classes"),
    "data=custom data._target_=nowhere.load": ("`data._target_`", "'nowhere.load'"),
    "data=custom data._target_=time.time data.keep_integers=true split=feature_noise": ("`data.keep_integers`", "true"),
    "data=custom data._target_=math.pi": ("`data._target_`", "'math.pi'"),
    "algorithm=synchronous +algorithm.optimizer_options.foo=1": ("`algorithm.optimizer_options.foo`", "AdamW"),
    "algorithm=synchronous +algorithm.optimizer_options.lr=1": ("`algorithm.optimizer_options.lr`", "AdamW"),
    "algorithm=synchronous +algorithm.optimizer_options.weight_decay=-1": ("algorithm.optimizer_options", "-1"),
    "algorithm=synchronous +algorithm.optimizer_options.betas=3": ("algorithm.optimizer_options", "AdamW"),
    "algorithm=synchronous +algorithm.optimizer_options.betas=[0.9]": ("algorithm.optimizer_options", "AdamW"),
    "algorithm=synchronous +algorithm.optimizer_options.betas.x=3": ("algorithm.optimizer_options", "AdamW"),
    "algorithm=synchronous +algorithm.optimizer_options={foreach:true,fused:true}": ("optimizer_options", "fused"),
    "algorithm=synchronous +algorithm.optimizer_options.differentiable=true": ("algorithm.optimizer_options",),
    # What several keys decide together.
    "participation=0.01": ("`participation`", "at least one of 10 workers", "0.01"),
    "participation=0.4 num_workers=1": ("`participation`", "at least one of 1 workers", "0.4"),
    "local_steps=2": ("`local_steps`", "sisa", "2"),
    "local_steps=2 algorithm=pisa": ("`local_steps`", "pisa", "2"),
    "local_steps=5 algorithm=nsisa": ("`local_steps`", "nsisa", "5"),
    "local_steps=2 algorithm=synchronous": ("`local_steps`", "synchronous", "2"),
    "local_epochs=1": ("`local_epochs` must be null for algorithm=sisa", "1.0"),
    "algorithm=fedavg local_epochs=0.5 local_steps=3": ("`local_steps` must be 1", "`local_epochs`", "3", "0.5"),
    "availability.mean_up=2": ("`availability.mean_down` must be given", "`availability.mean_up`"),
    "availability.mean_down=2": ("`availability.mean_up` must be given", "`availability.mean_down`"),
    "availability.file=/no/such.csv": ("`availability.file`", "'/no/such.csv'"),
    "availability.file=a.csv availability.mean_up=2": ("`availability.mean_up` must be null", "'a.csv'"),
    "availability.mean_up=1 availability.mean_down=1e9 rounds=50": (
        "`availability.mean_down`",
        "within 50 rounds",
        "1000000000.0",
        "none of 10 workers",
    ),
    "availability.mean_up=2 availability.mean_down=2 consensus=median": ("`consensus` must be sum", "availability"),
    "clock.speeds=[1,2]": ("`clock.speeds`", "each of 10 workers", "2"),
    "clock.speeds=[1] clock.speed_spread=2 num_workers=1": ("`clock.speed_spread` must be null", "`clock.speeds`"),
    "clock.period=2": ("`clock.period` needs the speeds", "2"),
    "clock.speed_spread=2 clock.period=1 consensus=trimmed": ("`consensus` must be sum", "clock.period"),
    "clock.speeds=[0.01] num_workers=1 clock.period=1 rounds=9": ("`clock.period`", "within 9 rounds", "worker 0"),
    "resume=auto": ("`resume`", "run_dir"),
    "resume=/no/such/run": ("`resume`", "'/no/such/run'"),
    # No setting at all.
    "num_workers": ("'num_workers'", "KEY=VALUE"),
    "num_workers=[": ("num_workers=[",),
}


def test_the_table_is_long_enough_to_mean_something() -> None:
    assert len(BAD_SETTINGS) >= 60


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize("command", BAD_SETTINGS)
def test_a_bad_setting_is_refused_in_one_line_that_says_what_is_wrong(command: str) -> None:
    line = refusal(*command.split(" "))
    assert not [part for part in BAD_SETTINGS[command] if part not in line], line


@pytest.mark.usefixtures("hydra")
def test_the_advice_in_a_refusal_is_not_refused_in_turn() -> None:
    assert "+num_worker" not in refusal("num_worker=3")


@pytest.mark.usefixtures("hydra")
def test_the_range_of_the_seed_is_written_to_the_last_digit() -> None:
    assert "4294967295" in refusal("seed=-1")


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize("resume", ["''", "{tmp_path}", "{tmp_path}/file"])
def test_resume_from_a_place_without_a_checkpoint_is_refused(resume: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "`resume`" in refusal(f"resume={resume.format(tmp_path=tmp_path)}")


@pytest.mark.usefixtures("hydra")
def test_more_ranks_than_workers_are_refused() -> None:
    line = refusal("num_workers=3", num_ranks=4)
    assert "`num_workers`" in line
    assert "3 workers on 4 ranks" in line


class Knob(NamedTuple):
    """A numeric key and what it may be, kept apart from the package's own table."""

    key: str
    good: tuple[float, float]
    integer: bool = False
    ends: tuple[bool, bool] = (True, True)
    with_: tuple[str, ...] = ()
    optional: bool = False


INF = float("inf")
ABOVE = (False, True)
KNOBS = (
    Knob("num_workers", (1, INF), integer=True),
    Knob("rounds", (1, INF), integer=True),
    Knob("batch_size", (1, INF), integer=True),
    Knob("local_steps", (1, INF), integer=True, with_=("algorithm=fedavg",)),
    Knob("local_epochs", (0, INF), ends=ABOVE, with_=("algorithm=fedavg",), optional=True),
    Knob("participation", (0, 1), ends=ABOVE),
    Knob("availability.mean_up", (1, INF), with_=("availability.mean_down=2",), optional=True),
    Knob("clock.speed_spread", (1, INF), optional=True),
    Knob("clock.period", (0, INF), ends=ABOVE, with_=("clock.speed_spread=1", "rounds=1000000000"), optional=True),
    Knob("seed", (0, 2**32 - 1), integer=True),
    Knob("eval_every", (1, INF), integer=True),
    Knob("checkpoint.every", (0, INF), integer=True),
    Knob("data.num_train", (1, INF), integer=True, optional=True),
    Knob("data.validation_fraction", (0, 1), ends=(True, False)),
    Knob("split.labels_per_worker", (1, INF), integer=True, with_=("split=label_k",)),
    Knob("split.dirichlet_concentration", (0, INF), ends=ABOVE, with_=("split=dirichlet",)),
    Knob("split.noise_level", (0, INF), with_=("split=feature_noise",)),
    Knob("algorithm.penalty", (0, INF), ends=ABOVE),
    Knob("algorithm.preconditioner_scale", (0, INF)),
    Knob("algorithm.second_moment_decay", (0, 1), ends=(True, False)),
    Knob("algorithm.eps", (0, INF)),
    Knob("algorithm.preconditioner_bound", (0, INF), ends=ABOVE, optional=True),
    Knob("algorithm.consensus_l2", (0, INF)),
    Knob("algorithm.penalty_growth", (1, INF)),
    Knob("algorithm.penalty_growth_interval", (1, INF), integer=True),
    Knob("algorithm.lr", (0, INF), ends=ABOVE),
    Knob("algorithm.momentum", (0, 1), ends=(True, False), with_=("algorithm=nsisa",)),
    Knob("algorithm.newton_schulz_steps", (1, INF), integer=True, with_=("algorithm=nsisa",)),
    Knob("algorithm.weight_decay", (0, INF), with_=("algorithm=fedavg",)),
    Knob("algorithm.lr", (0, INF), ends=ABOVE, with_=("algorithm=synchronous",)),
)
WORDS = st.text(string.ascii_letters, min_size=1, max_size=8).filter(
    lambda word: word.lower() not in ("null", "true", "false", "inf", "nan", "none")
)


@st.composite
def bad_values(draw: st.DrawFn, knob: Knob) -> str:
    """Text of a value that the knob must refuse: out of range, or of another type."""
    low, high = knob.good
    if knob.integer:
        outside = [st.integers(max_value=int(low) - 1)]
        outside += [st.integers(min_value=int(high) + 1)] if high < INF else []
        others = [st.floats(allow_nan=True, allow_infinity=True).map(repr)]
    else:
        outside = [st.floats(max_value=low, exclude_max=knob.ends[0], allow_nan=False)]
        outside += [st.floats(min_value=high, exclude_min=knob.ends[1], allow_nan=False)] if high < INF else []
        others = [st.sampled_from(["nan", "inf", "-inf"])]
    lists = st.lists(st.integers(), max_size=3).map(lambda items: "[" + ",".join(map(str, items)) + "]")
    others += [WORDS, st.sampled_from(["true", "false", "''", "{}", "{a:1}"]), lists]
    others += [] if knob.optional else [st.just("null")]
    return draw(st.one_of(*[numbers.map(repr) for numbers in outside], *others))


@st.composite
def bad_numbers(draw: st.DrawFn) -> tuple[list[str], str]:
    knob = draw(st.sampled_from(KNOBS))
    prefix = draw(st.sampled_from(["", "", "++"]))
    return [*knob.with_, f"{prefix}{knob.key}={draw(bad_values(knob))}"], knob.key


@st.composite
def unknown_keys(draw: st.DrawFn) -> tuple[list[str], str]:
    """A key that no schema has, at the top or in a group; an invented name never equals one of theirs."""
    group = draw(st.sampled_from(["", "data.", "split.", "model.", "algorithm.", "tracking.", "checkpoint."]))
    key = f"{group}zz{draw(st.text(string.ascii_lowercase + string.digits + '_', max_size=10))}"
    value = draw(st.one_of(st.integers().map(str), WORDS, st.sampled_from(["null", "[1,2]", "{a:{b:1}}", "1.5"])))
    return [f"{draw(st.sampled_from(['', '+', '++', '~']))}{key}={value}"], key


# Without letters and digits in it no text is a whole number, an interpolation or the name of a key.
SYMBOLS = "[](){}<>=:,;.@~+-*/\\|&%$#!?^'\"` \t"
garbage = st.text(SYMBOLS, max_size=12)

quick = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.usefixtures("hydra")
@quick
@given(bad_numbers())
def test_no_number_outside_its_range_and_no_other_type_gets_through(case: tuple[list[str], str]) -> None:
    overrides, key = case
    assert key in refusal(*overrides)


@pytest.mark.usefixtures("hydra")
@quick
@given(unknown_keys())
def test_no_unknown_key_gets_through(case: tuple[list[str], str]) -> None:
    overrides, key = case
    assert key in refusal(*overrides)


@pytest.mark.usefixtures("hydra")
@quick
@given(garbage)
@example("[")
@example("'")
@example("${")
def test_no_garbage_gets_through_as_a_value(text: str) -> None:
    assert "num_workers" in refusal(f"num_workers={text}")


@pytest.mark.usefixtures("hydra")
@quick
@given(garbage.filter(lambda text: text.strip()))
@example("=")
@example("~")
@example("@=")
def test_no_garbage_gets_through_as_an_override(text: str) -> None:
    assert refusal(text)


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: f"{knob.key} {' '.join(knob.with_)}".strip())
def test_the_ends_of_a_range_are_where_the_table_says(knob: Knob) -> None:
    low = knob.good[0] if knob.ends[0] else 1e-6
    low = max(low, 0.1) if knob.key == "participation" else low
    value = str(int(low)) if knob.integer else repr(float(low))
    validate(to_config(compose("config", overrides=[*knob.with_, f"{knob.key}={value}"])))


FROM_THE_COMMAND_LINE = {
    "num_workers=0": "`num_workers` must be an integer >= 1, got 0",
    "num_workers=ten": "num_workers",
    "data=null": "`data` must be one of digits, mnist",
    "algorithm.penalty=-1.0": "`algorithm.penalty` (sigma) must be > 0, got -1.0",
    "+algorithm.penatly=1": "did you mean algorithm.penalty?",
    "nonsense=3": "nonsense",
    "algorithm=adam": "algorithm/adam",
    "participation=0.01": "`participation` must select at least one of 10 workers",
    "local_steps=2": "`local_steps` must be 1 for algorithm=sisa",
    "device=gpu": "`device` must be auto, cpu, cuda or cuda:N, got 'gpu'",
    "resume=auto": "`resume`=auto needs `run_dir`",
    "model=custom": "`model._target_` must be given",
    "data=libsvm data.train_file=a data.test_file=b": "`data.train_file` must be a file, got 'a'",
    "seed=0,1": "seed=0,1",
    "split.name=nonsense": "split.name",
    "--config-name nope": "'nope'",
    "--multirun num_workers=0 seed=0": "`num_workers` must be an integer >= 1, got 0",
}


@pytest.mark.parametrize("command", FROM_THE_COMMAND_LINE)
def test_the_command_line_ends_with_status_2_and_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, *command.split(" ")) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("pisa-train: error: ")
    assert FROM_THE_COMMAND_LINE[command] in err


@pytest.mark.parametrize("run_dir", ["file", "file/below", "occupied"])
def test_a_run_directory_that_cannot_be_had_is_refused_before_data_are_read(
    run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    Path("occupied").mkdir()
    Path("occupied/metrics.jsonl").write_text('{"round": 1}\n')
    assert run_main(monkeypatch, "rounds=1", f"run_dir={run_dir}") == 2
    err = capfd.readouterr().err
    assert err.startswith("pisa-train: error: `run_dir`")
    assert err.count("\n") == 1
    assert f"'{run_dir}'" in err
    assert Path("file").read_text() == "in the way"
    assert Path("occupied/metrics.jsonl").read_text() == '{"round": 1}\n'


def test_a_bad_setting_leaves_no_files_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, "num_workers=0", "run_dir=new") == 2
    assert not list(tmp_path.iterdir())


def test_with_hydra_full_error_the_traceback_is_there_for_those_who_want_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pisa-train", "num_workers=0"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    GlobalHydra.instance().clear()
    with pytest.raises(ValueError, match="`num_workers` must be an integer >= 1, got 0"):
        main()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("rounds=-5", "`rounds` must be an integer >= 1, got -5"),
        ("+modle=cnn", "`modle` is not a known key; did you mean model?"),
        ("algorithm.lr=fast", "algorithm.lr"),
    ],
)
def test_a_real_process_ends_with_status_2_and_one_line(command: str, message: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    done = subprocess.run(
        [sys.executable, "-m", "pisa_dist.train", command],
        cwd=tmp_path,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("pisa-train: error: ")
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
