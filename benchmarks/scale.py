"""Measure what grows with the size of networks, of data and of fleets, and reckon on from there.

    python benchmarks/scale.py --data-dir DIR [--only network ...]
    python benchmarks/scale.py --draw

Each point is a process of its own, see `growth.py`. Results go to ``benchmarks/results/scale``, one
file a kind, after every point; points that are there are not measured again. Then the tables of
``docs/scale.md`` are written anew, and ``docs/scale.svg``; ``--draw`` does that alone. Points that
are measured at the same time need cores of their own: ``taskset -c 0 python benchmarks/scale.py``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slopes import (
    COLOURS,
    draw,
    law_of,
    memory,
    on_by_law,
    on_by_line,
    processor_seconds,
    slope_of,
)

from filterpress import files

RESULTS = Path(__file__).parent / "results" / "scale"
UPDATES = RESULTS.with_name("updates.json")
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
POINTS: dict[str, tuple[int, ...]] = {
    "network": (8, 16, 32, 64, 128, 192),
    "data": (1000, 4000, 15000, 60000),
    "fleet": (3, 10, 30, 100, 300),
    "buckets": (),
    "limit": (250, 270, 540),
}
STAGES = tuple(reversed(COLOURS))
OF_DATA = ("read", "train", "choose calibration images", "calibrate", "evaluate")
VEHICLES, HOUR, DAY = 1_000_000, 3600, 86400
Json = dict[str, Any]
Rows = Sequence[Sequence[str]]


def load(kind: str) -> dict[str, Json]:
    """Read the points of a kind that are there, by their size."""
    file = RESULTS / f"{kind}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def complete(kind: str, data_dir: str) -> None:
    """Measure the points of a kind that are missing."""
    found = load(kind)
    for size in map(str, POINTS[kind] or [""]):
        if size not in found:
            own = [size] if size else []
            own += [data_dir] if kind == "data" else []
            called = [sys.executable, str(Path(__file__).with_name("growth.py")), kind, *own]
            done = subprocess.run(called, check=True, stdout=subprocess.PIPE)
            found[size] = json.loads(done.stdout)
            print(kind, size, done.stdout.decode(), flush=True)
            files.write(RESULTS / f"{kind}.json", (json.dumps(found, indent=1) + "\n").encode())


def table(head: Sequence[str], rows: Rows, align: str = "---:") -> str:
    """Lay rows out in Markdown, all but the first column in one way."""
    lines = [head, ["---"] + [align] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figures(value: float) -> str:
    """Write a number with three figures, thousands apart."""
    return f"{float(f'{value:.3g}'):,g}" if value < 1e6 else f"{value:,.0f}"


def time_of(seconds: float) -> str:
    """Write a time in the unit that suits it."""
    for unit, size in (("days", DAY), ("h", HOUR), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"


def network_tables(points: Sequence[Json]) -> dict[str, str]:
    """Lay out the stages by the size of the network, and what a billion parameters come to."""
    sizes = [p["parameters"] for p in points]
    taken, slopes = [], []
    for stage in STAGES:
        spent = [(n, processor_seconds(p, stage)) for n, p in zip(sizes, points, strict=True)]
        held = [(n, memory(p, stage)) for n, p in zip(sizes, points, strict=True)]
        taken.append([stage, *(figures(seconds) for _, seconds in spent)])
        law, (low, high) = law_of(spent), sorted(on_by_law(stage, spent))
        slopes.append(
            [
                stage,
                f"{law.exponent:.2f}",
                f"{law.off:.0%}",
                f"{law.last:.2f}",
                f"{time_of(low)} to {time_of(high)}",
                f"{slope_of(held):.0f}",
                f"{on_by_line(held) / 1e9:.0f} GB",
            ]
        )
    peak = ["most memory, GB"]
    peak += [figures(max(r["peak"] for r in p["stages"].values()) / 1e9) for p in points]
    share = ["parameters left after `reduce`"]
    share += [f"{p['reduced_parameters'] / p['parameters']:.0%}" for p in points]
    head = ["processor seconds", *(f"{n / 1e6:.3g} M" for n in sizes)]
    parts = ["slope of seconds", "worst point off by", "slope of the last two", "at 10⁹"]
    parts += ["bytes for one more parameter", "at 10⁹"]
    return {
        "network": table(head, [*taken, peak, share]),
        "slopes": table(["stage", *parts], slopes),
    }


def data_table(points: Sequence[Json]) -> str:
    """Lay out the stages by the number of images."""
    rows = []
    for stage in OF_DATA:
        taken = [p["stages"][stage]["processor"] for p in points]
        each = (taken[-1] - taken[0]) / (points[-1]["images"] - points[0]["images"])
        rows.append([stage, *map(figures, taken), f"{1e6 * each:,.0f} µs"])
    for name, stage in {"MB, at most, to read": OF_DATA[0], "MB thereafter": OF_DATA[2]}.items():
        held = [p["stages"][stage]["peak"] for p in points]
        each = (held[-1] - held[0]) / (points[-1]["images"] - points[0]["images"])
        rows.append([name, *(figures(h / 1e6) for h in held), f"{each:,.0f} bytes"])
    head = ["processor seconds", *(f"{p['images']:,} images" for p in points), "one more image"]
    return table(head, rows)


def fleet_table(points: Sequence[Json]) -> str:
    """Lay out a store by the number of its releases."""
    rows = [
        [
            f"{p['releases']}",
            f"{p['metadata']['release']:,}",
            f"{p['metadata']['snapshot']:,}",
            f"{p['poll']['requests']}, {p['poll']['bodies']}",
            f"{p['update']['requests']}, {p['update']['over_payload']:,}",
            figures(p["publish"]["processor_to_release"]),
            figures(p["publish"]["processor_to_point_channel"]),
        ]
        for p in points
    ]
    head = ["releases", "bytes of their list", "of the snapshot", "poll: requests, bytes"]
    head += [
        "update: requests, bytes beside the payload",
        "seconds to release",
        "to point a channel",
    ]
    return table(head, rows)


def arithmetic(points: Sequence[Json], updates: Json) -> str:
    """Reckon what `VEHICLES` vehicles cost, each line with its formula and its numbers."""
    poll, delta, full = (
        updates[name] for name in ("poll without news", "update by delta", "update in full")
    )
    before, last = points[-2:]
    n_bytes = last["metadata"]["release"]
    entry = (n_bytes - before["metadata"]["release"]) / (last["releases"] - before["releases"])
    rest = n_bytes - entry * last["releases"]
    v, r, b, d, f = VEHICLES, poll["requests"], poll["received"], delta["bodies"], full["bodies"]
    by_delta = f"{delta['payload']:,} + {delta['over_payload']:,}"
    in_full = f"{full['payload']:,} + {full['over_payload']:,}"
    rows = [
        [
            "requests, polls evenly spread",
            "V r / T",
            f"V {r} / {HOUR}",
            f"{v * r / HOUR:,.0f} a second",
        ],
        [
            "requests, all within one minute",
            "V r / 60",
            f"V {r} / 60",
            f"{v * r / 60:,.0f} a second",
        ],
        ["answers to polls", "V b / T", f"V {b} / {HOUR}", f"{v * b / HOUR / 1e6:.2f} MB/s"],
        ["the same in a day", "24 V b", f"24 V {b}", f"{24 * v * b / 1e9:.0f} GB"],
        ["a release by deltas", "V (d + o)", f"V ({by_delta})", f"{v * d / 1e9:.0f} GB"],
        ["a release in full", "V (f + o)", f"V ({in_full})", f"{v * f / 1e9:.0f} GB"],
        [
            "deltas to all within T",
            "V (d + o) / T",
            f"V {d:,} / {HOUR}",
            f"{v * d / HOUR / 1e6:.0f} MB/s",
        ],
        [
            "deltas ramped over a week",
            "V (d + o) / W",
            f"V {d:,} / {7 * DAY:,}",
            f"{v * d / (7 * DAY) / 1e6:.2f} MB/s",
        ],
        [
            "list of N releases",
            "c + N e",
            f"{rest:,.0f} + N {entry:.0f}",
            f"as much as the delta at N = {(delta['payload'] - rest) / entry:.0f}",
        ],
        [
            "lists, in the release after a year of weekly ones",
            "V (c + 52 e)",
            f"V ({rest:,.0f} + 52 * {entry:.0f})",
            f"{v * (rest + 52 * entry) / 1e9:.0f} GB",
        ],
    ]
    return table(["what", "formula", "numbers", "result"], rows, "---")


def bucket_table(point: Json) -> str:
    """Lay out how many vehicles find that they take part."""
    rows = [
        [share, f"{n:,}", f"{n / point['vehicles']:.3%}"]
        for share, n in point["taking part"].items()
    ]
    each = f"{1e6 * point['seconds'] / point['vehicles']:.1f} µs"
    rows.append(["time of one decision", each, ""])
    return table(["rollout to", f"of {point['vehicles']:,} ids", ""], rows)


def limit_table(points: Sequence[Json]) -> str:
    """Lay out what was refused, with the memory that it took until then."""
    rows = []
    for p in points:
        peak = max([p["peak"], *(row["peak"] for row in p["stages"].values())])
        rows.append(
            [
                f"{p['parameters'] / 1e6:.0f} M",
                f"{peak / 1e9:.1f}",
                p["refused"].partition(". ")[0] or "encoded and decoded",
            ]
        )
    return table(["parameters", "most memory, GB", "outcome"], rows, "---")


def fill(page: str, parts: dict[str, str]) -> str:
    """Put each part between its two marks in a page."""
    for name, part in parts.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = page.partition(start)
        page = before + start + part + "\n" + end + rest.partition(end)[2]
    return page


def main() -> None:
    """Measure what is missing, and write the page's tables and its drawing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", default="", help="folder of Fashion-MNIST")
    parser.add_argument("--only", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    given = parser.parse_args()
    for kind in () if given.draw else given.only:
        complete(kind, given.data_dir)
    known = {kind: list(load(kind).values()) for kind in POINTS}
    if all(known.values()):
        parts = network_tables(known["network"])
        parts["data"] = data_table(known["data"])
        parts["fleet"] = fleet_table(known["fleet"])
        parts["buckets"] = bucket_table(known["buckets"][0])
        parts["arithmetic"] = arithmetic(known["fleet"], json.loads(UPDATES.read_text()))
        parts["limit"] = limit_table(known["limit"])
        files.write(PAGE, fill(PAGE.read_text(), parts).encode())
        files.write(PAGE.with_suffix(".svg"), draw(known["network"]))


if __name__ == "__main__":
    main()
