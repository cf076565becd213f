"""Export a trained encoder to torch: `python scripts/export_torch.py --help`."""

from porting.export import main

if __name__ == "__main__":
    raise SystemExit(main())
