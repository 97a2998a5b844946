"""The export `gguf`: one file for llama.cpp and the tools that are built on it."""
