"""A picture of the figures: time against bf16 `F.linear`, and shares of the copy bandwidth."""

from __future__ import annotations

from pathlib import Path

from . import stages


def plot(folder: Path, path: Path) -> None:
    """Draw what `linear` and `rates` have measured; nothing if neither has."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, rates = stages.read("linear", folder), stages.read("rates", folder)
    if not rows and not rates:
        return
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 6), layout="constrained")
    dense = {(row["n"], row["k"], row["m"]): float(row["p50"]) for row in rows if row["variant"] == "F.linear"}
    shape = max(((n, k) for n, k, _ in dense), key=lambda shape: int(shape[0]) * int(shape[1]), default=None)
    lines: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for row in rows:
        measured = (row["n"], row["k"], row["m"]) in dense and row["variant"] != "F.linear"
        if measured and (row["n"], row["k"]) == shape:
            ratio = float(row["p50"]) / dense[row["n"], row["k"], row["m"]]
            lines.setdefault((row["type"], row["variant"], row["loras"]), []).append((int(row["m"]), ratio))
    for (name, variant, loras), points in lines.items():
        style = "-" if variant == "graft" else ":"
        left.plot(*zip(*sorted(points), strict=True), label=f"{name}, {variant}, {loras} LoRAs", linestyle=style)
    left.axhline(1, color="black", linewidth=0.8)
    left.set(xscale="log", yscale="log", xlabel="M, rows of x", ylabel="time / bf16 F.linear", title=f"N, K: {shape}")
    if lines:
        left.legend(fontsize=6, ncols=2)
    shares = [row for row in rates if row["share"] and row["variant"] == "graft"]
    right.barh([f"{row['what']} {row['type']}" for row in shares], [float(row["share"]) for row in shares])
    right.tick_params(axis="y", labelsize=6)
    about = (rates or rows)[0]
    right.set(xlabel="share of the copy bandwidth", title=f"{about['gpu']}, torch {about['torch']}")
    figure.savefig(path, dpi=120)
