"""Files: finding a checkpoint, reading its weights, writing the artifact, and loading the artifact with transformers."""
