"""Run every benchmark, or those named:  python -m benchmarks [prepare ...]"""

import importlib
import pkgutil
import sys
from pathlib import Path

NAMES = sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name != "__main__")


def main() -> None:
    """Run the benchmarks one after the other; each prints its own table."""
    wanted = sys.argv[1:] or NAMES
    if unknown := set(wanted) - set(NAMES):
        sys.exit(f"error: no benchmark {', '.join(sorted(unknown))}; there are: {', '.join(NAMES)}")
    for name in wanted:
        module = importlib.import_module(f"benchmarks.{name}")
        print(f"## {name}: {(module.__doc__ or '').splitlines()[0]}\n", flush=True)
        module.main()
        print(flush=True)


if __name__ == "__main__":
    main()
