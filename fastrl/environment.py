"""Environment variables that change what fastrl does. A value that cannot be read is an error.

FASTRL_BACKEND is read by `fastrl.backends`, FASTRL_BUILD_CUDA by `setup.py`.
"""

import logging
import os

from fastrl.errors import ConfigError

LOG_LEVELS = ("debug", "info", "warning", "error")


def checks_values() -> bool:
    """True when FASTRL_CHECK asks ops to look for NaN and for ids out of range.

    Raises:
        ConfigError: when the value is not 0, 1 or nothing.
    """
    value = os.environ.get("FASTRL_CHECK") or "0"
    if value not in ("0", "1"):
        raise ConfigError(f"FASTRL_CHECK: expected 0 or 1, got {value!r}; change or unset it")
    return value == "1"


def set_up_logging() -> None:
    """Send the log of fastrl to standard error from the level that FASTRL_LOG names.

    Without the variable nothing changes: Python shows warnings and errors.

    Raises:
        ConfigError: when there is no such level.
    """
    value = os.environ.get("FASTRL_LOG")
    if not value:
        return
    if value.lower() not in LOG_LEVELS:
        raise ConfigError(f"FASTRL_LOG: expected one of {', '.join(LOG_LEVELS)}, got {value!r}; "
                          "change or unset it")
    logger = logging.getLogger("fastrl")
    logger.setLevel(value.upper())
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
