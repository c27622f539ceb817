"""Training of neural networks on several ranks (workers that train one network together).

`feed` reads the batches of a rank, `launch` starts the ranks, and `loop` is what each rank runs.
"""
