"""The relay process: it reads the journals, decides what to report, stores reports in the outbox, and sends them."""
