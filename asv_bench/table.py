"""Make a table in Markdown of asv's newest results: python asv_bench/table.py > docs/explanation/results.md."""

import json
import platform
from itertools import product
from pathlib import Path

import torch

WANTED = (
    "products.Products.track_speedup",
    "products.Caches.track_speedup",
    "products.Construction.track_products_of_the_peer",
    "products.Eigenvalues.track_speedup",
    "products.FractionOfLimit.track_fraction_of_limit",
    "products.Products.time_product",
    "products.Scaling.time_product",
    "products.Memory.peakmem_construction_and_product",
)


def newest():
    """Return the results of the newest run of each benchmark."""
    files = sorted(
        (Path(__file__).parent / ".asv" / "results").glob("*/*-*.json"), key=lambda path: path.stat().st_mtime
    )
    found = {}
    for path in files:
        run = json.loads(path.read_text())
        columns = run["result_columns"]
        for name, values in run["results"].items():
            found[name] = dict(zip(columns, values, strict=False))
    return found


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main():
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32.\n")
    print("| benchmark | case | result |\n|---|---|---|")
    results = newest()
    for name in WANTED:
        result = results.get(name)
        if result is None:
            continue
        cases = [", ".join(case).replace("'", "") for case in product(*result["params"])]
        for case, value in zip(cases, result["result"] or [], strict=False):
            if isinstance(value, float) and value == value:
                text = f"{1e3 * value:.3g} ms" if "time_" in name else f"{value:.3g}"
                text = f"{value / 1e6:.0f} MB" if "peakmem_" in name else text
                print(f"| `{name.removeprefix('products.')}` | {case} | {text} |")


if __name__ == "__main__":
    main()
