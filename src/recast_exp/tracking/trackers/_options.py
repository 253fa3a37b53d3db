"""The check of trackers that have no options of their own."""

from __future__ import annotations

from recast_exp.config.schema import LoggerConfig
from recast_exp.errors import UserError


def expect_none(logger: LoggerConfig) -> None:
    """Refuse `logger.options`.

    Raises:
        UserError: If there are any.
    """
    if logger.options:
        name = next(iter(logger.options))
        raise UserError(f"logger.options.{name}: expected no options, as logger={logger.name} has none; leave it out")
