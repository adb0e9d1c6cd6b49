"""The writer of the app's journal. The relay uses the same class for the kernel's counters."""

from ..journal import JournalWriter

__all__ = ["JournalWriter"]
