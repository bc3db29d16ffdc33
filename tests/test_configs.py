"""Every YAML file composes into a configuration that passes all checks, and files and schemas belong together."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from pisa_dist.checks import RANGES
from pisa_dist.schema import NESTED, SCHEMAS, Config, as_plain, target_arguments, to_config, validate
from pisa_dist.train import config_directory, register_schemas

pytestmark = pytest.mark.timeout(300)

CONFIGS = config_directory()
OPTIONS = sorted((file.parent.name, file.stem) for group in SCHEMAS for file in (CONFIGS / group).glob("*.yaml"))
EXPERIMENTS = sorted(file.stem for file in (CONFIGS / "experiment").glob("*.yaml"))

# What an option cannot do without; {files} is a folder with two svmlight files.
MANDATORY = {
    ("data", "libsvm"): ["data.train_file={files}/train.svm", "data.test_file={files}/test.svm"],
    ("data", "custom"): ["data._target_=pisa_dist.data.datasets.digits"],
    ("model", "custom"): ["model._target_=torch.nn.Linear", "+model.in_features=64", "+model.out_features=10"],
}


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "train.svm").write_text("-1 1:0.5\n+1 2:1.5\n")
    (tmp_path / "test.svm").write_text("+1 1:0.25\n")
    return tmp_path


def checked(*overrides: str) -> Config:
    config = to_config(compose("config", overrides=list(overrides)))
    validate(config)
    return config


def known_keys(schema: type) -> set[str]:
    return {field.name for field in fields(schema)}


def test_there_are_files_for_every_group() -> None:
    assert {group for group, _ in OPTIONS} == set(SCHEMAS)
    assert len(OPTIONS) >= 20


def test_the_defaults_compose_and_pass_all_checks() -> None:
    config = checked()
    assert (config.data.name, config.split.name, config.algorithm.name) == ("digits", "iid", "sisa")
    assert (config.local_steps, config.participation, config.resume) == (1, 1.0, None)


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids="/".join)
def test_every_option_composes_and_passes_all_checks(group: str, option: str, files: Path) -> None:
    mandatory = [text.format(files=files) for text in MANDATORY.get((group, option), [])]
    config = checked(f"{group}={option}", *mandatory)
    chosen = getattr(config, group)
    assert isinstance(chosen, SCHEMAS[group][option])
    if group != "model":
        assert chosen.name == option


@pytest.mark.parametrize(("group", "option"), MANDATORY, ids="/".join)
def test_an_option_without_what_it_needs_names_the_key(group: str, option: str) -> None:
    key = MANDATORY[group, option][-1].partition("=")[0].removeprefix("+")
    others = [text for text in MANDATORY[group, option][:-1] if "{files}" not in text]
    with pytest.raises(ValueError, match=f"`{key}` must be given"):
        checked(f"{group}={option}", *others)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_passes_all_checks_and_changes_something(experiment: str) -> None:
    composed = compose("config", overrides=[f"experiment={experiment}"])
    validate(to_config(composed))
    assert as_plain(composed) != as_plain(compose("config"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_command_line_wins_over_an_experiment(experiment: str) -> None:
    assert checked(f"experiment={experiment}", "seed=12345", "rounds=7").rounds == 7
    assert checked("seed=12345", f"experiment={experiment}").seed == 12345


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_lists_changed_values_only(experiment: str) -> None:
    text = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text()
    assert text.lstrip("\n").startswith("# @package _global_") or "\n# @package _global_" in text
    content: dict[str, Any] = yaml.safe_load(text)
    own = {key: value for key, value in content.items() if key not in ("defaults", *SCHEMAS, *NESTED, "hydra")}
    assert set(own) <= known_keys(Config)
    defaults = as_plain(compose("config"))
    assert not [key for key, value in own.items() if value == defaults[key]]


def test_every_file_in_a_group_has_a_schema_and_every_schema_a_file() -> None:
    assert set(OPTIONS) == {(group, option) for group, options in SCHEMAS.items() for option in options}


def test_every_folder_is_a_group_or_holds_experiments() -> None:
    assert {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()} - {"experiment"} == set(SCHEMAS)


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids="/".join)
def test_every_key_of_an_option_is_a_field_of_its_schema(group: str, option: str) -> None:
    content = yaml.safe_load((CONFIGS / group / f"{option}.yaml").read_text())
    assert content.pop("defaults") == [f"{option}_schema"]
    assert set(content) <= known_keys(SCHEMAS[group][option])


def test_every_key_of_the_root_is_a_field_and_every_field_stands_in_the_root() -> None:
    content = yaml.safe_load((CONFIGS / "config.yaml").read_text())
    groups = {next(iter(entry)).split()[-1] for entry in content["defaults"] if isinstance(entry, dict)}
    assert set(SCHEMAS) <= groups
    assert set(content) - {"defaults", "hydra"} | set(SCHEMAS) == known_keys(Config)


def test_defaults_in_the_root_are_those_of_the_schema() -> None:
    content = yaml.safe_load((CONFIGS / "config.yaml").read_text())
    schema = Config()
    for name in known_keys(Config) - set(SCHEMAS) - set(NESTED):
        assert content[name] == getattr(schema, name), name
    for name in NESTED:
        assert content[name] == vars(getattr(schema, name)), name


def test_a_target_is_called_with_the_keys_that_are_not_the_packages_own() -> None:
    config = checked(
        "data=custom",
        "data._target_=fractions.Fraction",
        "data.num_train=5",
        "+data.numerator=1",
        "model=custom",
        "model._target_=torch.nn.Linear",
        "+model.in_features=64",
        "+model.out_features=10",
    )
    assert target_arguments(config.data) == {"numerator": 1}
    assert target_arguments(config.model) == {"in_features": 64, "out_features": 10}


def test_the_configs_of_a_run_resolve_to_plain_yaml() -> None:
    plain = as_plain(compose("config", overrides=["split=label_k"]))
    assert yaml.safe_load(yaml.safe_dump(dict(plain))) == plain
    assert plain["split"] == {"name": "label_k", "labels_per_worker": 1}


SCHEMA_CLASSES = {Config, *NESTED.values(), *(schema for options in SCHEMAS.values() for schema in options.values())}


@pytest.mark.parametrize("schema", sorted(SCHEMA_CLASSES, key=lambda schema: schema.__name__))
def test_every_number_in_the_configuration_has_a_range(schema: type) -> None:
    kinds = get_type_hints(schema)
    numbers = {name for name in known_keys(schema) if kinds[name] in (int, float, int | None, float | None)}
    assert numbers <= set(RANGES)


@pytest.mark.parametrize(("given", "kept"), [("auto", "auto"), ("true", "true"), ("False", "false")])
def test_vectorize_takes_a_truth_value_or_auto(given: str, kept: str) -> None:
    assert checked(f"vectorize={given}").vectorize == kept


def test_vectorize_refuses_anything_else() -> None:
    with pytest.raises(ValueError, match="`vectorize` must be one of auto, true, false, got 'sometimes'"):
        checked("vectorize=sometimes")
