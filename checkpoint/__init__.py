"""Files: where a checkpoint lies, weights in, the artifact out, and loading it with transformers."""
