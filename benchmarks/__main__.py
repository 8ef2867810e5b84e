"""`python -m benchmarks` lists the benchmarks; with a name it runs that one, passing the other arguments on."""

import ast
import runpy
import sys
from pathlib import Path


def benchmarks() -> dict[str, Path]:
    """Name -> file, sorted."""
    folder = Path(__file__).parent
    return {path.stem: path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")}


def first_line(path: Path) -> str:
    """What the file says it is."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def main(arguments: list[str]) -> int:
    """Exit code 2 for a name that is not there."""
    found = benchmarks()
    if not arguments:
        width = max(map(len, found), default=0)
        print("\n".join(f"{name.ljust(width)}  {first_line(path)}" for name, path in found.items()))
        return 0
    name, *rest = arguments
    if name not in found:
        print(f"{name!r} is not a benchmark; there are {', '.join(found)}", file=sys.stderr)
        return 2
    sys.argv = [str(found[name]), *rest]
    runpy.run_path(str(found[name]), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
