"""Port Segment Anything's image encoder to Flax: `python scripts/port_sam.py --help`."""

from porting.sam_cli import main

if __name__ == "__main__":
    raise SystemExit(main())
