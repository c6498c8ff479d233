"""``python -m monai_rl_reg``: see :mod:`monai_rl_reg.command_line`."""

import sys

from monai_rl_reg.command_line import main

if __name__ == "__main__":
    sys.exit(main())
