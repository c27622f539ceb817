"""From queries to the best k items: the exact top-N kernel, and scores of listed items."""
