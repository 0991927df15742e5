"""summary.md and roofline.png: what a reader looks at first, made from the stages' files."""

from __future__ import annotations

import collections
import json
import statistics
from pathlib import Path
from typing import Any

from deconv_ext import bench_table
from deconv_ext.bench_table import Row

FILES = (
    *("1-environment", "2-build", "3-correctness", "4-sanitizer"),
    *("5-timings", "6-tuning", "7-probes", "8-activations"),
)


def read(out: Path, name: str) -> dict[str, Any] | None:
    path = out / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def summary(out: Path) -> str:
    """Markdown: the machine, how far each stage came, what failed, and the timings by class."""
    lines: list[str] = ["# GPU campaign", ""]
    contents = {name: read(out, name) for name in FILES}
    first = next((content for content in contents.values() if content), None)
    if first:
        facts = first["facts"]
        names = ("device", "capability", "commit", "date", "torch", "cuda", "cudnn", "nvcc", "dry")
        lines += [f"* {name}: {facts[name]}" for name in names if facts.get(name) is not None]
        gpu = facts.get("gpu") or {}
        lines += [f"* driver: {gpu['driver_version']}"] if "driver_version" in gpu else []
        lines += [f"* {bench_table.machine_line(facts)}"] if "machine" in facts else []
    for name, content in contents.items():
        lines += ["", f"## {name}", ""]
        if content is None:
            lines.append("not run")
            continue
        states = collections.Counter(status.split(":")[0] for status in content["jobs"].values())
        lines.append(", ".join(f"{count} {state}" for state, count in states.items()) or "nothing")
        bad = [(job, status) for job, status in content["jobs"].items() if status != "done"]
        lines += ["", *(f"* **{job}**: {status}" for job, status in bad[:40])] if bad else []
        lines += FINDINGS[name](content) if name in FINDINGS else []
    return "\n".join(lines) + "\n"


def _build(content: dict[str, Any]) -> list[str]:
    return [
        "",
        *(f"* {row['seconds']:.0f} s, exit code {row['returncode']}" for row in content["rows"]),
    ]


def _correctness(content: dict[str, Any]) -> list[str]:
    lines = [""]
    checks = [row for row in content["rows"] if "check" in row]
    for row in checks:
        if row["ok"] is False or "why" in row:
            told = {key: value for key, value in row.items() if key not in ("check", "tail")}
            lines.append(f"* {row['check']}: {told}")
    results = [row["ok"] for row in checks if row["ok"] is not None]
    matrix = [row for row in content["rows"] if "algo" in row]
    taken = sum(row["taken"] for row in matrix)
    wrong = sum(len(row["wrong"]) for row in matrix)
    lines.append(f"* {sum(results)} of {len(results)} checks passed")
    return [*lines, f"* matrix of algorithms: {taken} problems taken, {wrong} wrong"]


def _sanitizer(content: dict[str, Any]) -> list[str]:
    rows = content["rows"]
    return ["", *(f"* {row['tool']}: {row.get('why') or row['summary']}" for row in rows)]


def _timings(content: dict[str, Any]) -> list[str]:
    rows = [Row(**row) for row in content["rows"]]
    return ["```", bench_table.summary(rows).strip(), "```"] if rows else []


def _probes(content: dict[str, Any]) -> list[str]:
    """The best configuration of each."""
    best: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in content["rows"]:
        key = (row["probe"], row["layout"], row["dtype"])
        if key not in best or row["rate"] > best[key]["rate"]:
            best[key] = row
    return [
        "",
        *(
            f"* {' '.join(key)}: {row['rate']:.4g} {row['unit']} with {row['algo']}, "
            f"torch {row['ceiling']:.4g}"
            for key, row in best.items()
        ),
    ]


def _activations(content: dict[str, Any]) -> list[str]:
    """How many times as fast as separate operators, on average."""
    ratios: dict[tuple[str, ...], list[float]] = {}
    for row in content["rows"]:
        key = (row["dtype"], row["op"], row["activation"])
        ratios.setdefault(key, []).append(row["ours_us"] / row["fused_us"])
    means = {key: statistics.geometric_mean(each) for key, each in ratios.items()}
    return ["", *(f"* {' '.join(key)}: {mean:.2f}x" for key, mean in means.items())]


FINDINGS = {
    "2-build": _build,
    "3-correctness": _correctness,
    "4-sanitizer": _sanitizer,
    "5-timings": _timings,
    "7-probes": _probes,
    "8-activations": _activations,
}


def write(out: Path) -> None:
    """Both files, from what there is."""
    (out / "summary.md").write_text(summary(out))
    content = read(out, "5-timings")
    if not content or not content["rows"]:
        return
    try:
        import matplotlib  # noqa: F401

        from deconv_ext.bench_plot import plot
    except ModuleNotFoundError:
        print("no roofline.png: matplotlib is not installed", flush=True)
        return
    plot(out / "roofline.png", content["facts"], [Row(**row) for row in content["rows"]])
