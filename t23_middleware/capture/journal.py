"""The writer of the app's own journal. The relay writes what it learns from the kernel with the same one."""

from ..journal import JournalWriter

__all__ = ["JournalWriter"]
