"""Models of what comes next, in a session or a history."""
