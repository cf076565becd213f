"""Port timm's encoders to Flax: `python scripts/port_timm.py --help`."""

from porting.timm_cli import main

if __name__ == "__main__":
    raise SystemExit(main())
