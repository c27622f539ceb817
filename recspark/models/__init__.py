"""Models behind one contract: `base` says what a model is, `registry` lists them."""
