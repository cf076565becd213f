"""Compare backbones and write a report: `python scripts/compare_backbones.py --help`."""

from jaxear.process_memory import restart_to_keep_memory

if __name__ == "__main__":
    restart_to_keep_memory()  # before the imports below, which take seconds

from jaxear.compare import main

if __name__ == "__main__":
    raise SystemExit(main())
