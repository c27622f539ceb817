"""Training engines that run on Spark: the heavy part of a model, without its contract."""
