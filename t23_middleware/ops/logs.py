"""The log lines of a relay that an operator runs: text for people, or one JSON object a line for programs."""

from __future__ import annotations

import json
import logging
import time

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
#: What the fields of our own are named with, so that they are none of ``logging.LogRecord``'s.
PREFIX = "t23_"


class JSONFormatter(logging.Formatter):
    """A record as one line of JSON: time (ISO 8601, UTC), level, logger, message, and our fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
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
    """All that is logged from INFO on goes to stderr, with *machine* as JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter() if machine else logging.Formatter(_TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
