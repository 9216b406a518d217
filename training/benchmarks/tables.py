"""Tables and the plot of the benchmark: means with standard errors, and DivRegNet against other methods pair by pair."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from training.benchmarks.cases import FAMILIES
from training.benchmarks.methods import DEFAULT, METHODS, OURS

SCORES = ("Dice", "ASD mm", "HD95 mm", "error mm", "TRE mm", "folded %", "inverse mm")
COSTS = ("seconds", "deformation s", "CPU s", "peak MiB", "above start MiB", "GPU MiB")
HELD_BACK, SEEN, ALL = "held back", "seen", "all pairs"
RIVALS = ("ANTs SyN", "ANTs SyN, CC", "elastix", "ConvexAdam", "NiftyReg", "greedy")
AIM_OF_PAIRS = 0.9
COLORS = dict(zip(METHODS, ("0.75", "0.45", "C0", "#8fbce6", "C1", "C2", "C8", "C4", "#f2a0a0", "C3", "#8c1a1a", "k"),
                  strict=True))  # fmt: skip


def judged(family: str) -> str:
    """The score by which methods of a family are ranked."""
    return FAMILIES[family].judged if family in FAMILIES else "Dice"


def set_of(family: str, case: str) -> str:
    """Whether images of a case were used by a training or for a choice of settings (``seen``) or not (``held back``)."""
    return SEEN if family in FAMILIES and case in FAMILIES[family].seen else HELD_BACK


def standard_error(values: list[float]) -> float | None:
    """Of the mean; None of a single value. Pairs that share an image are treated as independent."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def means(rows: list[dict]) -> list[dict]:
    """One row per family, set and method: means over the pairs, standard errors of scores, and the maximum of memory."""
    table = []
    for family, which, method in dict.fromkeys((r["family"], r["set"], r["method"]) for r in rows):
        these = [r for r in rows if (r["family"], r["set"], r["method"]) == (family, which, method)]
        done = [r for r in these if "failed" not in r]
        row = {"family": family, "set": which, "method": method, "pairs": len(done)}
        for key in (*SCORES, *COSTS):
            values = [r[key] for r in done if r.get(key) is not None]
            row[key] = float(max(values) if "MiB" in key else np.mean(values)) if values else None
            if key in SCORES:
                row[f"{key} se"] = standard_error(values)
        table.append(row | ({"failed": len(these) - len(done)} if len(done) < len(these) else {}))
    empty = {key for key in table[0] if all(row.get(key) is None for row in table)} if table else set()
    return [{k: v for k, v in row.items() if k not in empty} for row in table]


def accuracy(table: list[dict]) -> list[dict]:
    """One row per family and set, one column per method: the score that ranks the family, with its standard error.

    Args:
        table: that of :func:`means`. The best method of a row is in bold type.
    """
    rows = []
    for family, which in dict.fromkeys((r["family"], r["set"]) for r in table):
        of = {r["method"]: r for r in table if (r["family"], r["set"]) == (family, which) and r["pairs"]}
        by = judged(family)
        values = {m: r[by] for m, r in of.items() if r.get(by) is not None}
        best = (max if by == "Dice" else min)(values, key=values.get, default=None)
        row = {"family": family, "set": which, "pairs": max((r["pairs"] for r in of.values()), default=0), "by": by}
        for method, value in values.items():
            text = f"{value:.3f}" if by == "Dice" else f"{value:.2f}"
            error = of[method].get(f"{by} se")
            text = f"**{text}**" if method == best else text
            row[method] = (
                text if error is None else f"{text} ± {error:.3f}" if by == "Dice" else f"{text} ± {error:.2f}"
            )
        rows.append(row)
    return rows


def against(rows: list[dict], ours: str = DEFAULT) -> list[dict]:
    """``ours`` against each other method, pair by pair.

    Returns:
        one row per family, set and method, and one for all pairs of a method: ``gain``, the mean difference in the score that
        ranks the family (positive if ``ours`` is better), its standard error, and the share of pairs on which ``ours`` is at
        least as good. The gain over all pairs is left out, since Dice and millimeters do not add up.
    """
    values = {(r["family"], r["case"], r["method"]): r.get(judged(r["family"])) for r in rows if "failed" not in r}
    table, everything = [], {}
    for family, which in dict.fromkeys((r["family"], r["set"]) for r in rows):
        cases = dict.fromkeys(r["case"] for r in rows if (r["family"], r["set"]) == (family, which))
        sign = 1 if judged(family) == "Dice" else -1
        for rival in RIVALS:
            pairs = [(values.get((family, c, ours)), values.get((family, c, rival))) for c in cases]
            gains = [sign * (a - b) for a, b in pairs if a is not None and b is not None]
            if gains:
                everything.setdefault(rival, []).extend(gains)
                table.append(_against(family, which, judged(family), rival, gains) | {"gain": float(np.mean(gains))}
                             | {"se": standard_error(gains)})  # fmt: skip
    return table + [_against(ALL, "", "", rival, gains) for rival, gains in everything.items()]


def _against(family: str, which: str, by: str, rival: str, gains: list[float]) -> dict:
    share = float(np.mean([gain >= 0 for gain in gains]))
    return {
        "family": family,
        "set": which,
        "by": by,
        "against": rival,
        "pairs": len(gains),
        "at least as good %": 100 * share,
    }


def aims(rows: list[dict]) -> list[dict]:
    """Which aims the default reaches: the mean of every family, 90 % of all pairs, and no fold anywhere."""
    compared = against(rows)
    folded = max(
        (r["folded %"] for r in rows if r["method"] == DEFAULT and r.get("folded %") is not None), default=None
    )
    table = []
    for rival in dict.fromkeys(r["against"] for r in compared):
        own = [r for r in compared if r["against"] == rival and r["family"] != ALL]
        below = [f"{r['family']} ({r['set']})" for r in own if r["gain"] < 0]
        share = next(r["at least as good %"] for r in compared if r["against"] == rival and r["family"] == ALL)
        table.append({
            "against": rival, "families at or above": f"{len(own) - len(below)} of {len(own)}", "below in": ", ".join(below),
            "pairs at or above %": share, "90 % of pairs": "yes" if share >= 100 * AIM_OF_PAIRS else "no",
            "largest share of folded voxels %": folded,
        })  # fmt: skip
    return table


def worst(rows: list[dict], count: int = 5, ours: str = DEFAULT) -> list[dict]:
    """The pairs on which ``ours`` has the most error, as a multiple of that of the best other method.

    The error is 1 - Dice where Dice ranks the family, and the error in mm elsewhere.
    """
    errors: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        by = judged(row["family"])
        if "failed" not in row and row.get(by) is not None:
            value = 1 - row[by] if by == "Dice" else row[by]
            errors.setdefault((row["family"], row["case"]), {})[row["method"]] = value
    table = []
    for (family, case), of in errors.items():
        others = {m: e for m, e in of.items() if m in RIVALS}
        if ours in of and others:
            best = min(others, key=others.get)
            times = of[ours] / max(others[best], 1e-9)
            table.append({"family": family, "case": case, "best other": best, "error, times that of the best other": times}
                         | {"error of ours": of[ours]})  # fmt: skip
    return sorted(table, key=lambda row: -row["error, times that of the best other"])[:count]


def plot(rows: list[dict]) -> Figure:
    """Accuracy against CPU time, one panel per family: means over all its pairs, bars of one standard error."""
    families = list(dict.fromkeys(r["family"] for r in rows))
    table = means([r | {"set": ALL} for r in rows])
    columns = min(len(families), 4)
    lines = -(-len(families) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.0 * lines + 0.9), layout="constrained")
    for axes, family in zip(figure.subplots(lines, columns, squeeze=False).flat, families, strict=False):
        of, by = {r["method"]: r for r in table if r["family"] == family and r["pairs"]}, judged(family)
        for method, row in of.items():
            if METHODS[method].start is None:
                axes.axhline(row[by], color=COLORS[method], linestyle=":", label=method)
                continue
            marker = "D" if method in OURS else "o"
            axes.errorbar(row["CPU s"], row[by], yerr=row.get(f"{by} se"), fmt=marker, color=COLORS[method], label=method,
                          markersize=5, elinewidth=0.8)  # fmt: skip
        count = max((row["pairs"] for row in of.values()), default=0)
        axes.set(xscale="log", title=f"{family}, {count} pair{'s' * (count != 1)}", xlabel="CPU seconds", ylabel=by)
        if by != "Dice":  # better is up
            axes.invert_yaxis()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    for axes in figure.axes[len(families) :]:
        axes.set_axis_off()
    handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 7))
    return figure
