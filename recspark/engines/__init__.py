"""Training engines that run on Spark: the costly part of a model, without the model's interface."""
