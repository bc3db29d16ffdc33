"""The cases: what is run, and which entries of results.json it makes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import settings
import torch
from measure import compare, ratios
from ranks import Skipped, hosts, run_ranks

from pisa_dist.admm.device import multiplies_bfloat16_fast

Entries = dict[str, dict[str, Any]]

BATCH = {"mlp": (64, 0), "cnn": (64, 0), "gpt": (8, 64)}  # samples a rank and step, context
STEPS = {"mlp": 40, "cnn": 40, "gpt": 4}  # calls in a block
PAIRS = [
    ("sisa", "adamw_foreach"),
    ("sisa+fused", "adamw_fused"),
    ("sisa+overlap+fused", "adamw_foreach"),
    ("sisa+overlap+fused", "adamw_fused"),
    ("nsisa+fused", "muon"),
    ("nsisa+overlap+fused", "muon"),
]
COMPRESSED_PAIRS = [
    ("sisa+overlap+fused+bf16", "adamw_fused"),
    ("sisa+overlap+fused+int8", "adamw_fused"),
    ("nsisa+overlap+fused+bf16", "muon"),
    ("nsisa+overlap+fused+int8", "muon"),
]
OPTIMIZER_PAIRS = [("sisa+fused", "adamw_fused"), ("sisa", "adamw_foreach"), ("nsisa", "muon")]
# Bytes of float32 that an update must move: AdamW and SISA read weights, gradients and two states and write all but
# the gradients. Muon and NSISA have one state less or as many, but their time goes into matrix products.
LEAST_BYTES = 28
LINK = "100mbit"


@dataclass(frozen=True)
class Options:
    """How long to measure."""

    quick: bool = False
    seeds: int = 3

    @property
    def blocks(self) -> int:
        return 5 if self.quick else 11

    @property
    def seed_range(self) -> range:
        return range(1 if self.quick else self.seeds)


@dataclass(frozen=True)
class Case:
    """One run of ranks; its entries are called after it."""

    name: str
    run: Callable[[Options], Entries]


def step_time(
    model: str, ours: str, baseline: str, options: Options, *, device: str = "cpu", num_ranks: int = 2
) -> dict[str, Any]:
    batch_size, context = BATCH[model]
    found = run_ranks(
        "step_time",
        {
            "model": model,
            "methods": [ours, baseline],
            "batch_size": batch_size if device == "cpu" else 8 * batch_size,
            "context": context,
            "blocks": options.blocks,
            "steps": max(2, STEPS[model] // (2 if options.quick else 1)),
            "device": device,
        },
        num_ranks=num_ranks,
    )
    entry = compare(found["times"], ours, baseline)
    parts = {name: compare(found["times"], name, baseline)["ours"] for name in found["times"]}
    entry["forward_and_backward"] = parts["compute"]
    entry["all_reduce"] = parts.get("all_reduce")
    entry["added"] = {"ours": entry["ours"] - parts["compute"], "baseline": entry["baseline"] - parts["compute"]}
    return {**entry, "parameters": found["parameters"], "ranks": num_ranks, "device": device}


def optimizer_only(ours: str, baseline: str, options: Options, *, device: str = "cpu") -> dict[str, Any]:
    spec = {"model": "gpt", "methods": [ours, baseline], "blocks": options.blocks, "steps": 5, "device": device}
    found = run_ranks("optimizer_only", spec, num_ranks=1)
    entry, parameters = compare(found["times"], ours, baseline), found["parameters"]
    bandwidth = 12 * 2 * parameters / compare(found["times"], "memory", baseline)["ours"]
    bytes_touched = {
        side: sum(found["touched"][name].values()) / parameters
        for side, name in (("ours", ours), ("baseline", baseline))
    }
    return {
        **entry,
        "nanoseconds_per_parameter": {side: 1e9 * entry[side] / parameters for side in ("ours", "baseline")},
        "bytes_touched_per_parameter": bytes_touched,
        "bandwidth_bytes_per_second": bandwidth,
        "bandwidth_bound": {
            "bytes_per_parameter": LEAST_BYTES,
            "seconds": LEAST_BYTES * parameters / bandwidth,
            "ours_over_bound": entry["ours"] * bandwidth / (LEAST_BYTES * parameters),
            "baseline_over_bound": entry["baseline"] * bandwidth / (LEAST_BYTES * parameters),
        },
        "parameters": parameters,
        "device": device,
    }


def memory(ours: str, baseline: str, num_ranks: int, options: Options, *, device: str = "cpu") -> Entries:
    # One sequence: activations must not hide what optimizers take.
    spec = {"model": "gpt", "methods": [ours, baseline], "batch_size": 1, "context": 16, "device": device}
    found = run_ranks("memory", spec, num_ranks=num_ranks)
    entries = {}
    for kind, description in {
        "state": "optimizer state",
        "state_and_step": "optimizer state, and the peak above it during step()",
        "training": "everything allocated from the optimizer's construction on, at its peak over three steps",
    }.items():
        for side in found.values():
            side["state_and_step"] = side["state"] + side["step"]
        entry = ratios([found[ours][kind]], [found[baseline][kind]], unit="bytes")
        entries[kind] = {**entry, "what": description, "ranks": num_ranks, "device": device}
    return entries


def wire(options: Options) -> Entries:
    methods = ["sisa", "sisa+bf16", "sisa+int8", "sisa+overlap", "sisa+overlap+int8", "nsisa", "nsisa+int8"]
    spec = {"model": "gpt", "methods": ["adamw_fused", *methods], "batch_size": 1, "context": 16, "steps": 5}
    try:
        with hosts(None) as two:
            found = run_ranks("wire", spec, on=two)
    except Skipped:
        found = run_ranks("wire", spec)
    baseline = found["methods"].pop("adamw_fused")
    entries = {}
    for name, sent in found["methods"].items():
        entry = ratios([sent["messages"]], [baseline["messages"]], unit="bytes a rank and step, before the collective")
        interface = {"ours": sent["interface"], "baseline": baseline["interface"]}
        entries[name] = {**entry, "interface_bytes": interface, "parameters": found["parameters"]}
    return entries


def compressed_loss(model: str, method: str, options: Options) -> Entries:
    """Loss at the end of the same training with messages in float32, bf16 and int8."""
    training = settings.TRAINING[model] | ({"steps": 20} if options.quick else {})
    chosen = settings.TUNED[model]
    names = [method, f"{method}+bf16", f"{method}+int8"]
    if method == "sisa":
        names.append("adamw_fused")
    elif multiplies_bfloat16_fast("cpu"):  # as torch's Muon does, 8 to 16 times slower elsewhere
        names.append("muon")
    methods = [{"name": name, "settings": chosen[name.split("+")[0]]} for name in names]
    runs = [run_ranks("train", {**training, "model": model, "methods": methods, "seed": s}) for s in options.seed_range]
    entries = {}
    for place, name in enumerate(names[1:], start=1):
        for kind in ("training", "validation"):
            losses = [[_last_loss(run["methods"][which], kind) for run in runs] for which in (place, 0)]
            entry = ratios(*losses, unit=f"{kind} loss at the end; baseline: {method} with float32 messages")
            entries[f"{name}/{kind}"] = {**entry, "training": training, "settings": methods[place]["settings"]}
    return entries


def _last_loss(run: dict[str, Any], kind: str) -> float:
    return run["smoothed"][-1] if kind == "training" else run["validation"]


def link(ours: Sequence[str], baseline: str, options: Options) -> Entries:
    """Wall time until the training loss comes down to the target, on a slow link, for several methods of ours."""
    training = settings.TRAINING["gpt"] | {"target": settings.LINK_TARGET}
    if options.quick:
        training |= {"steps": 60, "target": 3.5}
    names = (*ours, baseline)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with hosts(LINK) as two:
        for seed in options.seed_range:
            order = names if seed % 2 == 0 else names[::-1]
            methods = [{"name": name, "settings": settings.TUNED["gpt"][name.split("+")[0]]} for name in order]
            found = run_ranks("train", {**training, "model": "gpt", "methods": methods, "seed": seed}, on=two)
            for run in found["methods"]:
                if run["smoothed"][-1] > training["target"]:
                    raise Skipped(f"{run['name']} did not reach loss {training['target']} in {training['steps']} steps")
                runs[run["name"]].append(
                    {
                        "method": run["name"],
                        "seed": seed,
                        "steps": len(run["losses"]),
                        "seconds": run["seconds"][-1],
                        "seconds_per_step": run["seconds"][-1] / len(run["losses"]),
                        "link_mbit_per_second": found["link_mbit_per_second"],
                    }
                )
    entries = {}
    for name in ours:
        times = [[run["seconds"] for run in runs[which]] for which in (name, baseline)]
        entry = ratios(*times, unit=f"s to a training loss of {training['target']}")
        detail = {"link": LINK, "sooner": 1 / entry["ratio"], "detail": runs[name] + runs[baseline]}
        entries[name] = {**entry, **detail, "training": training}
    return entries


def link_step(ours: str, baseline: str, options: Options) -> dict[str, Any]:
    """One step on a slow link."""
    batch_size, context = BATCH["gpt"]
    spec = {"model": "gpt", "methods": [ours, baseline], "batch_size": batch_size, "context": context}
    with hosts(LINK) as two:
        found = run_ranks("step_time", {**spec, "blocks": 5, "steps": 2}, on=two)
    return {**compare(found["times"], ours, baseline), "link": LINK, "parameters": found["parameters"]}


def _only(function: Callable[..., dict[str, Any]], *arguments: Any, **keywords: Any) -> Callable[[Options], Entries]:
    """A case with one entry, which has the case's own name."""
    return lambda options: {"": function(*arguments, options, **keywords)}


def cases() -> Iterator[Case]:
    for model in BATCH:
        for ours, baseline in PAIRS + (COMPRESSED_PAIRS if model == "gpt" else []):
            yield Case(f"step/{model}/{ours}:{baseline}", _only(step_time, model, ours, baseline))
    for model in BATCH:
        pair = ("sisa+overlap+fused", "sisa+reducer+fused")
        yield Case(f"hooks/{model}", _only(step_time, model, *pair))
    for ours, baseline in OPTIMIZER_PAIRS:
        yield Case(f"optimizer/{ours}:{baseline}", _only(optimizer_only, ours, baseline))
    for ours, baseline in [("sisa", "adamw_fused"), ("nsisa", "adamw_fused"), ("nsisa", "muon")]:
        yield Case(f"memory/1_rank/{ours}:{baseline}", partial(memory, ours, baseline, 1))
        for variant in (ours, f"{ours}+overlap", f"{ours}+overlap+int8"):
            yield Case(f"memory/2_ranks/{variant}:{baseline}", partial(memory, variant, baseline, 2))
    yield Case("wire", wire)
    for model in ("gpt", "cnn"):
        for method in ("sisa", "nsisa"):
            yield Case(f"loss/{model}/{method}", partial(compressed_loss, model, method))
    for ours, baseline in [("sisa", "adamw_fused"), ("nsisa", "adamw_fused"), ("nsisa", "muon")]:
        for variant in (ours, f"{ours}+overlap+int8"):
            yield Case(f"link_step/{variant}:{baseline}", _only(link_step, variant, baseline))
    for methods, baseline in [(("nsisa", "sisa"), "adamw_fused"), (("nsisa",), "muon")]:
        yield Case(f"link/{baseline}", partial(link, [f"{ours}+overlap+int8" for ours in methods], baseline))
    if torch.cuda.is_available():
        yield from gpu_cases(torch.cuda.device_count())


def gpu_cases(num_devices: int) -> Iterator[Case]:
    for ours, baseline in OPTIMIZER_PAIRS:
        yield Case(f"gpu/optimizer/{ours}:{baseline}", _only(optimizer_only, ours, baseline, device="cuda"))
        yield Case(f"gpu/memory/{ours}:{baseline}", partial(memory, ours, baseline, 1, device="cuda"))
    for model in BATCH:
        for ours, baseline in PAIRS:
            run = _only(step_time, model, ours, baseline, device="cuda", num_ranks=num_devices)
            yield Case(f"gpu/step/{model}/{ours}:{baseline}", run)
