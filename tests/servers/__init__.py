"""Every WSGI server that we know of, as a real process: the same answers as the bare app's, counted to the byte."""
