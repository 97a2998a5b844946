"""Reading a checkpoint's weights: which files they are, whether they have changed, tensors by name, fp8, names in the model."""
