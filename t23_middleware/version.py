"""The package's version. Journals contain it, so the app reads it here without a further import."""

VERSION = "0.1.0"
