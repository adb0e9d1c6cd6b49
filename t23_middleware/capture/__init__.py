"""The app's side: identifies the play, counts the bytes, and writes two journal lines per response."""
