"""From queries to the k best items: the exact top-N kernel, and scores of short item lists."""
