"""Tables of benchmarks/README.md and other pages, each between two markers that bear its name."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from equimd.results import write_text_atomically

README = Path(__file__).with_name("README.md")


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of text."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def write_table(name: str, text: str, page: Path = README) -> None:
    """Replace what stands between ``<!-- name: begin -->`` and ``<!-- name: end -->`` in ``page``."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    write_text_atomically(page, f"{before}{begin}\n{text}\n{end}{after}")
