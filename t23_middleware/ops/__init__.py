"""For operators and developers: the commands, the operator's pages, the stand-in API and the demo."""
