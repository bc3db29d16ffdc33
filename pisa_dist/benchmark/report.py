"""The report of a grid: table.md, figures/*.png, and index.html with tables and pictures in one file."""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pisa_dist.benchmark.methods import BEYOND, label
from pisa_dist.benchmark.plots import AXES, draw, file_name
from pisa_dist.benchmark.protocols import PROTOCOLS, TUNING_SEED, VALIDATION_FRACTION, Cell, Protocol
from pisa_dist.benchmark.results import Record
from pisa_dist.benchmark.summary import Estimate, Score, Scores, collect, equal_budget, groups, standings, tunings
from pisa_dist.benchmark.tables import Item, Table
from pisa_dist.figures import byte_unit

FULL_SHADE = 0.10  # regret, in accuracy, from which on an entry has no shade
DEFINITIONS = (
    "At least as good: cells in which the 95 % interval (Student's t) of the mean difference in last accuracy to the "
    "method's best rival, paired by seed, reaches 0 or lies above it. The rival is the method with the highest mean "
    "last accuracy in the cell, for members of PISA's family (PISA, SISA) the highest outside the family. With few "
    "seeds an interval is wide, so this column says that a method is not shown to be worse. "
    "Regret: points of mean last accuracy behind the best method of the cell, of any family. "
    "Failed scored runs count as accuracy 0 in both."
)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1c1c1c; background: #fff;
  max-width: 76rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }}
h1 {{ font-size: 1.6rem; margin: 0 0 .3rem; }}
h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .4rem; }}
p {{ max-width: 60rem; margin: .4rem 0; }}
.note {{ color: #555; font-size: .9em; }}
.frame {{ overflow-x: auto; margin: .6rem 0; }}
table {{ border-collapse: collapse; font-size: .87em; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .28rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e6e6e6; }}
th {{ vertical-align: bottom; border-bottom: 2px solid #999; font-weight: 600; white-space: normal; }}
th.text, td.text {{ text-align: left; }}
td.text {{ max-width: 34rem; white-space: normal; }}
td.text:first-child, th.text:first-child {{ position: sticky; left: 0; background: #fff; white-space: nowrap; }}
img {{ max-width: 100%; height: auto; display: block; margin: .6rem 0; }}
code, pre {{ font: .87em/1.45 ui-monospace, Menlo, Consolas, monospace; background: #f5f5f5; }}
pre {{ padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }}
details {{ margin: 1rem 0; }} summary {{ cursor: pointer; }}
</style></head><body>
{body}
</body></html>
"""


def write_report(folder: Path, records: Sequence[Record], grid: Mapping[str, Any]) -> Path:
    """Write table.md, figures/ and index.html from the results; returns the page.

    Args:
        folder: of the benchmark.
        records: its results, at least one.
        grid: what all of them have in common.

    Raises:
        OSError: a file cannot be written.
    """
    protocol = PROTOCOLS.get(str(grid.get("protocol")))
    scores = collect(records, protocol)
    tables = _tables(records, scores, protocol)
    facts = _facts(records, scores, grid, protocol)
    pictures = draw(scores) if scores else {}
    title = "Methods on workers whose data differ"
    text = [f"# {title}\n", *(f"{fact}\n" for fact in facts), *(table.markdown() for table in tables)]
    (folder / "table.md").write_text("\n".join(text))
    (folder / "figures").mkdir(exist_ok=True)
    for name, picture in pictures.items():
        (folder / "figures" / name).write_bytes(picture)
    page = folder / "index.html"
    page.write_text(_PAGE.format(title=title, body=_body(title, facts, tables, pictures, records)))
    return page


def _facts(records: Sequence[Record], scores: Scores, grid: Mapping[str, Any], protocol: Protocol | None) -> list[str]:
    failed = sum(record["status"] != "ok" for record in records)
    seeds = sorted({seed for methods in scores.values() for score in methods.values() for seed in score.records})
    commits = sorted({str(record.get("commit"))[:10] for record in records})
    hours = sum(record["seconds"] for record in records) / 3600
    facts = [
        f"Protocol {protocol.name}: {protocol.summary}." if protocol else f"Grid: {dict(grid)}.",
        f"{len(scores)} cell{'s' * (len(scores) != 1)}, scored seeds {', '.join(map(str, seeds))}. "
        "A method with several settings was tuned in "
        f"each cell on seed {TUNING_SEED}, with {VALIDATION_FRACTION:.0%} of its training samples held out; tuning "
        "does not see the test set. Every method that is tuned tries three settings and, while the best of them is at "
        f"an end, the next one beyond it, at most {BEYOND} more.",
        f"{len(records)} runs, {failed} failed, {hours:.1f} hours of one core; commit {', '.join(commits)}.",
    ]
    if grid.get("set"):
        facts.append(f"Changed in all runs: {' '.join(grid['set'])}.")
    return facts


def _tables(records: Sequence[Record], scores: Scores, protocol: Protocol | None) -> list[Table]:
    tables = [_summary_table(scores)] if scores else []
    for name, own in groups(scores).items():
        tables.append(_accuracy_table(own, f"{name}: test accuracy after the last round", "last_accuracy"))
        tables.append(_accuracy_table(own, f"{name}: test accuracy in the best evaluated round", "best_accuracy"))
        tables += [_equal_cost_table(own, name, cost) for cost in ("bytes_sent", "passes")]
    if protocol is not None:
        tables.append(_tuning_table(records, protocol))
    failed = Table("Runs that failed", ("run", "why"), num_text_columns=2)
    for record in records:
        if record["status"] != "ok":
            where = f"{record['dataset']} {record['split']} participation {record['participation']:g}"
            what = " ".join([record["method"], *record["setting"]])
            failed.add([f"{where}, {what}, {record['phase']} seed {record['seed']}", record["error"]])
    return [*tables, *([failed] if failed.rows else [])]


def _summary_table(scores: Scores) -> Table:
    header = ("method", "at least as good", "best", "largest regret", "in", "mean regret", "sent", "passes", "failed")
    table = Table("Over all cells", header, note=DEFINITIONS)
    for standing in standings(scores):
        cell = standing.worst_cell
        table.add(
            [
                label(standing.method),
                f"{standing.num_good} of {standing.num_cells}",
                str(standing.num_best),
                Item(f"{100 * standing.worst_regret:.1f}", _strength(standing.worst_regret)),
                f"{cell.dataset} {cell.split}, {cell.participation:g}" if standing.worst_regret > 0 else "",
                Item(f"{100 * standing.mean_regret:.1f}", _strength(standing.mean_regret)),
                _bytes(standing.bytes_sent),
                f"{standing.passes:.0f}" if math.isfinite(standing.passes) else "-",
                str(standing.num_failed),
            ]
        )
    return table


def _accuracy_table(scores: Scores, title: str, key: str) -> Table:
    """Methods in rows, the splits of one data set and participation in columns."""
    note = "Percent, mean over the seeds ± half the 95 % interval (Student's t); bold: the highest mean of the column. "
    note += (
        "Darker is closer to it."
        if key == "last_accuracy"
        else "Of the evaluated rounds; darker is closer to the best."
    )
    table = Table(title, ("method", *(cell.split for cell in scores)), note=note)
    return _filled(table, scores, lambda cell, score: score.estimate(key))


def _equal_cost_table(scores: Scores, name: str, cost: str) -> Table:
    """The same where every method of a cell has spent as much as the most frugal one in all its rounds."""
    budgets = {cell: equal_budget(methods, cost) for cell, methods in scores.items()}
    format_ = _bytes if cost == "bytes_sent" else "{:.0f}".format
    header = (f"{cell.split} ({format_(budgets[cell])})" for cell in scores)
    what, unit = ("bytes", "bytes sent") if cost == "bytes_sent" else ("passes", "passes over the training data")
    note = (
        f"Percent once so many {unit} are spent (in brackets), the most that every method of the cell came to; linear "
        "between evaluations. A method whose step falls over its rounds is then in the middle of them."
    )
    table = Table(f"{name}: test accuracy at equal {what}", ("method", *header), note=note)
    return _filled(table, scores, lambda cell, score: score.at(cost, budgets[cell]))


def _filled(table: Table, scores: Scores, measure: Callable[[Cell, Score], Estimate]) -> Table:
    found = {
        cell: {name: measure(cell, score) for name, score in methods.items() if score.ok}
        for cell, methods in scores.items()
    }
    best = {cell: max((own.mean for own in methods.values()), default=math.nan) for cell, methods in found.items()}
    for name in dict.fromkeys(name for methods in scores.values() for name in methods):
        row: list[Item | str] = [label(name)]
        for cell, methods in scores.items():
            if name not in methods:
                row.append("")
                continue
            own = found[cell].get(name)
            behind = best[cell] - (own.mean if own else -math.inf)
            row.append(Item(_accuracy(methods[name], own), _strength(behind), is_best=behind == 0))
        table.add(row)
    return table


def _tuning_table(records: Sequence[Record], protocol: Protocol) -> Table:
    note = "In how many cells tuning chose each setting, and in how many it was the first or last one that was tried."
    table = Table("Chosen settings", ("method", "setting: cells", "at an end"), note=note, num_text_columns=2)
    for tuning in tunings(records, protocol):
        chosen = ";  ".join(
            f"{' '.join(part.removeprefix('algorithm.') for part in setting) or 'as shipped'}: {count}"
            for setting, count in tuning.chosen.items()
        )
        table.add([label(tuning.method), chosen, f"{tuning.num_at_end} of {tuning.num_cells}"])
    return table


def _accuracy(score: Score, found: Estimate | None) -> str:
    if found is None:
        return f"failed ({score.num_failed})"
    interval = f" ± {100 * found.half_width:.1f}" if found.half_width is not None else ""
    return f"{100 * found.mean:.1f}{interval}" + (f" ({score.num_failed} failed)" if score.num_failed else "")


def _strength(regret: float) -> float:
    return 1.0 - regret / FULL_SHADE


def _bytes(count: float) -> str:
    if not math.isfinite(count):
        return "-"
    unit, name = byte_unit(count)
    return f"{count / unit:.3g} {name}"


def _body(
    title: str,
    facts: Sequence[str],
    tables: Sequence[Table],
    pictures: Mapping[str, bytes],
    records: Sequence[Record],
) -> str:
    def picture(name: str, text: str) -> str:
        data = base64.b64encode(pictures[name]).decode()
        return f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">\n'

    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(fact)}</p>" for fact in facts)]
    for table in tables:
        parts.append(table.html())
        if table.title == "Over all cells":
            parts.append(picture("regret.png", "Regret of every method in every cell"))
        name, _, kind = table.title.partition(": ")
        if kind.endswith("last round"):
            parts.append(picture(file_name(name), f"Test accuracy by round on {name}"))
        for axis, (what, _) in AXES.items():
            if kind.endswith(f"at equal {axis.removesuffix('_sent')}"):
                parts.append(picture(file_name(name, axis), f"Test accuracy on {name}: {what}"))
    example = " ".join(records[-1]["overrides"])
    parts.append(
        "<h2>Repeating a run</h2><p>Every line of <code>results.jsonl</code> holds the overrides of its run; this is "
        f"the last one:</p><pre>pisa-train {escape(example)}</pre>"
    )
    return "\n".join(parts)
