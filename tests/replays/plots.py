"""Pictures of a situation: who had the device, how long they waited, and where its time went.

The one place that needs matplotlib (`pip install 'gpujobd[bench]'`). Colours are Okabe and Ito's, told apart by the
colour-blind; policies have a fixed one each, groups of tenants are told by name beside their colour.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no screen is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from replays.measures import Outcome, duration, group_of, percentile
from replays.situations import HOUR_S, Situation

INK, FAINT, GRID = "#22272e", "#5b6470", "#e3e7ec"
GROUPS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
TEAMS = ("#0072B2", "#E69F00", "#009E73")
LOADING, IDLE = "#22272e", "#eef1f4"
POLICIES = {"gpujobd": "#0072B2", "FIFO": "#E69F00", "round robin": "#009E73", "fair share": "#CC79A7"}
ON = {
    "#0072B2": "white",
    "#009E73": "white",
    "#E69F00": INK,
    "#CC79A7": INK,
}  # text that can be read on these
TICKS_S = (1, 10, 60, 600, HOUR_S, 10 * HOUR_S, 100 * HOUR_S)
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": FAINT,
    "ytick.color": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def draw(outcomes: list[Outcome], path: Path) -> None:
    situation = outcomes[0].situation
    groups = len(situation.groups)
    with mpl.rc_context(STYLE):
        figure = plt.figure(figsize=(11, 5.0 + 0.75 * groups), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08, hspace=0.04)  # type: ignore[union-attr]
        above, below = figure.subfigures(2, 1, height_ratios=[2.1, 1.3 + 0.75 * groups])
        _ribbons(above.subplots(), outcomes)
        waits, time = below.subplots(1, 2, width_ratios=[3, 2])
        _waits(waits, outcomes)
        _time(time, outcomes)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)


# --- who had the device ----------------------------------------------------------------------------------------------


def _colour(situation: Situation, tenant: str) -> str:
    if len(situation.groups) == 1:  # then single tenants are told apart
        return TEAMS[int(tenant[-1])]
    return GROUPS[list(situation.groups.values()).index(group_of(situation, tenant))]


def _names(situation: Situation) -> dict[str, str]:
    if len(situation.groups) == 1:
        return {f"team {number + 1}": colour for number, colour in enumerate(TEAMS)}
    return dict(zip(situation.groups.values(), GROUPS, strict=False))


def _ribbons(axes: Axes, outcomes: list[Outcome]) -> None:
    situation = outcomes[0].situation
    until_s = situation.drawn_hours * HOUR_S
    unit_s, unit = (HOUR_S, "hours") if until_s > 2 * HOUR_S else (60.0, "minutes")
    for row, outcome in enumerate(reversed(outcomes)):
        axes.broken_barh([(0, until_s / unit_s)], (row - 0.36, 0.72), color=IDLE)
        spans: dict[str, list[tuple[float, float]]] = {}
        for stretch in outcome.ribbon:
            if stretch.begin_s < until_s:
                colour = LOADING if stretch.loads else _colour(situation, stretch.tenant)
                length_s = min(stretch.end_s, until_s) - stretch.begin_s
                spans.setdefault(colour, []).append((stretch.begin_s / unit_s, length_s / unit_s))
        for colour, several in spans.items():
            axes.broken_barh(several, (row - 0.36, 0.72), color=colour, linewidth=0)
    axes.set_yticks(range(len(outcomes)), [outcome.policy for outcome in reversed(outcomes)])
    axes.set_xlim(0, until_s / unit_s)
    axes.set_xlabel(f"{unit} since the beginning")
    axes.set_title("Who had the device")
    _plain(axes)
    names = {**_names(situation), "loading a model": LOADING, "idle": IDLE}
    handles = [Patch(facecolor=colour, edgecolor=GRID, label=name) for name, colour in names.items()]
    axes.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(handles), frameon=False, fontsize=9,
        borderaxespad=0.1, handlelength=1.2, columnspacing=1.4,
    )  # fmt: skip


# --- how long they waited --------------------------------------------------------------------------------------------


def _waits(axes: Axes, outcomes: list[Outcome]) -> None:
    situation = outcomes[0].situation
    names = list(situation.groups.values())
    height = 0.8 / len(outcomes)
    for at, name in enumerate(names):
        for number, outcome in enumerate(outcomes):
            waits_s = [max(1.0, wait_s) for wait_s in outcome.waits_s[name]]
            half_s, most_s = percentile(waits_s, 50), percentile(waits_s, 99)
            y = at + (number - (len(outcomes) - 1) / 2) * height
            colour = POLICIES[outcome.policy]
            axes.plot([half_s, most_s], [y, y], color=colour, linewidth=3, solid_capstyle="round", alpha=0.55)
            axes.plot([half_s], [y], "o", color=colour, markersize=8)
            axes.plot([most_s], [y], "|", color=colour, markersize=10, markeredgewidth=3)
            axes.annotate(outcome.policy, (most_s, y), (8, 0), textcoords="offset points", va="center",
                          fontsize=8.5, color=FAINT)  # fmt: skip
    axes.set_xscale("log")
    most_s = max(max(waits) for outcome in outcomes for waits in outcome.waits_s.values())
    axes.set_xlim(0.8, most_s * 7)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in TICKS_S if tick <= most_s * 3]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: duration(seconds)))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", color=GRID)
    for line in range(1, len(names)):
        axes.axhline(line - 0.5, color=GRID)
    axes.set_xlabel("●  half of the jobs      |  all but one in a hundred")
    axes.set_title("Wait until it computes")
    _plain(axes)


# --- where its time went ---------------------------------------------------------------------------------------------


def _time(axes: Axes, outcomes: list[Outcome]) -> None:
    for row, outcome in enumerate(reversed(outcomes)):
        computing, loading = 100 * outcome.utilisation, 100 * outcome.loading_s / max(1.0, outcome.wanted_s)
        colour = POLICIES[outcome.policy]
        axes.barh(row, computing, 0.62, color=colour)
        axes.barh(row, loading, 0.62, left=computing, color=LOADING)
        axes.text(
            1.5, row, f"{computing:.1f} %", va="center", color=ON[colour], fontsize=9, fontweight="bold"
        )
        if loading >= 8:
            axes.text(98.5, row, f"{loading:.0f} %", va="center", ha="right", color="white", fontsize=9)
    axes.set_yticks(range(len(outcomes)), [outcome.policy for outcome in reversed(outcomes)])
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the time with work (dark: loading)")
    axes.set_title("Where the time went")
    _plain(axes)
