"""The kinds of sources, a module each: `recspark.sources.KINDS` lists them."""
