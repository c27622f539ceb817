"""Lists that no single model makes: the ladder of several models, and the default lists."""
