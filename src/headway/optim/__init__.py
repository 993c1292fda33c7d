"""Optimizers: each a `torch.optim.Optimizer`."""
