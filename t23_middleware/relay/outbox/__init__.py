"""The outbox: a SQLite file with the reports that wait for delivery. Only this package uses SQL.

One relay at a time writes it, which the relay's lock guarantees. Pages and commands read it; ``dead`` also writes.
"""

from .readers import LONG_LOG, log_size, readers
from .salvage import set_aside
from .schema import SCHEMA_VERSION
from .store import LONGEST_DELAY_MS, SQLiteOutbox
from .values import (
    UNCOUNTED,
    Acked,
    Dead,
    DeadReport,
    EarlyLoss,
    Entry,
    Ingest,
    Key,
    Loss,
    Lost,
    NoOutbox,
    Outbox,
    OutboxCorrupt,
    OutboxError,
    OutboxFull,
    Retry,
    Settlement,
    Snapshot,
    Stats,
    Waiting,
)
from .view import DeadLetters, OutboxView

__all__ = [
    "LONGEST_DELAY_MS",
    "LONG_LOG",
    "SCHEMA_VERSION",
    "UNCOUNTED",
    "Acked",
    "Retry",
    "Dead",
    "DeadLetters",
    "DeadReport",
    "Entry",
    "EarlyLoss",
    "Ingest",
    "Key",
    "Loss",
    "Lost",
    "NoOutbox",
    "Outbox",
    "OutboxCorrupt",
    "OutboxError",
    "OutboxFull",
    "OutboxView",
    "SQLiteOutbox",
    "Settlement",
    "Snapshot",
    "Stats",
    "Waiting",
    "log_size",
    "readers",
    "set_aside",
]
