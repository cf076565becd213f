"""Compare backbones and write a report: `python scripts/compare_backbones.py --help`."""

from jaxear.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before the imports below, which take seconds

from jaxear.compare import main

if __name__ == "__main__":
    raise SystemExit(main())
