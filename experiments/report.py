"""Makes figures and tables of the rows in results/, and nothing else does.

    python -m experiments.report [--check] [NAME ...]

Figures go to `figures/`, tables between the markers `<!-- table: NAME -->` and `<!-- end -->` of README.md and
experiments/README.md. `--check` writes nothing, and ends with 1 if a table there is not what the rows say.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from . import figures_engines, figures_paging, figures_training
from .findings import TABLES

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "README.md", ROOT / "experiments" / "README.md"
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
FIGURES: dict[str, Callable[[], Figure]] = {
    figure.__name__: figure
    for figure in (
        figures_engines.vs_vllm,
        figures_engines.dense_kv,
        figures_engines.vs_hf,
        figures_paging.fragmentation,
        figures_paging.kv_memory,
        figures_paging.page_size,
        figures_paging.sharing,
        figures_paging.recovery,
        figures_training.rl,
        figures_training.logprob_gap,
        figures_training.rollouts,
        figures_training.invariance,
    )
}


def filled(page: str) -> str:
    """A page with the tables that the rows give now. KeyError on a marker of no table."""
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + "\n" + found[3], page)


def draw(names: list[str]) -> None:
    folder = ROOT / "experiments" / "figures"
    folder.mkdir(exist_ok=True)
    for name in names:
        FIGURES[name]().savefig(folder / f"{name}.png", dpi=120, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="figures and tables of the rows in results/")
    parser.add_argument("figures", nargs="*", default=list(FIGURES), metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--check", action="store_true", help="only whether the tables are as the rows say")
    args = parser.parse_args()
    unknown = set(args.figures) - set(FIGURES)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}; accepted: {', '.join(FIGURES)}")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if args.check and filled(text) != text:
            sys.exit(f"{page.relative_to(ROOT)} is not what the rows say: python -m experiments.report")
        if not args.check:
            page.write_text(filled(text), encoding="utf-8")
    if not args.check:
        draw(args.figures)


if __name__ == "__main__":
    main()
