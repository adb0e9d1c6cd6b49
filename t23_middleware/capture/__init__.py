"""The app's side: it names the play, counts the bytes, and writes two journal lines per response."""
