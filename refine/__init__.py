"""Training after compression: blocks, the whole model, and correction on the compressed model's inputs."""
