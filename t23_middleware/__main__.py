"""``python -m t23_middleware``."""

from .ops.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
