"""What came of it, as text, as Markdown and as one page that needs nothing beside itself."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from replays.measures import Outcome, duration, percentile
from replays.situations import Situation

RIVALS_TOLD = (
    ("gpujobd", "the core as it is"),
    ("FIFO", "the job that was submitted first runs to its end"),
    ("round robin", "one slice of each tenant in turn, whatever loading costs"),
    (
        "fair share",
        "whole jobs, of the tenant that has used least for its share, as Slurm does without preemption",
    ),
)
COLUMNS_TOLD = (
    (
        "wait",
        """From submission until the job computes: half of them (p50), and all but one in a hundred (p99). Who had not
        begun at the end has waited until then.""",
    ),
    (
        "Jain",
        """Jain's index of device time by share, in windows of ten minutes, of those tenants that had work all the time:
        1 is even, 1/n is one of n has all.""",
    ),
    ("swaps", "The part of the device's time that went into loading models."),
    ("utilisation", "The part of the time in which anybody had work that was spent computing."),
    (
        "forecast error",
        """By how much the end that was told at submission was missed, as a part of the time until then; the median.
        Jobs that came later are part of it. The others tell no end.""",
    ),
)

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 "DejaVu Sans", system-ui, sans-serif; color: #22272e; background: #fff; max-width: 68rem;
       margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.8rem; margin-bottom: .2rem; } h2 { font-size: 1.3rem; margin: 3rem 0 .4rem; }
p { max-width: 46rem; } .faint { color: #5b6470; } img { width: 100%; height: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .86rem; margin: 1rem 0; width: 100%; }
th { text-align: right; font-weight: 600; color: #5b6470; vertical-align: bottom; } th:first-child, td:first-child
{ text-align: left; } td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid #e3e7ec; } tr.ours td { font-weight: 600; background: #f2f7fb; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem 0; max-width: 46rem; color: #39424d; }
nav a { margin-right: 1.2rem; color: #0072B2; } code { background: #f2f4f6; padding: .1rem .3rem; }
"""


def head(situation: Situation) -> list[str]:
    waits = [f"wait of {name}, p50 / p99" for name in situation.groups.values()]
    return ["", *waits, "Jain", "swaps", "utilisation", "forecast error"]


def row(outcome: Outcome) -> list[str]:
    waits = [
        f"{duration(percentile(outcome.waits_s[name], 50))} / {duration(percentile(outcome.waits_s[name], 99))}"
        for name in outcome.situation.groups.values()
    ]
    error = "-" if outcome.forecast_error is None else f"{100 * outcome.forecast_error:.0f} %"
    return [
        outcome.policy,
        *waits,
        f"{outcome.jain:.2f}",
        f"{100 * outcome.overhead:.1f} %",
        f"{100 * outcome.utilisation:.1f} %",
        error,
    ]


def as_text(outcomes: list[Outcome]) -> str:
    situation = outcomes[0].situation
    rows = [head(situation), *map(row, outcomes)]
    widths = [max(len(cells[at]) for cells in rows) for at in range(len(rows[0]))]
    lines = [
        "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)) for cells in rows
    ]
    return "\n".join([situation.title, *lines])


def as_markdown(outcomes: list[Outcome]) -> str:
    situation = outcomes[0].situation
    rows = [head(situation), ["---"] * len(head(situation)), *map(row, outcomes)]
    return "\n".join(
        [f"**{situation.title}.** {situation.verdict}", "", *(f"| {' | '.join(cells)} |" for cells in rows)]
    )


def as_html(replayed: list[list[Outcome]], pictures: list[Path], command: str) -> str:
    situations = [outcomes[0].situation for outcomes in replayed]
    links = " ".join(f'<a href="#{s.name}">{html.escape(s.title)}</a>' for s in situations)
    parts = [_section(*pair) for pair in zip(replayed, pictures, strict=True)]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>gpujobd: who runs next, replayed</title><style>{STYLE}</style></head><body>
<h1>Who runs next, replayed</h1>
<p class="faint">The same arrivals on the same simulated device, under four ways to choose. Made by <code>{html.escape(command)}</code>.</p>
<nav>{links}</nav>
{_terms(RIVALS_TOLD)}
{"".join(parts)}
<h2>What the columns say</h2>
{_terms(COLUMNS_TOLD)}
</body></html>
"""


def _terms(terms: tuple[tuple[str, str], ...]) -> str:
    told = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in terms)
    return f"<dl>{told}</dl>"


def _section(outcomes: list[Outcome], picture: Path) -> str:
    situation = outcomes[0].situation
    encoded = base64.b64encode(picture.read_bytes()).decode()
    return f"""<section id="{situation.name}"><h2>{html.escape(situation.title)}</h2>
<p>{html.escape(situation.story)}</p>
<img alt="{html.escape(situation.title)}: who had the device, how long jobs waited, where its time went"
 src="data:image/png;base64,{encoded}">
{_table(outcomes)}
<p>{html.escape(situation.verdict)}</p></section>
"""


def _table(outcomes: list[Outcome]) -> str:
    heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in head(outcomes[0].situation))
    rows = []
    for outcome in outcomes:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row(outcome))
        rows.append(f"<tr{' class=ours' if outcome.policy == 'gpujobd' else ''}>{cells}</tr>")
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
