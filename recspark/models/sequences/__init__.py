"""Models of the next item in a session or a history."""
