"""Log format of a relay that an operator runs: text for people, or one JSON object per line for programs."""

from __future__ import annotations

import json
import logging
import time

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
#: Prefix of our own fields, so that they differ from the fields of ``logging.LogRecord``.
PREFIX = "t23_"


class JSONFormatter(logging.Formatter):
    """Formats a record as one line of JSON: time (ISO 8601, UTC), level, logger, message, and our fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without a line end."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name.startswith(PREFIX)},
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def log_to_stderr(*, machine: bool) -> None:
    """Log to stderr from level INFO on, as JSON if *machine*."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter() if machine else logging.Formatter(_TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
