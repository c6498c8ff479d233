"""``python -m monai_rl_reg``: see :mod:`monai_rl_reg.command_line`."""

import signal
import sys

from monai_rl_reg.command_line import main

if __name__ == "__main__":
    # a scheduler's timeout: leave as at an error, so that nothing half-written stays
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
