"""The package's version, written here alone: journals carry it, and reading it must cost the app no import."""

VERSION = "0.1.0"
