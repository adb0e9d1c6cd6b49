"""What people look at: the commands, the stand-in API, the demo."""
