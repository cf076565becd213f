"""Compare backbones and write a report: `python scripts/compare_backbones.py --help`."""

from jaxear.compare import main

if __name__ == "__main__":
    raise SystemExit(main())
