"""The process that reports: it follows the journals, keeps the outbox, and delivers."""
