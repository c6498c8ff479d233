"""The MONAI Label app: ``monailabel start_server --app $(python -m monai_rl_reg label-app) --studies FOLDER``."""
