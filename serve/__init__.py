"""Results in inference engines: plugins of vLLM and SGLang, which hold the compressed tensors and multiply by them."""
